"""Forward hooks on the chosen blocks of a timm model: its patch tokens, in one layout, beside its logits.

Letters: B images, N patch tokens, D channels, C classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """What a tapped model returns.

    Attributes:
        logits: (B, C), of the class head; the mean of both heads of a distilled model in eval mode.
        kd_logits: (B, C), of the distillation head; the very object `logits` with one head.
        tokens: one (B, N, D) per tapped block, in the order asked for, before the final norm, patch tokens only.
        features: the blocks' outputs the tokens were taken from; unlike these they lie on the way to the logits.
    """

    logits: Tensor
    kd_logits: Tensor
    tokens: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()


class TappedModel(nn.Module):
    """A timm model whose forward pass also returns the outputs of some of its blocks.

    The tokens leave through `forward`, so that DistributedDataParallel and torch.compile see ordinary outputs.
    Optimizer, EMA and checkpoint take `.model`, the timm model: its parameter names have no prefix there.

    Attributes:
        model: the timm model.
        block_ids: indices of the tapped blocks, non-negative, in the order asked for, repeats allowed.
        depth: number of blocks there are.
        grid: rows and columns of patch tokens, None without taps.
        width: channels D of the tokens, None without taps.
    """

    def __init__(self, model: nn.Module, block_ids: Sequence[int], input_size: int) -> None:
        super().__init__()
        self.model = model
        blocks = find_blocks(model) if block_ids else []
        self.depth = len(blocks)
        self.block_ids = [_resolve(i, len(blocks)) for i in block_ids]
        self._captured: dict[int, Tensor] = {}
        self._listening = False
        self.frozen = False
        for i in sorted(set(self.block_ids)):
            # A bound method: a deep copy of this wrapper then captures into the copy, not into the original.
            blocks[i].register_forward_hook(partial(self._capture, i))
        self.grid = self.width = None
        self._num_prefix_tokens = 0
        if block_ids:
            self._measure(input_size)

    def forward(self, images: Tensor) -> Output:
        """Logits and tokens of images (B, 3, H, W)."""
        logits, captured = self._run(images)
        features = tuple(captured[i] for i in self.block_ids)
        tokens = tuple(feature[:, self._num_prefix_tokens :] for feature in features)
        heads = logits if isinstance(logits, tuple) else (logits, logits)
        return Output(*heads, tokens, features)

    def train(self, mode: bool = True) -> 'TappedModel':
        """Switches the mode; a frozen model stays in eval mode, or its drop-path would be switched on."""
        return super().train(mode and not self.frozen)

    def _run(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], dict[int, Tensor]]:
        self._listening = True
        try:
            return self.model(images), dict(self._captured)
        finally:
            # Left in place, the tokens would keep their graph alive and make torch.compile trace again at every step.
            self._listening = False
            self._captured.clear()

    def _capture(self, i: int, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._listening:  # not when the timm model is called by itself, in evaluation
            self._captured[i] = output

    @torch.no_grad()
    def _measure(self, input_size: int) -> None:
        """One image through the model: what the blocks really put out, whatever its attributes say."""
        # timm's CaiT declares a prefix token its patch blocks never see, so they are counted on the output.
        if not isinstance(getattr(self.model, 'patch_drop', nn.Identity()), nn.Identity):
            raise ValueError('it drops patches in training (patch_drop_rate), and tokens would lose their partners')
        training = self.model.training
        captured = self.eval()._run(torch.zeros(1, 3, input_size, input_size))[1]
        self.train(training)
        shapes = {tuple(x.shape) for x in captured.values()}
        if any(len(shape) != 3 for shape in shapes) or len(shapes) != 1:
            raise ValueError(f'its blocks put out {sorted(shapes)}, not tokens of one shape (B, tokens, channels)')
        _, count, self.width = shapes.pop()
        self.grid = _grid(self.model, input_size)
        self._num_prefix_tokens = count - self.grid[0] * self.grid[1]
        if self._num_prefix_tokens < 0:
            raise ValueError(f'its blocks put out {count} tokens, fewer than its {self.grid} grid of patches')


def _grid(model: nn.Module, input_size: int) -> tuple[int, int]:
    embed = getattr(model, 'patch_embed', None)
    if getattr(embed, 'grid_size', None) is not None:
        return tuple(embed.grid_size)
    if hasattr(embed, 'dynamic_feat_size'):
        return tuple(embed.dynamic_feat_size((input_size, input_size)))
    raise ValueError('it has no patch embedding that tells its grid')


def _resolve(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ValueError(f'there is no block {index}: it has {depth}, numbered from 0')
    return index % depth


def find_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks over patch tokens, in the order of computation.

    Raises:
        ValueError: the model has no flat sequence of blocks.
    """
    # CaiT's class-attention blocks are a list of their own and not counted.
    blocks = getattr(model, 'blocks', None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ValueError('it has no flat sequence of blocks')
    return blocks


def tap(model: nn.Module, block_ids: Sequence[int], input_size: int, two_heads: bool = False) -> TappedModel:
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


def freeze(tapped: TappedModel) -> TappedModel:
    """Makes a teacher of a model: no gradients, eval mode for good."""
    tapped.frozen = True
    return tapped.requires_grad_(False).eval()
