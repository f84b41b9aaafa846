"""Types of the values of flags: functions from text to value, which raise argparse's error in plain words."""

import argparse
import math
import re
from collections.abc import Callable

from timm.utils import ParseKwargs

import datasets
from loggers import parse_sinks


def _number(kind: type, ends: str, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a `kind` in an interval, whose `ends` are as in mathematics: '[)' is low ≤ x < high."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above = low <= value if ends[0] == '[' else low < value
        below = value <= high if ends[1] == ']' else value < high
        if not (above and below):
            name = 'whole number' if kind is int else 'number'
            least = f'of at least {low:g}' if ends[0] == '[' else f'above {low:g}'
            most = '' if high == math.inf else f' and {"at most" if ends[1] == "]" else "below"} {high:g}'
            raise argparse.ArgumentTypeError(f'{text}: must be a {name} {least}{most}')
        return value

    return convert


POSITIVE_INT = _number(int, '[)', 1)
NON_NEGATIVE_INT = _number(int, '[)', 0)
SEED = _number(int, '[)', 0, 2**63)
FRACTION = _number(float, '[]', 0, 1)
FRACTION_BELOW_1 = _number(float, '[)', 0, 1)
NON_NEGATIVE = _number(float, '[)', 0)
POSITIVE = _number(float, '()', 0)


def block_id(text: str) -> int | str:
    if text != 'auto' and not re.fullmatch(r'-?\d+', text):
        raise argparse.ArgumentTypeError(f'{text} is neither a whole number nor auto')
    return text if text == 'auto' else int(text)


def compile_mode(text: str) -> bool | str:
    """True for blocks, which is also what --compile means without a value."""
    if text not in ('blocks', 'models'):
        raise argparse.ArgumentTypeError(f'{text}: must be blocks or models')
    return text == 'blocks' or text


def sinks(text: str) -> list[str]:
    try:
        return parse_sinks(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def data_set(text: str) -> str:
    try:
        return datasets.parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class KeyValues(ParseKwargs):
    """timm's `key=value …` action, with an error for a word of another form."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} {value}: must have the form KEY=VALUE')
            if re.fullmatch(r'[^=]+=[^=]*(,\w+=[^=]*)+', value):
                parser.error(f'{option_string} {value}: put spaces between the pairs: {value.replace(",", " ")}')
        super().__call__(parser, namespace, values, option_string)
