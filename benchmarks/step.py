"""The training step against its baseline: stock timm, terms by definition, an unfused optimizer, syncs at each step.

    python -m benchmarks.step                        DeiT-Tiny from CaiT-S24, 16 images of 224 pixels, float32
    python -m benchmarks.step --dtypes float32 bfloat16 --compile
    python -m benchmarks.step --device cuda --batch-size 256 --dtypes bfloat16 --compile --fused --cuda-graph

Both sides run the program's own loop, alternately, on the same images and random weights; medians. `launches` are the
aten calls of an eager step that are no views, `waits` the times the host reads a value of the device; `limit` is the
share of the rate of a large matrix product of the same precision, measured here, that the step's arithmetic reaches.
What the kernels of --fused talking-heads compute is not counted in `limit`. A row with --cuda-graph is like the row
before it, but for the graph: its `launches` are what is left outside of the graph, its arithmetic is that of the row
before.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import benchmarks
import flags
import main
import models
import utils
from cuda_graph import WARM_UP, has_graphs
from engine import TrainConfig, Trainer, train_one_epoch
from pair import build_student, register_student_hooks, register_teacher_hooks
from transforms import DevicePreprocess

RECIPE = """--data-set FAKE --teacher-path none --distillation-type soft --distillation-alpha 1
    --w-sample 0.1 --w-patch 4 --w-rand 0.2 --s-id 0 1 2 3 8 9 10 11 --t-id 0 1 2 3 20 21 22 23
    --model deit_tiny_patch16_224 --teacher-model cait_s24_224 --fused none --no-cuda-graph""".split()
CLASSES = 1000


class Calls(TorchDispatchMode):
    """Counts aten calls that are no views, and among them those that read a value of the device."""

    count = waits = 0
    IDLE = (torch.ops.aten._unsafe_view, torch.ops.aten.promote_types)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not views and func.overloadpacket not in self.IDLE
        self.waits += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


class Side:
    """One way to train: the program with these flags, or the baseline."""

    def __init__(self, argv: list[str], device: torch.device, stock: bool, seed: int = 0) -> None:
        config = flags.parse_args([*RECIPE, *argv])
        fused = config.run.fused_parts(device)
        self.reports: list[str] = []  # of models that could not be compiled as a whole
        self.device, self.stock, self.dtype = device, stock, config.run.autocast_dtype(device)
        torch.manual_seed(seed)
        student = register_student_hooks(config.model, build_student(config.model, CLASSES)).to(device)
        kwargs = config.model.teacher_kwargs
        teacher = models.build(config.model.teacher_model, CLASSES, config.model.input_size, kwargs=kwargs)
        stats = models.normalisation(student.model)
        if stock:  # images of the student's mean, deviation and size fit this teacher
            tapped = models.tap(teacher, config.model.teacher_ids, config.model.input_size)
            self.teacher = models.freeze(tapped, fast_talking_heads=False).to(device)
        else:
            heads = 'talking-heads' in fused
            self.teacher = register_teacher_hooks(config.model, teacher, stats, fused=heads).to(device)
        scale_gradients = self.dtype == torch.float16
        state = main.build_state(config.optim, seed, student.model, config.optim.scaled_lr(1), scale_gradients)
        if stock:
            groups = [{'params': g['params'], 'weight_decay': g['weight_decay']} for g in state.optimizer.param_groups]
            state.optimizer = torch.optim.AdamW(groups, state.optimizer.param_groups[0]['lr'], foreach=False)
            state.ema.foreach = False
        for tapped in (student, self.teacher) if config.run.compile else ():
            if config.run.compile == 'models':
                models.compile_model(tapped, self.reports.append)
            else:
                models.compile_blocks(tapped)
        self.preprocess = DevicePreprocess(*stats, fused_erasing='erasing' in fused).to(device)
        criterion = main.build_criterion(config.loss, config.augment, fused)
        mixup = main.build_mixup(config.augment, CLASSES)
        settings = TrainConfig(device, self.dtype, seed, print_freq=1 << 30, cuda_graph=bool(config.run.cuda_graph))
        self.trainer = Trainer(student, self.teacher, criterion, state, settings, self.preprocess, mixup)
        self.trainer.guard.every_step = False
        self.times: list[float] = []
        self.teacher_times: list[float] = []

    def train(self, batches: utils.SizedIterable) -> None:
        """A step for each batch."""
        state = self.trainer.state
        state.step, state.meters = 0, utils.Meters()
        with ExitStack() as stack, open('/dev/null', 'w') as nowhere:
            stack.enter_context(patch('sys.stdout', nowhere))
            if self.stock:
                stack.enter_context(benchmarks.by_definition())
                # The release read each term and waited for the device at each step.
                train_one_epoch(self.trainer, batches, 0, after_step=partial(self._read, state.meters))
            else:
                train_one_epoch(self.trainer, batches, 0)

    @staticmethod
    def _read(meters: utils.Meters) -> None:
        for value in meters.total:
            value.item()

    def teach(self, images: torch.Tensor) -> None:
        """The teacher's forward pass alone."""
        with torch.no_grad(), self.trainer.autocast():
            self.teacher(images)


def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product, the best of four."""
    n = 8192 if device.type == 'cuda' else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(benchmarks.seconds(lambda: x @ x, device) for _ in range(4))


def waits_on_cuda(call: Callable[[], None]) -> int:
    """Warnings of torch about calls that wait for the device."""
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            call()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(warning.message) for warning in told)


def sides(args: argparse.Namespace, device: torch.device) -> dict[str, Side]:
    """All that take part, by name; the baselines first."""
    common = ['--batch-size', str(args.batch_size), '--device', args.device, '--input-size', str(args.input_size)]
    found = {}
    for dtype in args.dtypes:
        argv = [*common, '--amp-dtype', dtype]
        rows = {f'baseline {dtype}': argv, dtype: argv}
        if dtype == 'bfloat16':
            argv = [*argv, '--teacher-dtype', 'bfloat16', '--relation-dtype', 'bfloat16']
            rows['bfloat16 throughout'] = argv
        if args.compile:
            rows[f'{dtype} whole'] = [*argv, '--compile', 'models']
            argv = [*argv, '--compile']
            rows[f'{dtype} compiled'] = argv
        if args.fused:  # like the row before, but for these parts
            argv = [*argv, '--fused', *args.fused]
            rows[f'{dtype} compiled fused' if args.compile else f'{dtype} fused'] = argv
        if args.cuda_graph:
            rows[f'{dtype} graph'] = [*argv, '--cuda-graph']
        found |= {name: Side(words, device, stock=name.startswith('baseline')) for name, words in rows.items()}
    return found


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=flags.POSITIVE_INT, default=16, help='images')
    parser.add_argument('--input-size', type=flags.POSITIVE_INT, default=224, help='pixels')
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=('float32', 'bfloat16'), help='of autocast')
    parser.add_argument('--compile', action='store_true', help='rows with --compile and --compile models')
    parser.add_argument('--fused', nargs='*', choices=flags.FUSED, metavar='PART',
                        help=f'on a GPU: a row with --fused and these of {", ".join(flags.FUSED)}; without a value '
                        'talking-heads')  # fmt: skip
    parser.add_argument('--cuda-graph', action='store_true', help='on a GPU: the last row again, as one CUDA graph')
    parser.add_argument('--rounds', type=flags.POSITIVE_INT, default=7, help='steps of each side')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='without a GPU the CPU')
    args = parser.parse_args()
    device = utils.init_distributed(args.device, 'env://')
    if args.fused is not None and (problem := models.fused_talking_heads_problem(device)):
        parser.error(f'--fused: {problem}')
    args.fused = ['talking-heads'] if args.fused == [] else args.fused
    if args.cuda_graph and not has_graphs(device):
        parser.error('--cuda-graph: needs an NVIDIA GPU')
    benchmarks.keep_freed_memory()
    images = torch.randint(0, 256, (args.batch_size, 3, args.input_size, args.input_size), dtype=torch.uint8)
    batch = (images, torch.randint(0, CLASSES, (args.batch_size,)), torch.arange(args.batch_size), {})
    try:
        taking = sides(args, device)
    except utils.UsageError as error:
        parser.error(str(error))
    for name, side in taking.items():
        steps = WARM_UP + 1 if side.trainer.graph else 1  # captures
        first = benchmarks.seconds(partial(side.train, [batch] * steps), device)
        print(f'{name}: first step {first:.1f} s', *side.reports, flush=True)
    rates: dict[torch.dtype, list[float]] = {side.dtype: [] for side in taking.values()}
    for _ in range(args.rounds):
        for side in taking.values():
            side.times.append(benchmarks.seconds(partial(side.train, [batch]), device))
        for dtype, found in rates.items():  # by turns too: a processor's clock wanders
            found.append(rate(dtype, device))
        seen = side.preprocess(images.to(device))
        for side in taking.values():
            side.teacher_times.append(benchmarks.seconds(partial(side.teach, seen), device))
    report(taking, batch, device, {dtype: statistics.median(found) for dtype, found in rates.items()})


def report(taking: dict[str, Side], batch: tuple, device: torch.device, rates: dict[torch.dtype, float]) -> None:
    """A row for each side; `rates` in operations a second."""
    base = taking[next(iter(taking))]
    print(f'{"":24}{"ms":>9}{"±":>7}{"img/s":>8}{"ratio":>7}{"same":>7}{"teacher":>9}{"ratio":>7}{"launches":>10}{"waits":>7}'
          f'{"MiB":>8}{"limit":>7}')  # fmt: skip
    for name, side in taking.items():
        same = taking[f'baseline {str(side.dtype).removeprefix("torch.")}']
        time, teacher = statistics.median(side.times), statistics.median(side.teacher_times)
        spread = (max(side.times) - min(side.times)) / 2
        with Calls() as calls, torch.compiler.set_stance('force_eager'):
            side.train([batch] * 3)
        with Calls() as fewer, torch.compiler.set_stance('force_eager'):
            side.train([batch])
        launches, waits = (calls.count - fewer.count) // 2, (calls.waits - fewer.waits) / 2
        if device.type == 'cuda':
            waits = (waits_on_cuda(partial(side.train, [batch] * 3)) - waits_on_cuda(partial(side.train, [batch]))) / 2
        if not side.trainer.graph:  # a replay cannot be counted; it is the row before
            with FlopCounterMode(display=False) as flops, torch.compiler.set_stance('force_eager'):
                side.train([batch])
        side.trainer.optimizer.zero_grad()
        peak = benchmarks.peak_bytes(partial(side.train, [batch]), device) >> 20
        limit = flops.get_total_flops() / time / rates[side.dtype]
        ratios = [statistics.median(other.times) / time for other in (base, same)]
        ratios.append(statistics.median(same.teacher_times) / teacher)
        print(f'{name:24}{1000 * time:9.0f}{1000 * spread:7.0f}{len(batch[0]) / time:8.1f}{ratios[0]:7.2f}'
              f'{ratios[1]:7.2f}{1000 * teacher:9.0f}{ratios[2]:7.2f}{launches:10}{waits:7.0f}{peak:8}'
              f'{limit:7.0%}')  # fmt: skip
    print('ratio: to the first row; same: to the baseline of the same precision')
    print(benchmarks.machine(device))


if __name__ == '__main__':
    sys.exit(run())
