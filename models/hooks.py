"""Forward hooks on chosen blocks of a timm model, which then returns its patch tokens, in one layout, with its logits.

Letters: B images, N patch tokens, D channels, C classes.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn

from models.blocks import find_modules, list_blocks
from models.build import normalisation
from models.grids import Grid, resample
from models.talking_heads import use_fast_talking_heads

ChannelStats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel


class Output(NamedTuple):
    """What a tapped model returns."""

    # Logits (B, C) of the class head; the mean of both heads of a distilled model in eval mode; None if `freeze` was
    # told that logits are not needed. `kd_logits` are those of the distillation head; without it, they are `logits`.
    logits: Tensor | None
    kd_logits: Tensor | None
    # One (B, N, D) per tapped block, in the order of `block_ids`, before the final norm, patch tokens only.
    tokens: tuple[Tensor, ...]
    # The block outputs from which `tokens` were made. The logits are computed from these, not from `tokens`.
    features: tuple[Tensor, ...] = ()


class StopForward(Exception):  # noqa: N818 – no error
    """Ends a forward pass after the last tapped block."""


class TappedModel(nn.Module):
    """A timm model that also returns the tokens of some of its blocks from its forward pass.

    As the tokens are returned by `forward`, DistributedDataParallel and torch.compile see ordinary outputs.
    Optimizer, EMA and checkpoint take `.model`, the timm model: its parameter names have no prefix there.

    Attributes:
        block_ids, blocks: indices and descriptions of the tapped blocks, in the given order, possibly repeated.
        depth: number of blocks in the model; 0 if none is tapped.
        grids: rows and columns of the tokens that are returned for each tapped block.
    """

    def __init__(self, model: nn.Module, block_ids: Sequence[int], input_size: int | tuple[int, int]) -> None:
        super().__init__()
        drop_rate = getattr(getattr(model, 'patch_drop', None), 'prob', 0)
        if block_ids and drop_rate > 0:
            raise ValueError(f'patch_drop_rate is {drop_rate}; set it to 0, as tokens are compared patch by patch')
        self.model = model
        found = list_blocks(model, input_size) if block_ids else []
        self.depth = depth = len(found)
        for i in block_ids:
            if not -depth <= i < depth:
                raise ValueError(f'no block {i}: the model has {depth} blocks, counted from 0')
        self.block_ids = [i % depth for i in block_ids]
        self.blocks = [found[i] for i in self.block_ids]
        self.grids: list[Grid] = [block.grid for block in self.blocks]
        self.frozen = False
        self.prepare: nn.Module = nn.Identity()
        self.with_logits = True
        self.dtype: torch.dtype | None = None
        self._alignment = ''
        self._captured: dict[int, Tensor] | None = None  # outputs by index, during `forward` only
        for i in sorted(set(self.block_ids)):
            # The hook is a bound method, so that a deep copy of this wrapper captures into the copy.
            hook = partial(self._capture, i, found[i].output_index)
            model.get_submodule(found[i].path).register_forward_hook(hook)

    def align(self, targets: Sequence[Grid], how: str) -> None:
        """Sets the grids on which the tokens of the tapped blocks are returned from now on, see `grids.resample`."""
        self.grids, self._alignment = list(targets), how

    def forward(self, images: Tensor) -> Output:
        """Logits and tokens of images (B, 3, H, W)."""
        logits: Tensor | tuple[Tensor, Tensor] | None = None
        captured: dict[int, Tensor] = {}
        self._captured = captured
        own_dtype = nullcontext() if self.dtype is None else torch.autocast(images.device.type, enabled=False)
        try:
            with suppress(StopForward), own_dtype:
                logits = self.model(self.prepare(images))
        finally:
            # If kept, the outputs would hold their graph in memory and make torch.compile recompile at every step.
            self._captured = None
        features = tuple(captured[i] for i in self.block_ids)
        tokens = tuple(
            resample(block.tokens(feature), block.grid, target, self._alignment)
            for block, feature, target in zip(self.blocks, features, self.grids, strict=True)
        )
        heads = logits if isinstance(logits, tuple) else (logits, logits)
        return Output(*(heads if self.with_logits else (None, None)), tokens, features)

    def train(self, mode: bool = True) -> 'TappedModel':
        """Sets the mode. A frozen model stays in eval mode, as train mode would switch on its drop-path."""
        return super().train(mode and not self.frozen)

    def _capture(self, i: int, output_index: int | None, block: nn.Module, inputs: tuple, output: Any) -> None:
        if self._captured is not None:  # it is None if the timm model is called by itself, as in evaluation
            self._captured[i] = output if output_index is None else output[output_index]
            if not self.with_logits and i == max(self.block_ids):
                raise StopForward


class TeacherPreprocess(nn.Module):
    """Converts images (B, 3, H, W) made for the student to those that the teacher expects.

    Args:
        student_stats: mean and standard deviation that normalised the images, for pixel values in [0, 1].
        teacher_stats: the same for the images on which the teacher was trained.
        size: height and width of the teacher's images in pixels; None keeps the size.
        dtype: of the teacher's weights; None keeps that of the images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        student_stats: ChannelStats,
        teacher_stats: ChannelStats,
        size: int | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        mean, std = torch.tensor(student_stats).view(2, 3, 1, 1)
        teacher_mean, teacher_std = torch.tensor(teacher_stats).view(2, 3, 1, 1)
        self.teacher_stats, self.size = teacher_stats, size
        self.same = torch.equal(mean, teacher_mean) and torch.equal(std, teacher_std)
        self.register_buffer('scale', std / teacher_std, persistent=False)
        self.register_buffer('shift', (mean - teacher_mean) / teacher_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.same:
            images = images * self.scale + self.shift
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode='bicubic', antialias=True)
        return images if self.dtype is None else images.to(self.dtype)


def tap(
    model: nn.Module,
    block_ids: Sequence[int] | str,
    input_size: int | tuple[int, int],
    two_heads: bool = False,
    partner: nn.Module | None = None,
) -> TappedModel:
    """Registers a forward hook on each chosen block and wraps the model.

    Args:
        model: a timm model, on the CPU.
        block_ids: indices of blocks, negative ones from the end; empty for logits only; 'auto' for those of `pair_ids`.
        input_size: height and width of the images in pixels.
        two_heads: True returns the logits of both heads of a distilled model in training; False their mean.
        partner: the timm model that `model` is paired with, for 'auto'; None for one of the same depth.

    Raises:
        ValueError: an index is out of range, or the outputs of the blocks are not patch tokens.
    """
    if isinstance(block_ids, str):
        if block_ids != 'auto':
            raise ValueError(f"block_ids must be a list of numbers or 'auto', not {block_ids!r}")
        depth, other = (len(list_blocks(each, input_size)) for each in (model, partner or model))
        block_ids = pair_ids(depth, other)[0]
    if hasattr(model, 'set_distilled_training'):
        model.set_distilled_training(two_heads)  # type: ignore[operator]
    return TappedModel(model, block_ids, input_size)


def freeze(
    tapped: TappedModel,
    prepare: nn.Module | str | None = None,
    with_logits: bool = True,
    dtype: torch.dtype | None = None,
    fast_talking_heads: bool = True,
    student: TappedModel | None = None,
    fused_talking_heads: bool = False,
) -> TappedModel:
    """Makes a model a teacher: no gradients, always in eval mode, and outputs that are not needed are not computed.

    Args:
        prepare: converts the student's images for this model, see `TeacherPreprocess`; 'auto' from the normalisation
            of `student` to that of this model, both as timm knows them; None if both take the same images.
        with_logits: False stops after the last tapped block, as logits are not needed.
        dtype: of weights and arithmetic, also under autocast; None changes neither.
        fast_talking_heads: False keeps timm's own talking-heads attention, as a baseline for benchmarks.
        student: for `prepare='auto'`.
        fused_talking_heads: True uses Triton kernels for talking-heads attention, see `FusedTalkingHeads`.

    Raises:
        ValueError: `prepare` is another word, or 'auto' without a student; `fused_talking_heads` is True, and the model
            has no talking heads or its heads have another size.
    """
    if isinstance(prepare, str):
        if prepare != 'auto' or student is None:
            raise ValueError(f"prepare must be a module, or 'auto' with a student, not {prepare!r}")
        prepare = TeacherPreprocess(normalisation(student.model), normalisation(tapped.model), None, dtype)
    tapped.frozen, tapped.with_logits = True, with_logits
    tapped.prepare = prepare or nn.Identity()
    if fast_talking_heads:
        use_fast_talking_heads(tapped.model, fused_talking_heads)
    if dtype is not None:
        tapped.dtype = dtype
        tapped.model.to(dtype)
    return tapped.requires_grad_(False).eval()


def checkpoint_activations(tapped: TappedModel) -> None:
    """Makes a model recompute activations in the backward pass, so that it need not keep them.

    Raises:
        ValueError: the model does not support it.
    """
    # Reentrant checkpoints run the blocks without a graph, so the tokens would have no gradient.
    set_reentrant_ckpt(False)
    model: Any = tapped.model
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's models without support raise an AssertionError
        raise ValueError('model does not support gradient checkpointing') from error


def compile_blocks(tapped: TappedModel) -> int:
    """Compiles the blocks and returns their number. Names of parameters do not change, hooks are not compiled.

    Make deep copies before this call: a copy of a compiled block would run the original block.

    Raises:
        ValueError: the model has no blocks at a known place.
    """
    # In training, each shape and kind of block has a graph of its own; the default limit is 8.
    torch._dynamo.config.recompile_limit = 64
    blocks = find_modules(tapped.model)[1].values()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    return len(blocks)


def compile_model(tapped: TappedModel, report: Callable[[str], None]) -> None:
    """Compiles the whole forward pass, tokens included, at its first call. If that fails, the blocks, if it has any.

    Names of parameters do not change. Hooks that are registered later do not run, and deep copies run the original.

    Args:
        report: called if the whole cannot be compiled, with how the model runs instead and why, in one line.
    """
    torch._dynamo.config.recompile_limit = 64
    # Lets gradient checkpoints contain the hooks, which need not run again in the backward pass.
    if hasattr(torch._dynamo.config, 'skip_fwd_side_effects_in_bwd_under_checkpoint'):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    plain = tapped.forward
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)

    def first_call(images: Tensor) -> Output:
        # Only the real call is traced: a trial before it would take as long. Nothing has run when it fails.
        try:
            output = compiled(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            tapped.forward = plain  # type: ignore[method-assign]
            try:
                compile_blocks(tapped)
                report(f'compiled per block: {_first_line(error)}')
            except ValueError:
                report(f'not compiled: {_first_line(error)}')
            return plain(images)
        tapped.forward = compiled  # type: ignore[method-assign]
        return output

    tapped.forward = first_call  # type: ignore[method-assign]


def _first_line(error: Exception) -> str:
    """The first line of an error that says something: before it may come "backend='inductor' raised:"."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if line.strip() and not line.endswith(' raised:')), lines[0])


def pair_ids(student_depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """The block pairs of the recipe for models of any depth: the first k and the last k blocks of both.

    k is 4, or half of the smaller depth if that is less. For DeiT-Tiny and CaiT-S24 the pairs are 0 1 2 3 8 9 10 11 and
    0 1 2 3 20 21 22 23. If one model has a single block, only the last blocks are paired.
    """
    k = min(4, student_depth // 2, teacher_depth // 2)
    student_ids, teacher_ids = (
        [*range(k), *range(depth - max(k, 1), depth)] for depth in (student_depth, teacher_depth)
    )
    return student_ids, teacher_ids
