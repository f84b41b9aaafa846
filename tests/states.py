"""Toy training states, and a disk that breaks. Shared by the tests of checkpoints.py and run_dir.py."""

import errno
import io
import os

import torch
import toys
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import checkpoints
from run_dir import TrainingState


def make_state(
    model: torch.nn.Module | None = None,
    *,
    gradient: float = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    scaled: bool = False,
    opt: str = 'adamw',
) -> TrainingState:
    """A state after one optimizer step. Its EMA weights differ from the raw ones."""
    if model is None:
        torch.manual_seed(0)
        model = toys.student()
    optimizer = create_optimizer_v2(model, opt, lr, weight_decay)
    schedule = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=2, warmup_lr_init=1e-6)
    scaler = torch.amp.GradScaler('cpu', enabled=scaled)
    state = TrainingState(model, optimizer, schedule, scaler, ModelEmaV3(model, decay=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return state


def small_state() -> TrainingState:
    return make_state(torch.nn.Linear(3, 2))


def contents(step: int = 0) -> dict:
    state = small_state()
    state.step = step
    return state.state_dict({'lr': 0.1}, {})


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Makes writes of checkpoints.py fail in one of seven ways.

    Attributes:
        fault: the part of a file's bytes after which writing fails, or the call that fails; None: nothing fails.
        name: of the file that cannot be written; '': any file.
        code: errno of the failure.
    """

    FAULTS = (0.0, 0.01, 0.5, 0.99, 1.0, 'fsync', 'replace')

    def __init__(self, monkeypatch) -> None:
        self.fault, self.name, self.code = None, '', errno.ENOSPC
        self._writing = ''
        monkeypatch.setattr(checkpoints, 'open', self._open, raising=False)
        for call in ('fsync', 'replace'):
            monkeypatch.setattr(os, call, self._breaking(call, getattr(os, call)))

    def check(self, place) -> None:
        if self.fault == place and self.name in ('', self._writing):
            raise OSError(self.code, os.strerror(self.code))

    def _breaking(self, name: str, call):
        def instead(*args):
            self.check(name)
            return call(*args)

        return instead

    def _open(self, path, mode):
        disk = self

        class File(io.FileIO):
            def write(self, data) -> None:
                if isinstance(disk.fault, float):
                    super().write(data[: round(disk.fault * len(data))])
                    disk.check(disk.fault)
                    self.seek(0)
                super().write(data)

        if mode != 'wb':
            return open(path, mode)
        self._writing = path.name.removeprefix('.').removesuffix('.tmp')
        return File(path, mode)
