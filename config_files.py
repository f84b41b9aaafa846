"""Flags in YAML files: `--config FILE` reads them, and each run writes its own as `args.yaml`."""

import difflib
import platform
import shlex
import subprocess
import sys
from argparse import Action
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from utils import UsageError, path_hint

ARGS = 'args.yaml'


def read_config(path: str, actions: Iterable[Action]) -> tuple[list[str], set[str]]:
    """The flags in a file.

    Args:
        path: of a YAML file with one `flag: value` per line, with dashes or underscores.
        actions: argparse's, of all flags.

    Returns:
        The words of a command line, without values that are the default of their flag; and the names of all fields
        that have a value in the file.

    Raises:
        UsageError: the file cannot be read, or has a key that is no flag.
    """
    known = {name.lstrip('-').replace('-', '_'): each for each in actions for name in each.option_strings}
    words, names = list[str](), set[str]()
    for key, value in _read_mapping(path).items():
        action = known.get(str(key).replace('-', '_'))
        if action is None or action.dest == 'help':
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UsageError(f'--config {path}: {key} is no flag' + (f'; did you mean {near[0]}?' if near else ''))
        words += _words(action, str(key), value)
        names |= {action.dest} if value is not None else set()
    return words, names


def _read_mapping(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        hint = path_hint(Path(path)) if isinstance(error, FileNotFoundError) else ''
        raise UsageError(f'--config {path}: {error.strerror}{hint}') from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f'--config {path}: is not a YAML file: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise UsageError(f'--config {path}: must have one `flag: value` per line')
    return content


def _words(action: Action, key: str, value: Any) -> list[str]:
    """`value` as it is typed after a flag; nothing if it is the default."""
    name = f'--{key.replace("_", "-")}'
    if action.nargs == 0:  # a switch
        if action.const is False:  # a counterpart, such as --no-model-ema
            return [name] * bool(value)
        return [] if value == action.default else [name if value else f'--no-{name[2:]}']
    if value is True and action.nargs == '?':  # a flag that takes a value or none
        return [name]
    if value is None or value == action.default or value in ([], {}):
        return []
    if isinstance(value, dict):
        return [name, *(f'{each}={item}' for each, item in value.items())]
    if isinstance(value, list):
        return [name, *map(str, value)] if action.nargs else [name, ','.join(map(str, value))]
    return [name, str(value)]


def write_args(folder: Path, flags: Mapping[str, Any]) -> None:
    """Writes all flags of a run, with its versions and its command as comments, so that --config can read them."""
    head = [
        f'# {shlex.join([sys.executable, *sys.argv])}',
        f'# torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}',
        f'# commit {_git_commit()}',
    ]
    values = {name: value for name, value in flags.items() if name != 'config'}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    (folder / ARGS).write_text('\n'.join(head) + '\n' + text, encoding='utf-8', errors='replace')


def _git_commit() -> str:
    """The commit of this program, and whether files differ from it."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'
