"""What a run prints: log lines of the first rank, and the progress of an epoch."""

import io
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

import stopping
import utils


class StdoutHandler(logging.Handler):
    """Prints each line to what is `sys.stdout` at that moment. A line that cannot be written is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk, or a reader that has exited
            print(self.format(record), flush=True)


logger = logging.getLogger('manifold_distillation')
logger.setLevel(logging.INFO)
logger.propagate = False
if not logger.handlers:
    logger.addHandler(StdoutHandler())


def log_rank0(text: str) -> None:
    """Logs a line, on the first rank only."""
    if utils.get_rank() == 0:
        logger.info(text)


def unbuffer_stdio() -> None:
    """Makes prints unbuffered, so that what cannot be written is lost and does not fail again at a later flush.

    Characters that the encoding of the terminal does not have become question marks.
    """
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is not None:
            raw = io.FileIO(stream.fileno(), 'wb', closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, 'replace', write_through=True))


@dataclass
class Progress:
    """Iterates over an epoch and logs every few steps: time left, times per step, memory, and further text."""

    header: str  # start of each line
    print_freq: int  # steps between lines; the first and the last step always have one
    line: Callable[[], str]  # returns the further text; called only for a step that has a line
    device: torch.device  # its memory is reported
    due: bool = field(default=False, init=False)  # whether the present step has a line

    def over(self, loader: utils.SizedIterable, first: int = 0) -> Iterator[Any]:
        """Yields the batches of the rest of an epoch, of which `first` steps are done."""
        steps, start = first + len(loader), time.monotonic()
        last, printed, waited = start, first, 0.0
        batches = stopping.iter_with_signals_blocked(loader)
        for step in range(first, steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            done = step + 1
            self.due = step % self.print_freq == 0 or done == steps
            yield batch
            if self.due:
                text = self.line()  # waits for the device, so the times below are right
                now = time.monotonic()
                since = done - printed
                eta = timedelta(seconds=int((now - start) / (done - first) * (steps - done)))
                log_rank0(
                    f'{self.header} [{done:{len(str(steps))}}/{steps}]  eta: {eta}  {text}  '
                    f'time: {(now - last) / since:.4f}  data: {waited / since:.4f}  mem: {peak_memory(self.device)} MiB'
                )
                last, printed, waited = now, done, 0.0
        log_rank0(f'{self.header} took {timedelta(seconds=int(time.monotonic() - start))}')


def peak_memory(device: torch.device) -> int:
    """Peak memory in MiB: of the device's allocator, or of this process on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == 'darwin' else 10)
