"""Plants one fault in a run of main.py: a kill, a signal, a full disk, a value that is not finite, an exception.

The real program runs; only the places it passes on its way are watched. What happened is appended to a file of events,
a line each, that survives a kill.
"""

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoints
import datasets
import engine
import loggers
import losses
import main
import models
import run_dir
import stopping
import utils

# Small enough for a step in hundredths of a second; all that draws random numbers is on.
TRAIN_IMAGES, VAL_IMAGES = 96, 24
SAVING = ('write', 'fsync', 'replace', 'replaced', 'link')


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        do: 'kill', the name of a signal, of an errno, 'raise', or 'nan' and 'inf' for values.
        where: 'step', 'first batch', 'eval', 'worker', one of SAVING, or the name of a value.
        at: on the how-manieth passage, counted from 1.
        rank: on which rank.
        part: of the bytes that are written before the fault.
        times: how many passages in a row fail; a disk that stays full has many.
        everyone: a signal reaches the loader processes too.
        lags: the ranks agree a step late, as they do beside GPUs.
    """

    do: str
    where: str
    at: int = 1
    rank: int = 0
    part: float = 1.0
    times: int = 1
    everyone: bool = False
    lags: bool = False


class Plan:
    """Counts the passages, tells what happens, and lets the fault come true."""

    def __init__(self, fault: Fault | None, rank: int, events: Path) -> None:
        self.fault = fault if fault is not None and fault.rank == rank else None
        self.rank = rank
        self.passed = Counter()
        self.events = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, text: str) -> None:
        os.write(self.events, f'{self.rank} {text}\n'.encode())

    def due(self, where: str) -> bool:
        """Whether the fault is to come true at this passage."""
        self.passed[where] += 1
        fault = self.fault
        return fault is not None and fault.where == where and 0 <= self.passed[where] - fault.at < fault.times

    def reach(self, where: str) -> None:
        if self.due(where):
            self.strike()

    def strike(self) -> None:
        do, where = self.fault.do, self.fault.where
        self.tell(f'struck {where}')
        if do == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        elif do.startswith('SIG'):
            number = getattr(signal, do)
            os.killpg(os.getpgrp(), number) if self.fault.everyone else os.kill(os.getpid(), number)
        elif do == 'raise':
            raise ArithmeticError(f'planted in {where}')
        else:
            raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))


class _File:
    """A file whose disk fails in the midst of a write."""

    def __init__(self, file, plan: Plan) -> None:
        self.file = file
        self.plan = plan

    def write(self, data) -> None:
        if self.plan.due('write'):
            self.file.write(data[: int(len(data) * self.plan.fault.part)])
            self.file.flush()
            self.plan.strike()
            data = data[int(len(data) * self.plan.fault.part) :]  # a signal only: the write goes on
        self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _before(owner, name: str, act: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner, name: str, act: Callable) -> None:
    """`act` is given the result and the arguments; what it returns, unless None, is the new result."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        changed = act(result, *args)
        return result if changed is None else changed

    setattr(owner, name, wrapped)


def _watch_files(plan: Plan) -> None:
    def opened(path: Path, mode: str):
        file = open(path, mode)  # noqa: SIM115
        return _File(file, plan) if 'w' in mode else file

    checkpoints.open = opened
    _before(os, 'fsync', lambda *_: plan.reach('fsync'))
    _before(os, 'link', lambda *_: plan.reach('link'))
    _before(os, 'replace', lambda *_: plan.reach('replace'))
    _after(os, 'replace', lambda *_: plan.reach('replaced'))
    _after(
        run_dir.CheckpointManager,
        'write_pending',
        lambda error, manager: plan.tell(f'failed {error}' if error else f'saved {manager.last_step}'),
    )


def _watch_steps(plan: Plan) -> None:
    _before(utils, 'seed_step', lambda *_: plan.reach('step'))
    _before(loggers.Progress, 'over', lambda *_: plan.reach('first batch'))
    _before(engine, '_count_correct', lambda *_: plan.reach('eval'))
    _before(datasets.TrainDataset, '__getitem__', lambda *_: plan.reach('worker'))
    _before(run_dir.CheckpointManager, 'after_step', lambda manager: plan.tell(f'done {manager.state.step + 1}'))


def _spoil(plan: Plan) -> None:
    """Makes a term, logits or a gradient not finite, and tells whether the weights changed by it."""
    bad = float(plan.fault.do)
    where = plan.fault.where
    seen = {}

    def term(result: dict, *_):
        if where in result and plan.due(where):
            plan.tell(f'struck {where}')
            return {**result, where: result[where] * bad}

    def logits(result, tapped, *_):
        side = 'student' if tapped.training else 'teacher'
        if side == 'student':
            seen['model'] = tapped.model
        if where == f'{side} logits' and (side == 'teacher' or torch.is_grad_enabled()) and plan.due(where):
            plan.tell(f'struck {where}')
            return result._replace(logits=result.logits * bad)

    def gradient(*_):
        if 'model' in seen and plan.due(where):
            plan.tell(f'struck {where}')
            weight = next(seen['model'].parameters())
            handle = weight.register_hook(lambda g: (handle.remove(), g * bad)[1])

    _after(losses.ManifoldDistillationLoss, 'forward', term)
    _after(models.TappedModel, 'forward', logits)
    if where == 'gradients':
        _after(engine, '_values', gradient)


def _record_weights(plan: Plan) -> None:
    """Tells a sum of all weights at the start of each step and when the run leaves."""
    students = []
    _before(main, 'train_one_epoch', lambda student, *_, **__: students.append(student))

    def tell(*_) -> None:
        total = sum(p.detach().double().abs().sum().item() for p in students[-1].parameters())
        plan.tell(f'weights {total!r}')

    _before(utils, 'seed_step', tell)
    _before(main, '_stop', tell)


def _record_images(plan: Plan) -> None:
    """Tells what stood at each position: image, and a sum of its augmented pixels."""

    def tell(item: tuple, _, key: tuple) -> None:
        plan.tell(f'image {key[1]} {key[2]} {item[2]} {item[0].double().sum().item()!r}')

    _after(datasets.TrainDataset, '__getitem__', tell)


def plant(fault: Fault | None, rank: int, events: Path, record: str = '') -> None:
    """Prepares this process, which is then to call `main.main`.

    Args:
        fault: that will come true; None only tells what happens.
        rank: of this process.
        events: file of events.
        record: 'images' tells every image too.
    """
    torch.set_num_threads(1)
    datasets.FAKE_TRAIN, datasets.FAKE_VAL = TRAIN_IMAGES, VAL_IMAGES
    run_dir.RETRY, run_dir.LAST_TRIES = 0.02, (0.05, 0.1)
    plan = Plan(fault, rank, events)
    _watch_files(plan)
    _watch_steps(plan)
    if fault is not None and fault.lags:
        _after(stopping.RankConsensus, '__init__', lambda _, consensus, __: setattr(consensus, 'lagged', True))
    if record == 'images':
        _record_images(plan)
    if fault is not None and fault.do in ('nan', 'inf'):
        _record_weights(plan)
        if plan.fault is not None:
            _spoil(plan)
