"""Relation maps of a teacher and of a student before and after training, as a figure.

    python -m tools.relations OUT --images a.png b.png                   writes relations.png
    python -m tools.relations OUT --images a.png --pairs 0 -1 --out relations.pdf
    python -m tools.relations OUT --images a.png --teacher-path TEACHER  the teacher's file has moved

RUN is the folder of a run, of which the newest checkpoint is read, or a checkpoint. The models, their weights and the
pairs of blocks are those of the run's flags. A run without a teacher or without --s-id needs these flags; --s-id and
--t-id are auto then.

A row of the figure is a pair of blocks of one image. A map has the cosine similarities of all patch tokens of the
image, row by row of the grid. `Before` is the student as the run began: its random weights are drawn again from the
run's --seed, or read from --finetune or --before.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from checkpoints import flags_of
from flags import PARTS, Config, LossConfig, ModelConfig, Parser
from losses import relation_map
from pair import Pair, build_pair
from readers import BadImageError, load_image
from tools.common import (
    FinishedRun,
    add_model_flags,
    check_figure_path,
    one_line_errors,
    read_named_weights,
    read_run,
    save_figure,
    typed_flags,
)
from transforms import DevicePreprocess, build_eval_transform
from utils import UsageError, usage_error_context
from weights_files import read_weights

PROGRAM = 'tools.relations'
FLAGS = ('model', 'model_kwargs', 'teacher_model', 'teacher_kwargs', 'teacher_path', 'teacher_pretrained',
         'teacher_input_size', 'input_size', 's_id', 't_id', 'token_align', 'max_patches', 'finetune')  # fmt: skip
SHOWN = 3  # pairs of blocks without --pairs


@dataclass(frozen=True)
class Row:
    """The maps (N, N) of one pair of blocks for one image."""

    image: int  # its place in --images
    blocks: tuple[int, int]  # of student and teacher
    teacher: Tensor
    before: Tensor
    after: Tensor

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.teacher, self.before, self.after

    @property
    def differences(self) -> tuple[Tensor, Tensor]:
        """|teacher − student| before and after, (N, N) each."""
        return (self.teacher - self.before).abs(), (self.teacher - self.after).abs()

    @property
    def distances(self) -> tuple[float, float]:
        """Mean squared differences before and after: the patch term of this pair and image, without its weight."""
        before, after = self.differences
        return before.square().mean().item(), after.square().mean().item()


# Measuring ------------------------------------------------------------------------------------------------------------


def build_models(run: FinishedRun) -> Pair:
    """The teacher, and the student as it was before the run, both with hooks on the blocks of the pairs.

    Raises:
        UsageError: there is no teacher, or a model, its weights or its blocks cannot be used.
    """
    config = run.config
    if not config.has_teacher_weights:
        raise UsageError("--teacher-path '': the run had no teacher; pass --teacher-path FILE and --teacher-model NAME")
    if not config.s_id:
        config = replace(config, s_id=['auto'], t_id=['auto'])
    # With α = 0 the teacher needs no head and stops after its last tapped block.
    parts = {name: part() for name, part in PARTS.items()}
    parts |= {'model': config, 'loss': LossConfig(distillation_type='soft', distillation_alpha=0.0)}
    whole, files = read_weights(Config(**parts, typed=run.typed), {})
    if not (config.pretrained or config.finetune):  # with a checkpoint, neither would be loaded
        files = replace(files, resume={'student': run.checkpoint.get('student')})
    torch.manual_seed(flags_of(run.checkpoint).get('seed', 0))  # as in main.py
    return build_pair(whole, files, run.num_classes)


def load_student(pair: Pair, flag: str, source: str, weights: dict[str, Tensor]) -> None:
    with usage_error_context(flag, source):
        state, _ = models.adapt(pair.student.model, weights, replace_heads=False)
        models.load_weights(pair.student.model, state)


@torch.no_grad()
def compute_maps(tapped: models.TappedModel, images: Tensor) -> list[Tensor]:
    """The relation maps of the tapped blocks for images (B, 3, H, W): L × (B, N, N)."""
    return [relation_map(tokens) for tokens in tapped.eval()(images).tokens]


def measure(run: FinishedRun, images: Tensor, pairs: Sequence[int] | None, before: str, ema: bool) -> list[Row]:
    """The rows of the figure, image by image.

    Args:
        run: whose student is shown.
        images: (B, 3, H, W) uint8.
        pairs: which of the pairs of --s-id and --t-id; None for the first, the middle and the last one.
        before: source of the weights before training; '' for those with which the run began.
        ema: True shows the moving average of the student.

    Raises:
        UsageError: a model cannot be built, weights do not fit, or there is no such pair.
    """
    if before:
        run = replace(run, config=replace(run.config, finetune=''))
    pair = build_models(run)
    assert pair.teacher is not None
    chosen = choose_pairs(pairs, len(pair.student.block_ids))
    inputs = DevicePreprocess(*pair.stats)(images)
    teacher = compute_maps(pair.teacher, inputs)
    if before:
        load_student(pair, '--before', before, read_named_weights('--before', before))
    was = compute_maps(pair.student, inputs)
    load_student(pair, '--ema' if ema else 'RUN', run.source, run.weights(ema))
    now = compute_maps(pair.student, inputs)
    ids = list(zip(pair.student.block_ids, pair.teacher.block_ids, strict=True))
    return [Row(b, ids[i], teacher[i][b], was[i][b], now[i][b]) for b in range(len(images)) for i in chosen]


def choose_pairs(pairs: Sequence[int] | None, count: int) -> list[int]:
    """Indices of the pairs that are shown. Raises UsageError if one of them does not exist."""
    if pairs is None:
        return list(range(count)) if count <= SHOWN else [0, count // 2, count - 1]
    for i in pairs:
        if not -count <= i < count:
            raise UsageError(f'--pairs {i}: the run has {count} pairs of blocks, counted from 0')
    return [i % count for i in pairs]


def read_images(paths: Sequence[str], config: ModelConfig) -> Tensor:
    """Images as in evaluation, (B, 3, H, W) uint8. Raises UsageError if one cannot be read."""
    found, prepare = [], build_eval_transform(config.input_size)
    for path in paths:
        try:
            image = prepare(load_image(path))
        except BadImageError as error:  # names the file
            raise UsageError(f'--images {error}') from error
        found.append(image)
    return torch.stack(found)


def table(rows: list[Row], names: Sequence[str]) -> str:
    """The mean squared differences as text, with their means in the last line."""
    lines = [f'{"image":24}{"student":>9}{"teacher":>9}{"before":>10}{"after":>10}']
    for row in rows:
        before, after = row.distances
        lines.append(f'{names[row.image][-23:]:24}{row.blocks[0]:9}{row.blocks[1]:9}{before:10.5f}{after:10.5f}')
    means = [sum(row.distances[i] for row in rows) / len(rows) for i in (0, 1)]
    return '\n'.join([*lines, f'{"mean":42}{means[0]:10.5f}{means[1]:10.5f}'])


# Drawing --------------------------------------------------------------------------------------------------------------

TITLES = ('image', 'teacher', 'student before', 'student after', '|teacher − student|\nbefore',
          '|teacher − student|\nafter')  # fmt: skip


def draw(rows: list[Row], images: Tensor) -> Any:
    """The figure: a row of panels for each row, with one colour scale for all maps and one for all differences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 1.72 * len(rows) + 1.0), layout='constrained')
    panels = figure.subplots(len(rows), len(TITLES), squeeze=False)
    lowest = min(float(part.min()) for row in rows for part in row.maps)
    # A few large differences would make all others look like 0.
    largest = float(np.quantile(np.concatenate([part.ravel() for row in rows for part in row.differences]), 0.99))
    maps = {'cmap': 'viridis', 'vmin': lowest, 'vmax': 1, 'interpolation': 'nearest'}
    differences = {'cmap': 'magma_r', 'vmin': 0, 'vmax': largest or 1, 'interpolation': 'nearest'}
    for i, (row, line) in enumerate(zip(rows, panels, strict=True)):
        if i == 0 or row.image != rows[i - 1].image:
            line[0].imshow(images[row.image].permute(1, 2, 0).numpy())
            frame(line[0])
        else:
            line[0].axis('off')
        for panel, part in zip(line[1:4], row.maps, strict=True):
            similar = panel.imshow(part.numpy(), **maps)
            frame(panel)
        for panel, part, distance in zip(line[4:], row.differences, row.distances, strict=True):
            different = panel.imshow(part.numpy(), **differences)
            frame(panel)
            panel.set_xlabel(f'mean square {distance:.2g}', fontsize=8)
        line[1].set_ylabel(f'student block {row.blocks[0]}\nteacher block {row.blocks[1]}', fontsize=8)
    for panel, title in zip(panels[0], TITLES, strict=True):
        panel.set_title(title, fontsize=9)
    for drawn, columns, text in ((similar, slice(1, 4), 'cosine similarity'), (different, slice(4, 6), 'difference')):
        bar = figure.colorbar(drawn, ax=panels[:, columns], location='bottom', fraction=0.06, aspect=30, pad=0.02,
                              extend='max' if drawn is different else 'neither')  # fmt: skip
        bar.ax.tick_params(labelsize=8)
        bar.set_label(text, fontsize=8)
    return figure


def frame(panel: Any) -> None:
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set_linewidth(0.5)


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(PROGRAM, description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument('run', metavar='RUN', help='folder of a run, or a checkpoint: a file, URL, hf-hub:OWNER/NAME')
    parser.add_argument('--images', nargs='+', required=True, metavar='FILE', help='images to show')
    parser.add_argument('--pairs', nargs='+', type=int, metavar='I', help='which pairs of --s-id and --t-id to show, '
                        'counted from 0 (default: the first, the middle and the last)')  # fmt: skip
    parser.add_argument('--before', default='', metavar='CHECKPOINT', help='weights of the student before training')
    parser.add_argument('--ema', action='store_true', help='show the EMA weights')
    parser.add_argument('--out', default='relations.png', help='file to write: .png, .svg or .pdf (relations.png)')
    add_model_flags(parser, FLAGS)
    with one_line_errors(PROGRAM):
        args = parser.parse_args(argv)
        check_figure_path(args.out, PROGRAM)
        run = read_run(args.run, typed_flags(args, FLAGS))
        images = read_images(args.images, run.config)
        rows = measure(run, images, args.pairs, args.before, args.ema)
        save_figure(draw(rows, images), args.out, dpi=300)
    print(f'\n{table(rows, [Path(path).name for path in args.images])}\n{args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
