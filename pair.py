"""Student and teacher of a run: built through timm, with hooks on the chosen blocks, their tokens on common grids."""

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

import models
from flags import Config, ModelConfig
from loggers import log_rank0
from models import TappedModel, format_grid
from utils import UsageError, format_values, usage_error_context
from weights_files import Stats, WeightsFiles, recorded_stats


@dataclass(frozen=True)
class Pair:
    """Student and teacher with their hooks."""

    config: ModelConfig  # with numbers in place of --s-id auto --t-id auto
    student: TappedModel
    teacher: TappedModel | None  # frozen; None if the run needs none
    stats: Stats  # by which the images are normalised, the student's
    teacher_checksum: str = ''  # of the teacher's weights as they were loaded

    def to(self, device: torch.device) -> None:
        self.student.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
            problem = models.fused_talking_heads_problem(device)
            if problem and models.uses_fused_talking_heads(self.teacher.model):
                log_rank0(f'warning: --fused talking-heads: {problem}; the teacher uses the plain attention')


def build_pair(config: Config, files: WeightsFiles, num_classes: int, fused: Collection[str] = ()) -> Pair:
    """Builds the student, and the teacher if the run needs one, on the CPU. `fused`: parts of --fused.

    Raises:
        UsageError: a model, its weights or its blocks cannot be used; names the flag and its value.
    """
    model, run, distills, alpha = config.model, config.run, config.distills, config.loss.distillation_alpha
    student, teacher, checksum = build_student(model, num_classes, run.eval, files), None, ''
    stats = recorded_stats(files.resume) or models.normalisation(student)
    if distills or run.eval_teacher:
        built = build_teacher(model, files.teacher)
        checksum = models.checksum(_teacher_weights(model, files.teacher) or built.state_dict())
        has_logits = alpha > 0 or not model.s_id
        _check_classes(model, num_classes_of(built), num_classes, has_logits, run.eval_teacher)
        if distills:
            model = choose_blocks(model, student, built)
        teacher_stats = recorded_stats(files.teacher)
        # By default it depends on the teacher; if the part is typed, a teacher that cannot have it is an error.
        is_typed = run.fused is not None
        fuse = 'talking-heads' in fused and (is_typed or not models.unfusible_heads(built))
        teacher = register_teacher_hooks(model, built, stats, distills, alpha > 0, teacher_stats, fuse)
    tapped = register_student_hooks(model, student, distills)
    if model.grad_checkpointing and not run.eval:
        with usage_error_context('--grad-checkpointing', f'with --model {model.model}'):
            models.checkpoint_activations(tapped)
    _log_model('student', model.model, tapped)
    _warn_of_unseen_pixels('--input-size', model.input_size, student)
    if teacher is not None:
        _log_model('teacher', model.teacher_model, teacher)
        _warn_of_unseen_pixels('--teacher-input-size', model.teacher_size, teacher.model)
        if distills:
            _align(model, tapped, teacher)
    return Pair(model, tapped, teacher, stats, checksum)


def build_student(
    config: ModelConfig, num_classes: int, evaluates: bool = False, files: WeightsFiles | None = None
) -> nn.Module:
    """The student with random weights, or those of --pretrained or --finetune; those of --resume are loaded later.

    A new head is for training, not for evaluation.
    """
    files = files or WeightsFiles()
    dropout = {'pos_drop_rate': config.drop, 'proj_drop_rate': config.drop} if config.drop else {}
    kwargs = {'drop_path_rate': config.drop_path, **dropout, **config.model_kwargs}
    options = f'--input-size {config.input_size}' + (f' and --drop {config.drop}' if config.drop else '')
    options += f' and --model-kwargs {format_values(config.model_kwargs)}' if config.model_kwargs else ''
    pretrained = config.pretrained and not files.resume
    options += ' and --pretrained' if pretrained else ''
    with usage_error_context('--model', f'{config.model} with {options}'):
        size = None if pretrained and evaluates else num_classes
        student = models.build(config.model, size, config.input_size, pretrained, kwargs)
    if num_classes_of(student) != num_classes:
        raise UsageError(f'--pretrained: {config.model} has {num_classes_of(student)} classes, the data {num_classes}')
    if config.finetune and not files.resume:
        with usage_error_context('--finetune', f'{config.finetune} with --model {config.model}'):
            key = '' if config.teacher_path else config.checkpoint_key
            weights = models.named_weights(files.finetune, key=key)
            state, changes = models.adapt(student, weights, replace_heads=not evaluates)
            models.load_weights(student, state)
            stats = models.normalisation(student)
            trained_with = recorded_stats(files.finetune) or models.normalisation(student, config.finetune)
        log_rank0(f'finetune    {config.finetune}' + ''.join(f'; {change}' for change in changes))
        if stats != trained_with:
            log_rank0(f'warning: --finetune {config.finetune}: was trained with another mean and std than --model uses')
    elif not pretrained and not files.resume and (models.has_source(config.model) or '.' in config.model):
        log_rank0(f'warning: --model {config.model}: starts from random weights; --pretrained starts from its weights')
    return student


def build_teacher(config: ModelConfig, file: dict[str, Any]) -> nn.Module:
    """The teacher with its weights, from --teacher-path or timm, and a head of as many classes as these have.

    `file` is what `checkpoints.read_checkpoint` returns of --teacher-path.
    """
    flag = '--teacher-input-size' if config.teacher_input_size else '--input-size'
    options = f'{flag} {config.teacher_size}'
    options += f' and --teacher-kwargs {format_values(config.teacher_kwargs)}' if config.teacher_kwargs else ''
    options += ' and --teacher-pretrained' if config.teacher_pretrained and not config.teacher_path else ''
    with usage_error_context('--teacher-model', f'{config.teacher_model} with {options}'):
        pretrained = not config.teacher_path
        teacher = models.build(config.teacher_model, None, config.teacher_size, pretrained, config.teacher_kwargs)
    if config.teacher_path:
        value = f'{config.teacher_path} with --teacher-model {config.teacher_model}'
        with usage_error_context('--teacher-path', value):
            state, changes = models.adapt(teacher, _teacher_weights(config, file), replace_heads=False)
            models.match_head(teacher, state)
            models.load_weights(teacher, state)
        if changes:
            log_rank0(f'teacher     {config.teacher_path}' + ''.join(f'; {change}' for change in changes))
    return teacher


def _teacher_weights(config: ModelConfig, file: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in the file of --teacher-path, {} without one."""
    return models.named_weights(file, key=config.checkpoint_key) if config.teacher_path else {}


def _warn_of_unseen_pixels(flag: str, size: int, model: nn.Module) -> None:
    """Warns if the patches do not cover the image: tokens are then not where those of the other model are."""
    embed = getattr(model, 'patch_embed', None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad or not size % (patch := embed.patch_size[0]):
        return
    rest = size % patch
    fitting = [fit for fit in (size - rest, size - rest + patch) if fit]
    log_rank0(
        f'warning: {flag} {size}: patches of {patch} pixels leave the last {rest} rows and columns of the image '
        f'unseen; {flag} {" or ".join(map(str, fitting))} fits'
    )


def choose_blocks(config: ModelConfig, student: nn.Module, teacher: nn.Module) -> ModelConfig:
    """The config with numbers in place of --s-id auto --t-id auto."""
    if config.s_id != ['auto']:
        return config
    with usage_error_context('--s-id', f'auto with --model {config.model}'):
        depth = len(models.list_blocks(student, config.input_size))
    with usage_error_context('--t-id', f'auto with --teacher-model {config.teacher_model}'):
        teacher_depth = len(models.list_blocks(teacher, config.teacher_size))
    s_id, t_id = models.pair_ids(depth, teacher_depth)
    return replace(config, s_id=list[int | str](s_id), t_id=list[int | str](t_id))


def register_student_hooks(config: ModelConfig, student: nn.Module, distills: bool = True) -> TappedModel:
    """Hooks on --s-id, if the run distills."""
    block_ids = [int(i) for i in config.student_ids if distills]
    with usage_error_context('--s-id', f'{format_values(block_ids)} with --model {config.model}'):
        return models.tap(student, block_ids, config.input_size, two_heads=distills)


def register_teacher_hooks(
    config: ModelConfig,
    teacher: nn.Module,
    stats: Stats,
    distills: bool = True,
    with_logits: bool = True,
    teacher_stats: Stats | None = None,
    fused: bool = False,
) -> TappedModel:
    """Hooks on --t-id, if the run distills; frozen.

    The student's images are normalised by `stats`, the teacher's by `teacher_stats`, or as timm or the source of its
    weights say. `fused`: its talking heads are.
    """
    block_ids = [int(i) for i in config.teacher_ids if distills]
    with usage_error_context('--t-id', f'{format_values(block_ids)} with --teacher-model {config.teacher_model}'):
        tapped = models.tap(teacher, block_ids, config.teacher_size)
    with usage_error_context('--teacher-path', config.teacher_path):
        teacher_stats = teacher_stats or models.normalisation(teacher, config.teacher_path)
    dtype = getattr(torch, config.teacher_dtype) if config.teacher_dtype else None
    preprocess = models.TeacherPreprocess(stats, teacher_stats, config.teacher_input_size, dtype)
    with usage_error_context('--fused', f'talking-heads with --teacher-model {config.teacher_model}'):
        return models.freeze(tapped, preprocess, with_logits=with_logits, dtype=dtype, fused_talking_heads=fused)


def num_classes_of(model: nn.Module) -> int:
    """Size of the head of a timm model."""
    assert isinstance(model.num_classes, int)
    return model.num_classes


def _check_classes(config: ModelConfig, classes: int, num_classes: int, has_logits: bool, evaluates: bool) -> None:
    """Logits are compared class by class; a teacher of other classes, or without a head, has only relations."""
    if classes == num_classes or not (has_logits or evaluates):
        return
    path = config.teacher_path
    source = f'--teacher-path {path}' if path else f'--teacher-model {config.teacher_model}'
    has = f'has {classes} classes, the data {num_classes}' if classes else 'has no head'
    if evaluates:
        raise UsageError(f'{source}: {has}; --eval-teacher needs the same classes')
    raise UsageError(f'{source}: {has}; use its relations alone: --distillation-alpha 0, with --s-id and --t-id')


def _align(config: ModelConfig, student: TappedModel, teacher: TappedModel) -> None:
    """Brings the tokens of each pair of blocks to one grid, or refuses: relations of unlike tokens mean nothing."""
    pairs = [(block.grid, other.grid) for block, other in zip(student.blocks, teacher.blocks, strict=True)]
    common = []
    for i, pair in enumerate(pairs):
        try:
            common.append(models.common_grid(*pair, config.token_align, config.max_patches))
        except ValueError as error:
            size = _fitting_teacher_size(config, student, teacher)
            others = ', '.join(how for how in models.ALIGNMENTS if how not in ('error', config.token_align))
            raise UsageError(
                f'--token-align {config.token_align}: block {student.block_ids[i]} of --model {config.model} and block '
                f'{teacher.block_ids[i]} of --teacher-model {config.teacher_model} with images of '
                f'{config.teacher_size} pixels: {error}. '
                + (f'--teacher-input-size {size} gives the same grids. ' if size else '')
                + f'Or use another --token-align ({others}) or other blocks (--list-blocks)'
            ) from error
    if common != pairs:
        changes = dict.fromkeys(zip(pairs, common, strict=True))
        steps = [f'{format_grid(s)} and {format_grid(t)} on {format_grid(both)}' for (s, t), (both, _) in changes]
        log_rank0(f'align       {config.token_align}, student and teacher: {", ".join(steps)}')
    if common:
        student.align([grid for grid, _ in common], config.token_align)
        teacher.align([grid for _, grid in common], config.token_align)


def _fitting_teacher_size(config: ModelConfig, student: TappedModel, teacher: TappedModel) -> int | None:
    """The --teacher-input-size at which the grids of all paired blocks are the student's, None if there is none."""
    size = round(config.teacher_size * student.blocks[0].grid[0] / teacher.blocks[0].grid[0])
    with suppress(Exception):  # whatever the teacher says to this size, it is only advice
        model = models.build(config.teacher_model, None, size, kwargs=config.teacher_kwargs)
        blocks = models.list_blocks(model, size)
        if [blocks[i].grid for i in teacher.block_ids] == [block.grid for block in student.blocks]:
            return size
    return None


def _log_model(role: str, name: str, tapped: TappedModel) -> None:
    parameters = sum(p.numel() for p in tapped.model.parameters())
    taps = 'no blocks tapped'
    if tapped.block_ids:
        kinds = dict.fromkeys(f'{format_grid(block.grid)} of width {block.width}' for block in tapped.blocks)
        taps = f'blocks {format_values(tapped.block_ids)} of {tapped.depth} tapped, patch tokens {", ".join(kinds)}'
    log_rank0(f'{role:<12}{name}, {parameters:,} parameters, {taps}')


def log_blocks(config: ModelConfig) -> None:
    """Prints the blocks that --s-id and --t-id may name."""
    with usage_error_context('--model', f'{config.model} with --input-size {config.input_size}'):
        model = models.build(config.model, None, config.input_size, kwargs=config.model_kwargs)
        blocks = models.list_blocks(model, config.input_size)
    log_rank0(f'{config.model}, {config.input_size} pixels: {len(blocks)} blocks over patch tokens')
    log_rank0(f'{"index":>5}  {"grid":>9}  {"width":>5}  path')
    for i, block in enumerate(blocks):
        log_rank0(f'{i:>5}  {format_grid(block.grid):>9}  {block.width:>5}  {block.path}')


def compile_pair(pair: Pair, with_teacher: bool, whole: bool = False) -> None:
    """Compiles the student, and the teacher if it teaches; after the EMA was copied.

    Args:
        whole: True compiles whole models, see `models.compile_model`; False their blocks.
    """
    tapped = {'student': pair.student}
    if with_teacher and pair.teacher is not None:
        tapped['teacher'] = pair.teacher
    names = {'student': f'--model {pair.config.model}', 'teacher': f'--teacher-model {pair.config.teacher_model}'}
    counts = []
    for role, model in tapped.items():
        checkpointed = role == 'student' and pair.config.grad_checkpointing
        if whole and not checkpointed:
            models.compile_model(model, partial(_log_compile, role))
        else:
            if whole:  # inside a compiled graph, a checkpoint on a GPU would draw from generators that no step seeds
                _log_compile(role, 'compiled per block: with --grad-checkpointing random numbers would change')
            with usage_error_context('--compile', f'with {names[role]}'):
                counts.append(models.compile_blocks(model))
        _log_first_call(role, model)
    what = f'{" and ".join(tapped)}, each as a whole' if whole else f'{" and ".join(map(str, counts))} blocks'
    log_rank0(f'compile     {what}, in the first step')


def _log_compile(role: str, text: str) -> None:
    log_rank0(f'compile     {role}: {text}')


def _log_first_call(role: str, tapped: TappedModel) -> None:
    """Logs how long the first forward pass of a model takes: it compiles, also what the backward pass runs."""
    # Both hooks are outside of what is compiled.
    start = 0.0

    def before(*_: object) -> None:
        nonlocal start
        start = time.monotonic()

    def after(*_: object) -> None:
        for handle in handles:
            handle.remove()
        _log_compile(role, f'first forward pass took {time.monotonic() - start:.0f} s')

    handles = tapped.register_forward_pre_hook(before), tapped.register_forward_hook(after)
