"""Student and teacher of a run: built through timm, with hooks on the chosen blocks, their tokens on common grids."""

from dataclasses import dataclass, replace

import torch
from torch import nn

import checkpoints
import models
from flags import LossConfig, ModelConfig, RunConfig
from loggers import log_rank0
from models import TappedModel, format_grid
from utils import UsageError, format_values, usage_error_context

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, values in 0 … 1


@dataclass(frozen=True)
class Pair:
    """Student and teacher with their hooks."""

    config: ModelConfig  # with numbers in place of --s-id auto --t-id auto
    student: TappedModel
    teacher: TappedModel | None  # frozen; None if the run needs none
    stats: Stats  # by which the images are normalised, the student's

    def to(self, device: torch.device) -> None:
        self.student.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
            if self.config.fused_talking_heads and (problem := models.fused_talking_heads_problem(device)):
                log_rank0(f'warning: --fused-talking-heads: {problem}; the teacher uses the plain attention')


def build_pair(config: ModelConfig, loss: LossConfig, run: RunConfig, num_classes: int) -> Pair:
    """Builds the student, and the teacher if the run needs one, on the CPU.

    Raises:
        UsageError: a model, its weights or its blocks cannot be used; names the flag and its value.
    """
    distills, alpha = loss.has_teacher and not run.eval, loss.distillation_alpha
    student, teacher = build_student(config, num_classes, run.eval), None
    stats = models.normalisation(student)
    if distills or run.eval_teacher:
        model = build_teacher(config)
        has_logits = alpha > 0 or not config.s_id
        _check_classes(config, num_classes_of(model), num_classes, has_logits, run.eval_teacher)
        if distills:
            config = choose_blocks(config, student, model)
        teacher = register_teacher_hooks(config, model, stats, distills, with_logits=alpha > 0)
    tapped = register_student_hooks(config, student, distills)
    if config.grad_checkpointing and not run.eval:
        with usage_error_context('--grad-checkpointing', f'with --model {config.model}'):
            models.checkpoint_activations(tapped)
    _log_model('student', config.model, tapped)
    if teacher is not None:
        _log_model('teacher', config.teacher_model, teacher)
        if distills:
            _align(config, tapped, teacher)
    return Pair(config, tapped, teacher, stats)


def build_student(config: ModelConfig, num_classes: int, evaluates: bool = False) -> nn.Module:
    """The student with random weights, or those of --finetune. A new head is for training, not for evaluation."""
    dropout = {'pos_drop_rate': config.drop, 'proj_drop_rate': config.drop} if config.drop else {}
    kwargs = {'drop_path_rate': config.drop_path, **dropout, **config.model_kwargs}
    options = f'--input-size {config.input_size}' + (f' and --drop {config.drop}' if config.drop else '')
    with usage_error_context('--model', f'{config.model} with {options}'):
        student = models.build(config.model, num_classes, config.input_size, kwargs=kwargs)
    if config.finetune:
        with usage_error_context('--finetune', config.finetune):
            weights = models.named_weights(checkpoints.read_checkpoint(config.finetune))
            state, changes = models.adapt(student, weights, replace_heads=not evaluates)
            models.load_weights(student, state)
            stats, trained_with = models.normalisation(student), models.normalisation(student, config.finetune)
        log_rank0(f'finetune    {config.finetune}' + ''.join(f'; {change}' for change in changes))
        if stats != trained_with:
            log_rank0(f'warning: --finetune {config.finetune}: was trained with another mean and std than --model uses')
    return student


def build_teacher(config: ModelConfig) -> nn.Module:
    """The teacher with its weights, from --teacher-path or timm, and a head of as many classes as these have."""
    flag = '--teacher-input-size' if config.teacher_input_size else '--input-size'
    with usage_error_context('--teacher-model', f'{config.teacher_model} with {flag} {config.teacher_size}'):
        pretrained = not config.teacher_path
        teacher = models.build(config.teacher_model, None, config.teacher_size, pretrained, config.teacher_kwargs)
    if config.teacher_path:
        with usage_error_context('--teacher-path', config.teacher_path):
            weights = models.named_weights(checkpoints.read_checkpoint(config.teacher_path))
            state, changes = models.adapt(teacher, weights, replace_heads=False)
            models.match_head(teacher, state)
            models.load_weights(teacher, state)
        if changes:
            log_rank0(f'teacher     {config.teacher_path}' + ''.join(f'; {change}' for change in changes))
    return teacher


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
    config: ModelConfig, teacher: nn.Module, stats: Stats, distills: bool = True, with_logits: bool = True
) -> TappedModel:
    """Hooks on --t-id, if the run distills; frozen. `stats` are those by which the student's images are normalised."""
    block_ids = [int(i) for i in config.teacher_ids if distills]
    with usage_error_context('--t-id', f'{format_values(block_ids)} with --teacher-model {config.teacher_model}'):
        tapped = models.tap(teacher, block_ids, config.teacher_size)
    with usage_error_context('--teacher-path', config.teacher_path):
        teacher_stats = models.normalisation(teacher, config.teacher_path)
    dtype = getattr(torch, config.teacher_dtype) if config.teacher_dtype else None
    preprocess = models.TeacherPreprocess(stats, teacher_stats, config.teacher_input_size, dtype)
    fused = config.fused_talking_heads
    with usage_error_context('--fused-talking-heads', f'with --teacher-model {config.teacher_model}'):
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
            raise UsageError(
                f'--token-align {config.token_align}: {error}, in block {student.block_ids[i]} of --model '
                f'{config.model} and {teacher.block_ids[i]} of --teacher-model {config.teacher_model}. Use '
                '--token-align pool, interpolate or merge (--max-patches), other blocks (--list-blocks), '
                f'or another --teacher-input-size than {config.teacher_size}'
            ) from error
    if common != pairs:
        changes = dict.fromkeys(zip(pairs, common, strict=True))
        steps = [f'{format_grid(s)} and {format_grid(t)} on {format_grid(both)}' for (s, t), (both, _) in changes]
        log_rank0(f'align       {config.token_align}, student and teacher: {", ".join(steps)}')
    if common:
        student.align([grid for grid, _ in common], config.token_align)
        teacher.align([grid for _, grid in common], config.token_align)


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


def compile_pair(pair: Pair, with_teacher: bool) -> None:
    """Compiles the blocks of the student, and of the teacher if it teaches; after the EMA was copied."""
    tapped = [('--model', pair.config.model, pair.student)]
    if with_teacher and pair.teacher is not None:
        tapped.append(('--teacher-model', pair.config.teacher_model, pair.teacher))
    counts = []
    for flag, name, model in tapped:
        with usage_error_context('--compile', f'with {flag} {name}'):
            counts.append(models.compile_blocks(model))
    blocks = ' and '.join(map(str, counts))
    log_rank0(f'compile     {blocks} blocks, in the first step; the first log line includes its time')
