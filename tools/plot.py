"""Learning curves of one or several runs in one figure: accuracy, learning rate and loss terms by epoch.

    python -m tools.plot OUT                                   writes curves.svg
    python -m tools.plot OUT1 OUT2 --teacher 83.5 --out a.png  two runs, and the teacher's accuracy as a line

A RUN is the folder of a run or a log file, also the log.txt of the 2022 release. The labels are the names of the
folders. Throughput has a panel if a log has it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
from flags import Parser
from tools.common import COLOURS, check_figure_path, one_line_errors, save_figure
from tools.run_files import read_run_files
from utils import UsageError, usage_error_context

PROGRAM = 'tools.plot'
MARKERS = ('', 'o', 's', '^', 'v', 'D')  # for more runs than colours
TERM_STYLES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1, 1, 1)))
TERM_COLOURS = ('#332288', '#cc6677', '#117733', '#882255', '#999933', '#44aa99')  # Tol's muted ones: unlike the runs'
PREFIX = 'train_loss_'
TERM_NAMES = {'base': 'CE', 'dist': 'KD', 'mf_sample': 'sample', 'mf_patch': 'patch', 'mf_rand': 'random',
              'mf_full': 'full'}  # fmt: skip
THROUGHPUT = ('per_s', 'throughput')  # parts of the names of its key


@dataclass(frozen=True)
class Curves:
    """The log of a run. Values that a row does not have are NaN."""

    label: str
    rows: list[dict[str, Any]]

    @property
    def epochs(self) -> list[int]:
        """Finished epochs at each row, from 1."""
        return [row['epoch'] + 1 for row in self.rows]

    def values(self, key: str) -> list[float]:
        found = (row.get(key) for row in self.rows)
        return [float(value) if isinstance(value, int | float) else math.nan for value in found]

    def has(self, key: str) -> bool:
        return any(math.isfinite(value) for value in self.values(key))

    def terms(self) -> list[str]:
        """Keys of the loss terms that are not 0 throughout, those with a name first."""
        known = [PREFIX + name for name in TERM_NAMES]
        keys = dict.fromkeys(known + [key for row in self.rows for key in row if key.startswith(PREFIX)])
        return [key for key in keys if any(value > 0 for value in self.values(key))]

    def throughput(self) -> str:
        """Key of the images per second, '' if there is none."""
        keys = (key for row in self.rows for key in row if any(part in key for part in THROUGHPUT))
        return next(keys, '')


def read_curves(sources: Sequence[str], flag: str = 'RUN') -> list[Curves]:
    """Reads the logs of folders or files. Raises UsageError, which names `flag`, if there is none or it has no rows."""
    found = []
    for source, label in zip(sources, labels(sources), strict=True):
        path = Path(source) / checkpoints.LOG if Path(source).is_dir() else Path(source)
        with usage_error_context(flag, source):
            path.stat()  # `read_log` takes a missing file for an empty one
            rows = checkpoints.read_log(path)
        if not rows:
            raise UsageError(f'{flag} {source}: {path.name} has no rows; no epoch is finished')
        rates = read_run_files(path.parent).speed.images_per_second
        if rates:
            rows = [{**row, 'images_per_second': rates.get(row['epoch'])} for row in rows]
        found.append(Curves(label, rows))
    return found


def labels(sources: Sequence[str]) -> list[str]:
    """The names of the folders, with as many of their parents as keep them apart."""
    folders = [Path(source).resolve() for source in sources]
    folders = [folder.parent if folder.name == checkpoints.LOG else folder for folder in folders]
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ['/'.join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


# Drawing --------------------------------------------------------------------------------------------------------------


def draw(runs: list[Curves], teacher: float | None = None) -> Any:
    """A figure with a panel for accuracy, one for the learning rate, and one for the loss terms of each run."""
    from matplotlib.figure import Figure

    measures = [draw_accuracy, draw_learning_rate, *([draw_throughput] if any(map(Curves.throughput, runs)) else [])]
    count = len(measures) + len(runs)
    columns = min(count, 3 if count in (3, 5, 6) or count > 6 else 2)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines + 0.7), layout='constrained')
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.remove()
    for panel, measure in zip(panels, measures, strict=False):
        measure(panel, runs)
    if teacher is not None:
        draw_teacher(panels[0], teacher)
    draw_losses(panels[len(measures) : count], runs)
    for panel in panels[:count]:
        finish(panel, runs)
    add_legend(figure, panels[0], 'outside upper center')
    add_legend(figure, panels[len(measures) : count], 'outside lower center', title='terms of the training loss')
    return figure


def style(number: int, run: Curves) -> dict[str, Any]:
    """Colour of a run, and markers where colours repeat or where a line has a single point."""
    marker = MARKERS[number // len(COLOURS) % len(MARKERS)] or ('o' if len(run.rows) == 1 else '')
    return {'color': COLOURS[number % len(COLOURS)], 'marker': marker, 'markevery': max(1, len(run.rows) // 8)}


def draw_accuracy(panel: Any, runs: list[Curves]) -> None:
    for i, run in enumerate(runs):
        panel.plot(run.epochs, run.values('test_acc1'), label=run.label, **style(i, run))
        if run.has('test_ema_acc1'):
            values = run.values('test_ema_acc1')
            panel.plot(run.epochs, values, linestyle='--', label=f'{run.label}, EMA', **style(i, run))
    panel.set_ylim(bottom=0)
    panel.set_title('accuracy: Acc@1 on the validation images, %')


def draw_teacher(panel: Any, accuracy: float) -> None:
    panel.axhline(accuracy, color='0.35', linestyle=':', label=f'teacher ({accuracy:g})')
    panel.set_ylim(0, max(panel.get_ylim()[1], 1.05 * accuracy))


def draw_learning_rate(panel: Any, runs: list[Curves]) -> None:
    for i, run in enumerate(runs):
        # Runs of one recipe have the same curve: wider lines stay visible below narrower ones.
        width = 1.5 + 1.8 * (len(runs) - 1 - i)
        panel.plot(run.epochs, run.values('train_lr'), linewidth=min(width, 9), **style(i, run))
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter('{x:g}')
    panel.set_title('learning rate')


def draw_throughput(panel: Any, runs: list[Curves]) -> None:
    for i, run in enumerate(runs):
        panel.plot(run.epochs, run.values(run.throughput()), **style(i, run))
    panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
    panel.set_title('throughput: images per second')


def draw_losses(panels: Sequence[Any], runs: list[Curves]) -> None:
    """One panel per run, with one scale for all: logarithmic if the terms differ much."""
    keys = list(dict.fromkeys([PREFIX + name for name in TERM_NAMES] + [key for run in runs for key in run.terms()]))
    ends = []
    for panel, run in zip(panels, runs, strict=True):
        marker = 'o' if len(run.rows) == 1 else ''
        panel.plot(run.epochs, run.values('train_loss'), color='0.75', linewidth=4, marker=marker, label='sum')
        for key in run.terms():
            i = keys.index(key)
            values = [value if value > 0 else math.nan for value in run.values(key)]
            name = TERM_NAMES.get(key.removeprefix(PREFIX), key.removeprefix(PREFIX))
            look = {'color': TERM_COLOURS[i % len(TERM_COLOURS)], 'linestyle': TERM_STYLES[i % len(TERM_STYLES)]}
            panel.plot(run.epochs, values, marker=marker, label=name, **look)
            ends += [value for value in values if math.isfinite(value)]
        label = run.label if len(run.label) < 40 else f'…{run.label[-38:]}'
        panel.set_title(f'loss: {label}' if len(runs) > 1 else 'loss')
    logarithmic = bool(ends) and max(ends) > 20 * min(ends)
    for panel in panels:
        panel.set_yscale('log' if logarithmic else 'linear')
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def finish(panel: Any, runs: list[Curves]) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(max(run.epochs) for run in runs)
    panel.set_xlim(min(min(run.epochs) for run in runs) - 0.02 * last, 1.02 * last)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel('epoch')
    panel.title.set(fontsize=10, ha='left', position=(0, 1))
    panel.spines[['top', 'right']].set_visible(False)
    panel.grid(alpha=0.25)


def add_legend(figure: Any, panels: Any, place: str, title: str | None = None) -> None:
    """A legend outside of all panels, where it covers no line; each label once."""
    handles: dict[str, Any] = {}
    for panel in panels if isinstance(panels, list) else [panels]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    inches = figure.get_figwidth()
    columns = max(1, int(inches * 11 / (max(map(len, handles)) + 7)))  # about 11 characters an inch
    figure.legend(
        handles.values(), handles, loc=place, ncols=min(columns, len(handles)), frameon=False, fontsize=9,
        title=title, title_fontsize=9, handlelength=2.6,
    )  # fmt: skip


# The command ----------------------------------------------------------------------------------------------------------


def percentage(text: str) -> float:
    """An argparse type: a number above 0 and at most 100."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f'{text}: must be a percentage above 0 and at most 100')
    return value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='+', metavar='RUN', help='folder of a run, or a log file')
    parser.add_argument('--teacher', type=percentage, metavar='ACC', help="the teacher's Acc@1 in percent")
    parser.add_argument('--out', default='curves.svg', help='file to write: .svg, .png or .pdf (curves.svg)')
    with one_line_errors(PROGRAM):
        args = parser.parse_args(argv)
        check_figure_path(args.out, PROGRAM)
        runs = read_curves(args.run)
        save_figure(draw(runs, args.teacher), args.out)
    counts = (f'{run.label} ({len(run.rows)} epoch{"s" * (len(run.rows) > 1)})' for run in runs)
    print(f'{args.out}: {", ".join(counts)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
