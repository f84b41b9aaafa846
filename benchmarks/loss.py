"""What the relation terms cost: time and memory of one layer pair, forward and backward, term by term.

    python -m benchmarks.loss                     64 images, 196 tokens, widths 192 and 384, float32
    python -m benchmarks.loss --device cuda --dtype bfloat16
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.loss      the same over the ranks too

All terms take turns, so that what disturbs one disturbs all; medians. `definition` is the same with autograd's gradient
of the plain definition, and `ratio` how much longer that takes. Memory is the peak above what the tokens take.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import benchmarks
import flags
import loggers
import losses
import utils


def terms(
    K: int, generator: torch.Generator, over_ranks: bool, dtype: torch.dtype
) -> dict[str, list[Callable[[Tensor, Tensor], Tensor]]]:
    """What is measured, by name: functions of two token tensors, called one after the other."""

    def of_random(**options) -> Callable:
        return partial(losses.random_loss, K=K, generator=generator, dtype=dtype, **options)

    patch, sample = partial(losses.patch_loss, dtype=dtype), partial(losses.sample_loss, dtype=dtype)
    rows = {'patch': [patch], 'sample': [sample], 'random': [of_random()]}
    rows['the three'] = [term for (term,) in rows.values()]
    rows['full'] = [losses.full_loss]
    if over_ranks:
        rows |= {f'{name} of all ranks': [partial(term, over_ranks=True)]
                 for name, term in (('sample', losses.sample_loss), ('full', losses.full_loss))}  # fmt: skip
        rows['random of all ranks'] = [of_random(over_ranks=True)]
    return rows


def run_once(term: list[Callable], student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    sum(function(student, teacher) for function in term).backward()


def by_definition(term: list[Callable], student: Tensor, teacher: Tensor) -> None:
    with benchmarks.by_definition():
        run_once(term, student, teacher)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=flags.POSITIVE_INT, default=64, help='images per rank')
    parser.add_argument('--tokens', type=flags.POSITIVE_INT, default=196, help='per image')
    parser.add_argument('--widths', type=flags.POSITIVE_INT, nargs=2, default=[192, 384], help='of student and teacher')
    parser.add_argument('--K', type=flags.POSITIVE_INT, default=192, help='random tokens')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of the tokens')
    parser.add_argument('--rounds', type=flags.POSITIVE_INT, default=11, help='calls of each term')
    parser.add_argument('--by-definition', action='store_true', help='the full term with its maps, too')
    parser.add_argument('--relation-dtype', default='float32', choices=losses.RELATION_DTYPES, help='of the products')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='without a GPU the CPU')
    args = parser.parse_args()
    device = utils.init_distributed(args.device, 'env://')
    torch.manual_seed(utils.get_rank())
    student, teacher = (
        torch.randn(args.batch_size, args.tokens, width, device=device, dtype=getattr(torch, args.dtype))
        for width in args.widths
    )
    student.requires_grad_()
    dtype = getattr(torch, args.relation_dtype)
    rows = terms(args.K, torch.Generator(device).manual_seed(0), utils.get_world_size() > 1, dtype)
    calls = {(name, run_once): partial(run_once, term, student, teacher) for name, term in rows.items()}
    for name in ('patch', 'sample', 'random', 'the three'):
        calls[name, by_definition] = partial(by_definition, rows[name], student, teacher)
    if args.by_definition:
        calls['full', by_definition] = partial(run_once, [losses.plain_full_loss], student, teacher)
    times = {key: [] for key in calls}
    benchmarks.keep_freed_memory()
    for _ in range(args.rounds + 1):
        for key, call in calls.items():
            times[key].append(benchmarks.seconds(call, device))
    medians = {key: statistics.median(found[1:]) for key, found in times.items()}
    loggers.log_rank0(
        f'{"a layer pair":24}{"ms":>9}{"of the three":>14}{"MiB":>7}{"definition":>13}{"MiB":>7}{"ratio":>7}'
    )
    for name in rows:
        line, own = '', medians[name, run_once]
        for run in (run_once, by_definition):
            if (name, run) in calls:
                student.grad = None
                line += f'{1000 * medians[name, run]:{9 if run is run_once else 13}.1f}'
                line += f'{own / medians["the three", run_once]:14.2f}' if run is run_once else ''
                line += f'{benchmarks.peak_bytes(calls[name, run], device) / 2**20:7.0f}'
        ratio = f'{medians[name, by_definition] / own:7.2f}' if (name, by_definition) in calls else ''
        loggers.log_rank0(f'{name:24}{line}{ratio}')
    loggers.log_rank0(benchmarks.machine(device))
    utils.destroy_distributed()


if __name__ == '__main__':
    sys.exit(run())
