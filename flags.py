"""Command-line flags: one dataclass field for each, from which the parser is made, and checks before any work starts.

`parse_args` turns a command line into a `Config` of small frozen parts; each part of the program is given its own.
The flags of the 2022 release keep their names, defaults and meanings.
"""

# ruff: noqa: RUF009  # `flag` is a dataclass field

import argparse
import dataclasses
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

import datasets
import models
from config_files import read_config
from flag_hints import explain_unknown
from flag_types import (
    FRACTION,
    FRACTION_BELOW_1,
    NON_NEGATIVE,
    NON_NEGATIVE_INT,
    POSITIVE,
    POSITIVE_INT,
    SEED,
    KeyValues,
    block_id,
    compile_mode,
    data_set,
    sinks,
)
from loggers import SINKS
from losses import DISTILLATION_TYPES, FUSED_PARTS, RELATION_DTYPES, RELATION_TERMS, RELATIONS
from utils import NO_VALUES, UsageError, format_values, fusing_problem

FUSED = ('talking-heads', *FUSED_PARTS, 'erasing')  # values of --fused


def flag(default: Any, help: str, *names: str, no: str = '', **options: Any) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: its value if it is not passed.
        help: its text in --help; the default is added.
        names: all its spellings; if none, the name of the field with dashes.
        no: help of `--no-<name>`; makes the flag a switch that is on and has this counterpart.
    """
    if isinstance(default, bool) and 'action' not in options:
        options['action'] = 'store_true'
    metadata = {'help': help, 'names': names, 'no': no, 'options': options}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


# The configs ----------------------------------------------------------------------------------------------------------


# One flag per entry, as compact as it can be read.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """method: logit distillation and relation terms"""

    distillation_type: str = flag('none', 'logit distillation; none: no teacher', choices=DISTILLATION_TYPES)
    distillation_alpha: float = flag(0.5, 'weight α of KD; cross-entropy gets 1 − α', type=FRACTION)
    distillation_tau: float = flag(1.0, 'temperature of KD, except hard KD', type=POSITIVE)
    distillation_beta: float = flag(1.0, 'multiplier β on all relation terms', type=NON_NEGATIVE)
    # `--w-<name>` of each row of RELATION_TERMS, by the row's name
    weights: dict[str, float] = field(default_factory=lambda: {k: t.default_weight for k, t in RELATION_TERMS.items()})
    K: int = flag(192, 'random tokens per layer pair', type=POSITIVE_INT)
    relations: str = flag('rank', 'rank: sample, random and full relations connect the images of one rank; global: '
        'those of all ranks (docs/method.md says how much is sent)', choices=RELATIONS)
    relation_dtype: str = flag('float32', 'dtype of the products of the sample, patch and random terms; sums and the '
        'full term keep their precision', choices=RELATION_DTYPES)
    log_grad_share: bool = flag(False, "log each term's share of the gradient norm at the tapped blocks, measured on "
        'one batch after each epoch')

    @property
    def has_teacher(self) -> bool:
        return self.distillation_type != 'none'

    @property
    def has_relations(self) -> bool:
        return bool(self.distillation_beta and any(self.weights.values()))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """models: student, teacher, and the blocks that are compared"""

    model: str = flag('deit_base_patch16_224', 'student: a timm model name, hf-hub:OWNER/NAME or local-dir:FOLDER; '
        'weights are random without --pretrained or --finetune (default with a checkpoint: its model)')
    model_kwargs: dict[str, Any] = flag({}, 'extra kwargs for timm.create_model', nargs='*', action=KeyValues,
        metavar='KEY=VALUE')
    list_blocks: bool = flag(False, 'print the blocks of --model with their grids and widths, and exit')
    teacher_model: str = flag('cait_s24_224', 'teacher: a timm model name, or hf-hub:OWNER/NAME or local-dir:FOLDER '
        'with its weights')
    teacher_kwargs: dict[str, Any] = flag({}, 'extra kwargs for timm.create_model of the teacher', nargs='*',
        action=KeyValues, metavar='KEY=VALUE')
    teacher_dtype: str | None = flag(None, "dtype of the teacher's weights and computation; replaces --amp-dtype for "
        'the teacher (default: float32 weights under --amp-dtype)', choices=('float32', 'bfloat16'))
    teacher_path: str = flag('', "the teacher's weights: a file, URL, hf-hub:OWNER/NAME or local-dir:FOLDER")
    teacher_pretrained: bool = flag(False, "without --teacher-path: timm's pretrained weights of the teacher")
    pretrained: bool = flag(False, "start from timm's pretrained weights of --model; a head of another size is "
        'replaced')
    finetune: str = flag('', 'weights to start from; position embeddings are resampled, a head of another size is '
        'replaced')
    checkpoint_key: str = flag('', 'key of the weights in the file of --teacher-path, or without it of --finetune; '
        'for example teacher or model_ema (default: model or state_dict, or the file itself)')
    input_size: int = flag(224, 'height and width of the images in pixels', type=POSITIVE_INT)
    teacher_input_size: int | None = flag(None, "size of the teacher's images, resized on the device (default: the "
        "student's)", type=POSITIVE_INT)
    s_id: list[int | str] | None = flag(None, 'student blocks whose tokens are compared, counted from 0 (negative: '
        'from the end); auto: the first 4 and the last 4, fewer in shallow models (default: no relation terms)',
        type=block_id, nargs='+')
    t_id: list[int | str] | None = flag(None, 'teacher blocks, paired in order with --s-id; auto if --s-id is auto',
        type=block_id, nargs='+')
    token_align: str = flag('error', 'what to do if paired blocks have different grids. error: refuse; pool: average '
        "to the coarser grid; interpolate: resize the teacher's tokens to the student's grid, bilinear; merge: "
        'concatenate neighbouring tokens of both until at most --max-patches remain', choices=models.ALIGNMENTS)
    max_patches: int = flag(196, 'patch tokens per image that --token-align merge leaves', type=POSITIVE_INT)
    grad_checkpointing: bool = flag(False, "recompute the student's activations in the backward pass to save memory")
    drop: float = flag(0.0, 'dropout after position embedding, attention projection and MLP', type=FRACTION)
    drop_path: float = flag(0.0, 'stochastic depth of the student', type=FRACTION)

    @property
    def student_ids(self) -> list[int | str]:
        return self.s_id or []

    @property
    def teacher_ids(self) -> list[int | str]:
        return self.t_id or []

    @property
    def teacher_size(self) -> int:
        return self.teacher_input_size or self.input_size

    @property
    def has_teacher_weights(self) -> bool:
        """Whether the flags say where the teacher's weights are."""
        return bool(self.teacher_path or self.teacher_pretrained or models.has_source(self.teacher_model))

    def check(self) -> None:
        ids = f'--s-id {format_values(self.student_ids)} and --t-id {format_values(self.teacher_ids)}'
        if 'auto' in self.student_ids + self.teacher_ids and not self.s_id == self.t_id == ['auto']:
            raise UsageError(f'{ids}: auto must be the only value of both')
        if len(self.student_ids) != len(self.teacher_ids):
            counts = f'{len(self.student_ids)} and {len(self.teacher_ids)}'
            raise UsageError(f'{ids}: needs as many blocks in --s-id as in --t-id; got {counts}')
        if self.pretrained and self.finetune:
            raise UsageError(f'--finetune {self.finetune}: --pretrained names other weights; only one can be used')
        if self.checkpoint_key and not (self.teacher_path or self.finetune):
            raise UsageError(f'--checkpoint-key {self.checkpoint_key}: needs the file, --teacher-path or --finetune')


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """optimizer, schedule and moving average"""

    batch_size: int = flag(64, 'images per rank and forward pass', type=POSITIVE_INT)
    accum_steps: int = flag(1, 'forward passes per optimizer step; sample, random and full relations connect the '
        'images of one pass', type=POSITIVE_INT)
    epochs: int = flag(300, 'length of the run and of the schedule', type=POSITIVE_INT)
    opt: str = flag('adamw', "name of one of timm's optimizers")
    opt_eps: float = flag(1e-8, 'epsilon of the optimizer', type=POSITIVE)
    opt_betas: list[float] | None = flag(None, "betas of the optimizer (default: the optimizer's own)", type=FRACTION,
        nargs='+')
    momentum: float = flag(0.9, 'momentum (SGD-type optimizers)', type=NON_NEGATIVE)
    weight_decay: float = flag(0.05, 'weight decay; not applied to biases and norms', type=NON_NEGATIVE)
    clip_grad: float | None = flag(None, 'clip the gradient norm to this value (default: no clipping)', type=POSITIVE)
    lr: float = flag(5e-4, 'learning rate at a global batch of 512; scaled in proportion', type=POSITIVE)
    sched: str = flag('cosine', 'schedule, stepped once per epoch', choices=('cosine', 'tanh', 'step', 'poly'))
    warmup_epochs: int = flag(5, 'epochs of linear warmup', type=NON_NEGATIVE_INT)
    warmup_lr: float = flag(1e-6, 'initial warmup LR (not scaled by batch size)', type=NON_NEGATIVE)
    min_lr: float = flag(1e-5, 'final LR of the schedule (not scaled by batch size)', type=NON_NEGATIVE)
    decay_epochs: float = flag(30, 'epochs between decays of --sched step', type=POSITIVE)
    decay_rate: float = flag(0.1, 'factor of --sched step, power of --sched poly', '--decay-rate', '--dr',
        type=POSITIVE)
    lr_noise: list[float] | None = flag(None, 'one or two fractions of the run: LR noise starts at the first and ends '
        'at the second', type=FRACTION, nargs='+')
    lr_noise_pct: float = flag(0.67, 'largest relative LR noise', type=NON_NEGATIVE)
    lr_noise_std: float = flag(1.0, 'standard deviation of the LR noise', type=NON_NEGATIVE)
    model_ema: bool = flag(True, 'keep an exponential moving average (EMA) of the student (default)', no='keep no EMA')
    model_ema_decay: float = flag(0.99996, 'decay of the EMA, constant from the first step', type=FRACTION)
    model_ema_force_cpu: bool = flag(False, 'keep the EMA in CPU memory')

    @property
    def rank_batch_size(self) -> int:
        """Images of one rank in an optimizer step."""
        return self.batch_size * self.accum_steps

    def scaled_lr(self, world_size: int) -> float:
        """The learning rate of the global batch: `lr` is that of 512 images."""
        return self.lr * self.rank_batch_size * world_size / 512

    def check(self) -> None:
        betas = self.opt_betas
        if betas and (len(betas) not in (2, 3) or max(betas) == 1):
            raise UsageError(
                f'--opt-betas {format_values(betas)}: needs two numbers below 1 (three for some optimizers)'
            )
        if self.lr_noise is not None and len(self.lr_noise) > 2:
            raise UsageError(f'--lr-noise {format_values(self.lr_noise)}: needs one or two numbers')


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """augmentation of the training images"""

    aa: str = flag('rand-m9-mstd0.5-inc1', "timm's auto-augmentation policy; none or '' for none")
    device_augment: bool = flag(False, 'apply --aa on the device, to whole batches: the same decisions, nearly the '
        'same pixels')
    no_aug: bool = flag(False, 'train on images as in evaluation; mixup and cutmix are separate')
    color_jitter: float = flag(0.4, 'strength of color jitter, used without auto-augmentation only', type=NON_NEGATIVE)
    train_interpolation: str = flag('bicubic', 'interpolation of random crops',
        choices=('random', 'bilinear', 'bicubic'))
    smoothing: float = flag(0.1, 'label smoothing', type=FRACTION_BELOW_1)
    # 'always' if it is typed: then also in one process
    repeated_aug: bool | str = flag(True, 'three augmented copies of each image per epoch (default: on with two or '
        'more ranks; pass the flag to use it in one process too)', action='store_const', const='always',
        no='shuffle without repeats')
    reprob: float = flag(0.25, 'probability of random erasing', type=FRACTION)
    remode: str = flag('pixel', 'random-erasing fill mode', choices=('const', 'rand', 'pixel'))
    recount: int = flag(1, 'number of rectangles that random erasing fills', type=POSITIVE_INT)
    mixup: float = flag(0.8, 'alpha of mixup; 0 for none', type=NON_NEGATIVE)
    cutmix: float = flag(1.0, 'alpha of cutmix; 0 for none', type=NON_NEGATIVE)
    cutmix_minmax: list[float] | None = flag(None, 'range of the side of the cutmix box, as fractions of the image; '
        'replaces --cutmix', type=FRACTION, nargs='+')
    mixup_prob: float = flag(1.0, 'probability of mixing a batch', type=FRACTION)
    mixup_switch_prob: float = flag(0.5, 'probability of cutmix where both are on', type=FRACTION)
    mixup_mode: str = flag('batch', 'draw the mixing per batch, pair or image', choices=('batch', 'pair', 'elem'))

    @property
    def policy(self) -> str | None:
        return None if self.aa in ('', 'none') or self.no_aug else self.aa

    @property
    def uses_mixing(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def check(self) -> None:
        if self.device_augment and self.policy is None:
            cause = '--no-aug' if self.no_aug else f'--aa {self.aa or repr("")}'
            raise UsageError(f'--device-augment: there is no auto-augmentation to apply with {cause}')


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """data: what is read, and how"""

    data_set: str = flag('IMNET', 'FOLDER: any tree of class folders; TAR: train.tar and val.tar, or folders of tars, '
        'of class folders; wds/NAME: WebDataset shards in the folder NAME of --data-path, wds/: in --data-path itself',
        type=data_set, metavar='{' + ','.join(datasets.DATA_SETS) + '}')
    data_path: str = flag('', 'folder with train/ and val/, or with the files of the data set')
    num_classes: int | None = flag(None, 'number of classes, for --data-set wds/… only (default: largest class + 1)',
        type=POSITIVE_INT)
    inat_category: str = flag('name', 'level of the taxonomy that is the class', choices=datasets.INAT_CATEGORIES)
    num_workers: int | None = flag(None, 'data loading processes per rank (default: one per CPU core, at most 10)',
        '--num_workers', '--num-workers', type=NON_NEGATIVE_INT)
    bad_images: str = flag('stop', 'stop at an image that cannot be decoded, or skip it: training uses the next image, '
        'evaluation leaves it out, and skipped images are listed', choices=('stop', 'skip'))
    pin_mem: bool = flag(True, 'pin the memory of batches, with a GPU only (default)',
        no='do not pin the memory of batches')
    dist_eval: bool = flag(True, 'split evaluation among the ranks (default)', no='every rank evaluates all images')

    @property
    def workers(self) -> int:
        """Data loading processes per rank."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        return min(10, cores or 1) if self.num_workers is None else self.num_workers

    def check_path(self) -> None:
        if self.data_set != 'FAKE' and not self.data_path:
            raise UsageError(f"--data-path '': required with --data-set {self.data_set}")

    def check(self) -> None:
        if self.num_classes is not None and not self.data_set.startswith('wds/'):
            raise UsageError(
                f'--num-classes {self.num_classes}: can be set only with --data-set wds/…, not {self.data_set}'
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """run: files, evaluation, device"""

    output_dir: str = flag('', 'folder for checkpoints and log.txt; empty: nothing is written', '--output_dir',
        '--output-dir')
    config: str = flag('', 'YAML file with flags, one `flag: value` per line, such as the args.yaml of a run; flags on '
        'the command line have priority')
    log_to: list[str] = flag((), 'further destinations of metrics beside metrics.jsonl, with commas between them: '
        + ', '.join(SINKS), type=sinks)
    resume: str = flag('', 'checkpoint to continue from: a file, URL, hf-hub:OWNER/NAME or local-dir:FOLDER; weights '
        'alone start at --start_epoch; auto: the newest intact checkpoint in --output_dir, or a new run')
    save_interval_minutes: float = flag(10.0, 'minutes between checkpoints within an epoch; 0: none', type=NON_NEGATIVE)
    save_interval_steps: int = flag(0, 'training steps between checkpoints; 0: by time only', type=NON_NEGATIVE_INT)
    keep: int = flag(1, 'number of older checkpoints to keep', type=NON_NEGATIVE_INT)
    start_epoch: int = flag(0, 'first epoch; ignored if --resume has an epoch', '--start_epoch', '--start-epoch',
        type=NON_NEGATIVE_INT)
    eval: bool = flag(False, 'evaluate the weights of --resume, --finetune or --pretrained, and exit')
    eval_ema: bool = flag(False, 'evaluate the EMA weights: with --eval instead of the raw weights, in training in '
        'addition')
    eval_teacher: bool = flag(False, 'evaluate the teacher before anything else')
    device: str = flag('cuda', 'cuda, cuda:N or cpu; without a GPU cuda becomes cpu')
    amp_dtype: str | None = flag(None, 'dtype of autocast (default: bfloat16 on a GPU that has it, else float16 with '
        'a gradient scaler; float32 on the CPU)', choices=('bfloat16', 'float16', 'float32'))
    fused: list[str] | None = flag(None, 'parts that run in few kernels on a GPU (default: on a GPU all of them, but '
        'talking-heads only with compute capability 9.0). talking-heads: the attention of a CaiT teacher; relations: '
        'the sample, patch and random terms together; full: the full term with float32 products; erasing: random '
        'erasing, with other noise; none: no part',
        choices=(*FUSED, 'none'), nargs='+')
    cuda_graph: bool | None = flag(None, 'launch each training step as one CUDA graph, and copy batches ahead '
        '(default: on with one GPU; not tried with several)', action='store_true', no='launch its kernels one by one')
    # True for blocks
    compile: bool | str = flag(False, 'blocks, or no value: compile the blocks of both models; models: compile each '
        'model as a whole, or per block where that fails. Evaluation is not compiled',
        action='store', nargs='?', const=True, type=compile_mode, metavar='{blocks,models}')
    seed: int = flag(0, 'seed of weights, order, augmentation, mixing and random tokens', type=SEED)
    dist_url: str = flag('env://', 'init URL of the process group', '--dist_url', '--dist-url')
    dist_timeout: float = flag(30.0, 'minutes after which a rank that waits for other ranks gives up', type=POSITIVE)
    print_freq: int = flag(10, 'steps between log lines', type=POSITIVE_INT)

    def autocast_dtype(self, device: torch.device) -> torch.dtype:
        """dtype of autocast on a device; float32 for none."""
        if self.amp_dtype:
            return getattr(torch, self.amp_dtype)
        if device.type == 'cpu':
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def fused_parts(self, device: torch.device) -> tuple[str, ...]:
        """Parts of --fused that a run on this device has."""
        if self.fused is not None:
            return tuple(part for part in self.fused if part != 'none')
        if self.eval or fusing_problem(device):
            return ()
        # The blocks of the Triton kernels were chosen for the shared memory of an H200, and nothing else has run them.
        is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
        return FUSED if is_hopper else tuple(part for part in FUSED if part != 'talking-heads')

    def check(self) -> None:
        if self.fused and 'none' in self.fused and len(self.fused) > 1:
            raise UsageError(f'--fused {" ".join(self.fused)}: none cannot have other parts beside it')
        if not re.fullmatch(r'cpu|cuda(:\d+)?', self.device):
            raise UsageError(f'--device {self.device}: must be cpu, cuda or cuda:N')


# fmt: on


@dataclass(frozen=True)
class Config:
    """A whole command line: one part for each group of flags."""

    loss: LossConfig
    model: ModelConfig
    optim: OptimConfig
    augment: AugmentConfig
    data: DataConfig
    run: RunConfig
    typed: frozenset[str] = frozenset()  # names of the fields whose flags were typed

    @property
    def distills(self) -> bool:
        """Whether this run trains a student with a teacher."""
        return self.loss.has_teacher and not self.run.eval

    def flags(self) -> dict[str, Any]:
        """All flags by name, as a checkpoint keeps them."""
        parts = [dataclasses.asdict(getattr(self, name)) for name in PARTS]
        merged = {name: value for part in parts for name, value in part.items()}
        weights = merged.pop('weights')
        return merged | {f'w_{name}': value for name, value in weights.items()}

    def check(self) -> None:
        """Raises UsageError for values that are not possible, alone or together."""
        for part in (self.model, self.optim, self.data, self.run):
            part.check()
        if not self.run.eval:
            self.augment.check()
        self._check_weights()
        self._check_batch()

    def _check_weights(self) -> None:
        loss, model, run = self.loss, self.model, self.run
        if self.distills and not model.has_teacher_weights:
            raise UsageError(
                f"--distillation-type {loss.distillation_type}: needs the teacher's weights, "
                '--teacher-path FILE or --teacher-pretrained'
            )
        if loss.log_grad_share and not run.eval and not (self.distills and model.s_id):
            raise UsageError('--log-grad-share: there are no tapped blocks; it needs a teacher, --s-id and --t-id')
        if not (loss.has_teacher or run.eval or run.eval_teacher):
            given = {'--teacher-path': model.teacher_path, '--s-id': format_values(model.student_ids)}
            given |= {'--teacher-pretrained': 'is set' if model.teacher_pretrained else ''}
            for name, value in given.items():
                if value and value != NO_VALUES:
                    raise UsageError(f'{name} {value}: a teacher needs --distillation-type soft or hard')
        if run.eval_teacher and not model.has_teacher_weights:
            raise UsageError('--eval-teacher: needs --teacher-path FILE or --teacher-pretrained')
        if run.eval and not (run.resume or model.finetune or model.pretrained):
            raise UsageError('--eval: needs the weights to evaluate, --resume FILE, --finetune FILE or --pretrained')
        if run.resume == 'auto' and not run.output_dir:
            raise UsageError('--resume auto: needs the folder to look in, --output_dir')
        if run.eval and run.eval_ema and not run.resume:
            raise UsageError('--eval-ema: needs the checkpoint that holds the EMA weights, --resume FILE')

    def _check_batch(self) -> None:
        data, optim, augment = self.data, self.optim, self.augment
        if not (self.run.eval and self.run.resume):  # an evaluation takes the data set from its checkpoint
            data.check_path()
        # timm draws the side of the box in pixels, below the larger one.
        sides = [int(self.model.input_size * side) for side in augment.cutmix_minmax or (0, 1)]
        if len(sides) != 2 or sides[0] >= sides[1]:
            values = format_values(augment.cutmix_minmax or [])
            raise UsageError(f'--cutmix-minmax {values}: needs two numbers, the smaller one first')
        if augment.uses_mixing and optim.rank_batch_size % 2 and not self.run.eval:
            raise UsageError(
                f'--batch-size {optim.batch_size}: mixup and cutmix pair the images and need an even batch'
            )


PARTS: dict[str, Any] = {part.name: part.type for part in dataclasses.fields(Config) if part.name != 'typed'}
# Flags in whose values ~ is the home folder: a shell leaves it in --flag=~/x.
PATHS = ('data_path', 'output_dir', 'resume', 'finetune', 'teacher_path', 'config')


# The parser -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Accepts dashes and underscores alike, and reports an error in one line."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix('argument '))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that are numbers or words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        shown = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ''
        return (action.help or '') + (' (%(default)s)' if shown and default != argparse.SUPPRESS else '')


def _dashed(arg: str) -> str:
    if not arg.startswith('--'):
        return arg
    name, equals, value = arg.partition('=')
    return name.replace('_', '-') + equals + value


def get_args_parser(description: str | None = None) -> Parser:
    """The parser of all flags, one argument group for each config."""
    parser = Parser('main.py', usage='main.py [flags]', description=description, formatter_class=_Help)
    parser.allow_abbrev = False
    for part in PARTS.values():
        group = parser.add_argument_group(part.__doc__)
        for each in dataclasses.fields(part):
            if each.name == 'weights':
                for name, term in RELATION_TERMS.items():
                    group.add_argument(f'--w-{name}', type=NON_NEGATIVE, default=term.default_weight, help=term.help)
            else:
                _add_flag(group, each)
    _add_flags_without_effect(parser)
    return parser


def _add_flag(group: argparse._ArgumentGroup, each: dataclasses.Field) -> None:  # type: ignore[type-arg]
    name = each.name.replace('_', '-')
    default = each.default if each.default is not dataclasses.MISSING else {}
    names = each.metadata['names'] or [f'--{name}']
    group.add_argument(*names, dest=each.name, default=default, help=each.metadata['help'], **each.metadata['options'])
    if each.metadata['no']:
        group.add_argument(f'--no-{name}', action='store_false', dest=each.name, help=each.metadata['no'])


def _add_flags_without_effect(parser: Parser) -> None:
    add = parser.add_argument_group('accepted for old scripts').add_argument
    for name in ('--distributed', '--resplit'):
        add(name, action='store_true', help='no effect')
    for name, default in (('local_rank', 0), ('world_size', 1), ('cooldown-epochs', 10), ('patience-epochs', 10)):
        add(*dict.fromkeys((f'--{name}', _dashed(f'--{name}'))), type=int, default=default, help='no effect')


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Config:
    """The configs of a command line, checked as far as possible without touching a file.

    Args:
        argv: the words; those of the process if None.
        description: head of --help.

    Raises:
        UsageError: the first error, in one line that names the flag and its value.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = get_args_parser(description)
    in_file = set[str]()
    if config_file := os.path.expanduser(parser.parse_known_args(argv)[0].config):
        words, in_file = read_config(config_file, parser._actions)
        argv = [*words, *argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        counts = {name: action.nargs for action in parser._actions for name in action.option_strings}
        raise UsageError(explain_unknown(unknown[0], list(map(_dashed, argv)), counts))
    values = {**vars(args), **{name: os.path.expanduser(getattr(args, name)) for name in PATHS}}
    values['weights'] = {name: values[f'w_{name}'] for name in RELATION_TERMS}
    parts = {
        name: part(**{each.name: values[each.name] for each in dataclasses.fields(part)})
        for name, part in PARTS.items()
    }
    config = Config(**parts, typed=_typed(argv) | in_file)
    if not config.model.list_blocks:
        config.check()
    return config


def _typed(argv: list[str]) -> frozenset[str]:
    """Names of the fields whose flags are on the command line."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return frozenset(vars(parser.parse_known_args(argv)[0]))
