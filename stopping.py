"""Signals that stop a run, and how all ranks stop at the same step."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
import torch.distributed as dist

import utils


class StoppedError(BaseException):
    """A signal asked the run to stop; no error, so nothing that survives errors takes it for one."""

    def __init__(self, signum: int, where: str = 'nothing was trained') -> None:
        super().__init__(f'stopped by {signal.Signals(signum).name}: {where}')
        self.signum = signum


class StopSignals:
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

    def __enter__(self) -> 'StopSignals':
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
    for number in StopSignals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


class RankConsensus:
    """Lets all ranks stop, and save, at the same step, at the cost of one tiny collective between hosts.

    Beside a GPU it is read one poll later, so that nobody waits for it: the host waits neither for its device nor, as a
    rule, for other hosts. On the CPU, where steps are long, it is read at once. All ranks must poll equally often.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._lags = utils.get_world_size() > 1 and dist.get_backend() != 'gloo'
        self._group = dist.new_group(backend='gloo') if self._lags else None
        self._work: dist.Work | None = None
        self._told = torch.zeros(2, dtype=torch.int32)

    def poll(self, due: bool = False) -> tuple[int, bool]:
        """Tells the others of a signal and that a save is due; returns the signal, or 0, and whether a save is due.

        Beside a GPU among several ranks that is what was told at the poll before.
        """
        self._signals.heartbeat()
        signum = self._signals.received
        if utils.get_world_size() > 1:
            signum, agreed = self._read() if self._lags else (0, False)
            # What was just agreed on is not asked for again.
            self._told = torch.tensor([self._signals.received, int(due and not agreed)], dtype=torch.int32)
            self._work = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self._group, async_op=True)
            utils.hold_tensor(self._told)
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
        if utils.get_world_size() > 1:
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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)
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
