"""Images inside tar files, read where they lie: tars of class folders (`TAR`) and WebDataset shards (`wds/`).

The headers of all tars are read once. The index made of them is kept as plain arrays in the user's cache folder, and
counts as long as every tar has the same path, size and modification time.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from loggers import log_rank0

CLASS_KEYS = ('cls', 'label')  # of a sample's .json, the first that is there
_VERSION = 1  # of the index: another one makes kept indexes void

Arrays = dict[str, np.ndarray]


class Samples:
    """(name, class) of each image, in arrays: a million Python objects would be copied into every loader process.

    Args:
        samples: the same as a list.
    """

    def __init__(self, samples: Iterable[tuple[str, int]]) -> None:
        self.arrays = _pack(samples, 1)

    def __len__(self) -> int:
        return len(self.arrays['numbers'])

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        start, end = self.arrays['ends'][index : index + 2]
        return os.fsdecode(self.arrays['text'][start:end].tobytes()), int(self.arrays['numbers'][index, 0])


def _pack(rows: Iterable[tuple], columns: int) -> Arrays:
    """Rows (name, number, …) as arrays: `text` of all names, `ends` (n + 1,) of each in it, `numbers` (n, columns)."""
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
    """Images inside tars; the name of one is `TAR:MEMBER`, or `TAR:INNER_TAR:MEMBER`.

    Args:
        tars: paths of the tars.
        arrays: what a layout returns.

    Attributes:
        classes: names of the classes, where the tars have such names.
    """

    def __init__(self, tars: Sequence[Path], arrays: Arrays) -> None:
        self.tars, self.arrays = [str(path) for path in tars], arrays
        names = arrays['class_names'].tobytes()
        self.classes = os.fsdecode(names).split('/') if names else None

    def __getitem__(self, index: int) -> tuple[str, int]:
        name, target = super().__getitem__(index)
        return f'{self.place(index)[0]}:{name}', target

    def place(self, index: int) -> tuple[str, int, int]:
        """The tar an image is in, where in it the image begins, and its size, both in bytes."""
        _, tar, start, size = self.arrays['numbers'][index].tolist()
        return self.tars[tar], start, size

    def targets(self) -> np.ndarray:
        """(n,) int64: the class of each image."""
        return self.arrays['numbers'][:, 0]

    def images_by_tar(self) -> list[int]:
        """The number of images in each tar."""
        return np.bincount(self.arrays['numbers'][:, 1], minlength=len(self.tars)).tolist()


# Layouts --------------------------------------------------------------------------------------------------------------


def class_folders(tars: Sequence[Path]) -> Arrays:
    """The index of images by class: the folder an image lies in, or else the tar it lies in, which may be an inner one.

    Classes are numbered as they are sorted, like those of a tree of folders. Images are sorted by their path in the
    tar, in which numbers count as such.
    """
    rows = []
    for number, path in enumerate(tars):
        with _open_tar(path) as (file, end):
            rows += [(*row, number) for row in _images_by_folder(file, end, path.stem, '')]
    rows.sort(key=lambda row: natural_key(row[0]))
    classes = sorted({label for _, _, label, *_ in rows})
    numbers = {label: i for i, label in enumerate(classes)}
    packed = _pack(((name, numbers[label], tar, start, size) for _, name, label, start, size, tar in rows), 4)
    return {**packed, 'class_names': np.frombuffer(os.fsencode('/'.join(classes)), np.uint8)}


def _images_by_folder(file: BinaryIO, end: int, tar: str, prefix: str) -> Iterator[tuple[str, str, str, int, int]]:
    """(path, name, class, start, size) of each image, those in inner tars too."""
    for member in _read_members(file, end):
        folder, base = os.path.split(member.name)
        stem, ending = os.path.splitext(base)
        if ending.lower() == '.tar':
            file.seek(member.offset_data)
            inner_end = member.offset_data + member.size
            yield from _images_by_folder(file, inner_end, stem, f'{prefix}{member.name}:')
        elif ending.lower() in IMG_EXTENSIONS:
            label = [tar, *(part for part in folder.split('/') if part not in ('', '.'))][-1]
            yield member.name, prefix + member.name, label, member.offset_data, member.size


def webdataset(tars: Sequence[Path]) -> Arrays:
    """The index of WebDataset samples: neighbours with equal names up to the first dot, in the order of the shards.

    The class is the number in `.cls`; without such a file that in `.json`, under `cls` or else `label`.
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
            continue  # a hidden file, or something beside the samples
        if image is None or target is None:
            missing = f'image ({" ".join(IMG_EXTENSIONS)})' if image is None else 'class (.cls or .json)'
            raise ValueError(f'sample {name} has no {missing}; the files of a sample must follow one another')
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
        where = f' under {" or ".join(CLASS_KEYS)}' if in_json else ''
        raise ValueError(f'{member} must hold the number of a class, 0 or more{where}; has {data[:60]!r}') from error
    return value


# Headers --------------------------------------------------------------------------------------------------------------


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; errors name it."""
    with open(path, 'rb') as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except tarfile.TarError as error:
            raise ValueError(f'{path}: not a whole tar file: {error}') from error
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error


def _read_members(file: BinaryIO, end: int) -> Iterator[tarfile.TarInfo]:
    """The files in the tar that begins where `file` stands and ends before byte `end`.

    Raises:
        tarfile.TarError: it is damaged or cut off.
    """
    with tarfile.open(fileobj=file, mode='r:') as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember all of them
            if tar.offset > end:
                raise tarfile.ReadError(f'{member.name} is cut off')
            if member.isfile():
                yield member
        # tarfile takes a damaged header, or the end of the file, for the end of the tar, which is a block of zeros.
        file.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f'damaged or cut off at byte {tar.offset:,}')


# The kept index -------------------------------------------------------------------------------------------------------


def open_index(tars: Sequence[Path], layout: Callable[[Sequence[Path]], Arrays]) -> TarSamples:
    """The images in tars, from the kept index if there is one of the same tars, else from their headers.

    Args:
        tars: their paths.
        layout: `class_folders` or `webdataset`.

    Raises:
        OSError: a tar cannot be read.
        ValueError: a tar is damaged, or is not laid out so; names the tar.
    """
    stamps = tuple((info.st_size, info.st_mtime_ns) for info in map(os.stat, tars))
    return TarSamples(tars, _open_index(tuple(tars), stamps, layout))


@lru_cache(maxsize=4)  # both splits are asked for their classes first, and for their images later
def _open_index(tars: tuple[Path, ...], stamps: tuple, layout: Callable[[Sequence[Path]], Arrays]) -> Arrays:
    path = _kept_at(tars, layout.__name__)
    arrays = _read_kept(path, stamps)
    if arrays is None:
        log_rank0(f'index       reading the headers of {len(tars):,} tar file{"s"[: len(tars) != 1]}')
        arrays = {**layout(tars), 'stamps': np.array(stamps, dtype=np.int64)}
        _keep(path, arrays)
    return arrays


def _kept_at(tars: Sequence[Path], layout: str) -> Path:
    folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    names = '\0'.join([layout, str(_VERSION), *map(os.path.abspath, tars)])
    return Path(folder) / 'manifold-distillation' / f'tars-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.npz'


def _read_kept(path: Path, stamps: tuple) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ('text', 'ends', 'numbers', 'class_names', 'stamps')}
    except Exception:  # whatever is wrong with it, the tars tell the same
        return None
    return arrays if np.array_equal(arrays['stamps'], stamps) else None


def _keep(path: Path, arrays: Arrays) -> None:
    """Writes the index as a whole or not at all; that costs only the time to make it again."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]  # mypy takes `allow_pickle` for one of them
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
            temporary = file.name
            file.write(data.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        log_rank0(f'warning: the index of the tar files is made again at each start, it cannot be kept: {error}')
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
