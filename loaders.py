"""Data loaders: this rank's share of the training and validation images, in batches."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, default_collate

import datasets
import transforms
import utils
from datasets import EvalDataset, TrainDataset
from flags import AugmentConfig, DataConfig
from loggers import log_rank0
from samplers import KeyedSampler, build_train_sampler
from utils import UsageError, usage_error_context


@dataclass(frozen=True)
class LoaderBuilder:
    """Builds the loaders of a run."""

    data: DataConfig
    input_size: int  # height and width of the images in pixels
    seed: int  # of the run
    device: torch.device  # that the batches go to

    def train(self, augment: AugmentConfig, batch_size: int, repeated_aug: bool, mean: tuple[float, ...]) -> DataLoader:
        """Augmented training images in whole batches.

        Args:
            augment: what is done to the images.
            batch_size: images of one rank in an optimizer step.
            repeated_aug: three copies of each image, see `samplers.RASampler`.
            mean: of each channel, by which the images are normalised.

        Raises:
            UsageError: the data cannot be read, or are too few for a batch.
        """
        dataset = self._open(True, _train_transform(augment, self.input_size, mean))
        world, shuffle_seed = utils.get_world_size(), utils.counter_seed(self.seed, 'shuffle')
        sampler = build_train_sampler(dataset, world, utils.get_rank(), repeated_aug, shuffle_seed)
        loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, **self._options())
        if not len(loader):
            raise UsageError(
                f'--batch-size: {len(sampler)} images on each of {world} ranks do not fill one step of {batch_size}; '
                f'the training set has {len(dataset)} images'
            )
        return loader

    def val(self, batch_size: int) -> DataLoader:
        """The validation images, each on one rank without padding; with --no-dist-eval all of them on every rank.

        Raises:
            UsageError: the data cannot be read.
        """
        dataset = self._open(False, transforms.build_eval_transform(self.input_size))
        rank, world = (utils.get_rank(), utils.get_world_size()) if self.data.dist_eval else (0, 1)
        return DataLoader(dataset, batch_size, sampler=range(rank, len(dataset), world), **self._options())

    def _open(self, train: bool, transform: Callable[..., Any]) -> TrainDataset | EvalDataset:
        data, skip_bad = self.data, self.data.bad_images == 'skip'
        with usage_error_context('--data-path', data.data_path):
            images, _ = datasets.build_dataset(
                data.data_set,
                data.data_path,
                train,
                transform,
                input_size=self.input_size,
                inat_category=data.inat_category,
                num_classes=data.num_classes,
            )
        dataset = TrainDataset(images, skip_bad, self.seed) if train else EvalDataset(images, skip_bad)
        dataset.first()  # if not even the first image can be decoded, that is an error before training
        return dataset

    def _options(self) -> dict[str, Any]:
        workers, pin = self.data.workers, self.data.pin_mem and self.device.type == 'cuda'
        return {'num_workers': workers, 'pin_memory': pin, 'persistent_workers': workers > 0}


def _train_transform(augment: AugmentConfig, input_size: int, mean: tuple[float, ...]) -> transforms.TrainTransform:
    if augment.no_aug:
        return transforms.TrainTransform(transforms.build_eval_transform(input_size))
    value = f'{augment.aa}{" with --device-augment" * augment.device_augment}'
    with usage_error_context('--aa', value, AssertionError, KeyError):
        return transforms.build_train_transform(
            input_size,
            augment.color_jitter,
            augment.policy,
            augment.train_interpolation,
            augment.reprob,
            augment.recount,
            mean,
            on_device=augment.device_augment,
        )


def choose_repeated_aug(flag: bool | str, resume: str, checkpoint: dict[str, Any]) -> bool:
    """Whether the order of training is that of repeated augmentation.

    In one process the three copies of an image would be in the same batch, so there it is used only if it is typed. A
    run that is resumed keeps its order, whatever the number of ranks, unless a flag is typed.

    Args:
        flag: True by default, 'always' for --repeated-aug, False for --no-repeated-aug.
        resume: the value of --resume, for the error.
        checkpoint: {} for none.

    Raises:
        UsageError: a typed flag contradicts a checkpoint in mid-epoch.
    """
    typed = {'always': True, False: False}.get(flag)
    started = checkpoint.get('repeated_aug')
    if typed is None:
        return utils.get_world_size() > 1 if started is None else bool(started)
    if checkpoint.get('position') and typed != started:
        name = '--repeated-aug' if typed else '--no-repeated-aug'
        raise UsageError(f'{name}: cannot be changed in mid-epoch; --resume {resume} was started without it')
    return typed


def first_batch(loader: DataLoader, epoch: int) -> Any:
    """The batch an epoch starts with on this rank, loaded by this process: the same after a resume in mid-epoch."""
    sampler = loader.sampler
    assert isinstance(sampler, KeyedSampler)
    sampler.set_epoch(epoch)
    return default_collate([loader.dataset[key] for key in islice(sampler, loader.batch_size)])


def prefetch_to_device(loader: DataLoader, device: torch.device, aug_params: Collection[str] = ()) -> DataLoader:
    """On a GPU, reads one batch ahead and copies it to the device while the step before runs. Elsewhere: `loader`.

    The result stands for `loader` in the engine. Image indices stay on the CPU, where the guard reads them.

    Args:
        loader: training batches, in pinned memory; a copy from other memory makes the host wait.
        device: where images and classes go.
        aug_params: names of the augmentation parameters that go there, too. The host reads `plan`, and `erase` and
            `key` unless erasing is fused.
    """
    return cast(DataLoader, DevicePrefetcher(loader, device, aug_params)) if device.type == 'cuda' else loader


class DevicePrefetcher:
    """The batches of a loader on a GPU, copied on a stream of their own; see `prefetch_to_device`.

    A batch that was read ahead does not count: the trainer counts a batch when its step is made. An error of the loader
    is raised one step early, before the step of the batch that was read already.

    timm's PrefetchLoader is not used: it takes (images, classes) only, normalises to other bits and erases with other
    noise, and starts the loader processes at the first batch, when signals are no longer blocked.
    """

    def __init__(self, loader: DataLoader, device: torch.device, aug_params: Collection[str]) -> None:
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self._loader, self._device, self._aug_params = loader, device, aug_params
        self._stream = torch.cuda.Stream(device)  # one for all epochs: memory is cached for each stream

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        # Not a generator itself: the loader's processes must start now, see `iter_with_signals_blocked`.
        return self._read_ahead(iter(self._loader))

    def _read_ahead(self, batches: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        copies = map(self._copy, batches)
        batch = next(copies, None)
        while batch is not None:
            # Waits for this batch, so it comes before the next copy. The host does not wait.
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            images, targets, _, aug_params = batch
            for tensor in (images, targets, *(x for name, x in aug_params.items() if name in self._aug_params)):
                tensor.record_stream(current)  # its memory is not used again before the step has read it
            following = next(copies, None)
            yield batch
            batch = following

    def _copy(self, batch: Sequence[Any]) -> Sequence[Any]:
        images, targets, indices, aug_params = batch
        copy = partial(torch.Tensor.to, device=self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            aug_params = {name: copy(x) if name in self._aug_params else x for name, x in aug_params.items()}
            return copy(images), copy(targets), indices, aug_params


def report_bad_images(device: torch.device, *loaders: DataLoader, again: bool = False) -> None:
    """Lists the images that were left out on any rank: those since the last list, or all of them again."""
    for loader in loaders:
        dataset = loader.dataset
        assert isinstance(dataset, TrainDataset | EvalDataset)
        what = 'left out of evaluation' if isinstance(dataset, EvalDataset) else 'replaced by the next one'
        for image in dataset.list_bad(lambda bad: utils.sum_over_ranks(bad.to(device)), again):
            log_rank0(f'warning: cannot be read, {what}: {image}')
