"""Side-by-side measurements; each module is a command of its own, `python -m benchmarks.<name>`."""

import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # silences torch's profiler; read when torch is imported

import timm
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

import losses
from losses import plain_map_distance


@contextmanager
def by_definition() -> Iterator[None]:
    """The terms patch, sample and random use the plain definition, with autograd's gradient."""

    def plain(student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return plain_map_distance(student, teacher)

    with patch.object(losses, 'map_distance', plain):
        yield


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of a call, until the device has finished."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def medians(call: Callable[[], object], device: torch.device, rounds: int, calls: int = 1) -> tuple[float, float]:
    """Median of a call's seconds, and half of their range, over rounds of so many calls without a wait between them."""

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    times = [seconds(several, device) / calls for _ in range(rounds)]
    return statistics.median(times), (max(times) - min(times)) / 2


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the tensors that a call creates. On the CPU, earlier tensors that it frees are not subtracted."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())['traceEvents']
    return max(accumulate(event['args']['Bytes'] for event in events if event['name'] == '[memory]'), default=0)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, so that times do not include page faults. No effect with other allocators."""
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def machine(device: torch.device) -> str:
    """Processor, threads and library versions, for the last line of a table."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), name)
    capability = '' if device.type == 'cuda' else f' ({torch.backends.cpu.get_cpu_capability()})'
    return (
        f'{name}{capability}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
        f'torchvision {torchvision.__version__}, timm {timm.__version__}'
    )
