"""Where timm's models keep their blocks, and how the output of a block becomes patch tokens on a grid.

Letters: B images, N patch tokens, D channels, h×w the grid: rows and columns of patches.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Parameters times pixels from which the meta device is faster than computing on one CPU core. There, torch finds shapes
# in Python, which takes 0.1 to 0.3 seconds for a model of any size.
META_MIN_WORK = 1e12


@dataclass(frozen=True)
class Family:
    """Models that keep their blocks in the same place."""

    paths: str  # names of the blocks, with `*` for a number
    # Brings an output that is in no layout of `Block` into one of them; its arguments are the model, the number of the
    # block and the output. None if all outputs are in such a layout.
    to_plain_layout: Callable[[Any, int, Tensor], Tensor] | None = None
    required_attrs: tuple[str, ...] = ()  # that only these models have; () if the paths are enough


def _nest_layout(model: Any, i: int, x: Tensor) -> Tensor:
    """NesT's tokens, (B, T, N, D) with T square windows of N tokens → (B, h, w, D)."""
    T, N = (math.isqrt(count) for count in x.shape[1:3])
    return x.unflatten(2, (N, N)).unflatten(1, (T, T)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


# The first row that matches a model counts.
FAMILIES = (
    # Hiera's tokens, (B, N, D), are in the order of its mask units.
    Family('blocks.*', lambda model, i, x: model.reroll(x, i), required_attrs=('reroll', 'unroll')),
    Family('levels.*.transformer_encoder.*', _nest_layout),
    # ViT, DeiT, CaiT, BEiT, EVA, XCiT, TNT, Mixer. CaiT's class-attention blocks do not count. Of CrossViT's two
    # branches, the first one counts.
    Family('blocks.*'),
    Family('encoder.blocks.*'),
    Family('blocks.*.*'),  # Twins, EfficientNet, MobileNet
    Family('layers.*.blocks.*'),  # Swin, FocalNet
    Family('stages.*.blocks.*'),  # ConvNeXt, PVT v2, MViT v2, MaxViT, TinyViT, FastViT, EfficientFormer, LeViT, …
    Family('stages.*.*'),  # MobileViT, RegNet-like
    Family('dense_stages.*.*'),
    Family('transformers.*.blocks.*'),  # PiT
    Family('network.*.*'),  # VOLO
    Family('serial_blocks*.*'),  # CoaT
    Family('stage*.*'),
    Family('layer*.*'),  # ResNet
    Family('s*.b*'),  # RegNet
)


@dataclass(frozen=True)
class Block:
    """One block of a model, and how to read its output."""

    path: str  # name of the module in the model
    grid: tuple[int, int]  # rows and columns of the patch tokens
    width: int  # channels D of a token
    layout: str  # 'NLD', 'NHWD' or 'NDHW', of the output after `to_plain_layout`
    prefix: int = 0  # number of tokens before the patch tokens: class, distillation and register tokens
    output_index: int | None = None  # of the tokens if the block returns several tensors
    to_plain_layout: Callable[[Tensor], Tensor] | None = None  # None if the output is in the layout already

    def tokens(self, feature: Tensor) -> Tensor:
        """Patch tokens (B, N, D), row by row, of the block's output."""
        x = feature if self.to_plain_layout is None else self.to_plain_layout(feature)
        if self.layout == 'NLD':
            return x[:, self.prefix :]
        return x.flatten(1, 2) if self.layout == 'NHWD' else x.flatten(2).mT


def find_modules(model: nn.Module) -> tuple[Family, dict[str, nn.Module]]:
    """The family of a model, and its blocks by name.

    Raises:
        ValueError: the model has no blocks at a known place.
    """
    modules = dict(model.named_modules())
    for family in FAMILIES:
        pattern = re.compile(re.escape(family.paths).replace(r'\*', r'\d+'))
        found = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        # If these are lists of blocks, or stages where blocks are expected, another row has the blocks inside them.
        containers = [nn.ModuleList] + [nn.Sequential] * (family.paths == 'blocks.*')
        matches = found and all(hasattr(model, attr) for attr in family.required_attrs)
        if matches and not any(type(module) in containers for module in found.values()):
            return family, found
    raise ValueError('the model has no blocks at a known place, such as blocks.* or stages.*.blocks.*')


def trace_shapes(model: nn.Module, size: tuple[int, int], names: Iterable[str] = ()) -> dict[str, Any]:
    """Runs two blank images through a copy of a model in eval mode and returns the outputs of the named modules.

    The copy of a large model is on the meta device, where tensors have a shape but no values and nothing is computed. A
    small model, or one that the meta device cannot run, runs on the CPU. The model itself, on the CPU, is not changed.

    `size` is height and width of the images in pixels. The outputs are in the order of computation.
    """
    if sum(p.numel() for p in model.parameters()) * size[0] * size[1] > META_MIN_WORK:
        with suppress(Exception):  # the model reads values, or it refuses the images: then the CPU raises the error
            return _run_copy(model, size, names, 'meta')
    return _run_copy(model, size, names, 'cpu')


@torch.no_grad()
def _run_copy(model: nn.Module, size: tuple[int, int], names: Iterable[str], device: str) -> dict[str, Any]:
    # A copy on the CPU shares the model's tensors, but not the caches that some models fill in eval mode.
    tensors: dict[int, Any] = {id(x): x.to(device) for x in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, tensors).eval()
    outputs: dict[str, Any] = {}
    for name in names:
        keep = partial(lambda name, _, __, output: outputs.update({name: output}), name)
        copied.get_submodule(name).register_forward_hook(keep)
    with torch.device(device):  # also for tensors that the model creates without naming a device
        copied(torch.zeros(2, 3, *size))
    return outputs


def list_blocks(model: nn.Module, input_size: int | tuple[int, int]) -> list[Block]:
    """All blocks of a timm model, on the CPU, in the order of computation, as `trace_shapes` finds them.

    `input_size` is height and width of the images in pixels.

    Raises:
        ValueError: the model has no blocks at a known place, or their outputs are no patch tokens.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    family, modules = find_modules(model)
    try:
        outputs = trace_shapes(model, size, modules)
    except AssertionError as error:  # timm's
        raise ValueError(f'the model cannot process images of {size[0]}×{size[1]} pixels: {error}') from error
    found = []
    for i, (name, output) in enumerate(outputs.items()):
        output_index, x = _find_tokens(name, output)
        to_plain_layout = None if family.to_plain_layout is None else partial(family.to_plain_layout, model, i)
        x = x if to_plain_layout is None else to_plain_layout(x)
        layouts = _possible_layouts(x, size)
        if not layouts:
            shape = ', '.join(map(str, x.shape[1:]))
            raise ValueError(
                f'the output of {name} has the shape (B, {shape}): neither tokens (B, N, D) nor a feature map'
            )
        found.append((name, output_index, to_plain_layout, x, layouts))
    # If height, width and channels are equal, other blocks of the same class show the layout. If there are none, it is
    # the layout of convolutions: timm's blocks with channels last have it in every stage.
    known = Counter((type(modules[name]), layouts[0]) for name, *_, layouts in found if len(layouts) == 1)
    blocks = []
    for name, output_index, to_plain_layout, x, layouts in found:
        counts = [known[type(modules[name]), layout] for layout in layouts]
        layout = layouts[counts.index(max(counts))]
        grid, prefix = _grid_and_prefix(model, layout, x, size)
        width = x.shape[1] if layout == 'NDHW' else x.shape[-1]
        blocks.append(Block(name, grid, width, layout, prefix, output_index, to_plain_layout))
    return blocks


def _find_tokens(name: str, output: Any) -> tuple[int | None, Tensor]:
    """The tokens in the output of a block, and their index: they are the first tensor with a row for each image."""
    if isinstance(output, Tensor):
        return None, output
    for i, x in enumerate(output if isinstance(output, Iterable) else ()):
        if isinstance(x, Tensor) and x.dim() >= 3 and x.shape[0] == 2:
            return i, x
    raise ValueError(f'the output of {name} is a {type(output).__name__} without tokens')


def _possible_layouts(x: Tensor, size: tuple[int, int]) -> list[str]:
    """Layouts in which the output of a block may be: a map has the proportions of the image, apart from rounding."""
    if x.dim() == 3:
        return ['NLD']
    maps = {'NDHW': x.shape[2:], 'NHWD': x.shape[1:3]} if x.dim() == 4 else {}
    return [layout for layout, (h, w) in maps.items() if abs(h * size[1] - w * size[0]) < max(size)]


def _grid_and_prefix(model: nn.Module, layout: str, x: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patch tokens, and the number of tokens before them, from the output of a block.

    timm's attributes do not help: its CaiT declares a class token that its patch blocks never see.
    """
    if layout != 'NLD':
        at = 1 if layout == 'NHWD' else 2
        return (x.shape[at], x.shape[at + 1]), 0
    count = x.shape[1]
    embed: Any = getattr(model, 'patch_embed', None)
    grid = getattr(embed, 'grid_size', None)
    if grid is None and hasattr(embed, 'dynamic_feat_size'):
        grid = embed.dynamic_feat_size(size)
    # Later stages have fewer tokens: the largest grid with the proportions of the image.
    if grid is None or grid[0] * grid[1] > count:
        h = next(h for h in range(count, 0, -1) if h * max(1, h * size[1] // size[0]) <= count)
        grid = (h, max(1, h * size[1] // size[0]))
    return tuple(grid), count - grid[0] * grid[1]
