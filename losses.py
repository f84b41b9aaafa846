"""The method: relations between patch tokens, logit distillation, and their weighted sum.

Fine-grained manifold distillation (Hao et al., NeurIPS 2022, https://arxiv.org/abs/2107.01378) trains the student to
reproduce the relations between the teacher's patch tokens. The relation map of a set of tokens X is X Xᵀ after every
token is L2-normalised: a table of cosine similarities. It does not depend on the width, so no projector is needed.

The definition comes first, the fast path below it. All relation terms take tokens of the student, (B, N, D_s), and of
the teacher, (B, N, D_t), and raise a ValueError if B or N differ. They return the mean of the squared differences over
all entries of all their maps, where the paper writes Frobenius sums: a scalar that can be differentiated once, with
respect to the student. `dtype` is that of the factors of the products; float64 tokens stay float64.

With `over_ranks` a term connects the images of all ranks, of which each holds B, as one process with all images would.
Image i of them is image i // W of rank i % W, as the sampler deals them out. All ranks get the same value, and the
gradient at their own tokens times W: DistributedDataParallel divides by W.

Letters: B images, N patch tokens per image, D channels (D_s student, D_t teacher), L layer pairs, K sampled tokens,
C classes, M tokens of any set, G sets, W ranks.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RELATIONS = ('rank', 'global')
RELATION_DTYPES = ('float32', 'bfloat16')
FUSED_PARTS = ('relations', 'full')  # of the loss, for a GPU: sample, patch and random together; the full term

# Tokens per chunk in the full term: enough for a fast product, 19 MB at the recipe's widths.
CHUNK = 4096
# Elements (of tokens or maps) per chunk in a relation term: on a CPU what its caches hold, 18
# images at the recipe's widths; on a GPU many more, because each kernel launch has a cost.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 25


# The definition -------------------------------------------------------------------------------------------------------


def relation_map(tokens: Tensor) -> Tensor:
    """Cosine similarities between all tokens of a set: (…, M, D) → (…, M, M), in float32 or better."""
    tokens = F.normalize(_full_precision(tokens), dim=-1)
    return tokens @ tokens.mT


def plain_map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two relation maps by the definition: (…, M, D_s) and (…, M, D_t) → scalar.

    The reference for all terms. It keeps maps for the backward pass and can be differentiated any number of times.
    """
    # Most differences are below 1e-2: their squares underflow in float16 and lose three digits in bfloat16.
    with torch.autocast(student.device.type, enabled=False):
        return (relation_map(student) - relation_map(teacher)).square().mean()


def plain_full_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`full_loss` by the definition, with maps of (B·N)² entries."""
    _check_pair(student, teacher)
    return plain_map_distance(student.flatten(0, 1), teacher.flatten(0, 1))


def soft_distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """τ²·KL(teacher ‖ student) of logits (B, C) / τ, divided by B; DeiT's own soft loss divides by B·C."""
    student = F.log_softmax(student / tau, dim=-1)
    teacher = F.log_softmax(teacher / tau, dim=-1)
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * tau**2


def hard_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's most likely class; logits (B, C) both."""
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def lskd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """`soft_distillation_loss` of standardised logits: each image's logits z become (z − mean(z)) / std(z).

    Logit standardisation (LSKD; Sun et al., CVPR 2024, https://arxiv.org/abs/2403.01427), where τ is called the base
    temperature. As in the code of its authors, std divides by C − 1, and 1e-7 is added to it.
    """
    student, teacher = (
        (z - z.mean(dim=-1, keepdim=True)) / (z.std(dim=-1, keepdim=True) + 1e-7) for z in (student, teacher)
    )
    return soft_distillation_loss(student, teacher, tau)


def nkd_loss(student: Tensor, teacher: Tensor, targets: Tensor, tau: float, gamma: float = 1.5) -> Tensor:
    """−T_t·log S_t − γ·τ²·Σ T̂_i·log Ŝ_i over the classes i ≠ t, mean over the images; logits (B, C) both.

    Normalised KD (NKD; Yang et al., ICCV 2023, https://arxiv.org/abs/2303.13005). S and T are the probabilities of
    student and teacher, Ŝ and T̂ those at temperature τ among the other classes than t alone. t is the class in
    `targets` (B,), or the largest label (the first one of equal ones) in soft labels (B, C), as mixing makes them.
    """
    t = (targets if targets.dim() == 1 else targets.argmax(dim=1))[:, None]
    others = torch.arange(student.shape[1] - 1, device=student.device).expand(len(t), -1)
    others = others + (others >= t)
    target_term = -(teacher.softmax(dim=1) * student.log_softmax(dim=1)).gather(1, t).mean()
    S, T = (logits.gather(1, others) / tau for logits in (student, teacher))
    return target_term + gamma * tau**2 * F.cross_entropy(S, T.softmax(dim=1))


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_output(side: str, out: Any) -> None:
    """Raises TypeError if the output of a model is not (logits, kd_logits, list of tokens)."""
    if isinstance(out, Tensor) or len(out) < 3:
        raise TypeError(f'the output of the {side} must be (logits, kd_logits, tokens), see models.tap')
    if isinstance(out[2], Tensor):
        raise TypeError(f'the tokens of the {side} must be a list with one tensor (B, N, D) per tapped block')


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 3 or teacher.dim() != 3:
        raise ValueError(f'tokens must be (B, N, D): student {tuple(student.shape)}, teacher {tuple(teacher.shape)}')
    # Without this check broadcasting would compare the wrong tokens and give finite, wrong numbers.
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f'student and teacher differ in images or patch tokens: (B, N) is {tuple(student.shape[:2])} '
            f'for the student, {tuple(teacher.shape[:2])} for the teacher'
        )


# The fast path: values and gradients together -------------------------------------------------------------------------


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


def _normalize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (…, D) divided by their lengths, and these lengths (…, 1), as in `F.normalize`."""
    length = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return tokens / length, length


def _normalize_backward(grad_unit: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient at the tokens from the gradient at the normalised tokens, (…, D), in its place."""
    # The length has no effect on the loss, so the component along the token is removed.
    along = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1)
    return grad_unit.addcmul_(along, unit, value=-1).div_(length)


def map_distance(student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`plain_map_distance` of G maps, (G, M, D_s) and (G, M, D_t), computed together with its gradient.

    Because maps are symmetric, the gradient at the normalised tokens S is 4·(SSᵀ − TTᵀ)·S: one product, where autograd
    needs two and keeps the maps for them. The maps have `dtype`, too.
    """
    (G, M), sets = student.shape[:2], _sets_per_chunk(student, teacher)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        exact = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        value = torch.zeros((), dtype=exact, device=student.device)
        gradient = torch.empty_like(student, dtype=exact)
        for s, t, g in zip(student.split(sets), teacher.split(sets), gradient.split(sets), strict=True):
            unit, length = _normalize(s.to(exact))
            S, T = (_as_factor(x, dtype) for x in (unit, _normalize(t.to(exact))[0]))
            # The student's product is added to the teacher's map: in bfloat16 only the difference is rounded.
            difference = torch.bmm(T, T.mT).baddbmm_(S, S.mT, beta=-1)
            value += _sum_of_squares(difference) / (G * M**2)
            g.copy_(_normalize_backward((difference @ S).to(exact), unit, length * (G * M**2 / 4)))
    return PrecomputedGrad.apply(student, value, gradient)


def _sets_per_chunk(student: Tensor, teacher: Tensor) -> int:
    M, width = student.shape[1], student.shape[2] + teacher.shape[2]
    elements = CPU_CHUNK_ELEMENTS if student.device.type == 'cpu' else GPU_CHUNK_ELEMENTS
    return max(1, elements // (M * max(M, width)))


def _sum_of_squares(maps: Tensor) -> Tensor:
    # Row by row: one sum over millions of squares loses digits.
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return torch.linalg.vector_norm(maps, dim=-1, dtype=dtype).square().sum()


def _as_factor(unit: Tensor, dtype: torch.dtype) -> Tensor:
    return unit if unit.dtype == torch.float64 else unit.to(dtype)


# The terms ------------------------------------------------------------------------------------------------------------


def sample_loss(
    student: Tensor, teacher: Tensor, over_ranks: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Relations across images: one B×B map per patch position (the paper's inter-image term).

    Over ranks the maps are W·B×W·B. Each rank gathers the W·B·N normalised tokens of one side after the other in
    `dtype`, and computes B rows of each map.
    """
    _check_pair(student, teacher)
    if not over_ranks:
        return map_distance(student.transpose(0, 1), teacher.transpose(0, 1), dtype)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        maps = _map_rows_over_ranks(_as_factor(_normalize(_full_precision(teacher))[0], dtype))[0]
        unit, length = _normalize(_full_precision(student))
        rows, gathered = _map_rows_over_ranks(_as_factor(unit, dtype))
        difference = rows - maps  # (N, B, W·B)
        entries = len(difference) * gathered.shape[1] ** 2
        squares = _sum_of_squares(difference)
        dist.all_reduce(squares)
        # Each token is in a row and in a column of its map.
        grad_unit = 4 / entries * (difference.to(gathered.dtype) @ gathered).to(unit.dtype).transpose(0, 1)
        gradient = dist.get_world_size() * _normalize_backward(grad_unit, unit, length)
    return PrecomputedGrad.apply(student, squares / entries, gradient)


def _map_rows_over_ranks(unit: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's rows of the maps across images, and the tokens of all: (B, N, D) → (N, B, W·B), (N, W·B, D)."""
    B, N, D = unit.shape
    gathered = unit.new_empty(dist.get_world_size() * B, N, D)  # gathered in place, or it would exist twice
    dist.all_gather(list(gathered.split(B)), unit.contiguous())
    # The order of the images does not matter for rows over all of them.
    gathered = gathered.transpose(0, 1)
    return unit.transpose(0, 1) @ gathered.mT, gathered


def patch_loss(student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Relations within an image: one N×N map per image (the paper's intra-image term).

    Maps are used while they are small. With many more tokens than channels (N > 4·(D_s + D_t)), as in the first stage
    of hierarchical models, products of channels replace them, in float64 as in `full_loss`.
    """
    _check_pair(student, teacher)
    B, N = student.shape[:2]
    if not _has_many_tokens(student, teacher):
        return map_distance(student, teacher, dtype)
    images = max(1, CHUNK // N)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        chunks = zip(student.split(images), teacher.split(images), strict=True)
        values, gradients = zip(*(_by_channels(s, t, B * N**2) for s, t in chunks), strict=True)
    gradient = torch.cat(gradients)
    return PrecomputedGrad.apply(student, sum(values).to(gradient.dtype), gradient)


def _has_many_tokens(student: Tensor, teacher: Tensor) -> bool:
    return student.shape[1] > 4 * (student.shape[2] + teacher.shape[2])


def random_loss(
    student: Tensor,
    teacher: Tensor,
    K: int = 192,
    generator: torch.Generator | None = None,
    over_ranks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Relations of min(K, B·N) tokens drawn without replacement from the batch (the paper's random-sampled term).

    Over ranks K·(D_s + D_t) numbers of float32, the drawn tokens, are sent to all ranks.

    Args:
        student, teacher, dtype: see the module; both sides are sampled at the same places.
        K: number of tokens to draw.
        generator: of the draw, best on the device of the tokens; torch's global one if None.
        over_ranks: draw from the W·B images of all ranks, whose generators must be in the same state.

    Raises:
        ValueError: also for `over_ranks` without a generator, because each rank would draw other tokens.
    """
    _check_pair(student, teacher)
    if over_ranks and generator is None:
        raise ValueError('over_ranks needs a generator, which is in the same state on all ranks')
    B, N = student.shape[:2]
    W, rank = (dist.get_world_size(), dist.get_rank()) if over_ranks else (1, 0)
    # Drawn on the device of the generator: if it is that of the tokens, nothing has to be copied.
    device = student.device if generator is None else generator.device
    chosen = torch.randperm(W * B * N, generator=generator, device=device)[:K].to(student.device)
    if not over_ranks:
        return map_distance(student.flatten(0, 1)[chosen][None], teacher.flatten(0, 1)[chosen][None], dtype)
    image, place = chosen // N, chosen % N
    is_own = (image % W == rank)[:, None]
    # The same number of tokens on each rank, zeros for those of others: the host need not know how many are its own.
    own = [torch.where(is_own, _full_precision(tokens[image // W, place]), 0.0) for tokens in (student, teacher)]
    gathered = torch.cat([tokens.detach() for tokens in own], dim=1)
    dist.all_reduce(gathered)
    s, t = gathered.split([tokens.shape[1] for tokens in own], dim=1)
    value = map_distance(torch.where(is_own, own[0], s)[None], t[None], dtype)
    return value.detach() + W * (value - value.detach())


def full_loss(student: Tensor, teacher: Tensor, over_ranks: bool = False, fused: bool = False) -> Tensor:
    """Relations between all tokens of the batch, the paper's undecoupled loss, without its maps of (B·N)² entries.

    With the normalised tokens as rows of S and T, ‖SSᵀ − TTᵀ‖² = ‖SᵀS‖² − 2‖SᵀT‖² + ‖TᵀT‖², because factors may be
    rotated within a trace: tr(SSᵀ·TTᵀ) = tr(TᵀS·SᵀT). So D×D products of channels give the same number as products of
    tokens. The gradient at S is 4(S·SᵀS − T·TᵀS). The D×D products are sums over tokens, and so over ranks.

    Near the end of training the three norms cancel, and so do the two products of the gradient. Therefore everything is
    in float64: the gradient keeps its digits, the value loses about 1e-16, which is 1e-6 of a value of 1e-10, and is
    never negative. Over ranks D_s² + D_s·D_t + D_t² numbers of float64 are summed.

    With `fused` the products are in float32 and only their sums in float64, unless the tokens are float64. The relative
    errors of value and gradient are then up to 1e-5 and 1e-4 at a value of 1e-3, and 1e-3 both at 1e-5.
    """
    _check_pair(student, teacher)
    W = dist.get_world_size() if over_ranks else 1
    if fused and torch.float64 not in (student.dtype, teacher.dtype):
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            value, gradient = _fused_full(student.detach(), teacher.detach(), W, over_ranks)
        return PrecomputedGrad.apply(student, value, W * gradient)
    S, T = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        value, gradient = _by_channels(S, T, (W * S.shape[1]) ** 2, over_ranks)
    return PrecomputedGrad.apply(student, value.to(gradient.dtype), W * gradient.view_as(student))


def _by_channels(student: Tensor, teacher: Tensor, entries: int, over_ranks: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of ‖SSᵀ − TTᵀ‖²/entries over sets of tokens (G, M, D_s), (G, M, D_t), and its gradient (G, M, D_s)."""
    G, D_s, D_t = len(student), student.shape[2], teacher.shape[2]
    products = torch.zeros(G, D_s, D_s + D_t, dtype=torch.float64, device=student.device)
    SS, ST = products.split([D_s, D_t], dim=2)
    TT = products.new_zeros(G, D_t, D_t)
    chunks = list(zip(student.split(CHUNK, dim=1), teacher.split(CHUNK, dim=1), strict=True))
    for chunk in chunks:
        s, t = (_normalize(tokens.double())[0] for tokens in chunk)
        products.baddbmm_(s.mT, torch.cat([s, t], dim=2))
        TT.baddbmm_(t.mT, t)
    if over_ranks:
        dist.all_reduce(products)
        dist.all_reduce(TT)
    norms = [x.square().sum(dim=(1, 2)) for x in (SS, ST, TT)]
    value = (norms[0] - 2 * norms[1] + norms[2]).clamp(min=0).sum() / entries
    gradient = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.float32))
    for (s, t), g in zip(chunks, gradient.split(CHUNK, dim=1), strict=True):
        unit, length = _normalize(s.double())
        grad_unit = 4 / entries * (unit @ SS - _normalize(t.double())[0] @ ST.mT)
        g.copy_(_normalize_backward(grad_unit, unit, length))
    return value, gradient


# Fused: few kernels on a GPU ------------------------------------------------------------------------------------------


class JointTerms(torch.autograd.Function):
    """Values of several terms of a layer pair, with the gradient of each at the normalised tokens.

    Only the backward pass takes the gradients through the normalisation, all together, so each term may be scaled or
    differentiated by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, chosen: Tensor | None, terms: tuple[str, ...], products: str
    ) -> tuple[Tensor, ...]:
        values, gradients = _fused(_relate, student.device)(student, teacher, chosen, terms, products)
        ctx.save_for_backward(student, chosen, *gradients)
        ctx.terms = terms
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        student, chosen, *gradients = ctx.saved_tensors
        gradient = _fused(_relate_backward, student.device)(student, chosen, ctx.terms, gradients, factors)
        return gradient, None, None, None, None


def relate_jointly(
    student: Sequence[Tensor], teacher: Sequence[Tensor], terms: Sequence[str], options: 'RelationOptions'
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


def _fusible(student: Tensor, teacher: Tensor, terms: Sequence[str], options: 'RelationOptions') -> tuple[str, ...]:
    """Which of these terms of a layer pair can be computed together."""
    _check_pair(student, teacher)
    if torch.float64 in (student.dtype, teacher.dtype):
        return ()
    fusible = set() if options.over_ranks else {'sample', 'rand'}
    fusible |= set() if _has_many_tokens(student, teacher) else {'patch'}
    return tuple(name for name in terms if name in fusible)


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


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _fused(function: Callable, device: torch.device) -> Callable:
    """A function of tensors, compiled for a GPU."""
    return _compiled(function) if device.type == 'cuda' else function


def _relate(
    student: Tensor, teacher: Tensor, chosen: Tensor | None, terms: tuple[str, ...], products: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of the terms of a layer pair, and (SSᵀ − TTᵀ)·S of the sets (G, M, D_s) of each."""
    units = [_normalize(_full_precision(tokens))[0] for tokens in (student, teacher)]
    values, gradients = [], []
    for term in terms:
        S, T = (_sets_of(term, unit, chosen) for unit in units)
        (G, M), sets = S.shape[:2], _sets_per_chunk(S, T)
        squares, parts = [], []
        for s, t in zip(S.split(sets), T.split(sets), strict=True):
            difference = _difference(s, t, products)
            squares.append(_sum_of_squares(difference))
            parts.append(_product(difference, s, products))
        values.append(torch.stack(squares).sum() / (G * M**2))
        gradients.append(torch.cat(parts))
    return values, gradients


def _sets_of(term: str, tokens: Tensor, chosen: Tensor | None) -> Tensor:
    """The sets of tokens, (G, M, D), whose maps a term compares."""
    if term == 'rand':
        return tokens.flatten(0, 1)[chosen][None]
    return tokens.transpose(0, 1) if term == 'sample' else tokens


def _relate_backward(
    student: Tensor, chosen: Tensor | None, terms: tuple[str, ...], gradients: list[Tensor], factors: Sequence[Tensor]
) -> Tensor:
    """Gradient at the student's tokens, from what `_relate` returns and the factor of each term."""
    unit, length = _normalize(_full_precision(student))
    total = unit.new_zeros(unit.shape)
    for term, gradient, factor in zip(terms, gradients, factors, strict=True):
        G, M, D = gradient.shape
        factor = factor * (4 / (G * M**2))
        if term == 'rand':
            assert chosen is not None
            total.view(-1, D).index_add_(0, chosen, gradient[0] * factor)
        else:
            total.addcmul_(gradient.transpose(0, 1) if term == 'sample' else gradient, factor)
    return _normalize_backward(total, unit, length).to(student.dtype)


def _fused_full(student: Tensor, teacher: Tensor, W: int, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient of `full_loss` on W ranks, with products of float32 and sums of float64."""
    entries, D_s = (W * student.shape[0] * student.shape[1]) ** 2, student.shape[2]
    of_student, TT = _fused(_channel_products, student.device)(student, teacher)
    if over_ranks:
        dist.all_reduce(of_student)
        dist.all_reduce(TT)
    SS, ST = of_student.split([D_s, len(TT)], dim=1)
    norms = [x.square().sum() for x in (SS, ST, TT)]
    value = (norms[0] - 2 * norms[1] + norms[2]).clamp(min=0) / entries
    gradient = _fused(_full_gradient, student.device)(student, teacher, torch.cat([SS, -ST.mT]), entries)
    return value.to(gradient.dtype), gradient


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
    grad_unit = _product(both.flatten(0, 1)[None], factors[None].to(both.dtype), products).view(student.shape)
    return _normalize_backward(grad_unit, both[..., : student.shape[2]], length * (entries / 4))


def _both_sides(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[S T] of the normalised tokens, (B, N, D_s + D_t), and the lengths of the student's."""
    (S, length), (T, _) = (_normalize(_full_precision(tokens)) for tokens in (student, teacher))
    return torch.cat([S, T], 2), length


def _products(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> str:
    """How products of these tokens are computed: 'float32', 'bfloat16', or 'split' into parts of bfloat16.

    Tokens of 16 bits, on one side at least, are known less exactly than split products are computed.
    """
    if dtype == torch.bfloat16:
        return 'bfloat16'
    return 'split' if 2 in (student.dtype.itemsize, teacher.dtype.itemsize) else 'float32'


def _product(x: Tensor, y: Tensor, products: str) -> Tensor:
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
        return _product(torch.cat([s, t], 2), torch.cat([s, -t], 2).mT, products)
    (s_high, s_low), (t_high, t_low) = _split(s), _split(t)
    rows = [torch.cat([s_high, -t_high], 2), torch.cat([s_low, -t_low], 2)]
    high, mixed = _bfloat16_product(torch.cat(rows, 1), torch.cat([s_high, t_high], 2).mT).chunk(2, dim=1)
    return high + (mixed + mixed.mT)  # high·lowᵀ is the transpose of low·highᵀ


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is x but for about 2⁻¹⁷ of it."""
    # Rounded by its bits, because the compiler takes x.bfloat16().float() for x.
    high = ((x.view(torch.int32) + (1 << 15)) & -(1 << 16)).view(torch.float32)
    return high.bfloat16(), (x - high).bfloat16()


def _bfloat16_product(x: Tensor, y: Tensor) -> Tensor:
    """(G, M, K) @ (G, K, D) of bfloat16 factors with float32 sums."""
    # On a CPU in float32, where products of bfloat16 factors are exact.
    return torch.bmm(x, y, out_dtype=torch.float32) if x.device.type == 'cuda' else torch.bmm(x.float(), y.float())


# The weighted sum -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitLoss:
    """A loss of the logits. Its name is a value of `--distillation-type`."""

    distance: Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of logits (B, C) of both, targets and τ → scalar
    reads_tau: bool = True


LOGIT_LOSSES: dict[str, LogitLoss] = {
    'soft': LogitLoss(lambda s, t, targets, tau: soft_distillation_loss(s, t, tau)),
    'hard': LogitLoss(lambda s, t, targets, tau: hard_distillation_loss(s, t), reads_tau=False),
    'lskd': LogitLoss(lambda s, t, targets, tau: lskd_loss(s, t, tau)),
    'nkd': LogitLoss(nkd_loss),
}
DISTILLATION_TYPES = ('none', *LOGIT_LOSSES)


@dataclass(frozen=True)
class RelationOptions:
    """Options of the relation terms."""

    K: int = 192  # number of random tokens
    generator: torch.Generator | None = None  # of random tokens
    over_ranks: bool = False  # connect the images of all ranks
    dtype: torch.dtype = torch.float32  # of the factors of the products
    fused: tuple[str, ...] = ()  # of `FUSED_PARTS`


@dataclass(frozen=True)
class RelationTerm:
    """A relation term of the loss. Its flag is `--w-<name>`, its key in the log `mf_<name>`."""

    distance: Callable[[Tensor, Tensor, RelationOptions], Tensor]  # of tokens (B, N, D_s) and (B, N, D_t) → scalar
    default_weight: float  # of its flag
    help: str  # of its flag
    label: str  # what the start-up summary calls it
    reads: tuple[str, ...] = ()  # which of the flags K, relations and relation_dtype have an effect on it


RELATION_TERMS: dict[str, RelationTerm] = {
    'sample': RelationTerm(
        lambda s, t, options: sample_loss(s, t, options.over_ranks, options.dtype),
        default_weight=1.0,
        help='weight of relations across images, at one patch position',
        label='sample',
        reads=('relations', 'relation_dtype'),
    ),
    'patch': RelationTerm(
        lambda s, t, options: patch_loss(s, t, options.dtype),
        default_weight=1.0,
        help='weight of relations within an image',
        label='patch',
        reads=('relation_dtype',),
    ),
    'rand': RelationTerm(
        lambda s, t, options: random_loss(s, t, options.K, options.generator, options.over_ranks, options.dtype),
        default_weight=1.0,
        help='weight of relations between random tokens of the batch',
        label='random',
        reads=('K', 'relations', 'relation_dtype'),
    ),
    'full': RelationTerm(
        lambda s, t, options: full_loss(s, t, options.over_ranks, 'full' in options.fused),
        default_weight=0.0,
        help='weight of relations between all tokens of the batch',
        label='full',
        reads=('relations',),
    ),
}


class ManifoldDistillationLoss(nn.Module):
    """(1−α)·CE + α·KD + β·(w_sample·sample + w_patch·patch + w_rand·random + w_full·full), term by term.

    The terms are means over the entries of a map, the maps and the layer pairs, as in the release; its weights (0.1, 4,
    0.2, 0) belong to them. The paper writes sums over entries and layer pairs, which are larger by L times the entries
    of a map. With `distillation_type` 'none', the default, there is no teacher: `base` is the plain CE, every other
    term is 0, and a teacher's output is not used, with a warning.

    Args:
        base_criterion: loss of logits (B, C) and targets, class indices (B,) or soft labels (B, C).
        distillation_type: 'none' or a row of `LOGIT_LOSSES`: how the logits are distilled.
        alpha: weight α of KD; CE has 1 − α.
        tau: temperature of logit distillation, except 'hard'.
        beta: multiplier β on all relation terms.
        K: number of random tokens per layer pair.
        relations: 'rank' or 'global': sample, random and full connect the images of one rank or of all ranks.
        relation_dtype: 'float32' or 'bfloat16': dtype of the factors and maps of sample, patch and random. With
            bfloat16 about 1e-6 remains of a term whose tokens are equal.
        fused: of `FUSED_PARTS`: which terms are computed in few kernels, see `relate_jointly` and `full_loss`.
        weights: `w_<name>` of the terms in `RELATION_TERMS`.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        distillation_type: str = 'none',
        alpha: float = 0.5,
        tau: float = 1.0,
        beta: float = 1.0,
        K: int = 192,
        relations: str = 'rank',
        relation_dtype: str = 'float32',
        fused: Sequence[str] = (),
        **weights: float,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ('distillation_type', distillation_type, DISTILLATION_TYPES),
            ('relations', relations, RELATIONS),
            ('relation_dtype', relation_dtype, RELATION_DTYPES),
            *(('fused', part, FUSED_PARTS) for part in fused),
        ):
            if value not in choices:
                raise ValueError(f'{name} must be one of {choices}, not {value!r}')
        if K < 1:
            raise ValueError(f'K must be at least 1, not {K}')
        unknown = weights.keys() - {f'w_{name}' for name in RELATION_TERMS}
        if unknown:
            raise TypeError(
                f'unknown weight {min(unknown)}; known are {", ".join(f"w_{name}" for name in RELATION_TERMS)}'
            )
        self.base_criterion = base_criterion
        self.distillation_type = distillation_type
        self.alpha, self.tau, self.beta, self.K = alpha, tau, beta, K
        self.relations = relations
        self.relation_dtype: torch.dtype = getattr(torch, relation_dtype)
        self.fused = tuple(fused)
        self.weights = {name: weights.get(f'w_{name}', term.default_weight) for name, term in RELATION_TERMS.items()}

    def forward(
        self,
        student_out: Sequence[Any],
        teacher_out: Sequence[Any] | None,
        targets: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Weighted scalars by name; the training loss is their sum.

        Args:
            student_out: (logits (B, C), kd_logits (B, C), tokens: L of (B, N, D_s)), see `models.Output`.
            teacher_out: (logits (B, C), …, tokens: L of (B, N, D_t)); not used with distillation type 'none'. With α 0
                the logits may be None: a teacher without a head, or with other classes.
            targets: of `base_criterion`; with 'nkd' class indices (B,) or soft labels (B, C).
            generator: of the random tokens, advanced by one draw per layer pair, or one in all with fused relations;
                with relations 'global' in the same state on all ranks.

        Returns:
            `base`, `dist`, and `mf_<name>` for each term in `RELATION_TERMS`; a term that is not used is 0.

        Raises:
            TypeError: an output has another form.
            ValueError: student and teacher differ in classes, layers, images or patch tokens.
        """
        _check_output('student', student_out)
        logits, kd_logits, tokens = student_out[:3]
        # The loss chooses its precision, whatever the models ran in.
        with torch.autocast(logits.device.type, enabled=False):
            base = self.base_criterion(_full_precision(logits), targets)
            if self.distillation_type == 'none':
                if teacher_out is not None:
                    warnings.warn("distillation_type is 'none', so the teacher is not used", stacklevel=2)
                return {'base': base, 'dist': base.new_zeros(())} | self._relations((), (), generator, base)
            if teacher_out is None:
                raise ValueError(f'distillation type {self.distillation_type!r} needs the output of a teacher')
            _check_output('teacher', teacher_out)
            # Computed even at weight 0: DistributedDataParallel fails if a head gets no gradient.
            kd = self._distill(kd_logits, teacher_out[0], targets)
            losses = {'base': (1 - self.alpha) * base, 'dist': self.alpha * kd}
            return losses | self._relations(tokens, teacher_out[2], generator, base)

    def _distill(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        if teacher is None and self.alpha == 0:
            return 0 * _full_precision(student).square().sum()
        if teacher is None:
            raise ValueError(f'α {self.alpha:g} needs the logits of the teacher, which has none')
        if student.shape != teacher.shape:
            raise ValueError(
                f'logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; '
                'logit distillation needs the same classes'
            )
        student, teacher = _full_precision(student), _full_precision(teacher)
        return LOGIT_LOSSES[self.distillation_type].distance(student, teacher, targets, self.tau)

    def _relations(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], generator: torch.Generator | None, base: Tensor
    ) -> dict[str, Tensor]:
        if len(student) != len(teacher):
            raise ValueError(f'layers differ: {len(student)} of the student, {len(teacher)} of the teacher')
        over_ranks = self.relations == 'global' and dist.is_initialized()
        options = RelationOptions(self.K, generator, over_ranks, self.relation_dtype, self.fused)
        used = [name for name, weight in self.weights.items() if self.beta * weight]
        joint = relate_jointly(student, teacher, used, options) if 'relations' in self.fused else [{}] * len(student)
        losses = {}
        for name, term in RELATION_TERMS.items():
            weight, value = self.beta * self.weights.get(name, 0.0), base.new_zeros(())
            # A term of weight 0 is not computed: no head and no block depends on it alone.
            if weight and student:
                values = [
                    found[name] if name in found else term.distance(s, t, options)
                    for s, t, found in zip(student, teacher, joint, strict=True)
                ]
                value = weight * torch.stack(values).mean()
            losses[f'mf_{name}'] = value
        return losses
