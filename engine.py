"""One epoch of training, and evaluation: a batch from its copy to the device to its metrics.

Letters: B images of a batch, C classes.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils


def _autocast(device: torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module | None,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    device: torch.device,
    amp_dtype: torch.dtype,
    epoch: int,
    seed: int,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    after_step: Callable[[], None] | None = None,
    clip_grad: float | None = None,
    train_mode: bool = True,
    print_freq: int = 10,
) -> dict[str, float]:
    """Trains the student for one epoch.

    Args:
        student: images (B, 3, H, W) → output with logits and tokens; wrapped in DDP when there are several ranks.
        teacher: the same, frozen; None without distillation.
        criterion: (student_out, teacher_out, targets, generator) → weighted scalars by name; the loss is their sum.
        loader: batches of images (B, 3, H, W) and classes (B,).
        optimizer: holds the student's parameters.
        scaler: of the gradients, enabled for float16 only.
        device: where student and teacher are.
        amp_dtype: dtype of autocast for both models; float32 for none.
        epoch: counts from 0; with `seed` it determines every random number of the epoch.
        seed: the run's.
        mixup: images and classes → mixed images and soft labels (B, C).
        after_step: called after each update, for the moving average.
        clip_grad: largest norm of the gradient.
        train_mode: False keeps drop-path and the like off.
        print_freq: steps between log lines; between them the host never waits for the device, except for the
            gradient scaler of float16, which reads at each step whether the gradients overflowed.

    Returns:
        Means over steps and ranks: `lr`, `loss`, and `loss_<name>` for each term.

    Raises:
        FloatingPointError: a term is not finite; noticed at the next log line or at the end of the epoch.
    """
    student.train(train_mode)
    meters = utils.Meters()
    generator = torch.Generator(device)
    lr = max(group['lr'] for group in optimizer.param_groups)
    progress = utils.Progress(f'Epoch: [{epoch}]', print_freq, lambda: f'lr: {lr:.6g}  {meters.line()}', device=device)
    for step, (images, targets) in enumerate(progress.over(loader), start=epoch * len(loader)):
        utils.seed_step(generator, seed, step, utils.get_rank())
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)

        with _autocast(device, amp_dtype):
            with torch.no_grad():  # not inference_mode: the student's backward saves the teacher's tensors
                teacher_out = teacher(images) if teacher is not None else None
            student_out = student(images)
        losses = criterion(student_out, teacher_out, targets, generator)
        loss = sum(losses.values())

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if after_step is not None:
            after_step()
        meters.update(losses)
    return {'lr': lr, **meters.means()}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device, amp_dtype: torch.dtype) -> dict[str, float]:
    """Accuracy and cross-entropy of a timm model, summed exactly over the batches of all ranks.

    Args:
        model: images (B, 3, H, W) → logits (B, C).
        loader: this rank's share of the images, each image on one rank; shares may differ in length.
        device: where the model is.
        amp_dtype: dtype of autocast; float32 for none.

    Returns:
        `loss` per image, `acc1` and `acc5` in percent, and the counts `correct1`, `correct5`, `images`.
    """
    model.eval()
    # float64 holds counts exactly, so that one reduction serves them and the loss.
    sums, seen = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with _autocast(device, amp_dtype):
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction='none').double()
        sums += torch.stack([loss.sum(), ranked[:, :1].sum(), ranked.sum()])
        seen += len(targets)
    loss, correct1, correct5, images = utils.sum_over_ranks(torch.cat([sums, sums.new_tensor([seen])])).tolist()
    return {
        'loss': loss / images,
        'acc1': 100 * correct1 / images,
        'acc5': 100 * correct5 / images,
        'correct1': int(correct1),
        'correct5': int(correct5),
        'images': int(images),
    }
