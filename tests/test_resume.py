"""Resuming and fine-tuning. An interrupted run must end in the same bits as an uninterrupted one."""

import math
import os
import shutil
import signal

import pytest
import torch
import toys

import checkpoints
import engine
import utils
from loaders import DevicePrefetcher, LoaderBuilder

pytestmark = pytest.mark.usefixtures('few_generated_images')


@pytest.mark.parametrize('changes', [{}, {'model': 'deit_tiny_distilled_patch16_224', 'amp_dtype': 'float16'}])
def test_resume_between_epochs_is_exact(run, tmp_path, monkeypatch, changes):
    flags = {'epochs': 2, 'drop_path': 0.1, 'lr': 0.3, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'eval_ema': True}
    flags |= {'teacher_kwargs': f'{toys.RUN["teacher_kwargs"]} drop_path_rate=0.3', **changes}
    rows = run(**flags, output_dir=tmp_path / 'through')
    finish_epoch = engine.finish_epoch

    def killed_in_epoch_1(trainer, *rest):
        if trainer.state.epoch == 0:
            raise toys.KilledError
        return finish_epoch(trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'finish_epoch', killed_in_epoch_1)
        with pytest.raises(toys.KilledError):
            run(**flags)
    assert run(**flags, resume=tmp_path / 'checkpoint.pth') == rows
    through, resumed = (toys.load(folder / 'checkpoint.pth') for folder in (tmp_path / 'through', tmp_path))
    for key in ('model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'best_acc1'):
        toys.assert_same(resumed[key], through[key])
    assert [row['epoch'] for row in rows] == [0, 1]
    assert abs(rows[0]['test_loss'] - rows[1]['test_loss']) > 1e-3  # the model did change


def test_resume_without_ema(run, tmp_path):
    run(no_model_ema=True)
    rows = run(no_model_ema=True, epochs=2, resume=tmp_path / 'checkpoint.pth')
    assert [row['epoch'] for row in rows] == [0, 1]
    assert 'model_ema' not in toys.load(tmp_path / 'checkpoint.pth')


def released_in_mid_run(path, epoch: int) -> dict:
    """Writes a checkpoint as the release did after an epoch. Its optimizer counted steps as ints."""
    model = toys.student()
    state = toys.state(model, **toys.ALONE)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    state.optimizer.step()
    optimizer = state.optimizer.state_dict()
    for moments in optimizer['state'].values():
        moments['step'] = int(moments['step'])
    contents = toys.as_release(model.state_dict(), toys.student().state_dict(), optimizer=optimizer, epoch=epoch)
    toys.save(path, contents)
    return contents


@pytest.mark.R8
def test_release_checkpoint_resumes_after_its_epoch(run, tmp_path, capsys, epochs):
    contents = released_in_mid_run(tmp_path / 'released.pth', epoch=6)
    # A decay of 1 keeps the EMA weights as they were in the file. There they differ from the raw weights.
    rows = run(resume=tmp_path / 'released.pth', epochs=8, model_ema_decay=1, lr=64 * 5e-4, warmup_epochs=2)
    assert [row['epoch'] for row in rows] == [7]
    assert 'epoch 6 done' in capsys.readouterr().out
    (call,) = epochs
    assert call.epoch == 7
    toys.assert_same(call.student.model.state_dict(), contents['model'])
    for index, moments in call.optimizer['state'].items():
        assert moments['step'] == 1
        assert torch.equal(moments['exp_avg'], contents['optimizer']['state'][index]['exp_avg'])
        assert torch.equal(moments['exp_avg_sq'], contents['optimizer']['state'][index]['exp_avg_sq'])
    # The learning rate of the eighth epoch: six eighths of the cosine, from a peak of 64 * 5e-4 * 8/512.
    rate = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 6 / 8)) / 2
    assert [group['lr'] for group in call.optimizer['param_groups']] == pytest.approx([rate] * 2)
    toys.assert_same(toys.load(tmp_path / 'checkpoint.pth')['model_ema'], contents['model_ema'])


def test_release_checkpoint_trains_on(run, tmp_path):
    released_in_mid_run(tmp_path / 'released.pth', epoch=0)
    (row,) = run(resume=tmp_path / 'released.pth', epochs=2, amp_dtype='float16')
    toys.assert_sound(row)
    assert toys.load(tmp_path / 'checkpoint.pth')['scaler']['scale'] <= 65536
    steps = {m['step'].item() for m in toys.load(tmp_path / 'checkpoint.pth')['optimizer']['state'].values()}
    assert steps <= {1, 2, 3}


@pytest.mark.parametrize('start', [None, 1])
def test_weights_only_file_starts_a_new_run(run, files, tmp_path, capsys, epochs, start):
    rows = run(resume=files / 'student.pth', start_epoch=start, epochs=2, model_ema_decay=1)
    assert [row['epoch'] for row in rows] == list(range(start or 0, 2))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('resume'))
    assert 'weights only' in line
    assert f'epoch {start or 0}' in line
    assert 'EMA starts from these weights' in line
    assert epochs[0].optimizer['state'] == {}
    weights = toys.load(files / 'student.pth')['model']
    toys.assert_same(epochs[0].student.model.state_dict(), weights)
    toys.assert_same(toys.load(tmp_path / 'checkpoint.pth')['model_ema'], weights)


@pytest.mark.parametrize('taught', [False, True], ids=['without_teacher', 'with_teacher'])
def test_finetune_adapts_positions_and_head(run, files, tmp_path, capsys, epochs, taught):
    path = toys.save(tmp_path / 'teacher.pth', toys.teacher(2, 48).state_dict())
    tree = tmp_path / 'images'
    toys.write_images(tree / 'train', [4, 4], 48)
    toys.write_images(tree / 'val', [1, 1], 48)
    flags = {'teacher_path': path} if taught else toys.ALONE
    run(finetune=files / 'student.pth', data_set='FOLDER', data_path=tree, input_size=48, **flags)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('finetune'))
    assert 'position embeddings' in line
    assert 'head' in line
    (call,) = epochs
    assert call.train_mode is taught
    assert (call.teacher is not None) is taught
    state, original = call.student.model.state_dict(), toys.load(files / 'student.pth')['model']
    adapted = {key for key in state if state[key].shape != original[key].shape}
    assert adapted == {'pos_embed', 'head.weight', 'head.bias'}
    assert state['pos_embed'].shape[1] == 1 + 6 * 6
    assert torch.equal(state['pos_embed'][:, 0], original['pos_embed'][:, 0])
    toys.assert_same(
        {k: v for k, v in state.items() if k not in adapted}, {k: original[k] for k in state if k not in adapted}
    )


def interrupted(through, after: int, folder, **changes) -> None:
    """Writes what a run leaves when killed after a step: its checkpoint (with changes), log and best checkpoint."""
    state = {**toys.load(through / f'checkpoint-{after:08d}.pth'), **changes}
    (folder / 'checkpoint.pth').write_bytes(checkpoints.serialize(state))
    if state['epoch'] == 0:
        lines = (through / 'log.txt').read_text().splitlines(keepends=True)
        (folder / 'log.txt').write_text(lines[0])
        shutil.copy(through / 'checkpoint-00000004.pth', folder / 'best_checkpoint.pth')


def test_uninterrupted_run_trains_and_saves_every_step(through):
    for folder in through.values():
        rows = toys.log_rows(folder)
        assert [row['epoch'] for row in rows] == [0, 1]
        assert abs(rows[0]['test_loss'] - rows[1]['test_loss']) > 1e-3
        assert max(row['test_acc1'] for row in rows) == toys.load(folder / 'checkpoint.pth')['best_acc1']
        states = [toys.load(folder / f'checkpoint-{step:08d}.pth') for step in range(1, 8)]
        # The checkpoint of the last step of an epoch is written again after evaluation.
        assert [(s['epoch'], s['position']) for s in states] == [
            (-1, 4), (-1, 8), (-1, 12), (0, 0), (0, 4), (0, 8), (0, 12)
        ]  # fmt: skip
        assert not any('teacher' in name for name in toys.listing(folder))


@pytest.mark.parametrize('step', [1, 3, 4, 6, 7])
@pytest.mark.parametrize('kind', ['float32', 'float16'])
def test_resume_in_mid_epoch_is_exact(run, through, tmp_path, kind, step):
    interrupted(through[kind], step, tmp_path)
    run(**toys.LONG, **(toys.HALF if kind == 'float16' else {}))
    assert toys.differing(toys.outcome(tmp_path), toys.outcome(through[kind])) == set()


@pytest.mark.more
def test_batches_that_are_read_ahead_do_not_change_what_is_saved(run, through, tmp_path, monkeypatch):
    toys.fake_streams(monkeypatch)
    train, cpu = LoaderBuilder.train, torch.device('cpu')
    monkeypatch.setattr(LoaderBuilder, 'train', lambda *args: DevicePrefetcher(train(*args), cpu, ()))
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    run(**toys.LONG, output_dir=whole)
    for step in range(1, 8):
        ours, plain = (toys.load(folder / f'checkpoint-{step:08d}.pth') for folder in (whole, through['float32']))
        toys.assert_same({**ours, 'args': None}, {**plain, 'args': None})
    resumed.mkdir()
    interrupted(whole, 6, resumed)
    run(**toys.LONG, output_dir=resumed)
    assert toys.differing(toys.outcome(resumed), toys.outcome(through['float32'])) == set()


@toys.forks
def test_resume_in_mid_epoch_is_exact_for_shards(run, files, tmp_path, capsys):
    flags = {**toys.LONG, **toys.SHARDS, 'data_path': files / 'shards', 'repeated_aug': True, 'num_workers': 2}
    through, resumed = tmp_path / 'through', tmp_path / 'resumed'
    run(**flags, output_dir=through)
    assert 'Accuracy of the network on the 8 test images' in capsys.readouterr().out
    resumed.mkdir()
    interrupted(through, 6, resumed)
    run(**flags, output_dir=resumed)
    assert toys.differing(toys.outcome(resumed), toys.outcome(through)) == set()


def test_checkpoint_of_a_version_with_skipped_steps_resumes(run, through, tmp_path):
    flags = toys.load(through['float32'] / 'checkpoint.pth')['args']
    interrupted(through['float32'], 6, tmp_path, skipped=2, args={**flags, 'non_finite': 'skip:3'})
    run(**toys.LONG)
    assert toys.differing(toys.outcome(tmp_path), toys.outcome(through['float32'])) == set()


@pytest.mark.parametrize(
    ('dropped', 'differs'),
    [
        ({'position': 0}, {'model', 'optimizer', 'log'}),
        ({'step': 0}, {'model', 'log'}),
        ({'model_ema': None}, {'model_ema', 'log'}),
        ({'optimizer': None}, {'model', 'optimizer'}),
        ({'meters': {}}, {'log'}),
        ({'best_acc1': 99.0}, {'best_acc1'}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_every_part_of_the_state_matters(run, through, tmp_path, dropped, differs):
    if 'optimizer' in dropped:
        whole = toys.load(through['float32'] / 'checkpoint-00000006.pth')['optimizer']
        dropped = {'optimizer': {**whole, 'state': {}}}
    interrupted(through['float32'], 6, tmp_path, **dropped)
    run(**toys.LONG)
    assert toys.differing(toys.outcome(tmp_path), toys.outcome(through['float32'])) >= differs


def die() -> None:
    raise toys.KilledError


PLACES = {
    'the first step': (utils, 'seed_step', 1),
    'a step': (utils, 'seed_step', 7),
    'an evaluation': (engine, 'count_correct', 3),
    'a save': (checkpoints, 'serialize', 5),
}


@toys.forks
@pytest.mark.parametrize(('place', 'workers'), [*((place, 0) for place in PLACES), ('a step', 2)])
def test_run_that_dies_resumes_exactly(run, through, tmp_path, monkeypatch, place, workers):
    with monkeypatch.context() as patch:
        toys.after_calls(patch, *PLACES[place], die)
        with pytest.raises(toys.KilledError):
            run(**toys.LONG, num_workers=workers)
    run(**toys.LONG)
    assert toys.differing(toys.outcome(tmp_path), toys.outcome(through['float32'])) == set()


@toys.forks
@pytest.mark.parametrize(
    ('number', 'place', 'workers'),
    [
        (signal.SIGTERM, 'the first step', 0),
        (signal.SIGINT, 'a step', 2),
        (signal.SIGUSR1, 'an evaluation', 0),
        (signal.SIGTERM, 'a save', 0),
    ],
)
def test_signal_saves_and_loses_no_step(run, through, tmp_path, monkeypatch, capsys, number, place, workers):
    flags = {**toys.LONG, 'save_interval_steps': 0, 'num_workers': workers}
    module, name, count = PLACES[place]
    with monkeypatch.context() as patch:
        # Only the signal and the end of an epoch save.
        toys.after_calls(patch, module, name, 1 if place == 'a save' else count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            run(**flags)
    assert stopped.value.code == 128 + number
    error = capsys.readouterr().err
    assert error.startswith(f'main.py: error: stopped by {number.name}: ')
    assert error.count('\n') == 1
    assert f'saved in {tmp_path / "checkpoint.pth"}' in error
    steps = {'the first step': 1, 'a step': 7, 'an evaluation': 4, 'a save': 4}
    # The ranks agree to stop after a step, so a signal during a save stops after the next step.
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] - steps[place] in ((0, 1) if place == 'a save' else (0,))
    run(**flags)
    assert toys.differing(toys.outcome(tmp_path), toys.outcome(through['float32'])) == set()


def test_signal_before_training_saves_nothing(run, tmp_path, monkeypatch, capsys):
    toys.after_calls(monkeypatch, LoaderBuilder, 'val', 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 143
    assert capsys.readouterr().err == 'main.py: error: stopped by SIGTERM: nothing was trained\n'
    assert toys.listing(tmp_path) == {}


def test_run_killed_before_its_first_checkpoint_starts_over(run, tmp_path):
    (tmp_path / 'log.txt').write_text('{"epoch": 0}\n')
    (row,) = run(resume='auto', epochs=1)
    toys.assert_sound(row)
