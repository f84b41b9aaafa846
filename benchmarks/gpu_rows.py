"""The rows of `benchmarks.gpu`: what each one measures.

Letters: B images, N patch tokens, D channels, L layer pairs.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

import benchmarks
import cuda_graph
import flags
import losses
import main
import transforms
import utils
from benchmarks.input import STATS, link_images
from benchmarks.loss import near_tokens, relative_errors
from benchmarks.step import CLASSES, RECIPE, Side
from fused_losses import draw_tokens
from loaders import LoaderBuilder, prefetch_to_device
from models import Output, fused_talking_heads_problem

FUSED = ['--fused', *flags.FUSED]
TERMS = ('sample', 'patch', 'rand')


class NeedsGpuError(Exception):
    """The row has no toy form."""


@dataclass(frozen=True)
class Setup:
    """Where and how large the rows are."""

    device: torch.device
    toy: bool
    data: Path  # a folder with JPEGs
    workers: int  # loader processes

    @property
    def argv(self) -> list[str]:
        """Flags of the models and their precision."""
        if not self.toy:
            return '--device cuda --amp-dtype bfloat16 --teacher-dtype bfloat16'.split()
        return """--device cpu --input-size 32 --s-id 0 1 -1 --t-id 0 1 -1 --teacher-dtype bfloat16
            --model-kwargs patch_size=8 embed_dim=32 depth=3 num_heads=2
            --teacher-kwargs patch_size=8 embed_dim=64 depth=3 num_heads=4""".split()

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds, and calls in each."""
        return (1, 1) if self.toy else (7, 5)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """N, and D of both sides."""
        return (16, 32, 64) if self.toy else (196, 192, 384)

    def images(self, batch: int) -> int:
        """Of a batch that is called 64 or 256."""
        return batch // 128 + 2 if self.toy else batch


@dataclass
class Found:
    """What a row measured."""

    value: float  # compared with the figure
    unit: str = 'ms'
    spread: float = 0.0
    images: int = 0  # of a call, for the rate
    first: float = 0.0  # seconds until the first measured call: it compiles, tunes and captures
    note: str = ''


Measure = Callable[[Setup], Found]


def timed(
    setup: Setup,
    call: Callable[[], object],
    images: int,
    graph: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> Found:
    """Milliseconds of a call, launched kernel by kernel or as a CUDA graph that knows these generators."""
    start = time.monotonic()
    benchmarks.seconds(call, setup.device)
    captured: cuda_graph.CapturedCall[object] | None = cuda_graph.CapturedCall(generators) if graph else None
    if captured:
        for _ in range(cuda_graph.WARM_UP):
            captured.run(call)
        captured.capture(call)
        call = captured.replay
    took = time.monotonic() - start
    median, spread = benchmarks.medians(call, setup.device, *setup.rounds)
    if captured:
        captured.close()
    return Found(1000 * median, spread=1000 * spread, images=images, first=took)


# The step and the teacher ---------------------------------------------------------------------------------------------


def make_batch(setup: Setup, size: int, count: int) -> tuple:
    """A batch whose images are on the device already."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=setup.device)
    return images, torch.randint(0, CLASSES, (count,), device=setup.device), torch.arange(count), {}


def make_side(setup: Setup, count: int, argv: Sequence[str], stock: bool = False) -> Side:
    side = Side([*setup.argv, '--batch-size', str(count), *argv], setup.device, stock)
    if 'talking-heads' in argv and not setup.toy and (problem := fused_talking_heads_problem(setup.device)):
        side.reports.append(f'plain talking heads: {problem}')
    return side


def input_size(setup: Setup) -> int:
    return flags.parse_args([*RECIPE, *setup.argv]).model.input_size


def problems(side: Side) -> list[str]:
    """What did not run as it was asked to."""
    graph, wanted = side.trainer.graph, side.trainer.config.cuda_graph
    return side.reports + (['no graph: launched kernel by kernel'] if wanted and (not graph or graph.failed) else [])


def step(batch: int, argv: Sequence[str] = (), stock: bool = False) -> Measure:
    def measure(setup: Setup) -> Found:
        count = setup.images(batch)
        side, images = make_side(setup, count, argv, stock), make_batch(setup, input_size(setup), count)
        rounds, calls = setup.rounds
        first = benchmarks.seconds(partial(side.train, [images] * (cuda_graph.WARM_UP + 2)), setup.device)
        median, spread = benchmarks.medians(partial(side.train, [images] * calls), setup.device, rounds)
        note = '; '.join(problems(side))
        return Found(1000 * median / calls, 'ms', 1000 * spread / calls, count, first, note)

    return measure


def teacher(argv: Sequence[str] = (), graph: bool = False) -> Measure:
    def measure(setup: Setup) -> Found:
        count = setup.images(256)
        side = make_side(setup, count, argv)
        call = partial(side.teach, side.preprocess(make_batch(setup, input_size(setup), count)[0]))
        return replace(timed(setup, call, count, graph), note='; '.join(side.reports))

    return measure


def replay(setup: Setup) -> Found:
    """How many tensors differ after steps that were replayed and the same steps launched kernel by kernel."""
    count, states = setup.images(64), []
    argv = [*'--drop 0.1 --drop-path 0.1 --compile --cuda-graph'.split(), *FUSED]
    batches = [make_batch(setup, input_size(setup), count) for _ in range(cuda_graph.WARM_UP + 4)]
    start = time.monotonic()
    for warm_up in (cuda_graph.WARM_UP, 1 << 30):
        with patch.object(cuda_graph, 'WARM_UP', warm_up):
            side = make_side(setup, count, argv)
            side.train(batches)
        moments = [x for each in side.trainer.optimizer.state.values() for x in each.values()]
        state = [*side.trainer.state.model.state_dict().values(), *side.trainer.state.ema.module.state_dict().values()]
        states.append([x.clone() for x in (*state, *moments, side.trainer.state.meters.total)])
        note = '; '.join([f'{len(batches)} steps of {count} images, dropout, drop-path, mixing', *problems(side)])
    differing = sum(not torch.equal(x, y) for x, y in zip(*states, strict=True))
    return Found(differing, 'tensors', first=time.monotonic() - start, note=f'{note}; of {len(states[0])} tensors')


# The loss -------------------------------------------------------------------------------------------------------------


def token_pairs(setup: Setup, pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of 256 images: tokens of the student in float32, with gradient, and of the teacher in bfloat16."""
    (N, D_s, D_t), B, device = setup.tokens, setup.images(256), setup.device
    student = [torch.randn(B, N, D_s, device=device, requires_grad=True) for _ in range(pairs)]
    return student, [torch.randn(B, N, D_t, device=device, dtype=torch.bfloat16) for _ in range(pairs)]


def criterion(argv: Sequence[str] = (), graph: bool = False) -> Measure:
    def measure(setup: Setup) -> Found:
        config = flags.parse_args([*RECIPE, *setup.argv, *argv])
        fused = config.run.fused_parts(setup.device)
        loss = main.build_criterion(config.loss, config.augment, fused).to(setup.device)
        student, teacher = token_pairs(setup, len(config.model.student_ids))
        B, generator = setup.images(256), torch.Generator(setup.device)
        logits, taught = torch.randn(2, B, CLASSES, device=setup.device).unbind()
        logits.requires_grad_()
        targets = taught.softmax(1)

        def call() -> tuple[Tensor, ...]:
            outs = Output(logits, logits, tuple(student)), Output(taught, taught, tuple(teacher))
            return torch.autograd.grad(sum(loss(*outs, targets, generator).values()), [logits, *student])

        return timed(setup, call, B, graph, [generator])

    return measure


def full_term(fused: bool = False, graph: bool = False) -> Measure:
    def measure(setup: Setup) -> Found:
        student, teacher = token_pairs(setup, 1 if setup.toy else 8)

        def call() -> tuple[Tensor, ...]:
            values = [losses.full_loss(s, t, fused=fused) for s, t in zip(student, teacher, strict=True)]
            return torch.autograd.grad(torch.stack(values).sum(), student)

        return timed(setup, call, setup.images(256), graph)

    return measure


def relation_error(difference: float, at: int, part: str) -> Measure:
    """Relative error of fused terms, for maps that differ so much; of several terms the largest.

    Args:
        at: 0 for the value, 1 for the gradient.
        part: of --fused, 'relations' or 'full'.
    """

    def measure(setup: Setup) -> Found:
        torch.manual_seed(0)
        B, device = setup.images(64), setup.device
        student, teacher = near_tokens((B, *setup.tokens), (torch.float32, torch.bfloat16), difference, device)
        if part == 'full':
            call = partial(losses.full_loss, fused=True)
            return Found(relative_errors(call, losses.full_loss, student, teacher)[at], 'relative')
        K, seeded = 192, partial(torch.Generator(device).manual_seed, 3)
        (chosen,) = draw_tokens([B * setup.tokens[0]], K, seeded(), device)
        found = {}
        for term in TERMS:

            def joint(s: Tensor, t: Tensor, term: str = term) -> Tensor:
                return losses.relate_jointly([s], [t], TERMS, losses.RelationOptions(K, seeded()))[0][term]

            def exact(s: Tensor, t: Tensor, term: str = term) -> Tensor:
                sets = {'sample': lambda x: x.transpose(0, 1), 'rand': lambda x: x.flatten(0, 1)[chosen][None]}
                return losses.plain_map_distance(*(sets.get(term, lambda x: x)(x) for x in (s, t)))

            found[term] = relative_errors(joint, exact, student, teacher)[at]
        note = ', '.join(f'{term} {error:.1e}' for term, error in found.items())
        return Found(max(found.values()), 'relative', note=note)

    return measure


# The input ------------------------------------------------------------------------------------------------------------


def erasing(fused: bool = False, graph: bool = False) -> Measure:
    def measure(setup: Setup) -> Found:
        count, size, device = setup.images(256), input_size(setup), setup.device
        policy = RandomErasing(0.25, mode='pixel', max_count=1, device='cpu')
        transforms.seed_augmentation(0)
        places = torch.stack([transforms.draw_erasures(policy, size, size) for _ in range(count)])
        images, keys = torch.randn(count, 3, size, size, device=device), torch.arange(count)
        call = partial(transforms.erase, images, places, keys, 'pixel')
        if fused:
            erase = utils.compile_for(transforms.erase_batch, device)
            call = partial(erase, images, places.to(device), keys.to(device), 'pixel')
        return timed(setup, call, count, graph)

    return measure


class Window:
    """The batches of a loader, with the time from the batch after the first `skip` ones on."""

    def __init__(self, loader: Any, skip: int, device: torch.device) -> None:
        self.loader, self.skip, self.device, self.start = loader, skip, device, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader):
            if number == self.skip:
                self.start = self.now()
            yield batch

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def step_seconds(self, run: Callable[[Any], object]) -> float:
        run(self)
        return (self.now() - self.start) / (len(self) - self.skip)


def epoch(argv: Sequence[str], ahead: bool) -> Measure:
    """An epoch's rate as a share of the bare step's. `ahead`: batches are copied while the step before runs."""

    def measure(setup: Setup) -> Found:
        count, begin = setup.images(256), time.monotonic()
        skip, steps = (2, 2) if setup.toy else (2 * setup.workers, 64)
        side, batch = make_side(setup, count, argv), make_batch(setup, input_size(setup), count)
        with tempfile.TemporaryDirectory() as name:
            link_images(setup.data, Path(name), count * (skip + steps), 10)
            words = ['--data-set', 'IMNET', '--data-path', name, '--num_workers', str(setup.workers)]
            config = flags.parse_args([*RECIPE, *setup.argv, *words, *argv])
            builder = LoaderBuilder(config.data, config.model.input_size, 0, setup.device)
            loader: Any = builder.train(config.augment, count, False, STATS[0])
            alone = Window(loader, skip, setup.device).step_seconds(read)
            side.train([batch] * (cuda_graph.WARM_UP + 2))
            first = time.monotonic() - begin
            rounds, calls = setup.rounds
            bare = benchmarks.medians(partial(side.train, [batch] * calls), setup.device, rounds)[0] / calls
            if ahead:
                loader = prefetch_to_device(loader, setup.device, ('erase', 'key') if 'erasing' in argv else ())
            took = Window(loader, skip, setup.device).step_seconds(side.train)
        note = (
            f'step {1000 * took:.1f} ms in the epoch, {1000 * bare:.1f} bare; loader alone {count / alone:.0f} images/s'
        )
        # The loader has some batches ready when the window begins, so its own rate is a limit, too.
        return Found(bare / max(took, alone), 'share', first=first, note='; '.join([note, *problems(side)]))

    return measure


def read(batches: Any) -> None:
    for _ in batches:
        pass


def gate(setup: Setup) -> Found:
    """How many loss terms of the fast path lie further from float32 than other seeds do, see `benchmarks.gate`."""
    if setup.toy:
        raise NeedsGpuError
    fast = f'--amp-dtype bfloat16 --teacher-dtype bfloat16 --compile --cuda-graph {" ".join(FUSED)}'
    with tempfile.TemporaryDirectory() as name:
        link_images(setup.data, Path(name), 256, 16)
        common = '--device cuda --amp-dtype float32 --fused none --no-cuda-graph'
        common += f' --num_workers {max(1, setup.workers // 3)}'
        command = [sys.executable, '-m', 'benchmarks.gate', name, f'--common={common}', f'--flags={fast}']
        done = subprocess.run(
            [*command, *'--size 224 --batch-size 16 --jobs 3'.split()], capture_output=True, text=True
        )
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith('within')]
    if not rows:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    note = ', '.join(f'{name} {float(distance) / float(spread):.2f}' for name, _, _, spread, distance, *_ in rows)
    return Found(sum('NOT' in row for row in rows), 'terms', note=f'distance by spread: {note}')
