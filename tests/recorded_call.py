"""A stand-in for a CUDA graph on the CPU: it records the operators of a call, and replays them on the same memory.

As with a real graph, Python does not run in a replay: numbers are fixed, except those in tensors and those that
generators draw. Unlike a real capture, recording computes; so the first replay does nothing.

`python tests/recorded_call.py FOLDER` trains a toy on two ranks in three ways and writes the weights of each rank.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel needs it; imported once, before the fork
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import toys

import cuda_graph
import main
from engine import TrainConfig, Trainer
from pair import build_student, register_student_hooks, register_teacher_hooks


class Recorder(TorchDispatchMode):
    """Records operators with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.read_by = ''  # the operator that first gave a number to Python

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read_by = self.read_by or str(func)
        return out


class RecordedCall:
    """`cuda_graph.CapturedCall` by a `Recorder`."""

    def __init__(self, generators) -> None:
        self.generators, self.recorder = [torch.default_generator, *generators], Recorder()
        self.replays, self.is_closed = 0, False

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def find_wait(self, call: Callable[[], Any]) -> tuple[Any, str]:
        with Recorder() as recorder:
            return call(), recorder.read_by

    def capture(self, call: Callable[[], Any]) -> Any:
        with self.recorder:
            result = call()
        if self.recorder.read_by:
            raise RuntimeError('operation not permitted\nwhen stream is capturing')
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, before in self.recorder.calls:
            returned = func._schema.returns
            # A view shows the same memory as before, and what writes in place has done so.
            is_new = returned and all(each.alias_info is None for each in returned)
            if is_new or not returned or func._schema.is_mutable:
                now = func(*args, **kwargs)
            if func.namespace == 'c10d':  # a collective; its other results are its arguments
                dist.Work.unbox(now[-1] if isinstance(now, tuple) else now).wait()
            elif is_new and 'empty' not in str(func):
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

    def close(self) -> None:
        self.is_closed = True


def install(patch: Any) -> list[RecordedCall]:
    """Uses the stand-in from now on; returns the list of those that are made.

    Args:
        patch: pytest's monkeypatch.
    """
    made: list[RecordedCall] = []

    def make(generators) -> RecordedCall:
        made.append(RecordedCall(generators))
        return made[-1]

    patch.setattr(cuda_graph, 'CapturedCall', make)
    patch.setattr(cuda_graph, 'has_graphs', lambda device: True)
    return made


# Two ranks ------------------------------------------------------------------------------------------------------------

WAYS = {'DDP': {}, 'host': {'cuda_graph': True}, 'replay': {'cuda_graph': True}}
STEPS, B = 6, 4


def train(way: str, rank: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of a toy, whose global relations, accumulation and clipping are on."""
    torch.manual_seed(rank)  # other weights on each rank: the first rank's count
    settings = toys.config(teacher_path='none', relations='global', w_sample=1, w_rand=1, mixup=0, cutmix=0)
    student = register_student_hooks(settings.model, build_student(settings.model, 10))
    stats = [[0.5] * 3] * 2
    teacher = register_teacher_hooks(settings.model, toys.teacher(), stats)
    config = TrainConfig(
        torch.device('cpu'),
        accum_steps=2,
        clip_grad=1,
        global_relations=True,
        **WAYS[way],  # type: ignore[arg-type]
    )
    state = toys.state(student.model, teacher_path='none', lr=0.1, warmup_epochs=0)
    criterion = main.build_criterion(settings.loss, settings.augment)
    trainer = Trainer(student, teacher, criterion, state, config)
    student.train()
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        trainer.train_step((torch.randn(2 * B, 3, 32, 32), torch.randint(10, (2 * B,)), torch.arange(2 * B)))
    trainer.guard.sync()
    return {name: value.detach().clone() for name, value in student.model.state_dict().items()}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for way in WAYS:
        cuda_graph.WARM_UP = 3 if way == 'replay' else STEPS + 1
        dist.init_process_group('gloo', init_method=f'file://{folder}/{way}.init', rank=rank, world_size=2)
        torch.save(train(way, rank), folder / f'{way}{rank}.pth')
        dist.destroy_process_group()


class Plain:
    """The part of pytest's monkeypatch that `install` uses."""

    @staticmethod
    def setattr(owner: object, name: str, value: object) -> None:
        setattr(owner, name, value)


if __name__ == '__main__':
    install(Plain())
    torch.multiprocessing.start_processes(run_rank, args=(Path(sys.argv[1]),), nprocs=2, start_method='fork')
