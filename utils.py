"""What every part of a run needs: process groups, usage errors, meters, counters for random numbers."""

import difflib
import os
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar('T')

# Process groups -------------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """The user asked for something impossible. The message is one line that names the flag and its value."""


@contextmanager
def usage_error_context(flag: str, value: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turns OSError, ValueError and errors of these `kinds` into a UsageError that names the flag and its value."""
    bad_input: tuple[type[Exception], ...] = (OSError, ValueError, *kinds)
    try:
        yield
    except bad_input as error:
        file = getattr(error, 'filename', None)
        where = f'{file}: ' if file not in (None, value) else ''
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise UsageError(f'{flag} {value}: {where}{reason}') from error


def path_hint(path: Path) -> str:
    """What is probably meant by a path that does not exist, as the end of an error message; '' if that is unclear."""
    if str(path) != str(path).strip() and Path(str(path).strip()).exists():
        return '; remove the space before or after the path'
    if path.is_symlink():
        return f'; it is a link to {os.readlink(path)}, which does not exist'
    parent = next((folder for folder in path.parents if folder.exists()), None)
    if parent is None or not parent.is_dir():
        return ''
    first = path.relative_to(parent).parts[0]
    names = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(first, names, n=1)
    if near:
        return f'; did you mean {parent / near[0]}?'
    return '' if parent / first == path else f'; there is no {parent / first}'


def flag_name(field_name: str) -> str:
    """A field of the flags as it is typed, `--teacher-path`."""
    return '--' + field_name.replace('_', '-')


NO_VALUES = '(none)'


def format_values(value: object) -> str:
    """The value of a flag, or its list of values, as they are typed."""
    values = [f'{key}={each}' for key, each in value.items()] if isinstance(value, dict) else value
    text = ' '.join(map(str, values)) if isinstance(values, list | tuple) else str(values)
    return text or NO_VALUES


def init_distributed(device: str, dist_url: str, timeout_minutes: float = 30.0) -> torch.device:
    """Joins the process group that a launcher announces in the environment, if any; returns this rank's device.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu'; without a GPU 'cuda' becomes 'cpu'.
        dist_url: init URL of the process group, 'env://' for MASTER_ADDR and MASTER_PORT.
        timeout_minutes: after which a rank that waits for others gives up.

    Raises:
        UsageError: this machine does not have this GPU, or has fewer GPUs than ranks; the environment is incomplete.
        RuntimeError: the other ranks have not come in time.
    """
    env, launched, timeout = os.environ, _is_launched(), timedelta(minutes=timeout_minutes)
    cuda = device.startswith('cuda') and torch.cuda.is_available()
    chosen = torch.device('cpu')
    if cuda:
        index = int(env.get('LOCAL_RANK', 0)) if launched else torch.device(device).index or 0
        # All ranks of a machine compute the same, so that all stop: they would wait for a rank without a GPU.
        needed = int(env.get('LOCAL_WORLD_SIZE', index + 1)) if launched else index + 1
        if needed > (found := torch.cuda.device_count()):
            raise UsageError(f'--device {device}: {needed} GPUs are needed, this machine has {found}')
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    if launched:
        rank, world_size = int(env['RANK']), int(env['WORLD_SIZE'])
        text = (
            f'rank {rank} of {world_size} is waiting for the other ranks at {dist_url}, up to {timeout_minutes:g} min'
        )
        store = run_interruptibly(lambda: next(rendezvous(dist_url, rank, world_size, timeout=timeout))[0], text)
        join = partial(
            dist.init_process_group,
            'nccl' if cuda else 'gloo',
            # torchrun keeps its store when it restarts the ranks, and the addresses of dead ranks are still in it.
            store=dist.PrefixStore(f'attempt {env.get("TORCHELASTIC_RESTART_COUNT", 0)}', store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=chosen if cuda else None,
        )
        join() if cuda else run_interruptibly(join, text)
    return chosen


def _is_launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    env = os.environ
    given = [name for name in ('RANK', 'WORLD_SIZE') if name in env]
    for name in given:
        if not env[name].isdigit():
            raise UsageError(f'{name}={env[name]} in the environment is not a whole number')
    if len(given) == 1:
        missing = 'WORLD_SIZE' if given == ['RANK'] else 'RANK'
        raise UsageError(f'{given[0]}={env[given[0]]} is set in the environment, but {missing} is not; use torchrun')
    if not given and 'SLURM_STEP_ID' in env and int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
        tasks = env['SLURM_STEP_NUM_TASKS']
        raise UsageError(f'SLURM_STEP_NUM_TASKS={tasks}: srun has started {tasks} tasks; start one torchrun per node')
    return bool(given)


def run_interruptibly(call: Callable[[], T], waiting: str, notice: float = 10.0) -> T:
    """What a call returns that may wait for long outside of Python: in a thread, so that signals are handled meanwhile.

    Args:
        call: to be run.
        waiting: printed on stderr if it takes long.
        notice: seconds after which that is.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(notice)
    if thread.is_alive():
        print(waiting, file=sys.stderr, flush=True)
    while thread.is_alive():
        thread.join(0.5)
    if errors:
        raise errors[0]
    return results[0]


def destroy_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Adds up the values (n,) over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> list[Tensor]:
    """Returns the values (n,) of every rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [values]
    gathered = [torch.empty_like(values) for _ in range(get_world_size())]
    dist.all_gather(gathered, values)
    return gathered


def gather_objects(value: Any) -> list[Any]:
    """Returns a plain value of every rank, in the order of the ranks. Waits for the device."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def main_process_first(call: Callable[[], T]) -> T:
    """Returns what `call` returns. The first rank calls it before the others, and may leave an index on the disk."""
    if get_rank() > 0:
        gather_objects(None)
    try:
        return call()
    finally:
        if get_rank() == 0:
            gather_objects(None)


# Compiling ------------------------------------------------------------------------------------------------------------


@cache
def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    torch._dynamo.config.recompile_limit = 64  # more than 8 shapes would be an error
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_for(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """A function of tensors; for a GPU as one compiled graph, made for each shape at its first call."""
    return _compiled(function) if device.type == 'cuda' else function


@cache
def fusing_problem(device: torch.device) -> str:
    """What keeps a device from having parts of --fused by default, '' for nothing. On a GPU it compiles a function."""
    if device.type != 'cuda' or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return 'needs an NVIDIA GPU of compute capability 8.0 or higher'  # older ones have no bfloat16
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(1, device=device))
    except Exception as error:  # of any kind: without a C compiler, without triton
        return f'torch.compile does not work: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
    return ''


# Meters ---------------------------------------------------------------------------------------------------------------


class SizedIterable(Protocol):
    """The batches of an epoch: a DataLoader or a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Meters:
    """Running means of named scalars over images. The host reads them only when a line is printed or an epoch ends.

    A step with a value that is not finite is left out; `engine.NonFiniteGuard` deals with it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None  # float64: for each name a sum over images, then the number of images
        self._printed: np.ndarray | float = 0.0  # `total` at the last call of `recent`

    def update(self, values: dict[str, Tensor], images: int) -> None:
        """Adds the means of one step over so many images, by name. No host sync."""
        self.add(values, self.row(values, images))

    @staticmethod
    def row(values: dict[str, Tensor], images: int) -> Tensor:
        """What `update` adds to `total`: (terms + 2,) float64, zeros if a value is not finite."""
        row = torch.stack([value.detach().float() for value in values.values()])
        # Weighted by images, because a resumed run may have larger batches on fewer ranks.
        row = torch.cat([row.sum()[None], row, row.new_ones(1)]).double() * images
        return torch.where(torch.isfinite(row).all(), row, torch.zeros_like(row))

    def add(self, names: Iterable[str], row: Tensor) -> None:
        """Adds a `row` of the terms with these names."""
        self._set_names(['loss', *(f'loss_{name}' for name in names)])
        self.total = row.clone() if self.total is None else self.total + row

    def _set_names(self, names: list[str]) -> None:
        """Continues with these names. An epoch may have been started by a version with fewer terms."""
        if self.total is not None and names != self.names:
            *sums, count = self.total.tolist()
            known = dict(zip(self.names, sums, strict=True))
            self.total = self.total.new_tensor([*(known.get(name, 0.0) for name in names), count])
            self._printed = np.array(self.total.tolist())
        self.names = names

    def recent(self) -> dict[str, float]:
        """Means since the previous call, of this rank. Waits for the device."""
        if self.total is None:
            return {}
        total = np.array(self.total.tolist())
        recent, self._printed = total - self._printed, total
        return dict(zip(self.names, (recent[:-1] / max(recent[-1], 1)).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Means over all images of all ranks. Waits for the device."""
        if self.total is None:
            return {}
        *total, count = sum_over_ranks(self.total.clone()).tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, total, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, separately for each rank: a sum over the ranks would be rounded in another order."""
        if self.total is None:
            return {}
        return {'names': self.names, 'totals': [row.tolist() for row in gather_over_ranks(self.total)]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Loads the numbers of this rank. If the number of ranks has changed, the first rank takes all."""
        if not state:
            return
        totals = torch.tensor(state['totals'], dtype=torch.float64, device=device)
        if totals.shape[1:] != (len(state['names']) + 1,):
            raise ValueError('the meters do not have as many values as names')
        if len(totals) != get_world_size():
            totals = torch.cat([totals.sum(0, keepdim=True), totals.new_zeros(get_world_size() - 1, totals.shape[1])])
        self.names, self.total = list(state['names']), totals[get_rank()]
        self._printed = np.array(self.total.tolist())


# Random numbers by counter --------------------------------------------------------------------------------------------


def counter_seed(*counter: int | str) -> int:
    """Returns a 63-bit seed that depends on its arguments alone, e.g. (seed, 'augment', epoch, position).

    Strings separate the streams. Numbers must not be negative.
    """
    numbers = [zlib.crc32(c.encode()) if isinstance(c, str) else c for c in counter]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(generator: torch.Generator, seed: int, step: int, rank: int, shared_draw: bool = False) -> None:
    """Seeds a training step: mixup and drop-path use the global generators, random tokens use `generator`.

    With `shared_draw` all ranks draw the same random tokens.
    """
    number = counter_seed(seed, 'step', step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    generator.manual_seed(counter_seed(seed, 'tokens', step, 0 if shared_draw else rank))
