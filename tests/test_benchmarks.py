"""The benchmarks run and count correctly. Their timings are not tested."""

import importlib

import pytest
import torch
from toys import write_images

import benchmarks  # imported first: it silences the profiler of torch


def rows_of(capsys, name: str, argv: str) -> dict[str, list[str]]:
    """The words of each row that a benchmark prints, by the name of the row."""
    with pytest.MonkeyPatch.context() as change:
        change.setattr('sys.argv', [f'{name}.py', *argv.split()])
        importlib.import_module(f'benchmarks.{name}').run()
    lines = capsys.readouterr().out.splitlines()
    return {line[:width].strip(): line[width:].split() for line in lines for width in (32 if name == 'input' else 24,)}


@pytest.mark.more
def test_recipe_step_launches_at_most_2000_kernels_and_never_waits(capsys, monkeypatch):
    # The rate of a large matrix product takes a second and is no part of the test.
    monkeypatch.setattr('benchmarks.step.rate', lambda *_: 1e9)
    monkeypatch.setattr('models.fused_talking_heads_problem', lambda device: '')  # the plain attention runs instead
    rows = rows_of(capsys, 'step', '--batch-size 2 --input-size 32 --rounds 1 --fused')
    assert rows['float32 fused'][-4:-2] == rows['float32'][-4:-2]
    (*_, launches, waits, _, _), (*_, before, waited, _, _) = rows['float32'], rows['baseline float32']
    assert int(launches) <= 2000 < int(before)
    assert int(waits) == 0 < int(waited)


def test_loss_benchmark_has_a_row_for_each_term(capsys):
    rows = rows_of(capsys, 'loss', '--batch-size 2 --tokens 4 --K 3 --widths 3 5 --rounds 1 --by-definition --fused')
    for name in ('patch', 'sample', 'random', 'the three', 'full'):
        ours, share, _, calls, definition, _, ratio = map(float, rows[name])
        assert calls > 10
        assert ours > 0 < share
        assert ratio == pytest.approx(definition / ours, rel=0.5)  # printed numbers are rounded
    for name in ('the three', 'full'):
        assert float(rows[f'{name}, fused'][0]) > 0
        assert int(rows[f'{name}, fused'][3]) < int(rows[name][3])


def test_input_benchmark_has_a_row_for_each_way(capsys, tmp_path):
    write_images(tmp_path / 'train', [2, 2], 32)
    rows = rows_of(capsys, 'input', f'{tmp_path / "train"} --rounds 1 --batch-size 4')
    for name in ('PIL and timm', 'ours', '--device-augment', '--fused erasing', 'ours, 3 repeats'):
        assert float(rows[name][0]) > 0
        assert (float(rows[name][3]) > 0) == (name != 'PIL and timm')


@pytest.mark.parametrize(
    ('name', 'argv', 'flag'),
    [
        ('step', '--rounds 0', '--rounds: 0'),
        ('step', '--device mps', '--device'),
        ('step', '--input-size 7', '--input-size 7'),
        ('step', '--fused', '--fused: needs an NVIDIA GPU'),
        ('loss', '--K -1', '--K: -1'),
        ('input', 'nowhere', 'nowhere'),
        ('safety', '--steps 1', '--steps 1'),
        ('gate', '. --flags=--compile --seeds 1', '--seeds 1'),
        ('gate', 'nowhere --flags=--compile', 'nowhere'),
    ],
)
def test_benchmark_refuses_bad_arguments_in_one_line(capsys, name, argv, flag):
    with pytest.raises(SystemExit) as stop:
        rows_of(capsys, name, argv)
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_peak_bytes_counts_tensors_alive_at_once():
    def call() -> None:
        first = torch.empty(1 << 20)
        del first
        torch.empty(1 << 21)

    assert benchmarks.peak_bytes(call, torch.device('cpu')) == 4 << 21
