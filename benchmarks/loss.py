"""What the relation terms cost: time and memory of one layer pair, forward and backward, term by term.

    python -m benchmarks.loss                     64 images, 196 tokens, widths 192 and 384, float32
    python -m benchmarks.loss --device cuda --dtype bfloat16
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.loss      the same over the ranks too

All terms take turns, so that what disturbs one disturbs all; medians. Memory is the peak above what the tokens take, on
the CPU of the process (Linux with glibc only).
"""

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import losses
import utils


def terms(K: int, generator: torch.Generator, over_ranks: bool) -> dict[str, list[Callable[[Tensor, Tensor], Tensor]]]:
    """What is measured, by name: functions of two token tensors, called one after the other."""

    def of_random(**options) -> Callable:
        return partial(losses.random_loss, K=K, generator=generator, **options)

    rows = {'patch': [losses.patch_loss], 'sample': [losses.sample_loss], 'random': [of_random()]}
    rows['the three'] = [term for (term,) in rows.values()]
    rows['full'] = [losses.full_loss]
    if over_ranks:
        rows |= {f'{name} of all ranks': [partial(term, over_ranks=True)]
                 for name, term in (('sample', losses.sample_loss), ('full', losses.full_loss))}  # fmt: skip
        rows['random of all ranks'] = [of_random(over_ranks=True)]
    return rows


def run_once(term: list[Callable], student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    for function in term:
        function(student, teacher).backward()


def seconds(term: list[Callable], student: Tensor, teacher: Tensor) -> float:
    """Of one call."""
    wait = torch.cuda.synchronize if student.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    run_once(term, student, teacher)
    wait()
    return time.perf_counter() - start


def peak_bytes(term: list[Callable], student: Tensor, teacher: Tensor) -> int:
    """Of one call, above what was taken before it, with the gradient it leaves."""
    student.grad = None
    if student.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(term, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    libc.malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets the high-water mark
    before = _resident('VmRSS')
    run_once(term, student, teacher)
    return _resident('VmHWM') - before


def _resident(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=64, help='images per rank')
    parser.add_argument('--tokens', type=int, default=196, help='per image')
    parser.add_argument('--widths', type=int, nargs=2, default=[192, 384], help='of student and teacher')
    parser.add_argument('--K', type=int, default=192, help='random tokens')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of the tokens')
    parser.add_argument('--rounds', type=int, default=11, help='calls of each term')
    parser.add_argument('--by-definition', action='store_true', help='the full term with its maps, too')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    args = parser.parse_args()
    device = utils.init_distributed(args.device, 'env://')
    torch.manual_seed(utils.get_rank())
    student, teacher = (
        torch.randn(args.batch_size, args.tokens, width, device=device, dtype=getattr(torch, args.dtype))
        for width in args.widths
    )
    student.requires_grad_()
    rows = terms(args.K, torch.Generator(device).manual_seed(0), utils.get_world_size() > 1)
    if args.by_definition:
        rows['full by definition'] = [losses.plain_full_loss]
    times = {name: [] for name in rows}
    for _ in range(args.rounds + 1):
        for name, term in rows.items():
            times[name].append(seconds(term, student, teacher))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    utils.say(f'{"a layer pair":24}{"ms":>9}{"of the three":>14}{"peak MiB":>10}')
    for name, term in rows.items():
        peak = peak_bytes(term, student, teacher) / 2**20
        utils.say(f'{name:24}{1000 * medians[name]:9.1f}{medians[name] / medians["the three"]:14.2f}{peak:10.0f}')
    processor = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor()
    utils.say(f'{processor or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads')
    utils.leave_distributed()


if __name__ == '__main__':
    sys.exit(run())
