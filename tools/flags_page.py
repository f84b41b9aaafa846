"""Writes docs/flags.md from the parser, with one table for each group of flags: `python -m tools.flags_page`."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import flags

PAGE = Path(__file__).parent.parent / 'docs' / 'flags.md'

# The flags of the 2022 release.
RELEASE = frozenset(
    f'--{name}'
    for name in (
        'batch-size epochs distillation-type distillation-alpha distillation-tau distillation-beta w-sample '
        'w-patch w-rand K s-id t-id model teacher-model teacher-path finetune input-size drop drop-path model-ema '
        'no-model-ema model-ema-decay model-ema-force-cpu opt opt-eps opt-betas clip-grad momentum weight-decay '
        'sched lr lr-noise lr-noise-pct lr-noise-std warmup-lr min-lr decay-epochs warmup-epochs cooldown-epochs '
        'patience-epochs decay-rate color-jitter aa smoothing train-interpolation repeated-aug no-repeated-aug '
        'reprob remode recount resplit mixup cutmix cutmix-minmax mixup-prob mixup-switch-prob mixup-mode '
        'data-path data-set inat-category output_dir device seed resume start_epoch eval dist-eval num_workers pin-mem '
        'no-pin-mem distributed world_size dist_url local_rank'
    ).split()
)

ARGPARSE_GROUPS = ('positional arguments', 'options')

INTRODUCTION = """# Flags

`python -m tools.flags_page` writes this page from the parser; `python main.py --help` shows the same.

- ✔ marks the flags of the 2022 release. They keep their names, defaults and meanings, with one exception: in a single
  process `--repeated-aug` acts only if it is typed.
- Dashes and underscores are equal: `--output_dir` is `--output-dir`.
- A flag that takes several values takes them separated by spaces: `--s-id 0 1 2`.
- A wrong value ends the program with exit status 2 and one line that names the flag and the value.
"""


def page() -> str:
    """The page as Markdown."""
    groups = flags.get_args_parser()._action_groups
    return '\n'.join([INTRODUCTION, *(section(group) for group in groups if group.title not in ARGPARSE_GROUPS)])


def section(group: argparse._ArgumentGroup) -> str:
    """The heading and the table of a group."""
    title = group.title or ''
    lines = [
        f'## {title[:1].upper()}{title[1:]}',
        '',
        '| flag | release | default | values | meaning |',
        '|---|---|---|---|---|',
    ]
    return '\n'.join([*lines, *(row(action) for action in group._group_actions), ''])


def row(action: argparse.Action) -> str:
    """The row of a flag."""
    names = '<br>'.join(f'`{name}`' for name in action.option_strings)
    mark = '✔' if RELEASE.intersection(action.option_strings) else ''
    cells = names, mark, default(action), ', '.join(values(action)), action.help or ''
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def default(action: argparse.Action) -> str:
    """The default as it is typed; empty if the help text describes it, or if the flag turns another one off."""
    if isinstance(action.default, bool):
        turns_off = isinstance(action, argparse._StoreFalseAction)
        return '' if turns_off else 'on' if action.default else 'off'
    return f'`{action.default}`' if action.default or action.default == 0 else ''


def values(action: argparse.Action) -> Iterator[str]:
    """What a flag takes, where it is not just one number or word."""
    if action.choices is not None:
        yield from (f'`{choice}`' for choice in action.choices)
    elif action.metavar:
        names = str(action.metavar).strip('{}').split(',')
        yield from (f'`{name}`' for name in names)
    if action.nargs == 0:
        yield 'switch'
    elif action.nargs in ('*', '+'):
        yield 'several values'


if __name__ == '__main__':
    PAGE.write_text(page())
