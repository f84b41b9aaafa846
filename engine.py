"""One epoch of training, and evaluation: a batch from its copy to the device to its metrics.

Letters: B images of a batch, C classes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import loggers
import stopping
import utils


def _autocast(device: torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def ddp_no_sync(student: nn.Module, last: bool):
    """Keeps DDP, where there is one, from averaging gradients before the last micro-batch has added its own."""
    return nullcontext() if last or not hasattr(student, 'no_sync') else student.no_sync()


class NonFiniteGuard:
    """Withholds the update of every step in which something was not finite, on all ranks, and says what and where.

    A rank whose terms or logits are not finite multiplies its loss by NaN. So its gradients are NaN and, averaged over
    the ranks, those of all: no rank takes the update, without a word between them and without waiting for the device.
    The host learns of it when it looks.

    Under float16 gradients overflow as a rule, and the scaler withholds the update: only terms, logits and a scale
    below 1 count.

    Args:
        scaler: of the gradients.
        every_step: look at each step; where the device is the host itself nobody waits for that.
    """

    def __init__(self, scaler: torch.amp.GradScaler, every_step: bool = True) -> None:
        self.every_step = every_step
        self._scaler = scaler
        self._names: list[str] = []
        self._rows: list[tuple[str, Tensor, Tensor]] = []  # since the last look: step, image indices, what is finite
        self._here: tuple = ()
        self._gradient: Tensor | None = None  # of this rank alone; None without DDP

    def attach(self, wrapped: nn.parallel.DistributedDataParallel) -> None:
        """Sees this rank's gradients before they are averaged."""
        wrapped.register_comm_hook(self, NonFiniteGuard._average)

    def _average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._gradient = self._gradient & torch.isfinite(bucket.buffer()).all()
        return allreduce_hook(None, bucket)

    def factor(self, step: str, indices: Tensor, values: dict[str, Tensor]) -> Tensor:
        """1, by which a loss stays what it is; NaN if one of the values is not finite.

        Args:
            step: its name; called again with the same name for each micro-batch.
            indices: of the step's images on this rank, on the CPU.
            values: terms and logits by name.
        """
        finite = torch.stack([torch.isfinite(value).all() for value in values.values()])
        self._names = list(values)
        whole = finite & self._here[2] if self._here and self._here[0] == step else finite
        self._here = (step, indices, whole)
        self._gradient = torch.ones_like(finite[0])
        return torch.where(finite.all(), 1.0, torch.nan)

    def judge(self, norm: Tensor) -> Tensor:
        """Whether the update may be taken, a bool on the device, the same on all ranks.

        Args:
            norm: of the gradient, averaged over the ranks.
        """
        step, indices, finite = self._here
        good = torch.isfinite(norm)
        gradient = self._gradient if dist.is_initialized() else good
        self._rows.append((step, indices, torch.stack([*finite, gradient, good])))
        return good

    def look(self) -> None:
        """Stops the run if an update was withheld since the last look. Waits for the device; all ranks look together.

        Raises:
            FloatingPointError: names what was not finite, step, rank and images.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            raise FloatingPointError(f'not finite at {rows[-1][0]}: gradients overflow at every scale of float16')
        bad = [(row, flags) for row, flags in zip(rows, torch.stack([r[2] for r in rows]).tolist(), strict=True)
               if not flags[-1]]  # fmt: skip
        if not bad:
            return
        # `good` is the same on all ranks, so all come here.
        told = zip(*utils.gather_objects([self._blame(row, flags) for row, flags in bad]), strict=True)
        for (row, _), ranks in zip(bad, told, strict=True):
            self._stop(row[0], list(ranks))

    def _blame(self, row: tuple, flags: list[bool]) -> tuple[str, bool]:
        """What was not finite in a step of this rank, in words, '' if nothing was; and whether a model put it out."""
        *forward, gradient, _ = flags
        names = [name for name, finite in zip(self._names, forward, strict=True) if not finite]
        if not names and not gradient and not self._scaler.is_enabled():
            names = ['gradients']
        words = f'{", ".join(names)}; images {" ".join(map(str, row[1].tolist()))}' if names else ''
        return words, any(name.endswith(('logits', 'tokens')) for name in names)

    def _stop(self, step: str, ranks: list[tuple[str, bool]]) -> None:
        # Relations of all images make a term not finite on every rank: those count whose models began it.
        origins = any(origin for _, origin in ranks)
        blamed = [words if origin or not origins else '' for words, origin in ranks]
        if not any(blamed) and self._scaler.is_enabled():
            return
        what = '; '.join(f'on rank {rank}: {words}' for rank, words in enumerate(blamed) if words)
        what = what or 'on all ranks: the norm of the averaged gradient'
        raise FloatingPointError(f'not finite at {step} {what}')


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module | None,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    meters: utils.Meters,
    watch: NonFiniteGuard,
    *,
    device: torch.device,
    amp_dtype: torch.dtype,
    epoch: int,
    seed: int,
    step: int = 0,
    done: int = 0,
    finish: Callable[..., Tensor] | None = None,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    average: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    clip_grad: float | None = None,
    train_mode: bool = True,
    shared_draw: bool = False,
    grad_share: bool = False,
    print_freq: int = 10,
    accum_steps: int = 1,
) -> dict[str, float]:
    """Trains the student for one epoch, or for what is left of it.

    Args:
        student: images (B, 3, H, W) → output with logits and tokens; wrapped in DDP when there are several ranks.
        teacher: the same, frozen; None without distillation.
        criterion: (student_out, teacher_out, targets, generator) → weighted scalars by name; the loss is their sum.
        loader: batches of images (B, 3, H, W), classes (B,), the images' indices (B,), and what `finish` wants beside.
        optimizer: holds the student's parameters.
        scaler: of the gradients, enabled for float16 only.
        meters: of the epoch so far.
        watch: over what is not finite.
        device: where student and teacher are.
        amp_dtype: dtype of autocast for both models; float32 for none.
        epoch: counts from 0, for the log lines.
        seed: the run's.
        step: training steps (updates) of the run so far; with `seed` it determines every random number of the next.
        done: steps of this epoch so far.
        finish: images on the device → normalised ones, see `transforms.DevicePreprocess`; None: they are normalised.
        mixup: images and classes → mixed images and soft labels (B, C).
        average: called after each step, for the moving average.
        after_step: called after each step, when all that belongs to it is done.
        clip_grad: largest norm of the gradient.
        train_mode: False keeps drop-path and the like off.
        shared_draw: terms relate the images of all ranks: these give the criterion a generator in the same state.
        grad_share: print with each line the terms' shares of the gradient, see `gradient_shares`.
        print_freq: steps between log lines; between them the host never waits for the device, except for an optimizer
            that cannot be told on the device to leave an update out.
        accum_steps: micro-batches of B/accum_steps images whose gradients make an update. Mixing sees the whole batch,
            relations across images and random tokens those of a micro-batch.

    Returns:
        Means over steps and ranks: `lr`, `loss`, and `loss_<name>` for each term.

    Raises:
        FloatingPointError: a term, logits or gradients are not finite, see `Watch`.
    """
    student.train(train_mode)
    generator = torch.Generator(device)
    lr = max(group['lr'] for group in optimizer.param_groups)
    shares: dict[str, float] = {}

    def line() -> str:
        watch.look()
        percent = ''.join(f'  share_{name}: {100 * share:.1f}%' for name, share in shares.items())
        return f'lr: {lr:.6g}  {meters.line()}{percent}'

    progress = loggers.Progress(f'Epoch: [{epoch}]', print_freq, line, device=device)
    for number, (images, targets, indices, *aug_params) in enumerate(progress.over(loader, done)):
        utils.seed_step(generator, seed, step + number, utils.get_rank(), shared_draw)
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if finish is not None:
            images = finish(images, *aug_params)
        if mixup is not None:
            images, targets = mixup(images, targets)

        name = f'step {done + number} of epoch {epoch}'
        optimizer.zero_grad()
        parts = list(zip(images.chunk(accum_steps), targets.chunk(accum_steps), strict=True))
        for part, (images, targets) in enumerate(parts, start=1):
            with ddp_no_sync(student, last=part == accum_steps):
                with _autocast(device, amp_dtype):
                    with torch.no_grad():  # not inference_mode: the student's backward saves the teacher's tensors
                        teacher_out = teacher(images) if teacher is not None else None
                    student_out = student(images)
                losses = criterion(student_out, teacher_out, targets, generator)
                if grad_share and progress.due and part == accum_steps:
                    shares = gradient_shares(losses, student_out.features, scaler)
                loss = sum(losses.values()) / accum_steps
                loss = loss * watch.factor(name, indices, _values(losses, student_out, teacher_out, shared_draw))
                scaler.scale(loss).backward()
            meters.update(losses, len(images))

        good = watch.judge(_gradient_norm(student, optimizer, scaler, clip_grad))
        _update(optimizer, scaler, good)
        if watch.every_step:
            watch.look()
        if average is not None:
            average()
        if after_step is not None:
            after_step()
    watch.look()
    return {'lr': lr, **meters.means()}


def gradient_shares(
    losses: dict[str, Tensor], features: Sequence[Tensor], scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Norm of each term's gradient at the tapped features, over the sum of these norms. Waits for the device.

    Terms may pull in like or unlike directions: it is how hard each pulls. One backward pass per term that is not 0,
    down to the first tapped block; parameters get no gradient.

    Args:
        losses: weighted terms by name.
        features: outputs of the student's tapped blocks, on the way to the logits.
        scaler: of the gradients; a common factor does not change the shares, and keeps those of float16 from vanishing.

    Returns:
        Shares by name, or nothing where gradients overflow at the scale of float16, or there are none.
    """
    features = list({id(feature): feature for feature in features}.values())  # a block may be tapped twice
    norms = {}
    for name, value in losses.items():
        pulls = ()
        if value.requires_grad:
            pulls = torch.autograd.grad(scaler.scale(value), features, retain_graph=True, allow_unused=True)
        norms[name] = nn.utils.get_total_norm([pull.float() for pull in pulls if pull is not None])
    total = float(sum(norms.values()))
    if not 0 < total < math.inf:
        return {}
    return {name: float(norm) / total for name, norm in norms.items()}


def _values(losses: dict[str, Tensor], student_out, teacher_out, tokens: bool) -> dict[str, Tensor]:
    """All that must be finite, by name; with `tokens` those too, one number for each side."""
    values = {f'loss_{name}': value.detach() for name, value in losses.items()}
    for side, out in (('student', student_out), ('teacher', teacher_out)):
        if out is not None and out[0] is not None:
            values[f'{side} logits'] = out[0].detach()
        if out is not None and tokens and out[2]:
            values[f'{side} tokens'] = torch.stack([x.detach().float().sum() for x in out[2]])
    if student_out[1] is not student_out[0]:
        values['distillation logits'] = student_out[1].detach()
    return values


def _gradient_norm(
    student: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> Tensor:
    """Norm of the gradient, which is clipped to `clip_grad`."""
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(student.parameters(), clip_grad)
    return nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, good: Tensor) -> None:
    """Takes the optimizer's step if it is good."""
    if scaler.is_enabled():
        scaler.step(optimizer)  # finds out by itself
        scaler.update()
    elif getattr(optimizer, '_step_supports_amp_scaling', False):
        # What the scaler would tell a fused optimizer: the device leaves the update out, and the host need not know.
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()
        optimizer.step()
    elif good:
        optimizer.step()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    amp_dtype: torch.dtype,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy and cross-entropy of a timm model, summed exactly over the batches of all ranks.

    Args:
        model: images (B, 3, H, W) → logits (B, C).
        loader: this rank's share of the images, each image on one rank; shares may differ in length. Images of a
            negative class count for nothing.
        device: where the model is.
        amp_dtype: dtype of autocast; float32 for none.
        poll: called after each batch, equally often on all ranks.

    Returns:
        `loss` per image, `acc1` and `acc5` in percent, and the counts `correct1`, `correct5`, `images`.
    """
    model.eval()
    # float64 holds counts exactly, so that one reduction serves them and the loss.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    rounds = max(
        int(length) for (length,) in utils.gather_over_ranks(torch.tensor([float(len(loader))], device=device))
    )
    for _, batch in zip_longest(range(rounds), stopping.iter_with_signals_blocked(loader)):
        if batch is not None:
            sums += count_correct(model, *batch, device, amp_dtype)
        poll()
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
    """(4,) sums over a batch: cross-entropy, right among the first one and the first five, images."""
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    with _autocast(device, amp_dtype):
        logits = model(images)
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets.clamp(min=0), reduction='none').double() * (targets >= 0)
    return torch.stack([loss.sum(), ranked[:, :1].sum(), ranked.sum(), (targets >= 0).sum()])
