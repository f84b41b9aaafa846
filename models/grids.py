"""Resampling tokens to another grid, so that student and teacher have tokens at the same positions.

Letters: B images, N = h·w patch tokens row by row, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns


ALIGNMENTS = ('error', 'pool', 'interpolate', 'merge')


def resample(tokens: Tensor, grid: Grid, target: Grid, how: str) -> Tensor:
    """Tokens (B, h·w, D) of a grid (h, w) resampled to another one; unchanged if it is the same.

    `how` is 'pool' (means of cells, for coarser targets) or 'interpolate' (bilinear), both in float32 or better, or
    'merge' (k×k neighbours concatenated to (B, h·w/k², D·k²); the target must be the grid divided by k).
    """
    if target == grid:
        return tokens
    if how == 'merge':
        k = grid[0] // target[0]
        x = tokens.unflatten(1, (target[0], k, target[1], k))
        return x.transpose(2, 3).flatten(3).flatten(1, 2)
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mT.unflatten(-1, grid)
    if how == 'pool':
        return F.adaptive_avg_pool2d(x, target).flatten(2).mT
    return F.interpolate(x, target, mode='bilinear', antialias=True).flatten(2).mT


def common_grid(student: Grid, teacher: Grid, how: str, max_patches: int) -> tuple[Grid, Grid]:
    """The grids to which the tokens of a layer pair are resampled before they are compared: student's, teacher's.

    With 'error' both must be the same. With 'pool' both use the coarser grid, with 'interpolate' the student's. With
    'merge' each is divided by the smallest k that leaves at most `max_patches` tokens per image.

    Raises:
        ValueError: there is no common grid; the message names both grids.
    """
    if how == 'pool':
        student = teacher = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    elif how == 'interpolate':
        teacher = student
    elif how == 'merge':
        return _common_merged_grid(student, teacher, max_patches)
    if student != teacher:
        raise ValueError(f'the student has {format_grid(student)} patch tokens and the teacher {format_grid(teacher)}')
    return student, teacher


def _common_merged_grid(student: Grid, teacher: Grid, max_patches: int) -> tuple[Grid, Grid]:
    merged = _merged_grid(student, max_patches), _merged_grid(teacher, max_patches)
    if merged[0] == merged[1] and merged[0] is not None:
        return merged[0], merged[0]
    # The largest grid into which both sides can be merged.
    numbers = range(max(student[0] * student[1], teacher[0] * teacher[1]), 0, -1)
    pairs = ((_merged_grid(student, m), _merged_grid(teacher, m)) for m in numbers)
    fitting = next((s[0] * s[1] for s, t in pairs if s == t and s is not None), 0)
    grids = f'the student has {format_grid(student)} patch tokens and the teacher {format_grid(teacher)}'
    advice = f'--max-patches {fitting} works' if fitting else 'no --max-patches brings them to one grid'
    failed = [format_grid(grid) for grid, result in zip((student, teacher), merged, strict=True) if result is None]
    reached = ' and '.join(format_grid(grid) for grid in merged if grid)
    what = f'{" and ".join(failed)} cannot be merged' if failed else f'they become {reached}'
    raise ValueError(f'{grids}; with --max-patches {max_patches} {what}; {advice}')


def _merged_grid(grid: Grid, max_patches: int) -> Grid | None:
    """The grid divided by the smallest k that leaves at most `max_patches` tokens; None if no k does."""
    h, w = grid
    fits = (k for k in range(1, min(h, w) + 1) if h % k == 0 and w % k == 0 and h * w <= max_patches * k * k)
    k = next(fits, 0)
    return (h // k, w // k) if k else None


def format_grid(grid: Grid) -> str:
    """A grid as text, for instance 14×14."""
    return f'{grid[0]}×{grid[1]}'
