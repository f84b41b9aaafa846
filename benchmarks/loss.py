"""Time and memory of each relation term for one layer pair, forward and backward.

    python -m benchmarks.loss                     64 images, 196 tokens, widths 192 and 384, float32
    python -m benchmarks.loss --device cuda --dtype bfloat16 --fused
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.loss      also over the ranks

The terms take turns, so a disturbance affects all of them. Times are medians. `definition` is the plain definition with
autograd's gradient, `ratio` its time divided by ours. Memory is the peak without the tokens, `calls` the aten calls of
eager code that are no views. --fused adds the terms of `--fused relations full`, which are compiled on a GPU.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import benchmarks
import flags
import loggers
import losses
import utils
from benchmarks.step import Calls

Term = Callable[[Tensor, Tensor], Tensor]


def terms(K: int, generator: torch.Generator, over_ranks: bool, dtype: torch.dtype) -> dict[str, list[Term]]:
    """The rows of the table: functions of two token tensors, measured together."""
    patch, sample = partial(losses.patch_loss, dtype=dtype), partial(losses.sample_loss, dtype=dtype)
    random = partial(losses.random_loss, K=K, generator=generator, dtype=dtype)
    rows: dict[str, list[Term]] = {'patch': [patch], 'sample': [sample], 'random': [random]}
    rows |= {'the three': [patch, sample, random], 'full': [losses.full_loss]}
    if over_ranks:
        for name, term in (('sample', sample), ('full', losses.full_loss), ('random', random)):
            rows[f'{name} of all ranks'] = [partial(term, over_ranks=True)]
    return rows


def fused_terms(K: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, list[Term]]:
    """The rows of --fused."""
    options = losses.RelationOptions(K, generator, dtype=dtype, fused=losses.FUSED_PARTS)

    def joint(student: Tensor, teacher: Tensor) -> Tensor:
        (found,) = losses.relate_jointly([student], [teacher], ('sample', 'patch', 'rand'), options)
        return torch.stack(list(found.values())).sum()

    return {'the three, fused': [joint], 'full, fused': [partial(losses.full_loss, fused=True)]}


def run_once(term: list[Term], student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    torch.autograd.backward([function(student, teacher) for function in term])


def count_calls(call: Callable[[], None]) -> int:
    with patch.object(losses, '_fused', lambda function, device: function), Calls() as calls:
        call()
    return calls.count


def by_definition(term: list[Term], student: Tensor, teacher: Tensor) -> None:
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
    parser.add_argument('--by-definition', action='store_true', help='also the full term with its maps')
    parser.add_argument('--fused', action='store_true', help='also rows of --fused relations full')
    parser.add_argument('--relation-dtype', default='float32', choices=losses.RELATION_DTYPES, help='of the factors')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='cuda uses the CPU if there is no GPU')
    args = parser.parse_args()
    device = utils.init_distributed(args.device, 'env://')
    torch.manual_seed(utils.get_rank())
    student, teacher = (
        torch.randn(args.batch_size, args.tokens, width, device=device, dtype=getattr(torch, args.dtype))
        for width in args.widths
    )
    student.requires_grad_()
    dtype = getattr(torch, args.relation_dtype)
    generator = torch.Generator(device).manual_seed(0)
    rows = terms(args.K, generator, utils.get_world_size() > 1, dtype)
    rows |= fused_terms(args.K, generator, dtype) if args.fused else {}
    calls = {(name, run_once): partial(run_once, term, student, teacher) for name, term in rows.items()}
    for name in ('patch', 'sample', 'random', 'the three'):
        calls[name, by_definition] = partial(by_definition, rows[name], student, teacher)
    if args.by_definition:
        calls['full', by_definition] = partial(run_once, [losses.plain_full_loss], student, teacher)
    times: dict[tuple[str, Callable], list[float]] = {key: [] for key in calls}
    benchmarks.keep_freed_memory()
    for _ in range(args.rounds + 1):
        for key, call in calls.items():
            times[key].append(benchmarks.seconds(call, device))
    medians = {key: statistics.median(found[1:]) for key, found in times.items()}
    loggers.log_rank0(
        f'{"a layer pair":24}{"ms":>9}{"of the three":>14}{"MiB":>7}{"calls":>7}'
        f'{"definition":>13}{"MiB":>7}{"ratio":>7}'
    )
    for name in rows:
        line, own = '', medians[name, run_once]
        for way in (run_once, by_definition):
            if (name, way) in calls:
                student.grad = None
                line += f'{1000 * medians[name, way]:{9 if way is run_once else 13}.1f}'
                line += f'{own / medians["the three", run_once]:14.2f}' if way is run_once else ''
                line += f'{benchmarks.peak_bytes(calls[name, way], device) / 2**20:7.0f}'
                line += f'{count_calls(calls[name, way]):7}' if way is run_once else ''
        ratio = f'{medians[name, by_definition] / own:7.2f}' if (name, by_definition) in calls else ''
        loggers.log_rank0(f'{name:24}{line}{ratio}')
    loggers.log_rank0(benchmarks.machine(device))
    utils.destroy_distributed()


if __name__ == '__main__':
    run()
