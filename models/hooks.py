"""Forward hooks on the chosen blocks of a timm model: its patch tokens, in one layout, beside its logits.

Letters: B images, N patch tokens, D channels, C classes.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn

from models.blocks import Block, find_modules, list_blocks
from models.grids import Grid, resample
from models.talking_heads import use_fast_talking_heads


class Output(NamedTuple):
    """What a tapped model returns.

    Attributes:
        logits: (B, C), of the class head; the mean of both heads of a distilled model in eval mode; None of a teacher
            whose relations alone count.
        kd_logits: (B, C), of the distillation head; the very object `logits` with one head.
        tokens: one (B, N, D) per tapped block, in the order asked for, before the final norm, patch tokens only.
        features: the blocks' outputs the tokens were taken from; unlike these they lie on the way to the logits.
    """

    logits: Tensor | None
    kd_logits: Tensor | None
    tokens: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()


class StopForward(Exception):  # noqa: N818 – no error
    """All that was asked for is there."""


class TappedModel(nn.Module):
    """A timm model whose forward pass also returns the outputs of some of its blocks.

    The tokens leave through `forward`, so that DistributedDataParallel and torch.compile see ordinary outputs.
    Optimizer, EMA and checkpoint take `.model`, the timm model: its parameter names have no prefix there.

    Attributes:
        model: the timm model.
        block_ids: indices of the tapped blocks, non-negative, in the order asked for, repeats allowed.
        blocks: what is known of each of them.
        depth: number of blocks there are.
        grids: rows and columns of the tokens of each tapped block as they leave.
    """

    def __init__(self, model: nn.Module, block_ids: Sequence[int], input_size: int | tuple[int, int]) -> None:
        super().__init__()
        if block_ids and getattr(getattr(model, 'patch_drop', None), 'prob', 0) > 0:
            raise ValueError('it drops patches in training (patch_drop_rate), and tokens would lose their partners')
        self.model = model
        found = list_blocks(model, input_size) if block_ids else []
        self.depth = len(found)
        self.block_ids = [_resolve(i, len(found)) for i in block_ids]
        self.blocks: list[Block] = [found[i] for i in self.block_ids]
        self.grids: list[Grid] = [block.grid for block in self.blocks]
        self.frozen = False
        self.prepare: nn.Module = nn.Identity()
        self.with_logits = True
        self.dtype: torch.dtype | None = None
        self._alignment = ''
        self._captured: dict[int, Tensor] = {}
        self._listening = False
        for i, block in sorted(dict(zip(self.block_ids, self.blocks, strict=True)).items()):
            # A bound method: a deep copy of this wrapper then captures into the copy, not into the original.
            model.get_submodule(block.path).register_forward_hook(partial(self._capture, i, block.output_index))

    def align(self, targets: Sequence[Grid], how: str) -> None:
        """From now on the tokens of each tapped block leave on these grids, see `grids.resample`."""
        self.grids, self._alignment = list(targets), how

    def forward(self, images: Tensor) -> Output:
        """Logits and tokens of images (B, 3, H, W)."""
        self._listening = True
        try:
            with suppress(StopForward):
                logits = None
                logits = self._run(images)
            features = tuple(self._captured[i] for i in self.block_ids)
        finally:
            # Left in place, the tokens would keep their graph alive and make torch.compile trace again at every step.
            self._listening = False
            self._captured.clear()
        tokens = tuple(
            resample(block.tokens(feature), block.grid, target, self._alignment)
            for block, feature, target in zip(self.blocks, features, self.grids, strict=True)
        )
        heads = logits if isinstance(logits, tuple) else (logits, logits)
        return Output(*(heads if self.with_logits else (None, None)), tokens, features)

    def _run(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.dtype is None:
            return self.model(self.prepare(images))
        with torch.autocast(images.device.type, enabled=False):
            return self.model(self.prepare(images))

    def train(self, mode: bool = True) -> 'TappedModel':
        """Switches the mode; a frozen model stays in eval mode, or its drop-path would be switched on."""
        return super().train(mode and not self.frozen)

    def _capture(
        self, i: int, output_index: int | None, block: nn.Module, inputs: tuple, output: Tensor | tuple
    ) -> None:
        if self._listening:  # not when the timm model is called by itself, in evaluation
            self._captured[i] = output if output_index is None else output[output_index]
            if not self.with_logits and i == max(self.block_ids):
                raise StopForward  # what lies behind leads to logits nobody asks for


class TeacherPreprocess(nn.Module):
    """Images made for one model, (B, 3, H, W), as another one knows them: its mean, deviation and size.

    Args:
        ours: mean and standard deviation of each channel the images were normalised by, values in 0 … 1.
        theirs: those the other model was trained with.
        size: its height and width in pixels; None keeps the images'.
        dtype: of its weights; None keeps the images'.
    """

    def __init__(
        self,
        ours: tuple[Sequence, Sequence],
        theirs: tuple[Sequence, Sequence],
        size: int | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        (mean, std), (their_mean, their_std) = (torch.tensor(stats).view(2, 3, 1, 1) for stats in (ours, theirs))
        self.size = size
        self.same = torch.equal(mean, their_mean) and torch.equal(std, their_std)
        self.register_buffer('scale', std / their_std, persistent=False)
        self.register_buffer('shift', (mean - their_mean) / their_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.same:
            images = images * self.scale + self.shift
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode='bicubic', antialias=True)
        return images if self.dtype is None else images.to(self.dtype)


def _resolve(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ValueError(f'there is no block {index}: it has {depth}, numbered from 0')
    return index % depth


def tap(
    model: nn.Module, block_ids: Sequence[int], input_size: int | tuple[int, int], two_heads: bool = False
) -> TappedModel:
    """Registers a forward hook on each chosen block and wraps the model.

    Args:
        model: a timm model, on the CPU.
        block_ids: indices of blocks, negative ones from the end; empty for logits only.
        input_size: height and width of the images in pixels.
        two_heads: a distilled model returns both heads' logits in training; otherwise their mean.

    Raises:
        ValueError: an index is out of range, or the blocks put out no patch tokens.
    """
    if hasattr(model, 'set_distilled_training'):
        model.set_distilled_training(two_heads)
    return TappedModel(model, block_ids, input_size)


def freeze(
    tapped: TappedModel,
    prepare: nn.Module | None = None,
    with_logits: bool = True,
    dtype: torch.dtype | None = None,
    fast_talking_heads: bool = True,
) -> TappedModel:
    """Makes a teacher of a model: no gradients, eval mode for good, and no work for outputs nobody uses.

    Args:
        tapped: the model.
        prepare: images of the student → images as this model knows them, see `Prepare`; None: they are the same.
        with_logits: False where nobody asks for them: it stops behind the last tapped block.
        dtype: of its weights and its arithmetic, whatever autocast says; None leaves both alone.
        fast_talking_heads: False keeps timm's own talking-heads attention, as a baseline for benchmarks.
    """
    tapped.frozen, tapped.with_logits = True, with_logits
    tapped.prepare = prepare or nn.Identity()
    if fast_talking_heads:
        use_fast_talking_heads(tapped.model)
    if dtype is not None:
        tapped.dtype = dtype
        tapped.model.to(dtype)
    return tapped.requires_grad_(False).eval()


def checkpoint_activations(tapped: TappedModel) -> None:
    """Recomputes activations in the backward pass where they would be kept.

    Raises:
        ValueError: the model does not support it.
    """
    # Reentrant checkpoints run the blocks without a graph, so the tokens would have no gradient.
    set_reentrant_ckpt(False)
    try:
        tapped.model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's models without support raise an AssertionError
        raise ValueError('model does not support gradient checkpointing') from error


def compile_blocks(tapped: TappedModel) -> int:
    """Compiles the blocks, each kind once; returns how many there are. Parameters keep their names, hooks stay outside.

    Do so after deep copies are made: a copy of a compiled block would run the original.

    Raises:
        ValueError: its blocks are not known.
    """
    # A graph for each shape and kind of block, in training; the default would give up after 8.
    torch._dynamo.config.recompile_limit = 64
    blocks = find_modules(tapped.model)[1].values()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    return len(blocks)


def pair_ids(student_depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """The recipe's pairing for any depths: the first k and the last k blocks of either side.

    k is 4 or half the shallower depth, if that is less: for DeiT-Tiny and CaiT-S24 0 1 2 3 8 9 10 11 and
    0 1 2 3 20 21 22 23. Of a single block there is but the last.
    """
    k = min(4, student_depth // 2, teacher_depth // 2)
    depths = student_depth, teacher_depth
    return tuple([*range(k), *range(depth - max(k, 1), depth)] for depth in depths)
