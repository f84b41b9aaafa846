"""Images inside tars: tars of class folders, WebDataset shards, damaged tars, and the saved index."""

import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import readers
from datasets import BadImageError, EvalDataset, TrainDataset, build_dataset, count_classes
from samplers import build_train_sampler
from transforms import TrainTransform


def colours(number: int) -> tuple[int, int, int]:
    return tuple(number * step % 256 for step in (97, 61, 151))


def as_png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (8, 8), colours(number)).save(file, 'png')
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def pixel(image: torch.Tensor) -> tuple[int, int, int]:
    return tuple(image[:, 3, 3].tolist())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for saved indexes; indexes in memory are dropped."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    readers._open_index.cache_clear()
    return tmp_path / 'cache' / 'manifold-distillation'


# Trees of class folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['one tar', 'tar of tars', 'folder of tars'])
def test_tars_have_the_classes_of_a_tree_of_folders(tmp_path, kind):
    names = ['c10', 'c2', 'c9']
    for split in ('train', 'val'):
        inner = {name: {f'{i}.png': as_png(10 * k + i) for i in range(2)} for k, name in enumerate(names)}
        if kind == 'one tar':
            write_tar(
                tmp_path / f'{split}.tar', {f'{n}/{m}': d for n, members in inner.items() for m, d in members.items()}
            )
        elif kind == 'tar of tars':
            packed = {f'{n}.tar': write_tar(tmp_path / 'made' / f'{n}.tar', members) for n, members in inner.items()}
            write_tar(tmp_path / f'{split}.tar', packed)
        else:
            for n, members in inner.items():
                write_tar(tmp_path / split / f'{n}.tar', members)
    dataset, num_classes = build_dataset('TAR', str(tmp_path), True)
    assert num_classes == 3
    assert dataset.classes == names  # in the order of ImageFolder
    found = sorted((target, pixel(image)) for image, target in (dataset[i] for i in range(len(dataset))))
    assert found == sorted((k, colours(10 * k + i)) for k in range(3) for i in range(2))


def test_tar_has_the_images_of_a_tree_of_folders(tmp_path):
    names = ['a.png', 'b.jpg', 'c.JPEG', 'd.webp', 'e.bmp', 'f.tiff', 'g.gif', 'h.txt']
    tree = tmp_path / 'tree' / 'val' / 'class'
    tree.mkdir(parents=True)
    for i, name in enumerate(names[:-1]):
        Image.new('RGB', (8, 8), (10 * i, 0, 0)).save(tree / name)
    (tree / 'h.txt').write_text('no image')
    write_tar(tmp_path / 'tar' / 'val.tar', {f'class/{name}': (tree / name).read_bytes() for name in names})
    for kind, place in (('FOLDER', 'tree'), ('TAR', 'tar')):
        paths = [path for path, _ in build_dataset(kind, str(tmp_path / place), False)[0].samples]
        assert sorted(Path(path.split(':')[-1]).name for path in paths) == names[:6]


def test_images_of_a_tar_are_sorted_by_path_with_numbers_as_numbers(tmp_path):
    names = ['./b/2.png', './a/10.png', './a/9.png', './B/1.png']
    write_tar(tmp_path / 'val.tar', {name: as_png(0) for name in names})
    dataset, _ = build_dataset('TAR', str(tmp_path), False)
    assert dataset.classes == ['B', 'a', 'b']
    assert [(name.split(':')[1], target) for name, target in dataset.samples] == [
        ('./a/9.png', 1), ('./a/10.png', 1), ('./B/1.png', 0), ('./b/2.png', 2)
    ]  # fmt: skip


def test_image_outside_folders_has_the_class_of_its_tar(tmp_path):
    for name in ('x', 'y'):
        write_tar(tmp_path / 'val' / f'{name}.tar', {'./0.png': as_png(0)})
    assert build_dataset('TAR', str(tmp_path), False)[0].classes == ['x', 'y']


def test_damaged_image_in_a_tar_is_named_with_tar_member_and_class(tmp_path):
    for split in ('train', 'val'):
        write_tar(tmp_path / f'{split}.tar', {'a/0.png': as_png(0), 'b/1.png': b'no image'})
    dataset = TrainDataset(build_dataset('TAR', str(tmp_path), True)[0], skip_bad=False, seed=0)
    with pytest.raises(BadImageError, match=r'train\.tar:b/1\.png: .*\(class b\)'):
        dataset[1, 0, 0]


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda root: None, 'neither val.tar nor a folder val'),
        (lambda root: (root / 'val.tar').write_text('no tar'), r'val\.tar is not a complete tar file'),
        (lambda root: (root / 'val.tar').write_text(''), r'val\.tar is not a complete tar file'),
        (lambda root: write_tar(root / 'val.tar', {'a/readme.txt': b''}), r'val\.tar contains no images'),
        (lambda root: (root / 'val').mkdir(), 'val contains no images'),
        (lambda root: [write_tar(root / f'{s}.tar', {f'{s}/0.png': as_png(0)}) for s in ('train', 'val')], 'differ'),
    ],
    ids=['nothing', 'no tar', 'empty file', 'no images', 'empty folder', 'other classes'],
)
def test_what_is_not_a_tar_of_images_is_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        count_classes('TAR', str(tmp_path))


# WebDataset shards ----------------------------------------------------------------------------------------------------


def sample(number: int, target: int | None = None, ending: str = 'png') -> dict[str, bytes]:
    target = number % 7 if target is None else target
    return {f'{number:04d}.{ending}': as_png(number), f'{number:04d}.cls': str(target).encode()}


@pytest.fixture
def shards(tmp_path):
    """Five shards of six images each per split; image n has class n % 7."""
    for k in range(5):
        members = {}
        for n in range(6 * k, 6 * k + 6):
            members |= sample(n)
        write_tar(tmp_path / f'toy-train-{k}.tar', members)
        write_tar(tmp_path / 'val' / f'{k}.tar', members)
    return tmp_path


def open_shards(root: Path, train: bool = True, name: str = 'wds/', **options):
    return build_dataset(name, str(root), train, **options)[0]


def numbers_of(dataset) -> list[int]:
    """The numbers of the images, found by their colours. Checks their classes."""
    known = {colours(n): n for n in range(30)}
    found = []
    for image, target in (dataset[i] for i in range(len(dataset))):
        found.append(known[pixel(image)])
        assert found[-1] % 7 == target
    return found


@pytest.mark.parametrize('train', [True, False])
def test_shards_have_every_image_once_in_their_order(shards, train):
    dataset, num_classes = build_dataset('wds/', str(shards), train)
    assert num_classes == count_classes('wds/', str(shards)) == 7
    assert numbers_of(dataset) == list(range(30))
    place = 'toy-train-1.tar' if train else 'val/1.tar'
    assert dataset.samples[7] == (f'{shards / place}:0007.png', 0)
    assert dataset.samples[-1][1] == 29 % 7


def test_wds_name_is_a_folder_in_the_data_path(shards):
    assert len(open_shards(shards.parent, name=f'wds/{shards.name}')) == 30
    with pytest.raises(ValueError, match='no such'):
        open_shards(shards, name='wds/no such')


@pytest.mark.parametrize('world', [1, 2, 3])
def test_training_reads_shards_in_the_order_of_the_sampler(shards, world):
    dataset = TrainDataset(open_shards(shards, transform=TrainTransform(lambda image: image)), False, seed=3)
    samplers = [build_train_sampler(dataset, world, rank, True, 0) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(2, 6)
    keys = [key for sampler in samplers for key in sampler]
    assert {position for _, _, position in keys} == set(range(6, 6 + len(keys)))
    for key in keys:  # repeated augmentation: several copies of an image, with different random numbers
        image, target, index, _ = dataset[key]
        assert (pixel(image), target, index) == (colours(key[0]), key[0] % 7, key[0])
    default_collate([dataset[key] for key in keys])
    assert len({dataset[key][3]['key'] for key in keys}) == len(keys)


def test_info_file_chooses_the_shards(shards):
    splits = {'train': {'filenames': ['toy-train-0.tar', 'toy-train-1.tar'], 'shard_lengths': [6, 6]},
              'validation': {'filenames': ['val/3.tar'], 'shard_lengths': [6]}}  # fmt: skip
    for name in ('info.json', '_info.json'):
        (shards / name).write_text(json.dumps({'splits': splits}))
        assert numbers_of(open_shards(shards, True)) == list(range(12))
        assert numbers_of(open_shards(shards, False)) == list(range(18, 24))
    splits['train']['shard_lengths'][1] = 7
    (shards / '_info.json').write_text(json.dumps({'splits': splits}))
    with pytest.raises(ValueError, match=r'toy-train-1\.tar contains 6 images, but the info file says 7'):
        open_shards(shards)
    (shards / 'toy-train-1.tar').unlink()
    with pytest.raises(OSError, match=r'toy-train-1\.tar'):
        open_shards(shards)


def test_val_shards_alone_are_enough_to_evaluate(shards):
    for path in shards.glob('toy-train-*.tar'):
        path.unlink()
    assert len(open_shards(shards, False)) == 30
    with pytest.raises(ValueError, match='train'):
        open_shards(shards, True)


@pytest.mark.parametrize('ending', ['jpg', 'jpeg', 'png', 'webp', 'PNG', 'bmp'])
def test_images_in_shards_may_have_the_usual_endings(tmp_path, ending):
    write_tar(tmp_path / 'val.tar', sample(3, ending=ending))
    assert numbers_of(open_shards(tmp_path, False)) == [3]


def test_other_files_in_shards_are_ignored(tmp_path):
    members = {'README.txt': b'hello', 'a/._0001.png': b'', 'a/0001.seg.png': as_png(9), 'a/0001.txt': b'a dog'}
    members |= {'a/0001.jpg': as_png(1), 'a/0001.png': as_png(8), 'a/0001.json': b'{"label": 5}', 'a/0001.cls': b' 1\n'}
    write_tar(tmp_path / 'val.tar', members)
    dataset = open_shards(tmp_path, False)
    assert numbers_of(dataset) == [1]
    assert dataset.samples[0] == (f'{tmp_path}/val.tar:a/0001.jpg', 1)


@pytest.mark.parametrize('text', ['{"label": 4}', '{"label": "dog", "cls": 4}', '{"width": 3, "cls": 4}'])
def test_class_may_be_in_json(tmp_path, text):
    write_tar(tmp_path / 'val.tar', {'4.json': text.encode(), '4.png': as_png(4)})
    assert numbers_of(open_shards(tmp_path, False)) == [4]


@pytest.mark.parametrize(
    ('members', 'words'),
    [
        ({'0.png': b''}, 'sample 0 has no class'),
        ({'0.png': b'', '0.txt': b'7'}, 'sample 0 has no class'),
        ({'a/0.cls': b'0'}, 'sample a/0 has no image'),
        (
            {'0.png': b'', '1.png': b'', '0.cls': b'0', '1.cls': b'1'},
            'sample 0 has no class .* must be adjacent',
        ),
        ({'0.png': b'', '0.cls': b'dog'}, r"0\.cls must contain a class number, but contains b'dog'"),
        ({'0.png': b'', '0.cls': b'-1'}, r'0\.cls must contain'),
        ({'0.png': b'', '0.cls': b'9' * 30}, r'0\.cls must contain'),
        ({'0.png': b'', '0.cls': b'0.5'}, r'0\.cls must contain'),
        ({'0.png': b'', '0.json': b'{"label": "dog"}'}, r'0\.json must contain a class number as cls or label, but'),
        ({'0.png': b'', '0.json': b'{"label": true}'}, r'0\.json must contain'),
        ({'0.png': b'', '0.json': b'{"name": 3}'}, r'0\.json must contain'),
        ({'0.png': b'', '0.json': b'[3]'}, r'0\.json must contain'),
        ({'0.png': b'', '0.json': b'{'}, r'0\.json must contain'),
        ({'0.png': b'', '0.json': b'\xff'}, r'0\.json must contain'),
        ({}, 'contains no images'),
    ],
)
def test_sample_without_image_or_class_is_named_with_its_shard(tmp_path, members, words):
    write_tar(tmp_path / 'x-val.tar', members)
    with pytest.raises(ValueError, match=rf'x-val\.tar:? {words}'):
        count_classes('wds/', str(tmp_path))


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda root: None, r'no _info\.json with a split val, no \*val\*\.tar and no val/\*\.tar'),
        (lambda root: (root / '_info.json').write_text('{"splits": {"test": {}}}'), r'no _info\.json with a split'),
        (lambda root: (root / '_info.json').write_text('{"splits": {"val": {}}}'), r"_info\.json: there is no 'filen"),
        (lambda root: (root / '_info.json').write_text('{"splits": []}'), r"_info\.json: 'list' object"),
        (lambda root: (root / '_info.json').write_text('{"splits": '), r'_info\.json: Expecting value'),
        (
            lambda root: (root / '_info.json').write_text(
                '{"splits": {"val": {"filenames": [], "shard_lengths": [3]}}}'
            ),
            'lists of the same length',
        ),
    ],
)
def test_folder_without_shards_is_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        count_classes('wds/', str(tmp_path))


def test_number_of_classes_is_found_in_both_splits_or_given(tmp_path):
    write_tar(tmp_path / 'train.tar', sample(0, 9))
    write_tar(tmp_path / 'val.tar', sample(0, 4))
    assert count_classes('wds/', str(tmp_path)) == 10
    assert count_classes('wds/', str(tmp_path), num_classes=1000) == 1000
    assert build_dataset('wds/', str(tmp_path), False, num_classes=12)[1] == 12
    with pytest.raises(ValueError, match='there are 10 classes, the last is 9; that is more than --num-classes 9'):
        count_classes('wds/', str(tmp_path), num_classes=9)


@pytest.mark.parametrize('train', [True, False])
def test_damaged_image_in_a_shard_stops_or_is_skipped(tmp_path, train):
    split = 'train' if train else 'val'
    for name in ('train', 'val'):
        write_tar(tmp_path / f'{name}-0.tar', {**sample(0), '1.png': b'no image', '1.cls': b'1'})
    kind, key = (TrainDataset, (1, 0, 0)) if train else (EvalDataset, 1)
    more = (3,) if train else ()
    transform = TrainTransform(lambda image: image) if train else None
    name = rf'{split}-0\.tar:1\.png'
    with pytest.raises(BadImageError, match=rf'{name}: cannot identify image file \(class 1\)'):
        kind(open_shards(tmp_path, train, transform=transform), False, *more)[key]
    dataset = kind(open_shards(tmp_path, train, transform=transform), True, *more)
    assert dataset[key][1] == (0 if train else -1)
    (listed,) = dataset.list_bad(lambda bad: bad)
    assert re.fullmatch(rf'.*{name} \(class 1\)', listed)


# Damaged tars ---------------------------------------------------------------------------------------------------------


def cut(data: bytes, end: int) -> bytes:
    return data[:end]


def flip_header(data: bytes) -> bytes:
    """Changes a letter in the name of the second file, so that the checksum of its header is wrong."""
    at = data.index(b'0000.cls')
    return data[:at] + b'X' + data[at + 1 :]


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: cut(data, 600),  # inside the first file
        lambda data: cut(data, data.index(b'0000.cls')),  # between two files
        lambda data: cut(data, data.index(b'0000.cls') + 100),  # inside a header
        lambda data: cut(data, data.index(b'0001.cls') + 512),  # before the last file's contents
        flip_header,
    ],
    ids=['in a file', 'between files', 'in a header', 'before contents', 'header'],
)
@pytest.mark.parametrize('name', ['wds/', 'TAR'])
def test_damaged_tar_is_named(tmp_path, name, damage):
    data = write_tar(tmp_path / 'val.tar', {**sample(0), **sample(1)})
    (tmp_path / 'val.tar').write_bytes(damage(data))
    with pytest.raises(ValueError, match=r'val\.tar is not a complete tar file'):
        count_classes(name, str(tmp_path))


def test_inner_tar_that_is_cut_off_does_not_take_files_of_the_outer_one(tmp_path):
    inner = write_tar(tmp_path / 'inner.tar', {'0.png': as_png(0)})
    write_tar(tmp_path / 'val.tar', {'a.tar': inner[:1024], 'b/1.png': as_png(1)})
    with pytest.raises(ValueError, match=r'val\.tar is not a complete tar file'):
        count_classes('TAR', str(tmp_path))


@pytest.mark.parametrize('format', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_odd_letters_are_read(tmp_path, format):
    name = 'ü' * 150 + '/0.png'
    with tarfile.open(tmp_path / 'val.tar', 'w', format=format) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(as_png(0))
        tar.addfile(info, io.BytesIO(as_png(0)))
    dataset, _ = build_dataset('TAR', str(tmp_path), False)
    assert dataset.classes == ['ü' * 150]
    assert dataset.samples[0] == (f'{tmp_path}/val.tar:{name}', 0)
    assert pixel(dataset[0][0]) == colours(0)


# The saved index ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch):
    """The names of the tars that are read, each time they are read."""
    read, open_tar = [], readers._open_tar
    monkeypatch.setattr(readers, '_open_tar', lambda path: read.append(path.name) or open_tar(path))
    return read


def reopen(root: Path, name: str = 'wds/'):
    """Opens the validation split as a new process does."""
    readers._open_index.cache_clear()
    return build_dataset(name, str(root), False)[0]


@pytest.mark.parametrize('name', ['wds/', 'TAR'])
def test_index_is_saved_and_used(tmp_path, cache, scans, name):
    write_tar(tmp_path / 'val.tar', {f'{c}/{key}': data for c in 'ab' for key, data in sample(3).items()})
    first = reopen(tmp_path, name)
    assert scans == ['val.tar']
    (saved,) = cache.iterdir()
    assert saved.suffix == '.npz'
    again = reopen(tmp_path, name)
    assert scans == ['val.tar']
    assert list(again.samples) == list(first.samples)
    assert getattr(again, 'classes', None) == getattr(first, 'classes', None)
    assert [again.samples.place(i) for i in range(2)] == [first.samples.place(i) for i in range(2)]
    assert pixel(again[1][0]) == colours(3)


def test_index_is_read_once_in_a_process(shards, scans):
    build_dataset('wds/', str(shards), True)
    build_dataset('wds/', str(shards), False)
    assert len(scans) == 10


@pytest.mark.parametrize('change', ['size', 'time', 'shard'])
def test_index_of_changed_shards_is_not_used(shards, cache, scans, change):
    assert len(reopen(shards)) == 30
    path, scanned = shards / 'val' / '2.tar', len(scans)
    info = path.stat()
    if change == 'size':
        write_tar(path, {**sample(0), **sample(1)})
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    elif change == 'time':
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    else:
        write_tar(shards / 'val' / '5.tar', sample(0))
    expected = {'size': 26, 'time': 30, 'shard': 31}[change]
    assert len(build_dataset('wds/', str(shards), False)[0]) == expected  # also in the same process
    assert len(scans) > scanned
    assert len(reopen(shards)) == expected


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ('something was unpickled',)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', ['empty', 'text', 'cut off', 'flipped', 'pickle', 'objects', 'another array', 'npy'])
def test_damaged_index_is_made_again_and_nothing_is_unpickled(shards, cache, scans, kind):
    expected = list(reopen(shards).samples)
    saved = max(cache.iterdir(), key=os.path.getmtime)
    for saved in cache.iterdir():
        data = saved.read_bytes()
        objects = np.empty(1, dtype=object)
        objects[0] = Bomb()
        arrays = dict(np.load(saved, allow_pickle=False))
        npy = io.BytesIO()
        np.save(npy, np.zeros(3))
        saved.write_bytes({
            'empty': b'',
            'text': b'no index',
            'cut off': data[: len(data) // 2],
            'flipped': data[:200] + bytes([data[200] ^ 1]) + data[201:],
            'pickle': pickle.dumps(Bomb()),
            'objects': npz(**{**arrays, 'numbers': objects}),
            'another array': npz(**{name: array for name, array in arrays.items() if name != 'ends'}),
            'npy': npy.getvalue(),
        }[kind])  # fmt: skip
    scans.clear()
    assert list(reopen(shards).samples) == expected
    assert scans
    assert all(zipfile.is_zipfile(path) for path in cache.iterdir())
    scans.clear()
    assert list(reopen(shards).samples) == expected
    assert not scans


@pytest.mark.parametrize('kind', ['file', 'no permission', 'full'])
def test_index_that_cannot_be_saved_costs_only_time(shards, cache, monkeypatch, capsys, kind):
    if kind == 'file':
        cache.parent.write_text('no folder')
    elif kind == 'no permission':
        cache.parent.mkdir(mode=0o500)
        if os.access(cache.parent, os.W_OK):
            pytest.skip('this user may write everywhere')
    else:

        def full(*_):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(os, 'replace', full)
    assert numbers_of(reopen(shards)) == list(range(30))
    assert 'warning: ' in capsys.readouterr().out
    assert numbers_of(reopen(shards)) == list(range(30))
    assert not cache.is_dir() or not list(cache.iterdir())


def test_index_is_saved_in_the_home_folder_by_default(shards, tmp_path, monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    reopen(shards)
    assert len(list((tmp_path / 'home/.cache/manifold-distillation').iterdir())) == 2


def test_samples_are_held_in_arrays():
    given = [('a/ü.png', 3), ('b/\udcff.png', 0), ('', 1)]
    samples = readers.Samples(given)
    assert list(samples) == given
    assert (samples[-1], len(samples)) == (given[-1], 3)
    with pytest.raises(IndexError):
        samples[3]
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in samples.arrays.values())


def test_samples_of_shards_are_held_in_arrays(shards):
    samples = open_shards(shards).samples
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in samples.arrays.values())
    assert EvalDataset(open_shards(shards, False), False).dataset.samples.arrays.keys() == samples.arrays.keys()
