"""Toy runs of main.py for the crash test: each rank is a process of its own, with or without a fault."""

import contextlib
import itertools
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from faults import Fault, inject

import checkpoints
import config_files
import loggers
import main

TEACHER = {'patch_size': 8, 'depth': 3, 'embed_dim': 32, 'num_heads': 4, 'init_values': 1.0}
FLAGS = f"""--data-set FAKE --input-size 32 --device cpu --epochs 3 --warmup-epochs 0 --lr 0.05 --print-freq 4
    --model deit_tiny_patch16_224 --model-kwargs patch_size=8 depth=3 embed_dim=16 num_heads=2 --drop-path 0.1
    --teacher-model cait_s24_224 --teacher-kwargs {' '.join(f'{key}={value}' for key, value in TEACHER.items())}
    --distillation-type soft --s-id 0 2 --t-id 0 2 --K 20 --model-ema-decay 0.9 --no-repeated-aug
    --save-interval-steps 2""".split()
GLOBAL_BATCH = 8
PATIENCE = 25.0  # seconds a rank may take to exit
COMPARED = ('model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'best_acc1', 'step', 'position')


@dataclass
class Life:
    """How one start of a run ended: exit codes by rank, seconds from the fault to the exit, output, logged events."""

    codes: list[int]
    left: float
    out: str
    err: str
    events: list[str] = field(default_factory=list)

    def logged(self, word: str) -> list[str]:
        """The events that start with a word, without that word."""
        return [text[len(word) + 1 :] for text in self.events if text.startswith(word + ' ')]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith('main.py: error:')]


_numbers = itertools.count()


def _child(argv: list[str], rank: int, ranks: int, fault: Fault | None, base: Path, record: str) -> None:
    """Runs one rank. Never returns."""
    os.setpgid(0, 0)
    code = 70
    try:
        for number, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(f'{base}.{name}{rank}', os.O_WRONLY | os.O_CREAT), number)
        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
            os.environ.pop(name, None)
        if ranks > 1:
            os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(ranks), 'LOCAL_RANK': '0'}
            argv = [*argv, '--dist-url', f'file://{base}.meet']
        inject(fault, rank, Path(f'{base}.events'), record)
        main.main(argv)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def live(
    folder: Path,
    ranks: int = 1,
    workers: int = 0,
    fault: Fault | None = None,
    extra: tuple[str, ...] = (),
    record: str = '',
    kill_after: float = 0.0,
) -> Life:
    """Starts or resumes a run and waits until it ends.

    Args:
        folder: of the run.
        ranks: how many.
        workers: loader processes per rank.
        fault: to inject.
        extra: further flags, after those of the toy.
        record: see `faults.inject`.
        kill_after: seconds after which all ranks are killed if they have not ended; 0: never.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = folder.parent / f'life{next(_numbers)}'
    argv = [*FLAGS, '--batch-size', str(GLOBAL_BATCH // ranks), '--num_workers', str(workers), '--output_dir']
    argv += [str(folder), '--resume', 'auto', '--teacher-path', str(folder.parent / 'teacher.pth'), *extra]
    pids = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(argv, rank, ranks, fault, base, record)
        pids[pid] = rank
    codes, left = wait_for(pids, Path(f'{base}.events'), kill_after)
    texts = [''.join(Path(f'{base}.{name}{rank}').read_text() for rank in range(ranks)) for name in ('out', 'err')]
    events = [line.split(' ', 1)[1] for line in Path(f'{base}.events').read_text().splitlines()]
    for path in base.parent.glob(f'{base.name}.*'):
        path.unlink()
    return Life([codes[rank] for rank in range(ranks)], left, *texts, events)


def wait_for(pids: dict[int, int], events: Path, kill_after: float) -> tuple[dict[int, int], float]:
    """Returns exit codes by rank (negative: killed by this signal), and seconds from the fault to the last exit."""
    running, codes, start, triggered = dict(pids), {}, time.monotonic(), 0.0
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if not triggered and (codes or (events.exists() and ' triggered ' in events.read_text())):
            triggered = now
        timed_out = now - start > 120 or (triggered and now - triggered > 2 * PATIENCE)
        if timed_out or (kill_after and now - start > kill_after):
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return codes, time.monotonic() - (triggered or start)


def same(left: object, right: object) -> bool:
    """Whether two nested values are bit-identical."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def result(folder: Path) -> dict:
    """What a finished run has written: last and best checkpoint, and the log."""
    files = {name: checkpoints.read_checkpoint(folder / name) for name in (checkpoints.LAST, checkpoints.BEST)}
    kept = {name: {key: file.get(key) for key in COMPARED} for name, file in files.items()}
    return {**kept, 'log': checkpoints.read_log(folder / checkpoints.LOG)}


def folder_problem(folder: Path, keep: int = 1) -> str:
    """What is wrong with a folder after a kill, '' if nothing is: too many files, or a teacher in a checkpoint."""
    names = sorted(path.name for path in folder.iterdir())
    strays = [name for name in names if name.endswith('.tmp')]
    earlier = [name for name in names if re.fullmatch(r'checkpoint-\d{8}\.pth', name)]
    logs = {config_files.ARGS, loggers.CONSOLE, loggers.METRICS, checkpoints.LOCK}
    odd = set(names) - set(strays) - set(earlier) - set(checkpoints.KEPT) - logs
    if odd or len(strays) > 1 or len(earlier) > keep:
        return f'files: {" ".join(names)}'
    if checkpoints.find_checkpoints(folder):
        _, state, _ = checkpoints.read_newest(folder)
        if any(word in str(key) for key in state for word in ('teacher',)):
            return f'keys: {" ".join(state)}'
    return ''
