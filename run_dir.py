"""The folder of a run: its training state, when it is saved, and which files it leaves."""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import checkpoints
import utils
from loggers import log_rank0
from stopping import RankConsensus, StoppedError

RETRY = 60.0  # seconds after which a write that failed is tried again
LAST_TRIES = (1.0, 2.0, 4.0)  # seconds between the tries of a run that is about to end

# The state ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """Everything a run needs to go on where it stopped. The teacher is no part of it.

    Random numbers are counted, not carried along: `epoch`, `position` and `step` determine all that follow.

    Attributes:
        model: the student, a plain timm model.
        ema: its moving average, if any.
        epoch: the last finished epoch, −1 before the first.
        position: images of the epoch after it that all ranks have taken together.
        step: training steps so far.
        best_acc1: best accuracy of the raw model so far, in percent.
        meters: means of the epoch that is not finished.
        data: what tells the training data from others, see `datasets.fingerprint`.
        repeated_aug: whether the order of training is that of repeated augmentation.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = -1
    position: int = 0
    step: int = 0
    best_acc1: float = 0.0
    meters: utils.Meters = field(default_factory=utils.Meters)
    data: dict = field(default_factory=dict)
    repeated_aug: bool = False

    def state_dict(self, args: dict, meters: dict) -> dict:
        """The checkpoint, with the keys of the 2022 release and plain types only.

        Args:
            args: the flags of the run.
            meters: those of all ranks, by `Meters.state_dict`.
        """
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.lr_scheduler.state_dict(),
            'epoch': self.epoch,
            'scaler': self.scaler.state_dict(),
            'args': args,
            'best_acc1': self.best_acc1,
            'position': self.position,
            'step': self.step,
            'meters': meters,
            'data': self.data,
            'repeated_aug': self.repeated_aug,
            'ranks': utils.get_world_size(),
            'format': checkpoints.FORMAT,
            'versions': {'torch': str(torch.__version__), 'timm': timm.__version__},
        }
        return state | ({'model_ema': self.ema.module.state_dict()} if self.ema else {})

    def load_progress(self, checkpoint: dict, device: torch.device) -> None:
        """Takes over all that is not weights; those are loaded elsewhere.

        The learning rate and the optimizer's options come from the flags, the moments from the file: the schedule is
        a function of the epoch. A file of the release has no `step`: it stays as it is.

        Args:
            checkpoint: what `has_progress`.
            device: where the meters are kept.

        Raises:
            ValueError: the optimizer belongs to another model, or a value cannot be.
        """
        if not isinstance(checkpoint['epoch'], int) or checkpoint['epoch'] < -1:
            raise ValueError(f'its epoch is {checkpoint["epoch"]!r}, no number of an epoch')
        if checkpoint.get('format', 0) > checkpoints.FORMAT:
            raise ValueError(
                f'its format {checkpoint["format"]} is newer than this program, which knows {checkpoints.FORMAT}'
            )
        counts = {name: checkpoint.get(name, 0) for name in ('position', 'step')}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f'its {name} is {value!r}, no count')
        self._load_optimizer(checkpoint['optimizer'])
        if checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.best_acc1 = float(checkpoint.get('best_acc1', 0.0))
        self.position, self.step = counts.values()
        self.meters.load_state_dict(checkpoint.get('meters') or {}, device)
        self.start_after(checkpoint['epoch'])

    def _load_optimizer(self, saved: dict) -> None:
        own = self.optimizer.state_dict()
        if _signature(own) != _signature(saved):
            raise ValueError("its optimizer's parameter groups are not those of this model, --opt and --weight-decay")
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        for index, moments in saved['state'].items():
            for name, value in moments.items():
                # Some optimizers keep a number, a row or a column per matrix; a matrix must be one of the same size.
                if getattr(value, 'ndim', 0) == parameters[index].ndim and value.shape != parameters[index].shape:
                    raise ValueError(f"its optimizer's {name} number {index} has another shape than its parameter")
        # Options are those of the flags; but LAMB, Adan and lookahead count their steps among them.
        groups = [mine | {name: old[name] for name in ('step', 'lookahead_step') if name in old}
                  for mine, old in zip(own['param_groups'], saved['param_groups'], strict=True)]  # fmt: skip
        self.optimizer.load_state_dict({**saved, 'param_groups': groups})

    def start_after(self, epoch: int) -> None:
        """Goes on after an epoch, with the learning rate the schedule then has."""
        self.epoch = epoch
        if epoch >= 0:
            self.lr_scheduler.step(epoch)

    def describe(self) -> str:
        """How far it has come, in words."""
        within = f', {self.position:,} images into the next' if self.position else ''
        return (f'epoch {self.epoch} done' if self.epoch >= 0 else 'no epoch done') + within

    def finish_epoch(self) -> None:
        """Counts the epoch as done; the schedule lags one epoch, as in the published runs."""
        self.start_after(self.epoch + 1)
        self.position, self.meters = 0, utils.Meters()


def _signature(optimizer: dict) -> object:
    """What two states of one optimizer have in common, whatever version of torch wrote them."""
    groups = optimizer.get('param_groups') if isinstance(optimizer, dict) else None
    if not isinstance(groups, list):
        return None
    return [(len(group['params']), {'betas', 'momentum'} & group.keys()) for group in groups]


# The folder of a run --------------------------------------------------------------------------------------------------


class NotSavedError(Exception):
    """The last state of a run could not be written."""


class RunFolder:
    """The only place that writes what a run leaves. A write that fails is told and tried again; training goes on.

    All ranks call its methods, the first one writes.

    Args:
        path: the folder; None keeps nothing.
        keep: how many checkpoints before the last one stay.
        interval: seconds after which a save is due.
        last_step: the step of the `checkpoint.pth` in the folder, None if there is none that is whole.
    """

    def __init__(self, path: Path | None, keep: int = 1, interval: float = math.inf, last_step: int | None = None):
        self.path = path if utils.get_rank() == 0 else None
        self.keep = keep
        self.interval = interval
        self.saves, self.seconds = 0, 0.0  # how many, and what they cost
        self._last_step = last_step
        self._pending: dict[str, bytes | memoryview] = {}
        self._pending_step = 0
        self._saved = self._tried = time.monotonic()
        if self.path:
            self._rows = checkpoints.read_log(self.path / checkpoints.LOG)
            self._remove_strays()

    def _remove_strays(self) -> None:
        """What a kill left half written."""
        for path in self.path.glob('.*.tmp'):
            name = path.name[1:-4]
            if name in checkpoints.KEPT or checkpoints.EARLIER.fullmatch(name):
                path.unlink(missing_ok=True)

    def describe(self) -> str:
        """Where the run can be resumed from, in words."""
        return f'saved in {self.path / checkpoints.LAST}' if self.path else 'not saved, for there is no --output_dir'

    def due(self) -> bool:
        """Whether it is time to save, by the clock of the rank that writes."""
        now = time.monotonic()
        waits_again = bool(self._pending) and now - self._tried >= RETRY
        return self.path is not None and (waits_again or now - self._saved >= self.interval)

    def save(self, state: TrainingState, args: dict, row: dict | None = None, best: bool = False) -> None:
        """Writes the state; at the end of an epoch its row of the log too, and the best checkpoint.

        Args:
            state: of the run.
            args: its flags.
            row: of the log; rows of its epoch and of later ones give way.
            best: the state is the best so far.
        """
        meters = state.meters.state_dict()  # of all ranks
        if not self.path:
            return
        start = time.monotonic()
        if row is not None:
            self._rows = [old for old in self._rows if old['epoch'] < row['epoch']] + [row]
            self._pending[checkpoints.LOG] = ''.join(json.dumps(each) + '\n' for each in self._rows).encode()
        data = checkpoints.serialize(state.state_dict(args, meters))
        self._pending |= {checkpoints.LAST: data, checkpoints.BEST: data} if best else {checkpoints.LAST: data}
        self._pending_step = state.step
        self._saved = start
        fault = self._write_pending()
        if fault:
            log_rank0(
                f'warning: not saved: {fault}; training goes on, the next try is in {RETRY:.0f} s or with the next save'
            )
        self.saves += 1
        self.seconds += time.monotonic() - start

    def finish(self) -> None:
        """Tries for the last time to write what could not be written.

        Raises:
            NotSavedError: in vain.
        """
        for pause in LAST_TRIES:
            if not self._pending:
                return
            time.sleep(pause)
            fault = self._write_pending()
        if self._pending:
            raise NotSavedError(f'not saved: {fault}')

    def _write_pending(self) -> str:
        """Writes what is owed, in order, each file if it can be; says what went wrong first, '' if nothing did."""
        self._tried = time.monotonic()
        faults = [self._write(name) for name in checkpoints.KEPT if name in self._pending]
        return next(filter(None, faults), '')

    def _write(self, name: str) -> str:
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
            checkpoints.write_durably(path, self._pending[name], self._rotate if name == checkpoints.LAST else None)
        except OSError as error:
            return f'{path}: {error.strerror or error}'
        del self._pending[name]
        if name == checkpoints.LAST:
            self._last_step = self._pending_step
        return ''

    def _rotate(self) -> None:
        """Gives the checkpoint that was the last until now a second name, and drops the oldest ones."""
        if self._last_step is None:
            return  # a damaged one must not drive out a good one
        name = self.path / f'checkpoint-{self._last_step:08d}.pth'
        others = [
            path
            for path in checkpoints.find_checkpoints(self.path)
            if checkpoints.EARLIER.fullmatch(path.name) and path != name
        ]
        # Steps beyond this one are from before the run went back to an earlier state.
        others.sort(key=lambda path: checkpoints.step_of(path) <= self._last_step, reverse=True)
        for path in others[max(self.keep - 1, 0) :]:
            path.unlink()
        if self.keep:
            name.unlink(missing_ok=True)
            try:
                os.link(self.path / checkpoints.LAST, name)
            except OSError:  # file systems without hard links; for a moment there is no file of the last name
                os.replace(self.path / checkpoints.LAST, name)
        self._last_step = None  # until the new one is there


class Keeper:
    """Counts the steps of a run, saves it when it is time, and ends it where a signal asked for that.

    All ranks call its methods equally often.

    Args:
        state: of the run.
        folder: where it is written.
        agreement: among the ranks.
        watch: over what is not finite; asked before each save, so that nothing unsound is kept.
        args: the flags.
        global_batch: images that all ranks together take in a step.
        every: steps between saves beside those of the clock; 0 for none.
    """

    def __init__(
        self,
        state: TrainingState,
        folder: RunFolder,
        consensus: RankConsensus,
        watch,
        args: dict,
        global_batch: int,
        every: int = 0,
    ) -> None:
        self.state = state
        self.folder = folder
        self.consensus = consensus
        self.watch = watch
        self.args = args
        self.global_batch = global_batch
        self.every = every

    def after_step(self) -> None:
        """Counts a training step.

        Raises:
            StoppedError: as for `poll`.
        """
        self.state.step += 1
        self.state.position += self.global_batch
        self.poll(due=self.every > 0 and self.state.step % self.every == 0)

    def poll(self, due: bool = False) -> None:
        """Saves if it is due for this reason or by the clock.

        Raises:
            StoppedError: a rank was told to stop, and the state is saved.
        """
        signum, agreed = self.consensus.poll(self.folder.due())
        if signum:
            self._stop(signum)
        if due or agreed:
            self.save()

    def drain(self) -> None:
        """Waits for all ranks.

        Raises:
            StoppedError: as for `poll`.
        """
        signum = self.consensus.drain()
        if signum:
            self._stop(signum)

    def save(self, row: dict | None = None, best: bool = False) -> None:
        """Writes the state, see `RunFolder.save`."""
        self.watch.look()
        self.folder.save(self.state, self.args, row, best)

    def finish(self) -> None:
        """Sees to it that all is written.

        Raises:
            NotSavedError: it cannot be.
            StoppedError: as for `poll`.
        """
        self.folder.finish()
        self.drain()

    def _stop(self, signum: int) -> None:
        self.save()
        self.folder.finish()
        # A launcher kills all ranks once one has left: the one that writes must be done.
        self.consensus.wait_for_all()
        raise StoppedError(signum, f'{self.state.describe()}, {self.folder.describe()}')
