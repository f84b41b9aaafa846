"""main.py in fresh interpreters: launchers, several ranks, exit codes. Each interpreter costs seconds."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys

import main

PATIENCE = 180  # seconds until a run counts as hanging
TERMS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']

# Above 32 pixels a random crop is resized, so images of one colour stay the same. Below, crops may have black edges.
SIZE, TRAIN, VAL = 40, [2] * 8, [2, 2, 2, 1, 1, 1, 1, 1]
WORLD_OF_ONE = {'batch_size': 16}  # all 16 images are one step
WORLD_OF_TWO = {'batch_size': 8}

EQUAL = {'epochs': 3, 'w_sample': 0, 'w_rand': 0, 'w_full': 0}
GLOBAL = {'epochs': 2, 'relations': 'global', 'K': 40}  # of 16 images of 25 patches
TWO_HEADED = {'model': 'deit_tiny_distilled_patch16_224', 'batch_size': 2, 'epochs': 1}
NORMS = {**toys.ALONE, 'model': 'resnet10t', 'model_kwargs': None, 'epochs': 4, 'lr': 0.05}
EVALUATION = {'eval': True, 'batch_size': 2, **toys.ALONE}


def start(*words) -> subprocess.Popen:
    # Set by a launcher around the tests. PYTHONUNBUFFERED would hide that stdout is buffered.
    told = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'PYTHONUNBUFFERED')
    environment = {key: value for key, value in os.environ.items() if key not in told}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=toys.ROOT,
        env={**environment, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr. No child process is left running."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with images of one colour each, a teacher, and a student to start from or to evaluate."""
    folder = tmp_path_factory.mktemp('cli')
    toys.write_images(folder / 'images' / 'train', TRAIN, SIZE)
    toys.write_images(folder / 'images' / 'val', VAL, SIZE)
    torch.manual_seed(0)
    for name, model in [('teacher', toys.teacher(len(TRAIN), SIZE)), ('student', toys.student(len(TRAIN), SIZE))]:
        # With the usual 0.02 all patches of such an image would give the same token, and every relation would be 1.
        torch.nn.init.normal_(model.pos_embed)
        toys.save(folder / f'{name}.pth', model.state_dict())
    return folder


def flags(folder: Path, **changes) -> list[str]:
    data = {'data_set': 'FOLDER', 'data_path': folder / 'images', 'input_size': SIZE}
    recipe = {'teacher_path': folder / 'teacher.pth', 'warmup_epochs': 0, 'lr': 0.3, **toys.PLAIN_IMAGES}
    return toys.flags(**{**data, **recipe, **changes})


def losses(row: dict) -> dict[str, float]:
    return {key: row[key] for key in row if key.startswith(('train_loss', 'test_'))}


def at_file(folder: Path, name: str, ranks: int, **changes) -> tuple[int, list[str]]:
    """A run whose ranks meet at a file, which also tests --dist_url."""
    return ranks, flags(folder, dist_url=f'file://{folder}/{name}.init', **changes)


def launched_runs(folder: Path) -> dict[str, list]:
    """By launcher: a run that ends well, then one that fails."""
    for rank, value in enumerate([0.0, torch.nan]):
        teacher = toys.teacher(len(TRAIN), SIZE)
        with torch.no_grad():
            teacher.head.bias[0] += value
        toys.save(folder / f'teacher{rank}.pth', teacher.state_dict())
    good = {'finetune': folder / 'student.pth', **WORLD_OF_TWO}
    bad = {'teacher_path': folder / 'teacher{rank}.pth', 'batch_size': 2, 'output_dir': folder / 'nan'}
    return {
        'launch': [
            (2, [*flags(folder, output_dir=folder / 'launch', **good), '--distributed']),  # as the release says
            at_file(folder, 'nan', 2, **bad),
        ],
        'torchrun': [
            (2, flags(folder, output_dir=folder / 'torchrun', **good)),
            at_file(folder, 'wrong', 2, teacher_path=folder / 'no.pth'),
        ],
    }


def rank_runs(folder: Path) -> dict[str, tuple]:
    """Runs on two or three ranks."""
    weights = folder / 'student.pth'
    runs = {
        'equal': (2, {'output_dir': folder / 'equal', 'finetune': weights, **EQUAL, **WORLD_OF_TWO}),
        'global': (2, {'output_dir': folder / 'global', 'finetune': weights, **GLOBAL, **WORLD_OF_TWO}),
        # 16 images in batches of 2 on two ranks: four steps
        'alpha0': (2, {'output_dir': folder / 'alpha0', 'distillation_alpha': 0, **TWO_HEADED}),
        'alpha1': (2, {'output_dir': folder / 'alpha1', 'distillation_alpha': 1, **TWO_HEADED}),
        'norms': (2, {'output_dir': folder / 'norms', **NORMS, **WORLD_OF_TWO}),
        'eval2': (2, {'resume': weights, **EVALUATION}),
        'unshared': (2, {'resume': weights, 'no_dist_eval': True, **EVALUATION}),
        'eval3': (3, {'resume': weights, **EVALUATION}),
    }
    return {name: at_file(folder, name, ranks, **changes) for name, (ranks, changes) in runs.items()}


def forked_processes(folder: Path) -> list[tuple]:
    """Three ranks, one plain run, and two that lose their output."""
    processes = [(str(rank), f'{folder}/{rank}.txt', list(rank_runs(folder).values())) for rank in range(3)]
    plain = flags(folder, output_dir=folder / 'python', finetune=folder / 'student.pth', **WORLD_OF_ONE)
    processes.append((None, f'{folder}/python.txt', [(1, plain)]))
    for name, output in (('full', '/dev/full'), ('broken', 'broken pipe')):
        # A loader worker starts only after all buffers are flushed.
        lost = flags(folder, output_dir=folder / name, epochs=2, num_workers=1)
        processes.append((None, output, [(1, lost)]))
    return processes


@pytest.fixture(scope='module')
def runs(folder):
    """Results of all these runs. They share five interpreters.

    'launch' and 'torchrun' are (exit code, stdout of each run, stderr). The others are what the first rank printed.
    """

    def script(*words: str, contents: object) -> list:
        path = folder / f'{len(list(folder.iterdir()))}.json'
        path.write_text(json.dumps(contents))
        return [Path(__file__).with_name('run_main.py'), *words, path]

    launched = launched_runs(folder)
    port, two = f'--master_port={free_port()}', '--nproc_per_node=2'
    started = {
        'launch': start('-m', 'torch.distributed.launch', two, port, *script(contents=launched['launch'])),
        'torchrun': start('-m', 'torch.distributed.run', two, '--standalone', *script(contents=launched['torchrun'])),
        'forks': start(*script('--fork', contents=forked_processes(folder))),
    }
    ends = {name: finish(process) for name, process in started.items()}
    code, codes, error = ends.pop('forks')
    texts = {name: (folder / f'{name}.txt').read_text() for name in ('0', 'python')}
    assert (code, json.loads(codes)) == (0, [0] * 6), f'{error}{texts}'
    printed = dict(zip(rank_runs(folder), texts['0'].split('== run')[1:], strict=True))
    printed |= {name: (code, out.split('== run')[1:], error) for name, (code, out, error) in ends.items()}
    return {**printed, 'python': texts['python']}


def test_run_survives_lost_stdout(folder, runs):
    assert [len(toys.log_rows(folder / name)) for name in ('full', 'broken')] == [2, 2]


def test_launch_torchrun_and_python_give_the_same_run(folder, runs):
    names = ['launch', 'torchrun', 'python']
    (launched,), (torchran,), (plain,) = (toys.log_rows(folder / name) for name in names)
    assert launched == torchran
    toys.assert_same(*(toys.load(folder / name / 'checkpoint.pth')['model'] for name in names[:2]))
    # Relations across images use the images of one rank only, so those terms may differ.
    same = ['train_loss_base', 'train_loss_dist', 'train_loss_mf_patch']
    assert {key: launched[key] for key in same} == pytest.approx({key: plain[key] for key in same}, abs=1e-5)
    assert all(plain[f'train_loss_{term}'] > 1e-3 for term in TERMS)
    outputs = [runs['launch'][1][0], runs['torchrun'][1][0], runs['python']]
    assert '2 ranks × 8 images = 16 per step' in outputs[0]
    assert '1 rank × 16 images = 16 per step' in outputs[2]
    # Only the first rank prints.
    assert [out.count('Max accuracy') for out in outputs] == [1, 1, 1]


def results(text: str) -> list[str]:
    return [line for line in text.splitlines() if 'Acc' in line]


def test_two_ranks_train_like_one_process(folder, runs):
    main.main(flags(folder, output_dir=folder / 'one', finetune=folder / 'student.pth', **EQUAL, **WORLD_OF_ONE))
    one, two = toys.log_rows(folder / 'one'), toys.log_rows(folder / 'equal')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
        assert found['train_lr'] == expected['train_lr']
    for term in ('base', 'dist', 'mf_patch'):  # the terms are not constant
        assert abs(one[0][f'train_loss_{term}'] - one[-1][f'train_loss_{term}']) > 1e-3
    assert '2 ranks × 8 images' in runs['equal']


def test_global_relations_of_two_ranks_match_one_process(folder, runs):
    argv = flags(folder, output_dir=folder / 'alone', finetune=folder / 'student.pth', **GLOBAL, **WORLD_OF_ONE)
    main.main(argv)
    one, two = toys.log_rows(folder / 'alone'), toys.log_rows(folder / 'global')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert all(row[f'train_loss_{term}'] > 1e-3 for row in one for term in TERMS)
    assert all(one[0][f'train_loss_{term}'] != one[1][f'train_loss_{term}'] for term in TERMS)
    assert 'means over the 16 images of 2 ranks' in runs['global']


@pytest.mark.parametrize(('alpha', 'absent'), [(0, 'dist'), (1, 'base')])
def test_two_headed_student_trains_on_two_ranks(folder, runs, alpha, absent):
    (row,) = toys.log_rows(folder / f'alpha{alpha}')
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == {absent}
    assert math.isfinite(row['train_loss'])
    assert ' 4/4] ' in runs[f'alpha{alpha}']
    # AdamW counts the steps of a parameter from its first gradient.
    optimizer = toys.load(folder / f'alpha{alpha}' / 'checkpoint.pth')['optimizer']
    parameters = [index for group in optimizer['param_groups'] for index in group['params']]
    assert {index: optimizer['state'][index]['step'].item() for index in parameters} == dict.fromkeys(parameters, 4)


def test_evaluation_is_the_same_on_1_2_and_3_ranks(folder, runs, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    alone = results(capsys.readouterr().out)
    assert [results(runs[name]) for name in ('eval2', 'eval3')] == [alone] * 2
    assert alone[1].startswith(f'Accuracy of the network on the {sum(VAL)} test images: ')
    top1, top5 = (float(alone[0].split()[i]) * sum(VAL) / 100 for i in (2, 4))
    assert 0 < top1 < top5 < sum(VAL)


def test_no_dist_eval_counts_every_image_once(folder, runs, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    assert results(runs['unshared']) == results(capsys.readouterr().out)


def test_batchnorm_log_of_two_ranks_matches_the_checkpoint(folder, runs, capsys):
    main.main(flags(folder, **NORMS, eval=True, resume=folder / 'norms' / 'checkpoint.pth'))
    loss = float(results(capsys.readouterr().out)[0].split()[-1])
    # The evaluation prints three digits.
    assert toys.log_rows(folder / 'norms')[-1]['test_loss'] == pytest.approx(loss, abs=6e-4)


def test_wrong_use_under_torchrun_prints_once(folder, runs):
    code, (_, out), err = runs['torchrun']
    assert code == 1
    assert (out + err).count('--teacher-path') == 1
    assert f'main.py: error: --teacher-path {folder / "no.pth"}: No such file or directory' in err
    assert 'Epoch' not in out


def test_non_finite_loss_on_one_rank_stops_all(folder, runs):
    code, _, err = runs['launch']
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith('main.py: error: not finite')]
    assert 'not finite at step 0 of epoch 0 on rank 1: loss_dist, teacher logits; images ' in line
    assert len(line.split('images ')[1].split('; ')[0].split()) == 2  # the batch of one rank
    assert line.endswith("; check the teacher's weights")
    assert 'rank 0' not in line
    assert not toys.listing(folder / 'nan')
