"""One training step, one epoch, a whole run, and evaluation.

Letters: B images of a batch, N patch tokens, D channels, L layer pairs, C classes.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from cuda_graph import StepGraph, StepResult, graph_problem
from loaders import first_batch, report_bad_images
from loggers import MetricLog, Progress, log_rank0, peak_memory, progress_bar
from models import Output, TappedModel
from readers import BadImageError
from run_dir import CheckpointManager, TrainingState
from stopping import iter_with_signals_blocked

EVALUATION_LINES = 30.0  # seconds between the lines of an evaluation


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision for the models; none with float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def ddp_no_sync(student: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Keeps DDP from averaging gradients before the last forward pass of a step has added its own."""
    return nullcontext() if last or not isinstance(student, DistributedDataParallel) else student.no_sync()


class NonFiniteGuard:
    """Withholds the update of a step in which a value was not finite, on all ranks, and reports what it was and where.

    A rank whose terms or logits are not finite multiplies its loss by NaN. Its gradients become NaN, and so do the
    averaged gradients of all ranks, so no rank takes the update. This needs no extra communication, and the host does
    not wait for the device: it learns of the fault at the next `sync`.

    Under float16, overflowing gradients are normal: the scaler withholds the update, and no error is raised. Only terms
    or logits that are not finite, or a scale below 1, raise an error.

    Args:
        scaler: of the gradients.
        every_step: the trainer calls `sync` after each step; on the CPU this costs no wait.
    """

    def __init__(self, scaler: torch.amp.GradScaler, every_step: bool = True) -> None:
        self.every_step = every_step
        self._scaler = scaler
        self._step, self._indices = '', torch.empty(0)
        self._names: list[str] = []
        self._finite = torch.empty(0)  # of this step: whether each value in `_names` is finite
        self._own_gradients: Tensor | None = None  # with DDP: whether this rank's are finite before averaging
        self._steps: list[tuple[str, Tensor, Tensor]] = []  # since the last sync: step, image indices, what is finite

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Lets the guard see this rank's gradients before they are averaged."""
        ddp.register_comm_hook(self, NonFiniteGuard._average)

    def see_own_gradients(self, gradients: Tensor) -> None:
        """Takes gradients of this rank before they are averaged."""
        assert self._own_gradients is not None
        self._own_gradients = self._own_gradients & torch.isfinite(gradients).all()

    def _average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.see_own_gradients(bucket.buffer())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default process group

    def begin_step(self, name: str, indices: Tensor) -> None:
        """Starts a step with its name and the indices of its images on this rank, on the CPU."""
        self._step, self._indices = name, indices

    def mask_loss(self, loss: Tensor, values: dict[str, Tensor], is_first: bool) -> Tensor:
        """The loss, or NaN if a value (term, logits) is not finite. To be called for each forward pass of a step."""
        finite = torch.stack([torch.isfinite(value).all() for value in values.values()])
        self._names = list(values)
        self._finite = finite if is_first else finite & self._finite
        self._own_gradients = torch.ones_like(finite[0])
        return loss * torch.where(finite.all(), 1.0, torch.nan)

    def check_grad_norm(self, norm: Tensor) -> Tensor:
        """What is finite, bools on the device; the last one, the same on all ranks: the update may be taken.

        Args:
            norm: of the gradient, averaged over the ranks.
        """
        good = torch.isfinite(norm)
        gradient = self._own_gradients if dist.is_initialized() else good
        return torch.stack([*self._finite, gradient, good])  # type: ignore[list-item]

    def end_step(self, finite: Tensor) -> None:
        """Keeps what `check_grad_norm` returned until the next `sync`."""
        self._steps.append((self._step, self._indices, finite.clone()))

    def sync(self) -> None:
        """Raises if an update was withheld since the last call. Waits for the device; all ranks call it together.

        Raises:
            FloatingPointError: names what was not finite, the step, the rank and the images.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            raise FloatingPointError(f'not finite at {steps[-1][0]}: gradients overflow at every scale of float16')
        for (name, indices, _), flags in zip(steps, torch.stack([step[2] for step in steps]).tolist(), strict=True):
            if not flags[-1]:  # the same on all ranks, so all of them come here
                what = self._describe(utils.gather_objects(self._local_faults(indices, flags)))
                if what:
                    raise FloatingPointError(f'not finite at {name} {what}')

    def _local_faults(self, indices: Tensor, flags: list[bool]) -> tuple[str, bool]:
        """What was not finite on this rank in a step ('' if nothing), and whether it includes a model's output."""
        *forward, gradient, _ = flags
        names = [name for name, finite in zip(self._names, forward, strict=True) if not finite]
        if not names and not gradient and not self._scaler.is_enabled():
            names = ['gradients']
        text = f'{", ".join(names)}; images {" ".join(map(str, indices.tolist()))}' if names else ''
        return text, any(name.endswith(('logits', 'tokens')) for name in names)

    def _describe(self, ranks: list[tuple[str, bool]]) -> str:
        # Global relations make a term non-finite on every rank: report the ranks whose models produced the values.
        origins = any(origin for _, origin in ranks)
        faults = [text if origin or not origins else '' for text, origin in ranks]
        if not any(faults):
            return '' if self._scaler.is_enabled() else 'on all ranks: the norm of the averaged gradient'
        return '; '.join(f'on rank {rank}: {text}' for rank, text in enumerate(faults) if text)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training steps."""

    device: torch.device  # of the models
    amp_dtype: torch.dtype = torch.float32  # of autocast for both models; float32 turns autocast off
    seed: int = 0  # with the step it determines every random number of that step
    epochs: int = 1
    accum_steps: int = 1  # forward passes per step; relations see the images of one pass, mixing the whole batch
    clip_grad: float | None = None  # largest norm of the gradient
    train_mode: bool = True  # False keeps dropout and drop-path off
    global_relations: bool = False  # terms relate images of all ranks, so all ranks draw the same random tokens
    log_grad_share: bool = False  # log each term's share of the gradient after each epoch
    eval_ema: bool = False  # evaluate the EMA weights too after each epoch
    print_freq: int = 10  # steps between log lines; between them the host does not wait for the device
    cuda_graph: bool = False  # launch a step as one CUDA graph, see `cuda_graph.StepGraph`


class Trainer:
    """Runs training steps.

    Args:
        student: images (B, 3, H, W) → `Output` with logits and tokens, on its device; wrapped in DDP here if there is
            a process group.
        teacher: the same, frozen; None without distillation.
        criterion: (student_out, teacher_out, targets, generator) → weighted scalars by name; the loss is their sum.
        state: optimizer, scaler, EMA, counters and meters of the run.
        config: how the steps are made.
        preprocess: images as they are loaded → normalised images, see `transforms.DevicePreprocess`.
        mixup: images and classes → mixed images and soft labels (B, C).
    """

    def __init__(
        self,
        student: TappedModel,
        teacher: TappedModel | None,
        criterion: nn.Module,
        state: TrainingState,
        config: TrainConfig,
        preprocess: Callable[..., Tensor] | None = None,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.tapped, self.teacher, self.criterion, self.state, self.config = student, teacher, criterion, state, config
        self.preprocess, self.mixup = preprocess, mixup
        self.optimizer, self.scaler = state.optimizer, state.scaler
        self.generator = torch.Generator(config.device)
        self.student: nn.Module = student
        self.graph = self._make_graph() if config.cuda_graph else None
        self.guard = NonFiniteGuard(state.scaler, every_step=config.device.type == 'cpu' and not self.graph)
        if dist.is_initialized() and self.graph:
            for tensor in student.state_dict().values():  # as DistributedDataParallel does at its start
                dist.broadcast(tensor, 0)
        elif dist.is_initialized():
            ids = [config.device.index] if config.device.type == 'cuda' else None
            self.student = DistributedDataParallel(student, device_ids=ids)
            self.guard.attach(self.student)

    def _make_graph(self) -> StepGraph | None:
        """The step as a CUDA graph; None, with a warning, if this run cannot have one."""
        if problem := graph_problem(self.state, self.config.device):
            log_rank0(f'warning: --cuda-graph: {problem}; steps are launched kernel by kernel')
            return None
        return StepGraph(self.compute_step, self.optimizer, self.generator)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.config.device, self.config.amp_dtype)

    def train_step(self, batch: Sequence[Any], name: str = 'step') -> None:
        """One step: an optimizer update from a batch.

        Args:
            batch: images (B, 3, H, W), classes (B,), the images' indices (B,), and what else `preprocess` takes.
            name: of the step, for errors.
        """
        images, targets = self.prepare_batch(batch)
        self.guard.begin_step(name, batch[2])
        done = self.graph(images, targets) if self.graph else self.compute_step(images, targets)
        for row in done.rows:
            self.state.meters.add(done.names, row)
        if not self.guard.every_step:
            self.guard.end_step(done.finite)
        self.state.step += 1
        self.state.position += len(batch[2]) * utils.get_world_size()

    def compute_step(self, images: Tensor, targets: Tensor) -> StepResult:
        """All that a CUDA graph holds: from the input of the models to the moving average of the weights."""
        self.optimizer.zero_grad()
        passes, rows, losses = self.config.accum_steps, [], dict[str, Tensor]()
        for number, (x, y) in enumerate(zip(images.chunk(passes), targets.chunk(passes), strict=True), start=1):
            with ddp_no_sync(self.student, last=number == passes):
                losses = self.forward_backward(x, y, is_first=number == 1)
            rows.append(self.state.meters.row(losses, len(x)))
        if self.graph and dist.is_initialized():
            self.average_gradients()
        return StepResult(tuple(losses), tuple(rows), self.update())

    def prepare_batch(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Seeds the random numbers of the step; returns normalised, mixed images and targets, on the device."""
        images, targets, _, *aug_params = batch
        config = self.config
        utils.seed_step(self.generator, config.seed, self.state.step, utils.get_rank(), config.global_relations)
        images = images.to(config.device, non_blocking=True)
        targets = targets.to(config.device, non_blocking=True)
        if self.preprocess is not None:
            images = self.preprocess(images, *aug_params)
        return self.mixup(images, targets) if self.mixup is not None else (images, targets)

    def forward_backward(self, images: Tensor, targets: Tensor, is_first: bool) -> dict[str, Tensor]:
        """Adds the gradient of one forward pass; returns the weighted terms by name."""
        with self.autocast():
            with torch.no_grad():  # not inference_mode: autograd cannot save inference tensors for the backward pass
                teacher_out = self.teacher(images) if self.teacher else None  # logits (B, C), tokens L × (B, N, D_t)
            student_out = self.student(images)  # logits (B, C), tokens L × (B, N, D_s)
        losses = self.criterion(student_out, teacher_out, targets, self.generator)  # {'base': …, 'mf_patch': …}
        loss = sum(losses.values()) / self.config.accum_steps
        loss = self.guard.mask_loss(loss, self._checked_values(losses, student_out, teacher_out), is_first)
        self.scaler.scale(loss).backward()
        return losses

    def _checked_values(
        self, losses: dict[str, Tensor], student_out: Output, teacher_out: Output | None
    ) -> dict[str, Tensor]:
        """All that must be finite, by name. With global relations the tokens too, to find the rank of the error."""
        values = {f'loss_{name}': value.detach() for name, value in losses.items()}
        for side, out in (('student', student_out), ('teacher', teacher_out)):
            if out is not None and out[0] is not None:
                values[f'{side} logits'] = out[0].detach()
            if out is not None and self.config.global_relations and out[2]:
                values[f'{side} tokens'] = torch.stack([x.detach().float().sum() for x in out[2]])
        logits, kd_logits = student_out[:2]
        if kd_logits is not None and kd_logits is not logits:
            values['distillation logits'] = kd_logits.detach()
        return values

    def average_gradients(self) -> None:
        """Averages the gradients over the ranks, as DistributedDataParallel does, but in one piece."""
        owners = [p for p in self.student.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in owners]) / utils.get_world_size()  # type: ignore[union-attr]
        self.guard.see_own_gradients(flat)
        dist.all_reduce(flat)
        for p, gradient in zip(owners, flat.split([p.numel() for p in owners]), strict=True):
            p.grad = gradient.view_as(p)

    def update(self) -> Tensor:
        """Takes the optimizer's step, unless a value was not finite, and updates the EMA; returns what was finite."""
        finite = self.guard.check_grad_norm(self.gradient_norm())
        good = finite[-1]
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips a bad update by itself
            self.scaler.update()
        elif getattr(self.optimizer, '_step_supports_amp_scaling', False):
            # The protocol of GradScaler: a fused optimizer skips the update if found_inf is set, without a host sync.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~good).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif good:
            self.optimizer.step()
        if self.guard.every_step:  # before the EMA takes a step that is withheld
            self.guard.end_step(finite)
            self.guard.sync()
        if self.state.ema is not None:
            self.state.ema.update(self.state.model)  # without `step`: a constant decay from the first step on
        return finite

    def images_per_step(self, loader: utils.SizedIterable) -> int:
        """Images of a step on all ranks."""
        return (getattr(loader, 'batch_size', None) or 0) * utils.get_world_size()

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient, which is clipped to `clip_grad`."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            return nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_grad)
        return nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])

    def gradient_shares(self, batch: Sequence[Any]) -> dict[str, float]:
        """`gradient_shares` of the terms on a batch, on this rank. All ranks call it; the state stays as it is."""
        images, targets = (x.chunk(self.config.accum_steps)[0] for x in self.prepare_batch(batch))
        self.student.train(self.config.train_mode)
        statistics = [buffer.clone() for buffer in self.tapped.buffers()]  # BatchNorm's change in a forward pass
        with self.autocast(), torch.compiler.set_stance('force_eager'):
            with torch.no_grad():
                teacher_out = self.teacher(images) if self.teacher else None
            student_out = self.tapped(images)
        losses = self.criterion(student_out, teacher_out, targets, self.generator)
        shares = gradient_shares(losses, student_out.features, self.scaler)
        for buffer, before in zip(self.tapped.buffers(), statistics, strict=True):
            buffer.copy_(before)
        return shares


def gradient_shares(
    losses: dict[str, Tensor], features: Sequence[Tensor], scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Norm of each term's gradient at the tapped features, divided by the sum of these norms. Waits for the device.

    Gradients of terms may align or conflict: a share says how large a gradient is, not where it points. One backward
    pass per term, down to the first tapped block; parameters get no gradient.

    Args:
        losses: weighted terms by name.
        features: outputs of the student's tapped blocks, from which the logits are computed.
        scaler: of the gradients; a common factor does not change shares, and keeps those of float16 from underflow.

    Returns:
        Shares by name; nothing if gradients overflow at the scale of float16 or all are 0.
    """
    features = list({id(feature): feature for feature in features}.values())  # a block may be tapped twice
    norms = {}
    for name, value in losses.items():
        gradients: Sequence[Tensor | None] = ()
        if value.requires_grad:
            gradients = torch.autograd.grad(scaler.scale(value), features, retain_graph=True, allow_unused=True)
        norms[name] = nn.utils.get_total_norm([gradient.float() for gradient in gradients if gradient is not None])
    total = float(sum(norms.values()))
    if not 0 < total < math.inf:
        return {}
    return {name: float(norm) / total for name, norm in norms.items()}


def train_one_epoch(
    trainer: Trainer,
    loader: utils.SizedIterable,
    epoch: int,
    steps_done: int = 0,
    after_step: Callable[[], None] = lambda: None,
    metrics: MetricLog | None = None,
) -> dict[str, float]:
    """Trains for one epoch, or for the rest of it.

    Args:
        trainer: makes the steps.
        loader: batches, see `Trainer.train_step`.
        epoch: counts from 0, for log lines and errors.
        steps_done: steps of this epoch that were made before.
        after_step: called after each step.
        metrics: takes the losses of the steps that are printed.

    Returns:
        Means over steps and ranks: `lr`, `loss`, and `loss_<name>` for each term.

    Raises:
        FloatingPointError: a term, logits or gradients are not finite, see `NonFiniteGuard`.
    """
    trainer.student.train(trainer.config.train_mode)
    config, state, start = trainer.config, trainer.state, time.monotonic()
    sinks = metrics or MetricLog()
    lr = max(group['lr'] for group in trainer.optimizer.param_groups)

    def losses() -> dict[str, float]:
        trainer.guard.sync()
        return state.meters.recent()

    def log(values: dict[str, float]) -> None:
        sinks.log({'epoch': epoch, 'lr': lr, **values}, state.step)

    header = f'{epoch}/{config.epochs}'
    progress = Progress(header, config.print_freq, trainer.images_per_step(loader), losses, log)
    progress.later_steps = (config.epochs - epoch - 1) * (steps_done + len(loader))
    for number, batch in enumerate(progress.over(loader, steps_done), start=steps_done):
        trainer.train_step(batch, f'step {number} of epoch {epoch}')
        after_step()
    trainer.guard.sync()
    took = timedelta(seconds=int(time.monotonic() - start))
    log_rank0(f'epoch {epoch} took {took}, lr {lr:.6g}, peak memory {peak_memory(config.device):,} MiB')
    return {'lr': lr, **state.meters.means()}


def fit(
    trainer: Trainer,
    train_loader: DataLoader,
    evaluator: 'Evaluator',
    manager: CheckpointManager,
    metrics: MetricLog | None = None,
) -> None:
    """Runs the remaining epochs: trains, evaluates, logs and saves."""
    metrics = metrics or MetricLog()
    state, config, start = trainer.state, trainer.config, time.monotonic()
    if state.epoch + 1 >= config.epochs:
        log_rank0(f'already trained for --epochs {config.epochs}')
    manager.drain()
    for epoch in range(state.epoch + 1, config.epochs):
        train_loader.sampler.set_epoch(epoch, state.position)  # type: ignore[attr-defined]
        steps_done = state.position // ((train_loader.batch_size or 1) * utils.get_world_size())
        stats = train_one_epoch(trainer, train_loader, epoch, steps_done, manager.after_step, metrics)
        manager.save_before_evaluation()
        if config.log_grad_share:
            shares = trainer.gradient_shares(first_batch(train_loader, epoch))
            text = ', '.join(f'{name} {share:.1%}' for name, share in shares.items())
            log_rank0(f'gradient    {text or "no shares: the gradient overflows or is 0"}')
            stats |= {f'share_{name}': share for name, share in shares.items()}
        metrics.log(finish_epoch(trainer, evaluator, manager, stats), state.step)
        report_bad_images(config.device, train_loader, evaluator.loader)
    manager.finish()
    took = time.monotonic() - start
    share = manager.seconds / max(took, 1e-9)
    log_rank0(f'Training time {timedelta(seconds=int(took))}, {share:.2%} of it for {manager.saves} saves')
    report_bad_images(config.device, train_loader, evaluator.loader, again=True)


def finish_epoch(
    trainer: Trainer, evaluator: 'Evaluator', manager: CheckpointManager, stats: dict[str, float]
) -> dict[str, float]:
    """Evaluates the student, and its EMA if asked for; saves the checkpoint and the row of the log; returns the row."""
    state = trainer.state
    models = {'test': ('network', state.model)}
    if trainer.config.eval_ema and state.ema is not None:
        ema = state.ema.module if state.ema.device is None else copy.deepcopy(state.ema.module)
        models['test_ema'] = ('EMA', ema.to(trainer.config.device))
    row = {f'train_{key}': value for key, value in stats.items()}
    for split, (name, model) in models.items():
        if utils.get_world_size() > 1:  # take the first rank's BatchNorm statistics, as DDP's next forward pass does
            distribute_bn(model, utils.get_world_size(), reduce=False)
        found = evaluator.measure(model, name, manager.poll)
        row |= {f'{split}_{key}': found[key] for key in ('loss', 'acc1', 'acc5')}
    best = row['test_acc1'] >= state.best_acc1  # in a tie the later epoch wins
    state.best_acc1 = max(state.best_acc1, row['test_acc1'])
    log_rank0(f'Max accuracy: {state.best_acc1:.2f}%')
    state.finish_epoch()
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    row |= {'epoch': state.epoch, 'n_parameters': parameters}
    manager.save(row, best)
    return row


@dataclass(frozen=True)
class Evaluator:
    """The validation images and how models are evaluated on them."""

    loader: DataLoader  # this rank's share of the images, or all of them
    preprocess: nn.Module  # images as they are loaded → normalised images
    device: torch.device
    amp_dtype: torch.dtype  # of autocast; float32 turns autocast off
    copies: int = 1  # ranks that evaluate each image; 1 if they share the images
    compiled: bool = False  # the blocks are compiled; evaluation runs them in eager mode

    def measure(self, model: nn.Module, name: str, poll: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Evaluates a timm model and logs the result; see `evaluate`.

        Raises:
            BadImageError: no image can be read.
        """
        # Evaluation has other shapes and modes: compiling for them would cost more than it saves.
        with torch.compiler.set_stance('force_eager') if self.compiled else nullcontext():
            network = nn.Sequential(self.preprocess, model)
            stats = evaluate(network, self.loader, self.device, self.amp_dtype, poll)
        if not stats['images']:
            raise BadImageError('no validation image can be read')
        if not math.isfinite(stats['loss']):
            log_rank0(f'warning: logits of the {name} are not finite; its accuracy is meaningless')
        log_rank0(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
        images = int(stats['images']) // self.copies
        log_rank0(f'Accuracy of the {name} on the {images} test images: {stats["acc1"]:.1f}%')
        return stats


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: utils.SizedIterable,
    device: torch.device,
    amp_dtype: torch.dtype,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy and cross-entropy of a model, summed exactly over the batches of all ranks.

    Args:
        model: images (B, 3, H, W) → logits (B, C).
        loader: this rank's share of the images, each image on one rank; shares may differ in length. Images of a
            negative class do not count.
        device: of the model.
        amp_dtype: dtype of autocast; float32 turns autocast off.
        poll: called after each batch, equally often on all ranks.

    Returns:
        `loss` per image, `acc1` and `acc5` in percent, and the counts `correct1`, `correct5`, `images`.
    """
    model.eval()
    # float64 holds counts exactly, so one reduction serves them and the loss.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    lengths = utils.gather_over_ranks(torch.tensor([float(len(loader))], device=device))
    rounds = max(int(length) for (length,) in lengths)
    with progress_bar('evaluation', rounds) as bar:
        shown = time.monotonic()
        for number, batch in zip_longest(range(rounds), iter_with_signals_blocked(loader)):
            if batch is not None:
                sums += count_correct(model, batch[0], batch[1], device, amp_dtype)
            poll()
            bar.update()
            if bar.disable and time.monotonic() - shown > EVALUATION_LINES:
                log_rank0(f'[evaluation {number + 1}/{rounds}]')
                shown = time.monotonic()
    loss, correct1, correct5, images = utils.sum_over_ranks(sums).tolist()
    return {
        'loss': loss / max(images, 1),
        'acc1': 100 * correct1 / max(images, 1),
        'acc5': 100 * correct5 / max(images, 1),
        'correct1': int(correct1),
        'correct5': int(correct5),
        'images': int(images),
    }


def count_correct(
    model: nn.Module, images: Tensor, targets: Tensor, device: torch.device, amp_dtype: torch.dtype
) -> Tensor:
    """(4,) sums over a batch: cross-entropy, top-1 hits, top-5 hits, images."""
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    with autocast(device, amp_dtype):
        logits = model(images)
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets.clamp(min=0), reduction='none').double() * (targets >= 0)
    return torch.stack([loss.sum(), ranked[:, :1].sum(), ranked.sum(), (targets >= 0).sum()])
