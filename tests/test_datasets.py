"""Every data set of the table on small files made here, the transforms against Pillow, and keyed augmentation."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100

import datasets
import readers
import transforms
from datasets import DATA_SETS, BadImageError, EvalDataset, TrainDataset, build_dataset, count_classes
from transforms import apply_policy, build_eval_transform, build_train_transform

DEFAULT_AA = 'rand-m9-mstd0.5-inc1'


def save_image(path, colour=0, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), colour if mode == 'L' else (colour,) * len(mode)).save(path)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(1, 256, (height, width, 3), dtype=np.uint8))


def train_transform(size=16, **changes):
    flags = {'color_jitter': 0.4, 'auto_augment': DEFAULT_AA, 'interpolation': 'bicubic'}
    erasing = {'reprob': 0.25, 'recount': 1}
    return build_train_transform(size, **{**flags, **erasing, **changes})


# Image folders --------------------------------------------------------------------------------------------------------


def image_folder(root, splits):
    for split, names in splits.items():
        for i, name in enumerate(names):
            save_image(root / split / name / 'colour.png', 40 * i)
            save_image(root / split / name / 'photo.jpeg', 40 * i)
            save_image(root / split / name / 'grey.png', 40 * i, mode='L')
    return root


@pytest.mark.parametrize(('name', 'classes'), [('FOLDER', 3), ('IMNET', 1000)])
def test_image_folders_open(tmp_path, name, classes):
    root = str(image_folder(tmp_path, {'train': ['b', 'a', 'c'], 'val': ['a', 'b', 'c']}))
    for train in (True, False):
        dataset, found = build_dataset(name, root, train)
        assert found == count_classes(name, root) == classes
        assert dataset.classes == ['a', 'b', 'c']
        assert [target for _, target in dataset] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert {(image.dtype, image.shape) for image, _ in dataset} == {(torch.uint8, (3, 6, 8))}
        assert all(('train' if train else 'val') in path for path, _ in dataset.samples)


@pytest.mark.parametrize(('name', 'classes'), [('FOLDER', 2), ('IMNET', 1000)])
def test_the_val_folder_alone_is_enough_to_evaluate(tmp_path, name, classes):
    root = str(image_folder(tmp_path, {'val': ['a', 'b']}))
    dataset, found = build_dataset(name, root, False)
    assert (found, len(dataset)) == (classes, 6)
    with pytest.raises((OSError, ValueError), match='train'):
        build_dataset(name, root, True)


def test_a_part_of_imagenet_has_the_numbers_of_imagenet(tmp_path):
    # n02085620, the Chihuahua, is class 151; n01440764, the tench, is 0; n04254680, the soccer ball, is 805.
    names = ['n01440764', 'n02085620', 'n04254680']
    root = str(image_folder(tmp_path / 'part', {'train': names, 'val': names}))
    dataset, found = build_dataset('IMNET', root, False)
    assert (found, dataset.classes, dataset.numbered) == (1000, names, True)
    assert sorted({target for _, target in dataset}) == [0, 151, 805]
    plain = build_dataset('FOLDER', root, False)[0]
    assert sorted({target for _, target in plain}) == [0, 1, 2]
    assert datasets.fingerprint(dataset, 1000) != datasets.fingerprint(plain, 1000)
    (tmp_path / 'part/val/n02085620/photo.jpeg').write_bytes(b'no image')
    with pytest.raises(BadImageError, match=r'\(class n02085620\)'):
        [EvalDataset(dataset, False)[i] for i in range(9)]


def test_imagenet_refuses_more_than_1000_folders_and_a_plain_folder_counts_them(tmp_path):
    for i in range(1001):
        (tmp_path / 'val' / f'{i:04}').mkdir(parents=True)
    with pytest.raises(ValueError, match=r'1001 classes, .* 1000 of IMNET'):
        count_classes('IMNET', str(tmp_path))
    assert count_classes('FOLDER', str(tmp_path)) == 1001


@pytest.mark.parametrize('name', ['FOLDER', 'IMNET'])
@pytest.mark.parametrize(
    ('train', 'val', 'words'),
    [
        (['a', 'b'], ['a', 'c'], 'train/ has 2 classes, val/ 2, and they differ: b is only in train/'),
        (['b'], ['a', 'b'], 'train/ has 1 classes, val/ 2, and they differ: a is only in val/'),
        (['a', 'b', 'c'], ['a', 'b'], 'train/ has 3 classes, val/ 2, and they differ: c is only in train/'),
    ],
)
@pytest.mark.parametrize('split', [True, False])
def test_unlike_class_folders_are_refused_with_a_class_that_differs(tmp_path, name, train, val, words, split):
    root = str(image_folder(tmp_path, {'train': train, 'val': val}))
    with pytest.raises(ValueError, match=words):
        build_dataset(name, root, split)


def flat(root):
    save_image(root / 'val' / 'loose.png')


def empty(root):
    (root / 'val').mkdir()


def without_images(root):
    (root / 'val' / 'a').mkdir(parents=True)


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (flat, 'val has no class folders'),
        (empty, 'val has no class folders'),
        (without_images, 'Found no valid file'),
        (lambda root: None, 'no folder .*val'),
        (lambda root: root.rmdir(), 'no such folder'),
    ],
    ids=['flat', 'empty', 'no images', 'no val', 'no root'],
)
@pytest.mark.parametrize('name', ['FOLDER', 'IMNET'])
def test_an_incomplete_image_folder_is_refused_in_words(tmp_path, name, make, words):
    make(tmp_path)
    with pytest.raises((OSError, ValueError), match=words):
        build_dataset(name, str(tmp_path), False)


# CIFAR ----------------------------------------------------------------------------------------------------------------


def cifar_files(root, base, classes, monkeypatch):
    """Python pickles as the archive holds them: one image of every class per file, its pixels its class number."""
    folder = root / base.base_folder
    folder.mkdir()
    labels = 'labels' if base is CIFAR10 else 'fine_labels'

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for split in ('train_list', 'test_list'):
        numbers = list(range(classes))
        pixels = np.repeat(np.array(numbers, dtype=np.uint8)[:, None], 3072, axis=1)
        files = [[name, write(name, {'data': pixels, labels: numbers})] for name, _ in getattr(base, split)]
        monkeypatch.setattr(base, split, files)
    names = {base.meta['key']: [f'class {i}' for i in range(classes)]}
    monkeypatch.setattr(base, 'meta', {**base.meta, 'md5': write(base.meta['filename'], names)})


@pytest.mark.parametrize(
    ('name', 'base', 'classes', 'train_files'), [('CIFAR', CIFAR100, 100, 1), ('CIFAR10', CIFAR10, 10, 5)]
)
def test_cifar_opens(tmp_path, monkeypatch, name, base, classes, train_files):
    cifar_files(tmp_path, base, classes, monkeypatch)
    for train, files in ((True, train_files), (False, 1)):
        dataset, found = build_dataset(name, str(tmp_path), train)
        assert found == count_classes(name, str(tmp_path)) == classes
        assert len(dataset) == files * classes
        image, target = dataset[7]
        assert (image.size, target) == ((32, 32), 7)
        assert np.asarray(image).min() == np.asarray(image).max() == 7


@pytest.mark.parametrize('name', ['CIFAR', 'CIFAR10'])
@pytest.mark.parametrize('train', [True, False])
def test_missing_cifar_files_are_refused_in_words(tmp_path, name, train):
    with pytest.raises(ValueError, match=rf'{name}: .*not found'):
        build_dataset(name, str(tmp_path), train)


# iNaturalist ----------------------------------------------------------------------------------------------------------

# (kingdom, name) of the categories 0 to 3
TAXONOMY = [('Plantae', 'fern'), ('Animalia', 'owl'), ('Plantae', 'oak'), ('Animalia', 'eel')]


def inat_files(root, year, train, val):
    """JSON files and images in iNaturalist's layout, for a list of category ids per split."""
    levels = datasets.INAT_CATEGORIES
    taxonomy = [dict.fromkeys(levels, 'any') | {'kingdom': kingdom, 'name': name} for kingdom, name in TAXONOMY]
    (root / 'categories.json').write_text(json.dumps(taxonomy))
    for split, ids in (('train', train), ('val', val)):
        # a/b/c/d is read from a/c/d: b, the supercategory, is no folder
        names = [f'{split}_val{year}/Super/{c}/{split}{i}.png' for i, c in enumerate(ids)]
        for i, c in enumerate(ids):
            save_image(root / f'{split}_val{year}' / str(c) / f'{split}{i}.png', 10 * c)
        content = {
            'images': [{'id': i, 'file_name': name} for i, name in enumerate(names)],
            'annotations': [{'image_id': i, 'category_id': c} for i, c in enumerate(ids)],
        }
        (root / f'{split}{year}.json').write_text(json.dumps(content))
    return str(root)


@pytest.mark.parametrize(('name', 'year'), [('INAT', 2018), ('INAT19', 2019)])
@pytest.mark.parametrize(
    ('level', 'numbers'),
    [
        # numbered by first appearance among the training annotations 3 1 3 0: eel, owl, fern
        ('name', {3: 0, 1: 1, 0: 2}),
        ('kingdom', {3: 0, 1: 0, 0: 1}),
        ('family', {3: 0, 1: 0, 0: 0}),
    ],
)
def test_inaturalist_opens_at_every_level(tmp_path, name, year, level, numbers):
    splits = {True: [3, 1, 3, 0], False: [0, 1, 3]}
    root = inat_files(tmp_path, year, splits[True], splits[False])
    for train, ids in splits.items():
        dataset, found = build_dataset(name, root, train, inat_category=level)
        assert found == count_classes(name, root, level) == len(set(numbers.values()))
        assert len(dataset) == len(ids)
        for (image, target), category in zip((dataset[i] for i in range(len(ids))), ids, strict=True):
            assert target == numbers[category]
            assert image[:, 0, 0].tolist() == [10 * category] * 3


@pytest.mark.parametrize('missing', ['categories.json', 'train2018.json', 'val2018.json'])
def test_a_missing_inaturalist_file_is_named(tmp_path, missing):
    root = inat_files(tmp_path, 2018, [0, 1], [0])
    (tmp_path / missing).unlink()
    with pytest.raises(OSError, match=missing):
        build_dataset('INAT', root, False)


@pytest.mark.parametrize(
    ('name', 'text', 'words'),
    [
        ('train2018.json', '{}', "there is no 'annotations'"),
        ('train2018.json', '{"annotations": [{"category_id": 9}]}', 'list index out of range'),
        ('train2018.json', '[1', 'Expecting'),
        ('val2018.json', '[]', 'list indices must be integers'),
        ('categories.json', '[{"id": 0}]', "there is no 'name'"),
        ('val2018.json', '{"images": [{"file_name": "a.png"}]}', 'not enough values'),
    ],
)
def test_an_inaturalist_file_that_makes_no_sense_is_named(tmp_path, name, text, words):
    root = inat_files(tmp_path, 2018, [0, 1], [0])
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f'^{re.escape(str(tmp_path / name))}: {words}'):
        build_dataset('INAT', root, False)


def test_an_inaturalist_val_class_without_training_images_is_refused_in_words(tmp_path):
    root = inat_files(tmp_path, 2018, [0, 1], [0, 2])
    assert count_classes('INAT', root) == 2
    with pytest.raises(ValueError, match='oak'):
        build_dataset('INAT', root, False)


# Generated images and the table ---------------------------------------------------------------------------------------


def test_generated_images_need_no_files_and_the_splits_share_none():
    splits = [build_dataset('FAKE', '', train, input_size=3) for train in (True, False)]
    assert [found for _, found in splits] == [10, 10]
    images = [dataset[i][0].tobytes() for dataset, _ in splits for i in range(len(dataset))]
    assert len(set(images)) == len(images)
    again, _ = build_dataset('FAKE', '', False, input_size=3)
    assert again[5][0].tobytes() == splits[1][0][5][0].tobytes()
    assert build_dataset('FAKE', '', True, input_size=20)[0][0][0].size == (20, 20)
    assert {target for _, target in (again[i] for i in range(len(again)))} == set(range(10))


def test_every_entry_of_the_table_is_opened_by_tests():  # TAR and wds/ in test_tars.py
    assert set(DATA_SETS) == {'FOLDER', 'IMNET', 'CIFAR', 'CIFAR10', 'INAT', 'INAT19', 'TAR', 'wds/', 'FAKE'}


def test_the_transform_is_applied(tmp_path, monkeypatch):
    cifar_files(tmp_path, CIFAR10, 10, monkeypatch)
    image_folder(tmp_path, {'val': ['a']})
    inat_files(tmp_path, 2019, [0], [0])
    for name in ('FOLDER', 'CIFAR10', 'INAT19', 'FAKE'):
        dataset, _ = build_dataset(name, str(tmp_path), False, lambda image: as_bytes(image).shape, input_size=5)
        assert dataset[0][0] in ((3, 6, 8), (3, 32, 32), (3, 5, 5))


# Transforms -----------------------------------------------------------------------------------------------------------


def as_bytes(image):
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize('shape', [(100, 200), (200, 100)])
@pytest.mark.parametrize(('size', 'short'), [(48, 54), (224, 256)])
def test_evaluation_resizes_to_256_224ths_and_crops_the_centre(shape, size, short):
    # these shapes leave even margins, so that there is one centre
    image = noise(*shape)
    width, height = (short * side // 100 for side in shape)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = as_bytes(resized.crop((left, top, left + size, top + size)))
    for given in (image, as_bytes(image)):
        assert torch.equal(build_eval_transform(size)(given), expected)


@pytest.mark.parametrize('size', [8, 32])
def test_evaluation_leaves_small_images_at_their_size(size):
    image = noise(20, 24)
    assert torch.equal(build_eval_transform(size)(image), as_bytes(image))


def test_training_crops_small_images_out_of_a_padding_of_four():
    image, transform = noise(16, 16), train_transform(16, auto_augment=None, color_jitter=0.0, reprob=0.0)
    padded = ImageOps.expand(image, 4)
    possible = {}
    for mirrored in (False, True):
        for x in range(9):
            for y in range(9):
                crop = padded.crop((x, y, x + 16, y + 16))
                possible[mirrored, x, y] = as_bytes(ImageOps.mirror(crop) if mirrored else crop)
    seen = set()
    for _ in range(100):
        found, _ = transform(image)
        matches = [place for place, crop in possible.items() if torch.equal(found, crop)]
        assert len(matches) == 1
        seen.update(matches)
    assert [set(values) for values in zip(*seen, strict=True)] == [{False, True}, set(range(9)), set(range(9))]


@pytest.mark.parametrize('size', [33, 48])
def test_training_resizes_random_crops_of_larger_images(size):
    image, transform = noise(60, 90), train_transform(size, auto_augment=None)
    (first, _), (second, _) = transform(image), transform(image)
    assert first.shape == second.shape == (3, size, size)
    assert not torch.equal(first, second)


def test_the_default_augmentation_survives_thousands_of_images(monkeypatch):
    asked, posterize = [], transforms.posterize_pil
    monkeypatch.setattr(
        transforms, 'posterize_pil', lambda image, bits, **_: asked.append(bits) or posterize(image, bits)
    )
    transform, image = train_transform(16), noise(16, 16)
    for _ in range(4_000):
        assert transform(image)[0].shape == (3, 16, 16)
    # Pillow 13's trap was really met: without the patch these images raise
    assert asked.count(0) > 0


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('bits', range(1, 9))
def test_posterize_keeps_the_highest_bits_as_pillow_does(bits, mode):
    image = noise(8, 8).convert(mode)
    assert transforms.posterize_pil(image, bits, fillcolor=0).tobytes() == ImageOps.posterize(image, bits).tobytes()


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_posterize_to_no_bits_gives_black(mode):
    found = transforms.posterize_pil(noise(8, 8).convert(mode), 0, fillcolor=0)
    assert (found.mode, found.size) == (mode, (8, 8))
    assert not np.asarray(found).any()


@pytest.mark.parametrize('aa', [DEFAULT_AA, 'rand-m9', 'original', 'originalr', 'v0', 'v0r', 'augmix-m5-w4-d2'])
def test_every_policy_posterizes_to_no_bits_without_an_error(aa):
    steps = train_transform(48, auto_augment=aa).steps.transforms
    # RandAugment and AugMix keep a list of operations, AutoAugment a list of lists
    lists = [ops for step in steps for ops in ([step.ops] if hasattr(step, 'ops') else getattr(step, 'policy', []))]
    ops = [op for ops in lists for op in ops if 'Posterize' in op.name]
    assert ops
    for op in ops:
        assert not np.asarray(op.aug_fn(noise(8, 8), 0, **op.kwargs)).any()


# Augmentation by counter ----------------------------------------------------------------------------------------------


def keyed(seed=3):
    return TrainDataset(build_dataset('FAKE', '', True, train_transform(), input_size=16)[0], False, seed)


def test_augmentation_is_the_same_whatever_was_drawn_before():
    dataset, key = keyed(), (11, 2, 40)
    expected, *_, aug_params = dataset[key]
    for draws in range(5):
        torch.rand(draws)
        np.random.rand(draws)
        _ = [random.random() for _ in range(draws)]
        dataset[draws, 0, draws]
        assert torch.equal(dataset[key][0], expected)
    again, *_, todo_again = keyed()[key]
    assert torch.equal(again, expected)
    assert todo_again['key'] == aug_params['key']
    assert torch.equal(todo_again['erase'], aug_params['erase'])
    assert aug_params.keys() == {'key', 'erase'}
    assert len(dataset) == 1024


@pytest.mark.parametrize(('seed', 'key'), [(3, (11, 2, 41)), (3, (11, 3, 40)), (4, (11, 2, 40)), (3, (11, 40, 2))])
def test_another_position_epoch_or_seed_draws_another_augmentation(seed, key):
    (expected, label, index, _), (found, target, other, _) = keyed()[11, 2, 40], keyed(seed)[key]
    assert index == other == 11
    assert target == label  # the image itself is the same
    assert not torch.equal(found, expected)


@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')  # Python 3.12 on, not ours to change
def test_augmentation_is_the_same_with_and_without_workers():
    keys = [(index, 5, position) for position, index in enumerate([4, 4, 4, 9, 9, 9, 2, 2, 2, 7])]
    alone, shared = (
        torch.cat([images for images, *_ in DataLoader(keyed(), 3, sampler=keys, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, shared)
    assert len({image.numpy().tobytes() for image in alone}) == 10  # copies of one image differ among themselves


# Images that cannot be read -------------------------------------------------------------------------------------------


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


HUGE = b'IHDR' + struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
PNG, JPEG = encoded(noise(40, 40), 'PNG'), encoded(noise(40, 40), 'JPEG')
BAD = {
    'nothing': b'',
    'a signature': PNG[:8],
    'half a header': PNG[:20],
    'half a png': PNG[: len(PNG) // 2],
    'a png without its end': PNG[:-40],
    'half a jpeg': JPEG[: len(JPEG) // 2],
    'a jpeg header': JPEG[:100],
    'text': b'<html>no image</html>',
    'zeros': bytes(1000),
    'a bomb': PNG[:12] + HUGE + struct.pack('>I', zlib.crc32(HUGE)) + PNG[33:],  # of which Pillow warns by itself
    'no permission': None,
    'vanished': None,
    'a folder': None,
}


def spoil(path, kind):
    """Makes a file unreadable in one of these ways."""
    if kind == 'no permission':
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip('this user may read everything')
    elif BAD[kind] is None:
        path.unlink()
        if kind == 'a folder':
            path.mkdir()
    else:
        path.write_bytes(BAD[kind])


@pytest.fixture
def tree(tmp_path):
    """A function that opens a tree of two classes with three images each, of which some are spoilt afterwards."""

    def make(*bad, train=True, skip=True, kind='text'):
        for split in ('train', 'val'):
            for i in range(6):
                path = tmp_path / split / 'ab'[i // 3] / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(noise(40, 40, seed=i), 'PNG'))
        transform = train_transform(36) if train else build_eval_transform(36)
        dataset, _ = build_dataset('FOLDER', str(tmp_path), train, transform)
        for index in bad:
            spoil(Path(dataset.samples[index][0]), kind)
        return TrainDataset(dataset, skip, 3) if train else EvalDataset(dataset, skip)

    return make


@pytest.mark.R11
@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('train', [True, False], ids=['training', 'evaluation'])
def test_an_image_that_cannot_be_read_is_named_with_its_class(tree, tmp_path, train, kind):
    dataset = tree(4, train=train, skip=False, kind=kind)
    key = (4, 0, 0) if train else 4
    path = tmp_path / ('train' if train else 'val') / 'b' / '4.png'
    with pytest.raises(BadImageError) as caught:
        dataset[key]
    assert str(caught.value).startswith(f'{path}: ')
    assert str(caught.value).endswith(' (class b)')
    assert dataset.list_bad(lambda bad: bad, again=True) == []


@pytest.mark.R11
@pytest.mark.parametrize('kind', BAD)
def test_in_training_the_next_good_image_takes_its_place(tree, kind):
    dataset = tree(2, 3, 5, kind=kind)
    for bad, good in [(2, 4), (3, 4), (5, 0)]:
        (found, target, index, _), (expected, label, _, _) = dataset[bad, 7, 11], dataset[good, 7, 11]
        assert (index, target) == (good, label) == (good, int(good >= 3))
        assert torch.equal(found, expected)  # and gets the augmentation of the place
    assert dataset.list_bad(lambda bad: bad) == [
        f'{dataset.dataset.samples[i][0]} (class {"ab"[i >= 3]})' for i in (2, 3, 5)
    ]


@pytest.mark.R11
@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
@pytest.mark.parametrize('train', [True, False], ids=['training', 'evaluation'])
def test_what_is_left_out_is_the_same_with_and_without_workers_and_listed_once(tree, train):
    keys = [(i, 1, position) for position, i in enumerate([5, 0, 2, 4, 1, 3])] if train else range(6)
    read = []
    for workers in (0, 2):
        dataset = tree(2, 5, train=train)
        read.append(list(DataLoader(dataset, 2, sampler=keys, num_workers=workers)))
        listed = [f'{dataset.dataset.samples[i][0]} (class {"ab"[i >= 3]})' for i in (2, 5)]
        assert dataset.list_bad(lambda bad: bad) == listed
        assert dataset.list_bad(lambda bad: bad) == []
        assert dataset.list_bad(lambda bad: bad, again=True) == listed
    for one, other in zip(*read, strict=True):
        toys.assert_same(one, other)
    # what another rank has found is listed too
    assert dataset.list_bad(lambda bad: bad + (torch.arange(6) == 0))[0].endswith('0.png (class a)')


@pytest.mark.R11
def test_in_evaluation_a_bad_image_is_of_no_class(tree):
    dataset = tree(0, 4, train=False)
    assert [target for _, target in (dataset[i] for i in range(6))] == [-1, 0, 0, 1, -1, 1]
    assert dataset[4][0].shape == dataset[1][0].shape
    assert not dataset[4][0].any()


@pytest.mark.R11
@pytest.mark.parametrize('train', [True, False])
def test_where_nothing_can_be_read_the_run_stops(tree, train):
    dataset = tree(*range(6), train=train)
    with pytest.raises(BadImageError, match='none can be read'):
        dataset[(0, 0, 0) if train else 0]


def test_first_is_the_first_that_can_be_read(tree):
    assert tree(0, 1).first()[1] == 0
    assert tree(0, 1, 2).first()[1] == 1
    with pytest.raises(BadImageError, match='class a'):
        tree(0, skip=False).first()


# Odd images that can be read ------------------------------------------------------------------------------------------


def oddity(kind):
    """Bytes of an image as some data sets hold them, and the ending of its name."""
    image = noise(40, 24)
    if kind == 'cmyk':
        return encoded(image.convert('CMYK'), 'JPEG'), 'jpeg'
    if kind == 'grey':
        return encoded(image.convert('L'), 'JPEG'), 'jpeg'
    if kind == 'grey and alpha':
        return encoded(image.convert('LA'), 'PNG'), 'png'
    if kind == 'palette and alpha':
        return encoded(image.convert('P'), 'PNG', transparency=bytes(range(256))), 'png'
    if kind == 'one bit':
        return encoded(image.convert('1'), 'PNG'), 'png'
    if kind == 'animated':
        frames = [noise(40, 24, seed).convert('P') for seed in (1, 2)]
        return encoded(noise(40, 24), 'WEBP', save_all=True, append_images=frames, lossless=True), 'webp'
    if kind == 'animated gif':
        return encoded(image, 'GIF', save_all=True, append_images=[noise(40, 24, 1)]), 'png'  # the name does not count
    assert kind == 'rotated'
    exif = Image.Exif()
    exif[274] = 6  # a camera held upright
    return encoded(image, 'JPEG', exif=exif), 'jpeg'


KINDS = (
    'cmyk',
    'grey',
    'grey and alpha',
    'palette and alpha',
    'one bit',
    'animated',
    'animated gif',
    'rotated',
)


@pytest.mark.R11
@pytest.mark.parametrize('kind', KINDS)
def test_an_odd_image_is_the_rgb_that_pillow_makes_of_its_first_frame_unrotated(tmp_path, kind):
    data, ending = oddity(kind)
    path = tmp_path / 'val' / 'a' / f'odd.{ending}'
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = Image.open(path).convert('RGB')
    assert expected.size == (40, 24)
    (found, _), *others = build_dataset('FOLDER', str(tmp_path), False)[0]
    assert (found.dtype, others) == (torch.uint8, [])
    assert torch.equal(found, as_bytes(expected))
    assert found.float().std() > 1


def test_sixteen_bits_become_eight_and_pixels_without_a_known_white_are_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for ending in ('png', 'tiff', 'pgm'):
        Image.fromarray(ramp).save(tmp_path / f'deep.{ending}')
        image = readers.load_image(str(tmp_path / f'deep.{ending}'))
        assert image.tolist() == [[list(range(16 * row, 16 * row + 16)) for row in range(16)]] * 3
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(BadImageError, match=r'float\.tiff: unsupported image mode F'):
        readers.load_image(str(tmp_path / 'float.tiff'))


def test_what_is_no_image_is_called_so_without_addresses_of_objects(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    with pytest.raises(BadImageError, match=r'a\.png: cannot identify image file$'):
        readers.load_image(str(tmp_path / 'a.png'))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('subsampling', [0, 1, 2])
def test_a_jpeg_has_the_bytes_that_pillow_makes_of_it(tmp_path, monkeypatch, mode, subsampling):
    options = {'quality': 90, 'subsampling': subsampling, 'progressive': subsampling == 1}
    (tmp_path / 'a.jpg').write_bytes(encoded(noise(37, 23).convert(mode), 'JPEG', **options))
    decoded, decode = [], readers.decode_jpeg
    monkeypatch.setattr(readers, 'decode_jpeg', lambda *args: decoded.append(1) or decode(*args))
    found = readers.load_image(str(tmp_path / 'a.jpg'))
    assert torch.equal(found, as_bytes(Image.open(tmp_path / 'a.jpg').convert('RGB')))
    assert decoded == [1]


def test_an_image_that_comes_several_times_in_a_row_is_read_once_and_augmented_each_time(tree, monkeypatch):
    dataset, opened = tree(), []
    image_open = Image.open
    monkeypatch.setattr(Image, 'open', lambda *args: opened.append(1) or image_open(*args))
    items = [dataset[index, 0, position] for position, index in enumerate([3, 3, 3, 1, 1, 3])]
    assert len(opened) == 3
    assert len({image.numpy().tobytes() for image, *_ in items}) == 6


def test_the_crop_is_timm_s_resized_to_within_rounding():
    y, x = np.mgrid[:90, :120]
    smooth = np.stack([2 * x, 255 - 2 * y, (x + y) % 256], axis=-1) + np.random.RandomState(0).randint(
        0, 20, (90, 120, 3)
    )
    image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    for interpolation in ('bicubic', 'bilinear', 'random'):
        theirs = RandomResizedCropAndInterpolation(64, interpolation=interpolation)
        ours, errors = transforms.RandomResizedCrop(theirs), []
        for seed in range(40):
            random.seed(seed)
            expected = as_bytes(theirs(image)).float()
            state = random.getstate()
            random.seed(seed)
            errors.append((ours(as_bytes(image)).float() - expected).square().mean().item())
            assert random.getstate() == state
        assert 10 * np.log10(255**2 / np.mean(errors)) > 60  # dB


def test_the_device_gets_the_crop_and_the_decisions_that_loader_processes_would_apply():
    image, changed = noise(60, 90), 0
    both = {on_device: train_transform(48, reprob=0.9, on_device=on_device) for on_device in (False, True)}
    fill = both[True].policy.fill
    for seed in range(60):
        found = {}
        for on_device, transform in both.items():
            transforms.seed_augmentation(seed)
            found[on_device] = (*transform(image), random.random(), np.random.rand(), torch.rand(1).item())
        (ours, aug_params, *drawn), (theirs, plain, *others) = found[True], found[False]
        assert torch.equal(aug_params['erase'], plain['erase'])
        assert drawn == others
        moved = aug_params['plan'][:, 2].any()  # the filters of PIL and torch differ
        result = apply_policy(ours[None], aug_params['plan'][None], fill)[0]
        assert moved or (result.int() - theirs.int()).abs().max() <= 2
        changed += int(not torch.equal(ours, theirs))
    assert changed > 20


def test_a_data_set_holds_no_python_object_per_image(tree):
    dataset = tree()
    assert isinstance(dataset.dataset.samples, readers.Samples)
    assert dataset.dataset.imgs is dataset.dataset.samples
    assert dataset.dataset.targets is None


# Telling data apart ---------------------------------------------------------------------------------------------------


def test_data_are_told_apart_by_images_and_classes_and_not_by_their_place(tmp_path):
    def of(name, splits):
        dataset, classes = build_dataset('FOLDER', str(image_folder(tmp_path / name, splits)), True)
        return datasets.fingerprint(dataset, classes)

    first = of('first', {'train': ['a', 'b'], 'val': ['a', 'b']})
    assert of('moved', {'train': ['a', 'b'], 'val': ['a', 'b']}) == first == {**first, 'images': 6, 'classes': 2}
    assert of('renamed', {'train': ['a', 'c'], 'val': ['a', 'c']}) != first
    assert of('more', {'train': ['a', 'b', 'c'], 'val': ['a', 'b', 'c']}) != first
    save_image(tmp_path / 'moved' / 'train' / 'a' / 'one_more.png')
    dataset, classes = build_dataset('FOLDER', str(tmp_path / 'moved'), True)
    assert datasets.fingerprint(dataset, classes) == {**first, 'images': 7}
