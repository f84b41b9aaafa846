"""Which image stands at which position of which epoch on which rank.

Position p of an epoch is global: rank r of W reads positions r, r + W, r + 2W, … so that one step of all ranks takes
W·B consecutive positions, whatever W is.
"""

from collections.abc import Iterator
from itertools import islice

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler

# DeiT keeps a multiple of this many images per epoch.
SELECTED_ROUND = 256


class RASampler(RepeatAugSampler):
    """DeiT's repeated augmentation (Hoffer et al., 2020): three copies of an image, spread over the ranks.

    The order depends on the epoch alone, as in the release: `randperm(N)`, each index three times in a row, rank r of W
    takes every W-th from r on, of these the first (N//256·256)//W. Below 256 images, where the release yields
    none, each rank gets ceil(N/W).

    Args:
        dataset: anything with a length N.
        num_replicas: number of ranks W; the process group's if None.
        rank: this rank; the process group's if None.
        shuffle: False keeps the data set's order.
    """

    def __init__(self, dataset, num_replicas: int | None = None, rank: int | None = None, shuffle: bool = True):
        # timm before 1.0.25 selects nothing at all below `selected_round` images; 0 switches the rounding off.
        rounding = SELECTED_ROUND if len(dataset) >= SELECTED_ROUND else 0
        super().__init__(dataset, num_replicas, rank, shuffle, num_repeats=3, selected_round=rounding)


class KeyedSampler(Sampler[tuple[int, int, int]]):
    """Each index of `sampler` with its place, (index, epoch, position): the counter of its random augmentation.

    Args:
        sampler: yields the indices of one rank, in order.
        num_replicas: number of ranks W.
        rank: this rank r; its i-th index stands at position r + W·i.
    """

    def __init__(self, sampler: Sampler[int], num_replicas: int, rank: int) -> None:
        self.sampler = sampler
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and the position from which all ranks together go on in it."""
        self.epoch = epoch
        self.start = start
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """As many on each rank, whatever position was begun at."""
        return max(0, len(self.sampler) * self.num_replicas - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # Fewer ranks may have stopped between two positions that are this rank's: its first is the one behind.
        first = max(0, -(-(self.start - self.rank) // self.num_replicas))
        for i, index in enumerate(islice(self.sampler, first, first + len(self)), start=first):
            yield index, self.epoch, self.rank + self.num_replicas * i


def build_train_sampler(
    dataset: Dataset, num_replicas: int, rank: int, repeated_aug: bool, shuffle_seed: int
) -> KeyedSampler:
    """The order of training: repeated augmentation, or a shuffle of (shuffle_seed, epoch) without repeats.

    Args:
        dataset: the training images.
        num_replicas: number of ranks.
        rank: this rank.
        repeated_aug: three copies of each image (`RASampler`).
        shuffle_seed: seed of the plain shuffle; repeated augmentation has DeiT's own rule.
    """
    if repeated_aug:
        sampler = RASampler(dataset, num_replicas, rank)
    else:
        # drop_last: padding would repeat images, and another number of images for another number of ranks.
        sampler = DistributedSampler(dataset, num_replicas, rank, shuffle=True, seed=shuffle_seed, drop_last=True)
    return KeyedSampler(sampler, num_replicas, rank)


def distinct_images(batch_size: int, num_replicas: int) -> int:
    """Distinct images in a rank's batch under repeated augmentation: 22 of 64 on one rank, 43 on two, 64 on four."""
    return len({i * num_replicas // 3 for i in range(batch_size)})
