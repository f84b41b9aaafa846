"""What several tools share: a finished run with its flags, flags of main.py, figures, errors in one line."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import checkpoints
import models
from flags import ModelConfig, Parser
from pair import num_classes_of
from utils import UsageError, flag_name, usage_error_context

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
FIGURE_ENDINGS = ('.png', '.svg', '.pdf')


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with exit status 2 after one line on stderr, if the user asked for something impossible."""
    try:
        yield
    except UsageError as error:
        print(f'{program}: error: {error}', file=sys.stderr)
        raise SystemExit(2) from None


def missing_package(name: str, purpose: str) -> UsageError:
    """The error for a package that is not installed."""
    return UsageError(f'{purpose} needs the package {name}: pip install {name}')


# Runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedRun:
    """A checkpoint, the flags of its models, and how many classes its student has."""

    source: str  # as it was typed
    path: str  # of the file that was read
    checkpoint: dict[str, Any]
    config: ModelConfig
    num_classes: int
    typed: frozenset[str]  # fields of the config that the run or the user has set, and no other weights file may

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """The student's weights, or their moving average. Raises UsageError if there are none."""
        with usage_error_context('--ema' if ema else 'RUN', self.source):
            return models.named_weights(self.checkpoint, ema)


def read_named_weights(flag: str, source: str) -> dict[str, Tensor]:
    """The weights of a source as in `read_source`. Raises UsageError if there are none."""
    with usage_error_context(flag, source):
        return models.named_weights(read_source(flag, source)[1])


def read_source(flag: str, source: str) -> tuple[str, dict[str, Any]]:
    """Path and contents of a checkpoint: a file, URL or hub name, or the newest one of the folder of a run."""
    with usage_error_context(flag, source):
        if not Path(source).is_dir():
            return source, checkpoints.read_checkpoint(source)
        path, checkpoint, errors = checkpoints.read_newest(Path(source))
    for error in errors:
        print(f'warning: {error}; {path.name} is used', file=sys.stderr)
    return str(path), checkpoint


def read_run(source: str, typed: dict[str, Any]) -> FinishedRun:
    """Reads a checkpoint and finds out which models it belongs to.

    Args:
        source: as in `read_source`.
        typed: values of flags that replace those of the run, by the names of the fields of `ModelConfig`.

    Raises:
        UsageError: there is no such file, it has no weights, or its model is not known or cannot be built.
    """
    path, checkpoint = read_source('RUN', source)
    saved = checkpoints.flags_of(checkpoint)
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    values = {name: saved[name] for name in names if name in saved} | typed
    if 'model' not in values:
        raise UsageError(f'RUN {source}: does not contain the flags of its run; name the model with --model')
    config = ModelConfig(**values)
    config.check()
    with usage_error_context('RUN', source):
        weights = models.named_weights(checkpoint)
    with usage_error_context('--model', f'{config.model} with --input-size {config.input_size}'):
        # Only the weights say how many classes there are; they are not loaded here.
        model = models.build(config.model, None, config.input_size, kwargs=config.model_kwargs)
        models.match_head(model, weights)
    kept = frozenset({'model', 'model_kwargs', 'input_size', *typed})
    return FinishedRun(source, path, checkpoint, config, num_classes_of(model), kept)


def add_model_flags(parser: Parser, names: Sequence[str]) -> None:
    """Adds flags of main.py. Only those that are typed get a value, so that a run's own flags hold otherwise."""
    group = parser.add_argument_group("in place of the run's own flags, as in main.py")
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for name in names:
        metadata = fields[name].metadata
        spellings = metadata['names'] or [flag_name(name)]
        options = {**metadata['options'], 'help': metadata['help'], 'default': dataclasses.MISSING}
        group.add_argument(*spellings, dest=name, **options)


def typed_flags(args: Any, names: Sequence[str]) -> dict[str, Any]:
    """The values of the flags of `add_model_flags` that were typed."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not dataclasses.MISSING}


# Figures --------------------------------------------------------------------------------------------------------------


def check_figure_path(path: str, program: str, endings: Sequence[str] = FIGURE_ENDINGS) -> None:
    """Raises UsageError, before any work, if a figure cannot be written: unknown ending, no folder, no matplotlib."""
    if Path(path).suffix.lower() not in endings:
        raise UsageError(f'--out {path}: must end in {", ".join(endings[:-1])} or {endings[-1]}')
    if not Path(path).parent.is_dir():
        raise UsageError(f'--out {path}: the folder {Path(path).parent} does not exist')
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise missing_package('matplotlib', program) from None


def save_figure(figure: Any, path: str, dpi: int = 150) -> None:
    """Writes a figure in the format of its ending. Raises UsageError if the file cannot be written."""
    with usage_error_context('--out', path):
        # An equal figure gives an equal file, without the time of writing.
        key = {'.svg': 'Date', '.pdf': 'CreationDate'}.get(Path(path).suffix.lower())
        figure.savefig(path, dpi=dpi, metadata={key: None} if key else None)
