"""The table of data sets, how each is opened, and what to do about images that cannot be decoded.

Images are bytes, (3, H, W) uint8, or PIL images (CIFAR, FAKE). `readers.py` reads them, `transforms.py` makes of them
the input of a model.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FakeData, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

import readers
from readers import BadImageError, Samples, TarSamples, load_image
from transforms import seed_augmentation
from utils import counter_seed, path_hint

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
FAKE_CLASSES, FAKE_TRAIN, FAKE_VAL = 10, 1024, 256


@dataclass(frozen=True)
class DatasetRequest:
    """Which split to open and how."""

    root: Path  # the folder of the data set
    train: bool  # the training split, otherwise the validation split
    transform: Callable | None  # applied to each image
    input_size: int  # height and width of generated images
    inat_category: str  # level of iNaturalist's taxonomy that is the class

    @property
    def split(self) -> str:
        return 'train' if self.train else 'val'


class ListedImages(Dataset):
    """The images of a list; `classes` are the names of the classes by number, if they have names."""

    def __init__(self, samples: Samples, transform: Callable | None, classes: list[str] | None) -> None:
        self.samples, self.transform = samples, transform
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.samples.load(index)
        return (self.transform(image) if self.transform else image), target


# Folders --------------------------------------------------------------------------------------------------------------


class ClassFolders(ImageFolder):
    """A tree of class folders. Hidden folders, such as `.ipynb_checkpoints`, are no classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith('.')]
        return names, {name: i for i, name in enumerate(names)}


class ImageNetFolder(ClassFolders):
    """ImageNet or a part of it, with ImageNet's class numbers, as any trained head has.

    All 1000 classes under other names are numbered in alphabetical order.
    """

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names, numbers = super().find_classes(directory)
        return names, {name: _imagenet_numbers().get(name, numbers[name]) for name in names}


@cache
def _imagenet_numbers() -> dict[str, int]:
    return {name: i for i, name in enumerate(ImageNetInfo().label_names())}


def _open_folder(request: DatasetRequest, kind: type[ClassFolders] = ClassFolders) -> Dataset:
    return kind(str(request.root / request.split), transform=request.transform, loader=load_image)


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not root.is_dir():
        raise ValueError('is a file; a folder is needed' if root.exists() else f'no such folder{path_hint(root)}')
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}{_split_hint(root, split)}')
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != '.')
    if not names:
        raise ValueError(f'{folder} has no class folders; images must be in one folder per class')
    if empty := [name for name in names if not _has_image(folder / name)]:
        raise ValueError(f'{folder} has class folders without images: {_listing(empty)}')
    return names


def _split_hint(root: Path, split: str) -> str:
    if root.name in ('train', 'val') and (root.parent / split).is_dir():
        return f'; use its parent, --data-path {root.parent}'
    other = next((name for name in ('test', 'valid', 'validation') if (root / name).is_dir()), '')
    return f'; there is {root / other}: rename it to {split}' if split == 'val' and other else ''


def _has_image(folder: Path) -> bool:
    """Whether there is an image below a folder; raises OSError if it cannot be read. Stops at the first one."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMG_EXTENSIONS) or (entry.is_dir() and _has_image(Path(entry.path)))
                   for entry in entries)  # fmt: skip


def _listing(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    names = sorted(names)
    return ', '.join(names[:10]) + (f' and {len(names) - 10} more' if names[10:] else '')


def _folder_classes(root: Path, inat_category: str) -> list[str]:
    return _same_classes(partial(_class_folders, root), has_train=(root / 'train').is_dir())


def _imagenet_classes(root: Path, inat_category: str) -> list[str]:
    names = _folder_classes(root, inat_category)
    others = [name for name in names if name not in _imagenet_numbers()]
    if others and len(names) != len(_imagenet_numbers()):  # all 1000 classes may have names of their own
        raise ValueError(
            f"{len(others)} of {len(names)} class folders do not have a name of ImageNet's, such as n01440764: "
            f'{_listing(others)}; use --data-set FOLDER for other classes'
        )
    return names


def _same_classes(find: Callable[[str], list[str]], has_train: bool) -> list[str]:
    """The class names of both splits; `val` alone is enough for evaluation."""
    val = find('val')
    train = find('train') if has_train else val
    if train != val:
        only = {'train': {*train} - {*val}, 'val': {*val} - {*train}}
        differences = '; '.join(f'only in {split}/: {_listing(names)}' for split, names in only.items() if names)
        raise ValueError(f'train/ has {len(train)} classes, val/ {len(val)}, and they differ: {differences}')
    return train


# iNaturalist ----------------------------------------------------------------------------------------------------------


def _open_inat(request: DatasetRequest, year: int) -> Dataset:
    root = request.root
    levels = _inat_levels(root, request.inat_category)
    classes = _inat_classes(root, request.inat_category, year=year)
    number = {name: i for i, name in enumerate(classes)}
    samples = []
    with _read_json(root / f'{request.split}{year}.json') as content:
        for image in content['images']:
            name = image['file_name']
            a, _, c, d = name.split('/')
            if levels[int(c)] not in number:
                raise ValueError(f'{name} is of class {levels[int(c)]}, which has no training image')
            samples.append((str(root / a / c / d), number[levels[int(c)]]))
    return ListedImages(Samples(samples), request.transform, classes)


@lru_cache  # the annotations of 2018 are 250 MB of JSON, needed for both splits and for the size of the head
def _inat_classes(root: Path, category: str, *, year: int) -> list[str]:
    """Class names, numbered by first appearance among the training annotations, in both splits."""
    levels = _inat_levels(root, category)
    with _read_json(root / f'train{year}.json') as content:
        return list(dict.fromkeys(levels[int(a['category_id'])] for a in content['annotations']))


def _inat_levels(root: Path, category: str) -> list[str]:
    """The name of each category at a level of the taxonomy."""
    with _read_json(root / 'categories.json') as content:
        return [entry[category] for entry in content]


@contextmanager
def _read_json(path: Path) -> Iterator[Any]:
    """The contents of a JSON file. Errors while they are used name the file."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        yield content
    except KeyError as error:
        raise ValueError(f'{path}: there is no {error}') from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: {error}') from error


# Tars -----------------------------------------------------------------------------------------------------------------


def _open_tars(find: Callable[[Path, str], TarSamples], request: DatasetRequest) -> Dataset:
    samples = find(request.root, request.split)
    return ListedImages(samples, request.transform, samples.classes)


def _read_index(tars: list[Path], layout: Callable[[Sequence[Path]], readers.Arrays], place: Path) -> TarSamples:
    samples = readers.open_index(tars, layout)
    if not len(samples):
        raise ValueError(f'{tars[0] if len(tars) == 1 else place} contains no images in tar files')
    return samples


def _tar_samples(root: Path, split: str) -> TarSamples:
    """The images in `train.tar` or `val.tar`, or in a folder of tars of that name."""
    tar, folder = root / f'{split}.tar', root / split
    if not tar.exists() and not folder.exists():
        raise ValueError(f'there is neither {split}.tar nor a folder {split} of tars')
    return _read_index([tar] if tar.exists() else sorted(folder.glob('*.tar')), readers.class_folders, folder)


def _tar_classes(root: Path, inat_category: str) -> list[str]:
    has_train = (root / 'train.tar').exists() or (root / 'train').exists()
    return _same_classes(lambda split: _tar_samples(root, split).classes or [], has_train)


def _find_shards(root: Path, split: str) -> tuple[list[Path], list[int]]:
    """The WebDataset shards of a split, and how many images each has, where an info file lists them."""
    for info in (root / '_info.json', root / 'info.json'):
        if info.exists():
            with _read_json(info) as content:
                splits = content['splits']
                listed = splits.get(split, splits.get('validation') if split == 'val' else None)
                if listed is None:
                    return [], []
                names, lengths = listed['filenames'], [int(length) for length in listed['shard_lengths']]
                if not names or not all(isinstance(name, str) for name in names) or len(names) != len(lengths):
                    raise ValueError('filenames and shard_lengths must be lists of the same length, not empty')
                return [root / name for name in names], lengths
    return sorted([*root.glob(f'*{split}*.tar'), *root.glob(f'{split}/*.tar')]), []


def _shard_samples(root: Path, split: str) -> TarSamples:
    """The images in the WebDataset shards of a split."""
    shards, lengths = _find_shards(root, split)
    if not shards:
        raise ValueError(f'{root} has no _info.json with a split {split}, no *{split}*.tar and no {split}/*.tar')
    samples = _read_index(shards, readers.webdataset, root)
    for path, expected, found in zip(shards, lengths, samples.images_by_tar(), strict=False):
        if found != expected:
            raise ValueError(f'{path} contains {found} images, but the info file says {expected}')
    return samples


def _shard_classes(root: Path, inat_category: str) -> range:
    """All numbers up to the largest class in both splits; `val` alone is enough for evaluation."""
    splits = ['val', 'train'] if _find_shards(root, 'train')[0] else ['val']
    return range(1 + max(int(_shard_samples(root, split).targets().max()) for split in splits))


# The table ------------------------------------------------------------------------------------------------------------


def _cifar_classes(root: Path, inat_category: str, *, kind: type[CIFAR10]) -> range:
    if not (root / kind.base_folder).is_dir():
        parent = f'; use --data-path {root.parent}' if root.name == kind.base_folder else ''
        raise ValueError(f'there is no folder {kind.base_folder} in it; unpack {kind.filename} there{parent}')
    return range(100 if kind is CIFAR100 else 10)


def _open_cifar(request: DatasetRequest, kind: type[CIFAR10]) -> Dataset:
    return kind(str(request.root), request.train, request.transform)


def _open_fake(request: DatasetRequest) -> Dataset:
    images, offset = (FAKE_TRAIN, 0) if request.train else (FAKE_VAL, FAKE_TRAIN)
    shape = (3, request.input_size, request.input_size)
    return FakeData(images, shape, FAKE_CLASSES, request.transform, random_offset=offset)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of the table."""

    open: Callable[[DatasetRequest], Dataset]  # opens a split
    # Finds the class names from (folder, level of iNaturalist's taxonomy), without reading an image.
    classes: Callable[[Path, str], Sequence] | None = None
    num_classes: int | None = None  # size of the head, if it is fixed


DATA_SETS = {
    'IMNET': DatasetSpec(partial(_open_folder, kind=ImageNetFolder), _imagenet_classes, 1000),
    'FOLDER': DatasetSpec(_open_folder, _folder_classes),
    'CIFAR': DatasetSpec(partial(_open_cifar, kind=CIFAR100), partial(_cifar_classes, kind=CIFAR100)),
    'CIFAR10': DatasetSpec(partial(_open_cifar, kind=CIFAR10), partial(_cifar_classes, kind=CIFAR10)),
    'INAT': DatasetSpec(partial(_open_inat, year=2018), partial(_inat_classes, year=2018)),
    'INAT19': DatasetSpec(partial(_open_inat, year=2019), partial(_inat_classes, year=2019)),
    'TAR': DatasetSpec(partial(_open_tars, _tar_samples), _tar_classes),
    'wds/': DatasetSpec(partial(_open_tars, _shard_samples), _shard_classes),
    'FAKE': DatasetSpec(_open_fake, num_classes=FAKE_CLASSES),
}


def parse_name(text: str) -> str:
    """Returns the name of a data set: a key of DATA_SETS, or `wds/` and a folder. Any other raises ValueError."""
    if text.startswith('hfds/'):
        raise ValueError(
            f'{text}: hfds/ needs the package datasets, but a module of this program has the same name; '
            'convert the images to WebDataset shards and use wds/'
        )
    if not is_name(text):
        raise ValueError(f'{text} is not one of {", ".join(DATA_SETS)}')
    return text


def is_name(text: str) -> bool:
    """Whether `parse_name` accepts a name."""
    kind, slash, _ = text.partition('/')
    return kind + slash in DATA_SETS


def _find_spec(name: str, root: str) -> tuple[DatasetSpec, Path]:
    """The row of a data set in the table, and its folder: that of `wds/NAME` is the folder NAME in `root`."""
    kind, slash, folder = name.partition('/')
    return DATA_SETS[kind + slash], Path(root) / folder


def count_classes(name: str, root: str, inat_category: str = 'name', num_classes: int | None = None) -> int:
    """The size of the head for a data set, from its folder names or index files, without reading an image.

    Args:
        name: a name that `parse_name` accepts.
        root: the folder of the data set; for `IMNET` and `FOLDER` it contains `train/` and `val/`.
        inat_category: level of iNaturalist's taxonomy that is the class.
        num_classes: the size to use; None: the number of classes found, or the fixed size of the data set.

    Raises:
        ValueError: there is no such data set in the folder, `train/` and `val/` have different classes, or the head
            is too small for the classes.
        OSError: its files cannot be read.
    """
    spec, folder = _find_spec(name, root)
    if spec.classes is None:
        return num_classes or spec.num_classes or 0
    classes = spec.classes(folder, inat_category)
    size = num_classes or spec.num_classes or len(classes)
    if len(classes) > size:
        limit = f'--num-classes {num_classes}' if num_classes else f'the {size} of {name}'
        raise ValueError(f'there are {len(classes)} classes, the last is {classes[-1]}; that is more than {limit}')
    return size


def build_dataset(
    name: str,
    root: str,
    train: bool,
    transform: Callable | None = None,
    *,
    input_size: int = 224,
    inat_category: str = 'name',
    num_classes: int | None = None,
) -> tuple[Dataset, int]:
    """Opens a split of a data set. Returns it and the size of the head.

    Args:
        name, root, inat_category, num_classes: as in `count_classes`.
        train: the training split, otherwise the validation split.
        transform: applied to each image, bytes (3, H, W) or a PIL image.
        input_size: height and width of the generated images of `FAKE`.

    Raises:
        ValueError, OSError: as in `count_classes`, or files are missing.
    """
    size = count_classes(name, root, inat_category, num_classes)
    spec, folder = _find_spec(name, root)
    try:
        return spec.open(DatasetRequest(folder, train, transform, input_size, inat_category)), size
    except RuntimeError as error:  # torchvision's error for missing or corrupted files
        raise ValueError(f'{name}: {str(error).split(".")[0]}') from error


# Images that cannot be decoded ----------------------------------------------------------------------------------------


class CheckedDataset(Dataset):
    """Adds the class to errors about images that cannot be decoded, or skips such images and remembers them.

    `dataset` has items (image, class). If it reads files, it has `samples` (path, class).
    """

    TRIES = 100  # after so many bad images in a row something else must be wrong

    def __init__(self, dataset: Any, skip_bad: bool) -> None:
        self.dataset = dataset
        if isinstance(dataset, ImageFolder) and not isinstance(dataset.samples, Samples):
            # ImageFolder has three lists of all images.
            dataset.samples = dataset.imgs = Samples(dataset.samples)  # type: ignore[assignment]
            dataset.targets = None  # type: ignore[assignment]
        self.skip_bad = skip_bad
        self._listed: set[int] = set()
        # In shared memory: the loader processes write to it.
        self.bad = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple | None:
        """An image and its class; None if the image is bad and to be skipped. BadImageError names file and class."""
        try:
            return self.dataset[index]
        except BadImageError as error:
            if not self.skip_bad:
                advice = '--bad-images skip continues without such images'
                raise BadImageError(f'{error} (class {self._class_of(index)}); {advice}') from error
            self.bad[index] = 1
            return None

    def first(self, index: int = 0, seed: int | None = None) -> tuple:
        """The first image from `index` on that can be decoded, its class, and its index."""
        for candidate in range(index, index + self.TRIES):
            if seed is not None:
                seed_augmentation(seed)
            item = self.read(candidate % len(self))
            if item is not None:
                return *item, candidate % len(self)
        raise BadImageError(f'{self.describe(index)} and the {self.TRIES - 1} images after it: none can be read')

    def _class_of(self, index: int) -> str:
        target = self.dataset.samples[index][1]
        if hasattr(self.dataset, 'class_to_idx'):
            return {number: name for name, number in self.dataset.class_to_idx.items()}[target]
        return self.dataset.classes[target] if hasattr(self.dataset, 'classes') else str(target)

    def list_bad(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], again: bool = False) -> list[str]:
        """File and class of the images that were skipped on any rank since the last call, or, with `again`, so far."""
        if not self.skip_bad:
            return []
        bad = sum_over_ranks(self.bad.int()).nonzero().flatten().tolist()
        found = [index for index in bad if again or index not in self._listed]
        self._listed.update(bad)
        return [self.describe(index) for index in found]

    def describe(self, index: int) -> str:
        """File and class of an image."""
        return f'{self.dataset.samples[index][0]} (class {self._class_of(index)})'


class TrainDataset(CheckedDataset):
    """Training images with augmentation that depends only on (seed, epoch, position), not on workers or interruptions.

    An item is (image, class, index, aug_params): bytes (3, H, W), and the parameters for `DevicePreprocess`, with a
    `key` for its random numbers. The next good image of the data set replaces a bad one.

    `dataset` augments with the global generators of `random`, numpy and torch, as timm and torchvision do.
    """

    def __init__(self, dataset: Any, skip_bad: bool, seed: int) -> None:
        super().__init__(dataset, skip_bad)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        index, epoch, position = key
        number = counter_seed(self.seed, 'augment', epoch, position)
        (image, aug_params), target, found = self.first(index, number)
        return image, target, found, {'key': number, **aug_params}


class EvalDataset(CheckedDataset):
    """Validation images: (image, class). A bad image is black and has class −1, which evaluation does not count."""

    def __getitem__(self, index: int) -> tuple:
        item = self.read(index)
        return (torch.zeros_like(self.first()[0]), -1) if item is None else item


def fingerprint(dataset: Any, num_classes: int) -> dict[str, int]:
    """Identifies a training set, in whatever folder it is: numbers of images and classes, checksum of class names."""
    names = '\n'.join(map(str, getattr(dataset, 'classes', ())))
    numbers = [*getattr(dataset, 'class_to_idx', {}).values()]
    if numbers != [*range(len(numbers))]:  # a part of ImageNet
        names += f'\n{numbers}'
    return {'images': len(dataset), 'classes': num_classes, 'names': zlib.crc32(names.encode())}


def class_names(dataset: Any, num_classes: int) -> list[str]:
    """Names of the classes by number, '' for those without; [] if the data set has no names."""
    names = [''] * num_classes
    numbers = getattr(dataset, 'class_to_idx', None) or {n: i for i, n in enumerate(getattr(dataset, 'classes', ()))}
    for name, number in numbers.items():
        names[number] = str(name)
    return names if any(names) else []
