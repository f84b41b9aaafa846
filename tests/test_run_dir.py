"""run_dir.py: the training state; when a run is saved and which files it leaves."""

import argparse
import copy
import errno
import math
import os
import signal
from collections import OrderedDict

import pytest
import timm
import torch
import toys
from states import Disk, full_disk, listing, make_state, small_state

import checkpoints
import main
import run_dir
import stopping
from checkpoints import read_newest
from run_dir import RunFolder, TrainingState

CPU = torch.device('cpu')
HTML = b'<!DOCTYPE html>\n<html>\n<body>503: Service Unavailable</body>\n</html>\n'

# Training state -------------------------------------------------------------------------------------------------------


def kinds(value) -> set[type]:
    if isinstance(value, dict):
        return {type(value)}.union(*map(kinds, value.keys()), *map(kinds, value.values()))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*map(kinds, value))
    return {type(value)}


@pytest.mark.R7
def test_a_checkpoint_holds_plain_types_only_and_fits_plain_timm(tmp_path):
    args = main.parse_args(toys.flags(teacher_path='t.pth', opt_betas='0.9 0.99', teacher_kwargs='drop_path_rate=None'))
    state = make_state(scaled=True)
    state.epoch = 3
    state.best_acc1 = 12.5
    contents = state.state_dict(vars(args), {})
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
    assert 'model_ema' not in state.state_dict({}, {})


def test_progress_comes_back_with_the_rate_of_the_schedule_and_the_options_of_the_flags():
    saved = make_state(gradient=3, scaled=True)
    saved.epoch, saved.best_acc1, saved.position, saved.step = 4, 12.5, 24, 43
    saved.scaler.load_state_dict({**saved.scaler.state_dict(), 'scale': 1024.0, '_growth_tracker': 17})
    state = make_state(lr=5e-4, weight_decay=0.2, scaled=True)
    state.load_progress(saved.state_dict({}, {}), CPU)
    assert (state.epoch, state.best_acc1, state.position, state.step) == (4, 12.5, 24, 43)
    toys.assert_same(state.optimizer.state_dict()['state'], saved.optimizer.state_dict()['state'])
    # Cosine from 5e-4 to 1e-5 over ten epochs, after epoch 4; the file's own rate was 1e-3.
    expected = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 4 / 10)) / 2
    assert [g['lr'] for g in state.optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-12)
    assert sorted(g['weight_decay'] for g in state.optimizer.param_groups) == [0, 0.2]
    assert state.scaler.state_dict() == saved.scaler.state_dict()
    assert state.scaler.get_scale() == 1024


@pytest.mark.parametrize('opt', ['adamw', 'sgd', 'lamb', 'adan', 'lookahead_adamw', 'madgrad', 'adafactor', 'lion'])
def test_every_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path, opt):
    def step(state: TrainingState, number: int) -> None:
        for parameter in state.model.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()

    saved = make_state(opt=opt)
    for number in range(8):
        step(saved, number)
    contents = toys.load(toys.save(tmp_path / 'checkpoint.pth', saved.state_dict({}, {})))
    state = make_state(opt=opt)
    state.model.load_state_dict(contents['model'])
    state.load_progress(contents, CPU)
    for number in range(8, 16):  # at the twelfth lookahead looks back
        step(saved, number), step(state, number)
    toys.assert_same(state.model.state_dict(), saved.model.state_dict())


@pytest.mark.parametrize('missing', ['optimizer', 'lr_scheduler', 'epoch'])
def test_a_file_without_optimizer_schedule_or_epoch_changes_nothing(missing):
    state, other = make_state(), make_state(gradient=3, lr=1.0)
    before = copy.deepcopy((state.optimizer.state_dict(), state.lr_scheduler.state_dict()))
    contents = other.state_dict({}, {})
    assert checkpoints.has_progress(contents)
    del contents[missing]
    assert not checkpoints.has_progress(contents)
    main.resume(main.parse_args(toys.flags(**toys.ALONE)), state, contents, steps=5)
    toys.assert_same((state.optimizer.state_dict(), state.lr_scheduler.state_dict()), before)
    assert (state.epoch, state.step, state.position, state.best_acc1) == (-1, 0, 0, 0.0)


def test_the_optimizer_of_another_model_is_refused():
    other = make_state(toys.student(depth=3))
    with pytest.raises(ValueError, match='parameter groups'):
        make_state().load_progress(other.state_dict({}, {}), CPU)


def released(state: TrainingState, epoch: int) -> dict:
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
    state.load_progress(released(saved, epoch=6), CPU)
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
    state.load_progress(make_state(scaled=True).state_dict({}, {}), CPU)
    assert not state.scaler.is_enabled()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'epoch': -2}, 'epoch is -2'),
        ({'epoch': '3'}, "epoch is '3'"),
        ({'epoch': 1.0}, 'epoch is 1.0'),
        ({'position': -1}, 'position is -1, no count'),
        ({'step': 2.5}, 'step is 2.5, no count'),
        ({'step': '0'}, "step is '0', no count"),
        ({'best_acc1': 'x'}, 'x'),
        ({'meters': {'names': ['loss'], 'totals': [[1.0, 2.0, 3.0]]}}, 'not as many values as names'),
        ({'format': checkpoints.FORMAT + 1}, 'newer than this program'),
    ],
)
def test_values_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_state().load_progress({**make_state().state_dict({}, {}), **changes}, CPU)


def test_moments_of_another_shape_than_their_parameter_are_refused():
    contents = copy.deepcopy(make_state().state_dict({}, {}))
    moments = contents['optimizer']['state'][4]
    moments['exp_avg'] = moments['exp_avg'].new_zeros([size + 1 for size in moments['exp_avg'].shape])
    with pytest.raises(ValueError, match='exp_avg number 4 has another shape'):
        make_state().load_progress(contents, CPU)


def test_a_state_says_how_far_it_has_come():
    state = make_state(torch.nn.Linear(3, 2))
    assert state.describe() == 'no epoch done'
    state.position, state.step = 1024, 8
    state.meters.update({'a': torch.tensor(1.0)}, 4)
    assert state.describe() == 'no epoch done, 1,024 images into the next'
    state.finish_epoch()
    assert (state.describe(), state.position, state.step) == ('epoch 0 done', 0, 8)
    assert state.meters.total is None


# The folder of a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


each_fault = pytest.mark.parametrize('fault', Disk.FAULTS)


class Clock:
    """Stands for the module `time`: nobody waits."""

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


@pytest.fixture
def save(tmp_path):
    """A function that saves the state of a step in the folder it is given, which may be none."""
    state = small_state()

    def write(folder: RunFolder, step: int, epoch: int | None = None, best: bool = False) -> None:
        state.step = step
        folder.save(state, {}, None if epoch is None else {'epoch': epoch}, best)

    return write


def step_of(path) -> int:
    return toys.load(path)['step']


def test_a_log_row_takes_the_place_of_its_epoch_and_of_later_ones(tmp_path):
    for epoch, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)]:
        RunFolder(tmp_path).save(small_state(), {}, {'train_loss': loss, 'epoch': epoch})
    assert toys.log_rows(tmp_path) == [{'train_loss': 3.0, 'epoch': 0}, {'train_loss': 2.5, 'epoch': 1}]


@each_fault
def test_a_save_that_fails_is_told_tried_again_and_made_good(tmp_path, disk, clock, save, capsys, fault):
    folder = RunFolder(tmp_path)
    save(folder, 1, epoch=0, best=True)
    before = listing(tmp_path)
    disk.fault = fault
    save(folder, 2, epoch=1, best=True)
    if fault == 'replace':  # the last one has its second name by then
        before['checkpoint-00000001.pth'] = before['checkpoint.pth']
    assert listing(tmp_path) == before
    line = f'warning: not saved: {tmp_path / "log.txt"}: No space left on device; training goes on, the next try is '
    assert capsys.readouterr().out == f'{line}in 60 s or with the next save\n'
    assert not folder.due()
    clock.now += 59
    assert not folder.due()
    clock.now += 1
    assert folder.due()
    save(folder, 3)  # the disk is still full
    assert listing(tmp_path) == before
    clock.now += 59
    assert not folder.due()
    disk.fault = None
    clock.now += 1
    assert folder.due()
    save(folder, 4)
    assert not folder.due()
    assert toys.log_rows(tmp_path) == [{'epoch': 0}, {'epoch': 1}]
    steps = {'checkpoint.pth': 4, 'best_checkpoint.pth': 2, 'checkpoint-00000001.pth': 1}
    assert listing(tmp_path).keys() == steps.keys() | {'log.txt'}
    assert {name: step_of(tmp_path / name) for name in steps} == steps


@each_fault
@pytest.mark.parametrize('name', checkpoints.KEPT)
def test_whichever_file_cannot_be_written_the_state_before_stays_and_the_end_makes_it_good(
    tmp_path, disk, clock, save, name, fault
):
    folder = RunFolder(tmp_path)
    save(folder, 1, epoch=0, best=True)
    disk.fault, disk.name = fault, name
    save(folder, 2, epoch=1, best=True)
    assert len(toys.log_rows(tmp_path)) == 1 + (name != 'log.txt')
    assert step_of(tmp_path / 'best_checkpoint.pth') == 1 + (name != 'best_checkpoint.pth')
    assert step_of(tmp_path / 'checkpoint.pth') == 1 + (name != 'checkpoint.pth')
    assert not list(tmp_path.glob('.*'))
    assert read_newest(tmp_path)[2] == []
    disk.fault = None
    folder.finish()
    assert clock.slept == [1.0]
    assert len(toys.log_rows(tmp_path)) == 2
    assert [step_of(tmp_path / name) for name in ('best_checkpoint.pth', 'checkpoint.pth')] == [2, 2]
    assert step_of(tmp_path / 'checkpoint-00000001.pth') == 1


def test_a_run_whose_last_state_cannot_be_written_says_so(tmp_path, disk, clock, save):
    folder = RunFolder(tmp_path)
    save(folder, 1)
    folder.finish()
    assert clock.slept == []  # there is nothing to be done
    disk.fault, disk.code = 0.5, errno.EIO
    save(folder, 2)
    with pytest.raises(run_dir.NotSavedError, match=r'checkpoint\.pth: Input/output error'):
        folder.finish()
    assert clock.slept == [1.0, 2.0, 4.0]
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {'checkpoint.pth': 1}


def test_log_best_and_last_are_written_in_this_order(tmp_path, save, monkeypatch):
    order = []
    write = checkpoints.write_durably
    monkeypatch.setattr(checkpoints, 'write_durably', lambda path, *rest: order.append(path.name) or write(path, *rest))
    save(RunFolder(tmp_path), 1, epoch=0, best=True)
    assert order == ['log.txt', 'best_checkpoint.pth', 'checkpoint.pth']
    save(RunFolder(tmp_path), 2)
    assert order[3:] == ['checkpoint.pth']


@pytest.mark.parametrize('links', [True, False], ids=['links', 'no links'])
@pytest.mark.parametrize('keep', [0, 1, 3])
def test_no_more_than_last_best_and_the_history_asked_for_are_kept(tmp_path, save, monkeypatch, keep, links):
    seen = []

    def note(call):
        return lambda *args: seen.append({path.name for path in tmp_path.iterdir()}) or call(*args)

    for name in ('fsync', 'replace', 'unlink'):  # at every one of these the folder can be left as it is
        monkeypatch.setattr(os, name, note(getattr(os, name)))
    monkeypatch.setattr(os, 'link', note(os.link) if links else full_disk)
    folder = RunFolder(tmp_path, keep)
    for step in range(1, 8):
        save(folder, step, epoch=step, best=step == 2)
    assert step_of(tmp_path / 'best_checkpoint.pth') == 2
    earlier = {f'checkpoint-{step:08d}.pth' for step in range(7 - keep, 7)}
    assert listing(tmp_path).keys() == {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'} | earlier
    assert all(step_of(tmp_path / name) == int(name[11:19]) for name in earlier)
    for names in seen:
        assert len(names - {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'}) <= keep + 1
        assert sum(name.startswith('.') for name in names) <= 1
    assert max(len(names) for names in seen) == 3 + keep + 1  # it does look in the midst of writes


def test_a_damaged_last_state_never_drives_out_a_good_one_before_it(tmp_path, save):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        save(folder, step)
    (tmp_path / 'checkpoint.pth').write_bytes(HTML)
    found = []
    again = RunFolder(tmp_path, last_step=None)
    write, again._rotate = again._rotate, lambda: (write(), found.extend(read_newest(tmp_path)[:1]))
    save(again, 3)
    assert [path.name for path in found] == ['checkpoint-00000001.pth']
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {
        'checkpoint.pth': 3,
        'checkpoint-00000001.pth': 1,
    }


def test_a_folder_knows_the_last_state_it_began_with(tmp_path, save):
    save(RunFolder(tmp_path), 5)
    save(RunFolder(tmp_path, last_step=5), 6)
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {
        'checkpoint.pth': 6,
        'checkpoint-00000005.pth': 5,
    }


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    ours = ['.checkpoint.pth.tmp', '.best_checkpoint.pth.tmp', '.log.txt.tmp', '.checkpoint-00000012.pth.tmp']
    others = ['.notes.tmp', 'checkpoint.pth.tmp', '.checkpoint.pth', 'weights.pth', 'checkpoint-00000012.pth', '.tmp']
    for name in ours + others:
        (tmp_path / name).write_text('x')
    RunFolder(tmp_path)
    assert listing(tmp_path).keys() == set(others)


def test_a_save_is_due_by_the_clock(tmp_path, clock, save):
    folder = RunFolder(tmp_path, interval=600)
    clock.now += 599
    assert not folder.due()
    clock.now += 1
    assert folder.due()
    save(folder, 1)
    assert not folder.due()
    clock.now += 10**9
    assert folder.due()
    assert not RunFolder(tmp_path).due()


def test_without_a_folder_nothing_is_kept_and_nothing_is_due(clock, save):
    folder = RunFolder(None, interval=1)
    clock.now += 10
    save(folder, 1, epoch=0, best=True)
    folder.finish()
    assert not folder.due()
    assert folder.saves == 0
    assert 'no --output_dir' in folder.describe()


class Calls:
    """Stands for `engine.Watch` and notes that it was asked."""

    looks = 0

    def look(self) -> None:
        self.looks += 1


@pytest.mark.parametrize('every', [0, 2])
def test_steps_and_images_are_counted_and_saved_every_so_many(tmp_path, every):
    state, watch = small_state(), Calls()
    folder = RunFolder(tmp_path, keep=10)
    keeper = run_dir.Keeper(state, folder, stopping.RankConsensus(stopping.StopSignals()), watch, {}, 8, every)
    for _ in range(5):
        keeper.after_step()
    assert (state.step, state.position) == (5, 40)
    saved = sorted(step_of(path) for path in checkpoints.find_checkpoints(tmp_path))
    assert saved == ([2, 4] if every else [])
    assert watch.looks == (2 if every else 0)  # nothing unsound is kept


@pytest.mark.parametrize('when', ['after_step', 'poll', 'drain', 'finish'])
def test_a_run_that_is_told_to_stop_is_saved_and_says_where(tmp_path, when):
    signals = stopping.StopSignals()
    keeper = run_dir.Keeper(small_state(), RunFolder(tmp_path), stopping.RankConsensus(signals), Calls(), {}, 8)
    signals.received = signal.SIGTERM
    with pytest.raises(
        stopping.StoppedError, match=r'^stopped by SIGTERM: no epoch done.*, saved in .*checkpoint\.pth'
    ):
        getattr(keeper, when)()
    saved = toys.load(tmp_path / 'checkpoint.pth')
    assert (saved['step'], saved['position']) == ((1, 8) if when == 'after_step' else (0, 0))


def test_a_run_that_is_told_to_stop_and_cannot_be_saved_says_that(tmp_path, disk, clock):
    signals = stopping.StopSignals()
    keeper = run_dir.Keeper(small_state(), RunFolder(tmp_path), stopping.RankConsensus(signals), Calls(), {}, 8)
    signals.received, disk.fault = signal.SIGTERM, 0.5
    with pytest.raises(run_dir.NotSavedError, match='No space'):
        keeper.after_step()
