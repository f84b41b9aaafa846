"""A report on a run as one HTML file that needs no other: results, curves, speed, arguments and environment.

    python -m tools.report OUT                                  writes report.html
    python -m tools.report OUT --control SOFT                   compares it with soft KD alone
    python -m tools.report OUT --images a.png b.png --out r.html  with relation maps, as tools.relations draws them

RUN and RUN2 are folders of runs, or log files, also the log.txt of the 2022 release. What a folder does not have is
left out. The relation maps need the checkpoint of the run, and its teacher.
"""

import argparse
import io
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flags import Parser
from losses import RELATION_TERMS
from tools import page, plot, relations
from tools.common import add_model_flags, check_figure_path, one_line_errors, read_run, typed_flags
from tools.plot import Curves
from tools.run_files import RunFiles, default_flags, differing, format_flag, number, read_run_files
from utils import UsageError, flag_name, usage_error_context

PROGRAM = 'tools.report'
ENDINGS = ('.html', '.htm')
SHARE = 'train_share_'
NONE = '–'
MOST_WARNINGS = 50
SAME_RECIPE = 'By args.yaml, the two runs differ in the relation terms alone, and in flags that do not change training.'
LONGEST_LABEL = 26  # characters, for a legend below a small chart
# What the control of a run may have differently: the relation terms, and what does not change the training.
RELATION_FLAGS = {'s_id', 't_id', 'K', 'relations', 'relation_dtype', 'distillation_beta', 'token_align',
                  'max_patches', *(f'w_{name}' for name in RELATION_TERMS)}  # fmt: skip
OTHER_FLAGS = {'output_dir', 'resume', 'config', 'log_to', 'keep', 'save_interval_minutes', 'save_interval_steps',
               'print_freq', 'eval_ema', 'eval_teacher', 'log_grad_share', 'num_workers', 'pin_mem', 'dist_url',
               'dist_timeout', 'dist_eval'}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run and all that is known of it."""

    name: str
    curves: Curves  # with a label that a legend can show
    files: RunFiles

    @property
    def last(self) -> dict[str, Any]:
        return self.curves.rows[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch, of two equal ones the later: that of best_checkpoint.pth."""
        ranks = {i: number(row.get('test_acc1')) for i, row in enumerate(self.curves.rows)}
        return self.curves.rows[max(ranks, key=lambda i: (-math.inf if math.isnan(ranks[i]) else ranks[i], i))]

    @property
    def title(self) -> str:
        """The pair of models, or the name of the run if that is not known."""
        flags = self.files.flags
        if not flags.get('model'):
            return self.name
        student = format_flag(flags['model'])
        return f'{format_flag(flags.get("teacher_model"))} → {student}' if has_teacher(flags) else student


def has_teacher(flags: dict[str, Any]) -> bool:
    return flags.get('distillation_type', 'none') not in ('none', None)


def read_runs(source: str, control: str | None) -> list[Run]:
    """The run, and its control if there is one. Raises UsageError if there is no log, or if one has no rows."""
    sources = [source, *([control] if control else [])]
    found = []
    for path, flag, name in zip(sources, ('RUN', '--control'), plot.labels(sources), strict=False):
        (curves,) = plot.read_curves([path], flag)
        label = page.plain(name).replace('\n', ' ').replace('$', r'\$')  # a $ would begin a formula
        label = label if len(label) <= LONGEST_LABEL else f'…{label[1 - LONGEST_LABEL :]}'
        # matplotlib hides labels with an underscore in front.
        label = (' ' if label.startswith('_') else '') + label + (' (control)' if flag == '--control' else '')
        # Keys become labels of lines; those of a run are plain names.
        rows = [
            {key: value for key, value in row.items() if key.isidentifier() and len(key) < 60 and not _too_large(value)}
            for row in curves.rows
        ]
        files = read_run_files(Path(path) if Path(path).is_dir() else None)
        found.append(Run(name, Curves(label, rows), files))
    return found


def _too_large(value: object) -> bool:
    """Whether a value is a whole number that no float can hold."""
    return isinstance(value, int) and math.isnan(number(value))


# Texts ----------------------------------------------------------------------------------------------------------------


def percent(value: object) -> str:
    found = number(value)
    return NONE if math.isnan(found) else f'{found:.2f}'


def decimals(value: object) -> str:
    found = number(value)
    return NONE if math.isnan(found) else f'{found:.4f}'


def gain(value: object, control: object) -> str:
    found = number(value) - number(control)
    return NONE if math.isnan(found) else f'{found:+.2f}'


def epoch_of(row: dict[str, Any]) -> int:
    """Finished epochs at a row, from 1."""
    return row['epoch'] + 1


def epochs_done(run: Run) -> str:
    """`12 of 12`, or `7` if the planned number is not known."""
    wanted = run.files.flags.get('epochs')
    return f'{epoch_of(run.last)}' + (f' of {wanted}' if isinstance(wanted, int) else '')


def duration(run: Run) -> str:
    console = run.files.console
    if not console or not console.duration:
        return NONE
    return console.duration + (f' (last of {console.starts} starts)' if console.starts > 1 else '')


# Charts ---------------------------------------------------------------------------------------------------------------


@contextmanager
def chart_style() -> Iterator[None]:
    """Equal runs give equal files; letters that no font has are drawn as boxes, without a warning."""
    import matplotlib

    with matplotlib.rc_context({'svg.hashsalt': PROGRAM, 'font.size': 9}), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def new_panel() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(4.6, 3.4), layout='constrained').subplots()


def finished(panel: Any, runs: list[Curves], text: str) -> str:
    """A chart as a part of the page, with a text for those who cannot see it."""
    plot.finish(panel, runs)
    if len(runs) > 1 and not panel.get_legend_handles_labels()[0]:
        for run, line in zip(runs, panel.lines, strict=True):
            line.set_label(run.label)
    if panel.get_legend_handles_labels()[0]:
        plot.add_legend(panel.figure, panel, 'outside lower center')
    buffer = io.BytesIO()
    panel.figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    return page.picture(buffer.getvalue(), 'image/svg+xml', text)


def in_words(title: str, lines: Sequence[tuple[str, Sequence[float]]], form: str = '.4g') -> str:
    """The ends of the lines of a chart."""
    parts = []
    for name, values in lines:
        known = [value for value in values if math.isfinite(value)]
        if known:
            parts.append(f'{name} from {known[0]:{form}} to {known[-1]:{form}}')
    return f'{title} by epoch: {"; ".join(parts) or "no values"}.'


def term_name(key: str, prefix: str) -> str:
    return plot.TERM_NAMES.get(key.removeprefix(prefix), key.removeprefix(prefix))


def chart_by_key(draw: Callable[..., None], runs: list[Run], title: str, key: str) -> str:
    """A chart of one value of all runs, drawn by a function of tools.plot."""
    panel, curves = new_panel(), [run.curves for run in runs]
    draw(panel, curves)
    return finished(panel, curves, in_words(title, [(run.name, run.curves.values(key)) for run in runs]))


def accuracy_chart(runs: list[Run], teacher: float | None) -> str:
    panel, curves, lines = new_panel(), [run.curves for run in runs], []
    plot.draw_accuracy(panel, curves)
    for run in runs:
        lines += [(run.name, run.curves.values('test_acc1')), (f'{run.name}, EMA', run.curves.values('test_ema_acc1'))]
    text = in_words('Acc@1 in percent', lines, '.2f')
    if teacher is not None:
        plot.draw_teacher(panel, teacher)
        text += f' Teacher: {teacher:.2f}.'
    return finished(panel, curves, text)


def loss_charts(runs: list[Run]) -> list[str]:
    curves = [run.curves for run in runs]
    panels = [new_panel() for _ in runs]
    plot.draw_losses(panels, curves)
    texts = []
    for run in runs:
        keys = ['train_loss', *run.curves.terms()]
        lines = [
            (term_name(key, plot.PREFIX) if key != 'train_loss' else 'sum', run.curves.values(key)) for key in keys
        ]
        texts.append(in_words(f'Training loss of {run.name} and its terms', lines))
    return [finished(panel, curves, text) for panel, text in zip(panels, texts, strict=True)]


def share_keys(run: Run) -> list[str]:
    known = [SHARE + name for name in plot.TERM_NAMES]
    keys = dict.fromkeys(known + [key for row in run.curves.rows for key in row if key.startswith(SHARE)])
    return [key for key in keys if any(value > 0 for value in run.curves.values(key))]


def share_chart(run: Run) -> str:
    panel, keys, order = new_panel(), share_keys(run), list(plot.TERM_NAMES)
    for i, key in enumerate(keys):
        name = key.removeprefix(SHARE)
        place = order.index(name) if name in order else len(order) + i
        values = [100 * value for value in run.curves.values(key)]
        panel.plot(
            run.curves.epochs, values, label=term_name(key, SHARE), marker='o' if len(values) == 1 else '',
            color=plot.TERM_COLOURS[place % len(plot.TERM_COLOURS)],
            linestyle=plot.TERM_STYLES[place % len(plot.TERM_STYLES)],
        )  # fmt: skip
    ends = [value for key in keys for value in run.curves.values(key) if value > 0]
    if max(ends) > 20 * min(ends):
        panel.set_yscale('log')
        panel.yaxis.set_major_formatter('{x:g}')
    else:
        panel.set_ylim(bottom=0)
    panel.set_title('share of the gradient, %')
    lines = [(term_name(key, SHARE), [100 * value for value in run.curves.values(key)]) for key in keys]
    return finished(panel, [run.curves], in_words('Share of each term in the gradient, in percent,', lines, '.1f'))


def speed_charts(runs: list[Run]) -> list[str]:
    """Throughput and waiting for data, of the runs that have logged them."""
    sped = []
    for run in runs:
        speed = run.files.speed
        rows = [
            {'epoch': epoch, 'images_per_second': rate, 'wait': 100 * speed.data_share[epoch]}
            for epoch, rate in sorted(speed.images_per_second.items())
        ]
        if rows:
            sped.append(replace(run, curves=Curves(run.curves.label, rows)))

    def draw_wait(panel: Any, curves: list[Curves]) -> None:
        for i, each in enumerate(curves):
            panel.plot(each.epochs, each.values('wait'), **plot.style(i, each))
        panel.set_ylim(bottom=0)
        panel.set_title('waiting for data: % of the time of the steps')

    return [
        chart_by_key(plot.draw_throughput, sped, 'Images per second, medians,', 'images_per_second'),
        chart_by_key(draw_wait, sped, 'Share of the time spent waiting for data, in percent,', 'wait'),
    ]


# Sections -------------------------------------------------------------------------------------------------------------


def teacher_result(run: Run, given: float | None) -> tuple[float, float] | None:
    """Acc@1 and Acc@5 of the teacher: as typed, or as --eval-teacher found them; Acc@5 may be NaN."""
    if given is not None:
        return given, math.nan
    return run.files.console.teacher if run.files.console else None


def results(run: Run, teacher: tuple[float, float] | None) -> str:
    last, best = run.last, run.best
    rows: list[list[object]] = [['student, last epoch', epoch_of(last), percent(last.get('test_acc1')),
                                 percent(last.get('test_acc5')), decimals(last.get('test_loss'))]]  # fmt: skip
    if run.curves.has('test_ema_acc1'):
        ema = (last.get(f'test_ema_{name}') for name in ('acc1', 'acc5', 'loss'))
        first, second, loss = ema
        rows.append(['student, EMA, last epoch', epoch_of(last), percent(first), percent(second), decimals(loss)])
    rows.append(['student, best epoch', epoch_of(best), percent(best.get('test_acc1')), percent(best.get('test_acc5')),
                 decimals(best.get('test_loss'))])  # fmt: skip
    if teacher:
        rows.append(['teacher', NONE, percent(teacher[0]), percent(teacher[1]), NONE])
    parameters = last.get('n_parameters')
    facts = [
        ['epochs', epochs_done(run)],
        ['parameters of the student', f'{parameters:,}' if isinstance(parameters, int) else NONE],
        ['duration', duration(run)],
    ]
    facts += [[name, text] for name, text in facts_of(run) if name in ('images', 'device', 'loss')]
    note = 'The best epoch was chosen on the validation images. Compare runs by their last epochs.'
    return page.section(
        'Results',
        page.table('Accuracy on the validation images, in percent', ['model', 'epoch', 'Acc@1', 'Acc@5', 'loss'], rows),
        page.paragraph(note, 'note'),
        page.table('The run', (), facts, ''),
    )


def facts_of(run: Run) -> list[tuple[str, str]]:
    return run.files.console.facts if run.files.console else []


def comparison(run: Run, control: Run) -> str:
    """The run against its control, and what else differs between them."""
    keys = ['test_acc1', 'test_acc5', *(['test_ema_acc1'] if run.curves.has('test_ema_acc1') else [])]
    names = {'test_acc1': 'Acc@1', 'test_acc5': 'Acc@5', 'test_ema_acc1': 'EMA Acc@1'}
    rows = [[each.name, epochs_done(each), *(percent(each.last.get(key)) for key in keys)] for each in (run, control)]
    rows[1][0] += ' (control)'
    rows.append(['difference', '', *(gain(run.last.get(key), control.last.get(key)) for key in keys)])
    head = ['run', 'epochs', *(names[key] for key in keys)]
    return page.section(
        'Comparison with the control',
        page.table('Accuracy after the last epoch, in percent', head, rows),
        page.paragraph(
            'One pair of runs shows no significance: with another seed the difference may be much larger, or have the '
            'other sign. python -m tools.experiment repeats both with several seeds and computes exact p-values; see '
            'docs/experiments.md.'
        ),
        *([page.paragraph(text, 'warn') for text in objections(run, control)] or [page.paragraph(SAME_RECIPE, 'note')]),
    )


def objections(run: Run, control: Run) -> list[str]:
    """Why the difference may have other reasons than the relation terms."""
    own, other = run.files.flags, control.files.flags
    if not own or not other:
        missing = ' and '.join(each.name for each in (run, control) if not each.files.flags)
        return [f'Whether the recipes are the same is not known: {missing} has no readable args.yaml.']
    found = []
    if other.get('s_id') and any(number(other.get(f'w_{name}')) > 0 for name in RELATION_TERMS):
        found.append(f'The control has relation terms too (--s-id {format_flag(other["s_id"])}).')
    if other.get('distillation_type') != 'soft':
        kind = format_flag(other.get('distillation_type'))
        found.append(f'The control has --distillation-type {kind}; it is not soft KD alone.')
    names = dict.fromkeys(differing(own, other) + differing(other, own))
    unequal = [name for name in names if name not in RELATION_FLAGS | OTHER_FLAGS]
    if unequal:
        values = (
            f'{flag_name(name)} {format_flag(own.get(name))} and {format_flag(other.get(name))}' for name in unequal
        )
        found.append(f'The recipes differ, in the run and in the control: {"; ".join(values)}.')
    batches = [dict(facts_of(each)).get('batch') for each in (run, control)]
    if all(batches) and batches[0] != batches[1]:
        found.append(f'The batches differ: {batches[0]} and {batches[1]}.')
    if epoch_of(run.last) != epoch_of(control.last):
        found.append(
            f'The runs have finished different numbers of epochs: {epochs_done(run)} and {epochs_done(control)}.'
        )
    return found


def curves_section(runs: list[Run], teacher: float | None) -> str:
    rate = chart_by_key(plot.draw_learning_rate, runs, 'Learning rate', 'train_lr')
    return page.section('Curves', page.charts([accuracy_chart(runs, teacher), *loss_charts(runs), rate]))


def shares_section(run: Run) -> str:
    rows = [[term_name(key, SHARE), percent(100 * number(run.last.get(key)))] for key in share_keys(run)]
    note = 'How large the gradient of a term is at the tapped blocks, not where it points; docs/method.md explains it.'
    values = page.table('After the last epoch, in percent', ['term', 'share'], rows)
    return page.section('Share of each term in the gradient', page.charts([share_chart(run), values]),
                        page.paragraph(note, 'note'))  # fmt: skip


def speed_section(runs: list[Run]) -> str:
    rows = [
        [run.name, f'{speed.overall[0]:,.0f}', f'{speed.overall[1]:.1%}', f'{speed.steps:,}']
        for run in runs
        if (speed := run.files.speed).overall
    ]
    head = ['run', 'images/s', 'waiting for data', 'log lines']
    return page.section(
        'Throughput and data',
        page.table('Medians of the lines of metrics.jsonl, all ranks together', head, rows),
        page.charts(speed_charts(runs)),
        page.paragraph('Measured beside whatever else ran on the machine; evaluation and saving do not count.', 'note'),
    )


def relations_section(source: str, images: Sequence[str], typed: dict[str, Any]) -> str:
    """Relation maps, as tools.relations draws them. Raises UsageError as it does."""
    run = read_run(source, typed)
    pixels = relations.read_images(images, run.config)
    rows = relations.measure(run, pixels, None, '', ema=False)
    buffer = io.BytesIO()
    with chart_style():
        relations.draw(rows, pixels).savefig(buffer, format='png', dpi=200)
    names = [Path(path).name for path in images]
    before, after = (sum(row.distances[i] for row in rows) / len(rows) for i in (0, 1))
    text = (
        f'Relation maps of {", ".join(names)}: teacher, student before and after training, and their differences. '
        f'The mean squared difference to the teacher is {before:.5f} before and {after:.5f} after training.'
    )
    lines: list[list[object]] = [
        [names[row.image], *row.blocks, *(f'{distance:.5f}' for distance in row.distances)] for row in rows
    ]
    lines.append(['mean', '', '', f'{before:.5f}', f'{after:.5f}'])
    head = ['image', 'student block', 'teacher block', 'before', 'after']
    maps = page.scrolling('Relation maps', page.picture(buffer.getvalue(), 'image/png', text))
    return page.section(
        'Relation maps',
        page.paragraph('Cosine similarities of all patch tokens of an image, row by row of its grid.'),
        f'<div class="maps">{maps}</div>',
        page.table('Mean squared difference between the maps of student and teacher', head, lines),
    )


def warnings_section(run: Run) -> str:
    console = run.files.console
    if console is None:
        return page.section('Warnings', page.paragraph('The run has no console.log.'))
    shown = [text + (f' ({count} times)' if count > 1 else '') for text, count in console.warnings.items()]
    more = [f'and {len(shown) - MOST_WARNINGS} others'] if len(shown) > MOST_WARNINGS else []
    return page.section('Warnings', page.bullets(shown[:MOST_WARNINGS] + more) if shown else page.paragraph('None.'))


def arguments_section(run: Run) -> str:
    flags, defaults = run.files.flags, default_flags()
    if not flags:
        return page.section('Arguments', page.paragraph('The run has no readable args.yaml.'))
    changed = [[flag_name(name), format_flag(flags[name]), format_flag(defaults.get(name))]
               for name in differing(flags, defaults)]  # fmt: skip
    whole = [[flag_name(name), format_flag(value)] for name, value in flags.items()]
    return page.section(
        'Arguments',
        page.table('Other values than the defaults', ['flag', 'value', 'default'], changed, 'code'),
        page.folded(f'All {len(whole)} arguments', page.table('All arguments', ['flag', 'value'], whole, 'code')),
    )


def environment_section(run: Run) -> str:
    command, *others = run.files.head or ['']
    rows = [line.partition(' ')[::2] for line in others if line.startswith('commit ')]
    rows += [('versions', line) for line in others if not line.startswith('commit ')]
    rows += [fact for fact in facts_of(run) if fact[0] not in ('images', 'device', 'loss')]
    parts = [page.table('Versions, and what the run printed at its last start', (), rows, '')] * bool(rows)
    parts += [page.paragraph('Command:'), page.preformatted(one_flag_a_line(command))] if command else []
    return page.section('Environment', *(parts or [page.paragraph('Not known: the run has no args.yaml.')]))


def one_flag_a_line(command: str) -> str:
    """The command as a shell reads it, with a line for each flag."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        return command
    return ' '.join(f'\\\n    {word}' if word.startswith('--') else word for word in map(shlex.quote, words))


def build(runs: list[Run], teacher: float | None, maps: str) -> str:
    """The page. `maps` is the section with the relation maps, '' without."""
    run, *controls = runs
    known = teacher_result(run, teacher) if has_teacher(run.files.flags) or teacher is not None else None
    with chart_style():
        parts = [results(run, known), *(comparison(run, control) for control in controls)]
        parts += [curves_section(runs, known[0] if known else None), maps]
        parts += [shares_section(run)] if share_keys(run) else []
        parts += [speed_section(runs)] if any(each.files.speed.overall for each in runs) else []
    parts += [warnings_section(run), arguments_section(run), environment_section(run)]
    kind = format_flag(run.files.flags.get('distillation_type')) if has_teacher(run.files.flags) else ''
    subtitle = f'Run {run.name}' + (f', {kind} distillation' if kind else '')
    return page.document(run.title, subtitle, [part for part in parts if part])


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(PROGRAM, description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument('run', metavar='RUN', help='folder of a run, or a log file')
    parser.add_argument('--control', metavar='RUN2', help='a run of the same recipe with soft KD alone')
    parser.add_argument('--images', nargs='+', metavar='FILE', help='images whose relation maps are shown')
    parser.add_argument('--teacher', type=plot.percentage, metavar='ACC', help="the teacher's Acc@1 in percent "
                        '(default: as --eval-teacher found it)')  # fmt: skip
    parser.add_argument('--out', default='report.html', help='file to write: .html or .htm (report.html)')
    add_model_flags(parser, ('teacher_path',))
    with one_line_errors(PROGRAM):
        args = parser.parse_args(argv)
        check_figure_path(args.out, PROGRAM, ENDINGS)
        runs = read_runs(args.run, args.control)
        typed = typed_flags(args, ('teacher_path',))
        if typed and not args.images:
            raise UsageError(f'--teacher-path {args.teacher_path}: is only read for the relation maps; pass --images')
        maps = relations_section(args.run, args.images, typed) if args.images else ''
        text = build(runs, args.teacher, maps)
        with usage_error_context('--out', args.out):
            Path(args.out).write_text(text, encoding='utf-8', errors='replace')
    print(f'{args.out}: {len(text.encode(errors="replace")) / 1e6:.1f} MB')
    return 0


if __name__ == '__main__':
    sys.exit(main())
