"""Reads a plan of `tools/experiment.py`, checks it, and makes the training runs of it.

docs/experiments.md explains the keys. Every mistake is a `UsageError` of one line that names the file and the key.
"""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flags import get_args_parser, parse_args
from tools import rivals
from tools.parts import PARTS
from utils import UsageError

SOURCES = {
    'digits': "scikit-learn's handwritten digits, written by tools/digits.py",
    'folders': 'class folders in train/ and val/ of --data PATH, of which a part is linked',
    'flags': 'whatever the flags say; --data PATH becomes --data-path',
}
# Flags of main.py that the tool gives to each run, and the key that is meant.
OWN_FLAGS = {'--seed': 'seeds', '--output-dir': '--out', '--resume': '--out', '--data-path': '--data'}
TEACHER_FLAGS = {'--teacher-model': 'teacher.flags', '--teacher-kwargs': 'teacher.flags', '--teacher-path': 'teacher'}


@dataclass(frozen=True)
class Row:
    """One line of the table: a way to train the student."""

    name: str
    title: str
    words: list[str]
    ranks: int


@dataclass(frozen=True)
class Teacher:
    """How the teacher is trained."""

    words: list[str]
    per_seed: bool  # one for each seed, or one for all
    images: int | None  # training images per class; None: those of its students
    ranks: int


@dataclass(frozen=True)
class Data:
    """Where the images come from, and how many of each class are used."""

    source: str
    path: str  # of --data
    images: int | None
    val_images: int | None
    part: str


@dataclass(frozen=True)
class Cell:
    """One point of the grid of epochs and images per class; None where there is no such axis."""

    epochs: int | None = None
    images: int | None = None

    @property
    def name(self) -> str:
        return '_'.join(f'{key}-{value}' for key, value in dataclasses.asdict(self).items() if value is not None)


@dataclass(frozen=True)
class Plan:
    """A plan that has been read and checked."""

    path: str
    title: str
    data: Data
    common: list[str]
    student: list[str]
    teacher: Teacher | None
    rows: dict[str, Row]
    control: str
    seeds: list[int]
    threads: int  # of each process
    epochs: Sequence[int] = ()  # of --epochs: each row is trained for all of them
    images: Sequence[int] = ()  # of --images-per-class: with all of them

    def error(self, key: str, message: object) -> UsageError:
        return UsageError(f'{self.path}: {key}: {message}')

    @property
    def results(self) -> str:
        """Name of the files of results, without ending: runs along an axis have files of their own."""
        return '-'.join(['results', *(['epochs'] if self.epochs else []), *(['images'] if self.images else [])])

    @property
    def cells(self) -> list[Cell]:
        return [Cell(epochs, images) for images in self.images or [None] for epochs in self.epochs or [None]]

    @cached_property
    def teacher_words(self) -> list[str]:
        """The student's flags that name the teacher: those of the teacher's own run, without its weights."""
        if not self.teacher:
            return []
        args, _ = get_args_parser().parse_known_args([*self.common, *self.teacher.words])
        kwargs = [f'{key}={value}' for key, value in args.model_kwargs.items()]
        return ['--teacher-model', args.model, *(['--teacher-kwargs', *kwargs] if kwargs else [])]


@dataclass
class Run:
    """One training run of main.py."""

    row: str  # 'teacher' for a teacher
    cell: Cell
    seed: int
    ranks: int
    images: int | None  # training images per class
    recipe: list[str]  # its flags without those of files
    folder: Path
    data: str  # name of the folder of images
    key: str  # of the plan
    teacher: 'Run | None' = None
    paths: list[str] = field(default_factory=list)  # the flags of files

    @property
    def name(self) -> str:
        return f'{self.row}, seed {self.seed}' + (f', {self.cell.name}' if self.cell.name else '')

    @property
    def words(self) -> list[str]:
        return [*self.recipe, *self.paths]

    @property
    def identity(self) -> list[str]:
        """What must be the same for a run to be continued or kept."""
        return [*self.recipe, f'ranks={self.ranks}', f'data={self.data}']


# Reading --------------------------------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice; YAML itself would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise yaml.MarkedYAMLError(problem=f'the key {key.value} comes twice', problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Section:
    """A mapping of the plan, whose values are read one by one with a check of their type."""

    def __init__(self, path: str, prefix: str, values: Any, known: Sequence[str]) -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(values, dict):
            raise UsageError(f'{path}: {prefix.rstrip(".") or "the plan"}: must be a mapping, not {values!r}')
        self.values = values
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
                hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(known)}'
                raise self.error(key, f'unknown key; {hint}')

    def error(self, key: object, message: str) -> UsageError:
        return UsageError(f'{self.path}: {self.prefix}{key}: {message}')

    def get(self, key: str, expected: str, is_valid: Callable[[Any], bool], default: Any) -> Any:
        """A value of the plan.

        Args:
            key: its key in this section.
            expected: the words of the error, after "must be".
            is_valid: whether a value can be used.
            default: the value without the key; `...` if the key is required.
        """
        value = self.values.get(key, default)
        if value is ...:
            raise self.error(key, f'missing; must be {expected}')
        if key in self.values and not is_valid(value):
            raise self.error(key, f'must be {expected}, not {value!r}')
        return value

    def count(self, key: str, default: Any) -> Any:
        return self.get(key, 'a whole number of at least 1', _is_count, default)

    def counts(self, key: str, default: Any, valid: Callable[[Any], bool]) -> list[int]:
        """A list without repetitions."""

        def is_list(value: Any) -> bool:
            return isinstance(value, list) and value != [] and all(map(valid, value)) and len(set(value)) == len(value)

        return self.get(key, 'a list of different whole numbers', is_list, default)

    def text(self, key: str, default: Any) -> Any:
        return self.get(key, 'a text', lambda value: isinstance(value, str), default)

    def choice(self, key: str, choices: Sequence[str], default: Any) -> Any:
        return self.get(key, f'one of {", ".join(choices)}', lambda value: value in choices, default)

    def words(self, key: str, default: Any = '') -> list[str]:
        text = self.text(key, default)
        try:
            return shlex.split(text, comments=True)
        except ValueError as error:
            raise self.error(key, f'{str(error).lower()} in {text!r}') from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_plan(path: str, data_path: str = '') -> Plan:
    """Reads a plan and checks all that needs no run.

    Args:
        path: of the YAML file.
        data_path: of the data set, if the plan needs one.

    Raises:
        UsageError: one line with the file, the key and what is wrong.
    """
    try:
        values = yaml.load(Path(path).read_text(), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{path}: cannot be read ({getattr(error, "strerror", "") or error})') from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, 'problem_mark', None), getattr(error, 'problem', None)
        line = f'line {mark.line + 1}: ' if mark else ''
        raise UsageError(f'{path}: {line}no valid YAML ({problem or "unreadable"})') from error
    known = 'title data flags student teacher rows control seeds ranks threads'.split()
    top = _Section(path, '', values, known)
    ranks = top.count('ranks', 1)
    rows = _read_rows(path, top.get('rows', 'a mapping of names to flags', bool, ...), ranks)
    plan = Plan(
        path=path,
        title=top.text('title', Path(path).stem),
        data=_read_data(path, data_path, top.values.get('data', ...)),
        common=top.words('flags'),
        student=top.words('student'),
        teacher=_read_teacher(path, top.values['teacher'], ranks) if 'teacher' in top.values else None,
        rows=rows,
        control=top.choice('control', list(rows), ...),
        seeds=top.counts('seeds', ..., _is_seed),
        threads=top.count('threads', 1),
    )
    if plan.teacher and plan.teacher.images and plan.data.source != 'folders':
        raise plan.error('teacher.images_per_class', f'needs data.source folders, not {plan.data.source}')
    _check_own_flags(plan)
    for run in make_runs(plan, Path('OUT'), plan.seeds[:1]):  # also the rows that --only leaves out
        check_command(plan, run)
    return plan


def _read_rows(path: str, values: Any, ranks: int) -> dict[str, Row]:
    section = _Section(path, 'rows.', values, [*values] if isinstance(values, dict) else [])
    rows = {}
    for name, value in section.values.items():
        if not isinstance(name, str) or not re.fullmatch(r'\w[\w.+-]*', name) or name == 'teacher':
            raise section.error(name, 'a name of a row must be letters, digits and . + - _, and not teacher')
        if isinstance(value, str) or value is None:
            value = {'flags': value or ''}
        row = _Section(path, f'rows.{name}.', value, ('flags', 'title', 'ranks'))
        rows[name] = Row(name, row.text('title', name), row.words('flags'), row.count('ranks', ranks))
    return rows


def _read_data(path: str, data_path: str, values: Any) -> Data:
    if values is ...:
        raise UsageError(f'{path}: data: missing; must be a mapping with the key source')
    section = _Section(path, 'data.', values, ('source', 'images_per_class', 'val_images_per_class', 'part'))
    source = section.choice('source', list(SOURCES), ...)
    for key in section.values:
        if source != 'folders' and key != 'source':
            raise section.error(key, f'needs data.source folders, not {source}')
    images, val_images = section.count('images_per_class', None), section.count('val_images_per_class', None)
    return Data(source, data_path, images, val_images, section.choice('part', PARTS, 'all'))


def _read_teacher(path: str, values: Any, ranks: int) -> Teacher:
    section = _Section(path, 'teacher.', values, ('flags', 'train', 'images_per_class', 'ranks'))
    per_seed = section.choice('train', ('per_seed', 'once'), 'per_seed') == 'per_seed'
    return Teacher(
        section.words('flags', ...), per_seed, section.count('images_per_class', None), section.count('ranks', ranks)
    )


# Making and checking the runs -----------------------------------------------------------------------------------------


def sections(plan: Plan) -> dict[str, list[str]]:
    """All flags of a plan, by key."""
    found = {f'rows.{row.name}': row.words for row in plan.rows.values()}
    found |= {'flags': plan.common, 'student': plan.student}
    return found | ({'teacher.flags': plan.teacher.words} if plan.teacher else {})


def _flags_in(words: list[str]) -> list[str]:
    """The names among the words, with dashes."""
    return [word.split('=')[0].replace('_', '-') for word in words if word.startswith('--')]


def _check_own_flags(plan: Plan) -> None:
    own = OWN_FLAGS | (TEACHER_FLAGS if plan.teacher else {})
    for key, words in sections(plan).items():
        for flag in _flags_in(words):
            if flag in own:
                raise plan.error(key, f'{flag}: is set for each run; use {own[flag]}')


def check_command(plan: Plan, run: Run) -> None:
    """Raises UsageError, with the key of the plan, if main.py would refuse the flags of a run."""
    try:
        with rivals.registered():
            parse_args(run.words)
    except UsageError as error:
        raise plan.error(_key_of(plan, run.key, error), error) from error


def _key_of(plan: Plan, key: str, error: UsageError) -> str:
    """The key whose flags hold the flag that an error names first: `key`, or those that all rows share."""
    named = _flags_in(str(error).replace(':', ' ').split())[:1]
    found = sections(plan)
    return next((each for each in (key, 'student', 'flags') if {*named} & {*_flags_in(found.get(each, []))}), key)


def data_folder(plan: Plan, out: Path, images: int | None) -> Path | None:
    """Where the images of a run are, if the tool writes or links them."""
    if plan.data.source == 'flags':
        return Path(plan.data.path) if plan.data.path else None
    size = f'-{images or "all"}' if plan.data.source == 'folders' else ''
    return out / 'data' / (f'{plan.data.part}{size}' if size else plan.data.source)


def _make_run(plan: Plan, out: Path, row: Row, cell: Cell, seed: int, teacher: Run | None = None) -> Run:
    is_teacher = row.name == 'teacher'
    images = cell.images or plan.data.images
    words = [*plan.common, *([] if is_teacher else plan.student)]
    words += ['--epochs', str(cell.epochs)] if cell.epochs else []
    if teacher:
        words += plan.teacher_words
    words += [*row.words, '--seed', str(seed)]
    folder = Path(*filter(None, (out, 'runs', cell.name, row.name, f'seed-{seed}')))
    data = data_folder(plan, out, images)
    paths = ['--output_dir', str(folder), '--resume', 'auto', *(['--data-path', str(data)] if data else [])]
    paths += ['--teacher-path', str(teacher.folder / 'checkpoint.pth')] if teacher else []
    key = 'teacher.flags' if is_teacher else f'rows.{row.name}'
    return Run(row.name, cell, seed, row.ranks, images, words, folder, data.name if data else '', key, teacher, paths)


def has_teacher(plan: Plan, row: Row) -> bool:
    """Whether a row needs the teacher."""
    try:
        args, _ = get_args_parser().parse_known_args([*plan.common, *plan.student, *row.words])
    except UsageError as error:
        raise plan.error(_key_of(plan, f'rows.{row.name}', error), error) from error
    return args.distillation_type != 'none'


def make_runs(plan: Plan, out: Path, seeds: list[int], only: list[str] | None = None) -> Iterator[Run]:
    """The runs in the order in which they start: all rows with the first seed, then with the next one.

    A teacher comes before its students, and only if it has any.
    """
    rows = [row for row in plan.rows.values() if only is None or row.name in only]
    taught = {row.name for row in rows if plan.teacher and has_teacher(plan, row)}
    teachers: dict[Path, Run] = {}
    for seed in seeds:
        for cell in plan.cells:
            for row in rows:
                teacher = None
                if row.name in taught:
                    teacher = _teacher_of(plan, out, cell, seed)
                    if teacher.folder not in teachers:
                        teachers[teacher.folder] = teacher
                        yield teacher
                    teacher = teachers[teacher.folder]
                yield _make_run(plan, out, row, cell, seed, teacher)


def _teacher_of(plan: Plan, out: Path, cell: Cell, seed: int) -> Run:
    assert plan.teacher
    row = Row('teacher', 'teacher', plan.teacher.words, plan.teacher.ranks)
    cell = Cell(images=None if plan.teacher.images else cell.images)
    run_plan = plan
    if plan.teacher.images:
        run_plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, images=plan.teacher.images))
    return _make_run(run_plan, out, row, cell, seed if plan.teacher.per_seed else plan.seeds[0])
