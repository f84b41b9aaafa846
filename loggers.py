"""What a run tells: lines on the console and in its folder, a progress bar on a terminal, metrics to further sinks."""

import importlib
import importlib.util
import io
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

import checkpoints
import stopping
import utils

CONSOLE, METRICS = 'console.log', 'metrics.jsonl'
WIDTH = 120  # characters of the longest line of a step

# Lines ----------------------------------------------------------------------------------------------------------------


class StdoutHandler(logging.Handler):
    """Prints each line to what is `sys.stdout` at that moment, above a progress bar. A line that fails is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk, or a reader that has exited
            if _on_terminal():
                tqdm.write(self.format(record), sys.stdout)
            else:
                print(self.format(record), flush=True)


def _on_terminal() -> bool:
    return hasattr(sys.stdout, 'isatty') and sys.stdout.isatty()


class ConsoleFile(logging.Handler):
    """Keeps the lines of a run from `start` until `open` names the file, then appends them and all further lines to it.

    After `close`, which is also the state at the beginning, it does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._active, self._lines, self._path = False, list[str](), Path()

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))

    def write(self, line: str) -> None:
        """Takes a line that is not shown on the console."""
        if self._active:
            self._lines.append(line + '\n')
        if self._path.name:
            with suppress(OSError), open(self._path, 'a', encoding='utf-8', errors='replace') as file:
                file.writelines(self._lines)
            self._lines = []

    def start(self) -> None:
        self._active, self._lines, self._path = True, [], Path()

    def open(self, path: Path) -> None:
        """Writes to this file from the next line on."""
        self._path = path

    def close(self) -> None:
        self._active, self._lines, self._path = False, [], Path()


logger = logging.getLogger('manifold_distillation')
logger.setLevel(logging.INFO)
logger.propagate = False
console_file = ConsoleFile()
if not logger.handlers:
    logger.addHandler(StdoutHandler())
    logger.addHandler(console_file)


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


# Metrics --------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """A destination of metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name, of a training step."""

    def close(self) -> None:
        """Writes what is left."""


class JsonLines:
    """`metrics.jsonl` in the folder of a run: a JSON object per logged step, and one per epoch.

    A resumed run drops the rows after its checkpoint, and so has each step once.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._path = folder / METRICS
        kept, lines = [], self._path.read_text().splitlines() if self._path.exists() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # a line that was cut by a kill
                if json.loads(line)['step'] <= step:
                    kept.append(line + '\n')
        if len(kept) < len(lines):
            checkpoints.write_durably(self._path, ''.join(kept).encode())

    def log(self, values: Mapping[str, float], step: int) -> None:
        with suppress(OSError), open(self._path, 'a') as file:  # rows that a full disk does not take are lost
            file.write(json.dumps({'step': step, **values}) + '\n')

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder of a run, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        module = importlib.import_module('torch.utils.tensorboard')
        self._writer = module.SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of Weights & Biases or of trackio, whose functions `init`, `log` and `finish` are the same.

    The run's name, saved in its folder, lets a resumed run continue it.
    """

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._module = importlib.import_module(package)
        file = folder / f'{package}.txt'
        if not file.exists():
            file.write_text(f'{folder.resolve().name}-{int(time.time())}')
        name = file.read_text()
        identity = {'id': name, 'dir': str(folder)} if package == 'wandb' else {}
        self._module.init(project='manifold-distillation', name=name, config=dict(config), resume='allow', **identity)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


# Values of --log-to: the package that each needs, and how it is opened with (folder, flags, first step).
SINKS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], int], Sink]]] = {
    'tensorboard': ('tensorboard', TensorBoard),
    'wandb': ('wandb', lambda *args: Tracker('wandb', *args)),
    'trackio': ('trackio', lambda *args: Tracker('trackio', *args)),
}


def parse_sinks(text: str) -> list[str]:
    """Names of sinks, from a list with commas. Raises ValueError for an unknown one or a missing package."""
    names = [name for name in text.split(',') if name]
    for name in names:
        if name not in SINKS:
            raise ValueError(f'{name} is not one of {", ".join(SINKS)}')
        found = importlib.util.find_spec(SINKS[name][0])
        if found is None or found.origin is None:  # or only a folder of that name, which the package leaves behind
            raise ValueError(f'the package {SINKS[name][0]} is not installed; pip install {SINKS[name][0]}')
    return names


class MetricLog:
    """Sends metrics to all sinks, on the first rank. A sink that fails is dropped with a warning; training goes on.

    Args:
        folder: of the run; None: no metrics are kept.
        names: of further sinks, keys of SINKS.
        config: flags of the run.
        step: training steps that are done.
    """

    def __init__(
        self,
        folder: Path | None = None,
        names: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        self._sinks: dict[str, Sink] = {}
        if folder is None or utils.get_rank() > 0:
            return
        openers = {METRICS: JsonLines, **{name: SINKS[name][1] for name in names}}
        for name, opener in openers.items():
            with self._dropping(name):
                self._sinks[name] = opener(folder, config or {}, step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name, after a training step."""
        for name, sink in list(self._sinks.items()):
            with self._dropping(name):
                sink.log(values, step)

    def close(self) -> None:
        """Writes what is left; nothing can be logged after it."""
        for name, sink in list(self._sinks.items()):
            with self._dropping(name):
                sink.close()
        self._sinks = {}

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any package
            self._sinks.pop(name, None)
            log_rank0(f'warning: {name}: metrics are no longer sent there: {" ".join(str(error).split())}')


# Progress -------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Iterates over batches: a bar on a terminal, elsewhere a line every few steps."""

    header: str  # start of each line
    print_freq: int  # steps between lines; the first and the last step always have one
    images: int  # per step, of all ranks
    metrics: Callable[[], dict[str, float]]  # returns losses by name; called only for a step that has a line
    log: Callable[[dict[str, float]], None] = lambda values: None  # takes them with images_per_second and data_share
    later_steps: int = 0  # steps of the epochs that follow, for the time left
    due: bool = field(default=False, init=False)  # whether the present step has a line

    def over(self, loader: utils.SizedIterable, first: int = 0) -> Iterator[Any]:
        """Yields the batches of the rest of an epoch, of which `first` steps are done."""
        steps, start = first + len(loader), time.monotonic()
        last, printed, waited = start, first, 0.0
        batches = stopping.iter_with_signals_blocked(loader)
        with progress_bar(f'epoch {self.header}', steps, first) as bar:
            for step in range(first, steps):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                done = step + 1
                self.due = step % self.print_freq == 0 or done == steps
                yield batch
                bar.update()
                if self.due:
                    losses = self.metrics()  # waits for the device, so the times below are right
                    now = time.monotonic()
                    rate, share = self.images * (done - printed) / (now - last), waited / (now - last)
                    left = (now - start) / (done - first) * (steps - done + self.later_steps)
                    self.log({**losses, 'images_per_second': rate, 'data_share': share})
                    text = f'{format_losses(losses)} {rate:.0f} img/s {format_time(left)} left'
                    waiting = f' data {share:.0%}'  # of the time spent waiting for data
                    bar.set_postfix_str(text + waiting, refresh=False)
                    line = f'[{self.header} {done:{len(str(steps))}}/{steps}] {text}'
                    line += waiting * (share >= 0.1 and len(line + waiting) <= WIDTH)
                    if bar.disable:
                        log_rank0(line)
                    else:
                        console_file.write(line)
                    last, printed, waited = now, done, 0.0


def progress_bar(header: str, total: int, first: int = 0) -> tqdm:
    """A bar on the terminal of the first rank; one that shows nothing elsewhere."""
    tqdm.monitor_interval = 0  # no thread: loader processes are forked
    return tqdm(
        desc=header,
        total=total,
        initial=first,
        file=sys.stdout,
        disable=utils.get_rank() > 0 or not _on_terminal(),
        leave=False,
        dynamic_ncols=True,
        bar_format='{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}',
    )


def format_losses(losses: Mapping[str, float]) -> str:
    """`loss 6.91 base 0.7 patch .312` from the keys of a log row; terms that are 0 are left out."""
    short = {name.removeprefix('loss_').removeprefix('mf_'): value for name, value in losses.items()}
    shown = [name for name, value in short.items() if value]
    if len(shown) == 2:  # the loss is its only term
        shown = ['loss']
    return ' '.join(f'{name} {short[name]:.3g}'.replace(' 0.', ' .') for name in shown)


def format_time(seconds: float) -> str:
    """`12d`, `3d04h`, `4h05m`, `5m06s`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days > 9:
        return f'{days}d'
    if days:
        return f'{days}d{hour:02}h'
    return f'{hour}h{minute:02}m' if hour else f'{minute}m{second:02}s'


def peak_memory(device: torch.device) -> int:
    """Peak memory in MiB: of the device's allocator, or of this process on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == 'darwin' else 10)
