"""Signals that stop a run, and how all ranks stop at the same step."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

import utils

T = TypeVar('T')


class StoppedError(BaseException):
    """A signal asked the run to stop. Not an Exception, so that no handler of errors catches it."""

    def __init__(self, signum: int, where: str = 'nothing was trained') -> None:
        super().__init__(f'stopped by {signal.Signals(signum).name}: {where}')
        self.signum = signum


class StopSignals:
    """Records SIGTERM, SIGINT, SIGUSR1 and SIGHUP inside `with`, so that the run can be saved before it stops.

    As long as there is nothing to save, a signal stops the run at once. After `defer` the run continues to the next
    point where all ranks can stop together (`heartbeat`). If it does not get there within PATIENCE seconds, nor within
    three times the longest interval between two such points so far, it stops without saving. A thread ends the process
    if it hangs where no Python code runs. Further signals change nothing. Works in the main thread only.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    PATIENCE = 20.0  # seconds; schedulers kill a job about 30 s after the signal
    STUCK = 3.0  # further seconds for an orderly stop

    def __init__(self) -> None:
        self.received = 0  # the first signal, 0 for none
        self._deferred, self._stopping = False, False
        self._received_at, self._last_heartbeat, self._longest_interval = 0.0, 0.0, 0.0
        # The ranks survive if their launcher is killed, and nothing would ever end them.
        self._launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else 0
        self._handlers: dict[int, Any] = {}  # those from before

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            # `nohup` ignores SIGHUP, and that is kept.
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            numbers = [number for number in self.NUMBERS if not (nohup and number == signal.SIGHUP)]
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
            self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._time_out)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Restores the signal handlers from before `with`."""
        self._stopping = True
        self.set_alarm(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, _: object) -> None:
        if self.received:
            return  # launchers and schedulers often send a signal twice
        self.received = number
        if not self._deferred:
            raise StoppedError(number)
        self._received_at = time.monotonic()
        self.set_alarm(self.PATIENCE)
        threading.Thread(target=self._exit_if_stuck, daemon=True).start()

    def _seconds_left(self) -> float:
        until = max(self._received_at + self.PATIENCE, self._last_heartbeat + 3 * self._longest_interval)
        return until - time.monotonic()

    def _time_out(self, *_: object) -> None:
        if (left := self._seconds_left()) <= 0:
            raise self._timeout_error()
        self.set_alarm(left)

    def _timeout_error(self) -> StoppedError:
        return StoppedError(self.received, f'no step ended within {self.PATIENCE:.0f} s; the last checkpoint remains')

    def _exit_if_stuck(self) -> None:
        while not self._stopping:
            left = self._seconds_left() + self.STUCK
            if left <= 0:
                os.write(2, f'main.py: error: {self._timeout_error()}\n'.encode())
                os._exit(128 + self.received)
            time.sleep(min(left, 1.0))

    def set_alarm(self, seconds: float) -> None:
        """Lets `_time_out` be called after so many seconds; 0: not at all."""
        if self._handlers:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def heartbeat(self) -> None:
        """Called where the run could stop."""
        if self._launcher and os.getppid() != self._launcher:
            self.received = self.received or signal.SIGTERM
        now = time.monotonic()
        if self._last_heartbeat:
            self._longest_interval = max(self._longest_interval, now - self._last_heartbeat)
        self._last_heartbeat = now

    def defer(self) -> None:
        """From now on there is something to save, or there are other ranks to inform."""
        self._deferred = True

    def protect_save(self) -> None:
        """All ranks know of the signal and save now. No further signal may interrupt that."""
        self._stopping = True
        self.set_alarm(0)
        if self._handlers:
            ignore_signals()


def ignore_signals() -> None:
    """From now on only SIGKILL can end this process from outside."""
    for number in StopSignals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


class RankConsensus:
    """Lets all ranks stop and save at the same step, at the cost of one tiny collective between hosts.

    With nccl its result is read one poll later, so that the host waits neither for its device nor, usually, for other
    hosts. With gloo, where steps are long, it is read at once. All ranks must poll equally often.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        # Whether the result is read one poll later.
        self.lagged = utils.get_world_size() > 1 and dist.get_backend() != 'gloo'
        self._group = cast(dist.ProcessGroup, dist.new_group(backend='gloo')) if self.lagged else None
        self._work: dist.Work | None = None
        self._result = torch.zeros(2, dtype=torch.int32)

    def poll(self, due: bool = False) -> tuple[int, bool]:
        """Returns the signal that any rank has received, or 0, and whether a save is due on any rank."""
        self._signals.heartbeat()
        agreed = self._signals.received, due
        if utils.get_world_size() > 1:
            previous = self._read() if self.lagged else (0, False)
            # A save that was agreed on just now is not requested again.
            request = [self._signals.received, int(due and not previous[1])]
            self._result = torch.tensor(request, dtype=torch.int32)
            self._work = dist.all_reduce(self._result, dist.ReduceOp.MAX, group=self._group, async_op=True)
            agreed = previous if self.lagged else self._read()
        if agreed[0]:
            self._signals.protect_save()
        return agreed

    def _read(self) -> tuple[int, bool]:
        if self._work is not None:
            self._work.wait()
        signum, due = self._result.tolist()
        return signum, bool(due)

    def raise_if_stopped(self) -> None:
        """Raises StoppedError on all ranks if one has received a signal; for work that has nothing to save."""
        signum, _ = self.poll()
        if signum:
            raise StoppedError(signum)

    def drain(self) -> int:
        """Waits until all ranks are here; returns the signal that any of them has received, or 0."""
        return self.poll()[0] or self.poll()[0]

    def wait_for_all(self) -> None:
        """Waits until all ranks are here, or until one of them is gone."""
        if utils.get_world_size() > 1:
            with suppress(RuntimeError):
                dist.all_reduce(torch.zeros(1), group=self._group)


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has exited."""
    failed = isinstance(error, dist.DistBackendError) or 'gloo' in str(error) or 'Connection' in str(error)
    return dist.is_initialized() and failed


def iter_with_signals_blocked(loader: Iterable[T]) -> Iterator[T]:
    """Returns an iterator with loader processes that do not receive the signals for stopping the run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_loader_processes() -> None:
    """Kills the loader processes. They have nothing to save, and would keep a failed run from exiting."""
    with suppress(RuntimeError):  # torch's handler of SIGCHLD reports a dead loader process by an exception anywhere
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for process in children:
        process.kill()
    for process in children:
        process.join()
