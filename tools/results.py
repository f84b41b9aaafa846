"""What the runs of an experiment measured: gains over the control, exact p-values, a table and a figure.

Only the accuracy after the last epoch counts. The best epoch is never picked.
"""

import json
import os
import platform
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch

from tools import rivals
from tools.plans import Cell, Plan, Run, make_runs

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MAX_EXACT = 40  # pairs; more would need too much memory


@dataclass(frozen=True)
class Result:
    """A finished run."""

    accuracy: float  # Acc@1 in percent after the last epoch
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """A line of the table. Accuracies and seconds are by seed, gains by the seeds that the control has too."""

    row: str
    title: str
    cell: Cell
    accuracies: dict[int, float]
    gains: dict[int, float]
    p: float | None
    seconds: list[float]
    parameters: int
    command: str


def sign_flip_p(differences: list[float]) -> float:
    """The two-sided p-value of the exact sign-flip (paired permutation) test.

    Without an effect, each difference could as well have the other sign. p is the share of the 2^n choices of signs
    whose sum is at least as far from 0 as the measured one. It is counted exactly: all sums of the first half of the
    differences are combined with all sums of the second half.

    Raises:
        ValueError: no differences, or more than 40.
    """
    n = len(differences)
    if not 1 <= n <= MAX_EXACT:
        raise ValueError(f'the exact test needs 1 to {MAX_EXACT} differences, not {n}')
    # Sums that differ by rounding only are equal.
    least = abs(sum(differences)) - 1e-9 * sum(map(abs, differences))
    left, right = (_signed_sums(half) for half in (differences[: n // 2], differences[n // 2 :]))
    right.sort()
    above = len(right) - np.searchsorted(right, least - left, side='left')
    below = np.searchsorted(right, -least - left, side='right')
    return 1.0 if least <= 0 else float((above + below).sum() / 2**n)


def _signed_sums(values: list[float]) -> np.ndarray:
    """The sums for all 2^n choices of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def last_row(folder: Path) -> dict:
    return json.loads((folder / 'log.txt').read_text().splitlines()[-1])


def read_state(folder: Path) -> dict:
    """What the tool knows about a run: `identity`, `seconds`, `finished`, `started`; empty if it never started."""
    path = folder / 'run.json'
    return json.loads(path.read_text()) if path.exists() else {}


def read_result(run: Run) -> Result | None:
    """The result of a run, None if it has not finished."""
    state = read_state(run.folder)
    if not state.get('finished'):
        return None
    row = last_row(run.folder)
    return Result(row['test_acc1'], row['n_parameters'], state['seconds'])


def found_seeds(plan: Plan, out: Path) -> list[int]:
    """The seeds of the plan and those that were run in addition."""
    names = {path.name for path in out.glob('runs/**/seed-*')}
    return plan.seeds + sorted({int(name.removeprefix('seed-')) for name in names} - set(plan.seeds))


def build_lines(plan: Plan, out: Path) -> list[Line]:
    """The lines of the table: the finished runs in the folder, teachers first, then row by row."""
    runs: dict[tuple[Cell, str], list[Run]] = {}
    for run in make_runs(plan, out, found_seeds(plan, out)):
        runs.setdefault((run.cell, run.row), []).append(run)
    order = ['teacher', *plan.rows]
    lines = []
    for (cell, row), group in sorted(runs.items(), key=lambda item: order.index(item[0][1])):
        results = {run.seed: result for run in group if (result := read_result(run))}
        control = {run.seed: read_result(run) for run in runs.get((cell, plan.control), [])}
        gains = {}
        if row not in ('teacher', plan.control):
            pairs = {seed: (result, control.get(seed)) for seed, result in results.items()}
            gains = {seed: one.accuracy - other.accuracy for seed, (one, other) in pairs.items() if other}
        lines.append(
            Line(
                row,
                plan.rows[row].title if row in plan.rows else 'teacher',
                cell,
                {seed: result.accuracy for seed, result in results.items()},
                gains,
                sign_flip_p(list(gains.values())) if 1 <= len(gains) <= MAX_EXACT else None,
                [result.seconds for result in results.values()],
                max((result.parameters for result in results.values()), default=0),
                command_line(next((run for run in group if run.seed in results), group[0])),
            )
        )
    return lines


def command(run: Run, python: str = 'python') -> list[str]:
    """The words that start a run, in the folder of main.py."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={run.ranks}'] if run.ranks > 1 else []
    return [python, *launcher, *rivals.program(run.words), *run.words]


def command_line(run: Run) -> str:
    return shlex.join(command(run))


# The table ------------------------------------------------------------------------------------------------------------


def mean_std(values: list[float], sign: str = '') -> str:
    """`mean ± sample standard deviation`; one value has no deviation."""
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):{sign}.2f}{spread}'


def table(plan: Plan, lines: list[Line]) -> str:
    """The table in Markdown."""
    axes = [name for name in ('epochs', 'images') if getattr(plan, name)]
    names = {'epochs': 'epochs', 'images': 'images per class'}
    head = ['row', *(names[axis] for axis in axes), 'parameters', 'n', 'Acc@1', f'against {plan.control}', 'p', 's/run']
    rows = [head, ['---'] * len(head)]
    for line in lines:
        p = '–' if line.p is None else f'{line.p:.4f}'
        seconds = f'{statistics.fmean(line.seconds):.0f}' if line.seconds else '–'
        cell = [str(getattr(line.cell, axis) or '–') for axis in axes]
        gain = mean_std(list(line.gains.values()), '+')
        gain += f' (n = {len(line.gains)})' if line.gains and len(line.gains) != len(line.accuracies) else ''
        accuracy = mean_std(list(line.accuracies.values()))
        parameters = f'{line.parameters:,}' if line.parameters else '–'
        rows.append([line.title, *cell, parameters, str(len(line.accuracies)), accuracy, gain, p, seconds])
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Processor, devices and versions."""
    processor = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        models = [line.split(':', 1)[1].strip() for line in info.read_text().splitlines() if line.startswith('model n')]
        processor = next(iter(models), processor)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {'processor': f'{processor}, {cores()} cores', 'gpus': ', '.join(gpus) or 'none'}
    return found | {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()}


def page(plan: Plan, lines: list[Line], failures: dict[str, str]) -> str:
    """The whole Markdown file of results."""
    data = plan.data
    per_class = ' or '.join(map(str, plan.images or [data.images or 'all']))
    images = f', {per_class} training images per class, part {data.part}' if data.source == 'folders' else ''
    about = ', '.join(f'{key} {value}' for key, value in environment().items())
    parts = [
        f'# {plan.title}',
        f'Plan `{Path(plan.path).name}`. Data: {data.source}{images}. {plan.threads} thread(s) per process. {about}.',
        table(plan, lines),
        'Acc@1 in percent after the last epoch, mean ± sample standard deviation over n seeds. "Against '
        f'{plan.control}": the same of the differences to that row with the same seed. p: exact two-sided sign-flip '
        'test of these differences, not corrected for the number of rows. s/run: wall-clock seconds of a run, with '
        'whatever ran beside it.',
    ]
    if failures:
        parts.append('Failed:\n\n' + '\n'.join(f'- {name}: `{reason}`' for name, reason in failures.items()))
    commands = '\n'.join(f'# {line.title} {line.cell.name}'.rstrip() + f'\n{line.command}' for line in lines)
    parts.append(f'Command lines, with the first seed that was run:\n\n```bash\n{commands}\n```')
    return '\n\n'.join(parts) + '\n'


def write_results(plan: Plan, out: Path, failures: dict[str, str]) -> str:
    """Writes all finished runs as Markdown and JSON, and returns the table."""
    lines = build_lines(plan, out)
    (out / f'{plan.results}.md').write_text(page(plan, lines, failures))
    rows = [
        {
            'row': line.row, 'title': line.title, 'epochs': line.cell.epochs, 'images_per_class': line.cell.images,
            'acc1': line.accuracies, 'gain': line.gains, 'p': line.p, 'seconds': line.seconds,
            'parameters': line.parameters, 'command': line.command,
        }
        for line in lines
    ]  # fmt: skip
    whole = {'plan': plan.path, 'control': plan.control, 'environment': environment(), 'rows': rows}
    (out / f'{plan.results}.json').write_text(json.dumps(whole | {'failed': failures}, indent=1) + '\n')
    return table(plan, lines)


# The figure -----------------------------------------------------------------------------------------------------------


def draw(plan: Plan, out: Path) -> bool:
    """Writes the figure as PNG and SVG. Returns False if there is nothing to show yet."""
    lines = [line for line in build_lines(plan, out) if line.accuracies]
    if not lines:
        return False
    figure = make_figure(plan, lines)
    for ending in ('png', 'svg'):
        figure.savefig(out / f'{plan.results}.{ending}', dpi=150)
    plt.close(figure)
    return True


def make_figure(plan: Plan, lines: list[Line]) -> plt.Figure:
    """Accuracies by row; with an axis, gains over the control against it."""
    return _draw_gains(plan, lines) if len(plan.cells) > 1 else _draw_accuracies(plan, lines)


def _draw_accuracies(plan: Plan, lines: list[Line]) -> plt.Figure:
    """One line per row: a dot for each seed, a bar at the mean."""
    lines = lines[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(lines)), layout='constrained')
    for place, line in enumerate(lines):
        values = list(line.accuracies.values())
        color = {plan.control: '0.25', 'teacher': '0.6'}.get(line.row, '#1f5fa8')
        # Dots of different seeds lie at different heights, or equal ones would hide each other.
        heights = [place + 0.24 * (i / max(1, len(values) - 1) - 0.5) * (len(values) > 1) for i in range(len(values))]
        axes.plot(values, heights, 'o', color=color, alpha=0.55, markersize=5, markeredgewidth=0)
        mean = statistics.fmean(values)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=2)
        if line.row == plan.control:
            axes.axvline(mean, color=color, linestyle=':', linewidth=1, zorder=0)
    axes.set_yticks(range(len(lines)), [f'{line.title} (n = {len(line.accuracies)})' for line in lines])
    axes.set_xlabel('Acc@1 after the last epoch, %\n(a dot is a seed, a bar the mean)')
    axes.set_title(plan.title, loc='left', fontsize=11)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='x', alpha=0.25)
    return figure


def _draw_gains(plan: Plan, lines: list[Line]) -> plt.Figure:
    """Gain over the control against the longer axis; one panel for each value of the other one."""
    along, other = ('epochs', 'images') if len(plan.epochs) >= len(plan.images) else ('images', 'epochs')
    panels = getattr(plan, other) or [None]
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.5 + 4.5 * len(panels), 4.2), layout='constrained', sharey=True, squeeze=False
    )
    names = {'epochs': 'epochs', 'images': 'training images per class'}
    for axes, value in zip(grid[0], panels, strict=True):
        for row in plan.rows.values():
            shown = [line for line in lines if line.row == row.name and line.gains]
            shown = [line for line in shown if value is None or getattr(line.cell, other) == value]
            gains = [list(line.gains.values()) for line in shown]
            if shown:
                axes.errorbar(
                    [getattr(line.cell, along) for line in shown],
                    [statistics.fmean(gain) for gain in gains],
                    [statistics.stdev(gain) if len(gain) > 1 else 0 for gain in gains],
                    marker='o', capsize=3, label=row.title,
                )  # fmt: skip
        axes.axhline(0, color='0.25', linewidth=1)
        axes.set_xscale('log')
        axes.set_xticks(getattr(plan, along), map(str, getattr(plan, along)))
        axes.minorticks_off()
        axes.set_xlabel(names[along])
        axes.set_title(plan.title if value is None else f'{value} {names[other]}', loc='left', fontsize=11)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', alpha=0.25)
    grid[0][0].set_ylabel(f'Acc@1 minus that of {plan.control}, same seed\n(mean ± std)')
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=8)
    return figure
