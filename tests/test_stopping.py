"""stopping.py: signals, the consensus of the ranks, loader processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import stopping

each_signal = pytest.mark.parametrize('number', stopping.StopSignals.NUMBERS, ids=lambda number: number.name)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python runs its handlers between two instructions


@pytest.fixture
def handlers():
    """A function that returns the signal handlers. Each test must leave them as they were."""
    kinds = (*stopping.StopSignals.NUMBERS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in kinds]
    yield lambda: [signal.getsignal(number) for number in kinds]
    assert [signal.getsignal(number) for number in kinds] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@each_signal
def test_signal_stops_at_once_without_anything_to_save(handlers, number):
    with pytest.raises(stopping.StoppedError, match=f'stopped by {number.name}: nothing was trained') as stopped:  # noqa: SIM117
        with stopping.StopSignals():
            send(number)
    assert stopped.value.signum == number


@each_signal
def test_deferred_signal_is_recorded_once(handlers, number):
    with stopping.StopSignals() as signals:
        assert signals.received == 0
        signals.defer()
        send(number)
        assert signals.received == number
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        for other in stopping.StopSignals.NUMBERS:
            send(other)
        assert signals.received == number
        signals.protect_save()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert handlers()[:3] == [signal.SIG_IGN] * 3
        for other in stopping.StopSignals.NUMBERS:
            send(other)
        assert signals.received == number


def test_run_without_a_step_in_time_stops_unsaved(handlers, monkeypatch):
    def wait(signals: stopping.StopSignals) -> None:
        signals.defer()
        send(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(stopping.StopSignals, 'PATIENCE', 0.05)
    with (
        pytest.raises(stopping.StoppedError, match='no step ended within') as stopped,
        stopping.StopSignals() as s,
    ):
        wait(s)
    assert stopped.value.signum == signal.SIGTERM


def test_other_threads_leave_signals_alone(handlers):
    found = []

    def inside() -> None:
        before = handlers()
        with stopping.StopSignals() as signals:
            signals.defer()
            signals.set_alarm(60)
            signals.protect_save()
            found.append(handlers() == before)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize('due', [False, True])
def test_one_process_agrees_at_once(handlers, due):
    with stopping.StopSignals() as signals:
        signals.defer()
        consensus = stopping.RankConsensus(signals)
        assert consensus.poll(due) == (0, due)
        assert consensus.drain() == 0
        send(signal.SIGUSR1)
        assert consensus.poll(due) == (signal.SIGUSR1, due)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # nothing interrupts the save
        assert consensus.drain() == signal.SIGUSR1
        consensus.wait_for_all()


class Signalled(torch.utils.data.Dataset):
    """Numbers. The loader process that makes the third one receives a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 2:
            os.kill(os.getpid(), self.number)
        return index


forks = pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')  # Python 3.12 on


@forks
@each_signal
def test_loader_processes_survive_signals(number):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = torch.utils.data.DataLoader(Signalled(number), batch_size=None, num_workers=1)
    assert list(stopping.iter_with_signals_blocked(loader)) == list(range(6))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@forks
def test_loader_processes_die_of_unblocked_signals():
    loader = torch.utils.data.DataLoader(Signalled(signal.SIGUSR1), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match=r'killed by signal|exited unexpectedly'):
        list(loader)


@forks
def test_loader_processes_are_killed_silently():
    loader = torch.utils.data.DataLoader(range(100), num_workers=2, persistent_workers=True)
    batches = stopping.iter_with_signals_blocked(loader)
    next(batches)
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    stopping.end_loader_processes()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    time.sleep(0)


def test_dead_launcher_stops_all_ranks(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    with stopping.StopSignals() as signals:
        consensus = stopping.RankConsensus(signals)
        assert consensus.poll() == (0, False)
        monkeypatch.setattr(os, 'getppid', lambda: 1)
        assert consensus.poll() == (signal.SIGTERM, False)


def test_process_stuck_outside_python_is_ended(tmp_path):
    code = """
import ctypes, os, signal, stopping
stopping.StopSignals.PATIENCE, stopping.StopSignals.STUCK = 0.2, 0.2
with stopping.StopSignals() as signals:
    signals.defer()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # the main thread receives nothing any more
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        ctypes.CDLL(None).sleep(60)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert 'stopped by SIGTERM' in done.stderr
