"""What every part of a run needs: process groups, stopping together, meters, counters for random numbers."""

import io
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# Distributed set-up ---------------------------------------------------------------------------------------------------


# The last tensors reduced. torch 2.6 joins gloo's threads while it holds the interpreter's lock; a thread that then
# lets go of a tensor nobody else holds waits for that lock, and both wait for ever. Held here, none is the last holder.
_reduced: deque[torch.Tensor] = deque(maxlen=8)


class UsageError(Exception):
    """The user asked for what cannot be done; says so in one line that names the flag and the value."""


@contextmanager
def usage_error_context(flag: str, value: object, *kinds: type[Exception]) -> Iterator[None]:
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
        store, rank, world_size = next(rendezvous(dist_url, *ranks[:2]))
        dist.init_process_group(
            'nccl' if cuda else 'gloo',
            # After a restart by torchrun some versions of torch meet at the old store, where dead ranks' addresses are.
            store=dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
            device_id=chosen if cuda else None,
        )
    return chosen


def destroy_distributed() -> None:
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


def log_rank0(text: str) -> None:
    """Prints a line, on the first rank only. A full disk below it, or a reader that has gone, loses the line alone."""
    if get_rank() == 0:
        with suppress(OSError):
            print(text, flush=True)


def unbuffer_stdio() -> None:
    """Prints go through no buffer: what cannot be written is lost, instead of failing anew wherever one is flushed."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is not None:
            raw = io.FileIO(stream.fileno(), 'wb', closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The values (n,) added up over all ranks, in place, on the same device."""
    if dist.is_initialized():
        dist.all_reduce(values)
        _reduced.append(values)
    return values


def gather_over_ranks(values: Tensor) -> list[Tensor]:
    """The values (n,) of every rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [values]
    gathered = [torch.empty_like(values) for _ in range(get_world_size())]
    dist.all_gather(gathered, values)
    _reduced.extend(gathered)
    return gathered


def gather_objects(value: object) -> list:
    """A plain value of every rank, in the order of the ranks. Waits for the device."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def main_process_first(call: Callable[[], object]) -> object:
    """What `call` returns, on the first rank before the others: it may leave an index on the disk for these."""
    if get_rank() > 0:
        gather_objects(None)
    try:
        return call()
    finally:
        if get_rank() == 0:
            gather_objects(None)


# Stopping together ----------------------------------------------------------------------------------------------------


class StoppedError(BaseException):
    """A signal asked the run to stop; no error, so nothing that survives errors takes it for one."""

    def __init__(self, signum: int, where: str = 'nothing was trained') -> None:
        super().__init__(f'stopped by {signal.Signals(signum).name}: {where}')
        self.signum = signum


class Signals:
    """Notes SIGTERM, SIGINT, SIGUSR1 or SIGHUP instead of dying of it, inside `with` and in the main thread only.

    As long as there is nothing to save, the signal stops the run at once. After `defer` the run goes on to the next
    point at which all ranks can stop together. If it does not get there within PATIENCE seconds, and not within three
    times what it has needed from one such point to the next, it stops all the same; a thread ends the process if it is
    stuck where no Python runs. Further signals change nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    PATIENCE = 20.0  # schedulers kill 30 s after they asked
    STUCK = 3.0  # seconds more for a stop in an orderly way

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._seen, self._longest = 0.0, 0.0  # the last such point; the longest way between two
        self._asked, self._leaving = 0.0, False
        # Ranks outlive a launcher that is killed; nobody would ever end them.
        self._launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> 'Signals':
        if threading.current_thread() is threading.main_thread():
            # What `nohup` has made deaf to SIGHUP stays so.
            deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            numbers = [number for number in self.NUMBERS if not (deaf and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._lose_patience)
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def restore(self) -> None:
        """Signals do what they did before `with`."""
        self._leaving = True
        self.set_alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _) -> None:
        if self.received:
            return  # launchers and schedulers often send it twice
        self.received = number
        if not self._deferred:
            raise StoppedError(number)
        self._asked = time.monotonic()
        self.set_alarm(self.PATIENCE)
        threading.Thread(target=self._end_if_stuck, daemon=True).start()

    def _left(self) -> float:
        """Seconds of patience."""
        until = max(self._asked + self.PATIENCE, self._seen + 3 * self._longest)
        return until - time.monotonic()

    def _lose_patience(self, *_) -> None:
        if self._left() > 0:
            return self.set_alarm(self._left())
        raise self._too_late()

    def _too_late(self) -> StoppedError:
        where = f'within {self.PATIENCE:.0f} s there was no step after which to save; the last saved state counts'
        return StoppedError(self.received, where)

    def _end_if_stuck(self) -> None:
        while not self._leaving:
            left = self._left() + self.STUCK
            if left <= 0:
                os.write(2, f'main.py: error: {self._too_late()}\n'.encode())
                os._exit(128 + self.received)
            time.sleep(min(left, 1.0))

    def set_alarm(self, seconds: float) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def heartbeat(self) -> None:
        """The run is at a point where it could stop."""
        if self._launcher and os.getppid() != self._launcher:
            self.received = self.received or signal.SIGTERM
        now = time.monotonic()
        if self._seen:
            self._longest = max(self._longest, now - self._seen)
        self._seen = now

    def defer(self) -> None:
        """From now on there is something to save, or somebody to tell."""
        self._deferred = True

    def agreed(self) -> None:
        """All ranks know and save now; nothing may disturb that any more."""
        self._leaving = True
        self.set_alarm(0)
        if self._before:
            ignore_signals()


def ignore_signals() -> None:
    """From now on nothing but SIGKILL ends this process from outside."""
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


class RankConsensus:
    """Lets all ranks stop, and save, at the same step, at the cost of one tiny collective between hosts.

    Beside a GPU it is read one poll later, so that nobody waits for it: the host waits neither for its device nor, as a
    rule, for other hosts. On the CPU, where steps are long, it is read at once. All ranks must poll equally often.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._lags = get_world_size() > 1 and dist.get_backend() != 'gloo'
        self._group = dist.new_group(backend='gloo') if self._lags else None
        self._work: dist.Work | None = None
        self._told = torch.zeros(2, dtype=torch.int32)

    def poll(self, due: bool = False) -> tuple[int, bool]:
        """Tells the others of a signal and that a save is due; returns the signal, or 0, and whether a save is due.

        Beside a GPU among several ranks that is what was told at the poll before.
        """
        self._signals.heartbeat()
        signum = self._signals.received
        if get_world_size() > 1:
            signum, agreed = self._read() if self._lags else (0, False)
            # What was just agreed on is not asked for again.
            self._told = torch.tensor([self._signals.received, int(due and not agreed)], dtype=torch.int32)
            self._work = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self._group, async_op=True)
            _reduced.append(self._told)
            signum, due = (signum, agreed) if self._lags else self._read()
        if signum:
            self._signals.agreed()
        return signum, due

    def _read(self) -> tuple[int, bool]:
        if self._work is None:
            return 0, False
        self._work.wait()
        signum, due = self._told.tolist()
        return signum, bool(due)

    def drain(self) -> int:
        """Waits until all ranks are here; returns the signal any of them has received, or 0."""
        return self.poll()[0] or self.poll()[0]

    def wait_for_all(self) -> None:
        """Waits until all ranks are here, or have gone."""
        if get_world_size() > 1:
            with suppress(RuntimeError):
                dist.all_reduce(torch.zeros(1), group=self._group)


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone."""
    text = str(error)
    return dist.is_initialized() and (
        'gloo' in text or isinstance(error, dist.DistBackendError) or 'Connection' in text
    )


def iter_with_signals_blocked(loader: Iterable) -> Iterator:
    """An iterator whose loader processes never see the signals the run is to be stopped by."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.NUMBERS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_loader_processes() -> None:
    """Kills them; they have nothing to lose, and would keep a run that has failed from ending."""
    with suppress(RuntimeError):  # torch's watchman of the loaders, in the midst of which we are
        _silence_loader_watchman()
    children = multiprocessing.active_children()
    for process in children:
        process.kill()
    for process in children:
        process.join()


def _silence_loader_watchman() -> None:
    """One dead loader process is reported by an exception wherever the program is; from now on by none."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# Meters and progress --------------------------------------------------------------------------------------------------


class Meters:
    """Running means over images of named scalars; the host reads them only when a line is printed or an epoch ends.

    A row that is not finite counts for nothing: it is the business of `engine.Watch`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None  # float64: sums over images of each name, and their number
        self._printed: np.ndarray | None = None

    def update(self, values: dict[str, Tensor], images: int) -> None:
        """Adds one step's means over so many images, whatever their names; no host sync."""
        row = torch.stack([value.detach().float() for value in values.values()])
        # Weighed by images: a run may go on with larger batches on fewer ranks.
        row = torch.cat([row.sum()[None], row, row.new_ones(1)]).double() * images
        row = torch.where(torch.isfinite(row).all(), row, torch.zeros_like(row))
        self._take_names(['loss', *(f'loss_{name}' for name in values)])
        self.total = row if self.total is None else self.total + row

    def _take_names(self, names: list[str]) -> None:
        """Goes on with these names; an epoch may have been begun by a version that knew fewer terms."""
        if self.total is not None and names != self.names:
            *sums, count = self.total.tolist()
            known = dict(zip(self.names, sums, strict=True))
            self.total = self.total.new_tensor([*(known.get(name, 0.0) for name in names), count])
            self._printed = np.array(self.total.tolist())
        self.names = names

    def line(self) -> str:
        """Means since the last line, and since the start of the epoch in brackets. Waits for the device."""
        total = np.array(self.total.tolist())
        recent = total if self._printed is None else total - self._printed
        self._printed = total
        pairs = zip(self.names, recent[:-1] / max(recent[-1], 1), total[:-1] / max(total[-1], 1), strict=True)
        return '  '.join(f'{name}: {now:.4f} ({mean:.4f})' for name, now, mean in pairs)

    def means(self) -> dict[str, float]:
        """Means over all images of all ranks. Waits for the device."""
        *total, count = sum_over_ranks(self.total.clone()).tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, total, strict=True)}

    def state_dict(self) -> dict:
        """Plain numbers; those of every rank for itself, or sums would be added in another order after a resume."""
        if self.total is None:
            return {}
        return {'names': self.names, 'totals': [row.tolist() for row in gather_over_ranks(self.total)]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes over this rank's numbers; with another number of ranks than they are of, the first takes all."""
        if not state:
            return
        totals = torch.tensor(state['totals'], dtype=torch.float64, device=device)
        if totals.shape[1:] != (len(state['names']) + 1,):
            raise ValueError('its meters have not as many values as names')
        if len(totals) != get_world_size():
            totals = torch.cat([totals.sum(0, keepdim=True), totals.new_zeros(get_world_size() - 1, totals.shape[1])])
        self.names, self.total = list(state['names']), totals[get_rank()]
        self._printed = np.array(self.total.tolist())


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
        batches = iter_with_signals_blocked(loader)
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


# Random numbers by counter --------------------------------------------------------------------------------------------


def counter_seed(*counter: int | str) -> int:
    """A 63-bit seed that is a function of its counter alone, e.g. (seed, 'augment', epoch, position).

    Words keep the streams apart; numbers are non-negative.
    """
    numbers = [zlib.crc32(c.encode()) if isinstance(c, str) else c for c in counter]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(generator: torch.Generator, seed: int, step: int, rank: int, shared_draw: bool = False) -> None:
    """Starts a training step's random numbers: mixup and drop-path (global generators), random tokens (`generator`).

    With `shared_draw` all ranks draw the same random tokens.
    """
    number = counter_seed(seed, 'step', step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    generator.manual_seed(counter_seed(seed, 'tokens', step, 0 if shared_draw else rank))
