"""Tokens of one grid brought to another, so that relations compare like with like.

Letters: B images, N = h·w patch tokens row by row, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns


def _pool(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Mean of the tokens in each cell of the target."""
    return _as_tokens(F.adaptive_avg_pool2d(_as_map(tokens, grid), target))


def _interpolate(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Bilinear, with a filter as wide as the step where the target is coarser."""
    return _as_tokens(F.interpolate(_as_map(tokens, grid), target, mode='bilinear', antialias=True))


def _merge(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Neighbouring tokens one after the other in a longer one, (B, h·w, D) → (B, h·w/k², D·k²)."""
    k = grid[0] // target[0]
    x = tokens.unflatten(1, (target[0], k, target[1], k))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


RESAMPLE = {'pool': _pool, 'interpolate': _interpolate, 'merge': _merge}
ALIGNMENTS = ('error', *RESAMPLE)


def _as_map(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mT.unflatten(-1, grid)


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def resample(tokens: Tensor, grid: Grid, target: Grid, how: str) -> Tensor:
    """Tokens (B, h·w, D) of one grid on another; unchanged where it is the same.

    Args:
        tokens: row by row.
        grid: their rows and columns (h, w).
        target: those of the result.
        how: 'pool' (cells' means, for coarser targets), 'interpolate' (bilinear), both in float32 or better; 'merge'
            (k·k neighbours concatenated; the target must be the grid divided by k).
    """
    return tokens if target == grid else RESAMPLE[how](tokens, grid, target)


def common_grid(student: Grid, teacher: Grid, how: str, max_patches: int) -> tuple[Grid, Grid]:
    """The grids on which the tokens of a layer pair are compared, of either side.

    Args:
        student: its rows and columns.
        teacher: its rows and columns.
        how: 'error': both must be the same; 'pool': both on the coarser grid; 'interpolate': the teacher's on the
            student's; 'merge': each for itself, see `max_patches`.
        max_patches: the most tokens of an image that merging leaves.

    Raises:
        ValueError: they do not meet; names both grids.
    """
    if how == 'pool':
        student = teacher = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    elif how == 'interpolate':
        teacher = student
    elif how == 'merge':
        student, teacher = _merged(student, max_patches), _merged(teacher, max_patches)
    if student != teacher:
        raise ValueError(f'{format_grid(student)} patch tokens of the student, {format_grid(teacher)} of the teacher')
    return student, teacher


def _merged(grid: Grid, max_patches: int) -> Grid:
    h, w = grid
    for k in range(1, min(h, w) + 1):
        if h % k == 0 and w % k == 0 and h * w <= max_patches * k * k:
            return h // k, w // k
    raise ValueError(f'{format_grid(grid)} patch tokens do not merge into at most {max_patches}')


def format_grid(grid: Grid) -> str:
    """A grid as it is printed, 14×14."""
    return f'{grid[0]}×{grid[1]}'
