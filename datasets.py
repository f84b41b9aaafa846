"""The table of data sets, streams, transforms, and augmentation that depends on an image's place alone.

Images are bytes, (3, H, W) of dtype uint8, or PIL's; `augment.py` makes of them what models see.
"""

import io
import json
import logging
import math
import os
import random
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, ImageNetInfo, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.readers import add_img_extensions, create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ToNumpy
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, FakeData, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from augment import PolicySampler, draw_erasures
from utils import counter_seed

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
SMALL = 32  # images up to this size are neither resized nor cropped out of larger ones
_TO_FLOAT = (transforms.ToTensor, transforms.PILToTensor, MaybeToTensor, ToNumpy)  # where timm leaves PIL images
FAKE_CLASSES, FAKE_TRAIN, FAKE_VAL = 10, 1024, 256


class BadImageError(ValueError):
    """An image cannot be decoded; says which and why."""


def load_image(name: str, path: Path | None = None, start: int = 0, size: int = -1) -> torch.Tensor:
    """Reads an image as RGB bytes (3, H, W): of animations the first frame, not rotated.

    Ordinary JPEGs are decoded by torchvision, to the same bytes as by PIL, which reads all others.

    Args:
        name: what it is called, the path of its file as a rule.
        path: of the file it lies in, if that is another.
        start: where in the file it begins, in bytes.
        size: bytes it has; −1: all.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        return _decode(path or name, start, size, os.stat(path or name).st_ctime_ns)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        why = getattr(error, 'strerror', None) or re.sub(' <.*object at .*>', '', str(error))
        raise BadImageError(f'{name}: {why}') from error


@lru_cache(maxsize=1)  # with repeated augmentation an image may come several times in a row
def _decode(path: str | Path, start: int, size: int, changed: int) -> torch.Tensor:
    """`changed`: when the file was changed last; what was read before does not count then."""
    with open(path, 'rb') as file:
        file.seek(start)
        data = file.read(size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of odd but readable files
        image = Image.open(io.BytesIO(data))
        if image.format == 'JPEG' and image.mode in ('L', 'RGB'):
            with suppress(RuntimeError):  # of damage; PIL knows how to say it
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        # Of 16 bits PIL would cut off what is above 255. Those of some formats it opens as 32.
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
        if image.mode in ('I', 'F'):
            raise ValueError(f'has pixels of mode {image.mode}, whose white is unknown')
        return _to_bytes(image.convert('RGB'))


def _to_bytes(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """(3, H, W), uint8."""
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image.convert('RGB'))


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


class Samples(Sequence):
    """(path, class) of each image in two arrays: of a million Python objects each loader process gets its own copies.

    Args:
        samples: the same as a list.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        names = [os.fsencode(name) for name, _ in samples]
        self._text = b''.join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._classes = np.array([target for _, target in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]]), int(self._classes[index])


class INatDataset(Dataset):
    """iNaturalist 2018 or 2019 in the layout of its JSON files.

    Args:
        root: holds `{train,val}<year>.json`, `categories.json` and the images.
        train: the training split.
        year: 2018 or 2019.
        category: level of the taxonomy that is the class, one of INAT_CATEGORIES.
        transform: applied to each image.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str, transform: Callable | None = None) -> None:
        levels = _inat_levels(root, category)
        self.classes = _inat_classes(root, category, year=year)
        number = {name: i for i, name in enumerate(self.classes)}
        self.samples = []
        place = root / f'{"train" if train else "val"}{year}.json'
        with parse_errors_name_file(place):
            for image in _read_json(place)['images']:
                name = image['file_name']
                a, _, c, d = name.split('/')
                if levels[int(c)] not in number:
                    raise ValueError(f'{name} is of class {levels[int(c)]}, which has no training image')
                self.samples.append((str(root / a / c / d), number[levels[int(c)]]))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        image = load_image(path)
        return (self.transform(image) if self.transform else image), target


def _read_json(path: Path):
    with open(path, encoding='utf-8') as file, parse_errors_name_file(path):
        return json.load(file)


@contextmanager
def parse_errors_name_file(path: Path) -> Iterator[None]:
    """Names the file that is not as it must be."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f'{path}: there is no {error}') from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: {str(error).removeprefix(f"{path}: ")}') from error


@lru_cache  # the annotations of 2018 are 250 MB of JSON, and both splits and the size of the head ask for them
def _inat_classes(root: Path, category: str, *, year: int) -> list[str]:
    """Class names, numbered by first appearance among the training annotations, in both splits."""
    levels, place = _inat_levels(root, category), root / f'train{year}.json'
    with parse_errors_name_file(place):
        annotations = _read_json(place)['annotations']
        return list(dict.fromkeys(levels[int(a['category_id'])] for a in annotations))


def _inat_levels(root: Path, category: str) -> list[str]:
    """The name each category has at a level of the taxonomy."""
    place = root / 'categories.json'
    with parse_errors_name_file(place):
        return [entry[category] for entry in _read_json(place)]


@dataclass(frozen=True)
class DatasetRequest:
    """What a data set is asked for: its place, the split, the transform, image size and iNaturalist level."""

    root: Path
    train: bool
    transform: Callable | None
    input_size: int
    inat_category: str

    @property
    def folder(self) -> Path:
        return self.root / ('train' if self.train else 'val')


class TarDataset(Dataset):
    """Images in a tar, or in a folder of tars or a tar of tars, each read where it lies.

    The class of an image is the folder it is in, or its tar; timm reads the index.

    Args:
        place: the tar or the folder.
        transform: applied to each image.
    """

    def __init__(self, place: Path, transform: Callable | None = None) -> None:
        index = _tar_index(place)
        self.classes = _index_classes(index)
        names = {number: name for name, number in index.class_name_to_idx.items()}
        number = {name: i for i, name in enumerate(self.classes)}
        self.samples, places = [], []
        self._archives = list(dict.fromkeys(place / archive if archive else place for _, archive, _ in index.samples))
        archive_number = {path: i for i, path in enumerate(self._archives)}
        for (member, archive, inner), target in zip(index.samples, index.targets, strict=True):
            path = place / archive if archive else place
            self.samples.append((f'{path}:{inner.name + ":" if inner else ""}{member.name}', number[names[target]]))
            start = member.offset_data + (inner.offset_data if inner else 0)
            places.append((archive_number[path], start, member.size))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        (name, target), (archive, start, size) = self.samples[index], self._places[index].tolist()
        # Opened anew for each image: an open file would be shared, with its position, by all loader processes.
        image = load_image(name, self._archives[archive], start, size)
        return (self.transform(image) if self.transform else image), target


@lru_cache  # both splits and the size of the head ask for it, and a large tar is read from end to end
def _tar_index(place: Path) -> ReaderImageInTar:
    add_img_extensions(IMG_EXTENSIONS)  # a tar has the images that a tree of folders would have
    try:
        # Its cache of a large index is a pickle, and not told from that of other tars.
        return ReaderImageInTar(str(place), cache_tarinfo=False)
    except (AssertionError, ValueError, tarfile.TarError) as error:
        raise ValueError(f'{place} is no tar of images, and no folder of such: {error}') from error


def _index_classes(index: ReaderImageInTar) -> list[str]:
    # In the order of a tree of folders, so that a head fits both; timm counts c2 before c10.
    return sorted(index.class_name_to_idx)


def _tar_split(root: Path, train: bool) -> Path:
    name = 'train' if train else 'val'
    for place in (root / f'{name}.tar', root / name):
        if place.exists():
            return place
    raise ValueError(f'there is neither {name}.tar nor a folder {name} of tars')


def _tar_classes(root: Path, inat_category: str = '') -> list[str]:
    """Class names; `val` alone is enough where there is no `train`."""
    val = _index_classes(_tar_index(_tar_split(root, False)))
    has_train = any((root / name).exists() for name in ('train.tar', 'train'))
    train = _index_classes(_tar_index(_tar_split(root, True))) if has_train else val
    _check_same_classes(train, val)
    return train


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}')
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f'{folder} has no class folders: images must lie in one folder per class')
    return names


def _folder_classes(root: Path, inat_category: str = '') -> list[str]:
    """Class names of an ImageFolder tree; `val/` alone is enough where there is no `train/`."""
    if not root.is_dir():
        raise ValueError('there is no such folder')
    val = _class_folders(root / 'val')
    train = _class_folders(root / 'train') if (root / 'train').is_dir() else val
    _check_same_classes(train, val)
    return train


def _check_same_classes(train: list[str], val: list[str]) -> None:
    if train != val:
        odd = sorted(set(train) ^ set(val))
        where = 'train' if odd[0] in train else 'val'
        raise ValueError(
            f'train/ has {len(train)} classes, val/ {len(val)}, and they differ: {odd[0]} is in {where}/ only'
        )


def _open_inat(year: int) -> Callable[[DatasetRequest], Dataset]:
    return lambda request: INatDataset(request.root, request.train, year, request.inat_category, request.transform)


class ImageNetFolder(ImageFolder):
    """ImageNet or a part of it: folders named as ImageNet's have its numbers, for a head knows no others.

    Attributes:
        numbered: whether they are named so; otherwise they count as they are sorted.
    """

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names, numbers = super().find_classes(directory)
        known = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        self.numbered = known.keys() >= set(names)
        return names, {name: known[name] for name in names} if self.numbered else numbers


def _open_folder(request: DatasetRequest, kind: type[ImageFolder] = ImageFolder) -> Dataset:
    return kind(str(request.folder), transform=request.transform, loader=load_image)


def _open_fake(request: DatasetRequest) -> Dataset:
    size, offset = (FAKE_TRAIN, 0) if request.train else (FAKE_VAL, FAKE_TRAIN)
    return FakeData(
        size, (3, request.input_size, request.input_size), FAKE_CLASSES, request.transform, random_offset=offset
    )


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: how it is opened, and its class names or their fixed number."""

    open: Callable[[DatasetRequest], Dataset]
    classes: Callable[[Path, str], Iterable] | None = None
    num_classes: int | None = None


DATA_SETS = {
    'IMNET': DatasetSpec(partial(_open_folder, kind=ImageNetFolder), _folder_classes, 1000),
    'FOLDER': DatasetSpec(_open_folder, _folder_classes),
    'CIFAR': DatasetSpec(
        lambda request: CIFAR100(str(request.root), request.train, request.transform), num_classes=100
    ),
    'CIFAR10': DatasetSpec(
        lambda request: CIFAR10(str(request.root), request.train, request.transform), num_classes=10
    ),
    'INAT': DatasetSpec(_open_inat(2018), partial(_inat_classes, year=2018)),
    'INAT19': DatasetSpec(_open_inat(2019), partial(_inat_classes, year=2019)),
    'TAR': DatasetSpec(
        lambda request: TarDataset(_tar_split(request.root, request.train), request.transform), _tar_classes
    ),
    'FAKE': DatasetSpec(_open_fake, num_classes=FAKE_CLASSES),
}


def count_classes(name: str, root: str, inat_category: str = 'name') -> int:
    """Size of the head a data set asks for, from its folder names or index files, without reading an image.

    Args:
        name: a key of DATA_SETS.
        root: where it lies.
        inat_category: level of iNaturalist's taxonomy.

    Raises:
        ValueError: it is not there, or `train/` and `val/` hold different classes.
        OSError: its files cannot be read.
    """
    entry = DATA_SETS[name]
    found = len(entry.classes(Path(root), inat_category)) if entry.classes else entry.num_classes
    if entry.num_classes is None:
        return found
    if found > entry.num_classes:
        raise ValueError(f'it has {found} class folders, {name} only {entry.num_classes} classes')
    return entry.num_classes


def build_dataset(
    name: str,
    root: str,
    train: bool,
    transform: Callable | None = None,
    *,
    input_size: int = 224,
    inat_category: str = 'name',
) -> tuple[Dataset, int]:
    """A split of a data set and its number of classes.

    Args:
        name: a key of DATA_SETS.
        root: where it lies; for `IMNET` and `FOLDER` the folder that holds `train/` and `val/`.
        train: the training split, otherwise the validation split.
        transform: PIL image → tensor.
        input_size: height and width of the generated images of `FAKE`.
        inat_category: level of iNaturalist's taxonomy that is the class.

    Raises:
        ValueError: it is not there, is incomplete, or `train/` and `val/` hold different classes.
        OSError: its files cannot be read.
    """
    num_classes = count_classes(name, root, inat_category)
    request = DatasetRequest(Path(root), train, transform, input_size, inat_category)
    try:
        return DATA_SETS[name].open(request), num_classes
    except RuntimeError as error:  # torchvision's word for "not found or corrupted"
        raise ValueError(f'{name}: {str(error).split(".")[0]}') from error


class TrainTransform:
    """Image → bytes (3, H, W), and what is left for the device, see `augment.Finish`; at random as timm has it.

    Args:
        steps: PIL images or bytes → bytes.
        policy: draws what the device is to do, `plan`; None where nothing of that kind is left.
        erasing: timm's, from which `erase` is drawn; None for none.
    """

    def __init__(
        self, steps: Callable, policy: PolicySampler | None = None, erasing: RandomErasing | None = None
    ) -> None:
        self.steps, self.policy, self.erasing = steps, policy, erasing

    def __call__(self, image: Image.Image | torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, aug_params = self.steps(image), {}
        if self.policy is not None:
            aug_params['plan'] = self.policy()
        if self.erasing is not None:
            aug_params['erase'] = draw_erasures(self.erasing, *image.shape[1:])
        return image, aug_params


class RandomResizedCrop:
    """timm's crop at random, the same boxes, of bytes (3, H, W), which torch resizes several times as fast as PIL.

    Args:
        crop: timm's.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        way = self.crop.interpolation
        way = random.choice(way) if isinstance(way, tuple | list) else way
        box = image[None, :, top : top + height, left : left + width]
        # With the colours of a pixel side by side, as PIL has them, it takes half the time.
        box = box.contiguous(memory_format=torch.channels_last)
        return interpolate(box, self.crop.size, mode=way.value, antialias=True)[0]


def build_train_transform(
    input_size: int,
    color_jitter: float,
    auto_augment: str | None,
    interpolation: str,
    reprob: float,
    recount: int,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    on_device: bool = False,
) -> TrainTransform:
    """DeiT's training augmentation by timm; normalising and erasing are left to the device, `augment.Finish`.

    Args:
        input_size: pixels; up to 32 a random crop with padding 4 takes the place of resizing.
        color_jitter: strength, used without auto-augmentation only.
        auto_augment: timm's policy string; None for none.
        interpolation: 'random', 'bilinear' or 'bicubic'.
        reprob: probability of random erasing.
        recount: its number of rectangles.
        mean: of each channel, values in 0 … 1, the colour of what geometric operations uncover.
        on_device: leave auto-augmentation to the device too.

    Raises:
        ValueError: the device cannot do that for this policy.
    """
    steps = create_transform(
        input_size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=interpolation,
        re_prob=reprob,
        re_count=recount,
        mean=mean,
    ).transforms
    crop, flip, *colours = steps[: next(i for i, step in enumerate(steps) if isinstance(step, _TO_FLOAT))]
    crop = RandomResizedCrop(crop) if input_size > SMALL else transforms.RandomCrop(input_size, padding=4)
    for op in _augment_ops(colours):
        if 'Posterize' in op.name:
            op.aug_fn = _posterize
    policy = None
    if on_device:
        if len(colours) != 1:
            raise ValueError('it is more than a policy, and cannot be applied to a batch')
        policy, colours = PolicySampler(*colours), []
    if colours:
        colours = [_to_pil, *colours, _to_bytes]
    erasing = steps[-1] if isinstance(steps[-1], RandomErasing) else None
    return TrainTransform(transforms.Compose([_to_bytes, crop, flip, *colours]), policy, erasing)


def _augment_ops(steps: Iterable) -> Iterable[AugmentOp]:
    for step in steps:
        if isinstance(step, AugmentOp):
            yield step
        elif isinstance(step, list):
            yield from _augment_ops(step)
        else:
            yield from _augment_ops(getattr(step, 'ops', getattr(step, 'policy', [])))


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    # Increasing policies ask for 0 bits at full strength: black up to Pillow 12, a ValueError from Pillow 13 on.
    if bits == 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def build_eval_transform(input_size: int) -> Callable:
    """Resize to 256/224 of the input size and centre crop, by PIL, to bytes; up to 32 pixels neither."""
    if input_size <= SMALL:
        return _to_bytes
    side = int(256 / 224 * input_size)
    resize_by_pil = transforms.Resize(side, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([_to_bytes, _to_pil, resize_by_pil, transforms.CenterCrop(input_size), _to_bytes])


class CheckedDataset(Dataset):
    """Says of an image that cannot be decoded what class it is of, or leaves it out and remembers it.

    Args:
        dataset: of (image, class); those that read files have `samples` (path, class) and `classes`.
        skip_bad: leave bad images out instead of raising BadImageError.
    """

    TRIES = 100  # bad images in a row, after which something else is wrong

    def __init__(self, dataset: Dataset, skip_bad: bool) -> None:
        self.dataset = dataset
        if hasattr(dataset, 'samples'):
            dataset.samples = Samples(dataset.samples)
            if isinstance(dataset, ImageFolder):  # which keeps the same in lists of its own
                dataset.imgs, dataset.targets = dataset.samples, None
        self.skip_bad = skip_bad
        self._listed: set[int] = set()
        # Shared with the loader processes, which find them.
        self.bad = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple | None:
        """One image and its class; None if it is bad and may be left out.

        Raises:
            BadImageError: it is bad, with its file and class.
        """
        try:
            return self.dataset[index]
        except BadImageError as error:
            if not self.skip_bad:
                raise BadImageError(f'{error} (class {self._class_of(index)})') from error
            self.bad[index] = 1
            return None

    def first(self) -> tuple:
        """The first image that can be read, and its class."""
        for index in range(min(self.TRIES, len(self))):
            item = self.read(index)
            if item is not None:
                return item
        raise BadImageError(f'{self.describe(0)} and those after it: none can be read')

    def _class_of(self, index: int) -> str:
        target = self.dataset.samples[index][1]
        names = {number: name for name, number in getattr(self.dataset, 'class_to_idx', {}).items()}
        return names[target] if names else self.dataset.classes[target]

    def list_bad(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], again: bool = False) -> list[str]:
        """File and class of the images left out on any rank, those since the last call or all.

        Args:
            sum_over_ranks: adds a vector up over the ranks.
            again: all of them.
        """
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
    """Draws each image's augmentation from (seed, epoch, position): the same on any worker, resumed or not.

    An item is (image, class, index, todo): bytes (3, H, W), and what `TrainTransform` leaves for the device, with a
    `key` for what is random about that. In the place of a bad image stands the next good one of the data set.

    Args:
        dataset: augments with the global generators of `random`, numpy and torch, as timm and torchvision do.
        skip_bad: see `CheckedDataset`.
        seed: the run's.
    """

    def __init__(self, dataset: Dataset, skip_bad: bool, seed: int) -> None:
        super().__init__(dataset, skip_bad)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        index, epoch, position = key
        number = counter_seed(self.seed, 'augment', epoch, position)
        for instead in range(index, index + self.TRIES):
            _seed_augmentation(number)
            item = self.read(instead % len(self))
            if item is not None:
                (image, aug_params), target = item
                return image, target, instead % len(self), {'key': number, **aug_params}
        raise BadImageError(f'{self.describe(index)} and the {self.TRIES - 1} after it: none can be read')


class EvalDataset(CheckedDataset):
    """An item is (image, class); a bad image is black and of class −1, which evaluation does not count."""

    def __getitem__(self, index: int) -> tuple:
        item = self.read(index)
        return (torch.zeros_like(self.first()[0]), -1) if item is None else item


# Streams --------------------------------------------------------------------------------------------------------------

STREAM = 'wds/'  # how the name of a data set begins that is read from end to end: WebDataset
_INFO = ('_info.json', 'info.json')


@dataclass(frozen=True)
class Shards:
    """The tars of a split, relative to their root, how many images are in each, and in the whole split."""

    root: Path
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    images: int

    def share(self, rank: int, world: int) -> 'Shards':
        """Every world-th of them, from rank on."""
        return Shards(self.root, self.names[rank::world], self.lengths[rank::world], self.images)


@lru_cache  # without `_info.json` all shards are gone through
def find_shards(root: Path, train: bool) -> Shards:
    """The shards of a split, as `_info.json` lists them; otherwise `*train*.tar` and `*val*.tar`, counted.

    Raises:
        ValueError: there are none.
        OSError: they cannot be read.
    """
    for path in (root / name for name in _INFO):
        if path.exists():
            with parse_errors_name_file(path):
                splits = _read_json(path)['splits']
                found = [splits[name] for name in (('train',) if train else ('validation', 'val')) if name in splits]
                if not found:
                    raise ValueError(f'has no split {"train" if train else "validation"}')
                names, lengths = found[0]['filenames'], [int(length) for length in found[0]['shard_lengths']]
                if not names or not all(isinstance(name, str) for name in names) or len(names) != len(lengths):
                    raise ValueError('filenames and shard_lengths must be as many, and one at least')
            missing = [name for name in names if not (root / name).exists()]  # the reader would pass over them
            if missing:
                raise ValueError(f'{len(missing)} of {len(names)} shards in {path} are not there: {missing[0]} …')
            return Shards(root, tuple(names), tuple(lengths), sum(lengths))
    word = 'train' if train else 'val'
    paths = sorted([*root.glob(f'*{word}*.tar'), *root.glob(f'{word}/*.tar')])
    if not paths:
        raise ValueError(f'{root} has no _info.json, no *{word}*.tar and no {word}/*.tar')
    lengths = tuple(map(_count_images, paths))
    return Shards(root, tuple(str(path.relative_to(root)) for path in paths), lengths, sum(lengths))


def _count_images(path: Path) -> int:
    """Images in a shard: members that tell a class."""
    try:
        with tarfile.open(path) as tar:
            return sum(member.name.endswith('.cls') for member in tar)
    except tarfile.TarError as error:
        raise ValueError(f'{path} is no shard: {error}') from error


class StreamDataset(IterableDataset):
    """A split of WebDataset shards, by timm's reader: `.jpg`, `.jpeg`, `.png` or `.webp` with a number in `.cls`.

    In training all loader processes take equally many images, in whole batches: one with fewer in its shards begins
    them again, one with more leaves some out. The order of the shards is a function of (seed, epoch), that within a
    window of 8192 images of the loader process too. Evaluation has each image of its shards once. Images that cannot be
    decoded are left out, with a warning on stderr.

    Args:
        shards: all of the split in training, this rank's share in evaluation.
        train: items are (image, class, number, todo) as those of `TrainDataset`, in evaluation (image, class).
        transform: PIL image → tensor.
        num_classes: classes there are.
        batch_size: images of a batch.
        workers: loader processes, 0 for none.
        seed: the run's.
        rank: this rank.
        world: number of ranks.
    """

    def __init__(
        self,
        shards: Shards,
        train: bool,
        transform: Callable,
        num_classes: int,
        batch_size: int,
        workers: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards, self.train, self.transform, self.num_classes = shards, train, transform, num_classes
        self.batch_size, self.workers = batch_size, max(1, workers)
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and after how many images of all ranks it goes on: then with shards in another order."""
        self.epoch, self.start = epoch, start

    @property
    def images(self) -> int:
        """Of the split, on all ranks."""
        return self.shards.images

    def __len__(self) -> int:
        """Images this rank takes; in evaluation as many as there are at most, counted in batches."""
        if not self.train:
            return sum(self.shards.lengths) + self.workers * self.batch_size
        return self.workers * self._of_a_worker()

    def _of_a_worker(self) -> int:
        share = math.ceil((self.shards.images - self.start) / (self.world * self.workers))
        return math.ceil(share / self.batch_size) * self.batch_size

    def first(self) -> tuple:
        """One image that can be read, and its class."""
        once = StreamDataset(self.shards, False, self.transform, self.num_classes, 1, 0)
        for item in once:
            return item
        raise BadImageError(f'{self.shards.root}: no image of {self.shards.names[0]} … can be read')

    def __iter__(self) -> Iterator[tuple]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        counter = (self.epoch, self.start, self.rank, worker)
        i = -1
        for i, (image, target) in enumerate(self._reader(info, counter) if self.shards.names else ()):
            if not 0 <= target < self.num_classes:
                raise BadImageError(
                    f'{self.shards.root}: an image is of class {target}, --num-classes {self.num_classes} are 0 to '
                    f'{self.num_classes - 1}'
                )
            if self.train:
                number = counter_seed(self.seed, 'augment', *counter, i)
                _seed_augmentation(number)
                image, aug_params = self.transform(image)
                yield image, target, worker + workers * i, {'key': number, **aug_params}
            else:
                yield self.transform(image), target
        if self.train and i + 1 < self._of_a_worker():
            raise BadImageError(f'{self.shards.root}: no image of the shards of a loader process can be read')

    def _reader(self, info: object, counter: tuple[int, ...]) -> Iterable:
        logging.getLogger('timm.data.readers.reader_wds').addFilter(_no_word_of_info)  # once, however often
        reader = create_reader(
            STREAM,
            root=str(self.shards.root),
            split=f'{"::".join(self.shards.names)}|{self.shards.images - self.start}',
            is_training=self.train,
            batch_size=self.batch_size,
            input_key='jpg;jpeg;png;webp',
            seed=counter_seed(self.seed, 'shards', self.epoch, self.start),
        )
        # What it would ask the process group and torch's global generator for.
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader.worker_info = info or 'none'
        reader.dist_num_replicas, reader.num_workers = self.world, workers
        reader.global_num_workers, reader.global_worker_id = self.world * workers, self.rank * workers + worker
        reader.worker_seed = counter_seed(self.seed, 'window', *counter)
        return reader

    def list_bad(self, sum_over_ranks: Callable, again: bool = False) -> list[str]:
        """Nothing: the reader has warned of each already."""
        return []


def _no_word_of_info(record: logging.LogRecord) -> bool:
    """Keeps the reader from missing a file it is not asked to read: `find_shards` has told it all."""
    return 'info file not found' not in record.getMessage()


def _seed_augmentation(number: int) -> None:
    """Starts the global generators that timm and torchvision augment with."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)


def image_size(dataset: Dataset) -> tuple[int, int]:
    """Height and width of the images of a split, by its first one."""
    image = dataset.first()[0]
    return tuple((image[0] if isinstance(image, tuple) else image).shape[1:])


def fingerprint(dataset: Dataset, num_classes: int) -> dict:
    """What tells a training set from another, wherever it lies: number of images, of classes, and a sum of names."""
    names = '\n'.join(map(str, getattr(dataset, 'classes', ())))
    numbers = [*getattr(dataset, 'class_to_idx', {}).values()]
    if numbers != [*range(len(numbers))]:  # a part of ImageNet
        names += f'\n{numbers}'
    return {'images': count_images(dataset), 'classes': num_classes, 'names': zlib.crc32(names.encode())}


def count_images(dataset: Dataset) -> int:
    """Of the whole split."""
    return dataset.images if isinstance(dataset, StreamDataset) else len(dataset)
