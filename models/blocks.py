"""Where timm's models keep their blocks, and how what these put out becomes patch tokens on a grid.

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


@dataclass(frozen=True)
class Family:
    """Models that keep their blocks at one place.

    Attributes:
        paths: names of the blocks, `*` for a number.
        arrange: (model, number of the block, its output) → a plain layout, where the output is in none.
        marks: attributes that only these models have; () for all.
    """

    paths: str
    to_plain_layout: Callable[[nn.Module, int, Tensor], Tensor] | None = None
    required_attrs: tuple[str, ...] = ()


def _unrolled(model: nn.Module, i: int, x: Tensor) -> Tensor:
    """Hiera's tokens, (B, N, D) in the order of its mask units → (B, h, w, D)."""
    return model.reroll(x, i)


def _unblocked(model: nn.Module, i: int, x: Tensor) -> Tensor:
    """NesT's tokens, (B, T, N, D) square block by square block → (B, h, w, D)."""
    T, N = (math.isqrt(count) for count in x.shape[1:3])
    return x.unflatten(2, (N, N)).unflatten(1, (T, T)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


# The first row that fits a model counts.
FAMILIES = (
    Family('blocks.*', _unrolled, required_attrs=('reroll', 'unroll')),
    Family('levels.*.transformer_encoder.*', _unblocked),
    # ViT, DeiT, CaiT, BEiT, EVA, XCiT, TNT, Mixer. CaiT's class-attention blocks are not counted; of CrossViT's two
    # branches the first is.
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


# Parameters times pixels from which the meta device is faster than computing on one CPU core. There, torch finds shapes
# in Python, which takes 0.1 to 0.3 seconds for a model of any size.
META_MIN_WORK = 1e12


@dataclass(frozen=True)
class Block:
    """One block of a model, and how to read what it puts out.

    Attributes:
        path: its name in the model.
        grid: rows and columns of its patch tokens.
        width: channels D of a token.
        layout: 'NLD', 'NHWD' or 'NDHW', of the output once it is arranged.
        prefix: tokens before those of patches: class, distillation and register tokens.
        which: place of the tokens among several outputs; None for one.
        arrange: brings an output into a plain layout.
    """

    path: str
    grid: tuple[int, int]
    width: int
    layout: str
    prefix: int = 0
    output_index: int | None = None
    to_plain_layout: Callable[[Tensor], Tensor] | None = None

    def feature(self, output: Tensor | tuple) -> Tensor:
        """Of all that the block puts out, what its tokens are read from."""
        return output if self.output_index is None else output[self.output_index]

    def tokens(self, feature: Tensor) -> Tensor:
        """Patch tokens (B, N, D), row by row."""
        x = feature if self.to_plain_layout is None else self.to_plain_layout(feature)
        if self.layout == 'NLD':
            return x[:, self.prefix :]
        return x.flatten(1, 2) if self.layout == 'NHWD' else x.flatten(2).mT


def find_modules(model: nn.Module) -> tuple[Family, dict[str, nn.Module]]:
    """The blocks of a model by name, and the family they are kept in the manner of.

    Raises:
        ValueError: it has none at a known place.
    """
    modules = dict(model.named_modules())
    for family in FAMILIES:
        pattern = re.compile(re.escape(family.paths).replace(r'\*', r'\d+'))
        found = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        # A list of lists of blocks, or stages where blocks are expected: another row has what is in them.
        lists = [nn.ModuleList] + [nn.Sequential] * (family.paths == 'blocks.*')
        fits = found and all(hasattr(model, mark) for mark in family.required_attrs)
        if fits and not any(type(module) in lists for module in found.values()):
            return family, found
    raise ValueError('it has no blocks at a place that is known, such as blocks.* or stages.*.blocks.*')


def trace_shapes(model: nn.Module, size: tuple[int, int], names: Iterable[str] = ()) -> dict[str, Any]:
    """Runs two blank images through a copy of a model in eval mode and returns the outputs of the named modules.

    The copy of a large model is on the meta device, where tensors have a shape but no values and nothing is computed. A
    small model, or one that the meta device cannot run, runs on the CPU. The model itself is not changed.

    Args:
        model: a timm model, on the CPU.
        size: height and width of the images in pixels.
        names: names of modules of the model.

    Returns:
        The outputs by name, in the order of computation.
    """
    if sum(p.numel() for p in model.parameters()) * size[0] * size[1] > META_MIN_WORK:
        with suppress(Exception):  # the model reads values, or it refuses the images: then the CPU raises the error
            return _run_copy(model, size, names, 'meta')
    return _run_copy(model, size, names, 'cpu')


@torch.no_grad()
def _run_copy(model: nn.Module, size: tuple[int, int], names: Iterable[str], device: str) -> dict[str, Any]:
    # A copy on the CPU shares the model's tensors, but not the caches that some models fill in eval mode.
    tensors = {id(tensor): tensor.to(device) for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, tensors).eval()
    outputs: dict[str, Any] = {}
    for name in names:
        copied.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, output)
        )
    with torch.device(device):  # also for tensors that the model creates without naming a device
        copied(torch.zeros(2, 3, *size))
    return outputs


def list_blocks(model: nn.Module, input_size: int | tuple[int, int]) -> list[Block]:
    """All blocks of a model in the order of computation, as two blank images find them, see `trace_shapes`.

    Args:
        model: a timm model, on the CPU.
        input_size: height and width of the images in pixels.

    Raises:
        ValueError: it has no blocks at a known place, or they put out no patch tokens.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    family, modules = find_modules(model)
    return _describe(model, family, modules, trace_shapes(model, size, modules), size)


def _describe(
    model: nn.Module, family: Family, modules: dict[str, nn.Module], outputs: dict[str, Any], size: tuple[int, int]
) -> list[Block]:
    found = []
    for i, (name, output) in enumerate(outputs.items()):
        output_index, x = _pick(name, output)
        to_plain_layout = None if family.to_plain_layout is None else partial(family.to_plain_layout, model, i)
        found.append((name, output_index, to_plain_layout, x if to_plain_layout is None else to_plain_layout(x)))
    # Where height, width and channels are equal the layout shows on other blocks of the class, or is that of
    # convolutions; timm's blocks that put channels last do so in every stage.
    known = Counter()
    for name, _, _, x in found:
        layouts = _layouts(x, size)
        known.update({(type(modules[name]), layouts[0]): 1} if len(layouts) == 1 else {})
    blocks = []
    for name, output_index, to_plain_layout, x in found:
        layouts = _layouts(x, size)
        if not layouts:
            raise ValueError(f'its {name} puts out {_shape(x)}: no tokens (B, N, D) and no map of the image')
        layout = max(layouts, key=lambda layout, name=name: known[type(modules[name]), layout])
        grid, prefix = _grid(model, layout, x, size)
        width = x.shape[1] if layout == 'NDHW' else x.shape[-1]
        blocks.append(Block(name, grid, width, layout, prefix, output_index, to_plain_layout))
    return blocks


def _pick(name: str, output: Any) -> tuple[int | None, Tensor]:
    """Where the tokens are among the outputs of a block, and they: the first tensor of the images as a whole."""
    if isinstance(output, Tensor):
        return None, output
    for i, x in enumerate(output if isinstance(output, Iterable) else ()):
        if isinstance(x, Tensor) and x.dim() >= 3 and x.shape[0] == 2:
            return i, x
    raise ValueError(f'its {name} puts out a {type(output).__name__} without tokens')


def _layouts(x: Tensor, size: tuple[int, int]) -> list[str]:
    """Layouts the output of a block may be in; maps have the image's proportions but for rounding up."""
    if x.dim() == 3:
        return ['NLD']

    def is_map(h: int, w: int) -> bool:
        return abs(h * size[1] - w * size[0]) < max(size)

    shape = x.shape[1:] if x.dim() == 4 else (0, 1, 0)
    return [layout for layout, at in (('NDHW', 1), ('NHWD', 0)) if x.dim() == 4 and is_map(*shape[at : at + 2])]


def _grid(model: nn.Module, layout: str, x: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patches, and the tokens before them, counted on what a block puts out.

    timm's attributes are no help: its CaiT declares a class token its patch blocks never see.
    """
    if layout != 'NLD':
        at = 1 if layout == 'NHWD' else 2
        return (x.shape[at], x.shape[at + 1]), 0
    count = x.shape[1]
    grid = _embedded(model, size)
    # Later stages have fewer: as many as make a map of the image's proportions.
    if grid is None or grid[0] * grid[1] > count:
        h = next(h for h in range(count, 0, -1) if h * max(1, h * size[1] // size[0]) <= count)
        grid = (h, max(1, h * size[1] // size[0]))
    return grid, count - grid[0] * grid[1]


def _embedded(model: nn.Module, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a flat model's patch embedding."""
    embed = getattr(model, 'patch_embed', None)
    if getattr(embed, 'grid_size', None) is not None:
        return tuple(embed.grid_size)
    if hasattr(embed, 'dynamic_feat_size'):
        return tuple(embed.dynamic_feat_size(size))
    return None


def _shape(x: Tensor) -> str:
    return f'(B, {", ".join(map(str, x.shape[1:]))})'
