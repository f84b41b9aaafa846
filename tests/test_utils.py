"""utils.py: usage errors, meters, random numbers by counter, process groups."""

import errno
import itertools
import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch

import stopping
import utils

CPU = torch.device('cpu')


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), 'x.pth'), 'x.pth: No such file or directory'),
        (ValueError('of two\n  lines'), 'of two lines'),
        (KeyError('a type that was named'), 'a type that was named'),
    ],
)
def test_bad_input_names_its_flag_in_one_line(error, words):
    with (
        pytest.raises(utils.UsageError, match=rf"^--flag value: '?{words}'?$"),
        utils.usage_error_context('--flag', 'value', KeyError),
    ):
        raise error


def test_other_errors_are_not_bad_input():
    with pytest.raises(ZeroDivisionError), utils.usage_error_context('--flag', 'value', KeyError):
        raise ZeroDivisionError


# Meters ---------------------------------------------------------------------------------------------------------------


def feed(meters: utils.Meters, images: int = 4, **columns) -> None:
    for row in zip(*columns.values(), strict=True):
        meters.update({name: torch.tensor(float(value)) for name, value in zip(columns, row, strict=True)}, images)


@pytest.mark.parametrize('names', [('base',), ('base', 'dist', 'unknown_term')])
def test_means_over_steps_and_loss_as_sum_of_terms(names):
    table = np.random.default_rng(0).normal(size=(5, len(names)))
    meters = utils.Meters()
    feed(meters, **dict(zip(names, table.T, strict=True)))
    means = meters.means()
    assert list(means) == ['loss', *(f'loss_{name}' for name in names)]
    np.testing.assert_allclose(list(means.values()), [table.sum(1).mean(), *table.mean(0)], rtol=1e-6)


def test_recent_means_are_of_the_steps_since_the_last_call():
    meters = utils.Meters()
    feed(meters, a=[1, 2], b=[10, 20])
    assert meters.recent() == {'loss': 16.5, 'loss_a': 1.5, 'loss_b': 15}
    feed(meters, a=[6], b=[0])
    assert meters.recent() == {'loss': 6, 'loss_a': 6, 'loss_b': 0}


def test_means_are_over_images():
    meters = utils.Meters()
    feed(meters, images=6, a=[1])
    feed(meters, images=2, a=[5])
    assert meters.means() == {'loss': 2, 'loss_a': 2}
    assert meters.recent() == {'loss': 2, 'loss_a': 2}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_non_finite_step_is_left_out(value):
    with_it, without = utils.Meters(), utils.Meters()
    feed(with_it, good=[1, 2, 4], bad=[1, value, 3])
    feed(without, good=[1, 4], bad=[1, 3])
    assert with_it.recent() == without.recent()
    assert with_it.means() == without.means() == {'loss': 4.5, 'loss_good': 2.5, 'loss_bad': 2}


def test_recent_means_after_only_non_finite_steps():
    meters = utils.Meters()
    feed(meters, a=[math.nan])
    assert meters.recent() == {'loss': 0, 'loss_a': 0}


def ranks(monkeypatch, world: int, rank: int) -> None:
    monkeypatch.setattr(utils, 'get_world_size', lambda: world)
    monkeypatch.setattr(utils, 'get_rank', lambda: rank)


def test_meters_resume_exactly():
    meters, again = utils.Meters(), utils.Meters()
    feed(meters, a=[0.1, 0.2], b=[0.3, 0.7])
    again.load_state_dict(meters.state_dict(), CPU)
    meters.recent()
    for each in (meters, again):
        feed(each, a=[0.7], b=[0.9])
    assert again.means() == meters.means()
    assert again.recent() == meters.recent()  # the recent means are of the steps after the resume
    empty = utils.Meters()
    empty.load_state_dict(utils.Meters().state_dict(), CPU)
    assert empty.total is None


@pytest.mark.parametrize(('rank', 'order'), [(0, ['call', 'meet']), (1, ['meet', 'call'])])
@pytest.mark.parametrize('fails', [False, True])
def test_main_process_first_does_not_block_on_failure(monkeypatch, rank, order, fails):
    done = []
    ranks(monkeypatch, 2, rank)
    monkeypatch.setattr(utils, 'gather_objects', lambda value: done.append('meet'))

    def call():
        done.append('call')
        return 1 / (0 if fails else 1)

    if fails:
        with pytest.raises(ZeroDivisionError):
            utils.main_process_first(call)
    else:
        assert utils.main_process_first(call) == 1
    assert done == order


@pytest.mark.parametrize('saved_by', [1, 2, 3])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_meters_keep_their_sums_on_other_ranks(monkeypatch, saved_by, world):
    state = {'names': ['loss', 'loss_a'], 'totals': [[1.0 + rank, 10.0 * rank, 2.0] for rank in range(saved_by)]}
    rows = []
    for rank in range(world):
        ranks(monkeypatch, world, rank)
        meters = utils.Meters()
        meters.load_state_dict(state, CPU)
        rows.append(meters.total.tolist())
    assert np.sum(rows, axis=0).tolist() == np.sum(state['totals'], axis=0).tolist()
    if saved_by == world:
        assert rows == state['totals']  # each rank keeps its own, because another order of adding rounds differently


def test_meters_accept_a_new_term_in_mid_epoch():
    meters, again = utils.Meters(), utils.Meters()
    feed(meters, a=[2, 4])
    again.load_state_dict(meters.state_dict(), CPU)
    feed(again, a=[6], b=[9])
    assert again.recent() == {'loss': 15, 'loss_a': 6, 'loss_b': 9}
    assert again.means() == {'loss': 7, 'loss_a': 4, 'loss_b': 3}


def test_meters_with_more_names_than_values_are_refused():
    with pytest.raises(ValueError, match='as many values as names'):
        utils.Meters().load_state_dict({'names': ['loss', 'loss_a', 'loss_b'], 'totals': [[1.0, 2.0, 3.0]]}, CPU)


# Random numbers -------------------------------------------------------------------------------------------------------


def test_seeds_never_change():
    # Written down, because another value would change every run. It does not depend on Python or PYTHONHASHSEED.
    assert utils.counter_seed(0, 'augment', 1, 2) == 2399798969184625679
    assert utils.counter_seed(2**40, 'step', 10**6, 7) == 900481060987346436


def test_seeds_differ_by_coordinate_and_stream():
    counters = list(itertools.product(range(4), ['augment', 'step', 'tokens'], range(6), range(6)))
    seeds = [utils.counter_seed(*counter) for counter in counters]
    assert len(set(seeds)) == len(counters)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator.manual_seed takes
    assert seeds == [utils.counter_seed(*counter) for counter in counters]


def draws(seed: int, step: int, rank: int, noise: int = 0, shared_draw: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(noise)
    random.random(), np.random.rand(noise), torch.rand(noise), torch.rand(noise, generator=generator)
    utils.seed_step(generator, seed, step, rank, shared_draw)
    return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=generator).item()


def test_step_does_not_depend_on_earlier_draws():
    first = draws(1, 2, 3)
    assert draws(1, 2, 3, noise=5) == first
    # Tokens have a stream of their own, because they must not depend on how many numbers drop-path draws.
    assert first[2] != first[3]


@pytest.mark.parametrize('other', [(0, 2, 3), (1, 3, 3), (1, 2, 0)])
def test_seed_step_and_rank_change_all_four_generators(other):
    assert all(a != b for a, b in zip(draws(1, 2, 3), draws(*other), strict=True))


def test_shared_draw_gives_all_ranks_the_same_tokens():
    first, second = (draws(1, 2, rank, shared_draw=True) for rank in (0, 3))
    assert first == draws(1, 2, 0)
    assert second == (*draws(1, 2, 3)[:3], first[3])


# Set-up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('local_rank', ['0', '3'])
def test_more_ranks_than_gpus_is_an_error_on_all_ranks(monkeypatch, local_rank):
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


def test_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(utils.UsageError, match='cuda:5: 6 GPUs are needed'):
        utils.init_distributed('cuda:5', 'env://')


def test_interruptible_call_returns_its_value_and_says_what_it_waits_for(capsys):
    release = threading.Event()
    timer = threading.Timer(0.3, release.set)
    timer.start()
    assert utils.run_interruptibly(release.wait, 'waits for a timer', notice=0.05) is True
    assert capsys.readouterr().err == 'waits for a timer\n'
    assert utils.run_interruptibly(lambda: 3, 'nothing') == 3
    assert capsys.readouterr().err == ''


def test_interruptible_call_passes_its_error_on():
    with pytest.raises(ZeroDivisionError):
        utils.run_interruptibly(lambda: 1 // 0, 'nothing')


def test_signal_ends_a_wait_outside_python():
    release, done = threading.Event(), []
    with stopping.StopSignals():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(stopping.StoppedError):
            utils.run_interruptibly(lambda: done.append(release.wait(60)), 'waits', notice=60.0)
    assert done == []  # the call still waits
    release.set()


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ({'RANK': '0'}, 'RANK=0 is set in the environment, but WORLD_SIZE is not'),
        ({'WORLD_SIZE': '2'}, 'WORLD_SIZE=2 is set in the environment, but RANK is not'),
        ({'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1'}, 'srun has started 2 tasks'),
    ],
    ids=['rank', 'world', 'srun'],
)
def test_half_of_a_launcher_s_environment_is_refused(monkeypatch, given, words):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_STEP_ID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.UsageError, match=words):
        utils.init_distributed('cpu', 'env://')


@pytest.mark.parametrize('given', [{}, {'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, {'SLURM_PROCID': '0'}])
def test_single_process_needs_no_launcher(monkeypatch, given):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_STEP_ID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert utils.init_distributed('cpu', 'env://') == torch.device('cpu')
    assert not torch.distributed.is_initialized()


@pytest.fixture
def device(monkeypatch):
    """A GPU that can be asked for its capability. Each test has its own one, because answers are kept."""
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: torch.ones(size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    utils.fusing_problem.cache_clear()
    yield torch.device('cuda', 0)
    utils.fusing_problem.cache_clear()


def test_compiler_that_fails_is_a_reason(device, monkeypatch):
    def fail(function, fullgraph):
        raise RuntimeError('Failed to find C compiler\nand more')

    monkeypatch.setattr(torch, 'compile', fail)
    reason = 'torch.compile does not work: RuntimeError: Failed to find C compiler'
    assert utils.fusing_problem(device) == reason


def test_compiler_that_works_is_no_reason_and_is_tried_once(device, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda function, fullgraph: lambda x: compiled.append(function(x)))
    assert utils.fusing_problem(device) == utils.fusing_problem(device) == ''
    assert len(compiled) == 1


def test_old_gpus_other_makers_and_cpus_are_not_tried(device, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda function, fullgraph: pytest.fail('tried'))
    reason = 'needs an NVIDIA GPU of compute capability 8.0 or higher'
    assert utils.fusing_problem(torch.device('cpu')) == reason
    monkeypatch.setattr(torch.version, 'hip', '7.0')
    assert utils.fusing_problem(device) == reason
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert utils.fusing_problem(torch.device('cuda', 1)) == reason
