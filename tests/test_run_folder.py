"""The files in --output_dir: what --resume auto finds there, and what is never lost."""

import os
import signal

import pytest
import torch
import toys

import checkpoints
import engine

pytestmark = pytest.mark.usefixtures('few_generated_images')


def test_best_checkpoint_follows_the_raw_model(run, tmp_path, monkeypatch, epochs):
    accuracies = iter([40.0, 60.0, 50.0, 55.0, 65.0])

    def evaluate(*_) -> dict[str, float]:
        return {'loss': 1.0, 'acc1': next(accuracies), 'acc5': 90.0, 'images': 8}

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    last, best = tmp_path / 'checkpoint.pth', tmp_path / 'best_checkpoint.pth'
    run(epochs=3)
    assert (toys.load(last)['epoch'], toys.load(last)['best_acc1']) == (2, 60)
    assert (toys.load(best)['epoch'], toys.load(best)['best_acc1']) == (1, 60)
    run(epochs=4, resume=last)  # better than the last epoch, worse than the best
    assert (toys.load(last)['epoch'], toys.load(best)['epoch']) == (3, 1)
    run(epochs=5, resume=last)
    assert toys.load(best)['epoch'] == 4


def test_finished_run_has_nothing_to_train(run, tmp_path, capsys, epochs):
    before = run(epochs=2)
    epochs.clear()
    assert run(epochs=2, resume=tmp_path / 'checkpoint.pth') == before
    assert epochs == []
    assert '--epochs 2' in capsys.readouterr().out


@pytest.mark.parametrize('resumed', ['best_checkpoint.pth', 'weights.pth', None])
def test_finished_run_is_not_overwritten(run, tmp_path, capsys, resumed):
    run(**toys.ALONE)
    toys.save(tmp_path / 'weights.pth', toys.student().state_dict())
    before = toys.listing(tmp_path)
    resume = str(tmp_path / resumed) if resumed else None
    error = toys.refused(capsys, **toys.ALONE, epochs=2, output_dir=tmp_path, resume=resume)
    assert f'--output_dir {tmp_path}: already contains log.txt and best_checkpoint.pth and checkpoint.pth' in error
    assert toys.listing(tmp_path) == before


@pytest.mark.parametrize('text', ['{"epoch": 299}\n', 'hello\n', '[1]\n'])
def test_foreign_log_is_refused_and_kept(epochs, tmp_path, capsys, text):
    (tmp_path / 'log.txt').write_text(text)
    assert '--output_dir' in toys.refused(capsys, **toys.ALONE, output_dir=tmp_path)
    assert (tmp_path / 'log.txt').read_text() == text
    assert not epochs


def test_kill_between_two_files_keeps_the_best_weights(run, tmp_path, monkeypatch):
    write = checkpoints.write_durably

    def write_or_die(path, *rest):
        if path.name == 'checkpoint.pth' and (tmp_path / 'best_checkpoint.pth').exists():
            raise toys.KilledError
        write(path, *rest)

    monkeypatch.setattr(checkpoints, 'write_durably', write_or_die)
    with pytest.raises(toys.KilledError):
        run(**toys.ALONE)
    assert toys.load(tmp_path / 'best_checkpoint.pth')['epoch'] == 0


@pytest.mark.R13
@pytest.mark.parametrize(
    ('changes', 'word'),
    [
        ({'epoch': '3'}, "epoch must be a whole number of at least -1, not '3'"),
        ({'epoch': -5}, 'epoch must be a whole number of at least -1, not -5'),
        ({'best_acc1': 'x'}, 'x'),
        ({'args': {'opt': 'lamb'}}, '--opt lamb'),
        ({'optimizer': {}}, 'optimizer'),
    ],
)
def test_checkpoint_with_a_bad_value_is_refused(run, tmp_path, capsys, changes, word):
    run(**toys.ALONE)
    odd = toys.save(tmp_path / 'odd.pth', {**toys.load(tmp_path / 'checkpoint.pth'), **changes})
    error = toys.refused(capsys, **toys.ALONE, resume=odd, output_dir=tmp_path / 'new', epochs=2)
    assert f'--resume {odd}' in error
    assert word in error


def test_auto_starts_or_continues(run, tmp_path, capsys, epochs):
    run(resume='auto')
    assert f'auto: no checkpoint in {tmp_path}, starting a new run' in toys.line_with(capsys, 'resume ')
    rows = run(resume='auto', epochs=2)
    assert 'resume      auto: epoch 0 done, EMA of the checkpoint, best Acc@1 ' in capsys.readouterr().out
    assert [call.epoch for call in epochs] == [0, 1]
    assert [row['epoch'] for row in rows] == [0, 1]


@pytest.mark.parametrize('resume', ['auto', '{folder}/checkpoint.pth'])
@pytest.mark.parametrize('damage', [b'', b'<html>404</html>', None], ids=['empty', 'html', 'truncated'])
def test_damaged_checkpoint_falls_back_to_the_previous_one(run, tmp_path, capsys, epochs, resume, damage):
    run(epochs=2)
    last = tmp_path / 'checkpoint.pth'
    last.write_bytes(last.read_bytes()[:-100] if damage is None else damage)
    (earlier,) = tmp_path.glob('checkpoint-*.pth')
    assert toys.load(earlier)['epoch'] == 0
    capsys.readouterr(), epochs.clear()
    rows = run(epochs=2, resume=resume.format(folder=tmp_path))
    warning = toys.line_with(capsys, 'warning: --resume')
    assert 'checkpoint.pth is damaged' in warning
    assert f'falling back to {earlier.name}' in warning
    assert [call.epoch for call in epochs] == [1]
    assert [row['epoch'] for row in rows] == [0, 1]
    assert {toys.load(path)['epoch'] for path in tmp_path.glob('checkpoint*.pth')} == {0, 1}


@pytest.mark.parametrize('resume', ['auto', '{folder}/checkpoint.pth'])
def test_folder_with_only_damaged_checkpoints_is_refused(run, tmp_path, capsys, epochs, resume):
    run(epochs=2)
    for path in tmp_path.glob('*.pth'):
        path.write_bytes(b'')
    before = toys.listing(tmp_path)
    capsys.readouterr()
    error = toys.refused(capsys, resume=resume.format(folder=tmp_path), epochs=3, output_dir=tmp_path, **toys.ALONE)
    assert all(f'{name} is damaged' in error for name in before if name.endswith('.pth'))
    assert toys.listing(tmp_path) == before


@pytest.mark.parametrize(('keep', 'earlier'), [(None, [4]), (0, []), (2, [2, 4])])
def test_keep_limits_older_checkpoints(run, tmp_path, epochs, monkeypatch, keep, earlier):
    finish_epoch = engine.finish_epoch

    def counted(trainer, *rest):
        trainer.state.step += 2
        return finish_epoch(trainer, *rest)

    monkeypatch.setattr(engine, 'finish_epoch', counted)
    run(epochs=3, keep=keep)
    assert sorted(int(path.name[11:19]) for path in tmp_path.glob('checkpoint-*.pth')) == earlier


@pytest.mark.R13
def test_changed_flags_are_shown_in_a_table(run, tmp_path, capsys, epochs):
    run(drop_path=0.1)
    capsys.readouterr()
    changed = {'lr': 0.3, 'epochs': 2, 'batch_size': 4, 's_id': '0 1 2', 'num_workers': 1, 'print_freq': 3}
    run(resume='auto', **changed)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if 'arguments changed since the checkpoint' in line)
    table = [line.split(maxsplit=1) for line in lines[start + 2 : start + 7]]
    assert {flag: ' '.join(values.split()) for flag, values in table} == {
        '--lr': '0.0005 0.3',
        '--epochs': '1 2',
        '--batch-size': '8 4',
        '--s-id': '0 1 -1 0 1 2',
        '--drop-path': '0.1 0.0',
    }
    assert not lines[start + 7].startswith(' ')


@pytest.mark.R13
def test_no_table_without_changed_flags(run, capsys, epochs):
    run()
    run(resume='auto')
    assert 'arguments changed' not in capsys.readouterr().out


@pytest.mark.R13
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'model': 'deit_small_patch16_224'}, 'was trained with --model deit_tiny_patch16_224, but --model is deit_'),
        ({'model_kwargs': 'patch_size=8 embed_dim=32 depth=4 num_heads=4'}, 'was trained with --model-kwargs'),
        ({'seed': 1}, 'was trained with --seed 0, now it is 1'),
        ({'opt': 'sgd'}, 'was trained with --opt adamw, now it is sgd'),
        ({'data_set': 'FOLDER', 'data_path': '{tree}'}, 'has a head of 10 classes, but 2 are needed'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_resume_refuses_another_model_seed_or_optimizer(run, files, tmp_path, capsys, epochs, changes, words):
    run(**toys.ALONE)
    before = toys.listing(tmp_path)
    capsys.readouterr(), epochs.clear()
    changes = {key: str(value).format(tree=files / 'tree') for key, value in changes.items()}
    error = toys.refused(capsys, **{**toys.ALONE, **changes}, epochs=2, resume='auto', output_dir=tmp_path)
    assert f'--resume auto{" with --model deit_tiny_patch16_224" * ("data_set" in changes)}: {words}' in error
    assert (toys.listing(tmp_path), epochs) == (before, [])


@pytest.mark.R13
@pytest.mark.parametrize(
    ('counts', 'names', 'words'),
    [
        ([5, 4], None, 'was trained on 8 images of 2 classes, now there are 9 of 2'),
        ([4, 4], ['c0', 'x'], 'was trained on classes with other names'),
        ([4, 4], None, None),
    ],
    ids=['images', 'names', 'another place'],
)
def test_resume_refuses_other_data(run, files, tmp_path, capsys, epochs, counts, names, words):
    flags = {**toys.ALONE, 'data_set': 'FOLDER', 'batch_size': 4, 'output_dir': tmp_path / 'out'}
    run(**flags, data_path=files / 'tree')
    for split, numbers in (('train', counts), ('val', [1, 1])):
        toys.write_images(tmp_path / 'data' / split, numbers, 32)
        for i, name in enumerate(names or ()):
            (tmp_path / 'data' / split / f'c{i}').rename(tmp_path / 'data' / split / name)
    flags |= {'data_path': tmp_path / 'data', 'resume': 'auto', 'epochs': 2}
    capsys.readouterr()
    if words is None:
        assert len(run(**flags)) == 2
        return
    error = toys.refused(capsys, **flags)
    assert f'--data-path {tmp_path / "data"}: --resume auto {words}' in error


def test_teacher_weights_are_in_no_file(through):
    names = set(toys.teacher().state_dict()) - set(toys.student().state_dict())
    assert len(names) > 10
    for path in through['float32'].iterdir():
        data = path.read_bytes()
        assert not any(name.encode() in data for name in names)
        if path.suffix == '.pth':
            assert toys.load(path)['model'].keys() == toys.student().state_dict().keys()


def test_signal_while_reading_is_not_damage(run, tmp_path, monkeypatch, capsys):
    run(**toys.ALONE)
    before = toys.listing(tmp_path)
    read = torch.load

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(**toys.ALONE, epochs=2, resume='auto')
    assert stopped.value.code == 128 + signal.SIGTERM
    assert 'damaged' not in ''.join(capsys.readouterr())
    assert toys.listing(tmp_path) == before
