"""The method: relations between patch tokens, logit distillation, and their weighted sum.

Fine-grained manifold distillation (Hao et al., NeurIPS 2022, https://arxiv.org/abs/2107.01378) asks the student's
patch tokens to stand to each other as the teacher's do. The relation map of a set of tokens X is X Xᵀ after every
token is L2-normalised: a table of cosine similarities. It has no width, so teacher and student need no projector.

Letters: B images, N patch tokens per image, D channels (D_s student, D_t teacher), L layer pairs, K sampled tokens,
C classes, M tokens of any set.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTILLATION_TYPES = ('none', 'soft', 'hard')


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


def _map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two relation maps: (…, M, D_s) and (…, M, D_t) → scalar."""
    # Most differences are below 1e-2: their squares vanish in float16 and lose three digits in bfloat16.
    with torch.autocast(student.device.type, enabled=False):
        return (relation_map(student) - relation_map(teacher)).square().mean()


def sample_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations across images, one B×B map per patch position (the paper's inter-image term).

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t).

    Returns:
        Mean of squared differences over the N maps, a scalar; the paper writes a Frobenius sum divided by N.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    return _map_distance(student.transpose(0, 1), teacher.transpose(0, 1))


def patch_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations inside an image, one N×N map per image (the paper's intra-image term).

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t).

    Returns:
        Mean of squared differences over the B maps, a scalar; the paper writes a Frobenius sum divided by B.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    return _map_distance(student, teacher)


def random_loss(student: Tensor, teacher: Tensor, K: int, generator: torch.Generator | None = None) -> Tensor:
    """Relations of min(K, B·N) tokens drawn without replacement from the batch (the paper's random term).

    Args:
        student: tokens (B, N, D_s).
        teacher: tokens (B, N, D_t), sampled at the same places.
        K: number of tokens to draw.
        generator: source of the draw, best on the tokens' device; torch's global one if None.

    Returns:
        Mean of squared differences of the two K×K maps, a scalar.

    Raises:
        ValueError: B or N differ.
    """
    _check_pair(student, teacher)
    total = student.shape[0] * student.shape[1]
    # Drawn where the generator lives: on the tokens' device nothing has to be copied.
    device = student.device if generator is None else generator.device
    chosen = torch.randperm(total, generator=generator, device=device)[:K].to(student.device)
    return _map_distance(student.flatten(0, 1)[chosen], teacher.flatten(0, 1)[chosen])


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


def _mean_over_pairs(term: Callable[[Tensor, Tensor], Tensor], student: Sequence, teacher: Sequence) -> Tensor:
    # The release takes the mean over layer pairs; the paper writes a sum.
    return torch.stack([term(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


class ManifoldDistillationLoss(nn.Module):
    """(1−α)·CE + α·KD + β·(w_sample·sample + w_patch·patch + w_rand·random), term by term.

    The terms are the release's means, and its weights (0.1, 4, 0.2) belong to them. With `distillation_type`
    'none' there is no teacher: `base` is the plain CE and every other term 0.

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
    ) -> None:
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise ValueError(f'distillation_type must be one of {DISTILLATION_TYPES}, not {distillation_type!r}')
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

    def forward(self, student_out, teacher_out, targets: Tensor, generator=None) -> dict[str, Tensor]:
        """Weighted scalars by name; the training loss is their sum.

        Args:
            student_out: (logits (B, C), kd_logits (B, C), tokens: L of (B, N, D_s)).
            teacher_out: (logits (B, C), …, tokens: L of (B, N, D_t)); not read with distillation type 'none'.
            targets: classes (B,) or soft labels (B, C), as `base_criterion` takes them.
            generator: source of the random tokens, advanced by one draw per layer pair.

        Returns:
            `base`, `dist`, `mf_sample`, `mf_patch`, `mf_rand`; an absent term is 0.

        Raises:
            ValueError: the two sides differ in classes, layers, images or patch tokens.
        """
        logits, kd_logits, student_tokens = student_out
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

    def _distill(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f'logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; '
                'logit distillation needs the same classes'
            )
        student, teacher = _full_precision(student), _full_precision(teacher)
        if self.distillation_type == 'soft':
            return soft_distillation_loss(student, teacher, self.tau)
        return hard_distillation_loss(student, teacher)

    def _relation_terms(self, generator) -> dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]]:
        """One row per relation term: its key, its weight, its function of two token tensors."""
        return {
            'mf_sample': (self.w_sample, sample_loss),
            'mf_patch': (self.w_patch, patch_loss),
            'mf_rand': (self.w_rand, partial(random_loss, K=self.K, generator=generator)),
        }

    def _relate(self, student: Sequence, teacher: Sequence, generator, zero: Tensor) -> dict[str, Tensor]:
        if len(student) != len(teacher):
            raise ValueError(f'layers differ: {len(student)} of the student, {len(teacher)} of the teacher')
        losses = {}
        for name, (weight, term) in self._relation_terms(generator).items():
            weight *= self.beta
            # A relation of weight 0 is not computed: no head or block depends on it alone.
            losses[name] = weight * _mean_over_pairs(term, student, teacher) if weight and student else zero
        return losses
