"""Time per image in the loader: timm's augmentation of PIL images against ours, on one core, in one process.

    python -m benchmarks.input IMAGENET/train        any tree of folders of JPEGs
    python -m benchmarks.input IMAGENET/train --device cuda --batch-size 256

All pipelines take turns on the same images with the same random numbers. The table has medians over rounds, in
milliseconds per image. `device` is the time of `transforms.DevicePreprocess` per image of a batch, from its first
launch until the device has finished. The last line compares our crops with PIL's.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

import benchmarks
import datasets
import flags
import transforms
import utils
from readers import load_image, to_uint8

AA, SIZE = 'rand-m9-mstd0.5-inc1', 224
STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class TimmDataset(datasets.CheckedDataset):
    """The input of the release: PIL decodes and crops, timm augments, normalises and erases image by image."""

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        transforms.seed_augmentation(utils.counter_seed(0, 'augment', key[1], key[2]))
        return self.read(key[0])


def build_pipelines(folder: str) -> dict[str, datasets.CheckedDataset]:
    """Data sets by name. The first is the baseline."""
    options = {'color_jitter': 0.4, 'auto_augment': AA, 'interpolation': 'bicubic'}
    by_timm = create_transform(SIZE, is_training=True, re_prob=0.25, re_mode='pixel', re_count=1, **options)
    transforms.patch_posterize(by_timm.transforms)
    found = {'PIL and timm': TimmDataset(ImageFolder(folder, by_timm, loader=default_loader), False)}
    for name, on_device in (('ours', False), ('--device-augment', True)):
        transform = transforms.build_train_transform(SIZE, **options, reprob=0.25, recount=1, on_device=on_device)
        images = ImageFolder(folder, transform, loader=load_image)
        found[name] = datasets.TrainDataset(images, False, 0)
    return found | {'--fused erasing': found['ours']}


def crop_psnr(folder: str, count: int) -> tuple[float, float]:
    """PSNR of our crops against PIL's in dB: over all images, and of the worst image."""
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation='bicubic')
    ours, errors = transforms.RandomResizedCrop(crop), []
    for index, (path, _) in zip(range(count), ImageFolder(folder).samples, strict=False):
        crops = []
        for load, resized_crop in ((default_loader, crop), (load_image, ours)):
            transforms.seed_augmentation(index)
            crops.append(to_uint8(resized_crop(load(path))).float())
        errors.append((crops[0] - crops[1]).square().mean().item())
    of_all = (statistics.fmean(errors), max(errors))
    return tuple(10 * math.log10(255**2 / error) if error else math.inf for error in of_all)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='folder with a folder of images per class')
    parser.add_argument('--rounds', type=flags.POSITIVE_INT, default=7, help='batches per pipeline')
    parser.add_argument('--batch-size', type=flags.POSITIVE_INT, default=64, help='images of a batch')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='device of DevicePreprocess')
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, batch_size = utils.init_distributed(args.device, 'env://'), args.batch_size
    try:
        pipelines = build_pipelines(args.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    length = len(next(iter(pipelines.values())))
    fill = [round(255 * value) for value in STATS[0]]
    one_by_one, fused = (transforms.DevicePreprocess(*STATS, 'pixel', fill, on).to(device) for on in (False, True))
    loads: dict[str, Callable] = {}
    for name, dataset in pipelines.items():
        loads[name] = lambda keys, dataset=dataset: default_collate([dataset[key] for key in keys])
        loads[f'{name}, 3 repeats'] = loads[name]
    times, costs = {name: [] for name in loads}, {name: [] for name in loads}
    for round_number in range(args.rounds + 1):
        for name, load in loads.items():
            repeats = 3 if name.endswith('repeats') else 1
            keys = [((batch_size * round_number + i) // repeats % length, round_number, i) for i in range(batch_size)]
            start = time.perf_counter()
            images, *_, aug_params = load(keys)
            times[name].append(time.perf_counter() - start)
            if isinstance(aug_params, dict):
                preprocess = fused if 'erasing' in name else one_by_one
                costs[name].append(benchmarks.seconds(partial(preprocess, images.to(device), aug_params), device))
    base = statistics.median(times['PIL and timm'][1:])
    print(f'{"":32}{"ms":>7}{"img/s":>8}{"ratio":>7}{"device ms":>11}{"ratio with it":>15}')
    for name, found in times.items():
        median, cost = statistics.median(found[1:]), statistics.median(costs[name][1:] or [0.0])
        print(f'{name:32}{1000 * median / batch_size:7.2f}{batch_size / median:8.0f}{base / median:7.2f}'
              f'{1000 * cost / batch_size:11.3f}{base / (median + cost):15.2f}')  # fmt: skip
    print('our crops against PIL: {:.1f} dB over all, {:.1f} dB the worst'.format(*crop_psnr(args.folder, 200)))
    print(benchmarks.machine(device))


if __name__ == '__main__':
    sys.exit(run())
