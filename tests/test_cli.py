"""main.py in fresh interpreters: launchers, several ranks, exit codes. Each interpreter costs seconds."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toys

import main

PATIENCE = 180  # seconds until a run counts as hanging
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
TERMS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']

# Above 32 pixels a random crop is resized, so images of one colour stay the same. Below, crops may have black edges.
SIZE, TRAIN, VAL = 40, [2] * 8, [2, 2, 2, 1, 1, 1, 1, 1]
WORLD_OF_ONE = {'batch_size': 16}  # all 16 images are one step
WORLD_OF_TWO = {'batch_size': 8}

# Runs main.main for each (number of ranks, flags) of a JSON file. `{rank}` in a flag becomes the rank.
DRIVER = f"""
import json, os, sys
sys.path.insert(0, {str(toys.ROOT)!r})
import torch
torch.set_num_threads(1)
import main
rank = int(os.environ['RANK'])
for ranks, argv in json.load(open(sys.argv[1])):
    os.environ['WORLD_SIZE'] = str(ranks)
    if rank == 0:
        print('== run', flush=True)
    if rank < ranks:
        main.main([word.format(rank=rank) for word in argv])
"""


def start(*words, output=subprocess.PIPE, **variables) -> subprocess.Popen:
    # Set by a launcher around the tests. PYTHONUNBUFFERED would hide that stdout is buffered.
    told = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'PYTHONUNBUFFERED')
    environment = {key: value for key, value in os.environ.items() if key not in told}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=toys.ROOT,
        env={**environment, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **variables},
        stdout=output,
        stderr=output,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process. None is left running."""
    hanging = time.monotonic() + PATIENCE
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > hanging:
            break
        time.sleep(0.1)
    for process in processes:
        try:
            process.wait(10)  # the other ranks notice the one that failed
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher ends its ranks too
    texts = [process.communicate() for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def finish_well(*processes: subprocess.Popen) -> list[str]:
    """The stdout of each process. All must exit with 0."""
    ends = finish(*processes)
    assert [code for code, _, _ in ends] == [0] * len(ends), '\n'.join(err[-3000:] for _, _, err in ends)
    return [out for _, out, _ in ends]


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


def test_run_survives_lost_stdout(folder):
    reader, writer = os.pipe()
    os.close(reader)
    with open('/dev/full', 'w') as full, open(writer, 'w') as broken:
        argv = {'epochs': 2, 'num_workers': 1}  # a worker starts only after all buffers are flushed
        runs = [start('main.py', *flags(folder, output_dir=folder / name, **argv), output=output)
                for name, output in (('full', full), ('broken', broken))]  # fmt: skip
        assert [run.wait(100) for run in runs] == [0, 0]
    assert [len(toys.log_rows(folder / name)) for name in ('full', 'broken')] == [2, 2]


def test_launch_torchrun_and_python_give_the_same_run(folder):
    names = ['launch', 'torchrun', 'plain']
    worlds = [WORLD_OF_TWO, WORLD_OF_TWO, WORLD_OF_ONE]
    argv = {
        name: ['main.py', *flags(folder, output_dir=folder / name, finetune=folder / 'student.pth', **world)]
        for name, world in zip(names, worlds, strict=True)
    }
    launch = ['-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={free_port()}']
    outputs = finish_well(
        start(*launch, *argv['launch'], '--distributed'),  # as in the README of the release
        start(*TORCHRUN, *argv['torchrun']),
        start(*argv['plain']),
    )
    (launched,), (torchran,), (plain,) = (toys.log_rows(folder / name) for name in names)
    assert launched == torchran
    toys.assert_same(*(toys.load(folder / name / 'checkpoint.pth')['model'] for name in names[:2]))
    # Relations across images use the images of one rank only, so those terms may differ.
    same = ['train_loss_base', 'train_loss_dist', 'train_loss_mf_patch']
    assert {key: launched[key] for key in same} == pytest.approx({key: plain[key] for key in same}, abs=1e-5)
    assert all(plain[f'train_loss_{term}'] > 1e-3 for term in TERMS)
    assert '2 ranks × 8 images = 16 a step' in outputs[0]
    assert '1 rank × 16 images = 16 a step' in outputs[2]
    # Only the first rank prints.
    assert [out.count('Max accuracy') for out in outputs] == [1, 1, 1]


EQUAL = {'epochs': 3, 'w_sample': 0, 'w_rand': 0, 'w_full': 0}
GLOBAL = {'epochs': 2, 'relations': 'global', 'K': 40}  # of 16 images of 25 patches
TWO_HEADED = {'model': 'deit_tiny_distilled_patch16_224', 'batch_size': 2, 'epochs': 1}
NORMS = {**toys.ALONE, 'model': 'resnet10t', 'model_kwargs': None, 'epochs': 4, 'lr': 0.05}
EVALUATION = {'eval': True, 'batch_size': 2, **toys.ALONE}


@pytest.fixture(scope='module')
def ranks(folder):
    """What the first rank prints in each of these runs. The same three interpreters do all of them."""
    weights = folder / 'student.pth'
    runs = {
        'equal': (2, flags(folder, output_dir=folder / 'equal', finetune=weights, **EQUAL, **WORLD_OF_TWO)),
        'global': (2, flags(folder, output_dir=folder / 'global', finetune=weights, **GLOBAL, **WORLD_OF_TWO)),
        # 16 images in batches of 2 on two ranks: four steps
        'alpha 0': (2, flags(folder, output_dir=folder / 'alpha0', distillation_alpha=0, **TWO_HEADED)),
        'alpha 1': (2, flags(folder, output_dir=folder / 'alpha1', distillation_alpha=1, **TWO_HEADED)),
        'norms': (2, flags(folder, output_dir=folder / 'norms', **NORMS, **WORLD_OF_TWO)),
        'eval on 2': (2, flags(folder, resume=weights, **EVALUATION)),
        'eval on 2, unshared': (2, flags(folder, resume=weights, no_dist_eval=True, **EVALUATION)),
        'eval on 3': (3, flags(folder, resume=weights, **EVALUATION)),
    }
    # Each run has its own init file, which also tests --dist_url.
    with_place = [(n, [*argv, '--dist_url', f'file://{folder}/meet{i}']) for i, (n, argv) in enumerate(runs.values())]
    (folder / 'runs.json').write_text(json.dumps(with_place))
    three = [start('-c', DRIVER, folder / 'runs.json', RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(3)]
    first = finish_well(*three)[0]
    return dict(zip(runs, first.split('== run')[1:], strict=True))


def results(text: str) -> list[str]:
    return [line for line in text.splitlines() if 'Acc' in line]


def test_two_ranks_train_like_one_process(folder, ranks):
    main.main(flags(folder, output_dir=folder / 'one', finetune=folder / 'student.pth', **EQUAL, **WORLD_OF_ONE))
    one, two = toys.log_rows(folder / 'one'), toys.log_rows(folder / 'equal')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
        assert found['train_lr'] == expected['train_lr']
    for term in ('base', 'dist', 'mf_patch'):  # the terms are not constant
        assert abs(one[0][f'train_loss_{term}'] - one[-1][f'train_loss_{term}']) > 1e-3
    assert '2 ranks × 8 images' in ranks['equal']


def test_global_relations_of_two_ranks_match_one_process(folder, ranks):
    argv = flags(folder, output_dir=folder / 'alone', finetune=folder / 'student.pth', **GLOBAL, **WORLD_OF_ONE)
    main.main(argv)
    one, two = toys.log_rows(folder / 'alone'), toys.log_rows(folder / 'global')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert all(row[f'train_loss_{term}'] > 1e-3 for row in one for term in TERMS)
    assert all(one[0][f'train_loss_{term}'] != one[1][f'train_loss_{term}'] for term in TERMS)
    assert 'means over the 16 images of 2 ranks' in ranks['global']


@pytest.mark.parametrize(('alpha', 'absent'), [(0, 'dist'), (1, 'base')])
def test_two_headed_student_trains_on_two_ranks(folder, ranks, alpha, absent):
    (row,) = toys.log_rows(folder / f'alpha{alpha}')
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == {absent}
    assert math.isfinite(row['train_loss'])
    assert '[4/4]' in ranks[f'alpha {alpha}']
    # AdamW counts the steps of a parameter from its first gradient.
    optimizer = toys.load(folder / f'alpha{alpha}' / 'checkpoint.pth')['optimizer']
    parameters = [index for group in optimizer['param_groups'] for index in group['params']]
    assert {index: optimizer['state'][index]['step'].item() for index in parameters} == dict.fromkeys(parameters, 4)


def test_evaluation_is_the_same_on_1_2_and_3_ranks(folder, ranks, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    alone = results(capsys.readouterr().out)
    assert [results(ranks[name]) for name in ('eval on 2', 'eval on 3')] == [alone] * 2
    assert alone[1].startswith(f'Accuracy of the network on the {sum(VAL)} test images: ')
    top1, top5 = (float(alone[0].split()[i]) * sum(VAL) / 100 for i in (2, 4))
    assert 0 < top1 < top5 < sum(VAL)


def test_no_dist_eval_counts_every_image_once(folder, ranks, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    assert results(ranks['eval on 2, unshared']) == results(capsys.readouterr().out)


def test_batchnorm_log_of_two_ranks_matches_the_checkpoint(folder, ranks, capsys):
    main.main(flags(folder, **NORMS, eval=True, resume=folder / 'norms' / 'checkpoint.pth'))
    loss = float(results(capsys.readouterr().out)[0].split()[-1])
    # The evaluation prints three digits.
    assert toys.log_rows(folder / 'norms')[-1]['test_loss'] == pytest.approx(loss, abs=6e-4)


def test_wrong_use_under_torchrun_prints_once(folder):
    wrong = flags(folder, teacher_path=folder / 'no.pth')
    ((code, out, err),) = finish(start(*TORCHRUN, 'main.py', *wrong))
    assert code == 1
    assert (out + err).count('--teacher-path') == 1
    assert f'main.py: error: --teacher-path {folder / "no.pth"}: No such file or directory' in err
    assert 'Epoch' not in out


def test_non_finite_loss_on_one_rank_stops_all(folder):
    for rank, value in enumerate([0.0, torch.nan]):
        teacher = toys.teacher(len(TRAIN), SIZE)
        with torch.no_grad():
            teacher.head.bias[0] += value
        toys.save(folder / f'teacher{rank}.pth', teacher.state_dict())
    argv = flags(folder, teacher_path=folder / 'teacher{rank}.pth', batch_size=2, output_dir=folder / 'nan')
    (folder / 'nan.json').write_text(json.dumps([(2, argv)]))
    (folder / 'driver.py').write_text(DRIVER)
    ((code, _, err),) = finish(start(*TORCHRUN, folder / 'driver.py', folder / 'nan.json'))
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith('main.py: error: not finite')]
    assert 'not finite at step 0 of epoch 0 on rank 1: loss_dist, teacher logits; images ' in line
    assert len(line.split('images ')[1].split()) == 2  # the batch of one rank
    assert 'rank 0' not in line
    assert list((folder / 'nan').iterdir()) == []
