"""The command line in fresh interpreters: launchers, several ranks, exit codes. Few, for each costs seconds."""

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

ROOT = Path(main.__file__).parent
PATIENCE = 180  # seconds after which a run counts as hanging; no figure of speed
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
TERMS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']

# Above 32 pixels a random crop is resized, and one of a single colour stays as it was; below, it may get black edges.
SIZE, TRAIN, VAL = 40, [2] * 8, [2, 2, 2, 1, 1, 1, 1, 1]
WORLD_OF_ONE = {'batch_size': 16}  # all 16 images are one step, whoever takes them
WORLD_OF_TWO = {'batch_size': 8}

# Runs main.main for every list of flags that asks for so many ranks; `{rank}` in a flag is the number of the rank.
DRIVER = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
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
    # By a launcher of the tests' own; and what hides that output has buffers.
    told = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'PYTHONUNBUFFERED')
    environment = {key: value for key, value in os.environ.items() if key not in told}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**environment, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **variables},
        stdout=output,
        stderr=output,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none is left behind."""
    hanging = time.monotonic() + PATIENCE
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > hanging:
            break
        time.sleep(0.1)
    for process in processes:
        try:
            process.wait(10)  # the others of a group miss the one that failed, sooner or later
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher takes its ranks along
    texts = [process.communicate() for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def finish_well(*processes: subprocess.Popen) -> list[str]:
    """What each printed; all must have ended well."""
    ends = finish(*processes)
    assert [code for code, _, _ in ends] == [0] * len(ends), '\n'.join(err[-3000:] for _, _, err in ends)
    return [out for _, out, _ in ends]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tree of one-colour images, a teacher for it, and a student to begin with or to be evaluated."""
    folder = tmp_path_factory.mktemp('cli')
    toys.write_images(folder / 'images' / 'train', TRAIN, SIZE)
    toys.write_images(folder / 'images' / 'val', VAL, SIZE)
    torch.manual_seed(0)
    for name, model in [('teacher', toys.teacher(len(TRAIN), SIZE)), ('student', toys.student(len(TRAIN), SIZE))]:
        # At its usual 0.02 all patches of a one-colour image would be the same token, and their relations 1.
        torch.nn.init.normal_(model.pos_embed)
        toys.save(folder / f'{name}.pth', model.state_dict())
    return folder


def flags(folder: Path, **changes) -> list[str]:
    data = {'data_set': 'FOLDER', 'data_path': folder / 'images', 'input_size': SIZE}
    recipe = {'teacher_path': folder / 'teacher.pth', 'warmup_epochs': 0, 'lr': 0.3, **toys.PLAIN_IMAGES}
    return toys.flags(**{**data, **recipe, **changes})


def losses(row: dict) -> dict[str, float]:
    return {key: row[key] for key in row if key.startswith(('train_loss', 'test_'))}


def test_a_run_goes_on_when_the_disk_below_its_output_is_full_or_its_reader_has_gone(folder):
    reader, writer = os.pipe()
    os.close(reader)
    with open('/dev/full', 'w') as full, open(writer, 'w') as broken:
        argv = {'epochs': 2, 'num_workers': 1}  # a process is made only after all buffers are flushed
        runs = [start('main.py', *flags(folder, output_dir=folder / name, **argv), output=output)
                for name, output in (('full', full), ('broken', broken))]  # fmt: skip
        assert [run.wait(100) for run in runs] == [0, 0]
    assert [len(toys.log_rows(folder / name)) for name in ('full', 'broken')] == [2, 2]


def test_launch_torchrun_and_plain_python_start_the_same_run(folder):
    names = ['launch', 'torchrun', 'plain']
    worlds = [WORLD_OF_TWO, WORLD_OF_TWO, WORLD_OF_ONE]
    argv = {
        name: ['main.py', *flags(folder, output_dir=folder / name, finetune=folder / 'student.pth', **world)]
        for name, world in zip(names, worlds, strict=True)
    }
    launch = ['-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={free_port()}']
    outputs = finish_well(
        start(*launch, *argv['launch'], '--distributed'),  # as the release's README has it
        start(*TORCHRUN, *argv['torchrun']),
        start(*argv['plain']),
    )
    (launched,), (torchran,), (plain,) = (toys.log_rows(folder / name) for name in names)
    assert launched == torchran
    toys.assert_same(*(toys.load(folder / name / 'checkpoint.pth')['model'] for name in names[:2]))
    # Relations across images see a rank's own images only, so those two terms may differ.
    same = ['train_loss_base', 'train_loss_dist', 'train_loss_mf_patch']
    assert {key: launched[key] for key in same} == pytest.approx({key: plain[key] for key in same}, abs=1e-5)
    assert all(plain[f'train_loss_{term}'] > 1e-3 for term in TERMS)
    assert '2 ranks × 8 images = 16 a step' in outputs[0]
    assert '1 rank × 16 images = 16 a step' in outputs[2]
    # Only the first rank speaks.
    assert [out.count('Max accuracy') for out in outputs] == [1, 1, 1]


EQUAL = {'epochs': 3, 'w_sample': 0, 'w_rand': 0, 'w_full': 0}
GLOBAL = {'epochs': 2, 'relations': 'global', 'K': 40}  # of 16 images of 25 patches
TWO_HEADED = {'model': 'deit_tiny_distilled_patch16_224', 'batch_size': 2, 'epochs': 1}
NORMS = {**toys.ALONE, 'model': 'resnet10t', 'model_kwargs': None, 'epochs': 4, 'lr': 0.05}
EVALUATION = {'eval': True, 'batch_size': 2, **toys.ALONE}


@pytest.fixture(scope='module')
def ranks(folder):
    """What the first rank prints in each of these runs on two or three ranks, all by the same three interpreters."""
    weights = folder / 'student.pth'
    runs = {
        'equal': (2, flags(folder, output_dir=folder / 'equal', finetune=weights, **EQUAL, **WORLD_OF_TWO)),
        'global': (2, flags(folder, output_dir=folder / 'global', finetune=weights, **GLOBAL, **WORLD_OF_TWO)),
        # 16 images on two ranks by two: four steps
        'alpha 0': (2, flags(folder, output_dir=folder / 'alpha0', distillation_alpha=0, **TWO_HEADED)),
        'alpha 1': (2, flags(folder, output_dir=folder / 'alpha1', distillation_alpha=1, **TWO_HEADED)),
        'norms': (2, flags(folder, output_dir=folder / 'norms', **NORMS, **WORLD_OF_TWO)),
        'eval on 2': (2, flags(folder, resume=weights, **EVALUATION)),
        'eval on 2, unshared': (2, flags(folder, resume=weights, no_dist_eval=True, **EVALUATION)),
        'eval on 3': (3, flags(folder, resume=weights, **EVALUATION)),
    }
    # A file to meet at for each: this is also what --dist_url is for.
    with_place = [(n, [*argv, '--dist_url', f'file://{folder}/meet{i}']) for i, (n, argv) in enumerate(runs.values())]
    (folder / 'runs.json').write_text(json.dumps(with_place))
    three = [start('-c', DRIVER, folder / 'runs.json', RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(3)]
    first = finish_well(*three)[0]
    return dict(zip(runs, first.split('== run')[1:], strict=True))


def results(text: str) -> list[str]:
    return [line for line in text.splitlines() if 'Acc' in line]


def test_two_ranks_train_as_one_process_does(folder, ranks):
    main.main(flags(folder, output_dir=folder / 'one', finetune=folder / 'student.pth', **EQUAL, **WORLD_OF_ONE))
    one, two = toys.log_rows(folder / 'one'), toys.log_rows(folder / 'equal')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
        assert found['train_lr'] == expected['train_lr']
    for term in ('base', 'dist', 'mf_patch'):  # there is something to compare, and the weights do move
        assert abs(one[0][f'train_loss_{term}'] - one[-1][f'train_loss_{term}']) > 1e-3
    assert '2 ranks × 8 images' in ranks['equal']


def test_with_global_relations_every_term_of_two_ranks_is_that_of_one_process(folder, ranks):
    argv = flags(folder, output_dir=folder / 'alone', finetune=folder / 'student.pth', **GLOBAL, **WORLD_OF_ONE)
    main.main(argv)
    one, two = toys.log_rows(folder / 'alone'), toys.log_rows(folder / 'global')
    for expected, found in zip(one, two, strict=True):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert all(row[f'train_loss_{term}'] > 1e-3 for row in one for term in TERMS)
    assert all(one[0][f'train_loss_{term}'] != one[1][f'train_loss_{term}'] for term in TERMS)
    assert 'means over the 16 images of 2 ranks' in ranks['global']


@pytest.mark.parametrize(('alpha', 'absent'), [(0, 'dist'), (1, 'base')])
def test_a_two_headed_student_trains_on_two_ranks_at_either_end_of_alpha(folder, ranks, alpha, absent):
    (row,) = toys.log_rows(folder / f'alpha{alpha}')
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == {absent}
    assert math.isfinite(row['train_loss'])
    assert '[4/4]' in ranks[f'alpha {alpha}']
    # AdamW counts the steps of a parameter from its first gradient on.
    optimizer = toys.load(folder / f'alpha{alpha}' / 'checkpoint.pth')['optimizer']
    parameters = [index for group in optimizer['param_groups'] for index in group['params']]
    assert {index: optimizer['state'][index]['step'].item() for index in parameters} == dict.fromkeys(parameters, 4)


def test_evaluation_counts_the_same_on_one_two_and_three_ranks(folder, ranks, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    alone = results(capsys.readouterr().out)
    assert [results(ranks[name]) for name in ('eval on 2', 'eval on 3')] == [alone] * 2
    assert alone[1].startswith(f'Accuracy of the network on the {sum(VAL)} test images: ')
    top1, top5 = (float(alone[0].split()[i]) * sum(VAL) / 100 for i in (2, 4))
    assert 0 < top1 < top5 < sum(VAL)


def test_evaluation_that_is_not_shared_counts_every_image_once(folder, ranks, capsys):
    main.main(flags(folder, resume=folder / 'student.pth', **EVALUATION))
    assert results(ranks['eval on 2, unshared']) == results(capsys.readouterr().out)


def test_the_log_of_two_ranks_of_a_batchnorm_student_is_that_of_its_checkpoint(folder, ranks, capsys):
    main.main(flags(folder, **NORMS, eval=True, resume=folder / 'norms' / 'checkpoint.pth'))
    loss = float(results(capsys.readouterr().out)[0].split()[-1])
    assert toys.log_rows(folder / 'norms')[-1]['test_loss'] == pytest.approx(loss, abs=6e-4)  # printed to three places


def test_wrong_use_under_a_launcher_is_said_once(folder):
    wrong = flags(folder, teacher_path=folder / 'no.pth')
    ((code, out, err),) = finish(start(*TORCHRUN, 'main.py', *wrong))
    assert code == 1
    assert (out + err).count('--teacher-path') == 1
    assert f'main.py: error: --teacher-path {folder / "no.pth"}: No such file or directory' in err
    assert 'Epoch' not in out


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_is_named(folder):
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
    assert len(line.split('images ')[1].split()) == 2  # a rank's batch
    assert 'rank 0' not in line
    assert list((folder / 'nan').iterdir()) == []
