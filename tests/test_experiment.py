"""Experiments: exact p-values, the choice of images, errors in plans, resuming, and tables that equal the logs."""

import dataclasses
import fcntl
import itertools
import json
import os
import random
import re
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import toys
import yaml

from flags import parse_args
from tools import experiment, parts, plans, results, rivals
from utils import UsageError

pytestmark = pytest.mark.more

SHIPPED = sorted((toys.ROOT / 'plans').glob('*.yaml'))
KD = '--distillation-type soft --distillation-alpha 1'

# A plan whose runs are those of toys.RUN.
PLAN = {
    'title': 'Toys',
    'data': {'source': 'folders', 'images_per_class': 4, 'val_images_per_class': 2, 'part': 'tune'},
    'flags': '--data-set FOLDER --input-size 32 --batch-size 8 --epochs 1 --num_workers 0 --device cpu',
    'student': f'--model deit_tiny_patch16_224 --model-kwargs {toys.RUN["model_kwargs"]}',
    'teacher': {'flags': f'--model cait_s24_224 --model-kwargs {toys.RUN["teacher_kwargs"]}'},
    'seeds': [0, 1, 2],
    'control': 'soft',
    'rows': {'alone': '', 'soft': KD, 'full': f'{KD} --s-id 0 -1 --t-id 0 -1 --w-full 4'},
}

# Stands for main.py: writes log.txt and starts.txt. Its learning rate says how it behaves.
STUB = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
value = lambda flag: [after for word, after in zip(words, words[1:]) if word == flag][-1]
folder, behaviour = pathlib.Path(value('--output_dir')), value('--lr')
with open(folder / 'starts.txt', 'a') as file:
    print(*words, file=file)
if behaviour == '2':  # fails
    print('a long story')
    sys.exit('main.py: error: --lr 2: is refused\\nan epilogue')
if behaviour == '3' and not (folder / 'log.txt').exists():  # works until it is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if behaviour == '4':
    os.kill(os.getppid(), signal.SIGTERM)
accuracy = 10 * int(value('--seed')) + len(folder.parent.name)
rows = [{'epoch': 0, 'test_acc1': 99.0, 'n_parameters': 7}, {'epoch': 1, 'test_acc1': accuracy, 'n_parameters': 7}]
wait = behaviour in '34' and not (folder / 'log.txt').exists()
(folder / 'log.txt').write_text('\\n'.join(map(json.dumps, rows)))
(folder / 'checkpoint.pth').write_text('')
if wait:
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(toys.ROOT)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / 'stub.py').write_text(STUB)
    command = lambda run, python='': [sys.executable, '-S', '-E', str(tmp_path / 'stub.py'), *run.words]  # noqa: E731
    monkeypatch.setattr(results, 'command', command)
    monkeypatch.setattr(experiment, 'POLL_SECONDS', 0.01)
    monkeypatch.setattr(results, 'draw', lambda plan, out: False)


def write(folder: Path, **changes) -> str:
    path = folder / 'plan.yaml'
    path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return str(path)


def fake_plan(folder: Path, **changes) -> str:
    """A plan without images."""
    flags = PLAN['flags'].replace('FOLDER', 'FAKE') + ' --lr 1'
    return write(folder, **{'data': {'source': 'flags'}, 'flags': flags, **changes})


def starts(out: Path) -> dict[str, int]:
    """How often each run was started."""
    found = out.glob('runs/**/starts.txt')
    return {'/'.join(path.parts[-3:-1]): len(path.read_text().splitlines()) for path in found}


# Statistics -----------------------------------------------------------------------------------------------------------


def naive_p(differences: list[Fraction]) -> float:
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= abs(sum(differences)) for value in sums) / len(sums)


def test_p_value_equals_enumeration_with_exact_numbers():
    chance = random.Random(3)
    for n in [*range(1, 10)] * 4:
        # Thirds are no binary numbers, and small numerators make many sums equal.
        exact = [Fraction(chance.randint(-4, 9), 3) for _ in range(n)]
        assert results.sign_flip_p([float(x) for x in exact]) == naive_p(exact), exact


def test_p_value_of_one_sided_differences_is_the_smallest_possible():
    assert results.sign_flip_p([1.5, 2, 0.1, 3, 1]) == 0.0625
    assert results.sign_flip_p([-1.5, -2, -0.1, -3, -1, -1, -1, -1]) == 2 / 2**8 < 0.01
    assert results.sign_flip_p([0.1] * 30) == 2 / 2**30
    assert results.sign_flip_p([0.0, 0.0]) == 1
    with pytest.raises(ValueError, match='1 to 40'):
        results.sign_flip_p([])


# Parts of a data set --------------------------------------------------------------------------------------------------


def test_parts_are_fixed_disjoint_and_nested():
    names = [f'{i:04}.jpg' for i in range(101)]
    tune, confirm = (parts.choose('cat', names, 50, part) for part in ('tune', 'confirm'))
    assert not set(tune) & set(confirm)
    assert len(set(tune)) == len(set(confirm)) == 50
    assert parts.choose('cat', names[::-1], 50, 'tune') == tune
    assert set(parts.choose('cat', names, 10, 'tune')) < set(tune)
    assert set(parts.choose('cat', names, 10, 'confirm')) < set(confirm)
    assert set(parts.choose('dog', names, 50, 'tune')) != set(tune)
    assert set(parts.choose('cat', names, None, 'all')) == set(names)
    # Fixed for all time: results of other machines must belong to the same images.
    assert parts.choose('cat', names, 3, 'tune') == ['0030.jpg', '0068.jpg', '0057.jpg']
    with pytest.raises(UsageError, match='cat: 51 images for part tune, but there are 101; at most 50'):
        parts.choose('cat', names, 51, 'tune')


@pytest.mark.parametrize('can_link', [True, False], ids=['hard links', 'symbolic links'])
def test_linked_part_is_balanced_and_complete(tmp_path, monkeypatch, can_link):
    if not can_link:
        monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError('another device')))
    for split, counts in {'train': [9, 12, 8], 'val': [4, 5, 6]}.items():
        toys.write_images(tmp_path / 'all' / split, counts, 4)
    (tmp_path / 'all' / 'train' / '.cache').mkdir()
    half = tmp_path / 'tune.unfinished' / 'train' / 'c7'  # left by a kill
    half.mkdir(parents=True)
    for part in ('tune', 'confirm'):
        parts.link_part(tmp_path / 'all', tmp_path / part, {'train': 4, 'val': 2}, part)
        parts.link_part(tmp_path / 'all', tmp_path / part, {'train': 4, 'val': 2}, part)
    found = {part: sorted(path.relative_to(tmp_path / part) for path in (tmp_path / part).glob('*/*/*.png'))
             for part in ('tune', 'confirm')}  # fmt: skip
    assert not set(found['tune']) & set(found['confirm'])
    for part, files in found.items():
        folders = [str(file.parent) for file in files]
        assert {folder: folders.count(folder) for folder in folders} == {
            f'{split}/c{i}': count for split, count in (('train', 4), ('val', 2)) for i in range(3)
        }
        assert all((tmp_path / part / file).read_bytes() == (tmp_path / 'all' / file).read_bytes() for file in files)
        assert all((tmp_path / part / file).is_symlink() != can_link for file in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['all', 'confirm', 'tune']


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_plan_compares_like_with_like(path):
    plan = plans.read_plan(str(path), 'IMAGES')
    assert {'soft', 'release', 'full'} <= plan.rows.keys()
    assert plan.control == 'soft'
    runs = list(plans.make_runs(plan, Path('OUT'), plan.seeds))
    assert [run.row for run in runs].count('teacher') == 1
    assert len({run.folder for run in runs}) == len(runs) == 1 + len(plan.seeds) * len(plan.rows)
    chosen = [run for run in runs if run.seed == plan.seeds[0]]
    with rivals.registered():
        configs = {run.row: (run, parse_args(run.words)) for run in chosen}
    control = configs['soft'][1]
    method = 'distillation_.*|w_.*|[st]_id|relations|token_align|teacher_.*|output_dir|batch_size|log_grad_share'
    for row, (run, config) in configs.items():
        assert config.loss.has_teacher == (row not in ('alone', 'teacher'))
        if row != 'teacher':
            assert config.optim.batch_size * run.ranks == control.optim.batch_size
            differing = {key for key, value in config.flags().items() if value != control.flags()[key]}
            assert {key for key in differing if not re.fullmatch(method, key)} == set(), row


def changed(section: str, **changes) -> dict:
    return {section: PLAN[section] | changes}


BAD_PLANS = [
    ({'seed': [1]}, 'seed: unknown key; did you mean seeds?'),
    (changed('teacher', flgs='x'), 'teacher.flgs: unknown key; did you mean flags?'),
    (changed('rows', full={'ranks': 2, 'flag': ''}), 'rows.full.flag: unknown key; did you mean flags?'),
    ({'seeds': None}, 'seeds: must be a list of different whole numbers, not None'),
    ({'seeds': [1, 1]}, 'seeds: must be a list of different whole numbers, not [1, 1]'),
    ({'control': 'sfot'}, "control: must be one of alone, soft, full, not 'sfot'"),
    ({'rows': []}, 'rows: must be a mapping of names to flags, not []'),
    ({'rows': ['soft']}, "rows: must be a mapping, not ['soft']"),
    (changed('rows', **{'../x': ''}), 'rows.../x: a name of a row must be letters'),
    (changed('rows', full='--epocs 3'), 'rows.full: --epocs: unrecognized argument; did you mean --epochs?'),
    (changed('rows', full='--lr "1'), 'rows.full.flags: no closing quotation in'),
    (changed('rows', full=f'{KD} --s-id 0 1 --t-id 0'), 'rows.full: --s-id 0 1 and --t-id 0: needs as many'),
    (changed('rows', full='--distillation-type sof'), "rows.full: --distillation-type: invalid choice: 'sof'"),
    ({'student': '--drop-path 2'}, 'student: --drop-path: 2: must be a number'),
    ({'flags': '--epochs 0'}, 'flags: --epochs: 0: must be a whole number'),
    (changed('teacher', flags='--modl x'), 'teacher.flags: --modl: unrecognized argument; did you mean --model?'),
    (changed('rows', full='--seed 3'), 'rows.full: --seed: is set for each run; use seeds'),
    (changed('rows', full='--output_dir x'), 'rows.full: --output-dir: is set for each run; use --out'),
    ({'data': {'source': 'digit'}}, "data.source: must be one of digits, folders, flags, not 'digit'"),
    ({'data': {'source': 'digits', 'part': 'tune'}}, 'data.part: needs data.source folders, not digits'),
]  # fmt: skip


@pytest.mark.parametrize(('changes', 'message'), BAD_PLANS, ids=[message[:40] for _, message in BAD_PLANS])
def test_bad_plan_is_one_line_with_file_and_key(tmp_path, capsys, changes, message):
    path = write(tmp_path, **changes)
    assert_refused(capsys, [path, '--data', str(tmp_path), '--out', str(tmp_path / 'out')], f'{path}: {message}')
    assert not (tmp_path / 'out').exists()


def assert_refused(capsys, argv: list[str], message: str) -> None:
    assert experiment.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f'experiment: error: {message}')
    assert printed.err.count('\n') == 1
    assert printed.out == ''


def test_missing_key_broken_yaml_and_wrong_arguments(tmp_path, capsys):
    path = tmp_path / 'plan.yaml'
    for text, message in (
        (
            yaml.safe_dump({key: value for key, value in PLAN.items() if key != 'seeds'}),
            'seeds: missing; must be a list',
        ),
        (yaml.safe_dump({key: value for key, value in PLAN.items() if key != 'control'}), 'control: missing; must be'),
        ('title: a\nseeds: [1', 'line 2: no valid YAML (expected'),
        ('title: a\ntitle: b\n', 'line 2: no valid YAML (the key title comes twice)'),
        ('just text', "the plan: must be a mapping, not 'just text'"),
    ):
        path.write_text(text)
        assert_refused(capsys, [str(path)], f'{path}: {message}')
    assert_refused(capsys, [str(tmp_path / 'none.yaml')], f'{tmp_path / "none.yaml"}: cannot be read (No such file')
    write(tmp_path)
    assert_refused(capsys, [str(path)], f'--data: {path} needs the path of the data set')
    assert_refused(capsys, [str(path), '--epochs', '0'], '--epochs: 0: must be a whole number')
    assert_refused(
        capsys, [str(path), '--data', 'x', '--only', 'ful'], f'--only ful: no row of {path}; did you mean full?'
    )
    assert_refused(capsys, [str(path), '--data', str(tmp_path / 'x'), '--out', str(tmp_path / 'o')],
                   f'{path}: data: {tmp_path / "x" / "train"}: has no class folders')  # fmt: skip


def test_axes_make_a_grid_and_teachers_are_shared(tmp_path):
    axes = ['--epochs', '3', '1', '3', '--images-per-class', '2', '4']
    plan, _, _ = experiment.load(experiment.parse([write(tmp_path), '--data', 'IMAGES', *axes]))
    runs = list(plans.make_runs(plan, Path('OUT'), plan.seeds))
    assert sum(run.row == 'teacher' for run in runs) == 2 * 3  # one for each number of images and each seed
    assert len(runs) == 2 * 3 + 2 * 2 * 3 * 3
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for run in runs:
        config = parse_args(run.words)
        assert config.run.seed == run.seed
        assert config.data.data_path.endswith(f'tune-{run.cell.images}')
        assert run.row == 'teacher' or config.optim.epochs == run.cell.epochs
        if run.teacher:
            assert (run.teacher.seed, run.teacher.images) == (run.seed, run.images)
            assert config.model.teacher_path == str(run.teacher.folder / 'checkpoint.pth')
            assert config.model.teacher_kwargs == parse_args(run.teacher.words).model.model_kwargs
            assert runs.index(run.teacher) < runs.index(run)
    once = PLAN['teacher'] | {'train': 'once', 'images_per_class': 8}
    plan, _, _ = experiment.load(experiment.parse([write(tmp_path, teacher=once), '--data', 'IMAGES', *axes]))
    (teacher,) = [run for run in plans.make_runs(plan, Path('OUT'), [5, 6]) if run.row == 'teacher']
    assert (teacher.seed, teacher.images, teacher.data) == (0, 8, 'tune-8')


# Running --------------------------------------------------------------------------------------------------------------


def test_interrupted_experiment_goes_on_and_repeats_nothing(tmp_path, stub, capsys):
    out = tmp_path / 'out'
    argv = [fake_plan(tmp_path, rows=PLAN['rows'] | {'full': f'{KD} --lr 3'}, seeds=[0]), '--out', str(out)]
    assert experiment.main([*argv, '--jobs', '1', '--minutes', '0.02']) == 1
    assert 'Time is up' in capsys.readouterr().out
    assert starts(out) == {'teacher/seed-0': 1, 'alone/seed-0': 1, 'soft/seed-0': 1, 'full/seed-0': 1}
    assert not results.read_state(out / 'runs' / 'full' / 'seed-0')['finished']
    times = {path: path.stat().st_mtime_ns for path in out.glob('runs/**/log.txt') if 'full' not in path.parts}
    assert experiment.main(argv) == 0
    assert starts(out) == {'teacher/seed-0': 1, 'alone/seed-0': 1, 'soft/seed-0': 1, 'full/seed-0': 2}
    first, second = (out / 'runs' / 'full' / 'seed-0' / 'starts.txt').read_text().splitlines()
    assert first == second
    assert '--resume auto' in first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    printed = capsys.readouterr().out
    assert '3 of 4 runs are finished' in printed
    assert 'full, seed 0: Acc@1 4.00, +0.00 against soft' in printed


def test_runs_without_a_teacher_do_not_wait_for_one(tmp_path, stub):
    out = tmp_path / 'out'
    teacher = {'flags': PLAN['teacher']['flags'] + ' --lr 3', 'train': 'once'}
    rows = PLAN['rows'] | {'full': {'flags': KD, 'ranks': 2}}
    argv = [fake_plan(tmp_path, rows=rows, teacher=teacher), '--out', str(out), '--jobs', '2', '--minutes', '0.03']
    assert experiment.main(argv) == 1
    assert {run for run in starts(out) if 'teacher' not in run} == {f'alone/seed-{seed}' for seed in PLAN['seeds']}


def test_signal_stops_the_runs_first(tmp_path, stub):
    out = tmp_path / 'out'
    with pytest.raises(SystemExit) as stopped:
        experiment.main([fake_plan(tmp_path, rows={'soft': '--lr 4'}, seeds=[0]), '--out', str(out)])
    assert stopped.value.code == 143
    state = results.read_state(out / 'runs' / 'soft' / 'seed-0')
    assert state['finished'] is False
    with open(out / 'runs' / 'soft' / 'seed-0' / 'lock') as lock:  # nobody holds it any longer
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_run_of_a_killed_experiment_is_not_started_twice(tmp_path, stub):
    out = tmp_path / 'out'
    plan = plans.read_plan(fake_plan(tmp_path, rows={'soft': ''}, seeds=[0]))
    (run,) = plans.make_runs(plan, out, [0])
    run.folder.mkdir(parents=True)
    with open(run.folder / 'lock', 'a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert experiment.start(run, 1) is None
    process = experiment.start(run, 1)
    assert process.popen.wait() == 0
    assert starts(out) == {'soft/seed-0': 1}


def test_failed_run_is_reported_and_the_others_go_on(tmp_path, stub, capsys):
    out = tmp_path / 'out'
    argv = [fake_plan(tmp_path, rows=PLAN['rows'] | {'alone': '--lr 2'}, seeds=[0]), '--out', str(out)]
    assert experiment.main(argv) == 1
    assert 'alone, seed 0: failed: main.py: error: --lr 2: is refused\n' in capsys.readouterr().out
    assert starts(out) == {'teacher/seed-0': 1, 'alone/seed-0': 1, 'soft/seed-0': 1, 'full/seed-0': 1}
    assert 'alone, seed 0' in (out / 'results.md').read_text()
    teacher = PLAN['teacher'] | {'flags': PLAN['teacher']['flags'] + ' --lr 2'}
    argv = [fake_plan(tmp_path, teacher=teacher, seeds=[0]), '--out', str(tmp_path / 'other')]
    assert experiment.main(argv) == 1
    assert starts(tmp_path / 'other') == {'teacher/seed-0': 1, 'alone/seed-0': 1}
    assert 'soft, seed 0: failed: its teacher failed (teacher, seed 0)' in capsys.readouterr().out


def test_other_flags_in_the_same_folder_are_refused(tmp_path, stub, capsys):
    out = ['--out', str(tmp_path / 'out')]
    assert experiment.main([fake_plan(tmp_path, seeds=[0]), *out, '--only', 'soft']) == 0
    assert starts(tmp_path / 'out').keys() == {'teacher/seed-0', 'soft/seed-0'}
    capsys.readouterr()
    path = fake_plan(tmp_path, rows={'soft': f'{KD} --epochs 7'}, seeds=[0])
    assert experiment.main([path, *out]) == 2
    assert '/soft/seed-0 was made with --epochs 1, now 7; use another --out' in capsys.readouterr().err


def test_table_equals_the_last_rows_of_the_logs(tmp_path, stub, capsys):
    out = tmp_path / 'out'
    path = fake_plan(tmp_path)
    assert experiment.main([path, '--out', str(out)]) == 0
    assert experiment.main([path, '--out', str(out), '--seeds', '7', '--only', 'alone']) == 0
    rows = {row['row']: row for row in json.loads((out / 'results.json').read_text())['rows']}
    logs = {
        row: {seed: toys.log_rows(out / 'runs' / row / f'seed-{seed}')[-1]['test_acc1'] for seed in PLAN['seeds']}
        for row in ('teacher', *PLAN['rows'])
    }
    logs['alone'][7] = toys.log_rows(out / 'runs' / 'alone' / 'seed-7')[-1]['test_acc1']
    for row, expected in logs.items():
        assert rows[row]['acc1'] == {str(seed): value for seed, value in expected.items()}
        mean, spread = statistics.fmean(expected.values()), statistics.stdev(expected.values())
        assert f'| {len(expected)} | {mean:.2f} ± {spread:.2f} | ' in (out / 'results.md').read_text()
    assert rows['alone']['gain'] == {str(seed): logs['alone'][seed] - logs['soft'][seed] for seed in PLAN['seeds']}
    assert rows['alone']['p'] == 2 / 2**3
    assert rows['soft']['gain'] == rows['teacher']['gain'] == {}
    printed = capsys.readouterr().out
    assert '| alone | 7 | 4 | 30.00 ± 31.09 | +1.00 ± 0.00 (n = 3) | 0.2500 |' in printed
    before = starts(out)
    assert experiment.main([path, '--out', str(out), '--report']) == 0
    assert starts(out) == before
    assert '| alone | 7 | 4 | 30.00' in capsys.readouterr().out


def test_figure_shows_each_seed_or_the_gains_along_an_axis(tmp_path, stub):
    out = tmp_path / 'out'
    plan = plans.read_plan(fake_plan(tmp_path))
    axis = dataclasses.replace(plan, epochs=[1, 3])
    for epochs in ([], ['--epochs', '1', '3']):
        assert experiment.main([str(tmp_path / 'plan.yaml'), '--out', str(out), *epochs]) == 0
    assert {'results.md', 'results-epochs.md'} <= {path.name for path in out.iterdir()}
    lines = results.build_lines(axis, out)
    figure = results.make_figure(axis, lines)
    shown = {label: container[0].get_xydata().tolist() for container, label in by_label(figure.axes[0])}
    assert shown == {'alone': [[1, 1], [3, 1]], 'full': [[1, 0], [3, 0]]}  # the stub's accuracy: letters of the row
    results.plt.close(figure)
    line = next(line for line in lines if line.row == 'alone')
    figure = results.make_figure(plan, [line])
    assert sorted(x for drawn in figure.axes[0].lines for x in drawn.get_xdata()) == [5, 15, 15, 15, 25]
    results.plt.close(figure)


def by_label(axes) -> list:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))


def test_toy_experiment_with_real_runs(tmp_path, capsys):
    for split in ('train', 'val'):
        toys.write_images(tmp_path / 'all' / split, [8, 8], 32)
    out = tmp_path / 'out'
    argv = [write(tmp_path, seeds=[0]), '--data', str(tmp_path / 'all'), '--out', str(out), '--only', 'full']
    assert experiment.main(argv) == 0, capsys.readouterr().out
    (row,) = toys.log_rows(out / 'runs' / 'full' / 'seed-0')
    toys.assert_sound(row, {'base'})
    args = toys.load(out / 'runs' / 'full' / 'seed-0' / 'checkpoint.pth')['args']
    assert args['teacher_path'].endswith('runs/teacher/seed-0/checkpoint.pth')
    assert f'{row["test_acc1"]:.2f}' in (out / 'results.md').read_text()
    assert (out / 'results.png').stat().st_size > 1000
    assert '<svg' in (out / 'results.svg').read_text()
