"""engine.py: one epoch of training, and exact evaluation."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import models
import utils
from engine import TrainConfig, Trainer, evaluate, train_one_epoch
from losses import ManifoldDistillationLoss
from run_dir import TrainingState

CPU = torch.device('cpu')
F32 = torch.float32


# One epoch ------------------------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """The criterion. It records its inputs and results of each step."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.criterion = ManifoldDistillationLoss(
            **{
                'base_criterion': torch.nn.CrossEntropyLoss(),
                'distillation_type': 'soft',
                'K': 5,
                'w_full': 1,
                **options,
            }
        )
        self.steps = []

    def forward(self, student_out, teacher_out, targets, generator):
        clone = torch.Generator().set_state(generator.get_state())
        losses = self.criterion(student_out, teacher_out, targets, generator)
        values = {name: value.item() for name, value in losses.items()}
        order = tuple(torch.randperm(32, generator=clone).tolist())
        self.steps.append(SimpleNamespace(student=student_out, teacher=teacher_out, values=values, order=order))
        return losses


class Noisy(list):
    """Batches that draw random numbers while they load, like augmentation without workers."""

    def __init__(self, batches, noise: int) -> None:
        super().__init__(batches)
        self.noise = noise

    def __iter__(self):
        for batch in super().__iter__():
            torch.rand(self.noise), np.random.rand(self.noise), [random.random() for _ in range(self.noise)]
            yield batch


def batches(steps: int = 3, size: int = 4) -> list:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(10, (size,), generator=generator),
            torch.arange(step * size, (step + 1) * size),
        )
        for step in range(steps)
    ]


@pytest.fixture(scope='module')
def epoch(toy):
    """A function that trains a toy for one epoch. It returns the parts of that run and its `stats`."""

    def run(
        loader=None,
        *,
        family='deit',
        drop_path=0.0,
        lr=0.1,
        criterion=None,
        teacher='toy',
        scaled=False,
        number=0,
        step=0,
        done=0,
        average=None,
        mixup=None,
        every_step=True,
        after_step=lambda: None,
        optimizer=torch.optim.SGD,
        prepare=lambda made: None,
        **config,
    ):
        student = models.tap(toy(family, drop_path_rate=drop_path), [0, -1], 32, two_heads=True)
        if teacher == 'toy':
            teacher = models.freeze(models.tap(toy('cait', embed_dim=48), [0, -1], 32))
        criterion = Recorder() if criterion is None else criterion
        # At this scale no float32 gradient overflows, so no step is skipped.
        scaler = torch.amp.GradScaler('cpu', enabled=scaled, init_scale=64.0)
        ema = None if average is None else SimpleNamespace(update=average)
        state = TrainingState(student.model, optimizer(student.parameters(), lr), None, scaler, ema)
        state.step = step
        trainer = Trainer(student, teacher, criterion, state, TrainConfig(CPU, **config), mixup=mixup)
        trainer.guard.every_step = every_step
        made = SimpleNamespace(
            trainer=trainer,
            student=student,
            teacher=teacher,
            optimizer=state.optimizer,
            scaler=scaler,
            before={name: value.clone() for name, value in student.model.state_dict().items()},
            steps=getattr(criterion, 'steps', []),
        )
        prepare(made)
        made.stats = train_one_epoch(trainer, batches() if loader is None else loader, number, done, after_step)
        return made

    return run


def weights(run) -> dict[str, torch.Tensor]:
    return run.student.model.state_dict()


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


def test_epoch_returns_mean_of_every_term_and_sum(epoch):
    run = epoch(lr=0.25)
    columns = {name: [step.values[name] for step in run.steps] for name in run.steps[0].values}
    expected = {'lr': 0.25, 'loss': sum(np.mean(column) for column in columns.values())}
    expected |= {f'loss_{name}': np.mean(column) for name, column in columns.items()}
    assert list(run.stats) == list(expected)
    assert run.stats == pytest.approx(expected, rel=1e-6)
    assert all(np.ptp(column) > 0 for column in columns.values())


def test_step_follows_the_gradient_of_the_summed_terms(epoch, toy):
    # K is larger than the number of tokens: all of them are used.
    options = {'base_criterion': torch.nn.CrossEntropyLoss(), 'distillation_type': 'soft', 'w_full': 1, 'K': 99}
    run = epoch(batches(2), criterion=Recorder(**options), lr=0.5)
    student = models.tap(toy('deit'), [0, -1], 32)
    for images, targets, _ in batches(2):
        losses = ManifoldDistillationLoss(**options)(student(images), run.teacher(images), targets)
        gradients = torch.autograd.grad(sum(losses.values()), list(student.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    for name, value in student.model.state_dict().items():
        torch.testing.assert_close(weights(run)[name], value)
    assert not any(torch.equal(weights(run)[name], run.before[name]) for name in ('head.weight', 'pos_embed'))


def test_steps_and_images_are_counted(epoch):
    run = epoch(batches(3, size=4), step=7)
    assert (run.trainer.state.step, run.trainer.state.position) == (10, 12)


def test_both_models_see_mixed_images(epoch):
    def mixup(images, targets):
        return torch.zeros_like(images), torch.full((len(images), 10), 0.1)

    criterion = Recorder(base_criterion=SoftTargetCrossEntropy())
    run = epoch(criterion=criterion, mixup=mixup, lr=0.0)
    for step in run.steps:
        for output in (step.student, step.teacher):  # equal images give equal logits
            torch.testing.assert_close(output.logits, output.logits[:1].expand_as(output.logits))
    expected = 0.5 * -F.log_softmax(run.steps[0].student.logits, dim=1).mean()
    assert run.stats['loss_base'] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('scaled', [False, True], ids=['unscaled', 'scaled'])
@pytest.mark.parametrize('clip_grad', [1e-3, None])
def test_gradients_are_clipped_after_unscaling(epoch, scaled, clip_grad):
    run = epoch(batches(1), lr=1.0, clip_grad=clip_grad, scaled=scaled)
    moved = torch.cat([(value - run.before[name]).flatten().double() for name, value in weights(run).items()])
    if clip_grad is None:
        assert moved.norm() > 0.1
    else:
        assert moved.norm().item() == pytest.approx(clip_grad, rel=1e-3)


def test_ema_updates_after_each_step(epoch):
    seen = []
    run = epoch(average=lambda model: seen.append(model.head.bias.detach().clone()))
    assert len(seen) == 3
    steps = [run.before['head.bias'], *seen]
    assert not any(torch.equal(before, after) for before, after in zip(steps, seen, strict=False))
    assert torch.equal(seen[-1], weights(run)['head.bias'])


def test_train_mode_switches_drop_path(epoch):
    without = epoch(drop_path=0.0)
    assert same_weights(epoch(drop_path=0.9, train_mode=False), without)
    assert not same_weights(epoch(drop_path=0.9), without)


RANDOM = {'drop_path': 0.5, 'mixup': Mixup(0.8, 1.0, num_classes=10)}


def soft() -> Recorder:
    return Recorder(base_criterion=SoftTargetCrossEntropy())


def test_same_seed_and_step_give_the_same_bits(epoch):
    runs = [epoch(Noisy(batches(), noise), criterion=soft(), **RANDOM) for noise in (0, 0, 5)]
    assert same_weights(runs[0], runs[1])
    assert same_weights(runs[0], runs[2])
    assert runs[0].stats == runs[1].stats == runs[2].stats


@pytest.mark.parametrize(('other', 'same'), [({'step': 1}, False), ({'seed': 1}, False), ({'number': 1}, True)])
def test_draws_depend_on_seed_and_step_but_not_on_epoch(epoch, other, same):
    one, two = epoch(criterion=soft(), **RANDOM), epoch(criterion=soft(), **RANDOM, **other)
    assert same_weights(one, two) is same


def test_every_step_draws_new_tokens(epoch):
    orders = [step.order for first in (0, 3, 6) for step in epoch(step=first).steps]
    assert len(set(orders)) == len(orders) == 9


class Reads(TorchDispatchMode):
    """Counts the operators that copy a tensor value to Python, which makes the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.nonzero):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts the tensor methods that do so without such an operator."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.count += 1
        return func(*args, **(kwargs or {}))


def fused(parameters, lr: float) -> torch.optim.Optimizer:
    """The optimizer used on CUDA. It can skip an update without asking the host."""
    return torch.optim.AdamW(parameters, lr, fused=True)


def test_host_never_waits_between_log_lines(epoch):
    def waits(steps: int, print_freq: int, **changes) -> int:
        criterion = ManifoldDistillationLoss(SoftTargetCrossEntropy(), 'soft', K=5)
        options = {**RANDOM, 'clip_grad': 1.0, 'criterion': criterion, 'print_freq': print_freq}
        device = {'every_step': False, 'optimizer': fused}
        with Reads() as reads, Copies() as copies:
            epoch(batches(steps), **{**options, **device, 'average': lambda model: None, **changes})
        return reads.count + copies.count

    silent = waits(9, 100)
    assert waits(4, 100) == silent
    # The counter works. Each further log line waits twice: for the guard and for the means. A value read at every
    # step, a guard that syncs at every step and an optimizer that asks the host wait at every step.
    assert waits(9, 4) == silent + 2
    assert waits(9, 100, average=lambda model: model.head.bias[0].item()) == silent + 9
    assert waits(9, 100, every_step=True) >= silent + 7  # the two log lines sync anyway
    assert waits(9, 100, optimizer=torch.optim.SGD) == silent + 9


def test_teacher_never_changes(epoch, toy):
    teacher = models.freeze(models.tap(toy('cait', drop_path_rate=0.5), [0, -1], 32))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = epoch(teacher=teacher)
    assert not any(module.training for module in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(tensor.requires_grad for step in run.steps for tensor in (step.teacher[0], *step.teacher.tokens))
    assert run.student.training


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_both_heads_get_gradients_at_alpha_0_and_1(epoch, alpha):
    run = epoch(batches(2), family='distilled', criterion=Recorder(alpha=alpha))
    assert run.steps[0].student.kd_logits is not run.steps[0].student.logits
    assert [name for name, p in run.student.named_parameters() if p.grad is None] == []


def test_student_trains_without_teacher(epoch):
    run = epoch(criterion=Recorder(distillation_type='none'), teacher=None)
    assert run.stats['loss'] == run.stats['loss_base'] > 0
    assert any(not torch.equal(value, run.before[name]) for name, value in weights(run).items())


@pytest.mark.parametrize('amp_dtype', [torch.bfloat16, torch.float16])
def test_autocast_runs_models_low_and_losses_in_float32(epoch, amp_dtype):
    run = epoch(amp_dtype=amp_dtype, scaled=amp_dtype == torch.float16)
    assert {out.logits.dtype for step in run.steps for out in (step.student, step.teacher)} == {amp_dtype}
    assert {value.dtype for value in weights(run).values()} == {F32}
    exact = epoch()
    assert run.stats == pytest.approx(exact.stats, rel=0.05, abs=1e-3)
    assert run.stats != exact.stats


@pytest.mark.parametrize('print_freq', [1, 100])
def test_non_finite_loss_stops_the_epoch_and_is_named(epoch, toy, print_freq):
    teacher = toy('cait', embed_dim=48)
    with torch.no_grad():
        teacher.head.bias[3] = torch.nan
    teacher = models.freeze(models.tap(teacher, [0, -1], 32))
    words = 'not finite at step 0 of epoch 0 on rank 0: loss_dist, teacher logits; images 0 1 2 3'
    with pytest.raises(FloatingPointError, match=f'^{words}$'):
        epoch(batches(1), teacher=teacher, print_freq=print_freq)


# Shares of the gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('origin', [0, 1])
def test_global_relations_blame_origin_rank(epoch, origin, monkeypatch):
    def prepare(made):
        for module in (made.teacher,):
            module.model.blocks[-1].register_forward_hook(lambda *args: args[2] * torch.nan, prepend=True)

    def two_ranks(mine):
        words, began = mine
        assert began
        assert 'teacher tokens' in words
        other = ('loss_mf_full; images 90 91', False)
        return [mine, other] if origin == 0 else [other, mine]

    monkeypatch.setattr(utils, 'gather_objects', two_ranks)
    with pytest.raises(FloatingPointError) as caught:
        epoch(batches(1), prepare=prepare, global_relations=True)
    assert f'on rank {origin}: ' in str(caught.value)
    assert f'on rank {1 - origin}: ' not in str(caught.value)


@pytest.mark.parametrize('scaled', [False, True])
def test_gradient_shares_match_norms_at_the_block_outputs(epoch, toy, scaled):
    criterion = Recorder(alpha=0.9, w_sample=30, w_patch=50, w_rand=10, w_full=90)
    run = epoch(batches(1), lr=0.0, scaled=scaled, criterion=criterion)
    found = run.trainer.gradient_shares(batches(1)[0])
    # The initial student with a variable added to each block output. The gradient at 0 is the expected one.
    student = models.tap(toy('deit'), [0, -1], 32)
    added = [torch.zeros(4, 17, 32, requires_grad=True) for _ in range(2)]
    for i, extra in zip((0, -1), added, strict=True):
        student.model.blocks[i].register_forward_hook(lambda *args, extra=extra: args[2] + extra, prepend=True)
    images, targets, _ = batches(1)[0]
    generator = torch.Generator()
    utils.seed_step(generator, 0, 1, 0)
    losses = criterion(student(images), run.teacher(images), targets, generator)
    norms = {}
    for name, value in losses.items():
        pulls = torch.autograd.grad(value, added, retain_graph=True)
        norms[name] = torch.cat([pull.flatten() for pull in pulls]).norm().item()
    expected = {name: norm / sum(norms.values()) for name, norm in norms.items()}
    assert list(found) == list(TERMS)
    assert found == pytest.approx(expected, abs=1e-4)
    assert min(expected.values()) > 0.02


def test_gradient_share_grows_with_the_weight(epoch):
    def shares(**options) -> dict[str, float]:
        return epoch(batches(1), lr=0.0, criterion=Recorder(**options)).trainer.gradient_shares(batches(1)[0])

    one, ten, none = shares(w_full=1), shares(w_full=10), shares(w_full=0)
    assert ten['mf_full'] == pytest.approx(10 * one['mf_full'] / (9 * one['mf_full'] + 1), abs=1e-4)
    assert none['mf_full'] == 0
    assert sum(none.values()) == pytest.approx(1)


def test_gradient_shares_change_nothing(epoch):
    def prepare(made) -> None:
        made.student.model.fc_norm = torch.nn.BatchNorm1d(32)

    run = epoch(drop_path=0.5, average=lambda model: None, prepare=prepare)
    run.student.zero_grad()
    before, step = state_of(run), run.trainer.state.step
    assert run.trainer.gradient_shares(batches()[0])
    toys.assert_same(state_of(run), before)
    assert run.trainer.state.step == step
    assert all(p.grad is None for p in run.student.parameters())


@pytest.mark.parametrize('family', ['distilled', 'registers'])
def test_gradient_shares_count_each_block_once(epoch, family):
    run = epoch(batches(1), family=family)
    out = run.student(batches(1)[0][0])
    losses = {'one': out.tokens[0].square().sum(), 'other': out.logits.square().sum(), 'none': torch.zeros(())}
    shares = engine.gradient_shares(losses, out.features * 2, run.scaler)
    assert shares == pytest.approx(engine.gradient_shares(losses, out.features, run.scaler))
    assert shares['none'] == 0
    assert shares['one'] + shares['other'] == pytest.approx(1)


def test_gradient_shares_in_float16_use_the_loss_scale():
    feature = torch.ones(8, 8, dtype=torch.float16, requires_grad=True)
    half, rest = 1e-10 * feature.float().sum(), 3e-10 * feature.float().sum()
    scaler = torch.amp.GradScaler('cpu', init_scale=65536.0)
    shares = engine.gradient_shares({'half': half, 'rest': rest}, [feature], scaler)
    assert shares == pytest.approx({'half': 0.25, 'rest': 0.75}, abs=0.02)


@pytest.mark.parametrize('factor', [1e3, 0.0], ids=['overflow', 'no gradient'])
def test_gradient_shares_are_empty_without_gradient(factor):
    feature = torch.ones(8, 8, dtype=torch.float16, requires_grad=True)
    losses = {'one': factor * feature.float().sum(), 'other': torch.zeros(())}
    assert engine.gradient_shares(losses, [feature], torch.amp.GradScaler('cpu', init_scale=65536.0)) == {}


# What is not finite ---------------------------------------------------------------------------------------------------

TERMS = ('base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full')
GOOD = 2  # number of good steps before the bad one
BAD_VALUES = pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])


class Poisoned(Recorder):
    """Replaces a loss term by a value at some steps."""

    def __init__(self, term: str, value: float, *steps: int, **options) -> None:
        super().__init__(**options)
        self.term, self.value, self.bad = term, value, steps

    def forward(self, *args):
        losses = super().forward(*args)
        if len(self.steps) - 1 in self.bad:
            losses[self.term] = losses[self.term] * 0 + self.value
        return losses


class Average:
    """An exponential moving average of the weights of a timm model."""

    def __init__(self) -> None:
        self.ema = None

    def __call__(self, model) -> None:
        if self.ema is None:
            self.ema = ModelEmaV3(model, decay=0.5)
        self.ema.update(model)


def adamw(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr)


def at_call(number: int, value: float):
    """A hook of a module or a gradient that adds a value at one call."""
    calls = []

    def hook(*args):
        calls.append(None)
        return args[-1] + (value if len(calls) == number + 1 else 0)

    return hook


def state_of(made) -> dict:
    """Parameters and optimizer state, with its step counter."""
    return copy.deepcopy({'model': made.student.model.state_dict(), 'moments': made.optimizer.state_dict()['state']})


@pytest.fixture
def stopped(epoch):
    """A function that trains until a bad step. It returns the parts of the run, the EMA and the message."""

    def run(**options):
        parts, average = [], Average()
        prepare = options.pop('prepare', lambda made: None)
        with pytest.raises(FloatingPointError) as caught:
            epoch(
                **{'optimizer': adamw, 'average': average, 'number': 5, 'done': 0, **options},
                loader=batches(GOOD + 2),
                prepare=lambda made: (parts.append(made), prepare(made)),
            )
        return parts[0], average.ema, str(caught.value)

    return run


@pytest.fixture(scope='module')
def sound(epoch):
    """The state and the EMA after the good steps only."""
    average = Average()
    made = epoch(batches(GOOD), optimizer=adamw, average=average)
    return {'made': state_of(made), 'average': average.ema.module.state_dict()}


@BAD_VALUES
@pytest.mark.parametrize('where', [*TERMS, 'student', 'teacher', 'gradients'])
def test_non_finite_step_changes_nothing_and_is_named(stopped, sound, where, value):
    def prepare(made) -> None:
        if where == 'gradients':
            made.student.model.norm.weight.register_hook(at_call(GOOD, value))
        elif where in ('student', 'teacher'):
            getattr(made, where).model.head.register_forward_hook(at_call(GOOD, value))

    made, average, message = stopped(
        criterion=Poisoned(where, value, GOOD) if where in TERMS else Recorder(), prepare=prepare
    )
    toys.assert_same(state_of(made), sound['made'])
    toys.assert_same(average.module.state_dict(), sound['average'])
    named = {
        'student': 'loss_base, loss_dist, student logits',
        'teacher': 'loss_dist, teacher logits',
        'gradients': 'gradients',
    }.get(where, f'loss_{where}')
    assert message == f'not finite at step {GOOD} of epoch 5 on rank 0: {named}; images 8 9 10 11'
    assert len(made.steps) == GOOD + 1  # a CPU run notices it in the same step


def test_non_finite_distillation_head_is_named(stopped):
    message = stopped(
        family='distilled',
        prepare=lambda made: made.student.model.head_dist.register_forward_hook(at_call(0, torch.nan)),
    )[2]
    assert 'at step 0 of epoch 5 on rank 0: loss_dist, distillation logits; images 0 1 2 3' in message


def test_step_numbers_include_steps_before_a_resume(stopped):
    assert 'at step 9 of epoch 5 ' in stopped(criterion=Poisoned('base', torch.nan, GOOD), done=7)[2]


@pytest.mark.parametrize('where', ['mf_patch', 'gradients'])
@pytest.mark.parametrize('clip_grad', [None, 1.0])
def test_fused_optimizer_skips_the_bad_step_without_the_host(epoch, stopped, where, clip_grad):
    options = {'optimizer': fused, 'every_step': False, 'clip_grad': clip_grad, 'average': None}
    before = state_of(epoch(batches(GOOD), **options))
    seen = []

    def prepare(made) -> None:
        options['after_step'] = lambda: seen.append(state_of(made))
        if where == 'gradients':
            made.student.model.norm.weight.register_hook(at_call(GOOD, torch.nan))

    criterion = Poisoned(where, torch.nan, GOOD) if where in TERMS else Recorder()
    options['after_step'] = lambda: seen.append(state_of(parts[0]))
    parts = []
    _, _, message = stopped(
        **options, criterion=criterion, print_freq=100, prepare=lambda made: (parts.append(made), prepare(made))
    )
    toys.assert_same(seen[GOOD - 1], before)
    toys.assert_same(seen[GOOD], before)
    assert len(seen) >= GOOD + 1  # the host syncs where it prints: at the first and the last step
    name = 'gradients' if where == 'gradients' else f'loss_{where}'
    assert message == f'not finite at step {GOOD} of epoch 5 on rank 0: {name}; images 8 9 10 11'
    with pytest.raises(AssertionError):  # a good step does change the state
        toys.assert_same(seen[0], seen[1])


def test_float16_overflow_is_left_to_the_scaler(epoch, capsys):
    def prepare(made) -> None:
        made.student.model.norm.weight.register_hook(at_call(1, torch.inf))

    run = epoch(scaled=True, amp_dtype=torch.float16, prepare=prepare)
    assert run.scaler.get_scale() == 32
    assert 'not finite' not in capsys.readouterr().out


def test_non_finite_loss_in_float16_is_an_error(epoch):
    with pytest.raises(FloatingPointError, match='at step 1 of epoch 0 on rank 0: loss_mf_rand; images 4 5 6 7'):
        epoch(scaled=True, amp_dtype=torch.float16, criterion=Poisoned('mf_rand', torch.nan, 1))


def test_loss_scale_below_one_is_an_error(epoch):
    def prepare(made) -> None:
        made.student.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(FloatingPointError, match=r'at step 6 of .*gradients overflow at every scale of float16'):
        epoch(batches(9), scaled=True, amp_dtype=torch.float16, prepare=prepare)  # from 64 down to 1/2


# Evaluation -----------------------------------------------------------------------------------------------------------


class FromPixels(torch.nn.Module):
    """Returns the first pixels as logits, so that a test can choose them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return images.flatten(1)[:, : self.num_classes]


def answers(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    return generator.normal(size=(images, classes)).astype(np.float32), generator.integers(classes, size=images)


def split(logits: np.ndarray, targets: np.ndarray, sizes: list[int]) -> list:
    images = torch.zeros(len(logits), 3, 8, 8)
    images.flatten(1)[:, : logits.shape[1]] = torch.from_numpy(logits)
    return list(zip(images.split(sizes), torch.from_numpy(targets).split(sizes), strict=True))


@pytest.mark.parametrize('sizes', [[23], [10, 10, 3], [1] * 23])
@pytest.mark.parametrize('classes', [2, 4, 5, 10])
def test_evaluation_counts_every_image_once(classes, sizes):
    logits, targets = answers(23, classes)
    stats = evaluate(FromPixels(classes).train(), split(logits, targets, sizes), CPU, F32)
    # The number of classes with a larger logit than the right one.
    rank = (logits > logits[np.arange(23), targets][:, None]).sum(1)
    wide = logits.astype(np.float64)
    loss = (np.log(np.exp(wide).sum(1)) - wide[np.arange(23), targets]).mean()
    counts = {'correct1': int((rank < 1).sum()), 'correct5': int((rank < 5).sum()), 'images': 23}
    assert {name: stats[name] for name in counts} == counts
    assert stats['acc1'] == pytest.approx(100 * counts['correct1'] / 23, rel=1e-12)
    assert stats['acc5'] == pytest.approx(100 * counts['correct5'] / 23, rel=1e-12)
    assert stats['loss'] == pytest.approx(loss, abs=1e-6)
    assert 0 < counts['correct1'] < counts['correct5'] <= 23


@pytest.mark.parametrize('sizes', [[23], [10, 10, 3]])
def test_evaluation_ignores_images_without_class(sizes):
    logits, targets = answers(23, 10)
    bad = np.arange(23) % 4 == 1
    stats = evaluate(FromPixels(10), split(logits, np.where(bad, -1, targets), sizes), CPU, F32)
    expected = evaluate(FromPixels(10), split(logits[~bad], targets[~bad], [sum(~bad)]), CPU, F32)
    assert stats == pytest.approx(expected, rel=1e-6)
    assert stats['images'] == 17
    nothing = evaluate(FromPixels(10), split(logits, np.full(23, -1), sizes), CPU, F32)
    assert nothing == {'loss': 0, 'acc1': 0, 'acc5': 0, 'correct1': 0, 'correct5': 0, 'images': 0}


def test_evaluation_polls_after_every_batch():
    asked = []
    evaluate(FromPixels(10), split(*answers(23, 10), [10, 10, 3]), CPU, F32, lambda: asked.append(None))
    assert len(asked) == 3
