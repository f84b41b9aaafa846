"""The relation terms in few kernels on a GPU: sample, patch and random together, and the full term in float32.

Functions of tensors only are compiled for a GPU; on a CPU they run as they are. Letters as in `losses`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from relation_basics import (
    CHUNK,
    PrecomputedGrad,
    RelationOptions,
    check_pair,
    full_precision,
    has_many_tokens,
    normalize,
    normalize_backward,
    sets_per_chunk,
    sum_of_squares,
)
from utils import compile_for

# Sample, patch and random together ------------------------------------------------------------------------------------


class JointTerms(torch.autograd.Function):
    """Values of several terms of a layer pair, with the gradient of each at the normalised tokens.

    Only the backward pass takes the gradients through the normalisation, all together, so each term may be scaled or
    differentiated by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, chosen: Tensor | None, terms: tuple[str, ...], products: str
    ) -> tuple[Tensor, ...]:
        values, gradients = compile_for(relate, student.device)(student, teacher, chosen, terms, products)
        ctx.save_for_backward(student, chosen, *gradients)
        ctx.terms = terms
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        student, chosen, *gradients = ctx.saved_tensors
        gradient = compile_for(_relate_backward, student.device)(student, chosen, ctx.terms, gradients, factors)
        return gradient, None, None, None, None


def relate_jointly(
    student: Sequence[Tensor], teacher: Sequence[Tensor], terms: Sequence[str], options: RelationOptions
) -> list[dict[str, Tensor]]:
    """For each layer pair the values, by name, of those of the terms sample, patch and rand that can be fused.

    The terms of a layer pair share the normalised tokens and the way back through the normalisation. Not fused are
    float64 tokens, terms over ranks, and patch maps of many tokens.

    Args:
        student, teacher: L tensors (B, N, D_s) and (B, N, D_t).
        terms: names of the terms that are used.
        options: of the terms. One draw gives the random tokens of all layer pairs: not those of `random_loss`.
    """
    found = []
    joint = [_fusible(s, t, terms, options) for s, t in zip(student, teacher, strict=True)]
    counts = [s.shape[0] * s.shape[1] for s, names in zip(student, joint, strict=True) if 'rand' in names]
    draws = iter(draw_tokens(counts, options.K, options.generator, student[0].device) if counts else ())
    for s, t, names in zip(student, teacher, joint, strict=True):
        chosen = next(draws) if 'rand' in names else None
        with torch.autocast(s.device.type, enabled=False):
            values = JointTerms.apply(s, t, chosen, names, _products(s, t, options.dtype)) if names else ()
        found.append(dict(zip(names, values, strict=True)))
    return found


def _fusible(student: Tensor, teacher: Tensor, terms: Sequence[str], options: RelationOptions) -> tuple[str, ...]:
    """Which of these terms of a layer pair can be computed together."""
    check_pair(student, teacher)
    if torch.float64 in (student.dtype, teacher.dtype):
        return ()
    within = not options.over_ranks
    fusible = {'sample': within, 'patch': not has_many_tokens(student, teacher), 'rand': within}
    return tuple(name for name in terms if fusible.get(name))


def draw_tokens(
    counts: Sequence[int], K: int, generator: torch.Generator | None, device: torch.device
) -> Sequence[Tensor]:
    """For each count min(K, count) different places below it, all sets of them equally likely, by one draw."""
    at = device if generator is None else generator.device
    # The places of the largest of random numbers. In float64 two of them are practically never equal.
    numbers = torch.rand(len(counts), max(counts), dtype=torch.float64, generator=generator, device=at)
    if len(set(counts)) == 1:
        return numbers.topk(min(K, counts[0])).indices.to(device).unbind()
    return [row[:n].topk(min(K, n)).indices.to(device) for row, n in zip(numbers, counts, strict=True)]


def relate(
    student: Tensor, teacher: Tensor, chosen: Tensor | None, terms: tuple[str, ...], products: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of the terms of a layer pair, and (SSᵀ − TTᵀ)·S of the sets (G, M, D_s) of each."""
    units = [normalize(full_precision(tokens))[0] for tokens in (student, teacher)]
    values, gradients = [], []
    for term in terms:
        S, T = (sets_of(term, unit, chosen) for unit in units)
        (G, M), sets = S.shape[:2], sets_per_chunk(S, T)
        squares, parts = [], []
        for s, t in zip(S.split(sets), T.split(sets), strict=True):
            difference = _difference(s, t, products)
            squares.append(sum_of_squares(difference))
            parts.append(product(difference, s, products))
        values.append(torch.stack(squares).sum() / (G * M**2))
        gradients.append(torch.cat(parts))
    return values, gradients


def sets_of(term: str, tokens: Tensor, chosen: Tensor | None) -> Tensor:
    """The sets of tokens, (G, M, D), whose maps a term compares."""
    if term == 'rand':
        return tokens.flatten(0, 1)[chosen][None]
    return tokens.transpose(0, 1) if term == 'sample' else tokens


def _relate_backward(
    student: Tensor, chosen: Tensor | None, terms: tuple[str, ...], gradients: list[Tensor], factors: Sequence[Tensor]
) -> Tensor:
    """Gradient at the student's tokens, from what `relate` returns and the factor of each term."""
    unit, length = normalize(full_precision(student))
    total = unit.new_zeros(unit.shape)
    for term, gradient, factor in zip(terms, gradients, factors, strict=True):
        G, M, D = gradient.shape
        factor = factor * (4 / (G * M**2))
        if term == 'rand':
            assert chosen is not None
            total.view(-1, D).index_add_(0, chosen, gradient[0] * factor)
        else:
            total.addcmul_(gradient.transpose(0, 1) if term == 'sample' else gradient, factor)
    return normalize_backward(total, unit, length).to(student.dtype)


# The full term --------------------------------------------------------------------------------------------------------


def fused_full_loss(student: Tensor, teacher: Tensor, over_ranks: bool) -> Tensor:
    """`full_loss` with products of float32 and sums of float64."""
    W = dist.get_world_size() if over_ranks else 1
    entries, D_s = (W * student.shape[0] * student.shape[1]) ** 2, student.shape[2]
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        s, t = student.detach(), teacher.detach()
        of_student, TT = compile_for(_channel_products, s.device)(s, t)
        if over_ranks:
            dist.all_reduce(of_student)
            dist.all_reduce(TT)
        SS, ST = of_student.split([D_s, len(TT)], dim=1)
        norms = [x.square().sum() for x in (SS, ST, TT)]
        value = (norms[0] - 2 * norms[1] + norms[2]).clamp(min=0) / entries
        gradient = compile_for(_full_gradient, s.device)(s, t, torch.cat([SS, -ST.mT]), entries)
    return PrecomputedGrad.apply(student, value.to(gradient.dtype), W * gradient)


def _channel_products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Sᵀ[S T] and TᵀT of all tokens in float64, added up from float32 products over the tokens of some images."""
    (B, N, D_s), D_t = student.shape, teacher.shape[2]
    images = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or n * N <= CHUNK))
    both = _both_sides(student, teacher)[0].view(B // images, images * N, D_s + D_t)
    S, T = both.split([D_s, D_t], dim=2)
    # The norms cancel, so an error with a sign of its own, as split products have, would be seen in the value.
    of_student, TT = (torch.bmm(x.mT, y).sum(0, dtype=torch.float64) for x, y in ((S, both), (T, T)))
    return of_student, TT


def _full_gradient(student: Tensor, teacher: Tensor, factors: Tensor, entries: int) -> Tensor:
    """4/entries·[S T]·factors as one product, taken through the normalisation."""
    both, length = _both_sides(student, teacher)
    products = _products(student, teacher, torch.float32)
    grad_unit = product(both.flatten(0, 1)[None], factors[None].to(both.dtype), products).view(student.shape)
    return normalize_backward(grad_unit, both[..., : student.shape[2]], length * (entries / 4))


def _both_sides(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[S T] of the normalised tokens, (B, N, D_s + D_t), and the lengths of the student's."""
    (S, length), (T, _) = (normalize(full_precision(tokens)) for tokens in (student, teacher))
    return torch.cat([S, T], 2), length


# Products -------------------------------------------------------------------------------------------------------------


def _products(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> str:
    """How products of these tokens are computed: 'float32', 'bfloat16', or 'split' into parts of bfloat16.

    Tokens of 16 bits, on one side at least, are known less exactly than split products are computed.
    """
    if dtype == torch.bfloat16:
        return 'bfloat16'
    return 'split' if 2 in (student.dtype.itemsize, teacher.dtype.itemsize) else 'float32'


def product(x: Tensor, y: Tensor, products: str) -> Tensor:
    """(G, M, K) @ (G, K, D) in float32."""
    if products == 'float32':
        return torch.bmm(x, y)
    if products == 'bfloat16':
        return _bfloat16_product(x.bfloat16(), y.bfloat16())
    (x_high, x_low), (y_high, y_low) = _split(x), _split(y)
    return _bfloat16_product(torch.cat([x_high, x_high, x_low], 2), torch.cat([y_high, y_low, y_high], 1))


def _difference(s: Tensor, t: Tensor, products: str) -> Tensor:
    """SSᵀ − TTᵀ of normalised tokens, (G, M, M)."""
    if products == 'float32':
        return torch.bmm(t, t.mT).baddbmm_(s, s.mT, beta=-1)
    if products == 'bfloat16':
        return product(_alternate(s, t), _alternate(s, -t).mT, products)
    (s_high, s_low), (t_high, t_low) = _split(s), _split(t)
    rows = [_alternate(s_high, -t_high), _alternate(s_low, -t_low)]
    high, mixed = _bfloat16_product(torch.cat(rows, 1), _alternate(s_high, t_high).mT).chunk(2, dim=1)
    return high + (mixed + mixed.mT)  # high·lowᵀ is the transpose of low·highᵀ


def _alternate(s: Tensor, t: Tensor) -> Tensor:
    """The channels of both sides, (G, M, D_s + D_t): some of one side, then some of the other, and so on.

    Tensor cores cut off digits of their sums. In this order a difference of two sums stays small while it is added up.
    """
    common = math.gcd(s.shape[2], t.shape[2])
    parts = common // 16 if common % 16 == 0 else 1  # a tensor core adds up 16 products at a time
    return torch.cat([s.unflatten(2, (parts, -1)), t.unflatten(2, (parts, -1))], 3).flatten(2)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is x but for about 2⁻¹⁷ of it."""
    # Rounded by its bits, because the compiler takes x.bfloat16().float() for x.
    high = ((x.view(torch.int32) + (1 << 15)) & -(1 << 16)).view(torch.float32)
    return high.bfloat16(), (x - high).bfloat16()


def _bfloat16_product(x: Tensor, y: Tensor) -> Tensor:
    """(G, M, K) @ (G, K, D) of bfloat16 factors with float32 sums."""
    # On a CPU in float32, where products of bfloat16 factors are exact.
    return torch.bmm(x, y, out_dtype=torch.float32) if x.device.type == 'cuda' else torch.bmm(x.float(), y.float())
