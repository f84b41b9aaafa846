"""The transforms of the loader processes against Pillow and timm, and augmentation that depends only on its key."""

import random

import numpy as np
import pytest
import torch
import toys
from PIL import Image, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader

import transforms
from datasets import TrainDataset, build_dataset
from transforms import (
    RandomResizedCrop,
    apply_policy,
    build_eval_transform,
    posterize_pil,
    seed_augmentation,
)


@pytest.mark.parametrize('shape', [(100, 200), (200, 100)])
@pytest.mark.parametrize(('size', 'short'), [(48, 54), (224, 256)])
def test_eval_transform_resizes_and_crops_the_centre(shape, size, short):
    # With these shapes the margins are even, so there is exactly one centre.
    image = toys.noise(*shape)
    width, height = (short * side // 100 for side in shape)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = toys.as_bytes(resized.crop((left, top, left + size, top + size)))
    for given in (image, toys.as_bytes(image)):
        assert torch.equal(build_eval_transform(size)(given), expected)


@pytest.mark.parametrize('size', [8, 32])
def test_eval_transform_keeps_small_images(size):
    image = toys.noise(size, size)
    assert torch.equal(build_eval_transform(size)(image), toys.as_bytes(image))


@pytest.mark.parametrize(('width', 'height'), [(28, 28), (80, 50), (33, 40), (5, 7)])
def test_small_input_size_resizes_the_shorter_side_of_other_images(width, height):
    image, size = toys.noise(width, height), 32
    found = build_eval_transform(size)(image)
    resized = image.resize((size * width // min(width, height), size * height // min(width, height)))
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = toys.as_bytes(resized.crop((left, top, left + size, top + size)))
    assert torch.equal(found, expected)
    trained, _ = toys.train_transform(size, auto_augment=None, color_jitter=0.0, reprob=0.0)(image)
    assert trained.shape == (3, size, size)


def test_small_training_images_are_padded_by_4_and_cropped():
    image, transform = toys.noise(16, 16), toys.train_transform(16, auto_augment=None, color_jitter=0.0, reprob=0.0)
    padded = ImageOps.expand(image, 4)
    possible = {}
    for mirrored in (False, True):
        for x in range(9):
            for y in range(9):
                crop = padded.crop((x, y, x + 16, y + 16))
                possible[mirrored, x, y] = toys.as_bytes(ImageOps.mirror(crop) if mirrored else crop)
    seen = set()
    for _ in range(100):
        found, _ = transform(image)
        matches = [place for place, crop in possible.items() if torch.equal(found, crop)]
        assert len(matches) == 1
        seen.update(matches)
    assert [set(values) for values in zip(*seen, strict=True)] == [{False, True}, set(range(9)), set(range(9))]


@pytest.mark.parametrize('size', [33, 48])
def test_large_training_images_get_resized_random_crops(size):
    image, transform = toys.noise(60, 90), toys.train_transform(size, auto_augment=None)
    (first, _), (second, _) = transform(image), transform(image)
    assert first.shape == second.shape == (3, size, size)
    assert not torch.equal(first, second)


def test_default_augmentation_works_on_a_thousand_images(monkeypatch):
    asked = []

    def record(image, bits, **_):
        asked.append(bits)
        return posterize_pil(image, bits)

    monkeypatch.setattr(transforms, 'posterize_pil', record)
    transform, image = toys.train_transform(16), toys.noise(16, 16)
    for _ in range(1_000):
        assert transform(image)[0].shape == (3, 16, 16)
    assert asked.count(0) > 0  # with Pillow 13 these images raise an error without the patch


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('bits', range(1, 9))
def test_posterize_matches_pillow(bits, mode):
    image = toys.noise(8, 8).convert(mode)
    assert posterize_pil(image, bits, fillcolor=0).tobytes() == ImageOps.posterize(image, bits).tobytes()


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_posterize_to_0_bits_is_black(mode):
    found = posterize_pil(toys.noise(8, 8).convert(mode), 0, fillcolor=0)
    assert (found.mode, found.size) == (mode, (8, 8))
    assert not np.asarray(found).any()


@pytest.mark.parametrize('aa', [toys.DEFAULT_AA, 'rand-m9', 'original', 'originalr', 'v0', 'v0r', 'augmix-m5-w4-d2'])
def test_every_policy_can_posterize_to_0_bits(aa):
    steps = toys.train_transform(48, auto_augment=aa).steps.transforms
    # RandAugment and AugMix have a list of operations, AutoAugment a list of lists.
    lists = [ops for step in steps for ops in ([step.ops] if hasattr(step, 'ops') else getattr(step, 'policy', []))]
    ops = [op for ops in lists for op in ops if 'Posterize' in op.name]
    assert ops
    for op in ops:
        assert not np.asarray(op.aug_fn(toys.noise(8, 8), 0, **op.kwargs)).any()


def test_crop_matches_timm_up_to_rounding():
    y, x = np.mgrid[:90, :120]
    smooth = np.stack([2 * x, 255 - 2 * y, (x + y) % 256], axis=-1) + np.random.RandomState(0).randint(
        0, 20, (90, 120, 3)
    )
    image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    for interpolation in ('bicubic', 'bilinear', 'random'):
        theirs = RandomResizedCropAndInterpolation(64, interpolation=interpolation)
        ours, errors = RandomResizedCrop(theirs), []
        for seed in range(40):
            random.seed(seed)
            expected = toys.as_bytes(theirs(image)).float()
            state = random.getstate()
            random.seed(seed)
            errors.append((ours(toys.as_bytes(image)).float() - expected).square().mean().item())
            assert random.getstate() == state
        assert 10 * np.log10(255**2 / np.mean(errors)) > 60  # dB


def test_device_gets_the_same_draws_as_loader_processes():
    image, changed = toys.noise(60, 90), 0
    both = {on_device: toys.train_transform(48, reprob=0.9, on_device=on_device) for on_device in (False, True)}
    fill = both[True].policy.fill
    for seed in range(60):
        found = {}
        for on_device, transform in both.items():
            seed_augmentation(seed)
            found[on_device] = (*transform(image), random.random(), np.random.rand(), torch.rand(1).item())
        (ours, aug_params, *drawn), (theirs, plain, *others) = found[True], found[False]
        assert torch.equal(aug_params['erase'], plain['erase'])
        assert drawn == others
        moved = aug_params['plan'][:, 2].any()  # the filters of PIL and torch differ
        result = apply_policy(ours[None], aug_params['plan'][None], fill)[0]
        assert moved or (result.int() - theirs.int()).abs().max() <= 2
        changed += int(not torch.equal(ours, theirs))
    assert changed > 20


# Augmentation depends only on its key ---------------------------------------------------------------------------------


def keyed(seed=3):
    return TrainDataset(build_dataset('FAKE', '', True, toys.train_transform(), input_size=16)[0], False, seed)


def test_augmentation_does_not_depend_on_earlier_draws():
    dataset, key = keyed(), (11, 2, 40)
    expected, *_, aug_params = dataset[key]
    for draws in range(5):
        torch.rand(draws)
        np.random.rand(draws)
        _ = [random.random() for _ in range(draws)]
        dataset[draws, 0, draws]
        assert torch.equal(dataset[key][0], expected)
    again, *_, params_again = keyed()[key]
    assert torch.equal(again, expected)
    assert params_again['key'] == aug_params['key']
    assert torch.equal(params_again['erase'], aug_params['erase'])
    assert aug_params.keys() == {'key', 'erase'}
    assert len(dataset) == 1024


@pytest.mark.parametrize(('seed', 'key'), [(3, (11, 2, 41)), (3, (11, 3, 40)), (4, (11, 2, 40)), (3, (11, 40, 2))])
def test_augmentation_depends_on_position_epoch_and_seed(seed, key):
    (expected, label, index, _), (found, target, other, _) = keyed()[11, 2, 40], keyed(seed)[key]
    assert index == other == 11
    assert target == label  # it is the same image
    assert not torch.equal(found, expected)


@toys.forks
def test_augmentation_does_not_depend_on_workers():
    keys = [(index, 5, position) for position, index in enumerate([4, 4, 4, 9, 9, 9, 2, 2, 2, 7])]
    alone, shared = (
        torch.cat([images for images, *_ in DataLoader(keyed(), 3, sampler=keys, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, shared)
    assert len({image.numpy().tobytes() for image in alone}) == 10  # copies of an image differ from each other
