"""Checks a training run before it starts: the pair, its cost, a few real steps, the teacher's accuracy.

    python -m tools.check FLAGS                     the flags of the run, as for main.py
    python -m tools.check FLAGS --images 0          without the teacher's accuracy
    python -m tools.check FLAGS --device cpu        where there is no GPU

It builds the same parts as main.py, and prints the same lines and warnings. Then it prints what the pair is and what it
costs, makes a few training steps on batches of the data, and measures the teacher's accuracy on a part of the
validation images. It writes nothing to --output_dir. It runs in one process.

Exit status: 0 if the run can start; 2 after one line on stderr, which is that of main.py, if it cannot.
"""

import argparse
import logging
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import loggers
import main as program
import models
import run_dir
import summary
import utils
from cuda_graph import WARM_UP
from engine import Evaluator, Trainer
from flag_types import NON_NEGATIVE_INT, POSITIVE_INT
from flags import Config, Parser
from loaders import first_batch, report_bad_images
from loggers import WIDTH, format_losses, log_rank0, peak_memory
from losses import RELATION_TERMS
from models import TappedModel, TeacherPreprocess, format_grid
from models.hooks import ChannelStats
from pair import Pair, num_classes_of
from stopping import RankConsensus, StopSignals, iter_with_signals_blocked
from tools.common import one_line_errors
from utils import UsageError, format_values

PROGRAM = 'tools.check'
INDENT = 12  # characters of a label

# Maps of a relation term for one pair of blocks, and tokens per map: of B images with N patch tokens, K random tokens.
MAPS = {
    'sample': lambda B, N, K: (N, B),
    'patch': lambda B, N, K: (B, N),
    'rand': lambda B, N, K: (1, min(K, B * N)),
    'full': lambda B, N, K: (1, B * N),
}


def log(label: str, text: str) -> None:
    log_rank0(f'{label:<{INDENT}}{text}')


class WrappedLines(logging.Formatter):
    """Breaks lines at the width of the screen."""

    def format(self, record: logging.LogRecord) -> str:
        return textwrap.fill(super().format(record), WIDTH, subsequent_indent=' ' * INDENT, break_on_hyphens=False)


def _is_no_progress(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith('[')


@contextmanager
def one_screen() -> Iterator[None]:
    """Wraps the lines of the program, too, and leaves out those about the progress of the evaluation."""
    handlers = loggers.logger.handlers
    before = [handler.formatter for handler in handlers]
    loggers.logger.addFilter(_is_no_progress)
    for handler in handlers:
        handler.setFormatter(WrappedLines())
    try:
        yield
    finally:
        loggers.logger.removeFilter(_is_no_progress)
        for handler, formatter in zip(handlers, before, strict=True):
            handler.setFormatter(formatter)


# The pair -------------------------------------------------------------------------------------------------------------


def log_models(pair: Pair, num_classes: int) -> None:
    """Classes, normalisation and prefix tokens of both models."""
    teacher = pair.teacher
    classes = f'{num_classes} of the data, {num_classes_of(pair.student.model)} of the student'
    log('classes', classes + (f', {num_classes_of(teacher.model)} of the teacher' if teacher is not None else ''))
    log('normalise', f'student {_describe_stats(pair.stats)}')
    if teacher is None:
        return log('teacher', 'none: --distillation-type none')
    prepare = teacher.prepare
    assert isinstance(prepare, TeacherPreprocess)
    changes = [] if prepare.same else ['converted']
    changes += [f'resized to {prepare.size} pixels'] if prepare.size else []
    images = f'the images are {" and ".join(changes)} on the device' if changes else 'the images are not converted'
    log('', f'teacher {_describe_stats(prepare.teacher_stats)}: {images}')
    if teacher.blocks:
        sides = (('student', pair.student), ('teacher', teacher))
        counts = [f'{format_values(sorted({b.prefix for b in tapped.blocks}))} of the {name}' for name, tapped in sides]
        log('prefix', f'tokens before the patch tokens, which are not compared: {", ".join(counts)}')


def _describe_stats(stats: ChannelStats) -> str:
    mean, std = (' '.join(f'{value:.4g}' for value in values) for values in stats)
    return f'mean {mean}, std {std}'


def log_pairs(student: TappedModel, teacher: TappedModel) -> None:
    """Grids and widths of the layer pairs, those that are alike in one line."""
    alike: dict[str, list[str]] = {}
    for i, (block, other) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        text = (
            f'student {format_grid(block.grid)} of width {block.width}, '
            f'teacher {format_grid(other.grid)} of width {other.width}, '
            f'compared on {format_grid(student.grids[i])}'
        )
        alike.setdefault(text, []).append(f'{student.block_ids[i]}–{teacher.block_ids[i]}')
    for number, (text, blocks) in enumerate(alike.items()):
        log('' if number else 'pairs', f'{" ".join(blocks)}: {text}')


def log_maps(config: Config, student: TappedModel) -> None:
    """Tokens and bytes of the relation maps of one forward pass, for each term that has a weight or a default one."""
    loss, B, pairs = config.loss, config.optim.batch_size, summary.counted(len(student.grids), 'pair')
    log('maps', f'bytes of one model over {pairs} at {B} images, if all were kept; the program keeps none of them')
    for name, term in RELATION_TERMS.items():
        weight = loss.weights[name]
        if name not in MAPS or not (weight or term.default_weight):
            continue
        shapes = [MAPS[name](B, h * w, loss.K) for h, w in student.grids]
        size = 2 if loss.relation_dtype == 'bfloat16' and 'relation_dtype' in term.reads else 4
        total = sum(maps * tokens**2 for maps, tokens in shapes) * size
        kinds = dict.fromkeys(
            f'{summary.counted(maps, "map")} of {tokens:,}×{tokens:,} tokens' for maps, tokens in shapes
        )
        log('', f'{weight:g}·{term.label}: {" or ".join(kinds)} in a pair; {total:,} bytes')


# The cost -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def count_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of a forward pass in eval mode: products of matrices and convolutions."""
    mode = model.training
    # FlopCounterMode has no formula for the attention kernel of CPUs; this backend is made of products that it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    model.train(mode)
    return counter.get_total_flops() // 2


def log_cost(config: Config, pair: Pair, device: torch.device) -> None:
    """Parameters and multiply-accumulates of both models."""
    size = config.model.input_size
    images = torch.zeros(1, 3, size, size, device=device)
    sides = [('student', pair.student)] + ([('teacher', pair.teacher)] if pair.teacher is not None else [])
    log('cost', 'MACs: multiply-accumulates of a forward pass of one image')
    for name, tapped in sides:
        parameters = sum(p.numel() for p in tapped.model.parameters())
        log('', f'{name} {parameters:,} parameters, {count_macs(tapped, images):,} MACs')
    if pair.teacher is not None and models.uses_fused_talking_heads(pair.teacher.model) and device.type == 'cuda':
        log('', "without the teacher's attention: Triton kernels are not counted")


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The batches of one epoch after the other."""
    for epoch in count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from iter_with_signals_blocked(loader)


def warm_up_steps(trainer: Trainer) -> int:
    """Steps that are not measured: the first one, or with a CUDA graph all until it is captured."""
    return WARM_UP + 1 if trainer.graph else 1


def time_steps(trainer: Trainer, loader: DataLoader, steps: int) -> list[float]:
    """Seconds of each training step with its data, after the steps that do not count.

    Raises:
        FloatingPointError: a term, logits or gradients are not finite.
    """
    device, seconds = trainer.config.device, list[float]()
    trainer.student.train(trainer.config.train_mode)
    batches = batches_of(loader)
    for number in range(warm_up_steps(trainer) + steps):
        start = time.monotonic()
        trainer.train_step(next(batches), f'step {number} of epoch {number // len(loader)}')
        trainer.guard.sync()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - start)
    return seconds[-steps:]


def log_time(config: Config, trainer: Trainer, loader: DataLoader, steps: int) -> None:
    """Measures training steps, and what follows for an epoch and the run."""
    device, workers = trainer.config.device, config.data.workers
    start = time.monotonic()
    first_batch(loader, 1)  # images that the steps below do not read from the memory of the system
    loading = time.monotonic() - start
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds = time_steps(trainer, loader, steps)
    except torch.OutOfMemoryError as error:
        advice = 'try a smaller --batch-size with --accum-steps, or --grad-checkpointing'
        size = config.optim.batch_size
        raise UsageError(f'--batch-size {size}: does not fit the memory of {device}; {advice}') from error
    first = warm_up_steps(trainer)
    before = f'the first {first}' if first > 1 else 'a first one'
    mean, images = sum(seconds) / len(seconds), config.optim.rank_batch_size
    where = 'the GPU' if device.type == 'cuda' else 'this process'
    log('losses', f'{format_losses(trainer.state.meters.recent())}, mean of these steps')
    log(
        'step',
        f'{mean:.3g} s ({min(seconds):.3g} to {max(seconds):.3g}, {summary.counted(steps, "step")} after {before}), '
        f'{images / mean:.3g} images/s, peak memory of {where} {peak_memory(device):,} MiB',
    )
    # The loader processes are ahead of the first steps, so the steps do not show whether they are fast enough.
    supply = loading / workers if workers else 0.0
    how = f'{supply:.3g} s with --num_workers {workers}' if workers else 'within the step, without loader processes'
    log('data', f'{loading:.3g} s to load a batch in one process, {how}')
    slower = 'data' if supply > mean else 'steps'
    epoch, epochs = max(mean, supply) * len(loader), config.optim.epochs
    one = f'{epoch / 3600:.3g} h for an epoch of {summary.counted(len(loader), "step")}'
    log('time', f'{one}, {epochs * epoch / 3600:.3g} h for {summary.counted(epochs, "epoch")}, without evaluation;')
    graph = ' with a CUDA graph' if trainer.graph and not trainer.graph.failed else ''
    log('', f'in one process{graph}, limited by the {slower}')


# Accuracy -------------------------------------------------------------------------------------------------------------


def part_of(loader: DataLoader, images: int) -> DataLoader:
    """So many images of a loader's data set, evenly spaced, and so spread over its classes."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    chosen = [i * total // images for i in range(images)] if images < total else list(range(total))
    return DataLoader(loader.dataset, loader.batch_size, sampler=chosen, num_workers=loader.num_workers)


def log_accuracy(pair: Pair, evaluator: Evaluator, num_classes: int, images: int, consensus: RankConsensus) -> None:
    """Evaluates the teacher, as --eval-teacher does, on a part of the validation images."""
    if pair.teacher is None or not images:
        return
    if (classes := num_classes_of(pair.teacher.model)) != num_classes:
        return log('accuracy', f'not measured: the teacher has {classes} classes, the data {num_classes}')
    few = part_of(evaluator.loader, images)
    total = len(few.dataset)  # type: ignore[arg-type]
    log('accuracy', f'of the teacher on {len(few.sampler):,} of {total:,} validation images, evenly spaced')  # type: ignore[arg-type]
    program.evaluate_teacher(pair, replace(evaluator, loader=few), consensus)


# The whole ------------------------------------------------------------------------------------------------------------


def check(steps: int, images: int, config: Config, device: torch.device, signals: StopSignals) -> None:
    """What main.run does up to the first steps, without writing."""
    with one_line_errors(PROGRAM):
        if config.run.eval:
            raise UsageError('--eval: this tool checks a run that trains; call main.py to evaluate')
        if utils.get_world_size() > 1:
            raise UsageError(
                f'{utils.get_world_size()} ranks: this tool runs in one process; start it without torchrun'
            )
    flags = config.run
    summary.log_environment(flags, device)
    checkpoint, own = run_dir.read_resume(flags.resume, flags.output_dir, flags.eval)
    config, pair, loaders, evaluator = program.build_parts(config, checkpoint, device)
    run_dir.prepare_folder(flags.output_dir, flags.resume, flags.start_epoch, checkpoint, own, dry_run=True)
    num_classes = num_classes_of(pair.student.model)
    log_models(pair, num_classes)
    if config.distills and pair.teacher is not None and pair.student.blocks:
        log_pairs(pair.student, pair.teacher)
        log_maps(config, pair.student)
    log_cost(config, pair, device)
    trainer, loader = program.build_trainer(config, pair, loaders, evaluator, checkpoint, own is not None)
    try:
        log_time(config, trainer, loader, steps)
    finally:
        if trainer.graph:
            trainer.graph.close()
    log_accuracy(pair, evaluator, num_classes, images, RankConsensus(signals))
    report_bad_images(device, loader, evaluator.loader)


def main(argv: list[str] | None = None) -> None:
    """Checks the run of a command line.

    Raises:
        SystemExit: after one line on stderr; 2 if main.py would fail, 128 + n for signal n; 0 after --help.
    """
    parser = Parser(PROGRAM, usage='python -m tools.check [flags of main.py] [--steps N] [--images N]')
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    add = parser.add_argument
    add('--steps', type=POSITIVE_INT, default=3, help='training steps to measure, after those that warm up (3)')
    add('--images', type=NON_NEGATIVE_INT, default=256, help="images for the teacher's accuracy; 0: none (256)")
    with one_line_errors(PROGRAM):
        own, flags = parser.parse_known_args(argv)
    try:
        with one_screen():
            program.main(flags, partial(check, own.steps, own.images))
    except SystemExit as stopped:
        # Images that cannot be read and values that are not finite end main.py with status 1.
        raise SystemExit(2 if stopped.code == 1 else stopped.code) from None


if __name__ == '__main__':
    loggers.unbuffer_stdio()
    main()
