"""utils.py: meters and log rows, files that are never half written, the training state, random numbers by counter."""

import argparse
import copy
import errno
import itertools
import math
import os
import random
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import toys
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import main
import utils

CPU = torch.device('cpu')


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), 'x.pth'), 'x.pth: No such file or directory'),
        (ValueError('of two\n  lines'), 'of two lines'),
        (KeyError('a kind that was named'), 'a kind that was named'),
    ],
)
def test_bad_input_is_blamed_on_its_flag_in_one_line(error, words):
    with (
        pytest.raises(utils.UsageError, match=rf"^--flag value: '?{words}'?$"),
        utils.blame('--flag', 'value', KeyError),
    ):
        raise error


def test_an_error_of_a_kind_that_was_not_named_is_no_bad_input():
    with pytest.raises(ZeroDivisionError), utils.blame('--flag', 'value', KeyError):
        raise ZeroDivisionError


# Meters and progress --------------------------------------------------------------------------------------------------


def feed(meters: utils.Meters, **columns) -> None:
    for row in zip(*columns.values(), strict=True):
        meters.update({name: torch.tensor(float(value)) for name, value in zip(columns, row, strict=True)})


@pytest.mark.parametrize('names', [('base',), ('base', 'dist', 'a_term_nobody_knew')])
def test_means_are_those_of_all_steps_and_the_loss_is_the_sum_of_the_terms(names):
    table = np.random.default_rng(0).normal(size=(5, len(names)))
    meters = utils.Meters()
    feed(meters, **dict(zip(names, table.T, strict=True)))
    means = meters.means()
    assert list(means) == ['loss', *(f'loss_{name}' for name in names)]
    np.testing.assert_allclose(list(means.values()), [table.sum(1).mean(), *table.mean(0)], rtol=1e-6)


def test_a_line_tells_the_mean_since_the_last_one_and_that_of_the_epoch():
    meters = utils.Meters()
    feed(meters, a=[1, 2], b=[10, 20])
    assert meters.line() == 'loss: 16.5000 (16.5000)  loss_a: 1.5000 (1.5000)  loss_b: 15.0000 (15.0000)'
    feed(meters, a=[6], b=[0])
    assert meters.line() == 'loss: 6.0000 (13.0000)  loss_a: 6.0000 (3.0000)  loss_b: 0.0000 (10.0000)'


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('ask', [utils.Meters.line, utils.Meters.means])
def test_a_term_that_is_not_finite_is_named_and_the_others_are_not(value, ask):
    meters = utils.Meters()
    feed(meters, good=[1, 2, 3], bad=[1, value, 3])
    with pytest.raises(FloatingPointError, match=r'loss_bad$') as caught:
        ask(meters)
    assert 'good' not in str(caught.value)


def test_the_line_names_the_steps_among_which_a_term_went_wrong():
    meters = utils.Meters()
    feed(meters, a=[1, 1, 1])
    meters.line()
    feed(meters, a=[1, math.nan])
    with pytest.raises(FloatingPointError, match='steps 3 to 4 of the epoch'):
        meters.line()


@pytest.mark.parametrize(
    ('steps', 'print_freq', 'printed'),
    [(7, 3, [1, 4, 7]), (6, 3, [1, 4, 6]), (1, 10, [1]), (12, 100, [1, 12]), (3, 1, [1, 2, 3])],
)
def test_progress_prints_the_first_every_so_many_and_the_last_step(capsys, steps, print_freq, printed):
    seen, asked = [], []

    def line() -> str:
        asked.append(len(seen))
        return 'a line'

    for batch in utils.Progress('Epoch: [2]', print_freq, line, CPU).over(range(steps)):
        seen.append(batch)
    lines = [text for text in capsys.readouterr().out.splitlines() if 'eta' in text]
    assert seen == list(range(steps))
    assert asked == printed  # between the lines nobody asks, for asking waits for the device
    width = len(str(steps))
    for number, text in zip(printed, lines, strict=True):
        assert text.startswith(f'Epoch: [2] [{number:{width}}/{steps}]  eta: ')
        assert all(word in text for word in ('a line', 'time: ', 'data: ', 'mem: '))


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_log_row_takes_the_place_of_its_epoch_and_of_later_ones(tmp_path):
    for epoch, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)]:
        utils.write_log_row(tmp_path / 'log.txt', {'train_loss': loss, 'epoch': epoch})
    assert toys.log_rows(tmp_path) == [{'train_loss': 3.0, 'epoch': 0}, {'train_loss': 2.5, 'epoch': 1}]


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(file) -> None:
    file.write(b'half of the n')
    full_disk()


@pytest.mark.parametrize('fails', ['the writing', 'fsync', 'replace'])
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, fails):
    path = tmp_path / 'file'
    utils.write_durably(path, lambda file: file.write(b'old'))
    if fails != 'the writing':
        monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match='No space'):
        utils.write_durably(path, half_a_file if fails == 'the writing' else lambda file: file.write(b'new'))
    assert path.read_bytes() == b'old'


@pytest.mark.parametrize('fails', ['fsync', 'replace'])
def test_a_log_row_that_cannot_be_written_leaves_the_old_log(tmp_path, monkeypatch, fails):
    utils.write_log_row(tmp_path / 'log.txt', {'epoch': 0})
    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match='No space'):
        utils.write_log_row(tmp_path / 'log.txt', {'epoch': 1})
    assert toys.log_rows(tmp_path) == [{'epoch': 0}]


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def write(file) -> None:
        file.write(b'new')
        file.flush()
        assert path.read_bytes() == b'old'

    utils.write_durably(path, write)
    assert path.read_bytes() == b'new'
    assert list(tmp_path.iterdir()) == [path]


# Random numbers -------------------------------------------------------------------------------------------------------


def test_seeds_are_the_published_ones():
    # Stated, not recomputed: another value would make another run of every seed, on any Python and any PYTHONHASHSEED.
    assert utils.counter_seed(0, 'augment', 1, 2) == 2399798969184625679
    assert utils.counter_seed(2**40, 'step', 10**6, 7) == 900481060987346436


def test_every_coordinate_and_every_stream_has_seeds_of_its_own():
    counters = list(itertools.product(range(4), ['augment', 'step', 'tokens'], range(6), range(6)))
    seeds = [utils.counter_seed(*counter) for counter in counters]
    assert len(set(seeds)) == len(counters)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator.manual_seed takes
    assert seeds == [utils.counter_seed(*counter) for counter in counters]


def draws(seed: int, step: int, rank: int, noise: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(noise)
    random.random(), np.random.rand(noise), torch.rand(noise), torch.rand(noise, generator=generator)
    utils.seed_step(generator, seed, step, rank)
    return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=generator).item()


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = draws(1, 2, 3)
    assert draws(1, 2, 3, noise=5) == first
    # Tokens must not hang on how many numbers drop-path takes: theirs is another stream.
    assert first[2] != first[3]


@pytest.mark.parametrize('other', [(0, 2, 3), (1, 3, 3), (1, 2, 0)])
def test_another_seed_step_or_rank_draws_otherwise_from_all_four_generators(other):
    assert all(a != b for a, b in zip(draws(1, 2, 3), draws(*other), strict=True))


# Training state -------------------------------------------------------------------------------------------------------


def make_state(
    model: torch.nn.Module | None = None,
    *,
    gradient: float = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    scaled: bool = False,
) -> utils.TrainingState:
    """A state whose optimizer has made one step, and whose moving average differs from the weights."""
    if model is None:
        torch.manual_seed(0)
        model = toys.student()
    optimizer = create_optimizer_v2(model, 'adamw', lr, weight_decay)
    schedule = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=2, warmup_lr_init=1e-6)
    scaler = torch.amp.GradScaler('cpu', enabled=scaled)
    state = utils.TrainingState(model, optimizer, schedule, scaler, ModelEmaV3(model, decay=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return state


def kinds(value) -> set[type]:
    if isinstance(value, dict):
        return {type(value)}.union(*map(kinds, value.keys()), *map(kinds, value.values()))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*map(kinds, value))
    return {type(value)}


def test_a_checkpoint_holds_plain_types_only_and_fits_plain_timm(tmp_path):
    args = main.parse_args(toys.flags(teacher_path='t.pth', opt_betas='0.9 0.99', teacher_kwargs='drop_path_rate=None'))
    state = make_state(scaled=True)
    state.epoch = 3
    state.best_acc1 = 12.5
    contents = state.state_dict(vars(args))
    plain = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(contents) <= plain
    loaded = toys.load(toys.save(tmp_path / 'checkpoint.pth', contents))
    assert loaded['args'] == vars(args)
    assert loaded['args']['model_kwargs'] == toys.STUDENT
    assert (loaded['epoch'], loaded['best_acc1']) == (3, 12.5)
    fresh = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32, **toys.STUDENT)
    fresh.load_state_dict(loaded['model'], strict=True)
    toys.assert_same(fresh.state_dict(), state.model.state_dict())
    fresh.load_state_dict(loaded['model_ema'], strict=True)
    toys.assert_same(fresh.state_dict(), state.ema.module.state_dict())


def test_without_a_moving_average_the_checkpoint_has_none():
    state = make_state()
    state.ema = None
    assert 'model_ema' not in state.state_dict({})


def test_progress_comes_back_with_the_rate_of_the_schedule_and_the_options_of_the_flags():
    saved = make_state(gradient=3, scaled=True)
    saved.epoch, saved.best_acc1 = 4, 12.5
    saved.scaler.load_state_dict({**saved.scaler.state_dict(), 'scale': 1024.0, '_growth_tracker': 17})
    state = make_state(lr=5e-4, weight_decay=0.2, scaled=True)
    assert state.load_progress(saved.state_dict({})) is True
    assert (state.epoch, state.best_acc1) == (4, 12.5)
    toys.assert_same(state.optimizer.state_dict()['state'], saved.optimizer.state_dict()['state'])
    # Cosine from 5e-4 to 1e-5 over ten epochs, after epoch 4; the file's own rate was 1e-3.
    expected = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 4 / 10)) / 2
    assert [g['lr'] for g in state.optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-12)
    assert sorted(g['weight_decay'] for g in state.optimizer.param_groups) == [0, 0.2]
    assert state.scaler.state_dict() == saved.scaler.state_dict()
    assert state.scaler.get_scale() == 1024


@pytest.mark.parametrize('missing', ['optimizer', 'lr_scheduler', 'epoch'])
def test_a_file_without_optimizer_schedule_or_epoch_changes_nothing(missing):
    state, other = make_state(), make_state(gradient=3, lr=1.0)
    before = copy.deepcopy((state.optimizer.state_dict(), state.lr_scheduler.state_dict()))
    contents = other.state_dict({})
    del contents[missing]
    assert state.load_progress(contents) is False
    toys.assert_same((state.optimizer.state_dict(), state.lr_scheduler.state_dict()), before)
    assert (state.epoch, state.best_acc1) == (-1, 0.0)


def test_the_optimizer_of_another_model_is_refused():
    other = make_state(toys.student(depth=3))
    with pytest.raises(ValueError, match='parameter groups'):
        make_state().load_progress(other.state_dict({}))


def released(state: utils.TrainingState, epoch: int) -> dict:
    """A checkpoint as the 2022 release wrote it in mid-run: counters of the optimizer are ints, flags a Namespace."""
    optimizer = state.optimizer.state_dict()
    optimizer['state'] = {key: {**value, 'step': int(value['step'])} for key, value in optimizer['state'].items()}
    keep = ('params', 'lr', 'betas', 'eps', 'weight_decay', 'amsgrad')
    optimizer['param_groups'] = [{key: group[key] for key in keep} for group in optimizer['param_groups']]
    scaler = {'scale': 4096.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000}
    return {
        'model': state.model.state_dict(),
        'optimizer': optimizer,
        'lr_scheduler': {'base_values': [1.0, 1.0], '_step_count': 5},
        'epoch': epoch,
        'model_ema': state.ema.module.state_dict(),
        'scaler': {**scaler, '_growth_tracker': 3},
        'args': argparse.Namespace(lr=1.0, epochs=300),
    }


def test_a_file_of_the_release_resumes_in_mid_run():
    saved, state = make_state(gradient=3, scaled=True), make_state(scaled=True)
    assert state.load_progress(released(saved, epoch=6)) is True
    assert (state.epoch, state.best_acc1, state.scaler.get_scale()) == (6, 0.0, 4096)
    moments = [
        (s['step'].item(), s['exp_avg'], s['exp_avg_sq']) for s in state.optimizer.state_dict()['state'].values()
    ]
    expected = [(1.0, s['exp_avg'], s['exp_avg_sq']) for s in saved.optimizer.state_dict()['state'].values()]
    toys.assert_same(moments, expected)
    state.optimizer.step()  # goes on from there
    assert {s['step'].item() for s in state.optimizer.state_dict()['state'].values()} == {2}


def test_the_scale_of_a_float16_run_is_no_obstacle_to_a_run_without_scaler():
    state = make_state()
    assert state.load_progress(make_state(scaled=True).state_dict({})) is True
    assert not state.scaler.is_enabled()


# Set-up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('local_rank', ['0', '3'])
def test_more_ranks_than_gpus_stop_all_ranks_of_a_machine(monkeypatch, local_rank):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, value in {
        'RANK': local_rank,
        'WORLD_SIZE': '4',
        'LOCAL_RANK': local_rank,
        'LOCAL_WORLD_SIZE': '4',
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.UsageError, match='--device cuda: 4 GPUs are needed, this machine has 2'):
        utils.init_distributed('cuda', 'env://')


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(utils.UsageError, match='cuda:5: 6 GPUs are needed'):
        utils.init_distributed('cuda:5', 'env://')
