"""The table of data sets, streams, transforms, and augmentation that depends on an image's place alone.

Images are bytes, (3, H, W) of dtype uint8, or PIL's; `transforms.py` makes of them what models see.
"""

import io
import json
import os
import random
import re
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
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ToNumpy
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, FakeData, ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

import tars
from tars import Samples, TarSamples
from transforms import PolicySampler, draw_erasures
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
    """Images in tar files, each read where it lies.

    Args:
        samples: which images.
        transform: applied to each image.
    """

    def __init__(self, samples: TarSamples, transform: Callable | None = None) -> None:
        self.samples, self.transform = samples, transform
        if samples.classes is not None:
            self.classes = samples.classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        name, target = self.samples[index]
        # Each time opened: loader processes would share an open file, with its position.
        image = load_image(name, *self.samples.place(index))
        return (self.transform(image) if self.transform else image), target


def _tar_samples(root: Path, train: bool) -> TarSamples:
    """The images in `train.tar` or `val.tar`, or in a folder of tars of that name."""
    split = 'train' if train else 'val'
    if (root / f'{split}.tar').exists():
        paths = [root / f'{split}.tar']
    elif (root / split).exists():
        paths = sorted((root / split).glob('*.tar'))
    else:
        raise ValueError(f'there is neither {split}.tar nor a folder {split} of tars')
    return _open_tars(paths, tars.class_folders, root / split)


def _open_tars(paths: list[Path], layout: Callable[[Sequence[Path]], tars.Arrays], place: Path) -> TarSamples:
    samples = tars.open_index(paths, layout) if paths else ()
    if not samples:
        raise ValueError(f'{paths[0] if len(paths) == 1 else place}: holds no images in tar files')
    return samples


def _tar_classes(root: Path, inat_category: str = '') -> list[str]:
    """Class names; `val` alone is enough where there is no `train`."""
    val = _tar_samples(root, False).classes
    has_train = any((root / name).exists() for name in ('train.tar', 'train'))
    train = _tar_samples(root, True).classes if has_train else val
    _check_same_classes(train, val)
    return train


def _find_shards(root: Path, train: bool) -> tuple[list[Path], list[int] | None]:
    """WebDataset shards of a split and, if an info file lists them, how many images each has; ([], None) for none."""
    for info in (root / name for name in ('_info.json', 'info.json')):
        if info.exists():
            with parse_errors_name_file(info):
                splits = _read_json(info)['splits']
                found = [splits[name] for name in (('train',) if train else ('validation', 'val')) if name in splits]
                if not found:
                    return [], None
                names, lengths = found[0]['filenames'], [int(length) for length in found[0]['shard_lengths']]
                if not names or not all(isinstance(name, str) for name in names) or len(names) != len(lengths):
                    raise ValueError('filenames and shard_lengths must be lists of equal length, not empty')
            return [root / name for name in names], lengths
    split = 'train' if train else 'val'
    return sorted([*root.glob(f'*{split}*.tar'), *root.glob(f'{split}/*.tar')]), None


def _shard_samples(root: Path, train: bool) -> TarSamples:
    """The images in the WebDataset shards of a split."""
    paths, lengths = _find_shards(root, train)
    if not paths:
        split = 'train' if train else 'val'
        listed = 'split "train"' if train else 'split "validation" or "val"'
        raise ValueError(f'{root} has no _info.json with a {listed}, no *{split}*.tar and no {split}/*.tar')
    samples = _open_tars(paths, tars.webdataset, root)
    for path, expected, found in zip(paths, lengths or (), samples.images_by_tar(), strict=False):
        if found != expected:
            raise ValueError(f'{path}: holds {found} images, but the info file says {expected}')
    return samples


def _shard_classes(root: Path, inat_category: str = '') -> range:
    """All numbers up to the largest class of train and val; `val` alone is enough where there is no `train`."""
    splits = [False, True] if _find_shards(root, True)[0] else [False]
    return range(1 + max(int(_shard_samples(root, train).targets().max()) for train in splits))


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
        lambda request: TarDataset(_tar_samples(request.root, request.train), request.transform), _tar_classes
    ),
    'wds/': DatasetSpec(
        lambda request: TarDataset(_shard_samples(request.root, request.train), request.transform), _shard_classes
    ),
    'FAKE': DatasetSpec(_open_fake, num_classes=FAKE_CLASSES),
}


def parse_name(text: str) -> str:
    """Checks the name of a data set: a key of DATA_SETS, or `wds/` with the name of a folder behind it.

    Raises:
        ValueError: there is no such data set.
    """
    if text.startswith('hfds/'):
        raise ValueError(
            f'{text}: hfds/ needs a package named datasets, and so is a module of this program named; '
            'convert the images to WebDataset shards and use wds/'
        )
    kind, slash, _ = text.partition('/')
    if kind + slash not in DATA_SETS:
        raise ValueError(f'{text} is none of {", ".join(DATA_SETS)}')
    return text


def _find_spec(name: str, root: str) -> tuple[DatasetSpec, Path]:
    """The row of a data set, and the folder it lies in: `wds/NAME` lies in the folder NAME of `root`."""
    kind, slash, folder = name.partition('/')
    return DATA_SETS[kind + slash], Path(root) / folder


def count_classes(name: str, root: str, inat_category: str = 'name', num_classes: int | None = None) -> int:
    """Size of the head a data set asks for, from its folder names or index files, without reading an image.

    Args:
        name: as `parse_name` accepts it.
        root: where it lies.
        inat_category: level of iNaturalist's taxonomy.
        num_classes: size of the head if that is to be larger than the classes found ask for; None: just that.

    Raises:
        ValueError: it is not there, `train/` and `val/` hold different classes, or there are more than `num_classes`.
        OSError: its files cannot be read.
    """
    spec, folder = _find_spec(name, root)
    names = spec.classes(folder, inat_category) if spec.classes else range(spec.num_classes)
    allowed = num_classes or spec.num_classes or len(names)
    if len(names) > allowed:
        limit = f'--num-classes {num_classes}' if num_classes else f'the {allowed} of {name}'
        raise ValueError(f'it has {len(names)} classes, the last of them is {names[-1]}: more than {limit}')
    return allowed


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
    """A split of a data set and its number of classes.

    Args:
        name: as `parse_name` accepts it.
        root: where it lies; for `IMNET` and `FOLDER` the folder that holds `train/` and `val/`.
        train: the training split, otherwise the validation split.
        transform: PIL image → tensor.
        input_size: height and width of the generated images of `FAKE`.
        inat_category: level of iNaturalist's taxonomy that is the class.
        num_classes: see `count_classes`.

    Raises:
        ValueError: it is not there, is incomplete, or `train/` and `val/` hold different classes.
        OSError: its files cannot be read.
    """
    found = count_classes(name, root, inat_category, num_classes)
    spec, folder = _find_spec(name, root)
    try:
        return spec.open(DatasetRequest(folder, train, transform, input_size, inat_category)), found
    except RuntimeError as error:  # torchvision's word for "not found or corrupted"
        raise ValueError(f'{name}: {str(error).split(".")[0]}') from error


class TrainTransform:
    """Image → bytes (3, H, W), and what is left for `transforms.DevicePreprocess`; at random as timm has it.

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
    """DeiT's training augmentation by timm; `transforms.DevicePreprocess` normalises and erases.

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
        if hasattr(dataset, 'samples') and not isinstance(dataset.samples, Samples):
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
        if hasattr(self.dataset, 'class_to_idx'):
            return {number: name for name, number in self.dataset.class_to_idx.items()}[target]
        return self.dataset.classes[target] if hasattr(self.dataset, 'classes') else str(target)

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
    return {'images': len(dataset), 'classes': num_classes, 'names': zlib.crc32(names.encode())}
