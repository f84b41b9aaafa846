"""The benchmarks run and count correctly. Their timings are not tested."""

import importlib
import json
import signal
import sys
import time

import pytest
import torch
from toys import write_images

import benchmarks  # imported first: it silences the profiler of torch
from benchmarks import gpu, gpu_rows


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
        ('step', '--cuda-graph', '--cuda-graph: needs an NVIDIA GPU'),
        ('gpu', '', 'needs an NVIDIA GPU'),
        ('gpu', '--toy --data .ci', '--data .ci'),
        ('gpu', '--toy --rows other', '--rows other'),
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


@pytest.mark.more
def test_gpu_benchmark_has_a_number_in_each_row(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('OUT', str(tmp_path))
    monkeypatch.setattr('sys.argv', ['gpu.py', '--toy'])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.run() == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    found = json.loads((tmp_path / 'gpu.json').read_text())['rows']
    assert found.keys() == {row.name for row in gpu.rows()}
    assert {name for name, row in found.items() if 'value' not in row} == {'gate: terms beyond the spread'}
    assert found['gate: terms beyond the spread']['failed'] == 'needs a GPU'
    assert found['replay differs from launches']['value'] == 0
    assert all(row['value'] > 0 for name, row in found.items() if 'value' in row and not name.startswith('replay'))
    lines = (tmp_path / 'gpu.md').read_text().splitlines()
    assert [line.split('|')[1].strip() for line in lines[6:]] == [row.name for row in gpu.rows()]


def fail(setup):
    raise ValueError('no\nmemory')


def test_gpu_row_that_fails_costs_only_itself(capsys, tmp_path):
    setup = gpu.Setup(torch.device('cpu'), True, tmp_path, 0)
    rows = [gpu.Row('bad', 1, fail), gpu.Row('good', 1, lambda setup: gpu_rows.Found(7.0), 8.0, 'bad')]
    gpu.measure_rows(rows, setup, tmp_path / 'rows', time.time() + 60)
    assert capsys.readouterr().out.splitlines() == ['bad | failed: ValueError: no memory', 'good | 7.00 ms | first 0 s']
    lines = gpu.table(rows, gpu.read(tmp_path / 'rows'), ['machine']).splitlines()
    assert [word.strip() for word in lines[-1].split('|')[1:-1]] == [
        'good', '7.00 ms', '0.00', '', '', '8', 'yes', '0', '',
    ]  # fmt: skip
    gpu.measure_rows(rows, setup, tmp_path / 'late', time.time() - 1)
    assert gpu.cells(rows[0], gpu.read(tmp_path / 'late').get('bad', {}), {})[-1] == 'not started: the time was up'


# Stands for the process that measures: the row `bad` ends it, `hangs` does not return.
PROCESS = """
import json, os, sys, time
for name in sys.argv[3:]:
    with open(sys.argv[1], 'a') as out:
        out.write(json.dumps({'name': name, 'started': time.time()}) + '\\n')
    if name == 'bad':
        os.abort()
    if name == 'hangs':
        time.sleep(60)
    with open(sys.argv[1], 'a') as out:
        out.write(json.dumps({'name': name, 'value': 1}) + '\\n')
"""


def test_gpu_row_that_ends_or_blocks_its_process_costs_only_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'ROW_SECONDS', 1.0)
    file = tmp_path / 'rows'
    command = [sys.executable, '-S', '-c', PROCESS, str(file)]
    gpu.supervise(command, ['first', 'bad', 'second', 'hangs', 'third'], file, time.time() + 60)
    found = gpu.read(file)
    assert [found[name]['value'] for name in ('first', 'second', 'third')] == [1, 1, 1]
    assert found['bad']['failed'] == 'ended its process, exit code -6'
    assert found['hangs']['failed'] == 'took too long'
    gpu.supervise([sys.executable, '-c', 'raise SystemExit(1)'], ['never'], tmp_path / 'none', time.time() + 60)
    assert gpu.read(tmp_path / 'none') == {}
