"""Batches that are copied to a GPU while the step before runs: order, errors, early stops. Streams are replaced."""

import multiprocessing
import signal

import pytest
import torch
import toys
from torch.utils.data import DataLoader, default_collate

from loaders import DevicePrefetcher, prefetch_to_device
from readers import BadImageError
from samplers import KeyedSampler
from stopping import StopSignals, iter_with_signals_blocked

CPU = torch.device('cpu')


class Images(list):
    """Items as a training set has them; an image with the number `bad` cannot be read."""

    error = BadImageError('image 4 cannot be read')

    def __init__(self, count: int, bad: int = -1) -> None:
        super().__init__(range(count))
        self.bad = bad

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        index, _, position = key
        if index == self.bad:
            raise self.error
        aug_params = {'key': position, 'erase': torch.full((1, 4), index), 'plan': torch.zeros(2, 3)}
        return torch.full((3, 2, 2), index, dtype=torch.uint8), index % 3, index, aug_params


def loader(count: int = 6, bad: int = -1, **options) -> DataLoader:
    images = Images(count, bad)
    return DataLoader(images, 2, sampler=KeyedSampler(Plain(count), 1, 0), **options)


class Plain:
    """The order of the data set."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return iter(range(self.count))

    def set_epoch(self, epoch: int) -> None:
        pass


@pytest.fixture
def done(monkeypatch):
    return toys.fake_streams(monkeypatch)


def test_batches_are_the_loaders(done):
    for found, expected in zip(DevicePrefetcher(loader(), CPU, ('key',)), loader(), strict=True):
        toys.assert_same(list(found), list(expected))


def test_next_copy_begins_before_the_step_but_the_step_waits_for_its_own_only(done):
    for number, (images, targets, _, aug_params) in enumerate(DevicePrefetcher(loader(), CPU, ('key', 'other'))):
        recorded = [x for x in done if isinstance(x, torch.Tensor)]
        assert [x is y for x, y in zip(recorded, (images, targets, aug_params['key']), strict=True)] == [True] * 3
        words = [x for x in done if isinstance(x, str)]
        assert words == ['copy'] * (number == 0) + ['wait'] + ['copy'] * (number < 2)
        done.clear()


def test_only_what_the_device_needs_is_copied(done):
    prefetcher = DevicePrefetcher(loader(), torch.device('meta'), ('erase', 'key'))
    images, targets, indices, aug_params = next(iter(prefetcher))
    assert all(x.is_meta for x in (images, targets, aug_params['erase'], aug_params['key']))
    assert not any(x.is_meta for x in (indices, aug_params['plan']))


def test_prefetcher_stands_for_its_loader(done):
    plain = loader()
    prefetcher = DevicePrefetcher(plain, CPU, ())
    assert (prefetcher.dataset, prefetcher.sampler, prefetcher.batch_size) == (plain.dataset, plain.sampler, 2)
    assert len(prefetcher) == 3
    prefetcher.sampler.set_epoch(1, 2)
    assert len(prefetcher) == 2
    assert torch.cat([batch[3]['key'] for batch in prefetcher]).tolist() == [2, 3, 4, 5]


def test_cpu_reads_its_loader_directly():
    plain = loader()
    assert prefetch_to_device(plain, CPU) is plain


def test_gpu_reads_ahead(done):
    assert isinstance(prefetch_to_device(loader(), torch.device('cuda', 0)), DevicePrefetcher)


def test_loader_starts_while_signals_are_blocked(done):
    class Watched(DataLoader):
        def __iter__(self):
            assert set(StopSignals.NUMBERS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
            return super().__iter__()

    batches = iter_with_signals_blocked(DevicePrefetcher(Watched([(1, 1, 1, {})] * 4, 2), CPU, ()))
    assert len(list(batches)) == 2


def test_error_of_the_loader_reaches_the_caller_unchanged(done):
    batches, seen = iter(DevicePrefetcher(loader(bad=4), CPU, ())), []
    with pytest.raises(BadImageError) as raised:
        seen.extend(batch[2].tolist() for batch in batches)
    assert raised.value is Images.error
    assert seen == [[0, 1]]
    assert list(batches) == []


@toys.forks
@pytest.mark.parametrize('workers', [0, 2])
def test_early_stop_leaves_no_process_and_no_batch(done, workers):
    prefetcher = DevicePrefetcher(loader(num_workers=workers), CPU, ())
    batches = iter(prefetcher)
    first = next(batches)
    batches.close()
    del batches
    assert not multiprocessing.active_children()
    toys.assert_same(list(next(iter(prefetcher))), list(first))
    toys.assert_same(list(first), list(default_collate([Images(6)[i, 0, i] for i in (0, 1)])))
