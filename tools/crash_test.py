"""Injects faults into runs of main.py and shows that each promise is kept, in one table.

    bash scripts/crash_test.sh                    the full form
    bash scripts/crash_test.sh --short            a few of each kind
    bash scripts/crash_test.sh --only R1 R5       some rows

A toy DeiT learns from a toy CaiT on generated images. The program itself is the real one; `faults.py` injects the
faults. Each rank of a run is a process of its own.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
os.environ.setdefault('OMP_NUM_THREADS', '1')

import timm  # noqa: E402
import torch  # noqa: E402
from faults import SAVING, TRAIN_IMAGES, VAL_IMAGES, Fault, inject  # noqa: E402
from toy_runs import FLAGS, GLOBAL_BATCH, PATIENCE, TEACHER, folder_problem, live, result, same, wait_for  # noqa: E402

import checkpoints  # noqa: E402
import datasets  # noqa: E402
import engine  # noqa: E402
import main  # noqa: E402
import utils  # noqa: E402

STEPS = TRAIN_IMAGES // GLOBAL_BATCH  # of an epoch
SIGNALS = ('SIGTERM', 'SIGINT', 'SIGUSR1')

# The rows -------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the table."""

    name: str
    promise: str
    asked: str
    reached: str
    good: bool
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Bench:
    """What all rows share: a folder, the reference runs, and whether the form is short."""

    def __init__(self, folder: Path, short: bool, seed: int) -> None:
        self.folder = folder
        self.short = short
        self.random = random.Random(seed)
        self._references: dict[tuple, dict] = {}
        self._names = itertools.count()
        torch.manual_seed(7)
        kwargs = {**TEACHER, 'img_size': 32, 'num_classes': datasets.FAKE_CLASSES}
        torch.save(timm.create_model('cait_s24_224', **kwargs).state_dict(), folder / 'teacher.pth')

    def fresh(self) -> Path:
        return self.folder / f'run{next(self._names)}'

    def reference(self, ranks: int = 1, workers: int = 0, extra: tuple[str, ...] = ()) -> dict:
        """The result of a run without faults."""
        key = (ranks, workers, extra)
        if key not in self._references:
            folder = self.fresh()
            life = live(folder, ranks, workers, extra=extra)
            assert life.codes == [0] * ranks, life.err
            self._references[key] = result(folder)
        return self._references[key]

    def finish(self, folder: Path, ranks: int = 1, workers: int = 0, extra: tuple[str, ...] = ()) -> str:
        """Resumes a run without faults. Says what differs from the reference, '' if nothing does."""
        life = live(folder, ranks, workers, extra=extra)
        if life.codes != [0] * ranks:
            return f'exit {life.codes}: {life.err[-300:]}'
        found, wanted = result(folder), self.reference(ranks, workers, extra)
        return ', '.join(key for key in wanted if not same(found[key], wanted[key]))


FP16 = ('--amp-dtype', 'float16')


def kills(bench: Bench) -> tuple[Row, Row]:
    """R1: runs killed many times, in each configuration, equal the run that was never killed. R14 comes with it."""
    configurations = [(1, 0, ()), (1, 2, ()), (2, 0, ()), (2, 2, ()), (1, 0, FP16)]
    wanted, saving = (8, 4) if bench.short else (200, 80)
    problems, untidy, chains, triggered, in_saves = [], [], 0, 0, 0
    if not same(bench.reference(1, 0), bench.reference(1, 2)):
        problems.append('the number of workers changes the result')
    for number, (ranks, workers, extra) in enumerate(configurations):
        quota = wanted * (number + 1) // len(configurations)
        folder = bench.fresh()
        while triggered < quota:
            fault, kill_after = _random_kill(bench, ranks, in_saves < saving * quota // wanted)
            life = live(folder, ranks, workers, fault, extra, kill_after=kill_after)
            if life.codes == [0] * ranks:  # it ended before it could be killed
                chains += 1
                if not same(result(folder), bench.reference(ranks, workers, extra)):
                    problems.append(f'{ranks} ranks, {workers} workers: another result')
                folder = bench.fresh()
                continue
            triggered += 1
            in_saves += fault is not None and fault.where in SAVING
            untidy += [wrong for wrong in [folder_problem(folder)] if wrong]
            saved = max((int(step) for step in life.logged('saved')), default=0)
            there = checkpoints.read_newest(folder)[1]['step'] if checkpoints.find_checkpoints(folder) else 0
            if there < saved:
                problems.append(f'{fault}: step {saved} was saved, {there} is there')
        wrong = bench.finish(folder, ranks, workers, extra)
        chains += 1
        if wrong:
            problems.append(f'{ranks} ranks, {workers} workers after the last kill: {wrong}')
    text = f'{triggered} kills, {in_saves} of them inside a save, in {chains} runs; {len(problems)} problems'
    asked = f'{wanted} kills, {12 * wanted // 40 if not bench.short else 3} in a save'
    row = Row('R1', 'kill -9 anywhere', asked, text, not problems and in_saves >= wanted * 0.3, problems=problems)
    text = f'{triggered - len(untidy)} of {triggered} folders looked at after a kill'
    files = Row('R14', 'retention', 'last + best + 1 + 1 temporary', text, not untidy, problems=untidy)
    return row, files


def _random_kill(bench: Bench, ranks: int, in_save: bool) -> tuple[Fault | None, float]:
    """A kill during a save, at a step or in evaluation; or one from outside at any moment."""
    rank = bench.random.randrange(ranks)
    if in_save:
        where = bench.random.choice(SAVING)
        part = bench.random.choice((0.0, 0.001, 0.3, 0.7, 0.999, 1.0))
        return Fault('kill', where, bench.random.randint(1, 5), 0, part), 0.0
    kind = bench.random.random()
    if kind < 0.4:
        return Fault('kill', 'step', bench.random.randint(1, 9), rank), 0.0
    if kind < 0.6:
        return Fault('kill', 'eval', 1, rank), 0.0
    return None, bench.random.uniform(0.2, 2.0 if ranks == 1 else 3.0)


def controls(bench: Bench) -> Row:
    """R2: a part that is left out of the state changes the result."""
    first = live(bench.folder / 'control', fault=Fault('kill', 'step', STEPS + 6))
    assert first.codes == [-signal.SIGKILL], first.err
    path, state, _ = checkpoints.read_newest(bench.folder / 'control')
    assert 0 < state['position'] < TRAIN_IMAGES, state['position']
    fresh = {'state': {}, 'param_groups': state['optimizer']['param_groups']}
    changes = {
        'offset in the epoch': {'position': 0},
        'moving average': {'model_ema': state['model']},
        'optimizer': {'optimizer': fresh},
        'counter of steps': {'step': 0},
        'means of the epoch': {'meters': {}},
        'best accuracy': {'best_acc1': 101.0},
        'counter of epochs': {'epoch': -1},
        None: {},
    }
    missed = []
    for name, change in changes.items():
        folder = bench.fresh()
        shutil.copytree(path.parent, folder)
        (folder / path.name).write_bytes(checkpoints.serialize({**state, **change}))
        differs = bool(bench.finish(folder))
        if differs != (name is not None):
            missed.append(f'{name}: {"differs" if differs else "the same"}')
    named = len(changes) - 1
    good = not missed
    return Row('R2', 'every part matters', '5 of 5', f'{named - len(missed)} of {named}', good, problems=missed)


def signals(bench: Bench) -> Row:
    """R3: after any signal to any rank at any time the run is saved and exits in time; no step is lost."""
    places = [('first batch', 1), ('step', 5), ('eval', 1), ('write', 2)]
    cases = [(name, *place, 2, workers, rank) for name in SIGNALS for place in places for workers in (0, 2)
             for rank in (0, 1)]  # fmt: skip
    cases += [(name, *place, 1, 0, 0) for name in SIGNALS for place in places]
    if bench.short:
        cases = [cases[i] for i in (1, 21, 28, 58)]  # each place once, each signal
    problems, slowest = [], 0.0
    for number, (name, where, at, ranks, workers, rank) in enumerate(cases):
        folder, rank = bench.fresh(), 0 if where in SAVING else rank
        fault = Fault(name, where, at, rank, part=0.5, to_group=workers > 0, lagged=ranks > 1 and number % 3 == 0)
        life = live(folder, ranks, workers, fault)
        slowest = max(slowest, life.left)
        done = max((int(step) for step in life.logged('done')), default=0)
        saved = checkpoints.read_newest(folder)[1]['step'] if checkpoints.find_checkpoints(folder) else -1
        wrong = []
        if life.codes != [128 + getattr(signal, name)] * ranks:
            wrong.append(f'exit {life.codes}')
        if saved != done:
            wrong.append(f'{done} steps done, {saved} saved')
        if life.left > PATIENCE or len(life.errors) != 1 or not life.logged('triggered'):
            wrong.append(f'{life.left:.1f} s, {life.errors}')
        wrong += [text for text in [bench.finish(folder, ranks, workers)] if text]
        if wrong:
            problems.append(f'{fault} {ranks} ranks: {"; ".join(wrong)} {life.err[-300:]}')
    reached = f'{len(cases) - len(problems)} of {len(cases)}, slowest {slowest:.1f} s'
    return Row('R3', 'signals', f'{len(cases)} of {len(cases)} under 25 s', reached, not problems, problems=problems)


def elastic(bench: Bench) -> Row:
    """R4: restarts by torchrun give the same bits; another number of ranks sees the same images."""
    problems = []
    restarts = 1 if bench.short else 3
    folder = bench.fresh()
    plan = bench.folder / 'restarts.json'
    crashes = [('kill', 'step', 5, 1), ('raise', 'step', 9, 0), ('kill', 'fsync', 3, 0)]
    plan.write_text(json.dumps([asdict(Fault(*crash)) for crash in crashes[:restarts]]))
    argv = [*FLAGS, '--batch-size', '4', '--num_workers', '0', '--output_dir', str(folder), '--resume', 'auto']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [f'--max-restarts={restarts}', __file__, '--restarted', str(plan), *argv]
    command += ['--teacher-path', str(bench.folder / 'teacher.pth')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    if done.returncode != 0 or not same(result(folder), bench.reference(2, 0)):
        problems.append(f'torchrun: exit {done.returncode} {done.stderr[-800:]}')
    plain = ('--mixup', '0', '--cutmix', '0', '--drop-path', '0', '--w-sample', '0', '--w-rand', '0')
    whole = bench.fresh()
    reference = live(whole, extra=plain, record='images')
    changed, images = bench.fresh(), []
    for ranks, stop in ((1, 5), (2, 10), (4, 12), (1, None)):
        fault = Fault('SIGUSR1', 'step', stop) if stop else None
        life = live(changed, ranks, fault=fault, extra=plain, record='images')
        images += life.logged('image')
        if life.codes != [0 if stop is None else 128 + signal.SIGUSR1] * ranks:
            problems.append(f'{ranks} ranks: exit {life.codes} {life.err[-300:]}')
    if sorted(images) != sorted(reference.logged('image')) or len(set(images)) != 3 * TRAIN_IMAGES:
        problems.append('other images or augmentations')
    difference = _difference(result(changed), result(whole)) if not problems else float('nan')
    if not difference <= 1e-5:
        problems.append(f'losses or weights differ by {difference:g}')
    reached = f'{restarts} restarts {"bit-identical" if not problems else "?"}; 1→2→4→1 ranks: {difference:.1e}'
    return Row('R4', 'elastic', 'same bits; within 1e-5', reached, not problems, problems=problems)


def _difference(left: dict, right: dict) -> float:
    """Largest difference of weights and losses, without attention key biases: their true gradient is zero."""
    largest = 0.0
    for name, weight in left[checkpoints.LAST]['model'].items():
        gap = (weight - right[checkpoints.LAST]['model'][name]).abs()
        if name.endswith('qkv.bias'):
            gap[len(gap) // 3 : 2 * len(gap) // 3] = 0
        largest = max(largest, gap.max().item())
    rows = zip(left['log'], right['log'], strict=True)
    return max(largest, *(abs(a[key] - b[key]) for a, b in rows for key in a if 'loss' in key))


def disks(bench: Bench) -> Row:
    """R5: a full or broken disk leaves the previous checkpoint, and training continues."""
    parts = (0.001, 0.99) if bench.short else (0.0, 0.001, 0.5, 0.99, 1.0)
    places = [('write', part) for part in parts] + [('fsync', 1.0), ('replace', 1.0)]
    problems = []
    for number, (where, part) in enumerate(places):
        code = ('ENOSPC', 'EIO')[number % 2]
        folder = bench.fresh()  # for a moment: training continues, and the result is the same
        life = live(folder, fault=Fault(code, where, 4, part=part, times=2))
        if life.codes != [0] or not life.logged('failed') or not same(result(folder), bench.reference()):
            problems.append(f'{code} {where} {part}: exit {life.codes}, {life.logged("failed")}')
        if [path.name for path in folder.glob('.*')]:
            problems.append(f'{code} {where} {part}: a temporary file is left')
        folder = bench.fresh()  # for good: the previous file is undamaged, and the exit code says so
        life = live(folder, fault=Fault(code, where, 4, part=part, times=10**6))
        steps = [int(step) for step in life.logged('saved')]
        intact = checkpoints.read_newest(folder)
        if life.codes != [1] or 'not saved' not in life.err or intact[2] or intact[1]['step'] < max(steps):
            problems.append(f'{code} {where} {part} for good: exit {life.codes}, {intact[2]} {life.err[-200:]}')
        if f'done {3 * STEPS}' not in life.events or [path.name for path in folder.glob('.*')]:
            problems.append(f'{code} {where} {part} for good: training stopped, or a temporary file is left')
    failed = len({text.split(':')[0].removesuffix(' for good') for text in problems})
    reached = f'{len(places) - failed} of {len(places)}, for a moment and for good'
    return Row('R5', 'full disk', f'{len(places)} of {len(places)}', reached, not problems, problems=problems)


def damage(bench: Bench) -> Row:
    """R6: a damaged file is detected and the previous one is taken, unless what is loaded does not change."""
    folder = bench.fresh()
    live(folder, fault=Fault('kill', 'step', STEPS))
    last = folder / checkpoints.LAST
    whole, loaded = last.read_bytes(), checkpoints.read_checkpoint(last)
    count = 8 if bench.short else 50
    spots = [bench.random.randrange(len(whole)) for _ in range(count)]
    flips = {f'bit flipped at {i}': whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in spots}
    cases = {f'cut at {i * len(whole) // count}': whole[: i * len(whole) // count] for i in range(count)}
    cases |= {**flips, 'empty': b'', 'a page': b'<!DOCTYPE html><title>404</title>'}
    earlier = checkpoints.find_earlier(folder)[0]
    problems = []
    for name, data in cases.items():
        last.write_bytes(data)
        path, found, errors = checkpoints.read_newest(folder)
        detected = path == earlier and any(error.startswith('checkpoint.pth is damaged') for error in errors)
        harmless = name in flips and path == last and same(found, loaded)
        if not (detected or harmless):
            problems.append(f'{name}: {path.name} {errors}')
    life = live(folder)
    if f'falling back to {earlier.name}' not in life.out or not same(result(folder), bench.reference()):
        problems.append(f'resumed: {life.out[-300:]} {life.err[-300:]}')
    reached = f'{len(cases) - len(problems)} of {len(cases)}'
    return Row('R6', 'damaged file', f'{len(cases)} of {len(cases)}', reached, not problems, problems=problems)


def exact(bench: Bench) -> Row:
    """R9: evaluation counts each image once on any number of ranks."""
    worlds, sizes, batches = ((1, 3, 8), (1, 50, 1009), (3, 64)) if bench.short else (
        (1, 2, 3, 4, 7, 8), (1, 7, 50, 1000, 1009), (1, 3, 64))  # fmt: skip
    problems, found = [], {}
    for world in worlds:
        base = bench.folder / f'world{world}'
        pids = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    _evaluate_all(rank, world, sizes, batches, base)
                os._exit(0)
            pids[pid] = rank
        wait_for(pids, Path(f'{base}.events'), 100)
        found[world] = json.loads(Path(f'{base}.json').read_text())
    for case in found[worlds[0]]:
        counts = {tuple(found[world][case][:-1]) for world in worlds}
        losses = [found[world][case][-1] for world in worlds]
        alike = {
            tuple(found[worlds[0]][other][:-1]) for other in found[worlds[0]] if other.split()[0] == case.split()[0]
        }
        if len(counts) != 1 or len(alike) != 1 or max(losses) - min(losses) > 1e-6:
            problems.append(f'{case}: {counts} {losses}')
    cases = len(worlds) * len(sizes) * len(batches)
    return Row(
        'R9',
        'exact evaluation',
        f'{cases} alike',
        f'{cases - len(problems)} of {cases}',
        not problems,
        problems=problems,
    )


class _FromPixels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def _evaluate_all(rank: int, world: int, sizes: tuple, batches: tuple, base: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(rank)}
    utils.init_distributed('cpu', f'file://{base}.meet')
    found = {}
    for size, batch in itertools.product(sizes, batches):
        generator = torch.Generator().manual_seed(size)
        images = torch.randn(size, 3, 2, 2, generator=generator)
        data = torch.utils.data.TensorDataset(images, torch.randint(12, (size,), generator=generator))
        loader = torch.utils.data.DataLoader(data, batch, sampler=range(rank, size, world))
        stats = engine.evaluate(_FromPixels(), loader, torch.device('cpu'), torch.float32)
        found[f'{size} {batch}'] = [stats[key] for key in ('images', 'correct1', 'correct5', 'loss')]
    if rank == 0:
        Path(f'{base}.json').write_text(json.dumps(found))
    utils.destroy_distributed()


def values(bench: Bench) -> Row:
    """R10: a value that is not finite never changes the weights."""
    names = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'student logits', 'teacher logits', 'gradients']
    cases = [(do, where) for where in names for do in ('nan', 'inf')]
    if bench.short:
        cases = [('nan', 'mf_rand'), ('inf', 'teacher logits'), ('nan', 'gradients')]
    problems, slowest = [], 0.0
    for do, where in cases:
        folder, at = bench.fresh(), 6
        life = live(folder, 2, fault=Fault(do, where, at, rank=1))
        slowest = max(slowest, life.left)
        weights = life.logged('weights')
        line = life.errors[0] if life.errors else ''
        named = f'step {at - 1} of epoch 0 on rank 1: ' in line and where in line
        images = re.search(r'images((?: \d+)+);', line)
        wrong = []
        if life.codes != [1, 1] or len(life.errors) != 1 or life.left > 10:
            wrong.append(f'exit {life.codes} after {life.left:.1f} s')
        if not named or images is None or len(images[1].split()) != GLOBAL_BATCH // 2:
            wrong.append(f'says {line!r}')
        if len(set(weights[-4:])) != 1 or len(set(weights)) < 5:
            wrong.append('the weights have changed')
        if checkpoints.read_newest(folder)[1]['step'] != 4:
            wrong.append('the last checkpoint is not the one before the fault')
        if wrong:
            problems.append(f'{do} in {where}: {"; ".join(wrong)} {life.err[-300:]}')
    reached = f'{len(cases) - len(problems)} of {len(cases)}, slowest {slowest:.1f} s'
    return Row('R10', 'not finite', f'{len(cases)} of {len(cases)} in 10 s', reached, not problems, problems=problems)


def exceptions(bench: Bench) -> Row:
    """R12: if one rank or loader process fails, all exit and the cause is printed once."""
    cases = [(do, where, at, workers, rank) for rank in (0, 1) for do, where, at, workers in (
        ('raise', 'step', 5, 0), ('raise', 'eval', 1, 0), ('raise', 'worker', 7, 2), ('raise', 'worker', 7, 0),
        ('raise', 'first batch', 1, 2), ('kill', 'worker', 7, 2), ('kill', 'step', 5, 2),
    )]  # fmt: skip
    cases += [('raise', 'write', 3, 0, 0)]
    if bench.short:
        cases = [cases[i] for i in (0, 9)]
    problems, slowest = [], 0.0
    for do, where, at, workers, rank in cases:
        life = live(bench.fresh(), 2, workers, Fault(do, where, at, rank))
        slowest = max(slowest, life.left)
        cause = life.err.count('ArithmeticError: injected in') if where != 'worker' or not workers else (
            life.err.count('Original Traceback'))  # fmt: skip
        followers = [line for line in life.errors if 'another rank failed' in line]
        wrong = []
        if do == 'kill' and where == 'worker':
            cause = sum('DataLoader worker' in line for line in life.errors)
        if life.left > 30 or 0 in life.codes or cause != (do == 'raise' or where == 'worker'):
            wrong.append(f'exit {life.codes} after {life.left:.1f} s, cause printed {cause} times')
        tracebacks = 0 if do == 'kill' else 2 if where == 'worker' and workers else 1
        if len(followers) != 1 or life.err.count('Traceback') != tracebacks:
            wrong.append(f'follow-up: {life.errors}')
        if wrong:
            problems.append(
                f'{do} in {where} of rank {rank}, {workers} workers: {"; ".join(wrong)}\n{life.err[-1500:]}'
            )
    reached = f'{len(cases) - len(problems)} of {len(cases)}, slowest {slowest:.1f} s'
    return Row('R12', 'no hang', f'{len(cases)} of {len(cases)} in 30 s', reached, not problems, problems=problems)


# Rows that are shown by the test suite, by their marks.
SUITE = {'R7': 'safe loading', 'R8': 'layouts', 'R11': 'bad images', 'R13': 'resume misuse'}


def suite(name: str) -> Row:
    """Runs the tests of a promise."""
    command = [sys.executable, '-m', 'pytest', '-v', '-m', name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    counts = dict(re.findall(r'(\d+) (passed|failed|error|skipped)', done.stdout + done.stderr))
    counts = {what: int(number) for number, what in counts.items()}
    good = done.returncode == 0 and counts.get('passed', 0) > 3
    reached = ', '.join(f'{number} {what}' for what, number in counts.items())
    return Row(name, SUITE[name], 'all tests', reached, good, problems=[] if good else [done.stdout[-2000:]])


ROWS: dict[str, Callable] = {
    'R1': kills, 'R2': controls, 'R3': signals, 'R4': elastic, 'R5': disks, 'R6': damage, 'R9': exact, 'R10': values,
    'R12': exceptions,
}  # fmt: skip


def rows(bench: Bench, wanted: list[str]) -> Iterator[Row]:
    for name in wanted:
        start = time.monotonic()
        made = suite(name) if name in SUITE else ROWS[name](bench)
        for row in made if isinstance(made, tuple) else (made,):
            row.seconds = time.monotonic() - start
            yield row


def _restarted(plan: str, argv: list[str]) -> None:
    """Runs a rank under torchrun with the fault of this restart."""
    faults = json.loads(Path(plan).read_text())
    number = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    fault = Fault(**faults[number]) if number < len(faults) else None
    inject(fault, int(os.environ['RANK']), Path(f'{plan}.events'))
    main.main(argv)


def crash_test() -> int:
    """Runs the chosen rows; returns 0 if all promises are kept."""
    names = sorted([*ROWS, *SUITE], key=lambda name: int(name[1:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true', help='a few of each kind')
    parser.add_argument('--only', nargs='+', choices=names, default=names, help='rows; R14 comes with R1')
    parser.add_argument('--seed', type=int, default=0, help='of the random faults')
    parser.add_argument('--json', help='write the rows to this file too')
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.FAKE_TRAIN, datasets.FAKE_VAL = TRAIN_IMAGES, VAL_IMAGES
    start, table = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.short, args.seed)
        for row in rows(bench, args.only):
            table.append(row)
            print(f'{row.name:<4} {"kept  " if row.good else "BROKEN"} {row.seconds:5.0f} s  {row.reached}', flush=True)
            for problem in row.problems[:10]:
                print(f'       {problem}', flush=True)
    table.sort(key=lambda row: int(row.name[1:]))
    print('\n| id | promise | asked | reached | kept |\n|---|---|---|---|---|')
    for row in table:
        print(f'| {row.name} | {row.promise} | {row.asked} | {row.reached} | {"yes" if row.good else "NO"} |')
    print(f'\n{time.monotonic() - start:.0f} s, torch {torch.__version__}, timm {timm.__version__}, seed {args.seed}')
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in table]))
    return 0 if all(row.good for row in table) else 1


if __name__ == '__main__':
    if sys.argv[1:2] == ['--restarted']:
        _restarted(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(crash_test())
