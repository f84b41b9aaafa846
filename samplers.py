"""Which image is at which position of which epoch, and on which rank.

Positions count through an epoch over all ranks: rank r of W reads the positions r, r + W, r + 2W, … So a step of all
ranks takes W·B consecutive positions, for any W.
"""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import cast

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler


class RASampler(RepeatAugSampler):
    """DeiT's repeated augmentation (Hoffer et al., 2020): three copies of each image, spread over the ranks.

    The order depends only on the epoch, as in the release: `randperm(N)` with each index three times in a row. Rank r
    of W takes every W-th index from r on, and of these the first (N//256·256)//W. Below 256 images, where the release
    selects none, each rank gets ceil(N/W). `num_replicas` and `rank` default to those of the process group.
    `shuffle=False` keeps the order of the data set.
    """


class KeyedSampler(Sampler[tuple[int, int, int]]):
    """Adds the position to each index: (index, epoch, position), the key of the image's random augmentation.

    `sampler` yields the indices of rank r of W, in order. The i-th index is at position r + W·i.
    """

    def __init__(self, sampler: RASampler | DistributedSampler, num_replicas: int, rank: int) -> None:
        self.sampler, self.num_replicas, self.rank = sampler, num_replicas, rank
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Sets the epoch, and the position at which all ranks continue in it."""
        self.epoch, self.start = epoch, start
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """The number of images left in the epoch, the same on each rank for any start."""
        return max(0, len(self.sampler) * self.num_replicas - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # After a change of W the start may be between two positions of this rank: round up.
        first = max(0, -(-(self.start - self.rank) // self.num_replicas))
        for i, index in enumerate(islice(self.sampler, first, first + len(self)), start=first):
            yield index, self.epoch, self.rank + self.num_replicas * i


def build_train_sampler(
    dataset: Sized, num_replicas: int, rank: int, repeated_aug: bool, shuffle_seed: int
) -> KeyedSampler:
    """The order of training: repeated augmentation, or a shuffle without repeats that depends on (seed, epoch).

    Repeated augmentation (`RASampler`) does not depend on `shuffle_seed`. Only the length of `dataset` is used.
    """
    if repeated_aug:
        return KeyedSampler(RASampler(dataset, num_replicas, rank), num_replicas, rank)
    # drop_last: padding would repeat images, a different number for each number of ranks.
    sampler: DistributedSampler = DistributedSampler(
        cast(Dataset, dataset), num_replicas, rank, seed=shuffle_seed, drop_last=True
    )
    return KeyedSampler(sampler, num_replicas, rank)


def distinct_images(batch_size: int, num_replicas: int) -> int:
    """Distinct images in a rank's batch under repeated augmentation: 22 of 64 on one rank, 43 on two, 64 on four."""
    return len({i * num_replicas // 3 for i in range(batch_size)})
