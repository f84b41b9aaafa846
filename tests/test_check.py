"""The check before a run: its numbers, its refusals, and that it writes nothing."""

import logging
import re
import shlex
import shutil
import time

import pytest
import recorded_call
import torch
import toys
from torch import nn

import engine
import locks
import losses
import main
import tools.check

pytestmark = [pytest.mark.more, pytest.mark.usefixtures('few_generated_images')]

N, D_S, D_T, CLASSES = 16, 32, 48, 10  # N patches of 8 pixels in 32


@pytest.fixture
def check(files, capsys):
    """A function that checks a toy run and returns the lines of its screen."""

    def start(*own: str, **changes) -> list[str]:
        capsys.readouterr()
        argv = toys.flags(**{'teacher_path': files / 'teacher.pth', **changes})
        tools.check.main([*argv, '--steps', '1', '--images', '0', *own])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 45
        assert max(map(len, lines)) <= 120
        return lines

    return start


@pytest.fixture
def no_cost(monkeypatch):
    """Counting takes longer than all else."""
    monkeypatch.setattr(tools.check, 'log_cost', lambda *_: None)


def joined(lines: list[str]) -> str:
    """Without the breaks of lines."""
    return ' '.join(' '.join(lines).split())


def refused(capsys, *argv: str) -> str:
    """The line on stderr of a check that ends with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        tools.check.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count('\n') == 1
    return error


def numbers(text: str) -> list[int]:
    return [int(word.replace(',', '')) for word in re.findall(r'\d[\d,]*(?= (?:parameters|MACs|bytes))', text)]


# Numbers --------------------------------------------------------------------------------------------------------------


def deit_macs(tokens: int, width: int, blocks: int) -> int:
    """Patches of 8 pixels, blocks of qkv, attention, projection and MLP, and the head."""
    block = tokens * width * (3 + 1 + 8) * width + 2 * tokens**2 * width
    return N * 3 * 8 * 8 * width + blocks * block + width * CLASSES


def cait_macs(width: int, blocks: int, heads: int) -> int:
    """As DeiT without class token in its blocks, but scores and maps are mixed across heads; two class blocks."""
    talking = blocks * 2 * heads**2 * N**2
    attention = width**2 * (1 + 2 * (N + 1) + 1) + 2 * (N + 1) * width  # one query, N + 1 keys and values
    return deit_macs(N, width, blocks) + talking + 2 * (attention + 8 * width**2)


def test_numbers_of_the_toy_pair_by_hand(check):
    """Three pairs, 8 images of 16 tokens. K is 192, but there are 128 tokens."""
    lines = check()
    start = next(i for i, line in enumerate(lines) if line.startswith('cost'))
    count = [sum(p.numel() for p in model.parameters()) for model in (toys.student(), toys.teacher())]
    assert numbers(lines[start + 1]) == [count[0], deit_macs(N + 1, D_S, 4)]
    assert numbers(lines[start + 2]) == [count[1], cait_macs(D_T, 6, 4)]
    assert [line.strip() for line in lines if line.endswith(' bytes')] == [
        f'1·sample: 16 maps of 8×8 tokens in a pair; {3 * 16 * 8**2 * 4:,} bytes',
        f'1·patch: 8 maps of 16×16 tokens in a pair; {3 * 8 * 16**2 * 4:,} bytes',
        f'1·random: 1 map of 128×128 tokens in a pair; {3 * 128**2 * 4:,} bytes',
        f'1·full: 1 map of 128×128 tokens in a pair; {3 * 128**2 * 4:,} bytes',
    ]
    pair = 'student 4×4 of width 32, teacher 4×4 of width 48, compared on 4×4'
    assert f'pairs       0–0 1–1 3–5: {pair}' in lines


def test_macs_of_one_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).train()
    assert tools.check.count_macs(model, torch.zeros(1, 3, 2, 2)) == 60
    assert model.training


def test_relations_alone_with_a_teacher_without_head(files, check):
    """The two class blocks are not computed, there is no accuracy, and maps of bfloat16 have half the bytes."""
    lines = check('--images', '8', teacher_path=files / 'headless.pth', distillation_alpha=0, relation_dtype='bfloat16')
    line = next(line for line in lines if 'teacher' in line and 'MACs' in line)
    attention = D_T**2 * (1 + 2 * (N + 1) + 1) + 2 * (N + 1) * D_T
    assert numbers(line)[1] == cait_macs(D_T, 6, 4) - 2 * (attention + 8 * D_T**2) - D_T * CLASSES
    assert lines[-1] == 'accuracy    not measured: the teacher has 0 classes, the data 10'
    found = [numbers(line)[0] for line in lines if line.endswith(' bytes')]
    assert found == [3 * 16 * 8**2 * 2, 3 * 8 * 16**2 * 2, 3 * 128**2 * 2, 3 * 128**2 * 4]


def test_maps_are_those_that_the_loss_computes(monkeypatch):
    """`MAPS` has each term, and the sizes are those of the tokens that a term hands over."""
    assert tools.check.MAPS.keys() == losses.RELATION_TERMS.keys()
    B, K, seen = 3, 7, []
    monkeypatch.setattr(losses, 'map_distance', lambda s, t, dtype: seen.append(tuple(s.shape[:2])) or s.sum())
    student, teacher = torch.randn(B, N, D_S), torch.randn(B, N, D_T)
    options = losses.RelationOptions(K, torch.Generator().manual_seed(0))
    for name in ('sample', 'patch', 'rand'):
        losses.RELATION_TERMS[name].distance(student, teacher, options)
    assert seen == [tools.check.MAPS[name](B, N, K) for name in ('sample', 'patch', 'rand')]
    tokens = student.flatten(0, 1)
    assert tools.check.MAPS['full'](B, N, K) == (1, len(losses.relation_map(tokens)))


def test_pairs_with_other_grids_and_what_is_done_to_the_images(tmp_path, check, no_cost):
    """A student with patches of 16 pixels; a teacher of larger images, which were normalised in another way."""
    state = toys.teacher(size=64).state_dict()
    kept = {'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.5, 0.125]}
    path = toys.save(tmp_path / 'teacher.pth', {'model': state, 'student': kept})
    kwargs = 'patch_size=16 embed_dim=32 depth=4 num_heads=2'
    changes = {'model_kwargs': kwargs, 'teacher_input_size': 64, 'token_align': 'pool'}
    text = joined(check(**changes, teacher_path=path))
    assert '0–0 1–1 3–5: student 2×2 of width 32, teacher 8×8 of width 48, compared on 2×2' in text
    assert 'normalise student mean 0.485 0.456 0.406, std 0.229 0.224 0.225 ' in text
    images = 'the images are converted and resized to 64 pixels on the device'
    assert f'teacher mean 0.5 0.5 0.5, std 0.25 0.5 0.125: {images}' in text
    assert 'sample: 4 maps of 8×8 tokens in a pair' in text
    assert '1 of the student, 0 of the teacher' in text
    assert 'classes 10 of the data, 10 of the student, 10 of the teacher' in text


# Time -----------------------------------------------------------------------------------------------------------------


def test_first_step_does_not_count(check, no_cost, monkeypatch):
    """Steps of the trainer, of which the first one is slow."""
    step, calls = engine.Trainer.train_step, []

    def train_step(self, batch, name):
        time.sleep(0 if calls else 1)
        calls.append((self.student.training, list(batch[2]), name))
        step(self, batch, name)

    monkeypatch.setattr(engine.Trainer, 'train_step', train_step)
    text = '\n'.join(check('--steps', '2', **toys.ALONE))
    (mean, low, high), seconds = re.search(r'step +([\d.]+) s \(([\d.]+) to ([\d.]+), 2 steps', text).groups(), 1
    assert float(low) <= float(mean) <= float(high) < seconds
    assert [training for training, _, _ in calls] == [True] * 3
    # Two steps are an epoch of 16 images; the third one is the first of the next epoch.
    assert sorted(calls[0][1] + calls[1][1]) == list(range(16))
    assert [name for _, _, name in calls] == ['step 0 of epoch 0', 'step 1 of epoch 0', 'step 2 of epoch 1']


def test_hours_follow_from_the_steps(check, no_cost, monkeypatch):
    monkeypatch.setattr(tools.check, 'time_steps', lambda *_: [8.0, 10.0])
    text = '\n'.join(check(epochs=400, **toys.ALONE))
    assert '0.005 h for an epoch of 2 steps, 2 h for 400 epochs' in text  # 2 × 9 s, 400 times
    assert '0.889 images/s' in text
    assert 'limited by the steps' in text


def test_slow_data_count(check, no_cost, monkeypatch):
    """The first steps find their batches loaded. Loader processes share the work of 3 seconds."""
    clock = iter((0.0, 3.0, 3.0))
    monkeypatch.setattr(tools.check, 'time_steps', lambda *_: [0.5])
    monkeypatch.setattr(tools.check.time, 'monotonic', lambda: next(clock))
    text = '\n'.join(check(epochs=1200, num_workers=2, **toys.ALONE))
    assert '3 s to load a batch in one process, 1.5 s with --num_workers 2' in text
    assert '1 h for 1,200 epochs' in text  # 2 × 1.5 s
    assert 'limited by the data' in text


# Accuracy -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def colours(tmp_path):
    """A folder of 9 validation images in 2 classes, one with images 0, 2, 4 and 6 of it, and a teacher for both."""
    toys.write_images(tmp_path / 'all' / 'val', [5, 4], 32)
    shutil.copytree(tmp_path / 'all' / 'val', tmp_path / 'all' / 'train')
    paths = sorted((tmp_path / 'all' / 'val').glob('*/*.png'))
    for i in (0, 2, 4, 6):
        place = tmp_path / 'part' / 'val' / paths[i].parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[i], place)
    toys.save(tmp_path / 'teacher.pth', toys.teacher(2).state_dict())
    toys.save(tmp_path / 'student.pth', toys.student(2).state_dict())
    return tmp_path


@pytest.mark.parametrize(('images', 'folder'), [(4, 'part'), (99, 'all')])
def test_accuracy_equals_eval_teacher_on_the_same_images(check, no_cost, colours, capsys, monkeypatch, images, folder):
    same = {'data_set': 'FOLDER', 'teacher_path': colours / 'teacher.pth', 'batch_size': 2}
    alone = {'distillation_type': None, 's_id': None, 't_id': None}
    weights = {'finetune': colours / 'student.pth', 'eval': True, 'eval_teacher': True}
    main.main(toys.flags(**same, **alone, **weights, data_path=colours / folder))
    expected = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('* '))
    monkeypatch.setattr(engine, 'EVALUATION_LINES', 0)
    lines = check('--images', str(images), **same, data_path=colours / 'all')
    assert not any('[evaluation' in line for line in lines)
    assert [line for line in lines if line.startswith('* ')] == [expected]
    assert f'accuracy    of the teacher on {min(images, 9)} of 9 validation images, evenly spaced' in lines


def test_part_of_the_images_reaches_all_classes():
    loader = torch.utils.data.DataLoader(range(1000), batch_size=8)
    chosen = list(tools.check.part_of(loader, 20).sampler)
    assert {i // 50 for i in chosen} == set(range(20))  # 50 images in each class


def test_without_teacher(check):
    lines = check('--images', '8', **toys.ALONE)
    assert 'teacher     none: --distillation-type none' in lines
    assert not any(line.startswith(('pairs', 'maps', 'accuracy')) for line in lines)
    # Lines are no longer wrapped after the check.
    record = logging.LogRecord('', logging.INFO, '', 0, 'a ' * 100, None, None)
    assert all('\n' not in handler.format(record) for handler in tools.check.loggers.logger.handlers)


def test_steps_until_the_graph_is_captured_do_not_count(check, monkeypatch):
    made = recorded_call.install(monkeypatch)
    lines = check(**toys.ALONE)
    assert '1 step after the first 4' in joined(lines)
    assert 'in one process with a CUDA graph, limited by' in joined(lines)
    assert (made[0].replays, made[0].is_closed) == (2, True)


# Refusals and warnings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'wrong',
    [
        {'teacher_path': '{files}/seven.pth'},
        {'teacher_path': '{files}/gone.pth'},
        {'model_kwargs': 'patch_size=16 embed_dim=32 depth=4 num_heads=2'},
        {'output_dir': '{files}/run', **toys.ALONE},
        {'batch_size': 64, **toys.ALONE},
        {'data_path': '{files}/no_train', **toys.FOLDER},
        {'epoch': 1},  # no flag
    ],
    ids=['classes', 'no file', 'grids', 'used folder', 'few images', 'no train', 'flag'],
)
def test_wrong_run_gets_the_line_of_main(wrong, files, no_cost, capsys, monkeypatch):
    monkeypatch.setattr(locks, 'lock', lambda folder: None)
    wrong = {name: value.format(files=files) if isinstance(value, str) else value for name, value in wrong.items()}
    flags = {'teacher_path': files / 'teacher.pth', **wrong}
    assert refused(capsys, *toys.flags(**flags)) == toys.refused(capsys, **flags)


def test_values_that_are_not_finite_get_the_line_of_main(tmp_path, no_cost, capsys):
    """There main.py ends with status 1."""
    teacher = toys.teacher()
    with torch.no_grad():
        teacher.head.bias[0] = torch.nan
    argv = toys.flags(teacher_path=toys.save(tmp_path / 'nan.pth', teacher.state_dict()))
    with pytest.raises(SystemExit) as stopped:
        main.main(argv)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert 'not finite at step 0 of epoch 0' in error
    assert refused(capsys, *argv) == error


def test_steps_that_do_not_fit_the_memory(no_cost, capsys, monkeypatch):
    def train_step(*_):
        raise torch.OutOfMemoryError('CUDA out of memory.\nTried to allocate 1 GiB')

    monkeypatch.setattr(engine.Trainer, 'train_step', train_step)
    error = refused(capsys, *toys.flags(**toys.ALONE))
    assert error.startswith('main.py: error: --batch-size 8: does not fit the memory of cpu; try a smaller')


def test_what_it_does_not_do(files, capsys, monkeypatch):
    error = refused(capsys, *toys.flags(**toys.ALONE, eval=True, finetune=files / 'student.pth'))
    assert error == 'tools.check: error: --eval: this tool checks a run that trains; call main.py to evaluate\n'
    assert '--steps: 0: must be' in refused(capsys, *toys.flags(**toys.ALONE), '--steps', '0')
    assert '--images: -1: must be' in refused(capsys, *toys.flags(**toys.ALONE), '--images', '-1')
    monkeypatch.setattr(tools.check.utils, 'get_world_size', lambda: 2)
    assert '2 ranks: ' in refused(capsys, *toys.flags(**toys.ALONE))


def test_warnings_of_main_are_shown(check, no_cost):
    text = joined(check(input_size=36, K=5, warmup_epochs=5, **toys.ALONE))
    assert 'warning: --w-full, --K: no effect without a teacher' in text
    assert 'warning: --input-size 36: patches of 8 pixels leave the last 4 rows and columns of the image unseen' in text
    assert 'warning: --warmup-epochs 5: training ends before warmup completes' in text
    assert 'warning: no --output_dir' in text


# Files ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_or_locked(check, no_cost, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError('locked')

    monkeypatch.setattr(locks, '_try_lock', fail)
    check(output_dir=tmp_path / 'new' / 'run', save_interval_steps=1, **toys.ALONE)
    assert list(tmp_path.iterdir()) == []
    log = tmp_path / 'log.txt'
    log.write_text('{"epoch": 3}\n')  # of a run without checkpoints: main.py renames it
    before = log.stat()
    check(output_dir=tmp_path, resume='auto', **toys.ALONE)
    assert list(tmp_path.iterdir()) == [log]
    assert log.stat().st_mtime_ns == before.st_mtime_ns


def test_run_that_is_resumed_stays_as_it_is(check, no_cost, run, tmp_path):
    run(**toys.ALONE)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert any(line.startswith('resume') for line in check(output_dir=tmp_path, resume='auto', **toys.ALONE))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# The page -------------------------------------------------------------------------------------------------------------


def test_command_of_the_page(files, capsys):
    """With toy models in place of those of the recipe. All labels of the shown output are printed."""
    page = (toys.ROOT / 'docs' / 'models.md').read_text()
    command, shown = re.search(
        r'```bash\n(python -m tools\.check .*?)```.*?```text\n(.*?)```', page, re.DOTALL
    ).groups()
    words = shlex.split(command.replace('\\\n', ''))
    assert words[:3] == ['python', '-m', 'tools.check']
    words = [{'IMAGENET': '', 'S24_224.pth': str(files / 'teacher.pth')}.get(word, word) for word in words[3:]]
    kept = ('data_set', 'input_size', 'model_kwargs', 'teacher_kwargs', 's_id', 't_id', 'batch_size', 'num_workers')
    others = dict.fromkeys(name for name in toys.RUN if name not in (*kept, 'device'))
    tools.check.main([*words, *toys.flags(**others), '--steps', '1', '--images', '8'])
    labels, found = (
        {line[:12].strip() for line in text.splitlines() if re.match(r'\w+ {2,}', line)}
        for text in (shown, capsys.readouterr().out)
    )
    assert len(labels) > 12
    assert labels <= found
