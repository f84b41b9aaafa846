"""Reads what a run left beside its log: args.yaml, console.log and metrics.jsonl.

Nothing here trusts a file: what is missing, damaged or of another form is left out.
"""

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config_files import ARGS
from flags import PARTS, Config
from loggers import CONSOLE, METRICS

# First words of the lines that a run prints as it starts.
FACTS = ('device', 'data', 'batch', 'lr', 'student', 'teacher', 'finetune', 'align', 'images', 'sampler', 'loss',
         'compile')  # fmt: skip
FACT = re.compile(rf'({"|".join(FACTS)}) {{2,}}(\S.*)')
RESULT = re.compile(r'\* Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss (\S+)')
DURATION = re.compile(r'Training time (.+), [\d.]+% of it for \d+ saves')
LONGEST = 2000  # characters of a value


@dataclass
class Console:
    """What `console.log` says. All but the warnings and the teacher's result are those of the last start."""

    starts: int = 0
    facts: list[tuple[str, str]] = field(default_factory=list)  # what was printed before training
    warnings: dict[str, int] = field(default_factory=dict)  # and how often each came
    teacher: tuple[float, float] | None = None  # Acc@1 and Acc@5, with --eval-teacher
    duration: str = ''

    def add(self, line: str, before: str) -> None:
        """Takes a line, and the one before it."""
        if line.startswith('versions '):
            self.starts, self.facts, self.duration = self.starts + 1, [], ''
        elif line.startswith('warning: '):
            text = line.removeprefix('warning: ')
            self.warnings[text] = self.warnings.get(text, 0) + 1
        elif found := FACT.fullmatch(line):
            self.facts.append((found[1], found[2]))
        elif found := DURATION.fullmatch(line):
            self.duration = found[1]
        elif line.startswith('Accuracy of the teacher ') and (found := RESULT.fullmatch(before)):
            self.teacher = float(found[1]), float(found[2])


@dataclass(frozen=True)
class Speed:
    """Medians over the printed steps, by epoch from 0 and over all."""

    images_per_second: dict[int, float]
    data_share: dict[int, float]
    overall: tuple[float, float] | None  # images per second, share of the time spent waiting for data
    steps: int  # printed ones


@dataclass(frozen=True)
class RunFiles:
    flags: dict[str, Any]  # {} if there is no args.yaml
    head: list[str]  # comments of args.yaml: command, versions, commit
    console: Console | None
    speed: Speed


def read_run_files(folder: Path | None) -> RunFiles:
    """What is in the folder of a run; None has nothing."""
    flags, head = _read_args(folder)
    return RunFiles(flags, head, _read_console(folder), _read_speed(folder))


def _lines(folder: Path | None, name: str) -> Iterator[str]:
    """The lines of a file; none if it is not there or not a file, such as a pipe."""
    path = (folder or Path()) / name
    if folder is None or not path.is_file():
        return
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            yield from (line.rstrip('\n') for line in file)
    except OSError:
        return


def _read_args(folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    lines = list(_lines(folder, ARGS))
    head = [line.removeprefix('#').strip() for line in lines if line.startswith('#')]
    try:
        flags = yaml.safe_load('\n'.join(lines))
    except (yaml.YAMLError, ValueError, RecursionError):
        flags = None
    return ({str(key): value for key, value in flags.items()} if isinstance(flags, dict) else {}), head


def _read_console(folder: Path | None) -> Console | None:
    console, before = None, ''
    for line in _lines(folder, CONSOLE):
        console = console or Console()
        console.add(line, before)
        before = line
    return console


def _read_speed(folder: Path | None) -> Speed:
    rows: dict[int, list[tuple[float, float]]] = {}
    for line in _lines(folder, METRICS):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get('epoch'), int):
            values = number(row.get('images_per_second')), number(row.get('data_share'))
            if not any(map(math.isnan, values)):
                rows.setdefault(row['epoch'], []).append(values)
    flat = [values for epoch in rows.values() for values in epoch]
    rates, shares = ({e: statistics.median(v[i] for v in values) for e, values in rows.items()} for i in (0, 1))
    overall = (statistics.median(v[0] for v in flat), statistics.median(v[1] for v in flat)) if flat else None
    return Speed(rates, shares, overall, len(flat))


def number(value: object) -> float:
    """A value of a log, NaN if it is not a finite number."""
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        found = math.nan
    return found if math.isfinite(found) else math.nan


# Flags ----------------------------------------------------------------------------------------------------------------


def default_flags() -> dict[str, Any]:
    """The defaults of all flags, under the names of `args.yaml`."""
    return Config(**{name: part() for name, part in PARTS.items()}).flags()


def format_flag(value: object) -> str:
    """A value as it is typed; on or off for a switch, – for nothing. No list is opened below its first level."""
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, dict):
        text = ' '.join(f'{_scalar(key)}={_scalar(each)}' for key, each in value.items())
    else:
        text = ' '.join(map(_scalar, value)) if isinstance(value, list | tuple) else _scalar(value)
    return (text if len(text) <= LONGEST else text[:LONGEST] + ' …') or '–'


def _scalar(value: object) -> str:
    # YAML can make a list of lists of lists that is small in the file and endless as text.
    if isinstance(value, list | tuple | dict | set):
        return '[…]'
    try:
        return '' if value is None else str(value)
    except ValueError:  # a whole number with thousands of digits
        return '…'


def differing(flags: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """Names of the flags whose values are not those of `others`."""
    names = [name for name in flags if flags[name] != others.get(name)]
    return [name for name in names if format_flag(flags[name]) != format_flag(others.get(name))]
