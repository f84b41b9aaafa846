"""The output folder of a run: its training state, when it is saved, which files it has, and what a resume checks."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

import checkpoints
import locks
import models
import utils
from checkpoints import BEST, EARLIER, FORMAT, KEPT, LAST, LOG
from locks import NotSavedError
from loggers import log_rank0
from stopping import RankConsensus, StoppedError
from utils import UsageError, flag_name, format_values, usage_error_context

RETRY = 60.0  # seconds until a failed write is tried again
LAST_TRIES = (1.0, 2.0, 4.0)  # seconds between the last attempts of a run that is about to end

# A resumed run must have the same values of these flags as its checkpoint.
RESUME_MUST_MATCH = ('seed', 'opt')
# Changes of these flags are not shown, because they do not change what is trained.
RESUME_MAY_DIFFER = (
    'output_dir', 'resume', 'eval', 'eval_ema', 'eval_teacher', 'start_epoch', 'data_path', 'num_workers',
    'pin_mem', 'device', 'dist_url', 'dist_timeout', 'dist_eval', 'print_freq', 'keep', 'save_interval_steps',
    'save_interval_minutes', 'log_grad_share', 'list_blocks', 'num_classes', 'pretrained', 'checkpoint_key',
    'config', 'log_to',
)  # fmt: skip

# Training state -------------------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """Everything that a run needs in order to continue. The teacher is not part of it.

    No state of a random generator is saved: all random numbers are functions of `epoch`, `position` and `step`.
    """

    model: nn.Module  # the student, a plain timm model
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = -1  # the last finished epoch, −1 before the first
    position: int = 0  # images of the next epoch that all ranks together have processed
    step: int = 0  # training steps so far
    best_acc1: float = 0.0  # best accuracy of the raw model so far, in percent
    meters: utils.Meters = field(default_factory=utils.Meters)  # means of the unfinished epoch
    data: dict[str, Any] = field(default_factory=dict)  # `datasets.fingerprint` of the training data
    student: dict[str, Any] = field(default_factory=dict)  # mean and std of its images, names of the classes
    checksums: dict[str, str] = field(default_factory=dict)  # of the teacher's weights
    repeated_aug: bool = False  # whether the training order is that of repeated augmentation

    def state_dict(self, args: dict[str, Any], meters: dict[str, Any]) -> dict[str, Any]:
        """Returns the checkpoint: the keys of the 2022 release and more, plain types only.

        Args:
            args: flags of the run.
            meters: `Meters.state_dict()`, which holds the values of all ranks.
        """
        stateful = ('model', 'optimizer', 'lr_scheduler', 'scaler')
        plain = ('epoch', 'position', 'step', 'best_acc1', 'data', 'student', 'checksums', 'repeated_aug')
        states = {name: getattr(self, name).state_dict() for name in stateful}
        values = {name: getattr(self, name) for name in plain}
        versions = {'torch': str(torch.__version__), 'timm': timm.__version__}
        run = {'args': args, 'meters': meters, 'ranks': utils.get_world_size(), 'format': FORMAT, 'versions': versions}
        return states | values | run | ({'model_ema': self.ema.module.state_dict()} if self.ema else {})

    def load_progress(self, checkpoint: dict[str, Any], device: torch.device) -> None:
        """Loads everything but the weights, which are loaded elsewhere.

        The optimizer's moments come from the checkpoint. Its options and learning rate come from the flags, because the
        schedule is a function of the epoch. A checkpoint of the release has no `step`, so the step is then 0.

        Args:
            checkpoint: one for which `has_progress` holds.
            device: where the meters are kept.

        Raises:
            ValueError: the optimizer belongs to another model, or a value is invalid.
        """
        if checkpoint.get('format', 0) > FORMAT:
            raise ValueError(f'format {checkpoint["format"]} is newer than this program, which reads up to {FORMAT}')
        for name, lowest in (('epoch', -1), ('position', 0), ('step', 0)):
            value = checkpoint.get(name, 0)
            if type(value) is not int or value < lowest:
                raise ValueError(f'{name} must be a whole number of at least {lowest}, not {value!r}')
        self._load_optimizer(checkpoint['optimizer'])
        if checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.best_acc1 = float(checkpoint.get('best_acc1', 0.0))
        if not 0 <= self.best_acc1 <= 100:
            raise ValueError(f'best_acc1 must be a percentage, not {self.best_acc1}')
        self.position, self.step = checkpoint.get('position', 0), checkpoint.get('step', 0)
        self.meters.load_state_dict(checkpoint.get('meters') or {}, device)
        self.start_after(checkpoint['epoch'])

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        own = self.optimizer.state_dict()
        if _group_layout(own) != _group_layout(saved):
            raise ValueError(
                "the optimizer's parameter groups do not match those of this model with --opt and --weight-decay"
            )
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        for index, moments in saved['state'].items():
            for name, value in moments.items():
                # Some optimizers keep a number, a row or a column per matrix. A matrix must have the parameter's shape.
                if getattr(value, 'ndim', 0) == parameters[index].ndim and value.shape != parameters[index].shape:
                    raise ValueError(
                        f'the optimizer state {name} of parameter {index} does not have the shape of the parameter'
                    )
        # Options come from the flags. LAMB, Adan and Lookahead keep their step counters among the options.
        groups = [mine | {name: old[name] for name in ('step', 'lookahead_step') if name in old}
                  for mine, old in zip(own['param_groups'], saved['param_groups'], strict=True)]  # fmt: skip
        self.optimizer.load_state_dict({**saved, 'param_groups': groups})

    def start_after(self, epoch: int) -> None:
        """Continues after an epoch, with the learning rate of the schedule."""
        self.epoch = epoch
        if epoch >= 0:
            self.lr_scheduler.step(epoch)

    def describe(self) -> str:
        """Says how far the run has come."""
        within = f', {self.position:,} images of the next epoch' if self.position else ''
        return (f'epoch {self.epoch} done' if self.epoch >= 0 else 'no epoch done') + within

    def finish_epoch(self) -> None:
        """Counts the epoch as done. Epoch e + 1 uses the schedule's value for e, as in the published runs."""
        self.start_after(self.epoch + 1)
        self.position, self.meters = 0, utils.Meters()


def _group_layout(optimizer: object) -> object:
    """What two states of the same optimizer have in common, whatever version of torch wrote them."""
    groups = optimizer.get('param_groups') if isinstance(optimizer, dict) else None
    if not isinstance(groups, list):
        return None
    return [(len(group['params']), {'betas', 'momentum'} & group.keys()) for group in groups]


# Saving ---------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CheckpointManager:
    """Saves a run when a save is due, and stops it after a signal.

    All ranks call its methods equally often; the first rank writes. A failed write is reported and tried again, and
    training continues. This is the only place that writes the state of a run.

    After a signal on any rank the methods `after_step`, `poll`, `drain` and `finish` save the state and raise
    StoppedError. They raise NotSavedError if it cannot be written.
    """

    state: TrainingState
    folder: Path | None  # None: nothing is saved
    consensus: RankConsensus
    args: dict[str, Any]  # flags of the run, stored in each checkpoint
    _: KW_ONLY
    keep: int = 1  # number of older checkpoints
    interval: float = math.inf  # seconds between saves
    every: int = 0  # steps between saves; 0: by time only
    last_step: int | None = None  # step of the undamaged `checkpoint.pth` in the folder; None: there is none
    before_save: Callable[[], object]  # called before each save; if it raises, nothing is saved
    saves: int = field(default=0, init=False)  # number of saves so far
    seconds: float = field(default=0.0, init=False)  # time that these saves took

    def __post_init__(self) -> None:
        self._pending: dict[str, bytes | memoryview] = {}  # files that are not written yet, by name
        self._pending_step = 0
        self._saved_step = -1 if self.last_step is None else self.last_step  # the same on all ranks
        self._provisional = False  # whether `checkpoint.pth` is from before an evaluation
        self._last_save = self._last_attempt = time.monotonic()
        if utils.get_rank() > 0:
            self.folder = None
        self._rows = checkpoints.read_log(self.folder / LOG) if self.folder else []
        for path in self.folder.glob('.*.tmp') if self.folder else ():  # unfinished writes of a run that was killed
            name = path.name[1:-4]
            if name in KEPT or EARLIER.fullmatch(name):
                path.unlink(missing_ok=True)

    def after_step(self) -> None:
        """Saves after a training step if a save is due."""
        self.poll(due=self.every > 0 and self.state.step % self.every == 0)

    def poll(self, due: bool = False) -> None:
        """Saves if `due`, or if the time has come."""
        signum, agreed = self.consensus.poll(self.is_due())
        self._stop_if(signum)
        if due or agreed:
            self.save()

    def drain(self) -> None:
        """Waits for all ranks; saves and stops the run if any of them has received a signal."""
        self._stop_if(self.consensus.drain())

    def is_due(self) -> bool:
        """Whether it is time to save or to try a failed write again. Always False on ranks that do not write."""
        now = time.monotonic()
        retry = bool(self._pending) and now - self._last_attempt >= RETRY
        return self.folder is not None and (retry or now - self._last_save >= self.interval)

    def save(self, row: dict[str, Any] | None = None, best: bool = False) -> None:
        """Writes the state; at the end of an epoch also its log row, and the best checkpoint.

        Args:
            row: of the log; replaces the rows of its epoch and of later ones.
            best: whether the state is the best so far.
        """
        self.before_save()
        meters = self.state.meters.state_dict()  # gathers those of all ranks
        self._saved_step = self.state.step
        if self.folder is None:
            return
        start = time.monotonic()
        if row is not None:
            self._rows = [old for old in self._rows if old['epoch'] < row['epoch']] + [row]
            self._pending[LOG] = ''.join(json.dumps(each) + '\n' for each in self._rows).encode()
        data = checkpoints.serialize(self.state.state_dict(self.args, meters))
        self._pending |= {LAST: data, BEST: data} if best else {LAST: data}
        self._pending_step, self._last_save = self.state.step, start
        if error := self.write_pending():
            advice = f'training continues, the next attempt is in {RETRY:.0f} s or with the next save'
            log_rank0(f'warning: not saved: {error}; {advice}')
        self.saves += 1
        self.seconds += time.monotonic() - start

    def save_before_evaluation(self) -> None:
        """Saves the last step of an epoch, so that an evaluation that fails loses nothing. A resume evaluates again."""
        if self._saved_step != self.state.step:
            self.save()
            self._provisional = LAST not in self._pending

    def write_pending(self) -> str:
        """Writes the pending files in order, each one that can be written; returns the first error, '' if none."""
        assert self.folder is not None
        self._last_attempt, errors = time.monotonic(), []
        with suppress(OSError):  # reported below
            self.folder.mkdir(parents=True, exist_ok=True)  # the folder may have been removed during the run
            locks.keep(self.folder)
        for path in [self.folder / name for name in KEPT if name in self._pending]:
            before_replace = self._rotate if path.name == LAST else None
            try:
                checkpoints.write_durably(path, self._pending[path.name], before_replace)
            except OSError as error:
                errors.append(f'{path}: {error.strerror or error}')
            else:
                del self._pending[path.name]
                self._provisional &= path.name != LAST
        if LAST not in self._pending:
            self.last_step = self._pending_step
        return errors[0] if errors else ''

    def _rotate(self) -> None:
        """Keeps the present `checkpoint.pth` under a name with its step, and removes older ones beyond `keep`.

        One from before an evaluation is replaced, so that an earlier step remains. A damaged one must not replace a
        good one.
        """
        if self.last_step is None or self.folder is None or self._provisional:
            return
        name = self.folder / f'checkpoint-{self.last_step:08d}.pth'
        others = [path for path in checkpoints.find_earlier(self.folder) if path != name]
        # Files with larger steps are from before the run went back to an earlier checkpoint; they are removed first.
        others.sort(key=lambda path: checkpoints.step_of(path) <= (self.last_step or 0), reverse=True)
        for path in others[max(self.keep - 1, 0) :]:
            path.unlink()
        if self.keep:
            name.unlink(missing_ok=True)
            try:
                os.link(self.folder / LAST, name)
            except OSError:  # a file system without hard links: for a moment there is no checkpoint.pth
                os.replace(self.folder / LAST, name)
        self.last_step = None  # until the new file is in place

    def finish(self) -> None:
        """Makes sure that everything is written."""
        self._finish_writing()
        self.drain()

    def _finish_writing(self) -> None:
        error = ''
        for pause in LAST_TRIES:
            if self._pending:
                time.sleep(pause)
                error = self.write_pending()
        if self._pending:
            raise NotSavedError(f'not saved: {error}')

    def _stop_if(self, signum: int) -> None:
        if signum:
            self.save()
            self._finish_writing()
            # A launcher kills all ranks once one has exited, so no rank may exit before the first rank has written.
            self.consensus.wait_for_all()
            where = f'saved in {self.folder / LAST}' if self.folder else 'not saved, because there is no --output_dir'
            raise StoppedError(signum, f'{self.state.describe()}, {where}')


# Resuming -------------------------------------------------------------------------------------------------------------
#
# Arguments with the name of a flag have its value. `checkpoint` is {} for a run that starts from scratch.


def read_resume(resume: str, output_dir: str, evaluate: bool) -> tuple[dict[str, Any], Path | None]:
    """Reads the checkpoint that --resume names; raises UsageError if it cannot be read.

    A run that continues in its own folder falls back to the previous checkpoint if the newest one is damaged.

    Returns:
        The checkpoint, and its path if it is a checkpoint of the run in `output_dir`.
    """
    folder = Path(output_dir)
    if not resume:
        return {}, None
    last = folder / LAST
    own = bool(output_dir) and not evaluate and Path(resume).resolve() == last.resolve() and last.exists()
    # The first rank decides for all, as ranks may see different files.
    if resume == 'auto' and not utils.gather_objects(bool(checkpoints.find_checkpoints(folder)))[0]:
        if evaluate:
            raise UsageError(f'--resume auto: there is no checkpoint in --output_dir {folder} to evaluate')
        log_rank0(f'resume      auto: no checkpoint in {folder}, starting a new run')
        return {}, None
    with usage_error_context('--resume', resume):
        if resume != 'auto' and not own:
            return checkpoints.read_checkpoint(resume), None
        if not checkpoints.find_checkpoints(folder):
            raise ValueError(
                f'the first rank sees checkpoints in {folder}, but rank {utils.get_rank()} does not; all machines must '
                'share the folder --output_dir'
            )
        path, checkpoint, errors = checkpoints.read_newest(folder)
        first = Path(utils.gather_objects(str(path))[0])
        if first != path:
            path, checkpoint = first, checkpoints.read_checkpoint(first)
    for error in errors:
        log_rank0(f'warning: --resume {resume}: {error}; falling back to {path.name}')
    return checkpoint, path if checkpoints.has_progress(checkpoint) else None


def check_same_flags(resume: str, flags: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Raises UsageError if a flag of RESUME_MUST_MATCH has changed, and shows a table of the others that have."""
    saved = checkpoints.flags_of(checkpoint)
    from_release = 'format' not in checkpoint  # a checkpoint of the 2022 release: only --opt must match
    for name in ('opt',) if from_release else RESUME_MUST_MATCH:
        if name in saved and saved[name] != flags[name]:
            was = f'{flag_name(name)} {format_values(saved[name])}'
            raise UsageError(f'--resume {resume}: was trained with {was}, now it is {format_values(flags[name])}')
    if from_release:
        return
    hidden = RESUME_MUST_MATCH + RESUME_MAY_DIFFER
    changed = [name for name, now in flags.items() if name not in hidden and saved.get(name, now) != now]
    rows = [(flag_name(name), format_values(saved[name]), format_values(flags[name])) for name in changed]
    if checkpoint.get('ranks', utils.get_world_size()) != utils.get_world_size():
        rows.append(('(ranks)', str(checkpoint['ranks']), str(utils.get_world_size())))
    if rows:
        log_rank0(f'resume      {resume}: arguments changed since the checkpoint; using the new values')
        for row in [('', 'was', 'now'), *rows]:
            log_rank0('            {:<24} {:<24} {}'.format(*row))


def load_student(model: nn.Module, resume: str, name: str, checkpoint: dict[str, Any], ema: bool) -> None:
    """Loads the student's weights, or its EMA's; raises UsageError if they are not those of the model `name`."""
    with usage_error_context('--resume', f'{resume} with --model {name}'):
        weights = models.named_weights(checkpoint, ema)
        if models.head_size(model, weights) not in (0, getattr(model, 'num_classes', 0)) and not ema:
            log_rank0('note        --finetune instead of --resume trains a new head for other classes')
        models.load_weights(model, weights)


def check_same_data(data_path: str, resume: str, state: TrainingState, checkpoint: dict[str, Any]) -> None:
    """Raises UsageError if the numbers of training images or classes, or the class names, have changed."""
    was, now = checkpoint.get('data'), state.data
    if isinstance(was, dict) and was != now:
        kind = 'classes with other names'
        if {**was, 'names': now['names']} != now:
            numbers = f'{now["images"]} of {now["classes"]}'
            kind = f'{was.get("images")} images of {was.get("classes")} classes, now there are {numbers}'
        raise UsageError(f'--data-path {data_path}: --resume {resume} was trained on {kind}')


def warn_of_other_teacher(teacher_path: str, resume: str, state: TrainingState, checkpoint: dict[str, Any]) -> None:
    """Warns if the teacher's weights have changed."""
    was, now = (each.get('teacher_weights') for each in (checkpoint.get('checksums') or {}, state.checksums))
    if was and now and was != now:
        source = f'--teacher-path {teacher_path}' if teacher_path else '--teacher-pretrained'
        log_rank0(f'warning: {source}: the weights are not those that --resume {resume} was trained with')


def restore(
    state: TrainingState, checkpoint: dict[str, Any], resume: str, start_epoch: int, steps: int, own: bool = True
) -> None:
    """Loads all but the weights of the model from a checkpoint; raises UsageError if it does not fit the run.

    A checkpoint without progress starts a new run at `start_epoch`. `steps` is the number of steps in a whole epoch. If
    the checkpoint is not the folder's own, the best accuracy starts at 0: `best_checkpoint.pth` is then the best of the
    epochs in this folder.
    """
    if not checkpoints.has_progress(checkpoint):
        if checkpoint:
            ema = ', EMA starts from these weights' if state.ema else ''
            log_rank0(f'resume      {resume}: weights only; epoch {start_epoch}, new optimizer state{ema}')
        state.start_after(start_epoch - 1)
        state.step = start_epoch * steps
        return
    has_ema = bool(checkpoint.get('model_ema'))
    with usage_error_context('--resume', resume, AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        state.load_progress(checkpoint, next(state.model.parameters()).device)
        if state.ema is not None and has_ema:
            models.load_weights(state.ema.module, models.named_weights(checkpoint, ema=True))
    if 'step' not in checkpoint:
        state.step = (state.epoch + 1) * steps
    new_ema = "EMA starts from the checkpoint's weights" if state.ema else 'no EMA'
    ema = 'EMA of the checkpoint' if has_ema else new_ema
    log_rank0(f'resume      {resume}: {state.describe()}, {ema}, best Acc@1 {state.best_acc1:.3f}')
    state.best_acc1 = state.best_acc1 if own else 0.0
    data_set = str(checkpoints.flags_of(checkpoint).get('data_set', ''))
    if state.position and 'skipped' in checkpoint and data_set.startswith('wds/'):  # written when wds/ was a stream
        log_rank0('warning: the order of wds/ images has changed: in this epoch some come twice and some not at all')


def prepare_folder(
    output_dir: str,
    resume: str,
    start_epoch: int,
    checkpoint: dict[str, Any],
    own: Path | None,
    dry_run: bool = False,
) -> int | None:
    """Creates --output_dir. Only a run that continues from its newest checkpoint may write to a folder that has a run.

    Args:
        own: path of the checkpoint, if it is one of the run in this folder.
        dry_run: only check; nothing is created, locked or renamed.

    Returns:
        The step of the `checkpoint.pth` in the folder, None if there is none or if it is damaged.

    Raises:
        UsageError: the folder cannot be written to, contains another run, or is used by one.
    """
    if not output_dir:
        log_rank0('warning: no --output_dir: no checkpoints and no log.txt are written')
        return None
    folder = Path(output_dir)
    with usage_error_context('--output_dir', output_dir):
        if folder.exists() and not folder.is_dir():
            raise ValueError('is a file; a folder is needed')
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError('is not writable')
    if not dry_run:
        locks.lock(output_dir)
    with usage_error_context('--output_dir', output_dir):
        # Read here so that a damaged log is noticed now and not after the first epoch.
        epochs = [row['epoch'] for row in checkpoints.read_log(folder / LOG)]
        found = [name for name in KEPT if (folder / name).exists()]
        # The disk was full, or the run was killed, between the first row of the log and the first checkpoint.
        restart = resume == 'auto' and found == [LOG]
        if restart and epochs not in ([], [start_epoch]) and utils.get_rank() == 0 and not dry_run:
            name = next(name for i in itertools.count(1) if not (folder / (name := f'{LOG}.{i}')).exists())
            (folder / LOG).rename(folder / name)
            log_rank0(f'warning: --output_dir {folder}: {LOG} is of a run without checkpoints; it is now {name}')
        if found and not own and not restart:
            advice = f'move {"it" if len(found) == 1 else "them"} away'
            if LAST in found and resume != 'auto':
                advice = 'pass --resume auto to continue'
            raise ValueError(f'already contains {" and ".join(found)}; {advice}, or choose another folder')
    if checkpoints.has_progress(checkpoint) and not own:
        log_rank0(f'note        {folder}: its {LOG} and {BEST} start with the next epoch')
    return checkpoint.get('step', 0) if own is not None and own.name == LAST else None
