"""What fault tolerance costs: the part of a run's time that is spent on saves and on the checks of each step.

    python -m benchmarks.safety                        DeiT-Tiny from CaiT-S24, batch 16, on the CPU, one process
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.safety --batch-size 8

Runs the real program on generated images with random weights. Adds up the time of what it does for fault tolerance
alone: polls between the ranks, checks for values that are not finite (with the gradient's norm), saves. The figures are
those of the first rank, which writes the checkpoints.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import timm
import torch

import datasets
import engine
import main
import run_dir
import stopping
import utils
from flags import POSITIVE_INT, get_args_parser

FLAGS = """--data-set FAKE --model deit_tiny_patch16_224 --teacher-model cait_s24_224 --distillation-type soft
    --distillation-alpha 1 --w-sample 0.1 --w-patch 4 --w-rand 0.2 --s-id 0 1 2 3 8 9 10 11
    --t-id 0 1 2 3 20 21 22 23 --drop-path 0 --epochs 1 --num_workers 0 --device cpu --no-repeated-aug""".split()


class Clock:
    """Measures the time inside functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)
        self._inside = False

    def watch(self, name: str, owner: object, attribute: str) -> None:
        original = getattr(owner, attribute)

        def timed(*args, **kwargs):
            if self._inside:  # a nested call belongs to the outer one
                return original(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False
                self.spent[name].append(time.perf_counter() - start)

        setattr(owner, attribute, timed)


def measure(steps: int, batch_size: int, amp_dtype: str, folder: Path) -> tuple[Clock, list[float]]:
    """Trains so many steps; returns the times of fault tolerance and those of the steps, in seconds."""
    clock, marks = Clock(), []
    clock.watch('checks', stopping.RankConsensus, 'poll')
    for name in vars(engine.NonFiniteGuard):
        if not name.startswith('_'):
            clock.watch('checks', engine.NonFiniteGuard, name)
    clock.watch('checks', torch.nn.utils, 'get_total_norm')
    clock.watch('saves', run_dir.CheckpointManager, 'save')
    seed_step = utils.seed_step

    def mark(*args) -> None:
        marks.append(time.perf_counter())
        seed_step(*args)

    utils.seed_step = mark
    datasets.FAKE_TRAIN = steps * batch_size * int(os.environ.get('WORLD_SIZE', 1))
    datasets.FAKE_VAL = 16
    argv = [*FLAGS, '--batch-size', str(batch_size), '--amp-dtype', amp_dtype, '--output_dir', str(folder / 'run')]
    main.main([*argv, '--teacher-path', str(folder / 'teacher.pth')])
    return clock, [after - before for before, after in pairwise(marks)]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=POSITIVE_INT, default=20, help='number of steps, at least two')
    parser.add_argument('--batch-size', type=POSITIVE_INT, default=16, help='images per rank and step')
    parser.add_argument('--amp-dtype', default='float32', choices=('float32', 'bfloat16'), help='of the models')
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f'--steps {args.steps}: at least two are needed')
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        teacher = timm.create_model('cait_s24_224', num_classes=datasets.FAKE_CLASSES)
        torch.save(teacher.state_dict(), Path(folder) / 'teacher.pth')
        clock, times = measure(args.steps, args.batch_size, args.amp_dtype, Path(folder))
    step = statistics.median(times)
    checks = sum(clock.spent['checks']) / args.steps
    save = statistics.median(clock.spent['saves'])
    interval = 60 * get_args_parser().get_default('save_interval_minutes')
    if utils.get_rank():
        return
    print(f'step   {step * 1000:8.1f} ms (median of {len(times)}), batch {args.batch_size}, {args.amp_dtype}')
    print(f'checks {checks * 1000:8.2f} ms a step, {100 * checks / step:.3f} % of it')
    print(f'save   {save * 1000:8.1f} ms, {100 * save / interval:.3f} % of {interval:.0f} s')
    print(f'total  {100 * checks / step + 100 * save / interval:.3f} %')
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads')


if __name__ == '__main__':
    sys.exit(run())
