"""The method: relations between patch tokens, logit distillation, and their weighted sum.

Fine-grained manifold distillation (Hao et al., NeurIPS 2022, https://arxiv.org/abs/2107.01378) asks the student's
patch tokens to stand to each other as the teacher's do. The relation map of a set of tokens X is X Xᵀ after every
token is L2-normalised: a table of cosine similarities. It has no width, so teacher and student need no projector.

With `over_ranks` a term relates the images of all ranks, of which each holds B, as one process would that holds them
all. Image i of them is image i // W of rank i % W: the order in which the sampler deals them out. All ranks find the
same value, and the gradient at their own tokens times W, for DistributedDataParallel divides by W.

Letters: B images, N patch tokens per image, D channels (D_s student, D_t teacher), L layer pairs, K sampled tokens,
C classes, M tokens of any set, W ranks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DISTILLATION_TYPES = ('none', 'soft', 'hard')
RELATIONS = ('rank', 'global')
RELATION_SCALES = ('mean', 'paper')

# Tokens whose products the full term adds at once: enough for a fast product, 19 MB at the recipe's widths.
CHUNK = 4096
# Numbers, of tokens or of their maps, that a relation term works on at once: on a CPU about what its caches hold, 18
# images at the recipe's widths; elsewhere many, for each call of a kernel costs too.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 25
RELATION_DTYPES = ('float32', 'bfloat16')


def _full_precision(x: Tensor) -> Tensor:
    """float32 at least; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 3 or teacher.dim() != 3:
        raise ValueError(f'tokens must be (B, N, D): student {tuple(student.shape)}, teacher {tuple(teacher.shape)}')
    # Without this check broadcasting would compare unlike tokens and give finite, wrong numbers.
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f'student and teacher differ in images or patch tokens: (B, N) is {tuple(student.shape[:2])} '
            f'for the student, {tuple(teacher.shape[:2])} for the teacher'
        )


def relation_map(tokens: Tensor) -> Tensor:
    """Cosine similarities between all tokens of a set: (…, M, D) → (…, M, M), in float32 or better."""
    tokens = F.normalize(_full_precision(tokens), dim=-1)
    return tokens @ tokens.mT


def plain_map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two relation maps by its definition: (…, M, D_s) and (…, M, D_t) → scalar.

    What the terms are compared with. It keeps maps for the backward pass and is differentiable any number of times.
    """
    # Most differences are below 1e-2: their squares vanish in float16 and lose three digits in bfloat16.
    with torch.autocast(student.device.type, enabled=False):
        return (relation_map(student) - relation_map(teacher)).square().mean()


class PrecomputedGrad(torch.autograd.Function):
    """A value and its gradient, both computed already: nothing else has to be kept for the backward pass."""

    @staticmethod
    def forward(ctx, student: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor: Tensor):
        # Rounded after it is scaled: before, what the scaler of float16 is to save would be lost.
        return (factor * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def _normalize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (…, D) of length 1 and the lengths (…, 1) they had, as `F.normalize` has them."""
    length = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return tokens / length, length


def _normalize_backward(grad_unit: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient at the tokens of a loss whose gradient at the unit tokens is `pull`, (…, D), in its place."""
    # A length has no influence, so its direction is taken out.
    along = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1)
    return grad_unit.addcmul_(along, unit, value=-1).div_(length)


def _map_distance(student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`plain_map_distance` of G maps, (G, M, D_s) and (G, M, D_t), with its gradient at once.

    For maps are symmetric, the gradient at the unit tokens S is 4·(SSᵀ − TTᵀ)·S: one product, where autograd needs two
    and keeps the maps for them.

    Args:
        student: tokens (G, M, D_s).
        teacher: tokens (G, M, D_t).
        dtype: of the products' factors and of the maps; tokens of float64 stay what they are.
    """
    (G, M), width = student.shape[:2], student.shape[2] + teacher.shape[2]
    sets = max(1, (CPU_CHUNK_ELEMENTS if student.device.type == 'cpu' else GPU_CHUNK_ELEMENTS) // (M * max(M, width)))
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        exact = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        value, gradient = 0.0, torch.empty_like(student, dtype=exact)
        for s, t, g in zip(student.split(sets), teacher.split(sets), gradient.split(sets), strict=True):
            unit, length = _normalize(s.to(exact))
            S, T = (_factor(x, dtype) for x in (unit, _normalize(t.to(exact))[0]))
            # The student's product is added up on top of the teacher's map: of bfloat16 only this one is rounded.
            difference = torch.bmm(T, T.mT).baddbmm_(S, S.mT, beta=-1)
            value = value + _sum_of_squares(difference) / (G * M**2)
            g.copy_(_normalize_backward((difference @ S).to(exact), unit, length * (G * M**2 / 4)))
    return PrecomputedGrad.apply(student, value, gradient)


def _sum_of_squares(maps: Tensor) -> Tensor:
    """Of all entries, in float32 or better."""
    # Row by row: millions of squares in one go lose digits.
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return torch.linalg.vector_norm(maps, dim=-1, dtype=dtype).square().sum()


def _factor(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit tokens as the factors of a product."""
    return unit if unit.dtype == torch.float64 else unit.to(dtype)


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def sample_loss(
    student: Tensor, teacher: Tensor, over_ranks: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Relations across images, one B×B map per patch position (the paper's inter-image term).

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t).
        over_ranks: maps of the images of all ranks, W·B×W·B. Each rank gathers W·B·N unit tokens of either side in
            `dtype`, one side at a time, and computes B rows of each map.
        dtype: of the products' factors.

    Returns:
        Mean of squared differences over the N maps, a scalar, differentiable once, with respect to the student; the
        paper writes a Frobenius sum divided by N.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    if not over_ranks:
        return _map_distance(student.transpose(0, 1), teacher.transpose(0, 1), dtype)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        maps = _rows_over_ranks(_factor(_normalize(_full_precision(teacher))[0], dtype))[0]
        unit, length = _normalize(_full_precision(student))
        rows, gathered = _rows_over_ranks(_factor(unit, dtype))
        difference = rows - maps  # (N, B, W·B)
        entries = len(difference) * gathered.shape[1] ** 2
        value = _sum_over_ranks(_sum_of_squares(difference)) / entries
        # Each token stands in a row and in a column of its map.
        grad_unit = 4 / entries * (difference.to(gathered.dtype) @ gathered).to(unit.dtype).transpose(0, 1)
        gradient = dist.get_world_size() * _normalize_backward(grad_unit, unit, length)
    return PrecomputedGrad.apply(student, value, gradient)


def _rows_over_ranks(unit: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's rows of the maps across images, and the tokens of all: (B, N, D) → (N, B, W·B), (N, W·B, D)."""
    B, N, D = unit.shape
    gathered = unit.new_empty(dist.get_world_size() * B, N, D)  # gathered in place, or it would be there twice
    dist.all_gather(list(gathered.split(B)), unit.contiguous())
    # The order of the images has no influence on rows of all of them.
    gathered = gathered.transpose(0, 1)
    return unit.transpose(0, 1) @ gathered.mT, gathered


def patch_loss(student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Relations inside an image, one N×N map per image (the paper's intra-image term).

    The maps are made as long as they are small. With many more tokens than channels (N > 4·(D_s + D_t)), as in the
    first stage of hierarchical models, products of channels take their place, as `full_loss` has them for a batch.

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t).
        dtype: of the products' factors, where maps are made; without them all is in float64.

    Returns:
        Mean of squared differences over the B maps, a scalar, differentiable once, with respect to the student; the
        paper writes a Frobenius sum divided by B.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    B, N, D_s = student.shape
    channels = D_s + teacher.shape[-1]
    if 4 * channels >= N:
        return _map_distance(student, teacher, dtype)
    images = max(1, CHUNK // N)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        parts = [
            _by_channels(s, t, B * N**2) for s, t in zip(student.split(images), teacher.split(images), strict=True)
        ]
        value, gradient = sum(value for value, _ in parts), torch.cat([gradient for _, gradient in parts])
    return PrecomputedGrad.apply(student, value.to(gradient.dtype), gradient)


def random_loss(
    student: Tensor,
    teacher: Tensor,
    K: int,
    generator: torch.Generator | None = None,
    over_ranks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Relations of min(K, B·N) tokens drawn without replacement from the batch (the paper's random term).

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t), sampled at the same places.
        K: number of tokens to draw.
        generator: source of the draw, best on the tokens' device; torch's global one if None.
        over_ranks: draw from the W·B images of all ranks, whose generators must be in the same state. What was drawn,
            K·(D_s + D_t) numbers of float32, is sent to all.
        dtype: of the products' factors.

    Returns:
        Mean of squared differences of the two K×K maps, a scalar, differentiable once, with respect to the student.

    Raises:
        ValueError: B or N differ; `over_ranks` without a generator, for each rank would draw other tokens.
    """
    _check_pair(student, teacher)
    if over_ranks and generator is None:
        raise ValueError('tokens of all ranks are drawn from a generator they share; there is none')
    B, N = student.shape[:2]
    W, rank = (dist.get_world_size(), dist.get_rank()) if over_ranks else (1, 0)
    # Drawn where the generator lives: on the tokens' device nothing has to be copied.
    device = student.device if generator is None else generator.device
    chosen = torch.randperm(W * B * N, generator=generator, device=device)[:K].to(student.device)
    if not over_ranks:
        return _map_distance(student.flatten(0, 1)[chosen][None], teacher.flatten(0, 1)[chosen][None], dtype)
    image, place = chosen // N, chosen % N
    mine = (image % W == rank)[:, None]
    # As many tokens on each rank, and zeros for those of others: how many are its own the host need not know.
    own = [torch.where(mine, _full_precision(tokens[image // W, place]), 0.0) for tokens in (student, teacher)]
    gathered = _sum_over_ranks(torch.cat([tokens.detach() for tokens in own], dim=1))
    gathered = gathered.split([tokens.shape[1] for tokens in own], dim=1)
    value = _map_distance(*(torch.where(mine, *pair)[None] for pair in zip(own, gathered, strict=True)), dtype)
    return value.detach() + W * (value - value.detach())


def plain_full_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`full_loss` by its definition, with maps of (B·N)² entries: what the other is compared with."""
    _check_pair(student, teacher)
    return plain_map_distance(student.flatten(0, 1), teacher.flatten(0, 1))


def full_loss(student: Tensor, teacher: Tensor, over_ranks: bool = False) -> Tensor:
    """Relations between all tokens of the batch, the paper's undecoupled loss, without its maps of (B·N)² entries.

    With the unit tokens as rows of S and T, ‖SSᵀ − TTᵀ‖² = ‖SᵀS‖² − 2‖SᵀT‖² + ‖TᵀT‖²: the factors of a trace may be
    moved round, tr(SSᵀ·TTᵀ) = tr(TᵀS·SᵀT), which leads from D×D products of channels to the same number as the
    products of tokens. The gradient at S is 4(S·SᵀS − T·TᵀS). The D×D products are sums over tokens, so over ranks too.

    Near the end of training the three norms cancel, and so do the two products of the gradient: all is in float64. The
    gradient keeps its digits; of the value about 1e-16 is lost, which is 1e-6 of a value of 1e-10.

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t).
        over_ranks: relations between the tokens of all ranks, which add up D_s² + D_s·D_t + D_t² numbers of float64.

    Returns:
        Mean of squared differences over the (B·N)² pairs of tokens, a scalar, never negative; differentiable once,
        with respect to the student.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    W = dist.get_world_size() if over_ranks else 1
    S, T = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        value, gradient = _by_channels(S, T, (W * S.shape[1]) ** 2, over_ranks)
    return PrecomputedGrad.apply(student, value.to(gradient.dtype), W * gradient.view_as(student))


def _by_channels(student: Tensor, teacher: Tensor, entries: int, over_ranks: bool = False) -> tuple[Tensor, Tensor]:
    """‖SSᵀ − TTᵀ‖²/entries, added up over sets of tokens (G, M, D_s), (G, M, D_t), and its gradient (G, M, D_s)."""
    chunks = list(zip(student.split(CHUNK, dim=1), teacher.split(CHUNK, dim=1), strict=True))
    gram_s, TT = _channel_products(chunks, over_ranks)
    SS, ST = gram_s.split([student.shape[-1], teacher.shape[-1]], dim=2)
    norms = [products.square().sum(dim=(1, 2)) for products in (SS, ST, TT)]
    value = (norms[0] - 2 * norms[1] + norms[2]).clamp(min=0).sum() / entries
    return value, torch.cat([_channel_gradient(s, t, SS, ST, 4 / entries) for s, t in chunks], dim=1)


def _channel_products(chunks: Sequence[tuple[Tensor, Tensor]], over_ranks: bool) -> tuple[Tensor, Tensor]:
    """[SᵀS SᵀT], (G, D_s, D_s + D_t), and TᵀT, (G, D_t, D_t), of tokens in pairs of chunks (G, M, D_s), (G, M, D_t)."""
    G, D_s, D_t = len(chunks[0][0]), *(tokens.shape[2] for tokens in chunks[0])
    sums = torch.zeros(G, D_s * (D_s + D_t) + D_t**2, dtype=torch.float64, device=chunks[0][0].device)
    gram_s, of_teacher = sums.split([D_s * (D_s + D_t), D_t**2], dim=1)
    gram_s, of_teacher = gram_s.unflatten(1, (D_s, D_s + D_t)), of_teacher.unflatten(1, (D_t, D_t))
    for student, teacher in chunks:
        s, t = _normalize(student.double())[0], _normalize(teacher.double())[0]
        gram_s.baddbmm_(s.mT, torch.cat([s, t], dim=2))
        of_teacher.baddbmm_(t.mT, t)
    if over_ranks:
        _sum_over_ranks(sums)
    return gram_s, of_teacher


def _channel_gradient(student: Tensor, teacher: Tensor, SS: Tensor, ST: Tensor, factor: float) -> Tensor:
    """factor·(S·SᵀS − T·TᵀS), led back from unit tokens to a chunk of the student's, (G, M, D_s), float32 or better."""
    unit, length = _normalize(student.double())
    grad_unit = unit @ SS - _normalize(teacher.double())[0] @ ST.mT
    return _normalize_backward(factor * grad_unit, unit, length).to(torch.promote_types(student.dtype, torch.float32))


def soft_distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """τ²·KL(teacher ‖ student) of softened logits, divided by B; DeiT's own soft loss divides by B·C.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        tau: temperature τ both are divided by.
    """
    student = F.log_softmax(student / tau, dim=-1)
    teacher = F.log_softmax(teacher / tau, dim=-1)
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * tau**2


def hard_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class the teacher holds most likely, logits (B, C) both."""
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, not {value!r}')


class _Term(NamedTuple):
    """A relation term: its weight, its function of two token tensors, and of how many tokens (B, N) make a map."""

    weight: float
    distance: Callable[[Tensor, Tensor], Tensor]
    tokens: Callable[[int, int], int]


class ManifoldDistillationLoss(nn.Module):
    """(1−α)·CE + α·KD + β·(w_sample·sample + w_patch·patch + w_rand·random + w_full·full), term by term.

    The terms are the release's means over the entries of a map, the maps and the layer pairs, and its weights (0.1, 4,
    0.2, 0) belong to them. The paper's are sums over entries and layer pairs and means over maps: larger by L times the
    entries of a map. With `distillation_type` 'none' there is no teacher: `base` is the plain CE, every other term 0.

    Args:
        base_criterion: loss of logits (B, C) and targets, class indices (B,) or soft labels (B, C).
        distillation_type: 'none', 'soft' or 'hard': how the logits are distilled.
        alpha: weight α of KD; CE has 1 − α.
        tau: temperature of soft distillation.
        beta: weight β common to the relation terms.
        w_sample: weight of the relations across images.
        w_patch: weight of the relations inside an image.
        w_rand: weight of the relations of random tokens.
        K: number of random tokens per layer pair.
        w_full: weight of the relations between all tokens of the batch.
        relations: whose images sample, random and full relate, 'rank' or 'global': a rank's own, or those of all ranks.
        relation_scale: 'mean' or 'paper': the release's means or the paper's sums.
        relation_dtype: 'float32' or 'bfloat16': of the factors and maps of sample, patch and random; the latter leave
            about 1e-6 of tokens that are equal.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        distillation_type: str = 'none',
        alpha: float = 0.5,
        tau: float = 1.0,
        beta: float = 1.0,
        w_sample: float = 1.0,
        w_patch: float = 1.0,
        w_rand: float = 1.0,
        K: int = 192,
        w_full: float = 0.0,
        relations: str = 'rank',
        relation_scale: str = 'mean',
        relation_dtype: str = 'float32',
    ) -> None:
        super().__init__()
        _check_choice('distillation_type', distillation_type, DISTILLATION_TYPES)
        _check_choice('relations', relations, RELATIONS)
        _check_choice('relation_scale', relation_scale, RELATION_SCALES)
        _check_choice('relation_dtype', relation_dtype, RELATION_DTYPES)
        if K < 1:
            raise ValueError(f'K must be at least 1, not {K}')
        self.base_criterion = base_criterion
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau
        self.beta = beta
        self.w_sample = w_sample
        self.w_patch = w_patch
        self.w_rand = w_rand
        self.K = K
        self.w_full = w_full
        self.relations = relations
        self.relation_scale = relation_scale
        self.relation_dtype = getattr(torch, relation_dtype)

    def forward(self, student_out, teacher_out, targets: Tensor, generator=None) -> dict[str, Tensor]:
        """Weighted scalars by name; the training loss is their sum.

        Args:
            student_out: (logits (B, C), kd_logits (B, C), tokens: L of (B, N, D_s)).
            teacher_out: (logits (B, C), …, tokens: L of (B, N, D_t)); not read with distillation type 'none'. With α 0
                the logits may be None: a teacher without a head, or of other classes.
            targets: classes (B,) or soft labels (B, C), as `base_criterion` takes them.
            generator: source of the random tokens, advanced by one draw per layer pair; with relations 'global' in the
                same state on all ranks.

        Returns:
            `base`, `dist`, `mf_sample`, `mf_patch`, `mf_rand`, `mf_full`; an absent term is 0.

        Raises:
            ValueError: the two sides differ in classes, layers, images or patch tokens.
        """
        logits, kd_logits, student_tokens = student_out[:3]
        # The loss owns its precision whatever the models ran in.
        with torch.autocast(logits.device.type, enabled=False):
            base = self.base_criterion(_full_precision(logits), targets)
            if self.distillation_type == 'none':
                return {'base': base} | dict.fromkeys(['dist', *self._relation_terms(None)], base.new_zeros(()))
            if teacher_out is None:
                raise ValueError(f'distillation type {self.distillation_type!r} needs the output of a teacher')
            # Both stay in the graph at weight 0: a head without gradient stops DistributedDataParallel.
            losses = {
                'base': (1 - self.alpha) * base,
                'dist': self.alpha * self._distill(kd_logits, teacher_out[0]),
            }
            return losses | self._relate(student_tokens, teacher_out[2], generator, zero=base.new_zeros(()))

    def _distill(self, student: Tensor, teacher: Tensor | None) -> Tensor:
        if teacher is None and self.alpha == 0:
            return 0 * _full_precision(student).square().sum()
        if teacher is None:
            raise ValueError(f'α {self.alpha:g} weighs the distillation of logits, and the teacher gave none')
        if student.shape != teacher.shape:
            raise ValueError(
                f'logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; '
                'logit distillation needs the same classes'
            )
        student, teacher = _full_precision(student), _full_precision(teacher)
        if self.distillation_type == 'soft':
            return soft_distillation_loss(student, teacher, self.tau)
        return hard_distillation_loss(student, teacher)

    def _relation_terms(self, generator) -> dict[str, _Term]:
        """One row per relation term, by its key."""
        over_ranks = self.relations == 'global' and dist.is_initialized()
        W, K, dtype = dist.get_world_size() if over_ranks else 1, self.K, self.relation_dtype
        sample = partial(sample_loss, over_ranks=over_ranks, dtype=dtype)
        patch = partial(patch_loss, dtype=dtype)
        random = partial(random_loss, K=K, generator=generator, over_ranks=over_ranks, dtype=dtype)
        return {
            'mf_sample': _Term(self.w_sample, sample, lambda B, N: W * B),
            'mf_patch': _Term(self.w_patch, patch, lambda B, N: N),
            'mf_rand': _Term(self.w_rand, random, lambda B, N: min(K, W * B * N)),
            'mf_full': _Term(self.w_full, partial(full_loss, over_ranks=over_ranks), lambda B, N: W * B * N),
        }

    def _relate(self, student: Sequence, teacher: Sequence, generator, zero: Tensor) -> dict[str, Tensor]:
        if len(student) != len(teacher):
            raise ValueError(f'layers differ: {len(student)} of the student, {len(teacher)} of the teacher')
        losses = {}
        for name, term in self._relation_terms(generator).items():
            weight = self.beta * term.weight
            # A relation of weight 0 is not computed: no head or block depends on it alone.
            losses[name] = weight * self._over_pairs(term, student, teacher) if weight and student else zero
        return losses

    def _over_pairs(self, term: _Term, student: Sequence, teacher: Sequence) -> Tensor:
        values = [term.distance(s, t) for s, t in zip(student, teacher, strict=True)]
        if self.relation_scale == 'mean':
            return torch.stack(values).mean()
        entries = [term.tokens(*s.shape[:2]) ** 2 for s in student]
        return torch.stack([count * value for count, value in zip(entries, values, strict=True)]).sum()
