"""What every part of a run needs: process groups, usage errors, meters, counters for random numbers."""

import os
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# Distributed set-up ---------------------------------------------------------------------------------------------------


# The last tensors reduced. torch 2.6 joins gloo's threads while it holds the interpreter's lock; a thread that then
# lets go of a tensor nobody else holds waits for that lock, and both wait for ever. Held here, none is the last holder.
_reduced: deque[torch.Tensor] = deque(maxlen=8)
hold_tensor = _reduced.append


class UsageError(Exception):
    """The user asked for what cannot be done; says so in one line that names the flag and the value."""


@contextmanager
def usage_error_context(flag: str, value: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error about bad input into a UsageError that names the flag it came in by.

    Args:
        flag: as it is typed, `--teacher-path`.
        value: what was typed.
        kinds: errors that mean bad input beside OSError and ValueError.
    """
    try:
        yield
    except OSError as error:
        where = f'{error.filename}: ' if error.filename not in (None, value) else ''
        raise UsageError(f'{flag} {value}: {where}{error.strerror or " ".join(str(error).split())}') from error
    except (ValueError, *kinds) as error:
        raise UsageError(f'{flag} {value}: {" ".join(str(error).split())}') from error


def init_distributed(device: str, dist_url: str) -> torch.device:
    """Joins the process group a launcher announced in the environment, if any, and returns this rank's device.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu'; without a GPU 'cuda' becomes 'cpu'.
        dist_url: where the ranks meet, 'env://' for MASTER_ADDR and MASTER_PORT.

    Raises:
        UsageError: this machine has no such GPU, or fewer than ranks.
    """
    ranks = _launched()
    cuda = device.startswith('cuda') and torch.cuda.is_available()
    chosen = torch.device('cpu')
    if cuda:
        index = ranks[2] if ranks else torch.device(device).index or 0
        # Asked by all ranks of a machine alike, so that all stop: the others would wait for a surplus one.
        needed = int(os.environ.get('LOCAL_WORLD_SIZE', index + 1)) if ranks else index + 1
        if needed > torch.cuda.device_count():
            raise UsageError(
                f'--device {device}: {needed} GPUs are needed, this machine has {torch.cuda.device_count()}'
            )
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    if ranks is not None:
        store, rank, world_size = next(rendezvous(dist_url, *ranks[:2]))
        dist.init_process_group(
            'nccl' if cuda else 'gloo',
            # After a restart by torchrun some versions of torch meet at the old store, where dead ranks' addresses are.
            store=dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
            device_id=chosen if cuda else None,
        )
    return chosen


def destroy_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _reduced.clear()


def _launched() -> tuple[int, int, int] | None:
    """(rank, world size, rank on this machine) as torchrun and torch.distributed.launch tell them."""
    env = os.environ
    if 'RANK' in env and 'WORLD_SIZE' in env:
        return int(env['RANK']), int(env['WORLD_SIZE']), int(env.get('LOCAL_RANK', 0))
    return None


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The values (n,) added up over all ranks, in place, on the same device."""
    if dist.is_initialized():
        dist.all_reduce(values)
        _reduced.append(values)
    return values


def gather_over_ranks(values: Tensor) -> list[Tensor]:
    """The values (n,) of every rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [values]
    gathered = [torch.empty_like(values) for _ in range(get_world_size())]
    dist.all_gather(gathered, values)
    _reduced.extend(gathered)
    return gathered


def gather_objects(value: object) -> list:
    """A plain value of every rank, in the order of the ranks. Waits for the device."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def main_process_first(call: Callable[[], object]) -> object:
    """What `call` returns, on the first rank before the others: it may leave an index on the disk for these."""
    if get_rank() > 0:
        gather_objects(None)
    try:
        return call()
    finally:
        if get_rank() == 0:
            gather_objects(None)


# Meters ---------------------------------------------------------------------------------------------------------------


class Meters:
    """Running means over images of named scalars; the host reads them only when a line is printed or an epoch ends.

    A row that is not finite counts for nothing: it is the business of `engine.Watch`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None  # float64: sums over images of each name, and their number
        self._printed: np.ndarray | None = None

    def update(self, values: dict[str, Tensor], images: int) -> None:
        """Adds one step's means over so many images, whatever their names; no host sync."""
        row = torch.stack([value.detach().float() for value in values.values()])
        # Weighed by images: a run may go on with larger batches on fewer ranks.
        row = torch.cat([row.sum()[None], row, row.new_ones(1)]).double() * images
        row = torch.where(torch.isfinite(row).all(), row, torch.zeros_like(row))
        self._take_names(['loss', *(f'loss_{name}' for name in values)])
        self.total = row if self.total is None else self.total + row

    def _take_names(self, names: list[str]) -> None:
        """Goes on with these names; an epoch may have been begun by a version that knew fewer terms."""
        if self.total is not None and names != self.names:
            *sums, count = self.total.tolist()
            known = dict(zip(self.names, sums, strict=True))
            self.total = self.total.new_tensor([*(known.get(name, 0.0) for name in names), count])
            self._printed = np.array(self.total.tolist())
        self.names = names

    def line(self) -> str:
        """Means since the last line, and since the start of the epoch in brackets. Waits for the device."""
        total = np.array(self.total.tolist())
        recent = total if self._printed is None else total - self._printed
        self._printed = total
        pairs = zip(self.names, recent[:-1] / max(recent[-1], 1), total[:-1] / max(total[-1], 1), strict=True)
        return '  '.join(f'{name}: {now:.4f} ({mean:.4f})' for name, now, mean in pairs)

    def means(self) -> dict[str, float]:
        """Means over all images of all ranks. Waits for the device."""
        *total, count = sum_over_ranks(self.total.clone()).tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, total, strict=True)}

    def state_dict(self) -> dict:
        """Plain numbers; those of every rank for itself, or sums would be added in another order after a resume."""
        if self.total is None:
            return {}
        return {'names': self.names, 'totals': [row.tolist() for row in gather_over_ranks(self.total)]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes over this rank's numbers; with another number of ranks than they are of, the first takes all."""
        if not state:
            return
        totals = torch.tensor(state['totals'], dtype=torch.float64, device=device)
        if totals.shape[1:] != (len(state['names']) + 1,):
            raise ValueError('its meters have not as many values as names')
        if len(totals) != get_world_size():
            totals = torch.cat([totals.sum(0, keepdim=True), totals.new_zeros(get_world_size() - 1, totals.shape[1])])
        self.names, self.total = list(state['names']), totals[get_rank()]
        self._printed = np.array(self.total.tolist())


# Random numbers by counter --------------------------------------------------------------------------------------------


def counter_seed(*counter: int | str) -> int:
    """A 63-bit seed that is a function of its counter alone, e.g. (seed, 'augment', epoch, position).

    Words keep the streams apart; numbers are non-negative.
    """
    numbers = [zlib.crc32(c.encode()) if isinstance(c, str) else c for c in counter]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(generator: torch.Generator, seed: int, step: int, rank: int, shared_draw: bool = False) -> None:
    """Starts a training step's random numbers: mixup and drop-path (global generators), random tokens (`generator`).

    With `shared_draw` all ranks draw the same random tokens.
    """
    number = counter_seed(seed, 'step', step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    generator.manual_seed(counter_seed(seed, 'tokens', step, 0 if shared_draw else rank))
