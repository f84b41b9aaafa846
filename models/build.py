"""Building timm models by name and fitting weights of any common layout to them."""

import difflib
import json
import math
import sys
from pathlib import Path

import timm
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict, load_model_config_from_hf
from torch import Tensor, nn

from models.blocks import trace_shapes

# Where the weights of a checkpoint lie, first match first; a bare state dict has none of these keys.
WEIGHT_KEYS = ('model', 'state_dict')
EMA_KEYS = ('model_ema', 'state_dict_ema')


def build(
    name: str, num_classes: int | None, input_size: int, pretrained: bool = False, kwargs: dict | None = None
) -> nn.Module:
    """A timm model.

    Args:
        name: timm's name, with or without a tag of its weights, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        num_classes: size of the head, 0 for none; None for the model's own.
        input_size: passed as `img_size` to models that take it.
        pretrained: with timm's own weights, or those of the hub or the folder.
        kwargs: further arguments of the model's constructor; None means timm's default.

    Raises:
        ValueError: there is no such model, it refuses the arguments or the images, or its head has another size.
    """
    if not has_source(name) and not timm.is_model(name):
        raise ValueError(f'timm has no such model; the nearest names: {", ".join(_nearest(name))}')
    kwargs = {'img_size': input_size, 'num_classes': num_classes, **(kwargs or {})}
    try:
        model = _create(name, pretrained, kwargs)
        trace_shapes(model, (input_size, input_size))
    except Exception as error:  # whatever a constructor or a download of somebody else's raises
        raise ValueError(f'timm cannot build or run it: {first_line(error)}') from error
    if num_classes is not None and model.num_classes != num_classes:
        raise ValueError(f'its head has num_classes={model.num_classes}, the data {num_classes}')
    return model


def has_source(name: str) -> bool:
    """Whether a model's name says where it and its weights come from, `hf-hub:` or `local-dir:`."""
    return name.split(':')[0] in ('hf-hub', 'hf_hub', 'local-dir')


def normalisation(model: nn.Module, source: str = '') -> tuple[tuple, tuple]:
    """Mean and standard deviation of the channels of a model's images, values in 0 … 1, by timm's configuration.

    Args:
        model: a timm model.
        source: where its weights come from; the configuration beside those of `hf-hub:OWNER/NAME` or
            `local-dir:FOLDER` counts.

    Raises:
        ValueError: the hub does not give it.
    """
    config = resolve_data_config({}, model=model)
    kind, _, place = source.partition(':')
    beside = {}
    try:
        if kind == 'local-dir' and (Path(place) / 'config.json').exists():
            beside = json.loads((Path(place) / 'config.json').read_text(encoding='utf-8'))
            beside = beside.get('pretrained_cfg', beside)
        elif has_source(source) and kind != 'local-dir':
            beside = load_model_config_from_hf(place)[0]
    except Exception as error:  # the hub's client has a dozen kinds
        raise ValueError(f'its configuration cannot be read: {first_line(error)}') from error
    return tuple(tuple(beside.get(key) or config[key]) for key in ('mean', 'std'))


def _nearest(name: str) -> list[str]:
    # Compared at the same length, or a misspelt beginning of a long name would be far from all names.
    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name, candidate[: len(name)]).ratio()

    return sorted(timm.list_models(), key=likeness, reverse=True)[:3]


def _create(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        # Convolutional models take images of any size, some families have no stochastic depth.
        refused = [k for k in ('img_size', 'drop_path_rate') if k in kwargs and f"'{k}'" in str(error)]
        if not refused or (refused == ['drop_path_rate'] and kwargs['drop_path_rate']):
            raise
        return _create(name, pretrained, {k: v for k, v in kwargs.items() if k not in refused})


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_weights(checkpoint: dict, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, its keys without the prefixes of DDP and torch.compile.

    Args:
        checkpoint: `{'model': …}`, `{'state_dict': …}` or a bare state dict.
        ema: the averaged weights instead, `{'model_ema': …}`.

    Raises:
        ValueError: it holds no such weights.
    """
    keys = EMA_KEYS if ema else WEIGHT_KEYS
    found = [key for key in keys if isinstance(checkpoint.get(key), dict)]
    if ema and not found:
        raise ValueError('holds no EMA weights')
    state = checkpoint[found[0]] if found else checkpoint
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f'holds no state dict: its keys are {", ".join(map(str, list(checkpoint)[:5])) or "none"}')
    return clean_state_dict(clean_state_dict(state))  # twice, as the prefixes come in either order


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict that must fit exactly.

    Raises:
        ValueError: keys or shapes differ; the first of each is named.
    """
    own = model.state_dict()
    faults = [
        _count('lacks', [key for key in own if key not in state]),
        _count('has unknown', [key for key in state if key not in own]),
        *[
            f'{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model'
            for key in own
            if key in state and state[key].shape != own[key].shape
        ][:1],
    ]
    if any(faults):
        raise ValueError(f'does not fit the model: {"; ".join(filter(None, faults))}')
    model.load_state_dict(state)


def _count(verb: str, keys: list[str]) -> str:
    return f'{verb} {len(keys)} tensor{"s"[: len(keys) > 1]} ({keys[0]}{", …"[: 3 * (len(keys) > 1)]})' if keys else ''


def adapt(
    model: nn.Module, state: dict[str, Tensor], replace_heads: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Fits weights of another input size, class count or naming to a model.

    Args:
        model: the model to load into.
        state: its state dict at another size, or as its authors released it, where timm knows how to convert that.
        replace_heads: False leaves heads of another size as they are, for `load_weights` to refuse.

    Returns:
        The state dict with position embeddings resampled to the model's grid and heads of another size replaced by
        the model's own fresh ones; and what was done, in words.

    Raises:
        ValueError: its positions are those of another kind of model.
    """
    own, state, done = model.state_dict(), dict(state), []
    embedding = state.get('pos_embed')
    grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
    if grid and _flat(own) and _flat(state) and embedding.shape[1] != own['pos_embed'].shape[1]:
        prefix = own['pos_embed'].shape[1] - grid[0] * grid[1]
        positions = embedding.shape[1] - prefix
        if positions < 1 or math.isqrt(positions) ** 2 != positions:
            raise ValueError(
                f'does not fit the model: its {embedding.shape[1]} position embeddings are no square grid '
                f'beside {prefix} prefix tokens'
            )
        state['pos_embed'] = resample_abs_pos_embed(embedding, list(grid), num_prefix_tokens=prefix)
        done.append(f'position embeddings resampled to {grid[0]}×{grid[1]}')
    if not _fits(model, state):
        converted = _convert(model, state)
        if converted is not None and _fits(model, converted):
            state = converted
            done.append("converted by timm's rules for the model")
    for head in classifiers(model) if replace_heads else ():
        keys = [f'{head}.weight', f'{head}.bias']
        if any(key in own and key in state and own[key].shape != state[key].shape for key in keys):
            state |= {key: own[key] for key in keys if key in own}
            done.append(f'{head} replaced by a fresh one of {model.num_classes} classes')
    return state, done


def _flat(state: dict[str, Tensor]) -> bool:
    """Whether there are absolute positions of all patches, (1, tokens, channels)."""
    return 'pos_embed' in state and state['pos_embed'].dim() == 3


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that put out logits."""
    names = model.pretrained_cfg.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether names and shapes are the model's, but for its heads."""
    heads = tuple(f'{head}.' for head in classifiers(model))
    ours, theirs = ({k: v.shape for k, v in weights.items() if not k.startswith(heads or ('\0',))}
                    for weights in (model.state_dict(), state))  # fmt: skip
    return ours == theirs


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights under the names and in the shapes of the model, by timm's rules for its family; None without any."""
    rules = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if rules is None:
        return None
    try:
        return rules(dict(state), model)
    except Exception:  # the weights of something else; what does not fit is said when they are loaded
        return None


def match_head(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a model a head of as many classes as its weights have; none if they have none."""
    found = [len(state[f'{head}.weight']) for head in classifiers(model) if f'{head}.weight' in state]
    count = found[0] if found else 0
    if count != model.num_classes:
        model.reset_classifier(count)
