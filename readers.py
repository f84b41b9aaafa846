"""Images on the disk: decoding one, lists of them in arrays, and those inside tar files.

Images in tars are read where they lie: tars of class folders (`TAR`) and WebDataset shards (`wds/`). The headers of all
tars are read once. Their index is saved as plain arrays in the user's cache folder. It is valid as long as every tar
has the same path, size and modification time.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from loggers import log_rank0

CLASS_KEYS = ('cls', 'label')  # keys of the class in a sample's .json; the first one found is used
_VERSION = 1  # of the index; a new version makes saved indexes invalid

Arrays = dict[str, np.ndarray]


class BadImageError(ValueError):
    """An image cannot be decoded. The message names the file and the reason."""


# Decoding -------------------------------------------------------------------------------------------------------------


def load_image(name: str, path: str | Path | None = None, start: int = 0, size: int = -1) -> torch.Tensor:
    """Reads an image as RGB bytes (3, H, W). Of an animation it reads the first frame; EXIF rotation is ignored.

    torchvision decodes ordinary JPEGs, to the same bytes as PIL. PIL decodes all others.

    Args:
        name: the name in error messages, and the path if `path` is None.
        path: the file that contains the image, if that is another file, such as a tar.
        start: offset of the image in the file in bytes.
        size: size of the image in bytes; −1 for the rest of the file.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    try:
        return _decode(path or name, start, size, os.stat(path or name).st_ctime_ns)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises a dozen kinds of errors for damaged files
        reason = getattr(error, 'strerror', None) or re.sub(' <.*object at .*>', '', str(error))
        raise BadImageError(f'{name}: {reason}') from error


@lru_cache(maxsize=1)  # repeated augmentation may read an image several times in a row
def _decode(path: str | Path, start: int, size: int, ctime: int) -> torch.Tensor:
    """`ctime` makes the cached image invalid when the file changes."""
    with open(path, 'rb') as file:
        file.seek(start)
        data = file.read(size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PIL warns of unusual files that it can read
        image = Image.open(io.BytesIO(data))
        if image.format == 'JPEG' and image.mode in ('L', 'RGB'):
            with suppress(RuntimeError):  # a damaged file: PIL has the better error message
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        # PIL would clip 16-bit values at 255. It opens 16 bits as 32 in some formats.
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
        if image.mode in ('I', 'F'):
            raise ValueError(f'unsupported image mode {image.mode}')
        return to_uint8(image)


def to_uint8(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """(3, H, W) uint8 from a PIL image; a tensor is returned as it is."""
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image.convert('RGB'))


# Lists of images ------------------------------------------------------------------------------------------------------


class Samples:
    """(name, class) of each image file.

    They are kept in arrays, because every loader process would copy a list of a million Python objects.
    """

    def __init__(self, samples: Iterable[tuple[str, int]]) -> None:
        self.arrays = _pack(samples, 1)

    def __len__(self) -> int:
        return len(self.arrays['numbers'])

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        start, end = self.arrays['ends'][index : index + 2]
        return os.fsdecode(self.arrays['text'][start:end].tobytes()), int(self.arrays['numbers'][index, 0])

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """An image, (3, H, W) uint8, and its class."""
        name, target = self[index]
        return load_image(name), target


def _pack(rows: Iterable[tuple], columns: int) -> Arrays:
    """Rows (name, number, …) as arrays: all names in `text`, between `ends` (n + 1,); and `numbers` (n, columns)."""
    text, ends, numbers = bytearray(), array('q', [0]), array('q')
    for name, *values in rows:
        text += os.fsencode(name)
        ends.append(len(text))
        numbers.extend(values)
    return {
        'text': np.frombuffer(bytes(text), np.uint8),
        'ends': np.array(ends),
        'numbers': np.array(numbers, dtype=np.int64).reshape(-1, columns),
    }


class TarSamples(Samples):
    """Images inside tars. Their names are `TAR:MEMBER` or `TAR:INNER_TAR:MEMBER`.

    `arrays` is the index from `class_folders` or `webdataset`. `classes` is None if the classes have no names.
    """

    def __init__(self, tars: Sequence[Path], arrays: Arrays) -> None:
        self.tars, self.arrays = [str(path) for path in tars], arrays
        names = arrays['class_names'].tobytes()
        self.classes = os.fsdecode(names).split('/') if names else None

    def __getitem__(self, index: int) -> tuple[str, int]:
        name, target = super().__getitem__(index)
        return f'{self.place(index)[0]}:{name}', target

    def place(self, index: int) -> tuple[str, int, int]:
        """The tar that contains an image, and offset and size of the image in bytes."""
        _, tar, start, size = self.arrays['numbers'][index].tolist()
        return self.tars[tar], start, size

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """An image, (3, H, W) uint8, and its class."""
        name, target = self[index]
        # This opens the tar each time: loader processes would share an open file and its position.
        return load_image(name, *self.place(index)), target

    def targets(self) -> np.ndarray:
        """(n,) int64: the class of each image."""
        return self.arrays['numbers'][:, 0]

    def images_by_tar(self) -> list[int]:
        """The number of images in each tar."""
        return np.bincount(self.arrays['numbers'][:, 1], minlength=len(self.tars)).tolist()


# Layouts --------------------------------------------------------------------------------------------------------------


def class_folders(tars: Sequence[Path]) -> Arrays:
    """Index of tars with a folder per class, or a tar per class, which may be inside another tar.

    Classes are numbered in alphabetical order, like those of a tree of folders. Images are sorted by their path in the
    tar, with numbers as numbers: 9.png comes before 10.png.
    """
    rows = []
    for number, path in enumerate(tars):
        with _open_tar(path) as (file, end):
            rows += [(*row, number) for row in _images_by_folder(file, end, path.stem)]
    rows.sort(key=lambda row: natural_key(row[0]))
    classes = sorted({label for _, _, label, *_ in rows})
    numbers = {label: i for i, label in enumerate(classes)}
    packed = _pack(((name, numbers[label], tar, start, size) for _, name, label, start, size, tar in rows), 4)
    return {**packed, 'class_names': np.frombuffer(os.fsencode('/'.join(classes)), np.uint8)}


def _images_by_folder(file: BinaryIO, end: int, tar: str, prefix: str = '') -> Iterator[tuple[str, str, str, int, int]]:
    """(path, name, class, offset, size) of each image, also in inner tars."""
    for member in _read_members(file, end):
        path, ending = PurePosixPath(member.name), os.path.splitext(member.name)[1].lower()
        if ending == '.tar':
            file.seek(member.offset_data)
            yield from _images_by_folder(file, member.offset_data + member.size, path.stem, f'{prefix}{member.name}:')
        elif ending in IMG_EXTENSIONS:
            yield member.name, prefix + member.name, path.parent.name or tar, member.offset_data, member.size


def webdataset(tars: Sequence[Path]) -> Arrays:
    """Index of WebDataset samples in shard order. A sample is adjacent files with the same name up to the first dot.

    The class is the number in the `.cls` file. A sample without one has it in its `.json` file as `cls` or `label`.
    """

    def rows() -> Iterator[tuple[str, int, int, int, int]]:
        for number, path in enumerate(tars):
            with _open_tar(path) as (file, end):
                for image, target in _read_shard(file, end):
                    yield image.name, target, number, image.offset_data, image.size

    return {**_pack(rows(), 4), 'class_names': np.zeros(0, np.uint8)}


def _read_shard(file: BinaryIO, end: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Image and class of each sample."""
    for name, members in groupby(_read_members(file, end), key=lambda member: _split_name(member.name)[0]):
        files = {_split_name(member.name)[1]: member for member in members}
        image = next((files[ending] for ending in IMG_EXTENSIONS if ending in files), None)
        target = files.get('.cls', files.get('.json'))
        if not os.path.basename(name) or (image is None and target is None):
            continue  # a hidden file, or one that belongs to no sample
        if image is None or target is None:
            missing = f'image ({" ".join(IMG_EXTENSIONS)})' if image is None else 'class (.cls or .json)'
            raise ValueError(f'sample {name} has no {missing}; the files of a sample must be adjacent')
        file.seek(target.offset_data)
        yield image, _read_class(file.read(target.size), target.name)


def _split_name(path: str) -> tuple[str, str]:
    """'a/0001.seg.PNG' → 'a/0001', '.seg.png'."""
    folder, slash, base = path.rpartition('/')
    stem, dot, ending = base.partition('.')
    return folder + slash + stem, dot + ending.lower()


def _read_class(data: bytes, member: str) -> int:
    in_json = member.lower().endswith('.json')
    try:
        value: Any = json.loads(data) if in_json else int(data)
        if in_json:
            value = next(value[key] for key in CLASS_KEYS if key in value)
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError
    except (StopIteration, TypeError, ValueError) as error:
        where = f' as {" or ".join(CLASS_KEYS)}' if in_json else ''
        raise ValueError(f'{member} must contain a class number{where}, but contains {data[:60]!r}') from error
    return value


# Headers --------------------------------------------------------------------------------------------------------------


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes. Errors raised while it is open name the tar."""
    with open(path, 'rb') as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except tarfile.TarError as error:
            raise ValueError(f'{path} is not a complete tar file: {error}') from error
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error


def _read_members(file: BinaryIO, end: int) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, which starts at the position of `file` and ends before byte `end`."""
    with tarfile.open(fileobj=file, mode='r:') as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # the list of all members is not needed
            if tar.offset > end:
                raise tarfile.ReadError(f'{member.name} is truncated')
            if member.isfile():
                yield member
        # A tar ends with a block of zeros. tarfile also stops, without an error, at a damaged header.
        file.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f'damaged or truncated at byte {tar.offset:,}')


# The saved index ------------------------------------------------------------------------------------------------------


def open_index(tars: Sequence[Path], layout: Callable[[Sequence[Path]], Arrays]) -> TarSamples:
    """The images in tars with `layout` class_folders or webdataset, from the saved index if valid, else the headers.

    Raises:
        OSError: a tar cannot be read.
        ValueError: a tar is damaged or has another layout; names the tar.
    """
    stamps = tuple((info.st_size, info.st_mtime_ns) for info in map(os.stat, tars))
    return TarSamples(tars, _open_index(tuple(tars), stamps, layout))


@lru_cache(maxsize=4)  # each split is opened twice: for its classes, then for its images
def _open_index(tars: tuple[Path, ...], stamps: tuple, layout: Callable[[Sequence[Path]], Arrays]) -> Arrays:
    folder = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'manifold-distillation'
    names = '\0'.join([layout.__name__, str(_VERSION), *map(os.path.abspath, tars)])
    path = folder / f'tars-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.npz'
    arrays = _load_index(path, stamps)
    if arrays is None:
        log_rank0(f'index       reading the headers of {len(tars):,} tar file{"s"[: len(tars) != 1]}')
        arrays = {**layout(tars), 'stamps': np.array(stamps, dtype=np.int64)}
        _save_index(path, arrays)
    return arrays


def _load_index(path: Path, stamps: tuple) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ('text', 'ends', 'numbers', 'class_names', 'stamps')}
    except Exception:  # whatever is wrong with the file, the index can be made again
        return None
    return arrays if np.array_equal(arrays['stamps'], stamps) else None


def _save_index(path: Path, arrays: Arrays) -> None:
    """Writes the index atomically. If that fails, it costs only the time to make the index again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # not `allow_pickle`
            os.replace(temporary, path)
    except OSError as error:
        log_rank0(f'warning: cannot save the index of the tar files, it will be rebuilt at each start: {error}')
