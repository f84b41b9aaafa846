"""Building timm models by name, and fitting weights of any common layout to them."""

import difflib
import json
import math
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict, load_model_config_from_hf
from torch import Tensor, nn

from models.blocks import trace_shapes
from models.grids import format_grid

# Keys under which a checkpoint has its weights; the first match counts. A bare state dict has none of them.
WEIGHT_KEYS = ('model', 'state_dict')
EMA_KEYS = ('model_ema', 'state_dict_ema')


def build(
    name: str, num_classes: int | None, input_size: int, pretrained: bool = False, kwargs: dict | None = None
) -> nn.Module:
    """Builds a timm model and checks that it can process the images.

    Args:
        name: timm's name, with or without a tag of its weights, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        num_classes: size of the head, 0 for no head; None for the model's default.
        input_size: height and width of the images in pixels; passed as `img_size` to models that take it.
        pretrained: True loads timm's own weights, or those of the hub or the folder.
        kwargs: extra arguments of `timm.create_model`; an argument of value None has timm's default.

    Raises:
        ValueError: the model does not exist, refuses the arguments or the images, or has another number of classes.
    """
    if not is_known(name):
        raise ValueError(f'timm has no such model; the nearest names are {", ".join(_nearest_names(name))}')
    options = {'img_size': input_size, 'num_classes': num_classes}
    hub_logging.set_verbosity_error()  # it prints a warning for each of its ten attempts
    try:
        model: Any = _create(name, pretrained, {**options, **(kwargs or {})})
        trace_shapes(model, (input_size, input_size))
    except LocalEntryNotFoundError as error:
        raise ValueError('the weights are not in the cache of the Hub, and the Hub cannot be reached') from error
    except Exception as error:  # anything that the code of a model or a download may raise
        blamed = _find_wrong_kwargs(name, options, kwargs or {}, input_size)
        raise ValueError(f'timm cannot build or run it{blamed}: {first_line(error)}') from error
    if num_classes is not None and model.num_classes != num_classes:
        raise ValueError(f'the model has num_classes={model.num_classes}, but the data has {num_classes} classes')
    return model


def has_source(name: str) -> bool:
    """Whether the name of a model starts with the source of its weights, `hf-hub:` or `local-dir:`."""
    return name.split(':')[0] in ('hf-hub', 'hf_hub', 'local-dir')


def is_known(name: str) -> bool:
    """Whether timm has a model of this name, or the name starts with a source."""
    return has_source(name) or timm.is_model(name)


def normalisation(model: nn.Module, source: str = '') -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel of the images a model expects, for pixel values in [0, 1].

    The configuration stored with the weights of a source, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, has priority over
    that of the model.

    Raises:
        ValueError: the configuration on the hub or in the folder cannot be read.
    """
    config = resolve_data_config({}, model=model)
    kind, _, place = source.partition(':')
    file = Path(place, 'config.json')
    stored: dict[str, Any] = {}
    try:
        if kind != 'local-dir':
            stored = load_model_config_from_hf(place)[0] if has_source(source) else {}
        elif file.exists():
            stored = json.loads(file.read_text(encoding='utf-8'))
            stored = stored.get('pretrained_cfg', stored)
    except Exception as error:  # the hub's client has many kinds
        raise ValueError(f'the configuration of the model cannot be read: {first_line(error)}') from error
    mean, std = (tuple(stored.get(key) or config[key]) for key in ('mean', 'std'))
    return mean, std


def _nearest_names(name: str) -> list[str]:
    # Compared over the length of `name`, so that a short or unfinished name is near to the long names it begins.
    ratios = {key: difflib.SequenceMatcher(None, name, key[: len(name)]).ratio() for key in timm.list_models()}
    return sorted(ratios, key=ratios.__getitem__, reverse=True)[:3]


def _find_wrong_kwargs(name: str, options: dict, kwargs: dict, input_size: int) -> str:
    """' with path_size=8' if a model can be built without these extra arguments but not with them, else ''."""

    def works(extra: dict) -> bool:
        with suppress(Exception):
            trace_shapes(_create(name, False, {**options, **extra}), (input_size, input_size))
            return True
        return False

    if has_source(name) or works(kwargs) or not works({}):
        return ''
    wrong = [key for key in kwargs if not works({key: kwargs[key]})] or kwargs
    return ' with ' + ' '.join(f'{key}={kwargs[key]}' for key in wrong)


def _create(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        # Convolutional models take images of any size, and some families have no stochastic depth.
        refused = [k for k in ('img_size', 'drop_path_rate') if k in kwargs and f"'{k}'" in str(error)]
        if not refused or (refused == ['drop_path_rate'] and kwargs['drop_path_rate']):
            raise
        return _create(name, pretrained, {k: v for k, v in kwargs.items() if k not in refused})


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_weights(checkpoint: dict, ema: bool = False, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint, its keys without the prefixes of DDP and torch.compile.

    The checkpoint is `{'model': …}`, `{'state_dict': …}` or a bare state dict. With `ema` the EMA weights are returned,
    from `{'model_ema': …}` or `{'state_dict_ema': …}`; with a `key` those under it. '' is no key, but may be advised.

    Raises:
        ValueError: the checkpoint has no such weights.
    """
    keys = (key,) if key else EMA_KEYS if ema else WEIGHT_KEYS
    found = [name for name in keys if isinstance(checkpoint.get(name), dict)]
    first_keys = ', '.join(map(str, list(checkpoint)[:5])) or 'none'
    others = [name for name, value in checkpoint.items() if _is_state_dict(value)]
    if (ema or key) and not (found and _is_state_dict(checkpoint[found[0]])):
        kind = 'EMA weights' if ema else 'weights'
        raise ValueError(f'there are no {kind} under {" or ".join(keys)}, only under {", ".join(others) or "no key"}')
    state = checkpoint[found[0]] if found else checkpoint
    if not _is_state_dict(state):
        advised = key == '' and others and not found
        advice = f'; --checkpoint-key {others[0]} takes the weights under that key' if advised else ''
        raise ValueError(
            f'there is no state dict, neither bare nor under {" or ".join(WEIGHT_KEYS)}: keys {first_keys}{advice}'
        )
    return clean_state_dict(clean_state_dict(state))  # twice, as the prefixes come in either order


def _is_state_dict(value: object) -> bool:
    """Whether a value is a dictionary of tensors by name, and not empty."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict that must match the model exactly.

    Raises:
        ValueError: keys or shapes differ; the message names the first of each kind.
    """
    own, size, wanted = model.state_dict(), head_size(model, state), getattr(model, 'num_classes', 0)
    if size not in (0, wanted):
        raise ValueError(f'has a head of {size} classes, but {wanted} are needed')
    resized = [key for key in own if key in state and state[key].shape != own[key].shape]
    differences = [
        _count('missing', [key for key in own if key not in state]),
        _count('unexpected', [key for key in state if key not in own]),
        *[f'{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model' for k in resized[:1]],
    ]
    if any(differences):
        raise ValueError(f'does not fit the model: {"; ".join(filter(None, differences))}')
    model.load_state_dict(state)


def _count(what: str, keys: list[str]) -> str:
    if not keys:
        return ''
    return f'{len(keys)} {what} tensor{"s" * (len(keys) > 1)} ({keys[0]}{", …" * (len(keys) > 1)})'


def adapt(
    model: nn.Module, state: dict[str, Tensor], replace_heads: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts weights for another input size or number of classes, or with other names, to a model.

    Args:
        model: the model into which the weights will be loaded.
        state: with timm's names or with those of its authors if timm can convert them.
        replace_heads: False keeps heads of another size, so that `load_weights` refuses them.

    Returns:
        The state dict, with position embeddings resampled to the model's grid and with the model's own heads where the
        size differs; and a description of each change.

    Raises:
        ValueError: the position embeddings are no square grid, so they cannot be resampled.
    """
    own, state, changes = model.state_dict(), dict(state), []
    inside = {name.removeprefix('backbone.'): x for name, x in state.items() if name.startswith('backbone.')}
    if inside:  # self-supervised methods, such as DINO, keep a projection head beside it
        state = inside
        changes.append('the tensors under backbone. are used')
    has_positions = all('pos_embed' in weights and weights['pos_embed'].dim() == 3 for weights in (own, state))
    grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
    if grid and has_positions:
        prefix = own['pos_embed'].shape[1] - grid[0] * grid[1]
        if state['pos_embed'].shape[1] != own['pos_embed'].shape[1]:
            state['pos_embed'] = _resample_positions(state['pos_embed'], grid, prefix)
            changes.append(f'position embeddings resampled to {format_grid(grid)}')
    if not _matches_without_heads(model, state):
        converted = _convert(model, state)
        if converted is not None and _matches_without_heads(model, converted):
            state = converted
            changes.append('names converted by timm')
    for head in classifiers(model) if replace_heads else ():
        keys = [f'{head}.weight', f'{head}.bias']
        if any(key in own and key in state and own[key].shape != state[key].shape for key in keys):
            state |= {key: own[key] for key in keys if key in own}
            changes.append(f'{head} replaced by a new head of {model.num_classes} classes')
    return state, changes


def _resample_positions(embedding: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Position embeddings (1, prefix + N, D) of a square grid."""
    positions = embedding.shape[1] - prefix
    if positions < 1 or math.isqrt(positions) ** 2 != positions:
        raise ValueError(
            f'does not fit the model: {embedding.shape[1]} position embeddings, without {prefix} for prefix tokens, '
            'are no square grid'
        )
    return resample_abs_pos_embed(embedding, list(grid), num_prefix_tokens=prefix)


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that return logits."""
    config: Any = model.pretrained_cfg
    names = config.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _matches_without_heads(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether names and shapes of all tensors but the heads' are those of the model."""
    heads = tuple(f'{head}.' for head in classifiers(model))

    def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: value.shape for key, value in weights.items() if not key.startswith(heads)}

    return shapes(model.state_dict()) == shapes(state)


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights with the names and shapes of the model, by timm's rules for its family; None if there are none."""
    rules = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if rules is None:
        return None
    try:
        return rules(dict(state), model)
    except Exception:  # weights of another model: `load_weights` will say what differs
        return None


def head_size(model: nn.Module, state: dict[str, Tensor]) -> int:
    """The number of classes of the weights of a model, 0 if they have no head."""
    return next((len(state[f'{head}.weight']) for head in classifiers(model) if f'{head}.weight' in state), 0)


def checksum(weights: dict[str, Tensor]) -> str:
    """Eight hexadecimal digits that identify weights on the CPU."""
    crc = 0
    for name, tensor in sorted(weights.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f'{crc:08x}'


def match_head(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a model a head with as many classes as its weights have, or no head if they have none."""
    count = head_size(model, state)
    timm_model: Any = model
    if count != timm_model.num_classes:
        timm_model.reset_classifier(count)
