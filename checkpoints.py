"""Files of weights and of runs: read safely, written durably, found again after whatever happened.

A run leaves in its folder `checkpoint.pth` (the last state), `checkpoint-<step>.pth` (the ones before it),
`best_checkpoint.pth` and `log.txt`. Only tensors and plain types are in them; a checksum stands in the comment of the
zip archive that torch writes, so plain `torch.load` reads them too.
"""

import argparse
import errno
import hashlib
import io
import json
import math
import os
import re
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import safetensors.torch
import timm
import torch
from timm.models import load_state_dict_from_hf
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

import utils
from utils import log_rank0

FORMAT = 1
LOG, BEST, LAST = 'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'pytorch_model.pth')  # as timm names them
KEPT = (LOG, BEST, LAST)  # in the order they are written: once the last one is there, all of the epoch is kept
RETRY = 60.0  # seconds after which a write that failed is tried again
LAST_TRIES = (1.0, 2.0, 4.0)  # seconds between the tries of a run that is about to end
_EARLIER = re.compile(r'checkpoint-(\d{8,})\.pth')
_NOT_A_CHECKPOINT = 'is damaged, or no file of weights'


# Reading --------------------------------------------------------------------------------------------------------------


def read_checkpoint(source: str | Path) -> dict:
    """The contents of a weights file, on the CPU; nothing is unpickled but tensors and plain types.

    Args:
        source: a path, a URL (downloaded once into torch's hub folder), `hf-hub:OWNER/NAME` or `local-dir:FOLDER` with
            one file of weights under a usual name; `.safetensors` or torch's own format.

    Raises:
        OSError: it is not there or cannot be downloaded.
        ValueError: it cannot be read safely, is damaged, or holds no dictionary.
    """
    return _read(source)[0]


def _read(source: str | Path) -> tuple[dict, bool]:
    """The contents, and whether a checksum vouches for them."""
    kind, _, rest = str(source).partition(':')
    if kind in ('hf-hub', 'hf_hub'):
        return _read_hub(rest), False
    if kind == 'local-dir':
        source = _find_weights(Path(rest))
    url = '://' in str(source)
    path = _download(str(source)) if url else Path(source)
    with open(path, 'rb') as file:  # what the system has to say comes first: not there, a folder, no permission
        if path.suffix == '.safetensors':
            return _read_safetensors(path), False
        sealed = _check_seal(file)
        try:
            # Released files of 2020-2022 hold the flags of their run as a Namespace, a plain bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of a file it cannot read torch warns first
                checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch raises a dozen kinds for one thing
            found = re.search(r'GLOBAL (\S+)', str(error))
            reason = f'holds {found[1]}, and only tensors and plain types are read' if found else _NOT_A_CHECKPOINT
            raise ValueError(reason + (f' (downloaded to {path})' if url else '')) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'holds a {type(checkpoint).__name__}, not a dictionary of weights')
    return checkpoint, sealed


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(_NOT_A_CHECKPOINT) from error


def _read_hub(name: str) -> dict[str, Tensor]:
    try:
        return load_state_dict_from_hf(name, weights_only=True)
    except Exception as error:  # the hub's client has a dozen kinds
        raise ValueError(f'cannot be had from the hub: {" ".join(str(error).split())}') from error


def _find_weights(folder: Path) -> Path:
    """The file of weights in a folder that was saved for the hub."""
    found = [folder / name for name in HUB_FILES if (folder / name).exists()]
    if not found:
        raise ValueError(f'there is none of {", ".join(HUB_FILES)} in it')
    return found[0]


def _download(url: str) -> Path:
    # torch.hub.load_state_dict_from_url would unpickle whatever the file asks for; only its download is used.
    # The hash tells two files of one name apart.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
    path = Path(get_dir()) / 'checkpoints' / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), progress=False)
    return path


# A zip archive ends with the length of its comment, two bytes, and the comment.
_SEAL = b'sha256:'
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size * 2


def _seal(archive: bytes | memoryview) -> bytes:
    """The last bytes of the archive with its checksum as its comment; they take the place of the last two."""
    return struct.pack('<H', _SEAL_BYTES) + _SEAL + hashlib.sha256(archive[:-2]).hexdigest().encode()


def _check_seal(file: BinaryIO) -> bool:
    """Whether a file has a checksum; it is rewound.

    Raises:
        ValueError: the checksum does not hold.
    """
    size = file.seek(0, os.SEEK_END) - 2 - _SEAL_BYTES
    file.seek(max(size, 0))
    end = file.read()
    file.seek(0)
    if size < 0 or not end.startswith(struct.pack('<H', _SEAL_BYTES) + _SEAL):
        return False
    digest = hashlib.sha256()
    while size:
        chunk = file.read(min(size, 1 << 20))
        digest.update(chunk)
        size -= len(chunk)
    file.seek(0)
    if end[-digest.digest_size * 2 :] != digest.hexdigest().encode():
        raise ValueError('is damaged: its checksum does not hold')
    return True


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
        skipped: steps among them whose update was withheld.
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
    skipped: int = 0
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
            'skipped': self.skipped,
            'meters': meters,
            'data': self.data,
            'repeated_aug': self.repeated_aug,
            'ranks': utils.get_world_size(),
            'format': FORMAT,
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
        if checkpoint.get('format', 0) > FORMAT:
            raise ValueError(f'its format {checkpoint["format"]} is newer than this program, which knows {FORMAT}')
        counts = {name: checkpoint.get(name, 0) for name in ('position', 'step', 'skipped')}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f'its {name} is {value!r}, no count')
        self._load_optimizer(checkpoint['optimizer'])
        if checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.best_acc1 = float(checkpoint.get('best_acc1', 0.0))
        self.position, self.step, self.skipped = counts.values()
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


def has_progress(checkpoint: dict) -> bool:
    """Whether a checkpoint tells how far its run had come, or holds weights alone."""
    return {'optimizer', 'lr_scheduler', 'epoch'} <= checkpoint.keys()


def flags_of(checkpoint: dict) -> dict:
    """The flags of the run that wrote a checkpoint, none if it does not tell them."""
    flags = checkpoint.get('args')
    return vars(flags) if isinstance(flags, argparse.Namespace) else flags if isinstance(flags, dict) else {}


def _signature(optimizer: dict) -> object:
    """What two states of one optimizer have in common, whatever version of torch wrote them."""
    groups = optimizer.get('param_groups') if isinstance(optimizer, dict) else None
    if not isinstance(groups, list):
        return None
    return [(len(group['params']), {'betas', 'momentum'} & group.keys()) for group in groups]


# Finding --------------------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """The states of a run that are there, newest first, the best one as the last resort."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _EARLIER.fullmatch(path.name)]
    earlier = sorted(found, key=_step_of, reverse=True)
    return [path for path in (folder / LAST, *earlier, folder / BEST) if path.exists()]


def _step_of(path: Path) -> int:
    return int(_EARLIER.fullmatch(path.name)[1])


def read_newest(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest state in a run's folder that is whole.

    Returns:
        Its path, its contents, and what is wrong with the newer ones, a line each.

    Raises:
        ValueError: none is whole; says what is wrong with each.
    """
    faults = []
    for path in find_checkpoints(folder):
        try:
            checkpoint, sealed = _read(path)
            if 'format' in checkpoint and not sealed:
                raise ValueError('is damaged: its checksum is gone')
            return path, checkpoint, faults
        except (OSError, ValueError) as error:
            faults.append(f'{path.name} {getattr(error, "strerror", None) or error}')
    raise ValueError(f'{folder} holds no checkpoint that can be read: {"; ".join(faults) or "there is none"}')


def read_log(path: Path) -> list[dict]:
    """The rows of a log, none if there is no file.

    Raises:
        ValueError: a line is no JSON object with an epoch.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict) or not isinstance(rows[-1].get('epoch'), int):
            raise ValueError(f'line {number} of {path} is no row of a log of epochs')
    return rows


# Writing --------------------------------------------------------------------------------------------------------------


def write_durably(path: Path, data: bytes | memoryview, before_replace: Callable[[], None] | None = None) -> None:
    """Replaces a file in one step: whatever happens, the old or the new one is there, whole, and nothing else.

    Args:
        path: of the file.
        data: its new contents.
        before_replace: called once the new contents are on the disk, under another name.

    Raises:
        OSError: the disk is full or broken; the old file is as it was.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if before_replace is not None:
            before_replace()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Makes the new name of a file as lasting as its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


def serialize(contents: dict) -> memoryview:
    """A checkpoint as the bytes of its file, sealed with their checksum."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    seal = _seal(buffer.getbuffer())
    buffer.seek(-2, os.SEEK_END)
    buffer.write(seal)
    return buffer.getbuffer()


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
            self._rows = read_log(self.path / LOG)
            self._remove_strays()

    def _remove_strays(self) -> None:
        """What a kill left half written."""
        for path in self.path.glob('.*.tmp'):
            name = path.name[1:-4]
            if name in KEPT or _EARLIER.fullmatch(name):
                path.unlink(missing_ok=True)

    def describe(self) -> str:
        """Where the run can be resumed from, in words."""
        return f'saved in {self.path / LAST}' if self.path else 'not saved, for there is no --output_dir'

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
            self._pending[LOG] = ''.join(json.dumps(each) + '\n' for each in self._rows).encode()
        data = serialize(state.state_dict(args, meters))
        self._pending |= {LAST: data, BEST: data} if best else {LAST: data}
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
        faults = [self._write(name) for name in KEPT if name in self._pending]
        return next(filter(None, faults), '')

    def _write(self, name: str) -> str:
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
            write_durably(path, self._pending[name], self._rotate if name == LAST else None)
        except OSError as error:
            return f'{path}: {error.strerror or error}'
        del self._pending[name]
        if name == LAST:
            self._last_step = self._pending_step
        return ''

    def _rotate(self) -> None:
        """Gives the checkpoint that was the last until now a second name, and drops the oldest ones."""
        if self._last_step is None:
            return  # a damaged one must not drive out a good one
        name = self.path / f'checkpoint-{self._last_step:08d}.pth'
        others = [path for path in find_checkpoints(self.path) if _EARLIER.fullmatch(path.name) and path != name]
        # Steps beyond this one are from before the run went back to an earlier state.
        others.sort(key=lambda path: _step_of(path) <= self._last_step, reverse=True)
        for path in others[max(self.keep - 1, 0) :]:
            path.unlink()
        if self.keep:
            name.unlink(missing_ok=True)
            try:
                os.link(self.path / LAST, name)
            except OSError:  # file systems without hard links; for a moment there is no file of the last name
                os.replace(self.path / LAST, name)
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
        consensus: utils.RankConsensus,
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
        self.state.skipped = self.watch.skipped
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
        raise utils.StoppedError(signum, f'{self.state.describe()}, {self.folder.describe()}')
