"""Injects one fault into a run of main.py: a kill, a signal, a full disk, a value that is not finite, an exception.

The real program runs; functions that it calls are wrapped. What happens is appended to a file of events, one line each,
which survives a kill.
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
import models
import run_dir
import stopping
import utils

# Small enough for a step in hundredths of a second. Everything that draws random numbers is on.
TRAIN_IMAGES, VAL_IMAGES = 96, 24
SAVING = ('write', 'fsync', 'replace', 'replaced', 'link')


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        action: 'kill', the name of a signal or of an errno, 'raise', or 'nan' and 'inf' for values.
        where: 'step', 'first batch', 'eval', 'worker', one of SAVING, or the name of a value.
        at: at which call, counted from 1.
        rank: on which rank.
        part: part of the bytes that are written before the fault.
        times: number of calls in a row that fail; many for a disk that stays full.
        to_group: whether a signal reaches the loader processes too.
        lagged: whether the ranks agree one step late, as with nccl.
    """

    action: str
    where: str
    at: int = 1
    rank: int = 0
    part: float = 1.0
    times: int = 1
    to_group: bool = False
    lagged: bool = False


class Injector:
    """Counts calls, logs events, and triggers the fault."""

    def __init__(self, fault: Fault | None, rank: int, events: Path) -> None:
        self.fault = fault if fault is not None and fault.rank == rank else None
        self.rank = rank
        self.calls = Counter()
        self.events = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def log(self, text: str) -> None:
        os.write(self.events, f'{self.rank} {text}\n'.encode())

    def due(self, where: str) -> bool:
        """Counts a call; returns whether the fault is to be triggered by it."""
        self.calls[where] += 1
        fault = self.fault
        return fault is not None and fault.where == where and 0 <= self.calls[where] - fault.at < fault.times

    def reach(self, where: str) -> None:
        if self.due(where):
            self.trigger()

    def trigger(self) -> None:
        action, where = self.fault.action, self.fault.where
        self.log(f'triggered {where}')
        if action == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        elif action.startswith('SIG'):
            number = getattr(signal, action)
            os.killpg(os.getpgrp(), number) if self.fault.to_group else os.kill(os.getpid(), number)
        elif action == 'raise':
            raise ArithmeticError(f'injected in {where}')
        else:
            raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))


class _File:
    """A file that triggers the fault during a write."""

    def __init__(self, file, injector: Injector) -> None:
        self.file = file
        self.injector = injector

    def write(self, data) -> None:
        if self.injector.due('write'):
            written = int(len(data) * self.injector.fault.part)
            self.file.write(data[:written])
            self.file.flush()
            self.injector.trigger()
            data = data[written:]  # after a signal the write continues
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
    """Calls `act` with the result and the arguments. What it returns, unless None, is the new result."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        changed = act(result, *args)
        return result if changed is None else changed

    setattr(owner, name, wrapped)


def _watch_files(injector: Injector) -> None:
    def opened(path: Path, mode: str):
        file = open(path, mode)  # noqa: SIM115
        return _File(file, injector) if 'w' in mode else file

    checkpoints.open = opened
    _before(os, 'fsync', lambda *_: injector.reach('fsync'))
    _before(os, 'link', lambda *_: injector.reach('link'))
    _before(os, 'replace', lambda *_: injector.reach('replace'))
    _after(os, 'replace', lambda *_: injector.reach('replaced'))
    _after(
        run_dir.CheckpointManager,
        'write_pending',
        lambda error, manager: injector.log(f'failed {error}' if error else f'saved {manager.last_step}'),
    )


def _watch_steps(injector: Injector) -> None:
    _before(utils, 'seed_step', lambda *_: injector.reach('step'))
    _before(loggers.Progress, 'over', lambda *_: injector.reach('first batch'))
    _before(engine, 'count_correct', lambda *_: injector.reach('eval'))
    _before(datasets.TrainDataset, '__getitem__', lambda *_: injector.reach('worker'))
    _before(run_dir.CheckpointManager, 'after_step', lambda manager: injector.log(f'done {manager.state.step}'))


def _corrupt(injector: Injector) -> None:
    """Makes a term, logits or a gradient not finite."""
    bad = float(injector.fault.action)
    where = injector.fault.where
    students = []

    def term(result: dict, *_):
        if where in result and injector.due(where):
            injector.log(f'triggered {where}')
            return {**result, where: result[where] * bad}

    def logits(result, tapped, *_):
        side = 'student' if tapped.training else 'teacher'
        if side == 'student':
            students.append(tapped.model)
        if where == f'{side} logits' and (side == 'teacher' or torch.is_grad_enabled()) and injector.due(where):
            injector.log(f'triggered {where}')
            return result._replace(logits=result.logits * bad)

    def gradient(*_) -> None:
        if injector.due(where):
            injector.log(f'triggered {where}')
            weight = next(students[-1].parameters())
            handle = weight.register_hook(lambda g: (handle.remove(), g * bad)[1])

    _after(losses.ManifoldDistillationLoss, 'forward', term)
    _after(models.TappedModel, 'forward', logits)
    if where == 'gradients':
        _before(torch.amp.GradScaler, 'scale', gradient)  # called between forward and backward pass


def _record_weights(injector: Injector) -> None:
    """Logs a sum of all weights of the student at the start of each step but the first, and when the run fails."""
    students = []

    def note(_, tapped, *args) -> None:
        if tapped.training:
            students[:] = [tapped.model]

    def log(*_) -> None:
        for student in students:
            injector.log(f'weights {sum(p.detach().double().abs().sum().item() for p in student.parameters())!r}')

    _after(models.TappedModel, 'forward', note)
    _before(utils, 'seed_step', log)
    _before(stopping, 'end_loader_processes', log)


def _record_images(injector: Injector) -> None:
    """Logs the image at each position, and a sum of its augmented pixels."""

    def log(item: tuple, _, key: tuple) -> None:
        injector.log(f'image {key[1]} {key[2]} {item[2]} {item[0].double().sum().item()!r}')

    _after(datasets.TrainDataset, '__getitem__', log)


def inject(fault: Fault | None, rank: int, events: Path, record: str = '') -> None:
    """Prepares this process, which then calls `main.main`.

    Args:
        fault: to trigger; None: events are logged only.
        rank: of this process.
        events: file of events.
        record: 'images' logs every image too.
    """
    torch.set_num_threads(1)
    datasets.FAKE_TRAIN, datasets.FAKE_VAL = TRAIN_IMAGES, VAL_IMAGES
    run_dir.RETRY, run_dir.LAST_TRIES = 0.02, (0.05, 0.1)
    injector = Injector(fault, rank, events)
    _watch_files(injector)
    _watch_steps(injector)
    if fault is not None and fault.lagged:
        _after(stopping.RankConsensus, '__init__', lambda _, consensus, __: setattr(consensus, 'lagged', True))
    if record == 'images':
        _record_images(injector)
    if fault is not None and fault.action in ('nan', 'inf'):
        _record_weights(injector)
        if injector.fault is not None:
            _corrupt(injector)
