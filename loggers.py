"""What a run prints: lines of the first rank, and progress through an epoch."""

import io
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta

import torch

import stopping
import utils


def log_rank0(text: str) -> None:
    """Prints a line, on the first rank only. A full disk below it, or a reader that has gone, loses the line alone."""
    if utils.get_rank() == 0:
        with suppress(OSError):
            print(text, flush=True)


def unbuffer_stdio() -> None:
    """Prints go through no buffer: what cannot be written is lost, instead of failing anew wherever one is flushed."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is not None:
            raw = io.FileIO(stream.fileno(), 'wb', closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))


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
        self.due = False  # a line follows the step whose batch was handed out last

    def over(self, loader: Iterable, first: int = 0) -> Iterator:
        """The batches of the rest of an epoch, of which `first` steps are done already."""
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
                text = self.line()  # waits for the device, so the clock below is right
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
    """Largest memory so far in MiB: of the device's allocator, on the CPU of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == 'darwin' else 10)
