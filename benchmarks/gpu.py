"""All figures of one GPU in one table: steps, teacher, loss, erasing, a real epoch, replays and errors.

    bash benchmarks/gpu.sh                          the tests on the GPU, then this, in 8 minutes
    python -m benchmarks.gpu --data IMAGENET/train  real images; without it random JPEGs
    python -m benchmarks.gpu --rows 'step 64' replay
    python -m benchmarks.gpu --toy                  tiny models on the CPU, to see that each row still runs

DeiT-Tiny from CaiT-S24, 224 pixels, bfloat16 with a bfloat16 teacher. Images are on the GPU already, except in the
epochs. Rows run one after the other in a process of its own, the most valuable first. A row that fails, or ends that
process, or takes too long, costs only itself. Once the time is up, no row is started. The table is also written to the
folder $OUT, by default runs/gpu, as gpu.md and gpu.json.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

import benchmarks
import cuda_graph
import utils
from benchmarks import gpu_rows
from benchmarks.gpu_rows import FUSED, Measure, NeedsGpuError, Setup
from benchmarks.input import write_jpegs

ROW_SECONDS = 150.0  # of one row, at most
BLOCKS, WHOLE, GRAPH = ['--compile'], ['--compile', 'models'], ['--cuda-graph']
ALL = [*BLOCKS, *GRAPH, *FUSED]
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    turn: int  # rows with small numbers are measured first
    measure: Measure
    least: float | None = None  # the figure to reach: at most this, or at least this share
    eager: str = ''  # the row of the eager program


def rows() -> list[Row]:
    """All rows, as they are printed."""
    found = []
    for batch, least in ((64, 15.0), (256, 45.0)):
        step, eager = partial(gpu_rows.step, batch), f'step {batch}: eager'
        found += [
            Row(f'step {batch}: stock timm', 7, step(stock=True), None, eager),
            Row(eager, 1, step(), least, eager),
            Row(f'step {batch}: --compile', 4, step(BLOCKS), least, eager),
            Row(f'step {batch}: --compile, graph', 3, step([*BLOCKS, *GRAPH]), least, eager),
            Row(f'step {batch}: --compile models, graph', 6, step([*WHOLE, *GRAPH]), least, eager),
            Row(f'step {batch}: --compile, graph, fused', 1, step(ALL), least, eager),
            Row(f'step {batch}: models, graph, fused', 4, step([*WHOLE, *GRAPH, *FUSED]), least, eager),
        ]
    parts = {
        'teacher 256': (gpu_rows.teacher, {'eager': [()], '--compile': [BLOCKS], 'fused': [FUSED]}, 24.0),
        'criterion 256': (gpu_rows.criterion, {'eager': [()], 'fused': [FUSED]}, 5.0),
        'full term 256': (gpu_rows.full_term, {'eager': [False], 'fused': [True]}, 8.0),
        'erasing 256': (gpu_rows.erasing, {'eager': [False], 'fused': [True]}, 0.3),
    }
    for part, (measure, ways, least) in parts.items():
        for way, arguments in ways.items():
            found.append(Row(f'{part}: {way}', 3, measure(*arguments), least, f'{part}: eager'))
        if part == 'teacher 256':
            found.append(Row(f'{part}: --compile, fused', 2, measure([*BLOCKS, *FUSED]), least, f'{part}: eager'))
            found.append(Row(f'{part}: models, fused', 5, measure([*WHOLE, *FUSED]), least, f'{part}: eager'))
        else:
            found.append(Row(f'{part}: fused, graph', 2, measure(*ways['fused'], graph=True), least, f'{part}: eager'))
    return [
        *found,
        Row('epoch: --compile', 6, gpu_rows.epoch(BLOCKS, ahead=False), 0.9),
        Row('epoch: --compile, graph, fused', 2, gpu_rows.epoch(ALL, ahead=True), 0.9),
        Row('epoch: the same, --device-augment', 5, gpu_rows.epoch([*ALL, '--device-augment'], ahead=True), 0.9),
        Row('replay differs from launches', 1, gpu_rows.replay, 0.0),
        *(
            Row(f'error at {difference:g}: {part}, {what}', 2, gpu_rows.relation_error(difference, at, part), least)
            for part in ('relations', 'full')
            for difference in (1e-3, 1e-5)
            for at, (what, least) in enumerate((('value', 1e-5), ('gradient', 1e-3)))
        ),
        Row('gate: terms beyond the spread', 8, gpu_rows.gate, 0.0),
    ]


# Measuring ------------------------------------------------------------------------------------------------------------


def measure_rows(chosen: Sequence[Row], setup: Setup, file: Path, deadline: float) -> None:
    """Appends a record to `file` when a row begins and when it ends. Exits if the GPU cannot be used any more."""
    for row in chosen:
        if time.time() > deadline:
            return
        append(file, {'name': row.name, 'started': time.time()})
        found = measure_row(row, setup)
        append(file, {'name': row.name, **found})
        print(describe(row, found), flush=True)
        if setup.device.type == 'cuda':
            torch.cuda.synchronize()  # after an illegal access, for example, every call raises


def measure_row(row: Row, setup: Setup) -> Record:
    """What a row measured, or why it failed."""
    try:
        return asdict(row.measure(setup))
    except NeedsGpuError:
        return {'failed': 'needs a GPU'}
    except (Exception, SystemExit) as error:
        return {'failed': f'failed: {type(error).__name__}: {" ".join(str(error).split())[:300]}'}
    finally:
        if setup.device.type == 'cuda':  # the next row gets all of its memory
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def append(file: Path, record: Record) -> None:
    with file.open('a') as out:
        out.write(json.dumps(record) + '\n')


def read(file: Path) -> dict[str, Record]:
    """The last record of each row."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {record['name']: record for record in map(json.loads, lines)}


def supervise(command: list[str], names: Sequence[str], file: Path, deadline: float) -> None:
    """Runs `command --only NAME …` until each row has a record, again after a row that ended it."""
    while left := [name for name in names if name not in read(file)]:
        if time.time() > deadline:
            break
        process = subprocess.Popen([*command, '--only', *left], start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                started = next((r['started'] for r in read(file).values() if 'started' in r), time.time())
                if time.time() > min(started + ROW_SECONDS, deadline + 30):
                    break
        finally:
            late = process.poll() is None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started: loaders, compilers
            process.wait()
        for name in [name for name, record in read(file).items() if 'started' in record]:
            what = 'took too long' if late else f'ended its process, exit code {process.returncode}'
            append(file, {'name': name, 'failed': what})
        if not read(file).keys() & left:
            break  # it cannot even start


class PlainCall:
    """Stands for `cuda_graph.CapturedCall` on a CPU: runs the call each time."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.call: Any = None
        self.result: Any = None
        self.done = False

    def run(self, call: Any) -> Any:
        return call()

    def find_wait(self, call: Any) -> tuple[Any, str]:
        return call(), ''

    def capture(self, call: Any) -> Any:
        self.call, self.result, self.done = call, call(), True
        return self.result

    def replay(self) -> None:
        if not self.done:
            leaves = map(tree_leaves, (self.result, self.call()))
            for kept, new in zip(*leaves, strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.detach().copy_(new)
        self.done = False

    def close(self) -> None:
        self.call = self.result = None


def toy_forms() -> ExitStack:
    """Nothing is compiled, and graphs run their calls."""
    torch.set_num_threads(1)
    stack = ExitStack()
    stack.enter_context(torch.compiler.set_stance('force_eager'))
    stack.enter_context(patch.object(cuda_graph, 'CapturedCall', PlainCall))
    stack.enter_context(patch.object(cuda_graph, 'has_graphs', lambda device: True))
    stack.enter_context(patch.object(cuda_graph, 'WARM_UP', 1))
    return stack


# The table ------------------------------------------------------------------------------------------------------------

HEAD = ('', 'value', '±', 'images/s', 'eager ÷ this', 'to reach', 'reached', 'first s', 'note')


def cells(row: Row, found: Record, eager: Record) -> list[str]:
    """The texts of a row of the table."""
    if 'value' not in found:
        return [row.name, *[''] * 7, found.get('failed', 'not started: the time was up')]
    value, unit = found['value'], found['unit']
    number = f'{value:.1e}' if unit == 'relative' else f'{value:.4g} {unit}'
    if unit == 'ms':
        number = f'{value:.{1 if value >= 10 else 2}f} ms'
    rate = f'{1000 * found["images"] / value:,.0f}' if found['images'] else ''
    ratio = f'{eager["value"] / value:.2f}' if row.eager and 'value' in eager else ''
    reached = ''
    if row.least is not None:
        reached = 'yes' if (value >= row.least if unit == 'share' else value <= row.least) else 'no'
    spread = f'{found["spread"]:.2f}' if unit == 'ms' else ''
    least = '' if row.least is None else f'{row.least:g}'
    return [row.name, number, spread, rate, ratio, least, reached, f'{found["first"]:.0f}', found['note']]


def describe(row: Row, found: Record) -> str:
    name, value, *_, first, note = cells(row, found, {})
    return ' | '.join([name, *([value, f'first {first} s'] if value else []), *([note] if note else [])])


def table(chosen: Sequence[Row], found: dict[str, Record], lines: Sequence[str]) -> str:
    """The table in Markdown, aligned, below these lines."""
    texts = [list(HEAD), *(cells(row, found.get(row.name, {}), found.get(row.eager, {})) for row in chosen)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ['-' * max(3, width) for width in widths])
    body = [
        '| ' + ' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + ' |' for line in texts
    ]
    return '\n\n'.join([*lines, '\n'.join(body)]) + '\n'


def versions(setup: Setup) -> str:
    """Device, driver and versions."""
    found = [benchmarks.machine(setup.device), f'Python {sys.version.split()[0]}', f'{os.cpu_count()} processors']
    if setup.device.type == 'cuda':
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = 'unknown'
        import triton

        found += [f'driver {driver}', f'CUDA {torch.version.cuda}', f'triton {triton.__version__}']
    return ', '.join(found)


# The command ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=8.0, help='after which no row is started')
    parser.add_argument('--data', type=Path, help='folder with JPEGs, at any depth; random ones by default')
    parser.add_argument('--rows', nargs='+', default=[''], metavar='WORDS', help='only rows with them in the name')
    parser.add_argument('--toy', action='store_true', help='tiny sizes on the CPU')
    for name, kind in (('--file', Path), ('--deadline', float)):  # of the process that measures
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument('--only', nargs='+', help=argparse.SUPPRESS)
    return parser


def run() -> int:
    parser = build_parser()
    args = parser.parse_args()
    start, device = time.time(), utils.init_distributed('cpu' if args.toy else 'cuda', 'env://')
    if not args.toy and not cuda_graph.has_graphs(device):
        parser.error('needs an NVIDIA GPU; --toy shows on a CPU that the rows run')
    if args.data and not any(args.data.rglob('*.jp*g')) and not any(args.data.rglob('*.JP*G')):
        parser.error(f'--data {args.data}: no JPEGs')
    setup = Setup(device, args.toy, args.data, 0 if args.toy else os.cpu_count() or 1)
    chosen = [row for row in rows() if any(words in row.name for words in args.rows)]
    if not chosen:
        parser.error(f'--rows {" ".join(args.rows)}: no such row')
    if args.toy:
        chosen = [replace(row, least=None) for row in chosen]  # figures to reach are for real sizes
    in_turn = sorted(chosen, key=lambda row: row.turn)
    if args.file:
        with toy_forms() if args.toy else ExitStack():
            measure_rows([row for row in in_turn if row.name in args.only], setup, args.file, args.deadline)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, too
    deadline = start + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / 'rows.jsonl'
        if not args.data:
            write_jpegs(folder, 8 if args.toy else 256)
        command = [sys.executable, '-m', 'benchmarks.gpu', '--file', str(file), '--deadline', str(deadline), '--data',
                   str(args.data or folder), *['--toy'] * args.toy]  # fmt: skip
        supervise(command, [row.name for row in in_turn], file, deadline)
        found = read(file)
    what = 'real images' if args.data else 'random JPEGs'
    took = f'{(time.time() - start) / 60:.1f} minutes; epochs over {what}, {setup.workers} loader processes'
    text = table(chosen, found, [versions(setup), 'Toy sizes: no figures. ' * args.toy + took])
    print(f'\n{text}')
    out = Path(os.environ.get('OUT') or 'runs/gpu')
    out.mkdir(parents=True, exist_ok=True)
    (out / 'gpu.md').write_text(text)
    (out / 'gpu.json').write_text(json.dumps({'versions': versions(setup), 'rows': found}, indent=2) + '\n')
    print(f'written to {out / "gpu.md"} and gpu.json')
    return 0


if __name__ == '__main__':
    sys.exit(run())
