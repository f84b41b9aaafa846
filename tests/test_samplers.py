"""The order of training images, against published hashes and against the rule in plain Python."""

import hashlib
from itertools import cycle
from math import ceil

import numpy as np
import pytest
import torch

from samplers import KeyedSampler, RASampler, build_train_sampler, distinct_images

IMAGENET = range(1_281_167)  # a sampler needs only the length of the data set


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


# Repeated augmentation ------------------------------------------------------------------------------------------------


@pytest.mark.more
@pytest.mark.parametrize(
    ('epoch', 'published'), [(0, '6b31cf8c60017f9a'), (1, '537739e63ee562a8'), (299, 'bdac24be183cf0d0')]
)
def test_repeated_augmentation_has_published_order_on_imagenet(epoch, published):
    ranks = [epoch_of(RASampler(IMAGENET, 8, rank), epoch) for rank in range(8)]
    digest = hashlib.sha256(b''.join(np.array(indices, dtype='<i8').tobytes() for indices in ranks))
    assert digest.hexdigest().startswith(published)
    if epoch == 0:
        assert ranks[0][:4] == [1069931, 762430, 226472, 337725]


@pytest.mark.parametrize('ranks', [1, 2, 3, 8])
@pytest.mark.parametrize('images', [256, 257, 300, 511, 1000])
def test_repeated_augmentation_follows_its_rule(images, ranks):
    for epoch in (0, 7):
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).tolist()
        copies = [index for index in order for _ in range(3)]
        while len(copies) % ranks:
            copies.append(copies[len(copies) - 3 * images])  # padded to a multiple of the ranks
        for rank in range(ranks):
            sampler = RASampler(range(images), ranks, rank)
            expected = copies[rank::ranks][: images // 256 * 256 // ranks]
            assert epoch_of(sampler, epoch) == expected
            assert len(sampler) == len(expected)


@pytest.mark.parametrize('ranks', [1, 2, 3, 8])
@pytest.mark.parametrize('images', [2, 5, 100, 255])
def test_repeated_augmentation_below_256_images(images, ranks):
    order = torch.randperm(images, generator=torch.Generator().manual_seed(4)).tolist()
    copies = [index for index in order for _ in range(3)]
    for rank in range(ranks):
        sampler = RASampler(range(images), ranks, rank)
        found = epoch_of(sampler, 4)
        assert len(found) == len(sampler) == ceil(images / ranks)
        assert found == [copies[(rank + ranks * i) % len(copies)] for i in range(len(found))]


@pytest.mark.parametrize(('ranks', 'published'), [(1, 22), (2, 43), (4, 64), (8, 64)])
def test_distinct_images_match_published_numbers(ranks, published):
    assert distinct_images(64, ranks) == published


@pytest.mark.parametrize('ranks', range(1, 9))
@pytest.mark.parametrize('batch', [1, 2, 7, 64])
def test_distinct_images_match_first_batch(batch, ranks):
    first = epoch_of(RASampler(range(1024), ranks, 0), 0)[:batch]
    assert distinct_images(batch, ranks) == len(set(first))


# Positions ------------------------------------------------------------------------------------------------------------


def steps(images, ranks, repeated_aug, epoch=3, seed=0, global_batch=8):
    """The keys that all ranks read in each step, in whole batches."""
    samplers = [build_train_sampler(range(images), ranks, rank, repeated_aug, seed) for rank in range(ranks)]
    read = [epoch_of(sampler, epoch) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(keys) for keys in read]
    batch = global_batch // ranks
    return [
        sorted(key for keys in read for key in keys[step * batch : (step + 1) * batch])
        for step in range(min(map(len, read)) // batch)
    ]


@pytest.mark.parametrize('repeated_aug', [False, True])
@pytest.mark.parametrize('images', [50, 256, 301])
def test_every_step_reads_same_images_on_1_2_and_4_ranks(images, repeated_aug):
    one, two, four = (steps(images, ranks, repeated_aug) for ranks in (1, 2, 4))
    assert one == two == four
    used = images // 256 * 256 if repeated_aug and images >= 256 else images
    assert len(one) == used // 8
    positions = [position for step in one for _, _, position in step]
    assert sorted(positions) == list(range(8 * len(one)))
    assert {epoch for step in one for _, epoch, _ in step} == {3}


def test_keyed_sampler_numbers_positions_across_ranks():
    class Fixed(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    fixed = Fixed([30, 10, 20])
    sampler = KeyedSampler(fixed, num_replicas=4, rank=1)
    assert epoch_of(sampler, 6) == [(30, 6, 1), (10, 6, 5), (20, 6, 9)]
    assert fixed.epoch == 6
    assert len(sampler) == 3


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_shuffle_has_no_repeats_and_no_padding(ranks):
    keys = [key for rank in range(ranks) for key in epoch_of(build_train_sampler(range(50), ranks, rank, False, 0), 0)]
    indices = [index for index, _, _ in keys]
    assert len(indices) == len(set(indices)) == 50 // ranks * ranks


def test_shuffle_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return [index for index, _, _ in epoch_of(build_train_sampler(range(50), 1, 0, False, seed), epoch)]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 5) for epoch in (0, 1)}
    assert orders == {key: order(*key) for key in orders}
    assert all(sorted(indices) == list(range(50)) for indices in orders.values())
    # torch's sampler adds seed and epoch: these are four different sums.
    assert len({tuple(indices) for indices in orders.values()}) == 4


def test_repeated_augmentation_depends_on_epoch_not_seed():
    def order(seed, epoch):
        return epoch_of(build_train_sampler(range(300), 2, 0, True, seed), epoch)

    assert order(0, 0) == order(5, 0)
    assert [index for index, _, _ in order(0, 0)] != [index for index, _, _ in order(0, 1)]


# In mid-epoch ---------------------------------------------------------------------------------------------------------


def rest(images, ranks, repeated_aug, start):
    """The keys that each rank reads of epoch 3 from a position on."""
    samplers = [build_train_sampler(range(images), ranks, rank, repeated_aug, 0) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(3, start)
    read = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(keys) for keys in read]
    return read


@pytest.mark.parametrize('repeated_aug', [False, True])
@pytest.mark.parametrize('ranks', [1, 2, 3, 4])
@pytest.mark.parametrize('images', [23, 24, 259])
def test_rest_of_epoch_has_no_gap_or_repeat(images, ranks, repeated_aug):
    whole = {key[2]: key for keys in rest(images, ranks, repeated_aug, 0) for key in keys}
    assert sorted(whole) == list(range(len(whole)))
    for start in [*range(26), len(whole) - 1, len(whole), len(whole) + 1]:
        read = rest(images, ranks, repeated_aug, start)
        assert len({len(keys) for keys in read}) == 1  # otherwise some ranks would wait for others
        steps = max(0, len(whole) - start) // ranks
        for step in range(steps):  # with batches of 1
            assert sorted(keys[step][2] for keys in read) == list(
                range(start + step * ranks, start + (step + 1) * ranks)
            )
        assert [len(keys) for keys in read] == [steps] * ranks
        assert all(whole[key[2]] == key for keys in read for key in keys)


@pytest.mark.parametrize('repeated_aug', [False, True])
@pytest.mark.parametrize('images', [50, 301])
def test_change_of_ranks_in_mid_epoch_keeps_every_step(images, repeated_aug):
    expected = steps(images, 1, repeated_aug)
    for step, ranks in zip(range(len(expected)), cycle([1, 2, 4, 1, 4]), strict=False):
        read = rest(images, ranks, repeated_aug, 8 * step)
        assert sorted(key for keys in read for key in keys[: 8 // ranks]) == expected[step]
        assert len(read[0]) // (8 // ranks) == len(expected) - step


def test_next_epoch_starts_at_position_0():
    sampler = build_train_sampler(range(50), 1, 0, False, 0)
    sampler.set_epoch(3, 40)
    assert len(sampler) == 10
    sampler.set_epoch(4)
    assert [position for _, _, position in sampler] == list(range(50))
