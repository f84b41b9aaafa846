"""Side-by-side measurements; each module is a command of its own, `python -m benchmarks.<name>`."""

import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torchvision

import losses
from losses import plain_map_distance


@contextmanager
def by_definition() -> Iterator[None]:
    """Relation terms as the definition has them, with autograd's gradient."""

    def plain(student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return plain_map_distance(student, teacher)

    with patch.object(losses, '_map_distance', plain):
        yield


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Of one call, above what was taken before it; on the CPU of the process (Linux with glibc only)."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL('libc.so.6')
    libc.malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets the high-water mark
    before = _resident('VmRSS')
    call()
    return _resident('VmHWM') - before


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps what is freed: times then are not those of new pages; otherwise peaks are really peaks."""
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(-3, 1 << 30 if keep else 1 << 16)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, (1 << 31) - 1 if keep else 1 << 17)  # M_TRIM_THRESHOLD


def _resident(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def machine(device: torch.device) -> str:
    """What was measured on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), name)
    capability = '' if device.type == 'cuda' else f' ({torch.backends.cpu.get_cpu_capability()})'
    return (
        f'{name}{capability}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
        f'torchvision {torchvision.__version__}, timm {timm.__version__}'
    )
