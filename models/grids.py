"""Resampling tokens to another grid, so that student and teacher have tokens at the same positions.

Letters: B images, N = h·w patch tokens row by row, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns


def _pool(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Mean of the tokens in each cell of the target grid."""
    return _to_tokens(F.adaptive_avg_pool2d(_to_map(tokens, grid), target))


def _interpolate(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Bilinear interpolation, with antialiasing if the target grid is coarser."""
    return _to_tokens(F.interpolate(_to_map(tokens, grid), target, mode='bilinear', antialias=True))


def _merge(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Concatenates the channels of k×k neighbouring tokens, (B, h·w, D) → (B, h·w/k², D·k²)."""
    k = grid[0] // target[0]
    x = tokens.unflatten(1, (target[0], k, target[1], k))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


RESAMPLE = {'pool': _pool, 'interpolate': _interpolate, 'merge': _merge}
ALIGNMENTS = ('error', *RESAMPLE)


def _to_map(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mT.unflatten(-1, grid)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def resample(tokens: Tensor, grid: Grid, target: Grid, how: str) -> Tensor:
    """Tokens (B, h·w, D) resampled to another grid; unchanged if it is the same grid.

    Args:
        tokens: tokens row by row.
        grid: their rows and columns (h, w).
        target: rows and columns of the result.
        how: 'pool' (means of cells, for coarser targets), 'interpolate' (bilinear), both in float32 or better; 'merge'
            (k·k neighbours concatenated; the target must be the grid divided by k).
    """
    return tokens if target == grid else RESAMPLE[how](tokens, grid, target)


def common_grid(student: Grid, teacher: Grid, how: str, max_patches: int) -> tuple[Grid, Grid]:
    """The grids to which the tokens of a layer pair are resampled before they are compared: student's, teacher's.

    Args:
        student: rows and columns of the student's tokens.
        teacher: rows and columns of the teacher's tokens.
        how: 'error': both grids must be the same. 'pool': both use the coarser grid. 'interpolate': both use the
            student's. 'merge': each is divided by the smallest k that leaves at most `max_patches` tokens.
        max_patches: the largest number of tokens per image after merging.

    Raises:
        ValueError: there is no common grid; the message names both grids.
    """
    if how == 'pool':
        student = teacher = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    elif how == 'interpolate':
        teacher = student
    elif how == 'merge':
        student, teacher = _merged_grid(student, max_patches), _merged_grid(teacher, max_patches)
    if student != teacher:
        raise ValueError(f'the student has {format_grid(student)} patch tokens and the teacher {format_grid(teacher)}')
    return student, teacher


def _merged_grid(grid: Grid, max_patches: int) -> Grid:
    h, w = grid
    for k in range(1, min(h, w) + 1):
        if h % k == 0 and w % k == 0 and h * w <= max_patches * k * k:
            return h // k, w // k
    raise ValueError(f'{format_grid(grid)} patch tokens cannot be merged into at most {max_patches}')


def format_grid(grid: Grid) -> str:
    """A grid as text, for instance 14×14."""
    return f'{grid[0]}×{grid[1]}'
