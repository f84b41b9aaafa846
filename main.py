"""Distil a small vision transformer from a large one with the fine-grained manifold loss.

    python main.py --data-set FAKE --input-size 32 …             one process
    torchrun --nproc_per_node=8 main.py --data-path …            eight GPUs (or python -m torch.distributed.launch)
    torchrun … main.py --output_dir OUT --resume auto …          start, or go on wherever the run was interrupted
    python main.py --eval --resume checkpoint.pth --data-path …  evaluate a checkpoint

`scripts/` holds complete commands, one flag per line; README.md explains the flags by group.
"""

import argparse
import copy
import difflib
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torchvision
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import checkpoints
import datasets
import loggers
import models
import run_dir
import stopping
import transforms
import utils
from datasets import EvalDataset, TrainDataset
from engine import NonFiniteGuard, evaluate, train_one_epoch
from loggers import log_rank0
from losses import DISTILLATION_TYPES, RELATION_DTYPES, RELATION_TERMS, RELATIONS, ManifoldDistillationLoss
from run_dir import CheckpointManager, TrainingState
from samplers import build_train_sampler, distinct_images
from utils import UsageError, usage_error_context

# Flags ----------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Accepts dashes and underscores alike, and reports a fault in one line."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(arg) for arg in args], namespace)

    def error(self, message: str):
        raise UsageError(message.removeprefix('argument '))


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that are numbers or words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        shown = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ''
        return action.help + (' (%(default)s)' if shown and default != argparse.SUPPRESS else '')


def _dashed(arg: str) -> str:
    if not arg.startswith('--'):
        return arg
    name, equals, value = arg.partition('=')
    return name.replace('_', '-') + equals + value


class KeyValues(ParseKwargs):
    """timm's `key=value …`, with a word for what is neither."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} {value}: not of the form key=value')
        super().__call__(parser, namespace, values, option_string)


def _number(kind: type, ends: str, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: numbers of `kind` in an interval, its ends as in mathematics: '[)' is low ≤ x < high."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above = low <= value if ends[0] == '[' else low < value
        below = value <= high if ends[1] == ']' else value < high
        if not (above and below):
            name = 'whole number' if kind is int else 'number'
            raise argparse.ArgumentTypeError(f'{text} is not a {name} in {ends[0]}{low:g}, {high:g}{ends[1]}')
        return value

    return convert


COUNT = _number(int, '[)', 1)
WHOLE = _number(int, '[)', 0)
SEED = _number(int, '[)', 0, 2**63)
FRACTION = _number(float, '[]', 0, 1)
PROPER = _number(float, '[)', 0, 1)
AMOUNT = _number(float, '[)', 0)
POSITIVE = _number(float, '()', 0)


def _block_id(text: str) -> int | str:
    if text != 'auto' and not re.fullmatch(r'-?\d+', text):
        raise argparse.ArgumentTypeError(f'{text} is neither a whole number nor auto')
    return text if text == 'auto' else int(text)


def _data_set(text: str) -> str:
    try:
        return datasets.parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def get_args_parser() -> Parser:
    """Every flag; those of the 2022 release keep their names, defaults and meanings."""
    parser = Parser('main.py', usage='main.py [flags]', description=__doc__, formatter_class=Help)
    parser.allow_abbrev = False
    for add_flags in (
        _add_method_flags,
        _add_model_flags,
        _add_optimizer_flags,
        _add_augmentation_flags,
        _add_data_flags,
        _add_run_flags,
        _add_idle_flags,
    ):
        add_flags(parser)
    return parser


def _add_method_flags(parser: Parser) -> None:
    add = parser.add_argument_group('method').add_argument
    add('--distillation-type', default='none', choices=DISTILLATION_TYPES, help='logit distillation; none: no teacher')
    add('--distillation-alpha', type=FRACTION, default=0.5, help='weight of KD; cross-entropy has 1 − this')
    add('--distillation-tau', type=POSITIVE, default=1.0, help='temperature of soft KD')
    add('--distillation-beta', type=AMOUNT, default=1.0, help='weight common to all relation terms')
    for name, term in RELATION_TERMS.items():
        add(f'--w-{name}', type=AMOUNT, default=term.default_weight, help=term.help)
    add('--K', type=COUNT, default=192, help='random tokens per layer pair')
    add('--relations', default='rank', choices=RELATIONS, help="images that sample, random and full relate: a rank's "
        'own or those of all ranks. Bytes in per rank, step and layer pair: full 8·(D_s²+D_s·D_t+D_t²), random '
        '4·K·(D_s+D_t), sample 4·(D_s+D_t) times the tokens of all ranks, of which it holds one side at a time, twice '
        "while it gathers: with 8 × 64 images of the recipe's models 2 MB, 0.4 MB, 231 MB and 154 MB")  # fmt: skip
    add(
        '--relation-dtype',
        default='float32',
        choices=RELATION_DTYPES,
        help='of the factors of sample, patch and random products; sums and the full term keep their precision',
    )
    add('--log-grad-share', action='store_true', help="with each log line each term's share of the norm of the "
        'gradient at the tapped features, on the first rank; costs one more backward pass per term there')  # fmt: skip
    add('--s-id', type=_block_id, nargs='+', help='student blocks to tap, from 0, negative from the end; none: no '
        'relations; auto: the first k and the last k, k = 4 or half the shallower depth')  # fmt: skip
    add('--t-id', type=_block_id, nargs='+', help='teacher blocks they are paired with, one for one; auto with auto')
    add('--token-align', default='error', choices=models.ALIGNMENTS, help="paired blocks with other grids of patches: "
        "error; pool: means on the coarser grid; interpolate: the teacher's tokens on the student's grid, bilinear; "
        'merge: neighbours concatenated on either side until at most --max-patches remain')  # fmt: skip
    add('--max-patches', type=COUNT, default=196, help='patch tokens of an image that --token-align merge leaves')


def _add_model_flags(parser: Parser) -> None:
    add = parser.add_argument_group('models').add_argument
    add('--model', default='deit_base_patch16_224', help="student, one of timm's models, or that of hf-hub:… or "
        'local-dir:…, with fresh weights or those of --finetune')  # fmt: skip
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='its arguments')
    add('--list-blocks', action='store_true', help='print the blocks of --model, their grids and widths, and stop')
    add('--teacher-model', default='cait_s24_224', help="teacher, one of timm's models, or hf-hub:… or local-dir:… "
        'with its weights')  # fmt: skip
    add('--teacher-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='same of the teacher')
    add('--teacher-dtype', choices=('float32', 'bfloat16'), help="of the teacher's weights and all its arithmetic, "
        'whatever --amp-dtype says (float32 weights under --amp-dtype)')  # fmt: skip
    add('--teacher-path', default='', help="teacher's weights: a file, URL, hf-hub:… or local-dir:…")
    add('--teacher-pretrained', action='store_true', help="without --teacher-path: timm's own weights of the teacher")
    add('--finetune', default='', help='start from these weights: positions resampled, a head of another size dropped')
    add('--input-size', type=COUNT, default=224, help='height and width of the images in pixels')
    add('--teacher-input-size', type=COUNT, help="those the teacher sees, resized on the device (the student's)")
    add('--grad-checkpointing', action='store_true', help="compute the student's activations anew in the backward pass "
        'instead of keeping them')  # fmt: skip
    add('--drop', type=FRACTION, default=0.0, help='dropout after position embedding, attention projection and MLP')
    add('--drop-path', type=FRACTION, default=0.0, help='stochastic depth of the student')
    add('--model-ema', action='store_true', default=True, help='keep a moving average of the student (default)')
    add('--no-model-ema', action='store_false', dest='model_ema', help='keep none')
    add('--model-ema-decay', type=FRACTION, default=0.99996, help='its decay, constant from the first step')
    add('--model-ema-force-cpu', action='store_true', help='keep it in main memory')


def _add_optimizer_flags(parser: Parser) -> None:
    add = parser.add_argument_group('optimizer and schedule').add_argument
    add('--batch-size', type=COUNT, default=64, help='images per rank and forward pass')
    add('--accum-steps', type=COUNT, default=1, help='forward passes whose gradients make one step; relations across '
        'images and random tokens see the images of one of them')  # fmt: skip
    add('--epochs', type=COUNT, default=300, help='length of the run and of the schedule')
    add('--opt', default='adamw', help="one of timm's optimizers")
    add('--opt-eps', type=POSITIVE, default=1e-8, help='its epsilon')
    add('--opt-betas', type=FRACTION, nargs='+', help="its betas; none: the optimizer's own")
    add('--momentum', type=AMOUNT, default=0.9, help='of SGD and its kin')
    add('--weight-decay', type=AMOUNT, default=0.05, help='of weight matrices; biases and norms have none')
    add('--clip-grad', type=POSITIVE, default=None, help='largest norm of the gradient; none: not clipped')
    add('--lr', type=POSITIVE, default=5e-4, help='learning rate at a global batch of 512; scaled in proportion')
    add('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'poly'), help='schedule, stepped by epoch')
    add('--warmup-epochs', type=WHOLE, default=5, help='epochs of linear warm-up')
    add('--warmup-lr', type=AMOUNT, default=1e-6, help='where it starts; not scaled')
    add('--min-lr', type=AMOUNT, default=1e-5, help='where the schedule ends; not scaled')
    add('--decay-epochs', type=POSITIVE, default=30, help='interval of --sched step')
    add('--decay-rate', '--dr', type=POSITIVE, default=0.1, help='factor of --sched step, power of poly')
    add('--lr-noise', type=FRACTION, nargs='+', help='part of the run in which the learning rate is noisy, from [to]')
    add('--lr-noise-pct', type=AMOUNT, default=0.67, help='largest relative noise')
    add('--lr-noise-std', type=AMOUNT, default=1.0, help='its standard deviation')


def _add_augmentation_flags(parser: Parser) -> None:
    add = parser.add_argument_group('augmentation').add_argument
    add('--aa', default='rand-m9-mstd0.5-inc1', help="timm's auto-augmentation policy; none or '' for none")
    add('--device-augment', action='store_true', help='the device applies --aa, to whole batches: the same decisions, '
        'nearly the same pixels')  # fmt: skip
    add('--no-aug', action='store_true', help='train on images as evaluation sees them; mixing is apart')
    add('--color-jitter', type=AMOUNT, default=0.4, help='strength, without auto-augmentation only')
    add('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'), help='of random crops')
    add('--smoothing', type=PROPER, default=0.1, help='label smoothing')
    add(
        '--repeated-aug',
        action='store_const',
        const='always',
        default=True,
        help='three copies of an image per epoch (default from two ranks on; typed, in one process too)',
    )
    add('--no-repeated-aug', action='store_false', dest='repeated_aug', help='shuffle without repeats')
    add('--reprob', type=FRACTION, default=0.25, help='probability of random erasing')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='its filling')
    add('--recount', type=COUNT, default=1, help='its number of rectangles')
    add('--mixup', type=AMOUNT, default=0.8, help='alpha of mixup; 0 for none')
    add('--cutmix', type=AMOUNT, default=1.0, help='alpha of cutmix; 0 for none')
    add('--cutmix-minmax', type=FRACTION, nargs='+', help='smallest and largest side of the cut instead of an alpha')
    add('--mixup-prob', type=FRACTION, default=1.0, help='probability of mixing a batch at all')
    add('--mixup-switch-prob', type=FRACTION, default=0.5, help='of cutmix where both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='one mixing per batch, pair or image')


def _add_data_flags(parser: Parser) -> None:
    add = parser.add_argument_group('data').add_argument
    add('--data-set', type=_data_set, default='IMNET', metavar='{' + ','.join(datasets.DATA_SETS) + '…}',
        help='FOLDER: any tree of class folders; TAR: train.tar and val.tar, or folders of tars, of class folders; '
        'wds/…: WebDataset shards, in a folder of that name in --data-path, or wds/ in it itself')  # fmt: skip
    add('--data-path', default='', help='folder that holds train/ and val/, or the files of the other sets')
    add('--num-classes', type=COUNT, help='classes of --data-set wds/…, if there are more than its images show')
    add('--inat-category', default='name', choices=datasets.INAT_CATEGORIES, help='level that is the class')
    add('--num_workers', '--num-workers', type=WHOLE, default=10, help='loader processes per rank')
    add('--bad-images', default='stop', choices=('stop', 'skip'), help='images that cannot be decoded; skip: train on '
        'the next one instead, leave them out of evaluation, and list them')  # fmt: skip
    add('--pin-mem', action='store_true', default=True, help='page-locked batches, with a GPU only (default)')
    add('--no-pin-mem', action='store_false', dest='pin_mem', help='pageable batches')


def _add_run_flags(parser: Parser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--output_dir', '--output-dir', default='', help='checkpoints and log.txt go here; empty: nothing is kept')
    add('--resume', default='', help='go on from this checkpoint, a file or URL; weights alone start at epoch 0; auto: '
        'from the newest whole one of --output_dir, or begin')  # fmt: skip
    add('--save-interval-minutes', type=AMOUNT, default=10.0, help='between checkpoints inside an epoch; 0: none')
    add('--save-interval-steps', type=WHOLE, default=0, help='the same in training steps; 0: by time only')
    add('--keep', type=WHOLE, default=1, help='checkpoints kept before the last one')
    add('--start_epoch', '--start-epoch', type=WHOLE, default=0, help='first epoch, where --resume does not tell it')
    add('--eval', action='store_true', help='evaluate --resume or --finetune and stop')
    add('--eval-ema', action='store_true', help='evaluate the moving average: instead with --eval, too in training')
    add('--eval-teacher', action='store_true', help='evaluate the teacher first')
    add('--dist-eval', action='store_true', default=True, help='share the evaluation among the ranks (default)')
    add('--no-dist-eval', action='store_false', dest='dist_eval', help='every rank evaluates all images')
    add('--device', default='cuda', help='cuda, cuda:N or cpu; without a GPU cuda becomes cpu')
    add('--amp-dtype', choices=('bfloat16', 'float16', 'float32'), help='default: bfloat16 on a GPU that has it, else '
        'float16 with a gradient scaler, float32 on the CPU')  # fmt: skip
    add('--compile', action='store_true', help='compile the blocks of both models, each kind once; evaluation is not')
    add('--seed', type=SEED, default=0, help='of weights, order, augmentation, mixing and random tokens')
    add('--dist_url', '--dist-url', default='env://', help='where the ranks meet')
    add('--print-freq', type=COUNT, default=10, help='steps between log lines')


def _add_idle_flags(parser: Parser) -> None:
    add = parser.add_argument_group('accepted for old scripts').add_argument
    add('--distributed', action='store_true', help='no effect: the environment decides')
    add('--local_rank', '--local-rank', type=int, default=0, help='no effect: the environment decides')
    add('--world_size', '--world-size', type=int, default=1, help='no effect: the launcher decides')
    add('--cooldown-epochs', type=int, default=10, help='no effect, as in the release')
    add('--patience-epochs', type=int, default=10, help='no effect: there is no plateau schedule')
    add('--resplit', action='store_true', help='no effect, as in the release')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as they can be without touching a file.

    Raises:
        UsageError: the first fault, in one line.
    """
    parser = get_args_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = set(re.findall(r'--[\w-]+', parser.format_help()))
        near = difflib.get_close_matches(unknown[0].split('=')[0], flags, n=1)
        raise UsageError(f'{unknown[0]}: no such flag' + (f'; did you mean {near[0]}?' if near else ''))
    if not args.list_blocks:
        _check_method(args)
        _check_recipe(args)
    return args


def _check_method(args: argparse.Namespace) -> None:
    s_id, t_id = args.s_id or [], args.t_id or []
    if 'auto' in s_id + t_id and not s_id == t_id == ['auto']:
        raise UsageError(
            f'--s-id {format_values(s_id)} and --t-id {format_values(t_id)}: '
            'auto is for both sides, and nothing beside it'
        )
    if len(s_id) != len(t_id):
        raise UsageError(
            f'--s-id {format_values(s_id)} and --t-id {format_values(t_id)}: blocks are paired one for one, '
            f'but there are {len(s_id)} and {len(t_id)}'
        )
    training = _taught(args) and not args.eval
    if training and not _has_weights(args):
        raise UsageError(
            f"--distillation-type {args.distillation_type}: needs the teacher's weights, "
            '--teacher-path FILE or --teacher-pretrained'
        )
    if args.log_grad_share and not args.eval and not (training and s_id):
        raise UsageError('--log-grad-share: there are no tapped blocks to look at; needs a teacher, --s-id and --t-id')
    if args.eval_teacher and not _has_weights(args):
        raise UsageError('--eval-teacher: needs --teacher-path FILE or --teacher-pretrained')
    if args.eval and not (args.resume or args.finetune):
        raise UsageError('--eval: needs the weights to evaluate, --resume FILE or --finetune FILE')
    if args.resume == 'auto' and not args.output_dir:
        raise UsageError('--resume auto: needs the folder to look in, --output_dir')
    if args.eval and args.eval_ema and not args.resume:
        raise UsageError('--eval-ema: needs the checkpoint that holds them, --resume FILE')


def _taught(args: argparse.Namespace) -> bool:
    return args.distillation_type != 'none'


def _has_weights(args: argparse.Namespace) -> bool:
    """Whether it is said where the teacher's weights are."""
    return bool(args.teacher_path or args.teacher_pretrained or models.has_source(args.teacher_model))


def _check_recipe(args: argparse.Namespace) -> None:
    if args.data_set != 'FAKE' and not args.data_path:
        raise UsageError(f"--data-path '': --data-set {args.data_set} needs the folder it lies in")
    if args.num_classes is not None and not args.data_set.startswith('wds/'):
        raise UsageError(f'--num-classes {args.num_classes}: --data-set {args.data_set} tells it by itself')
    if args.device_augment and not args.eval and (args.no_aug or args.aa in ('', 'none')):
        culprit = '--no-aug' if args.no_aug else f'--aa {args.aa or repr("")}'
        raise UsageError(f'--device-augment: with {culprit} there is no auto-augmentation to apply')
    if not re.fullmatch(r'cpu|cuda(:\d+)?', args.device):
        raise UsageError(f'--device {args.device}: must be cpu, cuda or cuda:N')
    sides = [int(args.input_size * side) for side in args.cutmix_minmax or (0, 1)]
    if len(sides) != 2 or sides[0] >= sides[1]:  # timm draws the side in pixels, below the larger one
        values = format_values(args.cutmix_minmax)
        raise UsageError(f'--cutmix-minmax {values}: two numbers are needed, the smaller first')
    if _mixes(args) and _images_of_a_step(args) % 2 and not args.eval:
        raise UsageError(f'--batch-size {args.batch_size}: mixup and cutmix pair the images and need an even batch')
    if args.opt_betas and (len(args.opt_betas) not in (2, 3) or max(args.opt_betas) == 1):
        raise UsageError(
            f'--opt-betas {format_values(args.opt_betas)}: two numbers below 1 are needed, three by some optimizers'
        )
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        raise UsageError(f'--lr-noise {format_values(args.lr_noise)}: one or two numbers are needed')


def _mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _images_of_a_step(args: argparse.Namespace) -> int:
    """Of one rank."""
    return args.batch_size * args.accum_steps


def format_values(values: list) -> str:
    return ' '.join(map(str, values)) or '(none)'


# The parts of a run ---------------------------------------------------------------------------------------------------


def build_student(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The student, its weights fresh or from --finetune."""
    dropout = {'pos_drop_rate': args.drop, 'proj_drop_rate': args.drop} if args.drop else {}
    kwargs = {'drop_path_rate': args.drop_path, **dropout, **args.model_kwargs}
    options = f'--input-size {args.input_size}' + (f' and --drop {args.drop}' if args.drop else '')
    with usage_error_context('--model', f'{args.model} with {options}'):
        student = models.build(args.model, num_classes, args.input_size, kwargs=kwargs)
    if args.finetune:
        with usage_error_context('--finetune', args.finetune):
            weights = models.named_weights(checkpoints.read_checkpoint(args.finetune))
            # A fresh head is something to train, not to evaluate.
            state, changes = models.adapt(student, weights, replace_heads=not args.eval)
            models.load_weights(student, state)
            stats, theirs = models.normalisation(student), models.normalisation(student, args.finetune)
        log_rank0(f'finetune    {args.finetune}' + ''.join(f'; {change}' for change in changes))
        if stats != theirs:
            log_rank0(
                f"warning: --finetune {args.finetune}: its images had another mean and deviation than --model's have"
            )
    return student


def build_teacher(args: argparse.Namespace) -> nn.Module:
    """The teacher with its weights, from --teacher-path or timm, and a head of as many classes as these have."""
    pretrained = not args.teacher_path
    size = args.teacher_input_size or args.input_size
    flag = '--teacher-input-size' if args.teacher_input_size else '--input-size'
    with usage_error_context('--teacher-model', f'{args.teacher_model} with {flag} {size}'):
        teacher = models.build(args.teacher_model, None, size, pretrained, args.teacher_kwargs)
    if args.teacher_path:
        with usage_error_context('--teacher-path', args.teacher_path):
            weights = models.named_weights(checkpoints.read_checkpoint(args.teacher_path))
            state, changes = models.adapt(teacher, weights, replace_heads=False)
            models.match_head(teacher, state)
            models.load_weights(teacher, state)
        if changes:
            log_rank0(f'teacher     {args.teacher_path}' + ''.join(f'; {change}' for change in changes))
    return teacher


def choose_blocks(args: argparse.Namespace, student: nn.Module, teacher: nn.Module) -> argparse.Namespace:
    """The flags with numbers in the place of --s-id auto --t-id auto."""
    if args.s_id != ['auto']:
        return args
    with usage_error_context('--s-id', f'auto with --model {args.model}'):
        depth = len(models.list_blocks(student, args.input_size))
    with usage_error_context('--t-id', f'auto with --teacher-model {args.teacher_model}'):
        teacher_depth = len(models.list_blocks(teacher, args.teacher_input_size or args.input_size))
    s_id, t_id = models.pair_ids(depth, teacher_depth)
    return argparse.Namespace(**{**vars(args), 's_id': s_id, 't_id': t_id})


def tap_student(args: argparse.Namespace, student: nn.Module, taught: bool) -> models.TappedModel:
    """Hooks on --s-id, if there is a teacher."""
    block_ids = (args.s_id or []) if taught else []
    with usage_error_context('--s-id', f'{format_values(block_ids)} with --model {args.model}'):
        tapped = models.tap(student, block_ids, args.input_size, two_heads=taught)
    if args.grad_checkpointing and not args.eval:
        with usage_error_context('--grad-checkpointing', f'with --model {args.model}'):
            models.checkpoint_activations(tapped)
    return tapped


def tap_teacher(
    args: argparse.Namespace, teacher: nn.Module, taught: bool, ours: tuple[tuple, tuple]
) -> models.TappedModel:
    """Hooks on --t-id; frozen. `ours`: mean and deviation the student's images are normalised by."""
    block_ids, size = (args.t_id or []) if taught else [], args.teacher_input_size
    with usage_error_context('--t-id', f'{format_values(block_ids)} with --teacher-model {args.teacher_model}'):
        tapped = models.tap(teacher, block_ids, size or args.input_size)
    with usage_error_context('--teacher-path', args.teacher_path):
        theirs = models.normalisation(teacher, args.teacher_path)
    dtype = getattr(torch, args.teacher_dtype) if args.teacher_dtype else None
    prepare = models.TeacherPreprocess(ours, theirs, size, dtype)
    return models.freeze(tapped, prepare, with_logits=args.distillation_alpha > 0, dtype=dtype)


def check_classes(args: argparse.Namespace, classes: int, num_classes: int) -> None:
    """Logits are compared class by class; a teacher with other classes, or none, has only relations to teach."""
    if classes == num_classes or (args.distillation_alpha == 0 and args.s_id and not args.eval_teacher):
        return
    source = f'--teacher-path {args.teacher_path}' if args.teacher_path else f'--teacher-model {args.teacher_model}'
    has = f'has {classes} classes, the data {num_classes}' if classes else 'has no head'
    if args.eval_teacher:
        raise UsageError(f'{source}: {has}, so --eval-teacher has nothing to measure')
    raise UsageError(f'{source}: {has}; it can teach relations alone: --distillation-alpha 0, with --s-id and --t-id')


def align(args: argparse.Namespace, student: models.TappedModel, teacher: models.TappedModel) -> None:
    """Relations compare like with like: brings the tokens of each pair of blocks to one grid, or refuses."""
    pairs = [(ours.grid, theirs.grid) for ours, theirs in zip(student.blocks, teacher.blocks, strict=True)]
    met = []
    for i, pair in enumerate(pairs):
        try:
            met.append(models.common_grid(*pair, args.token_align, args.max_patches))
        except ValueError as error:
            raise UsageError(
                f'--token-align {args.token_align}: {error}, in block {student.block_ids[i]} of --model {args.model} '
                f'and {teacher.block_ids[i]} of --teacher-model {args.teacher_model}. Ways out: --token-align pool, '
                'interpolate or merge (--max-patches), other blocks (--list-blocks), '
                f'another --teacher-input-size than {args.teacher_input_size or args.input_size}'
            ) from error
    if met != pairs:
        ways = dict.fromkeys(zip(pairs, met, strict=True))
        show = models.format_grid
        steps = [f'{show(s)} and {show(t)} on {show(on)}' for (s, t), (on, _) in ways]
        log_rank0(f'align       {args.token_align}, of student and teacher: {", ".join(steps)}')
    for tapped, targets in zip((student, teacher), zip(*met, strict=True), strict=False):
        tapped.align(targets, args.token_align)


def build_criterion(args: argparse.Namespace) -> ManifoldDistillationLoss:
    if _mixes(args):
        base = SoftTargetCrossEntropy()  # the mixing has smoothed the labels already
    else:
        base = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    return ManifoldDistillationLoss(
        base,
        args.distillation_type,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
        beta=args.distillation_beta,
        K=args.K,
        relations=args.relations,
        relation_dtype=args.relation_dtype,
        **{f'w_{name}': getattr(args, f'w_{name}') for name in RELATION_TERMS},
    )


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    if not _mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def _open_split(args: argparse.Namespace, train: bool, transform: Callable) -> Dataset:
    """Training or validation images."""
    skip_bad = args.bad_images == 'skip'
    with usage_error_context('--data-path', args.data_path):
        dataset, _ = datasets.build_dataset(
            args.data_set,
            args.data_path,
            train,
            transform,
            input_size=args.input_size,
            inat_category=args.inat_category,
            num_classes=args.num_classes,
        )
        dataset = TrainDataset(dataset, skip_bad, args.seed) if train else EvalDataset(dataset, skip_bad)
    shape = datasets.image_size(dataset)
    if shape != (args.input_size, args.input_size):
        raise UsageError(
            f'--input-size {args.input_size}: the images are {models.format_grid(shape)} pixels, '
            f'and up to {transforms.SMALL_SIZE} they are not resized'
        )
    return dataset


def _accumulated(args: argparse.Namespace) -> str:
    return f' of --accum-steps {args.accum_steps}' if args.accum_steps > 1 else ''


def _loader_options(args: argparse.Namespace, device: torch.device) -> dict:
    return {
        'num_workers': args.num_workers,
        'pin_memory': args.pin_mem and device.type == 'cuda',
        'persistent_workers': args.num_workers > 0,
    }


def build_train_transform(args: argparse.Namespace, mean: tuple) -> transforms.TrainTransform:
    """The augmentation the flags ask for; `mean`: of the images' channels."""
    if args.no_aug:
        return transforms.TrainTransform(transforms.build_eval_transform(args.input_size))
    with usage_error_context(
        '--aa', f'{args.aa}{" with --device-augment" * args.device_augment}', AssertionError, KeyError
    ):
        return transforms.build_train_transform(
            args.input_size,
            args.color_jitter,
            None if args.aa in ('', 'none') else args.aa,
            args.train_interpolation,
            args.reprob,
            args.recount,
            mean,
            on_device=args.device_augment,
        )


def build_train_loader(args: argparse.Namespace, device: torch.device, repeated_aug: bool, mean: tuple) -> DataLoader:
    """Augmented training images, this rank's share, whole batches only."""
    dataset, batch = _open_split(args, True, build_train_transform(args, mean)), _images_of_a_step(args)
    world, shuffle_seed = utils.get_world_size(), utils.counter_seed(args.seed, 'shuffle')
    sampler = build_train_sampler(dataset, world, utils.get_rank(), repeated_aug, shuffle_seed)
    loader = DataLoader(dataset, batch, sampler=sampler, drop_last=True, **_loader_options(args, device))
    if not len(loader):
        raise UsageError(
            f'--batch-size {args.batch_size}: {_count(world, "rank")} of {len(sampler)} images each do not fill one '
            f'batch{_accumulated(args)}; the training set has {len(dataset)} images'
        )
    return loader


def build_val_loader(args: argparse.Namespace, device: torch.device) -> DataLoader:
    """This rank's share of the validation images, without padding; all of them with --no-dist-eval."""
    dataset = _open_split(args, False, transforms.build_eval_transform(args.input_size))
    rank, world = (utils.get_rank(), utils.get_world_size()) if args.dist_eval else (0, 1)
    return DataLoader(
        dataset, args.batch_size, sampler=range(rank, len(dataset), world), **_loader_options(args, device)
    )


def choose_order(args: argparse.Namespace, checkpoint: dict) -> bool:
    """Repeated augmentation or not: in one process the copies would only sit side by side in a batch.

    A run keeps the order it began with, whatever the number of ranks, unless a flag is typed.
    """
    typed = {'always': True, False: False}.get(args.repeated_aug)
    begun = checkpoint.get('repeated_aug')
    if typed is None:
        return utils.get_world_size() > 1 if begun is None else begun
    if checkpoint.get('position') and typed != begun:
        flag = '--repeated-aug' if typed else '--no-repeated-aug'
        raise UsageError(f'{flag}: --resume {args.resume} is in the midst of an epoch that was begun without it')
    return typed


def build_state(args: argparse.Namespace, model: nn.Module) -> TrainingState:
    """Optimizer, schedule, scaler and moving average of a timm model whose weights are loaded already."""
    device = next(model.parameters()).device
    betas = f' with --opt-betas {format_values(args.opt_betas)}' if args.opt_betas else ''
    with usage_error_context('--opt', args.opt + betas, AssertionError, IndexError, TypeError):
        options = {**optimizer_kwargs(args), 'lr': _scaled_lr(args)}
        optimizer = create_optimizer_v2(model, **options)
        # One kernel, and it can leave an update out on the device. Not for all that have one: SGD's takes up momentum
        # nobody has written then, and Adagrad's is younger on GPUs.
        if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            optimizer = create_optimizer_v2(model, **options, fused=True)
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {args.opt}: needs second derivatives, which this training step does not make')
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    scaler = torch.amp.GradScaler(device.type, enabled=_amp_dtype(args, device) == torch.float16)
    ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device) if args.model_ema else None
    return TrainingState(model, optimizer, scheduler, scaler, ema)


def _scaled_lr(args: argparse.Namespace) -> float:
    return args.lr * _images_of_a_step(args) * utils.get_world_size() / 512


def _amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    if args.amp_dtype:
        return getattr(torch, args.amp_dtype)
    if device.type == 'cpu':
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# The first screen -----------------------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, device: torch.device, num_classes: int) -> None:
    """What will run where, before any model is built."""
    world = utils.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    log_rank0(
        f'versions    torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, '
        f'Python {platform.python_version()}'
    )
    dtype = str(_amp_dtype(args, device)).removeprefix('torch.')
    log_rank0(f'device      {device} ({name}), {dtype}')
    if args.device != 'cpu' and device.type == 'cpu':
        log_rank0(f'warning: --device {args.device}: there is no CUDA device, running on the CPU')
    log_rank0(f'data        {args.data_set} {args.data_path or "(generated)"}, {num_classes} classes')
    if args.eval:
        return
    total = _images_of_a_step(args) * world
    passes = f' × {args.accum_steps} passes' if args.accum_steps > 1 else ''
    log_rank0(f'batch       {_count(world, "rank")} × {args.batch_size} images{passes} = {total} a step')
    log_rank0(
        f'lr          {args.lr:g} × {total}/512 = {_scaled_lr(args):g}, {args.opt}, {args.sched}, seed {args.seed}'
    )


def describe_model(role: str, name: str, tapped: models.TappedModel) -> None:
    parameters = sum(p.numel() for p in tapped.model.parameters())
    taps = 'no blocks tapped'
    if tapped.block_ids:
        kinds = dict.fromkeys(f'{models.format_grid(block.grid)} of width {block.width}' for block in tapped.blocks)
        taps = f'blocks {format_values(tapped.block_ids)} of {tapped.depth} tapped, patch tokens {", ".join(kinds)}'
    log_rank0(f'{role:<12}{name}, {parameters:,} parameters, {taps}')


def list_blocks(args: argparse.Namespace) -> None:
    """Prints what --s-id and --t-id may name."""
    with usage_error_context('--model', f'{args.model} with --input-size {args.input_size}'):
        model = models.build(args.model, None, args.input_size, kwargs=args.model_kwargs)
        blocks = models.list_blocks(model, args.input_size)
    log_rank0(f'{args.model}, {args.input_size} pixels: {_count(len(blocks), "block")} over patch tokens')
    log_rank0(f'{"index":>5}  {"grid":>9}  {"width":>5}  path')
    for i, block in enumerate(blocks):
        log_rank0(f'{i:>5}  {models.format_grid(block.grid):>9}  {block.width:>5}  {block.path}')


def describe_training(
    args: argparse.Namespace, train: DataLoader, val: DataLoader, criterion: nn.Module, repeated_aug: bool
) -> None:
    """What is trained on and what on, and what may surprise."""
    world, images, validation = utils.get_world_size(), len(train.dataset), len(val.dataset)
    log_rank0(
        f'images      {images:,} for training, {validation:,} for validation, {_count(len(train), "step")} an epoch'
    )
    if repeated_aug:
        batch = _images_of_a_step(args)
        distinct = distinct_images(batch, world)
        log_rank0(f"sampler     repeated augmentation: {distinct} distinct images in a rank's batch of {batch}")
    else:
        why = ' (repeated augmentation starts at two ranks)' if args.repeated_aug else ''
        log_rank0(f'sampler     shuffled without repeats{why}')
    log_rank0(f'loss        {describe_loss(args, criterion)}')
    warn_of_idle_flags(args)
    if args.epochs <= args.warmup_epochs:
        log_rank0(f'warning: --warmup-epochs {args.warmup_epochs}: the run ends before the learning rate is up')
    steps = args.epochs * len(train)
    if args.model_ema and steps * (1 - args.model_ema_decay) < 3:
        log_rank0(
            f'warning: --model-ema-decay {args.model_ema_decay:g}: {steps:,} steps are too few for it; '
            'the moving average will be close to the first weights'
        )


def _relates(args: argparse.Namespace) -> bool:
    """Whether any relation term has a weight."""
    weights = args.w_sample, args.w_patch, args.w_rand, args.w_full
    return bool(args.s_id and args.distillation_beta and any(weights))


# Flags that act under a condition: which they are, its words, whether it is met. The first that is not is told.
_RELATIONS = ('w_sample', 'w_patch', 'w_rand', 'K', 'w_full', 'relations', 'distillation_beta',
              'relation_dtype', 'token_align', 'max_patches')  # fmt: skip
_CONDITIONS: tuple[tuple[tuple[str, ...], str, Callable[[argparse.Namespace], object]], ...] = (
    (('s_id', *_RELATIONS, 'distillation_alpha', 'distillation_tau'), 'a teacher', _taught),
    (('teacher_path', 'teacher_input_size', 'teacher_dtype'), 'a teacher', lambda a: _taught(a) or a.eval_teacher),
    (_RELATIONS, '--s-id and --t-id', lambda a: a.s_id),
    (('s_id', *_RELATIONS), 'a relation whose weight is not 0', _relates),
    (('distillation_type',), 'a weight of KD or of a relation', lambda a: a.distillation_alpha or _relates(a)),
    (('distillation_tau',), '--distillation-type soft', lambda a: a.distillation_type == 'soft'),
    (('distillation_tau',), '--distillation-alpha above 0', lambda a: a.distillation_alpha),
    (('smoothing',), '--distillation-alpha below 1', lambda a: not _taught(a) or a.distillation_alpha < 1),
    (('K',), '--w-rand above 0', lambda a: a.w_rand),
    # Relations of patches do not cross images.
    (('relations',), '--w-sample, --w-rand or --w-full above 0', lambda a: a.w_sample or a.w_rand or a.w_full),
    (('relation_dtype',), '--w-sample, --w-patch or --w-rand above 0', lambda a: a.w_sample or a.w_patch or a.w_rand),
    (('max_patches',), '--token-align merge', lambda a: a.token_align == 'merge'),
    (('model_ema_decay', 'model_ema_force_cpu', 'eval_ema'), '--model-ema', lambda a: a.model_ema),
    (('decay_epochs',), '--sched step', lambda a: a.sched == 'step'),
    (('decay_rate',), '--sched step or poly', lambda a: a.sched in ('step', 'poly')),
    (('min_lr',), '--sched cosine, tanh or poly', lambda a: a.sched != 'step'),
    (('warmup_lr',), '--warmup-epochs above 0', lambda a: a.warmup_epochs),
    (('lr_noise_pct', 'lr_noise_std'), '--lr-noise', lambda a: a.lr_noise),
    (('aa', 'color_jitter', 'train_interpolation', 'reprob', 'remode', 'recount'), 'augmentation, for --no-aug is set',
     lambda a: not a.no_aug),
    (('color_jitter',), '--aa none or 3a', lambda a: a.aa in ('', 'none') or '3a' in a.aa),  # as timm looks for it
    (('remode', 'recount'), '--reprob above 0', lambda a: a.reprob),
    (('mixup_prob', 'mixup_mode'), '--mixup or --cutmix', _mixes),
    (('mixup_switch_prob',), 'both --mixup and --cutmix', lambda a: a.mixup and (a.cutmix or a.cutmix_minmax)),
    (('keep', 'save_interval_minutes', 'save_interval_steps'), '--output-dir', lambda a: a.output_dir),
)  # fmt: skip


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def warn_of_idle_flags(args: argparse.Namespace) -> None:
    """Says which flags were typed in vain."""
    default, told = get_args_parser().get_default, set()
    for names, needed, met in _CONDITIONS:
        typed = [name for name in names if name not in told and getattr(args, name) != default(name)]
        if typed and not met(args):
            log_rank0(f'warning: {", ".join(map(_flag, typed))}: no effect without {needed}')
            told.update(typed)


def describe_loss(args: argparse.Namespace, criterion: ManifoldDistillationLoss) -> str:
    if criterion.distillation_type == 'none':
        return 'CE, no teacher'
    text = f'{1 - criterion.alpha:g}·CE + {criterion.alpha:g}·KD ({criterion.distillation_type}, τ {criterion.tau:g})'
    text = text if criterion.alpha else 'CE, no KD'
    if not args.s_id:
        return text + '; no relation terms, for there are no --s-id and --t-id'
    terms = []
    for name, term in RELATION_TERMS.items():
        if criterion.weights[name] or term.default_weight:
            tokens = f' of {criterion.K} tokens' if 'K' in term.reads else ''
            terms.append(f'{criterion.weights[name]:g}·{term.label}{tokens}')
    weights = ' + '.join(terms)
    ranks = utils.get_world_size() if criterion.relations == 'global' else 1
    whose = 'a rank' if criterion.relations == 'rank' else _count(ranks, 'rank')
    return f'{text} + {criterion.beta:g}·({weights}), means over the {ranks * args.batch_size} images of {whose}'


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s"[: number != 1]}'


# The run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What `run` has built for `train`."""

    device: torch.device
    num_classes: int
    stats: tuple[tuple, tuple]  # mean and deviation the images are normalised by
    finish: transforms.DevicePreprocess
    student: models.TappedModel
    teacher: models.TappedModel | None
    val_loader: DataLoader
    last_step: int | None  # of the checkpoint.pth in --output_dir
    consensus: stopping.RankConsensus


def run(args: argparse.Namespace, device: torch.device, signals: stopping.StopSignals) -> None:
    """Builds the parts, in the order that finds faults before work is done, and evaluates or trains."""
    with usage_error_context('--data-path', args.data_path):
        num_classes = utils.main_process_first(
            lambda: datasets.count_classes(args.data_set, args.data_path, args.inat_category, args.num_classes)
        )
    describe_run(args, device, num_classes)
    taught = _taught(args) and not args.eval
    torch.manual_seed(args.seed)
    student_model, teacher = build_student(args, num_classes), None
    stats = models.normalisation(student_model)
    if taught or args.eval_teacher:
        teacher_model = build_teacher(args)
        check_classes(args, teacher_model.num_classes, num_classes)
        args = choose_blocks(args, student_model, teacher_model) if taught else args
        teacher = tap_teacher(args, teacher_model, taught, stats)
    student = tap_student(args, student_model, taught)
    describe_model('student', args.model, student)
    if teacher is not None:
        describe_model('teacher', args.teacher_model, teacher)
        teacher.to(device)
    if taught:
        align(args, student, teacher)
    checkpoint, own = run_dir.read_resume(args.resume, args.output_dir, args.eval)
    if checkpoint and not args.eval:
        run_dir.check_same_flags(args.resume, vars(args), checkpoint)
    if checkpoint:
        load_student(args, student.model, checkpoint)
    student.to(device)
    last_step = None
    if not args.eval:
        last_step = run_dir.prepare_folder(args.output_dir, args.resume, args.start_epoch, checkpoint, own)

    val_loader = build_val_loader(args, device)
    folders = getattr(val_loader.dataset, 'dataset', None)
    if isinstance(folders, datasets.ImageNetFolder) and not (folders.numbered and len(folders.classes) == num_classes):
        labels = 'labels are those of ImageNet' if folders.numbered else 'labels are their order, not those of ImageNet'
        found = f'{len(folders.classes)} class folders of {num_classes}'
        log_rank0(f'warning: --data-path {args.data_path} has {found}; {labels}')
    consensus = stopping.RankConsensus(signals)
    uncovered = [min(255, round(255 * value)) for value in stats[0]]  # as timm has it
    finish = transforms.DevicePreprocess(*stats, args.remode, uncovered).to(device)
    if args.eval_teacher:
        # As it teaches: weights of a type of their own know no autocast.
        how = argparse.Namespace(**{**vars(args), 'amp_dtype': 'float32'}) if args.teacher_dtype else args
        network = nn.Sequential(finish, teacher.prepare, teacher.model)
        measure(how, network, val_loader, device, lambda: stop_if_told(consensus), 'teacher')
    if args.eval:
        network = nn.Sequential(finish, student.model)
        measure(args, network, val_loader, device, lambda: stop_if_told(consensus), 'network')
        report_bad_images(device, val_loader)
        return
    signals.defer()
    parts = Parts(
        device, num_classes, stats, finish, student, teacher if taught else None, val_loader, last_step, consensus
    )
    train(args, parts, checkpoint)


def load_student(args: argparse.Namespace, model: nn.Module, checkpoint: dict) -> None:
    """Loads the weights of --resume, the moving average with --eval --eval-ema."""
    with usage_error_context('--resume', args.resume):
        models.load_weights(model, models.named_weights(checkpoint, ema=args.eval and args.eval_ema))


def stop_if_told(consensus: stopping.RankConsensus) -> None:
    """Stops all ranks where one has received a signal and there is nothing to save."""
    signum, _ = consensus.poll()
    if signum:
        raise stopping.StoppedError(signum)


def measure(
    args: argparse.Namespace, model: nn.Module, loader: DataLoader, device: torch.device, poll: Callable, what: str
) -> dict[str, float]:
    """Evaluates and prints the result."""
    # Other batches and another mode: compiled anew they would cost more than they save.
    with torch.compiler.set_stance('force_eager') if args.compile else nullcontext():
        stats = evaluate(model, loader, device, _amp_dtype(args, device), poll)
    if not stats['images']:
        raise datasets.BadImageError(f'{args.data_path}: no validation image can be read')
    if not math.isfinite(stats['loss']):
        log_rank0(f'warning: not finite: logits of the {what}; its accuracy means nothing')
    log_rank0(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    images = stats['images'] // (1 if args.dist_eval else utils.get_world_size())
    log_rank0(f'Accuracy of the {what} on the {images} test images: {stats["acc1"]:.1f}%')
    return stats


def train(args: argparse.Namespace, parts: Parts, checkpoint: dict) -> None:
    """The epoch loop: train, evaluate, log, save."""
    device = parts.device
    repeated_aug = choose_order(args, checkpoint)
    train_loader = build_train_loader(args, device, repeated_aug, parts.stats[0])
    criterion = build_criterion(args)
    describe_training(args, train_loader, parts.val_loader, criterion, repeated_aug)
    state = build_state(args, parts.student.model)
    state.data = datasets.fingerprint(train_loader.dataset.dataset, parts.num_classes)
    state.repeated_aug = repeated_aug
    run_dir.check_same_data(args.data_path, args.resume, state, checkpoint)
    run_dir.restore(state, checkpoint, args.resume, args.start_epoch, len(train_loader))
    watch = NonFiniteGuard(state.scaler, every_step=device.type == 'cpu')
    if args.compile:  # after the moving average was copied
        compile_models(args, parts)
    wrapped = parts.student
    if torch.distributed.is_initialized():
        wrapped = DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == 'cuda' else None)
        watch.attach(wrapped)
    global_batch = _images_of_a_step(args) * utils.get_world_size()
    manager = CheckpointManager(
        state,
        Path(args.output_dir) if args.output_dir else None,
        parts.consensus,
        vars(args),
        global_batch=global_batch,
        keep=args.keep,
        interval=60 * args.save_interval_minutes or math.inf,
        every=args.save_interval_steps,
        last_step=parts.last_step,
        before_save=watch.look,
    )
    options = {
        'device': device,
        'amp_dtype': _amp_dtype(args, device),
        'seed': args.seed,
        'finish': parts.finish,
        'mixup': build_mixup(args, parts.num_classes),
        # without `step`: a constant decay from the first step on
        'average': (lambda: state.ema.update(state.model)) if state.ema else None,
        'after_step': manager.after_step,
        'clip_grad': args.clip_grad,
        # As in the release: fine-tuning without a teacher keeps drop-path off and averages two heads.
        'train_mode': not args.finetune or parts.teacher is not None,
        'shared_draw': args.relations == 'global',
        'grad_share': args.log_grad_share,
        'print_freq': args.print_freq,
        'accum_steps': args.accum_steps,
    }
    if state.epoch + 1 >= args.epochs:
        log_rank0(f'already trained for --epochs {args.epochs}')
    start = time.monotonic()
    manager.drain()
    for epoch in range(state.epoch + 1, args.epochs):
        train_loader.sampler.set_epoch(epoch, state.position)
        progress = {'epoch': epoch, 'step': state.step, 'done': state.position // global_batch}
        models_and_loss = (wrapped, parts.teacher, criterion)
        stats = train_one_epoch(
            *models_and_loss, train_loader, state.optimizer, state.scaler, state.meters, watch, **progress, **options
        )
        finish_epoch(args, parts, state, manager, stats)
        report_bad_images(device, train_loader, parts.val_loader)
    manager.finish()
    took = time.monotonic() - start
    share = 100 * manager.seconds / max(took, 1e-9)
    log_rank0(f'Training time {timedelta(seconds=int(took))}, {share:.2f} % of it for {manager.saves} saves')
    report_bad_images(device, train_loader, parts.val_loader, again=True)


def compile_models(args: argparse.Namespace, parts: Parts) -> None:
    """Compiles the blocks of both models."""
    if args.log_grad_share:  # its backward passes come before the step's, which needs what they would give away
        torch._functorch.config.donated_buffer = False
    with usage_error_context('--compile', f'with --model {args.model}'):
        counts = [models.compile_blocks(parts.student)]
    if parts.teacher is not None:
        with usage_error_context('--compile', f'with --teacher-model {args.teacher_model}'):
            counts.append(models.compile_blocks(parts.teacher))
    log_rank0(
        f'compile     {" and ".join(map(str, counts))} blocks, in the first step; its time is in the first log line'
    )


def finish_epoch(
    args: argparse.Namespace, parts: Parts, state: TrainingState, manager: CheckpointManager, stats: dict[str, float]
) -> None:
    """Evaluates, logs and saves."""

    def measured(model: nn.Module, what: str) -> dict[str, float]:
        if utils.get_world_size() > 1:  # BatchNorm's statistics of the first rank count, as in DDP's next forward pass
            distribute_bn(model, utils.get_world_size(), reduce=False)
        return measure(args, nn.Sequential(parts.finish, model), parts.val_loader, parts.device, manager.poll, what)

    rows = {'train': stats, 'test': measured(state.model, 'network')}
    if args.eval_ema and state.ema:
        average = state.ema.module if state.ema.device is None else copy.deepcopy(state.ema.module).to(parts.device)
        rows['test_ema'] = measured(average, 'moving average')
    best = rows['test']['acc1'] >= state.best_acc1  # of equals the last one
    state.best_acc1 = max(state.best_acc1, rows['test']['acc1'])
    log_rank0(f'Max accuracy: {state.best_acc1:.2f}%')
    state.finish_epoch()
    kept = {'train': stats.keys(), 'test': ('loss', 'acc1', 'acc5'), 'test_ema': ('loss', 'acc1', 'acc5')}
    row = {f'{split}_{key}': values[key] for split, values in rows.items() for key in kept[split]}
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    manager.save({**row, 'epoch': state.epoch, 'n_parameters': parameters}, best)


def report_bad_images(device: torch.device, *loaders: DataLoader, again: bool = False) -> None:
    """Lists the images that were left out on any rank, those since the last list or all."""
    for loader in loaders:
        instead = 'left out of evaluation' if isinstance(loader.dataset, EvalDataset) else 'replaced by the next one'
        for image in loader.dataset.list_bad(lambda bad: utils.sum_over_ranks(bad.to(device)), again):
            log_rank0(f'warning: cannot be read, {instead}: {image}')


def main(argv: list[str] | None = None) -> None:
    """Runs in process; returns when all is done.

    Args:
        argv: the flags; those of the command line if None.

    Raises:
        SystemExit: after one line on stderr; 2 for bad input; 1 for a loss that is not finite, an image that cannot be
            read, a state that could not be saved, or another rank that has gone; 128 + n for signal n; 0 after --help.
    """
    with stopping.StopSignals() as signals:
        try:
            _start(argv, signals)
        except UsageError as error:
            # Bad input is bad on all ranks. The first of a machine says so, and its launcher ends the others while they
            # wait; a fault they alone have is said after all.
            signals.restore()
            if os.environ.get('LOCAL_RANK', '0') != '0':
                time.sleep(10)
            _stop(error, 2)
        except FloatingPointError as error:
            _stop(error if utils.get_rank() == 0 else '', 1)  # all ranks know it
        except (datasets.BadImageError, run_dir.NotSavedError) as error:
            _stop(error, 1)
        except stopping.StoppedError as error:
            _stop(error if utils.get_rank() == 0 else '', 128 + error.signum)
        except RuntimeError as error:
            if stopping.is_peer_failure(error):  # which has said why
                _stop(f'rank {utils.get_rank()} exiting: another rank failed', 1)
            if not str(error).startswith('DataLoader worker'):
                raise
            _stop(f'{str(error).rstrip(". ")}; was there memory enough for --num_workers?', 1)
        except (ConnectionError, EOFError) as error:  # in the midst of a batch that it was handing over
            _stop(f'a DataLoader worker has gone ({error}); was there memory enough for --num_workers?', 1)
    # Only after success: with nccl it waits for the other ranks.
    utils.destroy_distributed()


def _start(argv: list[str] | None, signals: stopping.StopSignals) -> None:
    args = parse_args(argv)
    if args.list_blocks:
        return list_blocks(args)
    with usage_error_context('--dist_url', args.dist_url, RuntimeError):
        device = utils.init_distributed(args.device, args.dist_url)
    if utils.get_world_size() > 1:
        signals.defer()  # until all ranks can stop together
    try:
        run(args, device, signals)
    except BaseException:
        stopping.end_loader_processes()
        raise


def _stop(reason: object, code: int) -> NoReturn:
    if str(reason):
        # The last line is the reason; what a loader process raised has its traceback before it, and its class.
        line = re.sub(r'^[\w.]+Error: ', '', str(reason).strip().splitlines()[-1])
        with suppress(OSError):
            print(f'main.py: error: {line}', file=sys.stderr, flush=True)
    raise SystemExit(code) from None


if __name__ == '__main__':
    loggers.unbuffer_stdio()
    try:
        main()
    except SystemExit:
        stopping.ignore_signals()  # by which a launcher ends the other ranks once one has left; all are leaving
        raise
