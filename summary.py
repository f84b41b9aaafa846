"""What is printed before a run starts: versions, device, batch, learning rate, images, loss, and warnings."""

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch
import torchvision
from torch.utils.data import DataLoader

import utils
from datasets import ImageNetFolder
from flags import FUSED, Config, DataConfig, OptimConfig, RunConfig, get_args_parser
from loggers import log_rank0
from losses import LOGIT_LOSSES, RELATION_TERMS, ManifoldDistillationLoss
from models import TappedModel, uses_fused_talking_heads
from samplers import distinct_images
from utils import flag_name, fusing_problem


def log_environment(flags: RunConfig, device: torch.device) -> None:
    """What runs where, before any file is read."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    log_rank0(
        f'versions    torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, '
        f'Python {platform.python_version()}'
    )
    log_rank0(f'device      {device} ({name}), {str(flags.autocast_dtype(device)).removeprefix("torch.")}')
    if flags.device != 'cpu' and device.type == 'cpu':
        log_rank0(f'warning: --device {flags.device}: there is no CUDA device, running on the CPU')


def log_fused(config: Config, device: torch.device, teacher: TappedModel | None) -> None:
    """On a GPU the parts of --fused that the run uses, after the teacher is built, which may not have the heads."""
    if device.type != 'cuda' or config.run.eval:
        return
    in_vain = {name for names, _, met in _conditions() if not met(config) for name in names}
    if teacher is None or not uses_fused_talking_heads(teacher.model):
        in_vain.add('fused talking-heads')
    parts = [part for part in config.run.fused_parts(device) if f'fused {part}' not in in_vain]
    problem = fusing_problem(device) if config.run.fused is None else ''
    log_rank0(f'fused       {", ".join(parts) or "none"}{problem and f" ({problem})"}')


def log_data(data: DataConfig, num_classes: int) -> None:
    """The data set, before any model is built."""
    log_rank0(f'data        {data.data_set} {data.data_path or "(generated)"}, {num_classes} classes')


def log_batch(optim: OptimConfig, seed: int) -> None:
    """The global batch and its learning rate."""
    world = utils.get_world_size()
    total = optim.rank_batch_size * world
    passes = f' × {optim.accum_steps} passes' if optim.accum_steps > 1 else ''
    log_rank0(f'batch       {counted(world, "rank")} × {optim.batch_size} images{passes} = {total} per step')
    rate = f'{optim.lr:g} × {total}/512 = {optim.scaled_lr(world):g}'
    log_rank0(f'lr          {rate}, {optim.opt}, {optim.sched}, seed {seed}')


def log_images(train: DataLoader, val: DataLoader, repeated_aug: bool, wanted: bool | str) -> None:
    """How many images there are, and in which order they are trained on. `wanted` is the flag --repeated-aug."""
    sizes = f'{len(train.dataset):,} for training, {len(val.dataset):,} for validation'  # type: ignore[arg-type]
    log_rank0(f'images      {sizes}, {counted(len(train), "step")} per epoch')
    if repeated_aug:
        batch = train.batch_size or 0
        distinct = distinct_images(batch, utils.get_world_size())
        log_rank0(f"sampler     repeated augmentation: {distinct} distinct images in a rank's batch of {batch}")
    else:
        why = ' (repeated augmentation starts at two ranks)' if wanted else ''
        log_rank0(f'sampler     shuffled without repeats{why}')


def warn_of_short_run(optim: OptimConfig, steps: int) -> None:
    """Warns if the run, of so many steps per epoch, is too short for warmup or EMA."""
    if optim.epochs <= optim.warmup_epochs:
        log_rank0(f'warning: --warmup-epochs {optim.warmup_epochs}: training ends before warmup completes')
    total = optim.epochs * steps
    if optim.model_ema and total * (1 - optim.model_ema_decay) < 3:
        log_rank0(
            f'warning: --model-ema-decay {optim.model_ema_decay:g}: {total:,} steps are too few for this decay; the '
            'EMA will stay close to the initial weights'
        )


def warn_of_missing_classes(val: DataLoader, data_path: str, num_classes: int) -> None:
    """Warns if --data-set IMNET has a part of ImageNet's 1000 classes only."""
    folders = getattr(val.dataset, 'dataset', None)
    if isinstance(folders, ImageNetFolder) and len(folders.classes) < num_classes:
        found = f'{len(folders.classes)} class folders of {num_classes}'
        log_rank0(f"warning: --data-path {data_path} has {found}; class numbers are ImageNet's")


def warn_of_other_classes(files: Sequence[tuple[str, dict[str, Any]]], names: list[str]) -> None:
    """Warns if the classes that a weights file names are not those of the data.

    Args:
        files: the flag that names a file, and its contents.
        names: of the classes of the data, by number.
    """
    for source, file in files:
        record = file.get('student')
        recorded = record.get('classes') if isinstance(record, dict) else None
        if not isinstance(recorded, list) or len(recorded) != len(names):
            continue
        differing = [i for i in range(len(names)) if recorded[i] and names[i] and recorded[i] != names[i]]
        if differing:
            i = differing[0]
            log_rank0(
                f'warning: {source}: {len(differing)} of {len(names)} classes have other names than in the data; class '
                f"{i} is '{recorded[i]}' in the file, '{names[i]}' in the data. Results are wrong if these differ"
            )


def describe_loss(criterion: ManifoldDistillationLoss, patches: int, batch_size: int) -> str:
    """The loss as a formula, and the images that its relations connect.

    Args:
        criterion: the loss.
        patches: patch tokens per image of a layer pair, the fewest of all pairs; 0 without pairs.
        batch_size: images of each rank.
    """
    if criterion.distillation_type == 'none':
        return 'CE, no teacher'
    text = f'{1 - criterion.alpha:g}·CE + {criterion.alpha:g}·KD ({criterion.distillation_type}, τ {criterion.tau:g})'
    text = text if criterion.alpha else 'CE, no KD'
    if not patches:
        return text + '; no relation terms without --s-id and --t-id'
    terms = []
    ranks = utils.get_world_size() if criterion.relations == 'global' else 1
    drawn = min(criterion.K, ranks * batch_size * patches)
    for name, term in RELATION_TERMS.items():
        if criterion.weights[name] or term.default_weight:
            tokens = f' of {drawn} tokens' if 'K' in term.reads else ''
            terms.append(f'{criterion.weights[name]:g}·{term.label}{tokens}')
    owner = 'a rank' if criterion.relations == 'rank' else counted(ranks, 'rank')
    return f'{text} + {criterion.beta:g}·({" + ".join(terms)}), means over the {ranks * batch_size} images of {owner}'


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f'{number:,} {noun}{"s"[: number != 1]}'


# Flags without effect -------------------------------------------------------------------------------------------------

Condition = tuple[tuple[str, ...], str, Callable[[Config], object]]


def _read_by_terms(option: str) -> Callable[[Config], bool]:
    return lambda c: any(weight and option in RELATION_TERMS[name].reads for name, weight in c.loss.weights.items())


# fmt: off
def _conditions() -> Iterator[Condition]:
    """Names of flags, what they need in words, and whether that is so. The first need that is not met is reported.

    Each part of --fused has a name of its own, as in 'fused full'.
    """
    weights = [f'w_{name}' for name in RELATION_TERMS]
    relations = (*weights, 'K', 'relations', 'distillation_beta', 'relation_dtype', 'token_align', 'max_patches',
        'fused relations', 'fused full')
    yield (*relations, 'distillation_alpha', 'distillation_tau'), 'a teacher', lambda c: c.loss.has_teacher
    yield ('teacher_input_size', 'teacher_dtype', 'fused talking-heads'), 'a teacher', (
        lambda c: c.loss.has_teacher or c.run.eval_teacher)
    yield relations, '--s-id and --t-id', lambda c: c.model.s_id
    yield ('s_id', *relations), 'a relation whose weight is not 0', lambda c: c.model.s_id and c.loss.has_relations
    yield ('distillation_type',), 'a weight of KD or of a relation', (
        lambda c: c.loss.distillation_alpha or (c.model.s_id and c.loss.has_relations))
    *most, last = (name for name, loss in LOGIT_LOSSES.items() if loss.reads_tau)
    yield ('distillation_tau',), f'--distillation-type {", ".join(most)} or {last}', (
        lambda c: LOGIT_LOSSES[c.loss.distillation_type].reads_tau)
    yield ('distillation_tau',), '--distillation-alpha above 0', lambda c: c.loss.distillation_alpha
    yield ('smoothing',), '--distillation-alpha below 1', (
        lambda c: not c.loss.has_teacher or c.loss.distillation_alpha < 1)
    for option in ('K', 'relations', 'relation_dtype'):
        readers = [f'--w-{name}' for name, term in RELATION_TERMS.items() if option in term.reads]
        listed = ' or '.join([', '.join(readers[:-1]), readers[-1]] if readers[1:] else readers)
        yield (option,), f'{listed} above 0', _read_by_terms(option)
    yield ('fused relations',), '--w-sample, --w-patch or --w-rand above 0', (
        lambda c: any(c.loss.weights[name] for name in ('sample', 'patch', 'rand')))
    yield ('fused full',), '--w-full above 0', lambda c: c.loss.weights['full']
    yield ('fused erasing',), 'random erasing', lambda c: c.augment.reprob and not c.augment.no_aug
    yield ('max_patches',), '--token-align merge', lambda c: c.model.token_align == 'merge'
    yield ('model_ema_decay', 'model_ema_force_cpu', 'eval_ema'), '--model-ema', lambda c: c.optim.model_ema
    yield ('decay_epochs',), '--sched step', lambda c: c.optim.sched == 'step'
    yield ('decay_rate',), '--sched step or poly', lambda c: c.optim.sched in ('step', 'poly')
    yield ('min_lr',), '--sched cosine, tanh or poly', lambda c: c.optim.sched != 'step'
    yield ('warmup_lr',), '--warmup-epochs above 0', lambda c: c.optim.warmup_epochs
    yield ('lr_noise_pct', 'lr_noise_std'), '--lr-noise', lambda c: c.optim.lr_noise
    yield ('aa', 'color_jitter', 'train_interpolation', 'reprob', 'remode', 'recount'), (
        'augmentation: --no-aug is set'), lambda c: not c.augment.no_aug
    # timm looks for 3a in the same way.
    yield ('color_jitter',), '--aa none or 3a', lambda c: not c.augment.policy or '3a' in c.augment.aa
    yield ('remode', 'recount'), '--reprob above 0', lambda c: c.augment.reprob
    yield ('mixup_prob', 'mixup_mode'), '--mixup or --cutmix', lambda c: c.augment.uses_mixing
    yield ('mixup_switch_prob',), 'both --mixup and --cutmix', (
        lambda c: c.augment.mixup and (c.augment.cutmix or c.augment.cutmix_minmax))
    yield ('keep', 'save_interval_minutes', 'save_interval_steps', 'log_to'), '--output_dir', lambda c: c.run.output_dir
# fmt: on


def flags_without_effect(config: Config) -> list[str]:
    """One sentence for each group of typed flags that do nothing in this run."""
    default, values = get_args_parser().get_default, config.flags()
    values |= {f'fused {part}': part if part in (config.run.fused or ()) else None for part in FUSED}
    reported, found = set[str](), []
    for names, needed, met in _conditions():
        typed = [name for name in names if name not in reported and values[name] != default(name)]
        if typed and not met(config):
            found.append(f'{", ".join(map(flag_name, typed))}: no effect without {needed}')
            reported.update(typed)
    return found
