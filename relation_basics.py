"""What plain and fused relation terms share: options, checks of tokens, normalisation and its gradient, chunk sizes.

Letters as in `losses`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens per chunk in the full term: enough for a fast product, 19 MB at the recipe's widths.
CHUNK = 4096
# Elements (of tokens or maps) per chunk in a relation term: on a CPU what its caches hold, 18
# images at the recipe's widths; on a GPU many more, because each kernel launch has a cost.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 25


@dataclass(frozen=True)
class RelationOptions:
    """Options of the relation terms."""

    K: int = 192  # number of random tokens
    generator: torch.Generator | None = None  # of random tokens
    over_ranks: bool = False  # connect the images of all ranks
    dtype: torch.dtype = torch.float32  # of the factors of the products
    fused: tuple[str, ...] = ()  # of `FUSED_PARTS`


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError if tokens of student and teacher are not (B, N, D_s) and (B, N, D_t)."""
    if student.dim() != 3 or teacher.dim() != 3:
        raise ValueError(f'tokens must be (B, N, D): student {tuple(student.shape)}, teacher {tuple(teacher.shape)}')
    # Without this check broadcasting would compare the wrong tokens and give finite, wrong numbers.
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f'student and teacher differ in images or patch tokens: (B, N) is {tuple(student.shape[:2])} '
            f'for the student, {tuple(teacher.shape[:2])} for the teacher'
        )


def has_many_tokens(student: Tensor, teacher: Tensor) -> bool:
    """Whether products of channels are used in place of patch maps: N > 4·(D_s + D_t)."""
    return student.shape[1] > 4 * (student.shape[2] + teacher.shape[2])


def full_precision(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PrecomputedGrad(torch.autograd.Function):
    """A value whose gradient is known already: nothing else has to be kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        # Cast after scaling by `factor`: small gradients would underflow if they were cast first.
        return (factor * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def normalize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (…, D) divided by their lengths, and these lengths (…, 1), as in `F.normalize`."""
    length = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return tokens / length, length


def normalize_backward(grad_unit: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient at the tokens from the gradient at the normalised tokens, (…, D), in its place."""
    # The length has no effect on the loss, so the component along the token is removed.
    along = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1)
    return grad_unit.addcmul_(along, unit, value=-1).div_(length)


def sets_per_chunk(student: Tensor, teacher: Tensor) -> int:
    """How many of the sets (G, M, D_s) and (G, M, D_t) are computed at a time."""
    M, width = student.shape[1], student.shape[2] + teacher.shape[2]
    elements = CPU_CHUNK_ELEMENTS if student.device.type == 'cpu' else GPU_CHUNK_ELEMENTS
    return max(1, elements // (M * max(M, width)))


def sum_of_squares(maps: Tensor) -> Tensor:
    """Of all entries of maps (…, M, M), a scalar in float32 or better."""
    # Row by row: one sum over millions of squares loses digits.
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return torch.linalg.vector_norm(maps, dim=-1, dtype=dtype).square().sum()
