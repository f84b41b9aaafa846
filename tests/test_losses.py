"""The relation terms against loops in plain Python, logit distillation, and the criterion that adds them up."""

import math
import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toys
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    ManifoldDistillationLoss,
    full_loss,
    hard_distillation_loss,
    patch_loss,
    plain_full_loss,
    plain_map_distance,
    random_loss,
    sample_loss,
    soft_distillation_loss,
)

B, N, D_S, D_T, C = 3, 4, 6, 9, 5
KEYS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']
PLACES = list(product(range(B), range(N)))


def tokens(width, dtype=torch.float64):
    return torch.randn(B, N, width, dtype=dtype)


def draw_loss(student, teacher, K=7, dtype=torch.float32):
    """The random term as a function of the tokens alone: every call draws the same places."""
    return random_loss(student, teacher, K, torch.Generator().manual_seed(3), dtype=dtype)


TERMS = {'sample': sample_loss, 'patch': patch_loss, 'random': draw_loss, 'full': full_loss}
each_term = pytest.mark.parametrize('term', TERMS.values(), ids=TERMS)


def value_and_gradient(term, student, teacher):
    student = student.clone().requires_grad_()
    value = term(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def drawn_tokens(gradient):
    """The places that the random term drew: only their tokens have a gradient."""
    return [place for place in PLACES if gradient[place].abs().sum() > 0]


# For each term the sets of places (image, position). Each set gives one relation map.
SETS = {
    'sample': [[(b, n) for b in range(B)] for n in range(N)],
    'patch': [[(b, n) for n in range(N)] for b in range(B)],
    'full': [PLACES],
}


def oracle(student, teacher, sets):
    """Mean squared difference of relation maps and its gradient, by loops over Python floats and the chain rule."""

    def unit(token):
        norm = math.sqrt(sum(x * x for x in token))
        return [x / norm for x in token], norm

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    student, teacher = student.tolist(), teacher.tolist()
    count = sum(len(places) ** 2 for places in sets)
    value, gradient = 0.0, torch.zeros(B, N, len(student[0][0]), dtype=torch.float64)
    for places in sets:
        s = [unit(student[b][n]) for b, n in places]
        t = [unit(teacher[b][n]) for b, n in places]
        for i, (b, n) in enumerate(places):
            # d value / d u_i of the unit token u_i, which is in row i and in column i of its map
            grad_unit = [0.0] * len(s[i][0])
            for j in range(len(places)):
                difference = dot(s[i][0], s[j][0]) - dot(t[i][0], t[j][0])
                value += difference**2 / count
                grad_unit = [p + 4 * difference / count * x for p, x in zip(grad_unit, s[j][0], strict=True)]
            u, norm = s[i]
            along = dot(grad_unit, u)  # the length has no effect, so the component along the token is removed
            for d, (p, x) in enumerate(zip(grad_unit, u, strict=True)):
                gradient[b, n, d] += (p - along * x) / norm
    return value, gradient


# Relation terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TERMS)
def test_terms_equal_plain_loops_in_float64(name):
    student, teacher = tokens(D_S), tokens(D_T)
    value, gradient = value_and_gradient(TERMS[name], student, teacher)
    expected, expected_gradient = oracle(student, teacher, SETS.get(name) or [drawn_tokens(gradient)])
    assert abs(value.item() - expected) <= 1e-10
    assert (gradient - expected_gradient).abs().max() <= 1e-10
    assert torch.autograd.gradcheck(lambda s: TERMS[name](s, teacher), student.requires_grad_())


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('name', TERMS)
def test_terms_are_close_to_plain_loops_in_float32(name, seed):
    torch.manual_seed(seed)
    student, teacher = tokens(D_S, torch.float32), tokens(D_T, torch.float32)
    value, gradient = value_and_gradient(TERMS[name], student, teacher)
    assert value.dtype == gradient.dtype == torch.float32
    expected, expected_gradient = oracle(student.double(), teacher.double(), SETS.get(name) or [drawn_tokens(gradient)])
    assert abs(value.item() - expected) <= 1e-6 * expected
    assert (gradient - expected_gradient).norm() <= 5e-6 * expected_gradient.norm()


def near(share, count=150, dtype=torch.float32):
    """Teacher's tokens of 6 images, and student's tokens at a relative distance of `share` from them."""
    teacher = torch.randn(6, count, 24, dtype=torch.float64)
    return (teacher + share * torch.randn_like(teacher)).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize('share', [1.0, 0.1, 0.01])
@pytest.mark.parametrize('elements', [1, 20_000, 50_000, 1 << 22])
def test_patch_and_sample_are_close_to_the_definition(share, elements, monkeypatch):
    monkeypatch.setattr(losses, 'CPU_CHUNK_ELEMENTS', elements)  # chunks of several sizes, also a smaller last one
    student, teacher = near(share)
    for term, transposed in ((patch_loss, False), (sample_loss, True)):
        pair = [x.double().transpose(0, 1) if transposed else x.double() for x in (student, teacher)]
        expected, expected_gradient = value_and_gradient(plain_map_distance, *pair)
        expected_gradient = expected_gradient.transpose(0, 1) if transposed else expected_gradient
        value, gradient = value_and_gradient(term, student, teacher)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6 / share)
        assert (gradient.double() - expected_gradient).norm() <= 2e-6 / share * expected_gradient.norm()


def test_bfloat16_products_are_close_to_float32():
    student, teacher = near(0.3)
    for term in (patch_loss, sample_loss, partial(draw_loss, K=300)):
        exact, exact_gradient = value_and_gradient(term, student, teacher)
        value, gradient = value_and_gradient(partial(term, dtype=torch.bfloat16), student, teacher)
        assert value != exact  # the flag has an effect
        assert value.item() == pytest.approx(exact.item(), rel=2e-3)
        assert (gradient - exact_gradient).norm() <= 1e-2 * exact_gradient.norm()
        assert gradient.dtype == torch.float32


def test_patch_term_keeps_no_map_for_backward():
    student, teacher = near(0.3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        patch_loss(student.requires_grad_(), teacher)
        assert kept == [student.numel()]
        kept.clear()
        plain_map_distance(student, teacher)
    assert max(kept) == 6 * 150 * 150  # the definition keeps maps


@each_term
def test_terms_of_equal_tokens_are_zero(term):
    student = tokens(D_S)
    value, gradient = value_and_gradient(term, student, student)
    assert value == 0
    assert gradient.abs().max() <= 1e-17


@each_term
def test_terms_ignore_rotations_and_token_lengths(term):
    student, teacher = tokens(D_S), tokens(D_T)
    expected = term(student, teacher)
    rotation = torch.linalg.qr(torch.randn(D_S, D_S, dtype=torch.float64)).Q
    factors = torch.rand(B, N, 1, dtype=torch.float64) * 100 + 0.01
    assert term(student @ rotation, teacher).item() == pytest.approx(expected.item(), abs=1e-12)
    assert term(student * factors, teacher).item() == pytest.approx(expected.item(), abs=1e-12)
    assert term(student, teacher * factors).item() == pytest.approx(expected.item(), abs=1e-12)


@each_term
def test_terms_depend_on_channel_scales(term):
    student, teacher = tokens(D_S), tokens(D_T)
    factors = torch.arange(1, D_S + 1, dtype=torch.float64)
    assert abs(term(student * factors, teacher) - term(student, teacher)) > 1e-3


@each_term
def test_zero_tokens_give_finite_gradients(term):
    student, teacher = tokens(D_S, torch.float32), tokens(D_T, torch.float32)
    student[0], teacher[:, 1] = 0, 0
    value, gradient = value_and_gradient(term, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@each_term
@pytest.mark.parametrize(
    ('shape', 'words'),
    [
        ((B, N + 1, D_T), rf'\({B}, {N}\) for the student, \({B}, {N + 1}\) for the teacher'),
        # broadcasting would accept these shapes without an error
        ((B, 1, D_T), rf'\({B}, {N}\) for the student, \({B}, 1\) for the teacher'),
        ((1, N, D_T), rf'\({B}, {N}\) for the student, \(1, {N}\) for the teacher'),
        # the same number of tokens in total: the random term would accept it without the check
        ((N, B, D_T), rf'\({B}, {N}\) for the student, \({N}, {B}\) for the teacher'),
        ((N, D_T), rf'student \({B}, {N}, {D_S}\), teacher \({N}, {D_T}\)'),
        ((B, D_T, 2, 2), rf'student \({B}, {N}, {D_S}\), teacher \({B}, {D_T}, 2, 2\)'),
    ],
)
def test_mismatched_tokens_raise(term, shape, words):
    with pytest.raises(ValueError, match=words):
        term(tokens(D_S), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@each_term
def test_terms_under_autocast_are_float32(term, dtype):
    # A student close to its teacher, as late in training: here half precision would lose the differences.
    teacher = tokens(16, torch.float32)
    student = (teacher + 0.02 * tokens(16, torch.float32)).requires_grad_()
    expected = term(student, teacher)
    with torch.autocast('cpu', dtype=dtype):
        assert (student @ student.mT).dtype == dtype, 'autocast is not active'
        value = term(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@each_term
def test_terms_are_float32_or_better(term, dtype, expected):
    student, teacher = tokens(D_S).to(dtype), tokens(D_T).to(dtype)
    value = term(student, teacher)
    assert value.dtype == expected
    assert value.item() == pytest.approx(term(student.double(), teacher.double()).item(), rel=1e-6)


# The full term --------------------------------------------------------------------------------------------------------


def late(width, close):
    """Tokens as late in training. The student's are close to the teacher's except for a rotation of the channels."""
    teacher = torch.randn(B, N, width) + 2 * torch.randn(width)
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    return (teacher + close * torch.randn(B, N, width)) @ rotation, teacher


# None: student and teacher are unrelated, as at the start of training. A smaller number: they are closer.
@pytest.mark.parametrize('close', [None, 0.1, 0.01, 0.001])
@pytest.mark.parametrize('chunk', [5, 4096])
def test_full_term_in_float32_is_close_to_float64(close, chunk, monkeypatch):
    monkeypatch.setattr(losses, 'CHUNK', chunk)
    student, teacher = late(16, close) if close else (torch.randn(B, N, 8), torch.randn(B, N, 16))
    value, gradient = value_and_gradient(full_loss, student, teacher)
    expected, expected_gradient = value_and_gradient(plain_full_loss, student.double(), teacher.double())
    assert value.dtype == gradient.dtype == torch.float32
    assert abs(value.item() - expected) <= 1e-6 * expected
    assert (gradient - expected_gradient).norm() <= 5e-6 * expected_gradient.norm()


def full_loss_by_identity(student, teacher):
    """The trace identity with autograd's gradient, the reference for sizes at which the maps do not fit in memory."""
    S, T = F.normalize(student.flatten(0, 1), dim=-1), F.normalize(teacher.flatten(0, 1), dim=-1)
    norms = [(x.T @ y).square().sum() for x, y in ((S, S), (S, T), (T, T))]
    return (norms[0] - 2 * norms[1] + norms[2]) / len(S) ** 2


def test_full_loss_by_identity_equals_plain_loops():
    student, teacher = tokens(D_S), tokens(D_T)
    expected = oracle(student, teacher, [PLACES])[0]
    assert full_loss_by_identity(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('D_s', 'D_t', 'close'), [(192, 384, None), (384, 384, 0.1), (384, 384, 1e-2), (384, 384, 1e-3)]
)
def test_full_term_of_50176_tokens_is_close_to_float64(D_s, D_t, close):
    teacher = torch.randn(256, 196, D_t) + 2 * torch.randn(D_t)
    student = torch.randn(256, 196, D_s) + torch.randn(D_s)
    if close:
        rotation = torch.linalg.qr(torch.randn(D_t, D_t)).Q
        student = (teacher + close * torch.randn(256, 196, D_t)) @ rotation
    value, gradient = value_and_gradient(full_loss, student, teacher)
    expected, expected_gradient = value_and_gradient(full_loss_by_identity, student.double(), teacher.double())
    expected = expected.item()
    errors = abs(value.item() - expected) / expected, ((gradient - expected_gradient).norm() / expected_gradient.norm())
    print('relative error of the value {:.1e}, of its gradient {:.1e}'.format(*errors))
    assert errors[0] <= 1e-6
    assert errors[1] <= 5e-6


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_full_term_is_never_negative(dtype):
    found = []
    for seed in range(50):
        torch.manual_seed(seed)
        teacher = tokens(16, dtype)
        rotation = torch.linalg.qr(torch.randn(16, 16, dtype=dtype)).Q
        found.append(full_loss(teacher @ rotation, teacher).item())
    assert min(found) >= 0
    assert max(found) <= 1e-13


def test_full_term_makes_no_map_and_keeps_only_its_gradient():
    student, teacher = torch.randn(8, 64, 4, requires_grad=True), torch.randn(8, 64, 4)
    kept, made = [], []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x), Sizes():
        full_loss(student, teacher).backward()
    assert kept == [student.numel()]
    assert max(made) < (8 * 64) ** 2 / 16  # much smaller than a map


def test_float16_gradients_are_rounded_after_scaling():
    student, teacher = (torch.randn(64, 64, 8).half() for _ in range(2))
    student.requires_grad_()
    scale = 65536.0
    (found,) = torch.autograd.grad(full_loss(student, teacher) * scale, student)
    expected = value_and_gradient(full_loss, student.detach().double(), teacher.double())[1] * scale
    assert found.dtype == torch.float16
    assert (found.double() - expected).norm() <= 1e-3 * expected.norm()
    assert expected.abs().max() / scale < torch.finfo(torch.float16).tiny  # without the scale they would lose digits


@pytest.mark.parametrize('images_at_once', [1, 2, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_patch_term_of_many_tokens_uses_channel_products(images_at_once, dtype, monkeypatch):
    monkeypatch.setattr(losses, 'CHUNK', 60 * images_at_once)
    student, teacher = torch.randn(5, 60, 6).to(dtype), torch.randn(5, 60, 8).to(dtype)
    made = []
    monkeypatch.setattr(losses, 'map_distance', lambda *args: made.append(args))
    value, gradient = value_and_gradient(patch_loss, student, teacher)
    monkeypatch.undo()
    assert not made
    expected, expected_gradient = value_and_gradient(plain_map_distance, student.double(), teacher.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert value.item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-6))
    assert gradient.dtype == dtype
    assert (gradient.double() - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    assert patch_loss(teacher, teacher).item() >= 0


# The draw of the random term ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('K', [B * N, B * N + 1, 192])
def test_random_term_of_all_tokens_equals_the_full_term(K):
    student, teacher = tokens(D_S), tokens(D_T)
    expected, expected_gradient = oracle(student, teacher, [PLACES])
    value, gradient = value_and_gradient(partial(random_loss, K=K), student, teacher)
    assert abs(value.item() - expected) <= 1e-10
    assert (gradient - expected_gradient).abs().max() <= 1e-10


@pytest.mark.parametrize('K', [2, 5, B * N - 1, B * N, 50])
def test_random_places_are_distinct_and_shared_by_both_sides(K):
    student, teacher = tokens(D_S), tokens(D_T)

    def value(teacher):
        return random_loss(student, teacher, K, torch.Generator().manual_seed(0)).item()

    drawn = drawn_tokens(value_and_gradient(lambda s, t: random_loss(s, t, K, torch.Generator().manual_seed(0)),
                                            student, teacher)[1])  # fmt: skip
    of_teacher = []
    for place in PLACES:  # the value depends on the drawn places only
        other = teacher.clone()
        other[place] = -other[place]
        of_teacher += [place] if value(other) != value(teacher) else []
    assert drawn == of_teacher
    assert len(drawn) == min(K, B * N)


def test_generator_determines_the_random_tokens():
    student, teacher = tokens(D_S), tokens(D_T)
    first, second = (
        [random_loss(student, teacher, 5, torch.Generator().manual_seed(seed)).item() for seed in range(20)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 10  # there are 792 ways to draw 5 of 12


def test_random_term_with_a_generator_leaves_the_global_one():
    student, teacher, before = tokens(D_S), tokens(D_T), torch.get_rng_state()
    random_loss(student, teacher, 5, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    random_loss(student, teacher, 5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_each_layer_pair_draws_new_tokens():
    student = [tokens(D_S).requires_grad_() for _ in range(4)]
    teacher = [tokens(D_T) for _ in range(4)]
    criterion = ManifoldDistillationLoss(nn.CrossEntropyLoss(), 'soft', w_sample=0, w_patch=0, K=5)
    value = forward(criterion, student, teacher, torch.Generator().manual_seed(0))['mf_rand']
    draws = [tuple(drawn_tokens(gradient)) for gradient in torch.autograd.grad(value, student)]
    assert len(set(draws)) > 1
    again = forward(criterion, student, teacher, torch.Generator().manual_seed(0))['mf_rand']
    assert again == value


# Logit distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tau', [0.5, 1.0, 3.0])
def test_soft_distillation_is_tau_squared_kl_per_image(tau):
    student, teacher = torch.randn(2, B, C, dtype=torch.float64) * 3

    def probabilities(logits):
        powers = np.exp(logits.numpy() / tau)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = probabilities(teacher), probabilities(student)
    expected = tau**2 * (p * np.log(p / q)).sum() / B
    assert soft_distillation_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-10)


def test_hard_distillation_is_cross_entropy_with_the_teachers_best_class():
    student, teacher = torch.randn(2, B, C, dtype=torch.float64)
    x, best = student.numpy(), teacher.numpy().argmax(axis=1)
    expected = np.mean([math.log(np.exp(row).sum()) - row[k] for row, k in zip(x, best, strict=True)])
    assert hard_distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def naive_softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def naive_lskd(student: np.ndarray, teacher: np.ndarray, targets: list[int], tau: float) -> float:
    def probabilities(row):
        mean = sum(row) / C
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / (C - 1))
        return naive_softmax([(z - mean) / deviation / tau for z in row])

    found = 0.0
    for s, t in zip(student, teacher, strict=True):
        found += sum(p * math.log(p / q) for p, q in zip(probabilities(t), probabilities(s), strict=True))
    return tau**2 * found / B


def naive_nkd(student: np.ndarray, teacher: np.ndarray, targets: list[int], tau: float) -> float:
    found = 0.0
    for s, t, k in zip(student, teacher, targets, strict=True):
        found -= naive_softmax(t)[k] * math.log(naive_softmax(s)[k])
        softened = [naive_softmax([z / tau for z in row]) for row in (t, s)]
        for i in range(C):
            if i != k:  # the probabilities of the other classes are divided by their sum
                p, q = (row[i] / (sum(row) - row[k]) for row in softened)
                found -= 1.5 * tau**2 * p * math.log(q)
    return found / B


def numerical_gradient(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


NAIVE_KD = {'lskd': naive_lskd, 'nkd': naive_nkd}


@pytest.mark.parametrize('tau', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('kind', NAIVE_KD)
def test_further_logit_losses_equal_their_formula(kind, tau):
    student, teacher = torch.randn(2, B, C, dtype=torch.float64) * 3
    student.requires_grad_()
    criterion = ManifoldDistillationLoss(nn.CrossEntropyLoss(), kind, alpha=0.5, tau=tau)
    value = criterion((student, student, ()), (teacher, None, ()), TARGETS)['dist']
    (gradient,) = torch.autograd.grad(value, student)

    def formula(x):
        return 0.5 * NAIVE_KD[kind](x, teacher.numpy(), TARGETS.tolist(), tau)

    x = student.detach().numpy()
    assert value.item() == pytest.approx(formula(x), rel=1e-6 if kind == 'lskd' else 1e-12)  # 1e-7 of the deviation
    np.testing.assert_allclose(gradient.numpy(), numerical_gradient(formula, x), rtol=1e-5, atol=1e-7)
    assert abs(gradient.numpy()).max() > 1e-3


def test_nkd_takes_the_largest_soft_label_as_the_target_class():
    student, teacher = torch.randn(2, B, C, dtype=torch.float64)
    soft = torch.tensor([[0, 0.6, 0.4, 0, 0], [0.5, 0, 0.5, 0, 0], [0.02, 0.02, 0.02, 0.02, 0.92]])
    expected = losses.nkd_loss(student, teacher, torch.tensor([1, 0, 4]), 2.0)
    assert losses.nkd_loss(student, teacher, soft, 2.0) == expected
    assert losses.nkd_loss(student, teacher, soft.flip(1), 2.0) != expected


def test_nkd_of_very_different_logits_is_finite():
    student = (100 * torch.eye(C)[:B]).requires_grad_()
    value = losses.nkd_loss(student, -student.detach(), torch.arange(B), 1.0)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_lskd_depends_on_neither_scale_nor_offset_of_the_logits():
    student, teacher = torch.randn(2, B, C, dtype=torch.float64)
    expected = losses.lskd_loss(student, teacher, 2.0).item()
    assert losses.lskd_loss(7 * student - 3, 0.2 * teacher + 5, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.lskd_loss(teacher, 3 * teacher, 2.0).item() == pytest.approx(0, abs=1e-10)
    equal = torch.zeros(B, C, dtype=torch.float64, requires_grad=True)
    losses.lskd_loss(equal, teacher, 2.0).backward()
    assert equal.grad.isfinite().all()


@pytest.mark.usefixtures('few_generated_images')
@pytest.mark.parametrize('mixing', [{}, {'mixup': 0, 'cutmix': 0}], ids=['mixed', 'plain'])
@pytest.mark.parametrize('kind', NAIVE_KD)
def test_further_logit_losses_train_with_and_without_mixing(run, kind, mixing):
    (row,) = run(distillation_type=kind, distillation_tau=2, **mixing)
    toys.assert_sound(row, absent=set())


def test_new_row_of_logit_losses_is_a_distillation_type(monkeypatch):
    row = losses.LogitLoss(lambda s, t, targets, tau: tau * (s - t).square().mean())
    monkeypatch.setitem(losses.LOGIT_LOSSES, 'logits', row)
    monkeypatch.setattr(losses, 'DISTILLATION_TYPES', ('none', *losses.LOGIT_LOSSES))
    found = forward(build('logits', alpha=1, tau=3.0))
    assert found['dist'] == 3 * F.mse_loss(KD_LOGITS, TEACHER_LOGITS)


# The criterion --------------------------------------------------------------------------------------------------------

LOGITS, KD_LOGITS, TEACHER_LOGITS = torch.randn(3, B, C, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([1, 0, 4])


def forward(criterion, student_tokens=(), teacher_tokens=(), generator=None):
    student_out = (LOGITS, KD_LOGITS, tuple(student_tokens))
    return criterion(student_out, (TEACHER_LOGITS, TEACHER_LOGITS, tuple(teacher_tokens)), TARGETS, generator)


def build(kind='soft', **options):
    # With K ≥ B·N the random term uses all tokens, so its value does not depend on the draw.
    return ManifoldDistillationLoss(nn.CrossEntropyLoss(), kind, **{'K': 100, 'w_full': 1, **options})


@pytest.mark.parametrize(('kind', 'tau'), [('soft', 1.0), ('soft', 4.0), ('hard', 1.0)])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_criterion_returns_weighted_means_over_layer_pairs(kind, tau, alpha):
    student, teacher = [tokens(D_S) for _ in range(3)], [tokens(D_T) for _ in range(3)]
    found = forward(
        build(kind, alpha=alpha, tau=tau, beta=0.5, w_sample=0.1, w_patch=4, w_rand=0.2, w_full=0.7), student, teacher
    )
    everywhere = {
        'mf_sample': (0.1, SETS['sample']),
        'mf_patch': (4, SETS['patch']),
        'mf_rand': (0.2, [PLACES]),
        'mf_full': (0.7, [PLACES]),
    }
    kd = {
        'soft': lambda: soft_distillation_loss(KD_LOGITS, TEACHER_LOGITS, tau),
        'hard': lambda: hard_distillation_loss(KD_LOGITS, TEACHER_LOGITS),
    }
    expected = {
        'base': (1 - alpha) * F.cross_entropy(LOGITS, TARGETS).item(),
        'dist': alpha * kd[kind]().item(),
        **{
            key: 0.5 * weight * sum(oracle(s, t, sets)[0] for s, t in zip(student, teacher, strict=True)) / 3
            for key, (weight, sets) in everywhere.items()
        },
    }
    assert list(found) == KEYS
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-10)
    assert sum(found.values()).item() == pytest.approx(sum(expected.values()), rel=1e-10)


@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0])
def test_criterion_without_distillation_is_cross_entropy(alpha):
    criterion = build('none', alpha=alpha)
    found = criterion((LOGITS, KD_LOGITS, (tokens(D_S),)), None, TARGETS)
    assert list(found) == KEYS
    assert found['base'].item() == F.cross_entropy(LOGITS, TARGETS).item()
    assert all(found[key] == 0 for key in KEYS[1:])


def test_alpha_zero_keeps_the_relations():
    found = forward(build(alpha=0), [tokens(D_S)], [tokens(D_T)])
    assert found['dist'] == 0
    assert all(found[key] > 0 for key in KEYS if key != 'dist')


@pytest.mark.parametrize('kind', losses.LOGIT_LOSSES)
def test_relations_without_blocks_are_zero(kind):
    found = forward(build(kind))
    assert list(found) == KEYS
    assert all(found[key] == 0 for key in KEYS[2:])
    assert all(found[key] > 0 for key in KEYS[:2])


@pytest.mark.parametrize('name', ['sample', 'patch', 'rand', 'full'])
def test_term_of_weight_zero_is_not_computed(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('computed')

    monkeypatch.setattr(losses, {'rand': 'random'}.get(name, name) + '_loss', refuse)
    student, teacher = [tokens(D_S)], [tokens(D_T)]
    for criterion in (build(**{f'w_{name}': 0}), build(beta=0)):
        found = forward(criterion, student, teacher)
        assert list(found) == KEYS
        assert found[f'mf_{name}'] == 0
    with pytest.raises(AssertionError, match='computed'):
        forward(build(), student, teacher)


@pytest.mark.parametrize('kind', losses.LOGIT_LOSSES)
@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_both_heads_stay_in_the_graph_at_weight_zero(kind, alpha):
    logits, kd_logits = LOGITS.clone().requires_grad_(), KD_LOGITS.clone().requires_grad_()
    found = build(kind, alpha=alpha)((logits, kd_logits, ()), (TEACHER_LOGITS, TEACHER_LOGITS, ()), TARGETS)
    sum(found.values()).backward()
    assert logits.grad is not None
    assert kd_logits.grad is not None
    assert logits.grad.any() == (alpha == 0)
    assert kd_logits.grad.any() == (alpha == 1)


class MixedCrossEntropy(nn.Module):
    """A base criterion with a matrix product. Autocast would round it; torch's own losses are not affected."""

    def forward(self, logits, targets):
        return F.cross_entropy(logits @ torch.eye(C, dtype=logits.dtype).roll(1, 0), targets)


@pytest.mark.parametrize('kind', losses.DISTILLATION_TYPES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_criterion_ignores_autocast(kind, dtype):
    out = [(torch.randn(B, C).to(dtype), torch.randn(B, C).to(dtype), (tokens(d).to(dtype),)) for d in (D_S, D_T)]
    criterion = ManifoldDistillationLoss(MixedCrossEntropy(), kind, tau=2.0, K=100, w_full=1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = criterion(out[0], None if kind == 'none' else out[1], TARGETS)
    doubled = [(a.double(), b.double(), (t[0].double(),)) for a, b, t in out]
    double = criterion(doubled[0], None if kind == 'none' else doubled[1], TARGETS)
    assert {value.dtype for value in found.values()} == {torch.promote_types(dtype, torch.float32)}
    for key in KEYS:  # an absolute tolerance too: KL and CE are differences of numbers as large as the logits
        assert found[key].item() == pytest.approx(double[key].item(), rel=1e-6, abs=1e-7)


def test_base_criterion_takes_soft_labels():
    soft = torch.rand(B, C, dtype=torch.float64).softmax(dim=1)
    found = build('soft', alpha=0)((LOGITS, KD_LOGITS, ()), (TEACHER_LOGITS, TEACHER_LOGITS, ()), soft)
    expected = -(soft * LOGITS.log_softmax(dim=1)).sum() / B
    assert found['base'].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('kind', losses.LOGIT_LOSSES)
def test_teacher_without_logits_needs_alpha_zero(kind):
    student, teacher = tokens(D_S).requires_grad_(), tokens(D_T)
    logits, kd_logits = (torch.randn(B, C, requires_grad=True) for _ in range(2))
    classes, weightless = torch.zeros(B, dtype=torch.long), build(kind, alpha=0)
    found = weightless((logits, kd_logits, [student]), (None, None, [teacher]), classes)
    assert found['dist'] == 0
    assert found['mf_patch'] == build(kind).beta * build(kind).weights['patch'] * patch_loss(student, teacher)
    sum(found.values()).backward()
    assert torch.equal(kd_logits.grad, torch.zeros(B, C))
    with pytest.raises(ValueError, match=r'α 0\.5 needs the logits of the teacher, which has none'):
        build(kind, alpha=0.5)((logits, kd_logits, [student]), (None, None, [teacher]), classes)


def test_missing_teacher_raises():
    with pytest.raises(ValueError, match="'hard' needs the output of a teacher"):
        build('hard')((LOGITS, KD_LOGITS, ()), None, TARGETS)


@pytest.mark.parametrize('kind', losses.LOGIT_LOSSES)
def test_mismatched_classes_raise(kind):
    with pytest.raises(ValueError, match=rf'student \({B}, {C}\), teacher \({B}, {C + 1}\)'):
        build(kind)((LOGITS, KD_LOGITS, ()), (torch.randn(B, C + 1), None, ()), TARGETS)


@pytest.mark.parametrize(('ours', 'theirs'), [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_mismatched_layers_raise(ours, theirs):
    with pytest.raises(ValueError, match=f'{ours} of the student, {theirs} of the teacher'):
        forward(build(), [tokens(D_S)] * ours, [tokens(D_T)] * theirs)


@pytest.mark.parametrize('K', [0, -1])
def test_random_token_count_must_be_positive(K):
    with pytest.raises(ValueError, match=f'not {K}'):
        build(K=K)


@pytest.mark.parametrize('name', ['distillation_type', 'relations', 'relation_dtype', 'fused'])
def test_unknown_choice_raises(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, not 'medium'"):
        ManifoldDistillationLoss(nn.CrossEntropyLoss(), **{name: ['medium'] if name == 'fused' else 'medium'})


def test_terms_relate_to_the_sums_of_the_paper():
    # Blocks of hierarchical models differ in their numbers of tokens.
    student = [tokens(D_S), tokens(D_S)[:, :2], tokens(D_S)]
    teacher = [tokens(D_T), tokens(D_T)[:, :2], tokens(D_T)]
    options = {'w_sample': 0.1, 'w_patch': 4, 'w_rand': 0.2, 'w_full': 0.7, 'beta': 0.5, 'K': 5}
    found = forward(build(**options), student, teacher, torch.Generator().manual_seed(0))
    generator, pairs = torch.Generator().manual_seed(0), list(zip(student, teacher, strict=True))
    expected = {
        'mf_sample': 0.05 * sum(sample_loss(s, t).item() for s, t in pairs) / 3,
        'mf_patch': 2 * sum(patch_loss(s, t).item() for s, t in pairs) / 3,
        'mf_rand': 0.1 * sum(random_loss(s, t, 5, generator).item() for s, t in pairs) / 3,
        'mf_full': 0.35 * sum(full_loss(s, t).item() for s, t in pairs) / 3,
    }
    assert {key: found[key].item() for key in KEYS[2:]} == pytest.approx(expected, rel=1e-12)
    every_token = forward(build(K=100), student, teacher)
    assert every_token['mf_rand'].item() == pytest.approx(every_token['mf_full'].item(), rel=1e-12)
    # The paper takes the mean over maps of Frobenius sums, which are larger by the number of entries of a map.
    S, T = (F.normalize(x, dim=-1) for x in (student[0], teacher[0]))
    frobenius = (S @ S.mT - T @ T.mT).square().sum(dim=(1, 2)).mean()
    alone = forward(build(w_patch=1), student[:1], teacher[:1])
    assert alone['mf_patch'].item() * S.shape[1] ** 2 == pytest.approx(frobenius.item(), rel=1e-12)


def test_unknown_weight_raises():
    with pytest.raises(TypeError, match=r'^unknown weight w_smaple; known are w_sample, w_patch, w_rand, w_full$'):
        ManifoldDistillationLoss(nn.CrossEntropyLoss(), w_smaple=1.0)


def test_criterion_has_no_state():
    assert build().state_dict() == {}
    assert list(build().parameters()) == []


# Fused terms ----------------------------------------------------------------------------------------------------------

JOINT = ('sample', 'patch', 'rand')
# Tokens of student and teacher: products of float32, split ones with an exact gradient, and split ones.
TOKEN_DTYPES = {
    'float32': (torch.float32, torch.float32),
    'mixed': (torch.float32, torch.bfloat16),
    'bfloat16': (torch.bfloat16, torch.bfloat16),
    'float16': (torch.float16, torch.float16),
}
each_dtype = pytest.mark.parametrize('dtypes', TOKEN_DTYPES.values(), ids=TOKEN_DTYPES)
TINY, RECIPE = (24, 64, 96, 192), (64, 196, 192, 384)


def apart(difference, dtypes, sizes=TINY):
    """Tokens of both sides as in training. The mean squared difference of their patch maps is about `difference`."""
    B, N, D_s, D_t = sizes
    shared = [torch.randn(b, n, D_s, dtype=torch.float64) for b, n in ((1, 1), (1, N), (B, 1), (B, N))]
    latent = sum(share * x for share, x in zip((0.7, 0.5, 0.5, 0.7), shared, strict=True))
    teacher = latent @ torch.linalg.qr(torch.randn(D_t, D_s, dtype=torch.float64)).Q.T
    noise, scale = torch.randn_like(latent), 0.1
    for _ in range(5):
        scale *= (difference / plain_map_distance(latent[:8] + scale * noise[:8], teacher[:8]).item()) ** 0.5
    # Rounded on both sides, so that no dtype asks for more digits than the teacher has.
    return (latent + scale * noise).to(dtypes[1]).to(dtypes[0]), teacher.to(dtypes[1])


def fused_term(name, dtype=torch.float32):
    """A term of the fused path as a function of the tokens alone."""
    options = losses.RelationOptions(192, torch.Generator(), dtype=dtype, fused=('relations',))

    def term(student, teacher):
        options.generator.manual_seed(3)
        return losses.relate_jointly([student], [teacher], [name], options)[0][name]

    return term


def exact_term(name):
    """The same by the definition in float64."""

    def term(student, teacher):
        chosen = losses.draw_tokens([student.shape[0] * student.shape[1]], 192, torch.Generator().manual_seed(3), 'cpu')
        return plain_map_distance(*(losses._sets_of(name, x.double(), *chosen) for x in (student, teacher)))

    return term


def check_fused(term, exact, student, teacher, value_limit, gradient_limit):
    value, gradient = value_and_gradient(term, student, teacher)
    expected, expected_gradient = value_and_gradient(exact, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert abs(value.double() - expected) <= value_limit * expected
    if student.dtype != torch.float32:
        gradient_limit += 3e-3  # it is rounded to the dtype of the tokens
    if student.dtype == torch.float16:  # without a gradient scaler it underflows
        (gradient,) = torch.autograd.grad(1e4 * term(x := student.clone().requires_grad_(), teacher), x)
        gradient = gradient.double() / 1e4
    assert (gradient - expected_gradient).norm() <= gradient_limit * expected_gradient.norm()


@each_dtype
@pytest.mark.parametrize('difference', [1e-3, 1e-5])
@pytest.mark.parametrize('name', JOINT)
def test_fused_terms_are_close_to_float64(name, difference, dtypes):
    # The error of split products is smaller at the recipe's sizes: more entries and channels cancel more of it.
    split = (1e-5, 1e-3) if difference == 1e-3 else (2e-5, 1e-3)
    limits = (2e-6, 1e-4) if dtypes == (torch.float32, torch.float32) else split
    check_fused(fused_term(name), exact_term(name), *apart(difference, dtypes), *limits)


@each_dtype
@pytest.mark.parametrize(('difference', 'limits'), [(1e-3, (1e-5, 1e-4)), (1e-5, (1e-3, 1e-3))])
def test_fused_full_term_is_close_to_float64(difference, limits, dtypes, monkeypatch):
    monkeypatch.setattr(losses, 'CHUNK', 300)
    check_fused(partial(full_loss, fused=True), full_loss, *apart(difference, dtypes), *limits)


@pytest.mark.more
@pytest.mark.parametrize('difference', [1e-3, 1e-5])
def test_fused_terms_of_the_recipe_are_close_to_float64(difference):
    student, teacher = apart(difference, TOKEN_DTYPES['mixed'], RECIPE)
    for name in JOINT:
        check_fused(fused_term(name), exact_term(name), student, teacher, 1e-5, 1e-3)
    limits = (1e-5, 1e-4) if difference == 1e-3 else (1e-3, 1e-3)
    check_fused(partial(full_loss, fused=True), full_loss, student, teacher, *limits)


@pytest.mark.parametrize('name', JOINT)
def test_relation_dtype_is_that_of_fused_products(name):
    student, teacher = apart(1e-3, TOKEN_DTYPES['float32'])
    with pytest.raises(AssertionError):
        check_fused(fused_term(name, torch.bfloat16), exact_term(name), student, teacher, 1e-5, 1e-3)
    check_fused(fused_term(name, torch.bfloat16), exact_term(name), student, teacher, 5e-3, 3e-2)


def terms_and_gradients(criterion, student, teacher, factors):
    """Each term, its gradient, and the gradient of their sum with these factors."""
    student = [x.clone().requires_grad_() for x in student]
    found = forward(criterion, student, teacher)
    total = sum(factor * found[f'mf_{name}'] for factor, name in zip(factors, (*JOINT, 'full'), strict=True))
    goals = [found[f'mf_{name}'] for name in JOINT] + [total]
    return found, [torch.autograd.grad(goal, student, retain_graph=True) for goal in goals]


@pytest.mark.parametrize('elements', [1, 1 << 21])
def test_fused_terms_and_their_gradients_are_those_of_the_default(elements, monkeypatch):
    monkeypatch.setattr(losses, 'CPU_CHUNK_ELEMENTS', elements)
    # Blocks of hierarchical models differ in their numbers of tokens.
    student = [torch.randn(B, n, D_S + 1)[..., 1:] for n in (N, 2, N)]
    teacher = [torch.randn(B, n, D_T) for n in (N, 2, N)]
    options = {'w_sample': 0.1, 'w_patch': 4, 'w_rand': 0.2, 'w_full': 0.7, 'beta': 0.5}
    expected, expected_gradients = terms_and_gradients(build(**options), student, teacher, (1, 2, 3, 4))
    made = []
    relate = losses._relate
    monkeypatch.setattr(losses, '_relate', lambda *args: made.append(args[3]) or relate(*args))
    criterion = build(fused=losses.FUSED_PARTS, **options)
    found, gradients = terms_and_gradients(criterion, student, teacher, (1, 2, 3, 4))
    assert made == [JOINT] * 3
    assert list(found) == KEYS
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-6
    )
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize(
    ('options', 'dtype', 'fused'),
    [
        ({}, torch.float32, JOINT),
        ({'w_patch': 0}, torch.float32, ('sample', 'rand')),
        ({'w_sample': 0, 'w_rand': 0}, torch.float32, ('patch',)),
        ({'beta': 0}, torch.float32, None),
        ({}, torch.float64, None),
    ],
)
def test_terms_that_are_not_used_or_float64_are_not_fused(options, dtype, fused, monkeypatch):
    made, relate = [], losses._relate
    monkeypatch.setattr(losses, '_relate', lambda *args: made.append(args[3]) or relate(*args))
    student, teacher = [tokens(D_S, dtype)], [tokens(D_T, dtype)]
    found = forward(build(fused=losses.FUSED_PARTS, **options), student, teacher)
    expected = forward(build(**options), student, teacher)
    assert made == ([fused] if fused else [])
    for name in KEYS:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_fused_patch_term_of_many_tokens_uses_channel_products(monkeypatch):
    student, teacher = torch.randn(5, 60, 6), torch.randn(5, 60, 8)
    monkeypatch.setattr(losses, '_relate', lambda *args: pytest.fail('fused'))
    options = {'w_sample': 0, 'w_rand': 0, 'w_full': 0}
    found, expected = (forward(build(**options, **fused), [student], [teacher])['mf_patch']
                       for fused in ({'fused': ['relations']}, {}))  # fmt: skip
    assert found == expected


def test_fused_terms_across_ranks_are_not_fused(tmp_path, monkeypatch):
    made, relate = [], losses._relate
    monkeypatch.setattr(losses, '_relate', lambda *args: made.append(args[3]) or relate(*args))
    student, teacher = [tokens(D_S, torch.float32)], [tokens(D_T, torch.float32)]
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        criterion = build(fused=losses.FUSED_PARTS, relations='global')
        found = forward(criterion, student, teacher, torch.Generator())
    finally:
        dist.destroy_process_group()
    assert made == [('patch',)]
    expected = forward(build(), student, teacher)
    assert [found[name].item() for name in KEYS] == pytest.approx([expected[name].item() for name in KEYS], rel=1e-5)


@each_dtype
def test_fused_terms_of_not_finite_tokens_are_not_finite(dtypes):
    student, teacher = apart(1e-3, dtypes)
    # The NaN of a GPU: its last bits are ones, so rounding carries over into the sign.
    bad = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    student[:, 3, 5] = bad.to(dtypes[0])
    for term in (*map(fused_term, JOINT[:2]), partial(full_loss, fused=True)):
        value, gradient = value_and_gradient(term, student, teacher)
        assert value.isnan()
        assert gradient.isnan().any()
    assert losses._product(bad.expand(1, 1, 1), torch.ones(1, 1, 1), 'split').isnan()


@pytest.mark.parametrize('counts', [(12, 12, 12), (12, 5, 30)])
@pytest.mark.parametrize('K', [1, 5, 12, 100])
def test_fused_draw_is_without_replacement_and_by_the_generator(counts, K):
    first, again, other = (
        losses.draw_tokens(counts, K, torch.Generator().manual_seed(seed), torch.device('cpu')) for seed in (0, 0, 1)
    )
    for count, places in zip(counts, first, strict=True):
        assert len(places) == len(set(places.tolist())) == min(K, count)
        assert 0 <= places.min() <= places.max() < count
    assert [x.tolist() for x in first] == [x.tolist() for x in again]
    assert [x.tolist() for x in first] != [x.tolist() for x in other]
    assert K == 1 or len({tuple(x.tolist()) for x in first}) == len(counts)


def test_fused_draw_takes_all_places_equally_often():
    drawn = torch.cat(list(losses.draw_tokens([10] * 4000, 3, torch.Generator().manual_seed(0), torch.device('cpu'))))
    shares = torch.bincount(drawn, minlength=10) / 4000
    assert (shares - 0.3).abs().max() < 0.03  # four standard deviations


@pytest.mark.more
@each_dtype
def test_fused_functions_compile_without_graph_breaks(dtypes, monkeypatch):
    student, teacher = apart(1e-3, dtypes)
    compiled = []

    def compile_for_the_cpu(function, device):
        compiled.append(function.__name__)
        return torch.compile(function, fullgraph=True, dynamic=False, backend='aot_eager')

    terms = [fused_term(name) for name in JOINT] + [partial(full_loss, fused=True)]
    expected = [value_and_gradient(term, student, teacher) for term in terms]
    monkeypatch.setattr(losses, '_fused', compile_for_the_cpu)
    for term, (value, gradient) in zip(terms, expected, strict=True):
        found, found_gradient = value_and_gradient(term, student, teacher)
        assert found.item() == pytest.approx(value.item(), rel=1e-6)
        assert (found_gradient.double() - gradient.double()).norm() <= 4e-3 * gradient.double().norm()
    torch._dynamo.reset()
    assert set(compiled) == {'_relate', '_relate_backward', '_channel_products', '_full_gradient'}


@pytest.mark.usefixtures('few_generated_images')
def test_run_with_fused_terms_matches_the_default(run, tmp_path):
    options = {'K': 1000, 'log_grad_share': True}  # all tokens, so that both draw the same
    (expected,) = run(**options, output_dir=tmp_path / 'default')
    (row,) = run(**options, output_dir=tmp_path / 'fused', fused='relations full')
    for name, value in expected.items():
        if 'loss' in name or 'share' in name:
            assert row[name] == pytest.approx(value, rel=1e-3), name


# Relations across ranks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def rank_results(tmp_path_factory):
    """Results of each rank of two and of three, by (world, rank) and case."""
    folder = tmp_path_factory.mktemp('ranks')
    subprocess.run([sys.executable, ranks.__file__, str(folder)], check=True, timeout=180)
    return {(world, rank): torch.load(folder / f'{world}-{rank}.pt') for world in (2, 3) for rank in range(world)}


@pytest.mark.parametrize('case', ranks.CASES)
@pytest.mark.parametrize('world', [2, 3])
def test_global_relations_equal_one_process_with_all_images(rank_results, world, case):
    alone = ranks.run(case, world, None)
    found = [rank_results[world, rank][case] for rank in range(world)]
    # Gradients at bfloat16 tokens are rounded, and the order of sums differs.
    close = 1e-2 if 'bfloat16' in case else 1e-12 if 'float64' in case else 1e-5
    assert any(alone[f'mf_{term}'] > 1e-3 for term in ranks.TERMS)
    for name, expected in alone.items():
        if 'gradient' in name:  # averaged by DistributedDataParallel
            assert expected.norm() > 1e-3
            assert all((one[name] - expected).norm() <= close * expected.norm() for one in found), name
            continue
        # CE, KD and patch are means over the rank's own images; the other terms are equal on all ranks.
        mean = torch.stack([one[name] for one in found]).mean()
        assert mean.item() == pytest.approx(expected.item(), rel=min(close, 1e-5), abs=1e-9)
        if name in ('mf_sample', 'mf_rand', 'mf_full'):
            assert [one[name].item() for one in found] == pytest.approx([expected.item()] * world, rel=1e-5)


@pytest.mark.parametrize(('ours', 'theirs'), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_terms_over_ranks_accept_two_dtypes(tmp_path, ours, theirs):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        student, teacher = tokens(D_S, ours), tokens(D_T, theirs)
        for term in (sample_loss, full_loss, partial(random_loss, K=5, generator=torch.Generator().manual_seed(0))):
            found, gradient = value_and_gradient(partial(term, over_ranks=True), student, teacher)
            assert gradient.dtype == ours
            if term is sample_loss:
                assert found.item() == pytest.approx(term(student, teacher).item(), rel=1e-5)
    finally:
        dist.destroy_process_group()


def test_global_relations_without_a_generator_raise(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='needs a generator'):
            forward(build(relations='global'), [tokens(D_S)], [tokens(D_T)])
    finally:
        dist.destroy_process_group()
