"""Values that are not finite, and images that cannot be read."""

import math
import shutil

import pytest
import torch
import toys

import engine
import main
import utils

pytestmark = pytest.mark.usefixtures('few_generated_images')


@pytest.mark.parametrize('option', [{}, {'s_id': None, 't_id': None}], ids=['relations', 'no relations'])
def test_nan_teacher_stops_the_run_and_names_the_term(run, tmp_path, capsys, option):
    teacher = toys.teacher()
    with torch.no_grad():
        teacher.head.bias[0] = torch.nan
    path = toys.save(tmp_path / 'nan.pth', teacher.state_dict())
    with pytest.raises(SystemExit) as stopped:
        run(teacher_path=path, output_dir=tmp_path / 'out', **option)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count('\n') == 1
    assert 'not finite at step 0 of epoch 0 on rank 0: loss_dist, teacher logits; images ' in error
    assert 'loss_mf' not in error
    assert not toys.listing(tmp_path / 'out')


@pytest.mark.R11
@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_image_stops_the_run_and_is_named(files, tmp_path, capsys, workers):
    toys.write_images(tmp_path / 'val', [2, 2], 32)
    damaged = tmp_path / 'val' / 'c1' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:40])
    weights = toys.save(tmp_path / 'weights.pth', toys.student(2).state_dict())
    flags = {**toys.ALONE, **toys.FOLDER, 'data_path': tmp_path, 'num_workers': workers}
    with pytest.raises(SystemExit) as stopped:
        main.main(toys.flags(**flags, eval=True, resume=weights))
    assert stopped.value.code == 1
    assert f'{damaged}: ' in capsys.readouterr().err.splitlines()[-1]


def poisoned(monkeypatch, *steps: int) -> None:
    """Makes the loss NaN at these steps, counted from the start of training."""
    seed_step, build = utils.seed_step, main.build_criterion
    now = []
    monkeypatch.setattr(utils, 'seed_step', lambda *args: now.append(args[2]) or seed_step(*args))

    def poison(module, inputs, losses):
        return {**losses, 'mf_rand': losses['mf_rand'] * (math.nan if now[-1] in steps else 1)}

    def built(*args):
        criterion = build(*args)
        criterion.register_forward_hook(poison)
        return criterion

    monkeypatch.setattr(main, 'build_criterion', built)


def test_state_is_checked_before_a_save_when_not_every_step_is(run, tmp_path, monkeypatch, capsys):
    """On a GPU the host looks for values that are not finite only at log lines and before it saves."""

    class LateGuard(engine.NonFiniteGuard):
        def __init__(self, scaler, every_step):
            super().__init__(scaler, every_step=False)

    monkeypatch.setattr(engine, 'NonFiniteGuard', LateGuard)
    poisoned(monkeypatch, 5)
    with pytest.raises(SystemExit) as stopped:
        run(**{**toys.LONG, 'print_freq': 100})
    assert stopped.value.code == 1
    assert 'not finite at step 1 of epoch 1 on rank 0: loss_mf_rand; images ' in capsys.readouterr().err
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] == 5


def test_full_gpu_is_one_line_with_advice(run, monkeypatch, capsys):
    def evaluate(*_):
        raise torch.OutOfMemoryError(
            'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB'
        )

    monkeypatch.setattr(main.Evaluator, 'measure', evaluate)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(
        'main.py: error: CUDA out of memory. Tried to allocate 2.00 GiB; try a smaller --batch-size'
    )
    assert error.endswith('or --no-cuda-graph\n')
    assert error.count('\n') == 1


def test_non_finite_loss_keeps_the_last_good_state(run, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 5)
    with pytest.raises(SystemExit) as stopped:
        run(**toys.LONG)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith('main.py: error: not finite at step 1 of epoch 1 on rank 0: loss_mf_rand; images ')
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] == 5
    assert all(value.isfinite().all() for value in toys.load(tmp_path / 'checkpoint.pth')['model'].values())


@pytest.mark.R11
@toys.forks
@pytest.mark.parametrize('workers', [0, 2])
def test_bad_images_skip_replaces_and_lists_them(run, files, tmp_path, capsys, workers):
    tree = tmp_path / 'tree'
    shutil.copytree(files / 'tree', tree)
    bad = [tree / 'train' / 'c0' / '1.png', tree / 'train' / 'c1' / '3.png', tree / 'val' / 'c1' / '1.png']
    for path in bad:
        path.write_bytes(path.read_bytes()[:40])
    flags = {**toys.ALONE, 'data_set': 'FOLDER', 'data_path': tree, 'batch_size': 4, 'epochs': 2}
    rows = run(**flags, bad_images='skip', num_workers=workers, output_dir=tmp_path / 'out')
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith('Accuracy of the network on the 4 test images') for line in lines)
    assert sum(' 2/2] ' in line for line in lines) == 2  # as many steps as without
    ends = ['replaced by the next one', 'replaced by the next one', 'left out of evaluation']
    warnings = [f'warning: cannot be read, {end}: {path} (class {path.parent.name})'
                for end, path in zip(ends, bad, strict=True)]  # fmt: skip
    assert [line for line in lines if 'cannot be read' in line] == warnings * 2  # once when found, once at the end
    assert rows == run(**flags, bad_images='skip', num_workers=2 - workers, output_dir=tmp_path / 'again')
    with pytest.raises(SystemExit) as stopped:
        run(**flags, num_workers=0, output_dir=tmp_path / 'stops')
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert any(f'{path}: ' in error and f'(class {path.parent.name}); --bad-images skip' in error for path in bad[:2])
