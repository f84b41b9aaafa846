"""run_dir.py: the training state, when a run is saved, and which files its folder has."""

import argparse
import copy
import errno
import math
import os
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import toys
from states import Disk, full_disk, make_state, small_state

import checkpoints
import locks
import run_dir
import stopping
from checkpoints import read_newest
from run_dir import CheckpointManager, TrainingState

CPU = torch.device('cpu')
HTML = b'<!DOCTYPE html>\n<html>\n<body>503: Service Unavailable</body>\n</html>\n'

# Training state -------------------------------------------------------------------------------------------------------


def kinds(value) -> set[type]:
    """All types in a nested value."""
    if isinstance(value, dict):
        return {type(value)}.union(*map(kinds, value.keys()), *map(kinds, value.values()))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*map(kinds, value))
    return {type(value)}


@pytest.mark.R7
def test_checkpoint_holds_plain_types_and_loads_into_timm(tmp_path):
    options = {'teacher_path': 't.pth', 'opt_betas': '0.9 0.99', 'teacher_kwargs': 'drop_path_rate=None'}
    args = toys.config(**options).flags()
    state = make_state(scaled=True)
    state.epoch = 3
    state.best_acc1 = 12.5
    checkpoint = state.state_dict(args, {})
    plain = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(checkpoint) <= plain
    loaded = toys.load(toys.save(tmp_path / 'checkpoint.pth', checkpoint))
    assert loaded['args'] == args
    assert loaded['args']['model_kwargs'] == toys.STUDENT
    assert (loaded['epoch'], loaded['best_acc1']) == (3, 12.5)
    fresh = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32, **toys.STUDENT)
    fresh.load_state_dict(loaded['model'], strict=True)
    toys.assert_same(fresh.state_dict(), state.model.state_dict())
    fresh.load_state_dict(loaded['model_ema'], strict=True)
    toys.assert_same(fresh.state_dict(), state.ema.module.state_dict())


def test_checkpoint_without_ema():
    state = make_state()
    state.ema = None
    assert 'model_ema' not in state.state_dict({}, {})


def test_load_progress_takes_moments_from_the_file_and_options_from_the_flags():
    saved = make_state(gradient=3, scaled=True)
    saved.epoch, saved.best_acc1, saved.position, saved.step = 4, 12.5, 24, 43
    saved.scaler.load_state_dict({**saved.scaler.state_dict(), 'scale': 1024.0, '_growth_tracker': 17})
    state = make_state(lr=5e-4, weight_decay=0.2, scaled=True)
    state.load_progress(saved.state_dict({}, {}), CPU)
    assert (state.epoch, state.best_acc1, state.position, state.step) == (4, 12.5, 24, 43)
    toys.assert_same(state.optimizer.state_dict()['state'], saved.optimizer.state_dict()['state'])
    # Cosine from 5e-4 to 1e-5 over ten epochs, after epoch 4. The rate in the file was 1e-3.
    expected = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 4 / 10)) / 2
    assert [g['lr'] for g in state.optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-12)
    assert sorted(g['weight_decay'] for g in state.optimizer.param_groups) == [0, 0.2]
    assert state.scaler.state_dict() == saved.scaler.state_dict()
    assert state.scaler.get_scale() == 1024


@pytest.mark.parametrize('opt', ['adamw', 'sgd', 'lamb', 'adan', 'lookahead_adamw', 'madgrad', 'adafactor', 'lion'])
def test_every_optimizer_resumes_exactly(tmp_path, opt):
    def step(state: TrainingState, number: int) -> None:
        for parameter in state.model.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()

    saved = make_state(opt=opt)
    for number in range(8):
        step(saved, number)
    checkpoint = toys.load(toys.save(tmp_path / 'checkpoint.pth', saved.state_dict({}, {})))
    state = make_state(opt=opt)
    state.model.load_state_dict(checkpoint['model'])
    state.load_progress(checkpoint, CPU)
    for number in range(8, 16):  # Lookahead synchronizes at the twelfth step
        step(saved, number), step(state, number)
    toys.assert_same(state.model.state_dict(), saved.model.state_dict())


@pytest.mark.parametrize('missing', ['optimizer', 'lr_scheduler', 'epoch'])
def test_checkpoint_without_progress_changes_nothing(missing):
    state, other = make_state(), make_state(gradient=3, lr=1.0)
    before = copy.deepcopy((state.optimizer.state_dict(), state.lr_scheduler.state_dict()))
    checkpoint = other.state_dict({}, {})
    assert checkpoints.has_progress(checkpoint)
    del checkpoint[missing]
    assert not checkpoints.has_progress(checkpoint)
    run_dir.restore(state, checkpoint, 'weights.pth', start_epoch=0, steps=5)
    toys.assert_same((state.optimizer.state_dict(), state.lr_scheduler.state_dict()), before)
    assert (state.epoch, state.step, state.position, state.best_acc1) == (-1, 0, 0, 0.0)


def test_optimizer_of_another_model_is_refused():
    other = make_state(toys.student(depth=3))
    with pytest.raises(ValueError, match='parameter groups'):
        make_state().load_progress(other.state_dict({}, {}), CPU)


def released(state: TrainingState, epoch: int) -> dict:
    """A checkpoint as the 2022 release wrote it: the optimizer's step counters are ints, the flags a Namespace."""
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


def test_release_checkpoint_loads_in_mid_run():
    saved, state = make_state(gradient=3, scaled=True), make_state(scaled=True)
    state.load_progress(released(saved, epoch=6), CPU)
    assert (state.epoch, state.best_acc1, state.scaler.get_scale()) == (6, 0.0, 4096)
    moments = [
        (s['step'].item(), s['exp_avg'], s['exp_avg_sq']) for s in state.optimizer.state_dict()['state'].values()
    ]
    expected = [(1.0, s['exp_avg'], s['exp_avg_sq']) for s in saved.optimizer.state_dict()['state'].values()]
    toys.assert_same(moments, expected)
    state.optimizer.step()  # counts on from there
    assert {s['step'].item() for s in state.optimizer.state_dict()['state'].values()} == {2}


def test_float16_checkpoint_loads_without_scaler():
    state = make_state()
    state.load_progress(make_state(scaled=True).state_dict({}, {}), CPU)
    assert not state.scaler.is_enabled()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'epoch': -2}, 'epoch must be a whole number of at least -1, not -2'),
        ({'epoch': '3'}, "epoch must be a whole number of at least -1, not '3'"),
        ({'epoch': 1.0}, 'epoch must be a whole number of at least -1, not 1.0'),
        ({'position': -1}, 'position must be a whole number of at least 0, not -1'),
        ({'step': 2.5}, 'step must be a whole number of at least 0, not 2.5'),
        ({'step': '0'}, "step must be a whole number of at least 0, not '0'"),
        ({'best_acc1': 'x'}, 'x'),
        ({'meters': {'names': ['loss'], 'totals': [[1.0, 2.0, 3.0]]}}, 'as many values as names'),
        ({'format': checkpoints.FORMAT + 1}, 'newer than this program'),
    ],
)
def test_invalid_values_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_state().load_progress({**make_state().state_dict({}, {}), **changes}, CPU)


def test_moments_of_another_shape_are_refused():
    checkpoint = copy.deepcopy(make_state().state_dict({}, {}))
    moments = checkpoint['optimizer']['state'][4]
    moments['exp_avg'] = moments['exp_avg'].new_zeros([size + 1 for size in moments['exp_avg'].shape])
    with pytest.raises(ValueError, match='optimizer state exp_avg of parameter 4 does not have the shape'):
        make_state().load_progress(checkpoint, CPU)


def test_state_describes_its_progress():
    state = make_state(torch.nn.Linear(3, 2))
    assert state.describe() == 'no epoch done'
    state.position, state.step = 1024, 8
    state.meters.update({'a': torch.tensor(1.0)}, 4)
    assert state.describe() == 'no epoch done, 1,024 images of the next epoch'
    state.finish_epoch()
    assert (state.describe(), state.position, state.step) == ('epoch 0 done', 0, 8)
    assert state.meters.total is None


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


each_fault = pytest.mark.parametrize('fault', Disk.FAULTS)


class Clock:
    """Replaces the module `time`, so that nothing waits."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_dir, 'time', clock)
    return clock


def make_manager(folder: Path | None, signals: stopping.StopSignals | None = None, **options) -> CheckpointManager:
    """A manager of a tiny state in one process."""
    consensus = stopping.RankConsensus(signals or stopping.StopSignals())
    return CheckpointManager(small_state(), folder, consensus, {}, **{'before_save': lambda: None, **options})


def save(manager: CheckpointManager, step: int, epoch: int | None = None, best: bool = False) -> None:
    manager.state.step = step
    manager.save(None if epoch is None else {'epoch': epoch}, best)


def step_of(path) -> int:
    return toys.load(path)['step']


def test_log_row_replaces_its_epoch_and_later_ones(tmp_path):
    for epoch, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)]:
        make_manager(tmp_path).save({'train_loss': loss, 'epoch': epoch})
    assert toys.log_rows(tmp_path) == [{'train_loss': 3.0, 'epoch': 0}, {'train_loss': 2.5, 'epoch': 1}]


@each_fault
def test_failed_save_is_reported_and_retried(tmp_path, disk, clock, capsys, fault):
    manager = make_manager(tmp_path)
    save(manager, 1, epoch=0, best=True)
    before = toys.listing(tmp_path)
    disk.fault = fault
    save(manager, 2, epoch=1, best=True)
    if fault == 'replace':  # the previous checkpoint has its second name by then
        before['checkpoint-00000001.pth'] = before['checkpoint.pth']
    assert toys.listing(tmp_path) == before
    line = f'warning: not saved: {tmp_path / "log.txt"}: No space left on device; training continues, '
    assert capsys.readouterr().out == f'{line}the next attempt is in 60 s or with the next save\n'
    assert not manager.is_due()
    clock.now += 59
    assert not manager.is_due()
    clock.now += 1
    assert manager.is_due()
    save(manager, 3)  # the disk is still full
    assert toys.listing(tmp_path) == before
    clock.now += 59
    assert not manager.is_due()
    disk.fault = None
    clock.now += 1
    assert manager.is_due()
    save(manager, 4)
    assert not manager.is_due()
    assert toys.log_rows(tmp_path) == [{'epoch': 0}, {'epoch': 1}]
    steps = {'checkpoint.pth': 4, 'best_checkpoint.pth': 2, 'checkpoint-00000001.pth': 1}
    assert toys.listing(tmp_path).keys() == steps.keys() | {'log.txt'}
    assert {name: step_of(tmp_path / name) for name in steps} == steps


@each_fault
@pytest.mark.parametrize('name', checkpoints.KEPT)
def test_failed_file_keeps_its_old_contents_until_finish(tmp_path, disk, clock, name, fault):
    manager = make_manager(tmp_path)
    save(manager, 1, epoch=0, best=True)
    disk.fault, disk.name = fault, name
    save(manager, 2, epoch=1, best=True)
    assert len(toys.log_rows(tmp_path)) == 1 + (name != 'log.txt')
    assert step_of(tmp_path / 'best_checkpoint.pth') == 1 + (name != 'best_checkpoint.pth')
    assert step_of(tmp_path / 'checkpoint.pth') == 1 + (name != 'checkpoint.pth')
    assert not list(tmp_path.glob('.*'))
    assert read_newest(tmp_path)[2] == []
    disk.fault = None
    manager.finish()
    assert clock.slept == [1.0]
    assert len(toys.log_rows(tmp_path)) == 2
    assert [step_of(tmp_path / name) for name in ('best_checkpoint.pth', 'checkpoint.pth')] == [2, 2]
    assert step_of(tmp_path / 'checkpoint-00000001.pth') == 1


def test_finish_fails_if_the_last_state_cannot_be_written(tmp_path, disk, clock):
    manager = make_manager(tmp_path)
    save(manager, 1)
    manager.finish()
    assert clock.slept == []  # everything is written
    disk.fault, disk.code = 0.5, errno.EIO
    save(manager, 2)
    with pytest.raises(locks.NotSavedError, match=r'checkpoint\.pth: Input/output error'):
        manager.finish()
    assert clock.slept == [1.0, 2.0, 4.0]
    assert {name: step_of(tmp_path / name) for name in toys.listing(tmp_path)} == {'checkpoint.pth': 1}


def test_files_are_written_in_order(tmp_path, monkeypatch):
    order = []
    write = checkpoints.write_durably
    monkeypatch.setattr(checkpoints, 'write_durably', lambda path, *rest: order.append(path.name) or write(path, *rest))
    save(make_manager(tmp_path), 1, epoch=0, best=True)
    assert order == ['log.txt', 'best_checkpoint.pth', 'checkpoint.pth']
    save(make_manager(tmp_path), 2)
    assert order[3:] == ['checkpoint.pth']


@pytest.mark.parametrize('links', [True, False], ids=['links', 'no links'])
@pytest.mark.parametrize('keep', [0, 1, 3])
def test_no_more_files_than_last_best_and_history(tmp_path, monkeypatch, keep, links):
    seen = []

    def note(call):
        return lambda *args: seen.append({path.name for path in tmp_path.iterdir()}) or call(*args)

    for name in ('fsync', 'replace', 'unlink'):  # a kill at any of these leaves the folder as it is
        monkeypatch.setattr(os, name, note(getattr(os, name)))
    monkeypatch.setattr(os, 'link', note(os.link) if links else full_disk)
    manager = make_manager(tmp_path, keep=keep)
    for step in range(1, 8):
        save(manager, step, epoch=step, best=step == 2)
    assert step_of(tmp_path / 'best_checkpoint.pth') == 2
    earlier = {f'checkpoint-{step:08d}.pth' for step in range(7 - keep, 7)}
    assert toys.listing(tmp_path).keys() == {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'} | earlier
    assert all(step_of(tmp_path / name) == int(name[11:19]) for name in earlier)
    for names in seen:
        assert len(names - {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'}) <= keep + 1
        assert sum(name.startswith('.') for name in names) <= 1
    assert max(len(names) for names in seen) == 3 + keep + 1  # the test does look during writes


def test_damaged_checkpoint_never_replaces_a_good_one(tmp_path, monkeypatch):
    manager = make_manager(tmp_path)
    for step in (1, 2):
        save(manager, step)
    (tmp_path / 'checkpoint.pth').write_bytes(HTML)
    found, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda *names: found.append(read_newest(tmp_path)[0]) or replace(*names))
    save(make_manager(tmp_path, last_step=None), 3)
    assert [path.name for path in found] == ['checkpoint-00000001.pth']
    assert {name: step_of(tmp_path / name) for name in toys.listing(tmp_path)} == {
        'checkpoint.pth': 3,
        'checkpoint-00000001.pth': 1,
    }


def test_existing_checkpoint_becomes_the_previous_one(tmp_path):
    save(make_manager(tmp_path), 5)
    save(make_manager(tmp_path, last_step=5), 6)
    assert {name: step_of(tmp_path / name) for name in toys.listing(tmp_path)} == {
        'checkpoint.pth': 6,
        'checkpoint-00000005.pth': 5,
    }


def test_only_unfinished_writes_are_removed(tmp_path):
    ours = ['.checkpoint.pth.tmp', '.best_checkpoint.pth.tmp', '.log.txt.tmp', '.checkpoint-00000012.pth.tmp']
    others = ['.notes.tmp', 'checkpoint.pth.tmp', '.checkpoint.pth', 'weights.pth', 'checkpoint-00000012.pth', '.tmp']
    for name in ours + others:
        (tmp_path / name).write_text('x')
    make_manager(tmp_path)
    assert toys.listing(tmp_path).keys() == set(others)


def test_save_is_due_by_the_clock(tmp_path, clock):
    manager = make_manager(tmp_path, interval=600)
    clock.now += 599
    assert not manager.is_due()
    clock.now += 1
    assert manager.is_due()
    save(manager, 1)
    assert not manager.is_due()
    clock.now += 10**9
    assert manager.is_due()
    assert not make_manager(tmp_path).is_due()


def test_without_a_folder_nothing_is_saved_or_due(clock):
    signals = stopping.StopSignals()
    manager = make_manager(None, signals, interval=1)
    clock.now += 10
    save(manager, 1, epoch=0, best=True)
    manager.finish()
    assert not manager.is_due()
    assert manager.saves == 0
    signals.received = signal.SIGTERM
    with pytest.raises(stopping.StoppedError, match='no --output_dir'):
        manager.poll()


@pytest.mark.parametrize('every', [0, 2])
def test_every_so_many_steps_are_saved(tmp_path, every):
    checks = []
    manager = make_manager(tmp_path, keep=10, every=every, before_save=lambda: checks.append(None))
    for step in range(1, 6):
        manager.state.step = step
        manager.after_step()
    saved = sorted(step_of(path) for path in checkpoints.find_checkpoints(tmp_path))
    assert saved == ([2, 4] if every else [])
    assert len(checks) == (2 if every else 0)


def test_failed_check_before_a_save_keeps_the_files(tmp_path):
    def check() -> None:
        raise FloatingPointError('not finite')

    manager = make_manager(tmp_path, every=1, before_save=check)
    manager.state.step = 1
    with pytest.raises(FloatingPointError):
        manager.after_step()
    assert toys.listing(tmp_path) == {}


@pytest.mark.parametrize('when', ['after_step', 'poll', 'drain', 'finish'])
def test_stopped_run_is_saved_and_says_where(tmp_path, when):
    signals = stopping.StopSignals()
    manager = make_manager(tmp_path, signals)
    manager.state.step, manager.state.position = 1, 8
    signals.received = signal.SIGTERM
    words = r'^stopped by SIGTERM: no epoch done.*, saved in .*checkpoint\.pth'
    with pytest.raises(stopping.StoppedError, match=words):
        getattr(manager, when)()
    saved = toys.load(tmp_path / 'checkpoint.pth')
    assert (saved['step'], saved['position']) == (1, 8)


def test_stopped_run_that_cannot_be_saved_is_an_error(tmp_path, disk, clock):
    signals = stopping.StopSignals()
    manager = make_manager(tmp_path, signals)
    signals.received, disk.fault = signal.SIGTERM, 0.5
    with pytest.raises(locks.NotSavedError, match='No space'):
        manager.after_step()
