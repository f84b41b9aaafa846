"""The weights files of a run, and what they say about their models: flags, normalisation, names of classes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import checkpoints
import datasets
import models
from flags import Config, DataConfig
from loggers import log_rank0
from utils import UsageError, flag_name, format_values, usage_error_context

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, values in 0 … 1


@dataclass(frozen=True)
class WeightsFiles:
    """Contents of a run's weights files, as `checkpoints.read_checkpoint` returns them; {} for no file."""

    resume: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)  # not read with --resume, whose weights count
    teacher: dict[str, Any] = field(default_factory=dict)

    def with_logits(self, config: Config) -> list[tuple[str, dict[str, Any]]]:
        """The files whose logits are compared with the classes of the data, by the flag that names them."""
        model, run = config.model, config.run
        found = []
        if run.eval:
            found = [(f'--resume {run.resume}', self.resume), (f'--finetune {model.finetune}', self.finetune)]
        if config.loss.distillation_alpha or run.eval_teacher:
            found.append((f'--teacher-path {model.teacher_path}', self.teacher))
        return found


def read_weights(config: Config, resume: dict[str, Any]) -> tuple[Config, WeightsFiles]:
    """Reads the other weights files, and takes from all of them which models they belong to.

    Args:
        config: the flags.
        resume: contents of the checkpoint that --resume names, {} for none.

    Returns:
        The flags, with those of the files' own runs where the user has typed none; and the files.

    Raises:
        UsageError: a file cannot be read, or a flag contradicts it.
    """
    model, needs_teacher = config.model, config.distills or config.run.eval_teacher
    finetune = {} if resume else _read('--finetune', model.finetune)
    files = WeightsFiles(resume, finetune, _read('--teacher-path', model.teacher_path) if needs_teacher else {})
    student = {'model': 'model', 'model_kwargs': 'model_kwargs', 'input_size': 'input_size'}
    teacher = {'model': 'teacher_model', 'model_kwargs': 'teacher_kwargs'}
    model = adopt(model, config.typed, f'--resume {config.run.resume}', files.resume, student)
    model = adopt(model, config.typed, f'--finetune {model.finetune}', files.finetune, student)
    model = adopt(model, config.typed, f'--teacher-path {model.teacher_path}', files.teacher, teacher)
    return replace(config, model=model), files


def adopt_data(config: Config, resume: dict[str, Any]) -> DataConfig:
    """The data flags of an evaluation: those of the checkpoint's own run where the user has typed none."""
    if 'data_set' in config.typed:
        return config.data
    names = {name: name for name in ('data_set', 'inat_category', 'num_classes')}
    data = adopt(config.data, config.typed, f'--resume {config.run.resume}', resume, names)
    if data.data_set.startswith('wds/') and data.num_classes is None:  # val/ may lack the largest class
        data = replace(data, num_classes=resume.get('data', {}).get('classes'))
    return data


def _read(flag: str, source: str) -> dict[str, Any]:
    if not source:
        return {}
    with usage_error_context(flag, source):
        return checkpoints.read_checkpoint(source)


def adopt(part: Any, typed: frozenset[str], source: str, checkpoint: dict[str, Any], names: Mapping[str, str]) -> Any:
    """A config with the flags of the run that wrote a weights file, where they were not typed.

    Args:
        part: a config of `flags`.
        typed: fields of configs whose flags were typed.
        source: the flag that names the file and its value, for messages.
        checkpoint: contents of the file. Only a file whose model timm knows is asked.
        names: fields of `part` by their names in the file.

    Raises:
        UsageError: --model or --model-kwargs was typed and is not that of the file.
    """
    saved = checkpoints.flags_of(checkpoint)
    if not models.is_known(str(saved.get('model'))):
        return part
    changes = {}
    for key, name in names.items():
        was, now = saved.get(key), getattr(part, name)
        if key not in saved or not _IS_VALID[key](was):
            continue
        if name not in typed:
            changes[name] = was
        elif key in _IS_SAME and not _IS_SAME[key](was, now):
            flag = flag_name(name)
            raise UsageError(
                f'{source}: was trained with {flag_name(key)} {format_values(was)}, but {flag} is '
                f'{format_values(now)}; leave out {flag} to use what the file says'
            )
    shown = [f'{flag_name(k)} {format_values(v)}' for k, v in changes.items() if v != getattr(part, k)]
    if shown:
        log_rank0(f'flags       {" ".join(shown)}, from {source}')
    return replace(part, **changes)


def _same_model(one: str, other: str) -> bool:
    """Whether two names may be of one architecture.

    A tag after the dot names weights, `_384` at the end of a name only the size of the images. A folder may have moved.
    """
    if models.has_source(one) or models.has_source(other):
        return True
    one, other = (re.sub(r'(_window\d+)?_\d{2,3}$', '', name.split('.')[0]) for name in (one, other))
    return one == other


def _same_kwargs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether kwargs are the same, apart from drop rates, which have an effect in training only."""
    one, other = ({k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()} for kwargs in (one, other))
    return all(one.get(key) == other.get(key) for key in {*one, *other} if 'drop' not in key)


_IS_SAME: dict[str, Callable[[Any, Any], bool]] = {'model': _same_model, 'model_kwargs': _same_kwargs}
# Which values of a file can be used: it may be of a program with other flags of the same names.
_IS_VALID: dict[str, Callable[[Any], bool]] = {
    'model': lambda value: True,  # has been checked
    'model_kwargs': lambda value: isinstance(value, dict),
    'input_size': lambda value: type(value) is int and value > 0,
    'data_set': lambda value: isinstance(value, str) and datasets.is_name(value),
    'inat_category': lambda value: value in datasets.INAT_CATEGORIES,
    'num_classes': lambda value: value is None or (type(value) is int and value > 0),
}


def recorded_stats(checkpoint: dict[str, Any]) -> Stats | None:
    """The normalisation of the images that a checkpoint was trained on; None if it does not say."""
    record = checkpoint.get('student')
    if not isinstance(record, dict):
        return None
    mean, std = record.get('mean'), record.get('std')
    for values in (mean, std):
        if not isinstance(values, list | tuple) or [*map(type, values)] != [float] * 3:
            return None
    return tuple(mean), tuple(std)  # type: ignore[arg-type]
