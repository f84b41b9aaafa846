"""What every part of a run needs: process groups, meters and log, checkpoints, counters for random numbers."""

import json
import math
import os
import random
import resource
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn

# Distributed set-up ---------------------------------------------------------------------------------------------------


# The last tensors reduced. torch 2.6 joins gloo's threads while it holds the interpreter's lock; a thread that then
# lets go of a tensor nobody else holds waits for that lock, and both wait for ever. Held here, none is the last holder.
_reduced: deque[torch.Tensor] = deque(maxlen=8)


class UsageError(Exception):
    """The user asked for what cannot be done; says so in one line that names the flag and the value."""


@contextmanager
def blame(flag: str, value: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error about bad input into a UsageError that names the flag it came in by.

    Args:
        flag: as it is typed, `--teacher-path`.
        value: what was typed.
        kinds: errors that mean bad input beside OSError and ValueError.
    """
    try:
        yield
    except OSError as error:
        where = f'{error.filename}: ' if error.filename not in (None, value) else ''
        raise UsageError(f'{flag} {value}: {where}{error.strerror or " ".join(str(error).split())}') from error
    except (ValueError, *kinds) as error:
        raise UsageError(f'{flag} {value}: {" ".join(str(error).split())}') from error


def init_distributed(device: str, dist_url: str) -> torch.device:
    """Joins the process group a launcher announced in the environment, if any, and returns this rank's device.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu'; without a GPU 'cuda' becomes 'cpu'.
        dist_url: where the ranks meet, 'env://' for MASTER_ADDR and MASTER_PORT.

    Raises:
        UsageError: this machine has no such GPU, or fewer than ranks.
    """
    ranks = _launched()
    cuda = device.startswith('cuda') and torch.cuda.is_available()
    chosen = torch.device('cpu')
    if cuda:
        index = ranks[2] if ranks else torch.device(device).index or 0
        # Asked by all ranks of a machine alike, so that all stop: the others would wait for a surplus one.
        needed = int(os.environ.get('LOCAL_WORLD_SIZE', index + 1)) if ranks else index + 1
        if needed > torch.cuda.device_count():
            raise UsageError(
                f'--device {device}: {needed} GPUs are needed, this machine has {torch.cuda.device_count()}'
            )
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    if ranks is not None:
        dist.init_process_group(
            'nccl' if cuda else 'gloo',
            init_method=dist_url,
            rank=ranks[0],
            world_size=ranks[1],
            timeout=timedelta(minutes=30),
            device_id=chosen if cuda else None,
        )
    return chosen


def leave_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _reduced.clear()


def _launched() -> tuple[int, int, int] | None:
    """(rank, world size, rank on this machine) as torchrun and torch.distributed.launch tell them."""
    env = os.environ
    if 'RANK' in env and 'WORLD_SIZE' in env:
        return int(env['RANK']), int(env['WORLD_SIZE']), int(env.get('LOCAL_RANK', 0))
    return None


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Prints a line, on the first rank only."""
    if get_rank() == 0:
        print(text, flush=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The values (n,) added up over all ranks, on the same device."""
    if dist.is_initialized():
        dist.all_reduce(values)
        _reduced.append(values)
    return values


# Meters and logging ---------------------------------------------------------------------------------------------------


class Meters:
    """Running means of named scalars; the host reads them only when a line is printed or an epoch ends."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None
        self.count = 0
        self._printed = (0, 0.0)

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds one step's scalars, whatever their names; no host sync."""
        row = torch.stack([value.detach().float() for value in values.values()])
        row = torch.cat([row.sum()[None], row])
        self.names = ['loss', *(f'loss_{name}' for name in values)]
        self.total = row.double() if self.total is None else self.total + row
        self.count += 1

    def line(self) -> str:
        """Means since the last line, and since the start of the epoch in brackets. Waits for the device.

        Raises:
            FloatingPointError: a value since the last line is not finite.
        """
        total, (count, before) = np.array(self.total.tolist()), self._printed
        recent, whole = (total - before) / (self.count - count), total / self.count
        self._check_finite(recent, f'steps {count} to {self.count - 1} of the epoch')
        self._printed = (self.count, total)
        return '  '.join(f'{n}: {r:.4f} ({w:.4f})' for n, r, w in zip(self.names, recent, whole, strict=True))

    def means(self) -> dict[str, float]:
        """Means over all steps of all ranks. Waits for the device.

        Raises:
            FloatingPointError: a value on any rank is not finite.
        """
        sums = torch.cat([self.total, self.total.new_tensor([self.count])])
        *total, count = sum_over_ranks(sums).tolist()
        self._check_finite(total, 'some step of the epoch')
        return {name: value / count for name, value in zip(self.names, total, strict=True)}

    def _check_finite(self, values: Iterable[float], where: str) -> None:
        bad = [name for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f'not finite in {where} (rank {get_rank()}): {", ".join(bad)}')


class Progress:
    """Walks through a loader and prints a line every so many steps: eta, times, memory, and what `line` tells.

    Args:
        header: begins each line.
        print_freq: steps between lines; the first and the last step always print.
        line: further text, asked for only when a line is printed.
        device: whose memory is reported.
    """

    def __init__(self, header: str, print_freq: int, line: Callable[[], str], device: torch.device) -> None:
        self.header = header
        self.print_freq = print_freq
        self.line = line
        self.device = device

    def over(self, loader: Iterable) -> Iterator:
        steps, start = len(loader), time.monotonic()
        last, printed, waited = start, 0, 0.0
        batches = iter(loader)
        for step in range(steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            yield batch
            done = step + 1
            if step % self.print_freq == 0 or done == steps:
                text = self.line()  # waits for the device, so the clock below is right
                now = time.monotonic()
                since = done - printed
                eta = timedelta(seconds=int((now - start) / done * (steps - done)))
                say(
                    f'{self.header} [{done:{len(str(steps))}}/{steps}]  eta: {eta}  {text}  '
                    f'time: {(now - last) / since:.4f}  data: {waited / since:.4f}  mem: {peak_memory(self.device)} MiB'
                )
                last, printed, waited = now, done, 0.0
        say(f'{self.header} took {timedelta(seconds=int(time.monotonic() - start))}')


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in MiB: of the device's allocator, on the CPU of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == 'darwin' else 10)


def read_log(path: Path) -> list[dict]:
    """The rows of a log, none if there is no file.

    Raises:
        ValueError: a line is no JSON object with an epoch.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not all(isinstance(row, dict) and isinstance(row.get('epoch'), int) for row in rows):
        raise ValueError(f'{path} is no log of epochs')
    return rows


def write_log_row(path: Path, row: dict) -> None:
    """Writes one epoch's JSON line; rows of this epoch and later ones give way, as a resumed run repeats them."""
    rows = [old for old in read_log(path) if old['epoch'] < row['epoch']] + [row]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    write_durably(path, lambda file: file.write(text.encode()))


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file in one step: whatever happens, the old or the new one is there, whole."""
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass
class TrainingState:
    """Everything a run needs to go on where it stopped. The teacher is no part of it.

    Attributes:
        model: the student, a plain timm model.
        ema: its moving average, if any.
        epoch: the last finished epoch, −1 before the first.
        best_acc1: best accuracy of the raw model so far, in percent.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = -1
    best_acc1: float = 0.0

    def state_dict(self, args: dict) -> dict:
        """The checkpoint, with the keys of the 2022 release and plain types only.

        Args:
            args: the flags of the run.
        """
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.lr_scheduler.state_dict(),
            'epoch': self.epoch,
            'scaler': self.scaler.state_dict(),
            'args': args,
            'best_acc1': self.best_acc1,
            'versions': {'torch': str(torch.__version__), 'timm': timm.__version__},
        }
        return state | ({'model_ema': self.ema.module.state_dict()} if self.ema else {})

    def load_progress(self, checkpoint: dict) -> bool:
        """Takes over epoch, optimizer, schedule, scaler and best accuracy; weights are loaded elsewhere.

        The learning rate and the optimizer's options come from the flags, the moments from the file: the schedule is
        a function of the epoch.

        Returns:
            False, with nothing changed, for a file of weights alone.

        Raises:
            ValueError: the optimizer belongs to another model.
        """
        if not has_progress(checkpoint):
            return False
        if not isinstance(checkpoint['epoch'], int) or checkpoint['epoch'] < -1:
            raise ValueError(f'its epoch is {checkpoint["epoch"]!r}, no number of an epoch')
        own, saved = self.optimizer.state_dict(), checkpoint['optimizer']
        if _signature(own) != _signature(saved):
            raise ValueError("its optimizer's parameter groups are not those of this model and these flags")
        self.optimizer.load_state_dict({'state': saved['state'], 'param_groups': own['param_groups']})
        if checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.best_acc1 = float(checkpoint.get('best_acc1', 0.0))
        self.start_after(checkpoint['epoch'])
        return True

    def start_after(self, epoch: int) -> None:
        """Goes on after an epoch, with the learning rate the schedule then has."""
        self.epoch = epoch
        if epoch >= 0:
            self.lr_scheduler.step(epoch)


def has_progress(checkpoint: dict) -> bool:
    """Whether a checkpoint tells how far its run had come, or holds weights alone."""
    return {'optimizer', 'lr_scheduler', 'epoch'} <= checkpoint.keys()


def _signature(optimizer: dict) -> object:
    """What two states of one optimizer have in common, whatever version of torch wrote them."""
    groups = optimizer.get('param_groups') if isinstance(optimizer, dict) else None
    if not isinstance(groups, list):
        return None
    return [(len(group['params']), {'betas', 'momentum'} & group.keys()) for group in groups]


# Random numbers by counter --------------------------------------------------------------------------------------------


def counter_seed(*counter: int | str) -> int:
    """A 63-bit seed that is a function of its counter alone, e.g. (seed, 'augment', epoch, position).

    Words keep the streams apart; numbers are non-negative.
    """
    numbers = [zlib.crc32(c.encode()) if isinstance(c, str) else c for c in counter]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(generator: torch.Generator, seed: int, step: int, rank: int) -> None:
    """Starts a training step's random numbers: mixup and drop-path (global generators), random tokens (`generator`)."""
    number = counter_seed(seed, 'step', step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    generator.manual_seed(counter_seed(seed, 'tokens', step, rank))
