"""Every data set of the table on small generated files, and images that cannot be decoded."""

import hashlib
import json
import os
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100

import datasets
import readers
from datasets import DATA_SETS, BadImageError, EvalDataset, TrainDataset, build_dataset, count_classes
from transforms import build_eval_transform


def save_image(path, colour=0, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), colour if mode == 'L' else (colour,) * len(mode)).save(path)


# Image folders --------------------------------------------------------------------------------------------------------


def image_folder(root, splits):
    for split, names in splits.items():
        for i, name in enumerate(names):
            save_image(root / split / name / 'colour.png', 40 * i)
            save_image(root / split / name / 'photo.jpeg', 40 * i)
            save_image(root / split / name / 'grey.png', 40 * i, mode='L')
    return root


A, B, C = 'n01440764', 'n01443537', 'n01484850'  # the first three classes of ImageNet


@pytest.mark.parametrize(('name', 'classes'), [('FOLDER', 3), ('IMNET', 1000)])
def test_image_folders_open(tmp_path, name, classes):
    root = str(image_folder(tmp_path, {'train': [B, A, C], 'val': [A, B, C]}))
    for train in (True, False):
        dataset, found = build_dataset(name, root, train)
        assert found == count_classes(name, root) == classes
        assert dataset.classes == [A, B, C]
        assert [target for _, target in dataset] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert {(image.dtype, image.shape) for image, _ in dataset} == {(torch.uint8, (3, 6, 8))}
        assert all(('train' if train else 'val') in path for path, _ in dataset.samples)


@pytest.mark.parametrize(('name', 'classes'), [('FOLDER', 2), ('IMNET', 1000)])
def test_val_folder_is_enough_to_evaluate(tmp_path, name, classes):
    root = str(image_folder(tmp_path, {'val': [A, B]}))
    dataset, found = build_dataset(name, root, False)
    assert (found, len(dataset)) == (classes, 6)
    with pytest.raises((OSError, ValueError), match='train'):
        build_dataset(name, root, True)


def test_part_of_imagenet_keeps_imagenet_numbers(tmp_path):
    # Class numbers: n01440764 (tench) 0, n02085620 (Chihuahua) 151, n04254680 (soccer ball) 805.
    names = ['n01440764', 'n02085620', 'n04254680']
    root = str(image_folder(tmp_path / 'part', {'train': names, 'val': names}))
    dataset, found = build_dataset('IMNET', root, False)
    assert (found, dataset.classes) == (1000, names)
    assert sorted({target for _, target in dataset}) == [0, 151, 805]
    plain = build_dataset('FOLDER', root, False)[0]
    assert sorted({target for _, target in plain}) == [0, 1, 2]
    assert datasets.fingerprint(dataset, 1000) != datasets.fingerprint(plain, 1000)
    (tmp_path / 'part/val/n02085620/photo.jpeg').write_bytes(b'no image')
    with pytest.raises(BadImageError, match=r'\(class n02085620\)'):
        [EvalDataset(dataset, False)[i] for i in range(9)]


def test_folders_without_imagenet_names_are_refused_for_imagenet(tmp_path):
    root = str(image_folder(tmp_path, {'train': [A, 'cat'], 'val': [A, 'cat']}))
    with pytest.raises(ValueError, match=r'1 of 2 class folders .*: cat; use --data-set FOLDER'):
        count_classes('IMNET', root)
    assert count_classes('FOLDER', root) == 2


def test_imagenet_may_have_1000_folders_with_other_names(tmp_path):
    for i in range(1000):
        (tmp_path / 'val' / f'{i:04}').mkdir(parents=True)
        save_image(tmp_path / 'val' / f'{i:04}' / 'photo.png')
    dataset, found = build_dataset('IMNET', str(tmp_path), False)
    assert found == 1000
    assert list(dataset.class_to_idx.values()) == list(range(1000))


@pytest.mark.parametrize('name', ['FOLDER', 'IMNET'])
def test_hidden_folders_are_no_classes(tmp_path, name):
    root = image_folder(tmp_path, {'train': [A, B], 'val': [A, B]})
    (root / 'train' / '.ipynb_checkpoints').mkdir()
    dataset, _ = build_dataset(name, str(root), True)
    assert (dataset.classes, len(dataset)) == ([A, B], 6)


@pytest.mark.parametrize('name', ['FOLDER', 'IMNET'])
@pytest.mark.parametrize(
    ('train', 'val', 'words'),
    [
        ([A, B], [A, C], f'train/ has 2 classes, val/ 2, and they differ: only in train/: {B}; only in val/: {C}'),
        ([B], [A, B], f'train/ has 1 classes, val/ 2, and they differ: only in val/: {A}'),
        ([A, B, C], [A, B], f'train/ has 3 classes, val/ 2, and they differ: only in train/: {C}'),
    ],
)
@pytest.mark.parametrize('split', [True, False])
def test_different_class_folders_are_refused(tmp_path, name, train, val, words, split):
    root = str(image_folder(tmp_path, {'train': train, 'val': val}))
    with pytest.raises(ValueError, match=words):
        build_dataset(name, root, split)


def flat(root):
    save_image(root / 'val' / 'loose.png')


def empty(root):
    (root / 'val').mkdir()


def without_images(root):
    (root / 'val' / A).mkdir(parents=True)


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (flat, 'val has no class folders'),
        (empty, 'val has no class folders'),
        (without_images, 'has class folders without images: n01440764'),
        (lambda root: None, 'no folder .*val'),
        (lambda root: root.rmdir(), 'no such folder'),
    ],
    ids=['flat', 'empty', 'no images', 'no val', 'no root'],
)
@pytest.mark.parametrize('name', ['FOLDER', 'IMNET'])
def test_incomplete_image_folder_is_refused(tmp_path, name, make, words):
    make(tmp_path)
    with pytest.raises((OSError, ValueError), match=words):
        build_dataset(name, str(tmp_path), False)


# CIFAR ----------------------------------------------------------------------------------------------------------------


def cifar_files(root, base, classes, monkeypatch):
    """Pickles as in the archive: one image of each class per file, with its class number in all pixels."""
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
def test_missing_cifar_files_are_refused(tmp_path, name, train):
    with pytest.raises(ValueError, match=r'there is no folder cifar-100?-.* unpack cifar-100?-python.tar.gz'):
        build_dataset(name, str(tmp_path), train)


# iNaturalist ----------------------------------------------------------------------------------------------------------

# (kingdom, name) of the categories 0 to 3
TAXONOMY = [('Plantae', 'fern'), ('Animalia', 'owl'), ('Plantae', 'oak'), ('Animalia', 'eel')]


def inat_files(root, year, train, val):
    """Writes JSON files and images in iNaturalist's layout, for a list of category ids per split."""
    levels = datasets.INAT_CATEGORIES
    taxonomy = [dict.fromkeys(levels, 'any') | {'kingdom': kingdom, 'name': name} for kingdom, name in TAXONOMY]
    (root / 'categories.json').write_text(json.dumps(taxonomy))
    for split, ids in (('train', train), ('val', val)):
        # The image a/b/c/d is in the folder a/c: the supercategory b has no folder.
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
        # Numbered by first appearance among the training annotations 3 1 3 0: eel, owl, fern.
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
def test_missing_inaturalist_file_is_named(tmp_path, missing):
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
def test_malformed_inaturalist_file_is_named(tmp_path, name, text, words):
    root = inat_files(tmp_path, 2018, [0, 1], [0])
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f'^{re.escape(str(tmp_path / name))}: {words}'):
        build_dataset('INAT', root, False)


def test_inaturalist_val_class_without_training_images_is_refused(tmp_path):
    root = inat_files(tmp_path, 2018, [0, 1], [0, 2])
    assert count_classes('INAT', root) == 2
    with pytest.raises(ValueError, match='oak'):
        build_dataset('INAT', root, False)


# Generated images and the table ---------------------------------------------------------------------------------------


def test_generated_images_need_no_files_and_splits_share_none():
    splits = [build_dataset('FAKE', '', train, input_size=3) for train in (True, False)]
    assert [found for _, found in splits] == [10, 10]
    images = [dataset[i][0].tobytes() for dataset, _ in splits for i in range(len(dataset))]
    assert len(set(images)) == len(images)
    again, _ = build_dataset('FAKE', '', False, input_size=3)
    assert again[5][0].tobytes() == splits[1][0][5][0].tobytes()
    assert build_dataset('FAKE', '', True, input_size=20)[0][0][0].size == (20, 20)
    assert {target for _, target in (again[i] for i in range(len(again)))} == set(range(10))


def test_every_data_set_of_the_table_has_tests():  # TAR and wds/: test_readers.py
    assert set(DATA_SETS) == {'FOLDER', 'IMNET', 'CIFAR', 'CIFAR10', 'INAT', 'INAT19', 'TAR', 'wds/', 'FAKE'}


def test_transform_is_applied(tmp_path, monkeypatch):
    cifar_files(tmp_path, CIFAR10, 10, monkeypatch)
    image_folder(tmp_path, {'val': ['a']})
    inat_files(tmp_path, 2019, [0], [0])
    for name in ('FOLDER', 'CIFAR10', 'INAT19', 'FAKE'):
        dataset, _ = build_dataset(name, str(tmp_path), False, lambda image: toys.as_bytes(image).shape, input_size=5)
        assert dataset[0][0] in ((3, 6, 8), (3, 32, 32), (3, 5, 5))


# Images that cannot be read -------------------------------------------------------------------------------------------


HUGE = b'IHDR' + struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
PNG, JPEG = toys.encoded(toys.noise(40, 40), 'PNG'), toys.encoded(toys.noise(40, 40), 'JPEG')
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
    'a bomb': PNG[:12] + HUGE + struct.pack('>I', zlib.crc32(HUGE)) + PNG[33:],  # Pillow warns of it
    'no permission': None,
    'vanished': None,
    'a folder': None,
}


def spoil(path, kind):
    """Makes a file unreadable."""
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
    """A function that opens a tree of two classes with three images each, and then damages some of them."""

    def make(*bad, train=True, skip=True, kind='text'):
        for split in ('train', 'val'):
            for i in range(6):
                path = tmp_path / split / 'ab'[i // 3] / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(toys.encoded(toys.noise(40, 40, seed=i), 'PNG'))
        transform = toys.train_transform(36) if train else build_eval_transform(36)
        dataset, _ = build_dataset('FOLDER', str(tmp_path), train, transform)
        for index in bad:
            spoil(Path(dataset.samples[index][0]), kind)
        return TrainDataset(dataset, skip, 3) if train else EvalDataset(dataset, skip)

    return make


@pytest.mark.R11
@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('train', [True, False], ids=['training', 'evaluation'])
def test_bad_image_is_named_with_its_class(tree, tmp_path, train, kind):
    dataset = tree(4, train=train, skip=False, kind=kind)
    key = (4, 0, 0) if train else 4
    path = tmp_path / ('train' if train else 'val') / 'b' / '4.png'
    with pytest.raises(BadImageError) as caught:
        dataset[key]
    assert str(caught.value).startswith(f'{path}: ')
    assert str(caught.value).endswith(' (class b); --bad-images skip continues without such images')
    assert dataset.list_bad(lambda bad: bad, again=True) == []


@pytest.mark.R11
@pytest.mark.parametrize('kind', BAD)
def test_next_good_image_replaces_bad_one_in_training(tree, kind):
    dataset = tree(2, 3, 5, kind=kind)
    for bad, good in [(2, 4), (3, 4), (5, 0)]:
        (found, target, index, _), (expected, label, _, _) = dataset[bad, 7, 11], dataset[good, 7, 11]
        assert (index, target) == (good, label) == (good, int(good >= 3))
        assert torch.equal(found, expected)  # with the augmentation of this position
    assert dataset.list_bad(lambda bad: bad) == [
        f'{dataset.dataset.samples[i][0]} (class {"ab"[i >= 3]})' for i in (2, 3, 5)
    ]


@pytest.mark.R11
@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
@pytest.mark.parametrize('train', [True, False], ids=['training', 'evaluation'])
def test_skipped_images_do_not_depend_on_workers_and_are_listed_once(tree, train):
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
    # Images that another rank found are listed, too.
    assert dataset.list_bad(lambda bad: bad + (torch.arange(6) == 0))[0].endswith('0.png (class a)')


@pytest.mark.R11
def test_bad_image_has_class_minus_1_in_evaluation(tree):
    dataset = tree(0, 4, train=False)
    assert [target for _, target in (dataset[i] for i in range(6))] == [-1, 0, 0, 1, -1, 1]
    assert dataset[4][0].shape == dataset[1][0].shape
    assert not dataset[4][0].any()


@pytest.mark.R11
@pytest.mark.parametrize('train', [True, False])
def test_only_bad_images_is_an_error(tree, train):
    dataset = tree(*range(6), train=train)
    with pytest.raises(BadImageError, match='none can be read'):
        dataset[(0, 0, 0) if train else 0]


def test_first_skips_bad_images(tree):
    assert tree(0, 1).first()[1] == 0
    assert tree(0, 1, 2).first()[1] == 1
    with pytest.raises(BadImageError, match='class a'):
        tree(0, skip=False).first()


def test_repeated_image_is_decoded_once_and_augmented_each_time(tree, monkeypatch):
    dataset, opened = tree(), []
    image_open = Image.open
    monkeypatch.setattr(Image, 'open', lambda *args: opened.append(1) or image_open(*args))
    items = [dataset[index, 0, position] for position, index in enumerate([3, 3, 3, 1, 1, 3])]
    assert len(opened) == 3
    assert len({image.numpy().tobytes() for image, *_ in items}) == 6


def test_dataset_holds_no_python_object_per_image(tree):
    dataset = tree()
    assert isinstance(dataset.dataset.samples, readers.Samples)
    assert dataset.dataset.imgs is dataset.dataset.samples
    assert dataset.dataset.targets is None


# The fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_images_and_classes_not_on_folder(tmp_path):
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
