"""What a new user meets: wrong commands and the line each gets, weights that say what they are, folders in use."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import toys

import checkpoints
import engine
import locks
import main
import models
import run_dir
from losses import ManifoldDistillationLoss
from readers import BadImageError

pytestmark = pytest.mark.usefixtures('few_generated_images')

OTHER_PATCHES = 'patch_size=16 embed_dim=32 depth=4 num_heads=2'


@pytest.fixture(scope='module')
def place(files, tmp_path_factory):
    """Files and folders that are not what they seem, beside those of `files`."""
    place = tmp_path_factory.mktemp('place')
    for name in ('tree', 'unlike'):
        shutil.copytree(files / name, place / name)
    shutil.copytree(files / 'tree' / 'val', place / 'tests_only' / 'test')
    shutil.copytree(files / 'tree' / 'val', place / 'gap' / 'val')
    (place / 'gap' / 'val' / 'nothing').mkdir()
    (place / 'cifar').mkdir()
    (place / 'cifar-10-batches-py').mkdir()
    for split in ('train', 'val'):
        toys.write_images(place / 'names' / split, [1, 1, 1], 8)
    for i, name in enumerate(('cats', 'dogs')):
        (place / 'names' / 'val' / f'c{i}').rename(place / 'names' / 'val' / name)
    (place / 'page.pth').write_text('<!DOCTYPE html><html>404</html>')
    (place / 'pointer.pth').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n')
    toys.save(place / 'whole.pth', toys.student())
    teacher = {f'module.backbone.{name}': x for name, x in toys.student().state_dict().items()}
    teacher['module.head.mlp.0.weight'] = torch.zeros(3, 3)
    toys.save(place / 'dino.pth', {'student': {}, 'teacher': teacher, 'epoch': 3})
    safetensors.torch.save_file(toys.student().state_dict(), place / 'named.pth')
    toys.save(place / 'checkpoint.pth', toys.student().state_dict())
    return place


# The flag and value that are wrong come first, then other flags, then the words of the answer.
WRONG = [
    # paths
    ({'resume': '{place}', 'eval': True}, 'is a folder; did you mean {place}/checkpoint.pth?'),
    ({'teacher_path': '{place}/dinno.pth'}, 'No such file or directory; did you mean {place}/dino.pth?'),
    ({'data_path': '{place}/page.pth', **toys.FOLDER}, 'is a file; a folder is needed'),
    ({'output_dir': '{place}/page.pth'}, 'is a file; a folder is needed'),
    ({'data_path': '{place}/tree/train', **toys.FOLDER}, 'use its parent, --data-path {place}/tree'),
    ({'data_path': '{place}/trees', **toys.FOLDER}, 'no such folder; did you mean {place}/tree?'),
    ({'data_path': '{place}/no/such/place', **toys.FOLDER}, 'no such folder; there is no {place}/no'),
    ({'data_path': '{place}/tests_only', **toys.FOLDER}, 'there is {place}/tests_only/test: rename it to val'),
    ({'data_path': '{place}/gap', **toys.FOLDER}, '{place}/gap/val has class folders without images: nothing'),
    ({'data_path': '{place}/names', **toys.FOLDER}, 'only in train/: c0, c1; only in val/: cats, dogs'),
    ({'data_path': '{place}/cifar', 'data_set': 'CIFAR10', **toys.ALONE},
     'there is no folder cifar-10-batches-py in it; unpack cifar-10-python.tar.gz there'),
    ({'data_path': '{place}/cifar-10-batches-py', 'data_set': 'CIFAR10', **toys.ALONE}, 'use --data-path {place}'),
    # weights files
    ({'teacher_path': '{place}/whole.pth'}, 'save model.state_dict() and not the model'),
    ({'finetune': '{place}/page.pth'}, 'it is an HTML or XML page'),
    ({'finetune': '{place}/pointer.pth'}, 'it is a pointer of Git LFS; fetch the file itself with `git lfs pull`'),
    ({'finetune': '{place}/dino.pth'}, '--checkpoint-key teacher takes the weights under that key'),
    ({'finetune': '{place}/dino.pth', 'checkpoint_key': 'ema', **toys.ALONE}, 'under ema, only under teacher'),
    ({'checkpoint_key': 'ema', **toys.ALONE}, 'needs the file, --teacher-path or --finetune'),
    ({'finetune': '{place}/dino.pth', 'pretrained': True}, '--pretrained names other weights; only one can be used'),
    # models
    ({'model_kwargs': 'patch_size=8,depth=4'}, 'put spaces between the pairs: patch_size=8 depth=4'),
    ({'model_kwargs': 'path_size=8'}, 'with path_size=8: VisionTransformer.__init__() got an unexpected keyword'),
    ({'model_kwargs': 'in_chans=1 depth=2'}, 'cannot build or run it with in_chans=1: '),
    ({'teacher_kwargs': 'path_size=8'}, '--teacher-kwargs path_size=8: timm cannot build or run it with path_size=8'),
    ({'token_align': 'error', 'model_kwargs': OTHER_PATCHES}, 'block 0 of --model deit_tiny_patch16_224 and block 0 of '
     '--teacher-model cait_s24_224 with images of 32 pixels: the student has 2×2 patch tokens and the teacher 4×4. '
     '--teacher-input-size 16 gives the same grids.'),
    ({'max_patches': 16, 'token_align': 'merge', 'model_kwargs': OTHER_PATCHES},
     'the student has 2×2 patch tokens and the teacher 4×4; with --max-patches 16 they become 2×2 and 4×4; '
     '--max-patches 4 works. '),
]  # fmt: skip


def filled(value, place):
    return value.format(place=place) if isinstance(value, str) else value


@pytest.mark.parametrize('wrong', WRONG, ids=[wrong[-1][:40] for wrong in WRONG])
def test_wrong_command_is_answered_in_one_line(wrong, files, place, tmp_path, epochs, capsys):
    changes, *words = wrong
    changes = {name: filled(value, place) for name, value in changes.items()}
    name, value = next(iter(changes.items()))
    flags = {'teacher_path': files / 'teacher.pth', 'output_dir': tmp_path, **changes}
    error = toys.refused(capsys, **flags)
    flag = f'--{name} {value}'.replace('_', '-')
    assert flag in error.replace('_', '-') or f'{flag.split()[0]} ' in error.replace('_', '-')
    assert all(filled(word, place) in error for word in words), error
    assert not epochs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('words', 'answer'),
    [
        (['--input-size', '224', '224'], '224: unrecognized argument; --input-size takes one value'),
        (['--eval', 'true'], 'true: unrecognized argument; --eval takes no value'),
        (['--lr=1e-3', '--learning-rate', '1'], '--learning-rate: unrecognized argument; did you mean --lr?'),
    ],
)
def test_stray_word_names_the_flag_before_it(words, answer, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f'main.py: error: {answer}\n'


def test_home_folder_and_spaces(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(files))
    flags = {**toys.FOLDER, 'batch_size': 2, 'epochs': 1}
    assert '--data-path ' in toys.refused(capsys, **flags, data_path='~/empty')  # and not "no such folder"
    with pytest.raises(SystemExit):
        main.main([*toys.flags(**flags, data_path=None), '--data-path', f'{files}/tree '])
    assert 'no such folder; remove the space before or after the path' in capsys.readouterr().err


def test_safetensors_are_known_by_their_content(place):
    found = checkpoints.read_checkpoint(place / 'named.pth')
    assert found.keys() == toys.student().state_dict().keys()


def test_checkpoint_key_chooses_the_weights(run, place, tmp_path, epochs):
    run(finetune=place / 'dino.pth', checkpoint_key='teacher', **toys.ALONE)
    teacher = toys.load(place / 'dino.pth')['teacher']
    expected = {name.removeprefix('module.backbone.'): x for name, x in teacher.items() if 'mlp.0.weight' not in name}
    toys.assert_same(dict(toys.load(tmp_path / 'checkpoint.pth')['model']), expected)


# Weights that say what they are ---------------------------------------------------------------------------------------

ODD = {'model': 'vit_tiny_patch16_224', 'model_kwargs': 'patch_size=8 embed_dim=32 depth=2 num_heads=4'}


@pytest.fixture(scope='module')
def trained(files, tmp_path_factory):
    """A run of a student that is not the default, on a folder, without a teacher. Also a checkpoint of that teacher."""
    folder = tmp_path_factory.mktemp('trained')
    flags = {**toys.FOLDER, **ODD, 'data_path': files / 'tree', 'batch_size': 4, 'lr': 5, 'warmup_epochs': 0}
    main.main(toys.flags(**flags, output_dir=folder))
    return folder


def silent(*words, **changes) -> list[str]:
    """A command line that says nothing about models."""
    return [*toys.flags(**{**dict.fromkeys(toys.RUN), 'device': 'cpu', 'num_workers': 0, **changes}), *map(str, words)]


def test_evaluation_rebuilds_the_student_from_its_checkpoint(trained, files, capsys):
    main.main(silent(eval=True, resume=trained / 'checkpoint.pth', data_path=files / 'tree'))
    row, printed = toys.log_rows(trained)[0], capsys.readouterr().out
    assert f'Acc@1 {row["test_acc1"]:.3f} Acc@5 {row["test_acc5"]:.3f} loss {row["test_loss"]:.3f}' in printed
    assert '--model vit_tiny_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=4' in printed
    assert 'FOLDER' in printed


@pytest.mark.parametrize(
    'changes', [{'model': 'deit_tiny_patch16_224'}, {'model_kwargs': 'patch_size=8 embed_dim=32 depth=2 num_heads=2'}]
)
@pytest.mark.parametrize('flag', ['resume', 'finetune', 'teacher_path'])
def test_flags_that_contradict_a_weights_file_are_refused(trained, files, capsys, flag, changes):
    weights = trained / 'checkpoint.pth'
    if flag == 'teacher_path':
        changes = {{'model': 'teacher_model', 'model_kwargs': 'teacher_kwargs'}[name]: v for name, v in changes.items()}
        changes |= {'eval_teacher': True}
    with pytest.raises(SystemExit) as stopped:
        main.main(silent(**{'data_set': 'FOLDER', 'data_path': files / 'tree', flag: weights, **changes}))
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count('\n')) == (2, 1)
    assert f'--{flag.replace("_", "-")} {weights}: was trained with --model' in error
    assert 'leave out --' in error


def test_same_architecture_with_a_tag_or_another_drop_rate_is_accepted(trained, files, capsys):
    changes = {'model': 'vit_tiny_patch16_224.augreg_in21k', 'model_kwargs': ODD['model_kwargs'] + ' drop_rate=0.1'}
    main.main(silent(eval=True, resume=trained / 'checkpoint.pth', data_path=files / 'tree', **changes))
    assert f'loss {toys.log_rows(trained)[0]["test_loss"]:.3f}' in capsys.readouterr().out


def test_resume_and_finetune_rebuild_the_student(trained, files, tmp_path, capsys, epochs):
    common = {'data_set': 'FOLDER', 'data_path': files / 'tree', 'batch_size': 4, 'output_dir': tmp_path / 'run'}
    main.main(silent(finetune=trained / 'checkpoint.pth', epochs=1, **common))
    assert toys.load(tmp_path / 'run' / 'checkpoint.pth')['args']['model_kwargs']['depth'] == 2
    main.main(silent(resume='auto', epochs=2, **common))
    assert [row['epoch'] for row in toys.log_rows(tmp_path / 'run')] == [0, 1]
    assert 'arguments changed' in capsys.readouterr().out  # the number of epochs


def test_teacher_of_an_own_run_needs_no_further_flags(trained, files, tmp_path, capsys):
    flags = {'data_set': 'FOLDER', 'data_path': files / 'tree', 'batch_size': 4, 'input_size': 32, 'epochs': 1}
    flags |= {
        'model': 'deit_tiny_patch16_224',
        'model_kwargs': toys.RUN['model_kwargs'],
        's_id': '0 -1',
        't_id': '0 -1',
    }
    flags |= {'distillation_type': 'soft', 'teacher_path': trained / 'checkpoint.pth', 'eval_teacher': True}
    main.main(silent(**flags, output_dir=tmp_path))
    printed = capsys.readouterr().out
    assert f'loss {toys.log_rows(trained)[0]["test_loss"]:.3f}' in printed  # with its own mean and std
    assert toys.load(tmp_path / 'checkpoint.pth')['checksums']['teacher_weights']


def test_checkpoint_holds_class_names_and_normalisation(trained):
    student = toys.load(trained / 'checkpoint.pth')['student']
    assert student == {'mean': [0.5] * 3, 'std': [0.5] * 3, 'classes': ['c0', 'c1']}


def test_release_checkpoint_says_its_model(files, tmp_path, capsys):
    weights = toys.student(2).state_dict()
    path = toys.save(tmp_path / 'release.pth', toys.as_release(weights))
    words = silent(data_set='FOLDER', eval=True, resume=path, data_path=files / 'tree')
    main.main([*words, '--input-size', '32', '--model-kwargs', *toys.RUN['model_kwargs'].split()])
    assert '--model deit_tiny_patch16_224' in capsys.readouterr().out


def test_replaced_teacher_file_is_noticed_on_resume(run, tmp_path, capsys, epochs):
    teacher = toys.teacher()
    path = toys.save(tmp_path / 'teacher.pth', teacher.state_dict())
    flags = {'teacher_path': path, 'output_dir': tmp_path / 'run', 'resume': 'auto'}
    run(**flags, epochs=1)
    run(**flags, epochs=2)
    assert 'the weights are not those' not in capsys.readouterr().out
    toys.save(tmp_path / 'teacher.pth', toys.favouring(teacher, 3).state_dict())
    run(**flags, epochs=3)
    assert f'warning: --teacher-path {path}: the weights are not those that --resume auto' in capsys.readouterr().out


# Pretrained students --------------------------------------------------------------------------------------------------


@pytest.fixture
def local_model(tmp_path):
    """A folder that timm loads as a model with weights."""
    torch.manual_seed(5)  # not the seed of a run
    model = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32, **toys.STUDENT)
    config = {
        'architecture': 'deit_tiny_patch16_224',
        'num_classes': 10,
        'model_args': {**toys.STUDENT, 'img_size': 32},
        'pretrained_cfg': {'num_classes': 10, 'input_size': [3, 32, 32], 'classifier': 'head'},
    }
    folder = tmp_path / 'local'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
    return folder, model.state_dict()


@pytest.mark.parametrize('pretrained', [True, None])
def test_pretrained_starts_from_the_weights_of_the_model(run, local_model, tmp_path, capsys, epochs, pretrained):
    folder, weights = local_model
    flags = {**toys.ALONE, 'model': f'local-dir:{folder}', 'model_kwargs': None, 'output_dir': tmp_path / 'run'}
    run(**flags, pretrained=pretrained)
    found = toys.load(tmp_path / 'run' / 'checkpoint.pth')['model']
    assert all(torch.equal(found[key], weights[key]) for key in weights) is bool(pretrained)
    warned = 'starts from random weights; --pretrained starts from its weights' in capsys.readouterr().out
    assert warned is not bool(pretrained)


def test_pretrained_head_of_other_classes_is_replaced(run, local_model, files, tmp_path, capsys, epochs):
    folder, weights = local_model
    flags = {**toys.FOLDER, 'data_path': files / 'tree', 'model': f'local-dir:{folder}', 'model_kwargs': None}
    run(**flags, pretrained=True, batch_size=4, output_dir=tmp_path / 'run')
    found = toys.load(tmp_path / 'run' / 'checkpoint.pth')['model']
    assert found['head.weight'].shape == (2, 32)
    assert torch.equal(found['blocks.0.attn.qkv.weight'], weights['blocks.0.attn.qkv.weight'])
    capsys.readouterr()
    error = toys.refused(capsys, **flags, pretrained=True, eval=True)
    assert f'--pretrained: local-dir:{folder} has 10 classes, the data 2' in error


# Small images, bad images ---------------------------------------------------------------------------------------------


def test_small_images_of_any_size_are_trained_on_and_evaluated(run, tmp_path):
    for split in ('train', 'val'):
        toys.write_images(tmp_path / 'data' / split, [3, 3], 32)
        for path, size in zip((tmp_path / 'data' / split).glob('*/1.png'), [(28, 28), (80, 50)], strict=True):
            toys.noise(*size).save(path)
    flags = {**toys.FOLDER, 'data_path': tmp_path / 'data', 'batch_size': 6, 'output_dir': tmp_path / 'run'}
    assert len(run(**flags)) == 1


def test_bad_validation_image_loses_no_training(run, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / 'tree', tmp_path / 'tree')
    bad = tmp_path / 'tree' / 'val' / 'c1' / '1.png'
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    flags = {**toys.FOLDER, 'data_path': tmp_path / 'tree', 'batch_size': 4, 'epochs': 2, 'resume': 'auto'}
    with pytest.raises(SystemExit) as stopped:
        run(**flags, output_dir=tmp_path / 'run')
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith('(class c1); --bad-images skip continues without such images\n')
    assert toys.load(tmp_path / 'run' / 'checkpoint.pth')['step'] == 2
    bad.write_bytes(good)
    rows = run(**flags, output_dir=tmp_path / 'run')  # evaluates the finished epoch first
    assert rows == run(**flags, output_dir=tmp_path / 'other')
    toys.assert_same(toys.outcome(tmp_path / 'run'), toys.outcome(tmp_path / 'other'))


def test_save_before_evaluation_keeps_the_older_checkpoint(run, tmp_path, monkeypatch):
    run(epochs=2)
    steps = toys.TRAIN_IMAGES // toys.RUN['batch_size']
    (older,) = tmp_path.glob('checkpoint-*.pth')
    assert (checkpoints.step_of(older), toys.load(older)['epoch']) == (steps, 0)

    def fail(*_):
        raise BadImageError('x.png: no')

    monkeypatch.setattr(engine, 'evaluate', fail)
    with pytest.raises(SystemExit):
        run(epochs=3, resume='auto')
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] == 3 * steps
    assert sorted(map(checkpoints.step_of, tmp_path.glob('checkpoint-*.pth'))) == [2 * steps]


# Output folders -------------------------------------------------------------------------------------------------------


def test_second_run_in_a_folder_is_refused(run, tmp_path, monkeypatch, capsys, epochs):
    monkeypatch.setattr(locks, 'WAIT', 0.6)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # another process that uses the folder
        file = open(tmp_path / '.lock', 'w')  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX)
        print(f'process {os.getpid()} on a machine', file=file, flush=True)
        os.write(writer, b'.')
        signal.pause()
    os.read(reader, 1)
    before = toys.listing(tmp_path)
    error = toys.refused(capsys, **toys.ALONE, output_dir=tmp_path, resume='auto')
    assert f'--output_dir {tmp_path}: is used by another run, process {child} on a machine; if that process' in error
    assert toys.listing(tmp_path) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run()  # the file is still there, but no process holds it
    assert '.lock' not in toys.listing(tmp_path)


def test_lock_that_the_holder_removes_meanwhile_is_taken_again(tmp_path, monkeypatch):
    locked = fcntl.lockf
    monkeypatch.setattr(
        fcntl, 'lockf', lambda *args: (locked(*args), monkeypatch.undo(), (tmp_path / '.lock').unlink())[0]
    )
    locks.lock(str(tmp_path))
    assert (tmp_path / '.lock').exists()
    locks.unlock()
    assert not list(tmp_path.iterdir())


def test_full_disk_before_the_first_checkpoint_lets_the_same_command_go_on(run, tmp_path, monkeypatch, capsys):
    write = checkpoints.write_durably

    def full(path, *rest):
        if path.suffix == '.pth':
            raise OSError(28, 'No space left on device')
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, 'write_durably', full)
        patch.setattr(run_dir, 'LAST_TRIES', (0.0,))
        with pytest.raises(SystemExit) as stopped:
            run(**toys.ALONE, epochs=2, resume='auto')
        assert stopped.value.code == 1
    assert toys.listing(tmp_path).keys() == {'log.txt'}
    first = toys.log_rows(tmp_path)
    capsys.readouterr()
    assert run(**toys.ALONE, epochs=2, resume='auto') == first
    assert 'log.txt is of a run without checkpoints; it is now log.txt.1' in capsys.readouterr().out
    assert (tmp_path / 'log.txt.1').exists()


def test_best_checkpoint_of_a_new_folder_is_the_best_of_its_epochs(run, tmp_path, monkeypatch, epochs):
    accuracies = iter([60.0, 40.0, 50.0, 45.0])
    monkeypatch.setattr(
        engine, 'evaluate', lambda *_: {'loss': 1.0, 'acc1': next(accuracies), 'acc5': 90.0, 'images': 8}
    )
    run(epochs=1, output_dir=tmp_path / 'one')
    run(epochs=4, resume=tmp_path / 'one' / 'best_checkpoint.pth', output_dir=tmp_path / 'two')
    best = toys.load(tmp_path / 'two' / 'best_checkpoint.pth')
    assert (best['epoch'], best['best_acc1']) == (2, 50)


def test_folder_that_is_not_shared_between_machines_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_dir.utils, 'gather_objects', lambda value: [True] if value is False else [value])
    error = toys.refused(capsys, **toys.ALONE, resume='auto', output_dir=tmp_path)
    assert 'all machines must share the folder --output_dir' in error


# Start-up -------------------------------------------------------------------------------------------------------------


def test_patches_that_do_not_cover_the_image_are_warned_of(run, capsys, epochs):
    flags = {'model_kwargs': 'patch_size=12 embed_dim=32 depth=4 num_heads=2', **toys.ALONE}
    run(**flags)
    warning = toys.line_with(capsys, 'unseen')
    assert warning == (
        'warning: --input-size 32: patches of 12 pixels leave the last 8 rows and columns of the image unseen; '
        '--input-size 24 or 36 fits'
    )
    run(**{**flags, 'input_size': 24}, output_dir='')
    assert 'unseen' not in capsys.readouterr().out


def test_number_of_random_tokens_is_capped_where_it_is_printed(run, capsys, epochs):
    run(K=500)
    assert f'random of {8 * 16} tokens' in toys.line_with(capsys, 'loss   ')


def test_loader_processes_are_at_most_one_per_core(monkeypatch):
    for cores, expected in ((2, 2), (64, 10)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, cores=cores: set(range(cores)))
        assert toys.config(num_workers=None, **toys.ALONE).data.workers == expected
    assert toys.config(num_workers=12, **toys.ALONE).data.workers == 12


def test_missing_package_names_the_two_commands(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ModuleNotFoundError("No module named \'torch\'")')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, 'main.py'], cwd=toys.ROOT, env=environment, capture_output=True, text=True)
    advice = 'run `bash scripts/setup.sh`, then `source .venv/bin/activate`'
    assert done.stderr == f"main.py: error: No module named 'torch' in {sys.executable}; {advice}\n"
    assert done.returncode == 2


def test_interrupt_during_the_imports_leaves_no_traceback(tmp_path):
    (tmp_path / 'timm.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, 'main.py'], cwd=toys.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, '')


# In your own loop -----------------------------------------------------------------------------------------------------


def test_auto_blocks_and_normalisation_in_your_own_loop():
    student, teacher = (
        toys.student(),
        timm.create_model('vit_tiny_patch16_224', img_size=32, **toys.STUDENT | {'depth': 6}),
    )
    tapped = models.tap(student, 'auto', 32, partner=teacher)
    frozen = models.freeze(models.tap(teacher, 'auto', 32, partner=student), 'auto', student=tapped)
    assert (tapped.block_ids, frozen.block_ids) == ([0, 1, 2, 3], [0, 1, 4, 5])
    white = torch.full((1, 3, 32, 32), 1.0)
    mean, std = models.normalisation(student)
    normalised = (white - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(frozen.prepare(normalised), white)
    for call in (lambda: models.tap(student, 'all', 32), lambda: models.freeze(frozen, 'auto')):
        with pytest.raises(ValueError, match="not 'a"):
            call()


def test_criterion_explains_wrong_outputs():
    logits, tokens, targets = torch.randn(2, 5), torch.randn(2, 4, 8), torch.tensor([0, 1])
    criterion = ManifoldDistillationLoss(torch.nn.CrossEntropyLoss(), 'soft')
    good = (logits, logits, [tokens])
    for student, teacher, words in (
        (logits, good, r'the output of the student must be \(logits, kd_logits, tokens\)'),
        (good, (logits, [tokens]), 'the output of the teacher must be'),
        ((logits, logits, tokens), good, 'the tokens of the student must be a list'),
    ):
        with pytest.raises(TypeError, match=words):
            criterion(student, teacher, targets)
    with pytest.warns(UserWarning, match="distillation_type is 'none', so the teacher is not used"):
        ManifoldDistillationLoss(torch.nn.CrossEntropyLoss())(good, good, targets)


def test_message_about_a_value_that_is_not_finite_says_what_to_try(run, monkeypatch, capsys):
    def fail(*_, **__):
        raise FloatingPointError('not finite at step 0 of epoch 0 on rank 0: loss_base; images 1 2')

    monkeypatch.setattr(engine, 'train_one_epoch', fail)
    with pytest.raises(SystemExit):
        run()
    assert capsys.readouterr().err.endswith('images 1 2; try a smaller --lr, or --clip-grad 1\n')


# Found by a hostile newcomer ------------------------------------------------------------------------------------------


def renamed(files, folder):
    """The images of `files/tree`, with other names of the classes."""
    shutil.copytree(files / 'tree', folder)
    for split in ('train', 'val'):
        for old, new in (('c0', 'y'), ('c1', 'x')):
            (folder / split / old).rename(folder / split / new)
    return folder


def test_other_class_names_are_warned_of_at_evaluation_and_of_a_teacher(trained, files, tmp_path, capsys):
    weights, data = trained / 'checkpoint.pth', renamed(files, tmp_path / 'data')
    for flag in ('resume', 'finetune'):
        main.main(silent(eval=True, data_set='FOLDER', data_path=data, **{flag: weights}))
        warning = toys.line_with(capsys, 'other names')
        assert warning.startswith(
            f'warning: --{flag} {weights}: 2 of 2 classes have other names than in the data; class 0'
        )
        assert "'c0' in the file, 'x' in the data" in warning
    flags = {'data_set': 'FOLDER', 'data_path': data, 'batch_size': 4, 'input_size': 32, 'epochs': 1}
    flags |= {'model': 'deit_tiny_patch16_224', 'model_kwargs': toys.RUN['model_kwargs'], 'teacher_path': weights}
    main.main(silent(**flags, distillation_type='soft'))
    assert f'--teacher-path {weights}: 2 of 2 classes' in toys.line_with(capsys, 'other names')
    main.main(silent(eval=True, data_path=files / 'tree', resume=weights))
    assert 'other names' not in capsys.readouterr().out


def test_fake_data_of_a_checkpoint_needs_no_path(run, tmp_path, capsys):
    run(**toys.ALONE)
    main.main(silent(eval=True, resume=tmp_path / 'checkpoint.pth'))
    assert 'FAKE' in capsys.readouterr().out
    error = toys.refused(capsys, **dict.fromkeys(toys.RUN), eval=True, resume=toys.save(tmp_path / 'x.pth', {'a': 1}))
    assert "--data-path '': required with --data-set IMNET" in error


def test_lock_is_taken_again_if_its_file_is_removed(tmp_path):
    locks.lock(str(tmp_path))
    (tmp_path / '.lock').unlink()
    locks.keep(tmp_path)
    assert (tmp_path / '.lock').exists()
    (tmp_path / '.lock').unlink()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # another run comes between
        file = open(tmp_path / '.lock', 'w')  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(writer, b'.')
        signal.pause()
    os.read(reader, 1)
    with pytest.raises(locks.NotSavedError, match='which is now used by'):
        locks.keep(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    locks.unlock()


def test_images_of_one_pixel_are_trained_on(run, tmp_path):
    for split in ('train', 'val'):
        toys.write_images(tmp_path / 'data' / split, [8, 8], 1)
    flags = {**toys.FOLDER, 'data_path': tmp_path / 'data', 'input_size': 40, 'epochs': 4}
    assert len(run(**flags, output_dir=tmp_path / 'run')) == 4


def test_folder_of_a_model_may_have_moved(run, local_model, tmp_path, capsys):
    folder, _ = local_model
    flags = {**toys.ALONE, 'model_kwargs': None, 'pretrained': True}
    run(**flags, model=f'local-dir:{folder}', output_dir=tmp_path / 'run')
    folder.rename(tmp_path / 'moved')
    (row,) = toys.log_rows(tmp_path / 'run')
    capsys.readouterr()
    words = {'eval': True, 'resume': tmp_path / 'run' / 'checkpoint.pth', 'model': f'local-dir:{tmp_path / "moved"}'}
    main.main(silent(**words))
    assert f'loss {row["test_loss"]:.3f}' in capsys.readouterr().out


def test_flags_of_another_program_in_a_file_are_used_only_if_they_can_be(files, tmp_path, capsys):
    args = {'model': 'deit_tiny_patch16_224', 'model_kwargs': ['x'], 'input_size': None, 'data_set': 'MNIST'}
    contents = {'state_dict': toys.student(2).state_dict(), 'args': args, 'student': {'mean': ['a'], 'std': [1.0]}}
    path = toys.save(tmp_path / 'other.pth', contents)
    flags = {
        'input_size': 32,
        'model_kwargs': toys.RUN['model_kwargs'],
        'data_set': 'FOLDER',
        'data_path': files / 'tree',
    }
    main.main(silent(eval=True, resume=path, **flags))
    assert '--model deit_tiny_patch16_224, from --resume' in capsys.readouterr().out


def test_resume_does_not_read_the_weights_it_started_from(run, files, tmp_path, epochs):
    start = toys.save(tmp_path / 'start.pth', toys.student().state_dict())
    flags = {'finetune': start, 'output_dir': tmp_path / 'run', 'resume': 'auto'}
    run(**flags)
    os.unlink(start)
    assert [row['epoch'] for row in run(**flags, epochs=2)] == [0, 1]


@pytest.mark.parametrize(('name', 'value'), [('RANK', 'x'), ('WORLD_SIZE', '2.5')])
def test_wrong_number_in_the_environment_is_named(monkeypatch, capsys, name, value):
    monkeypatch.setenv('RANK', '0'), monkeypatch.setenv('WORLD_SIZE', '1'), monkeypatch.setenv(name, value)
    assert f'{name}={value} in the environment is not a whole number' in toys.refused(capsys, **toys.ALONE)


def test_dangling_link_is_named(tmp_path, capsys):
    (tmp_path / 'data').symlink_to(tmp_path / 'nowhere')
    error = toys.refused(capsys, **toys.FOLDER, data_path=tmp_path / 'data')
    assert f'no such folder; it is a link to {tmp_path}/nowhere, which does not exist' in error


def test_blank_line_at_the_end_of_the_log_is_accepted(run, tmp_path, epochs):
    run()
    with open(tmp_path / 'log.txt', 'a') as file:
        file.write('\n')
    assert len(run(resume='auto', epochs=2)) == 2


def test_images_that_a_model_does_not_take_are_a_value_error():
    with pytest.raises(ValueError, match='the model cannot process images of 64×64 pixels'):
        models.tap(toys.student(), [0], 64)
