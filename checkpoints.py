"""Files of weights and of runs: read safely, written durably, found again after whatever happened.

A run leaves in its folder `checkpoint.pth` (the last state), `checkpoint-<step>.pth` (the ones before it),
`best_checkpoint.pth` and `log.txt`. Only tensors and plain types are in them; a checksum stands in the comment of the
zip archive that torch writes, so plain `torch.load` reads them too.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import safetensors.torch
import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor
from torch.hub import download_url_to_file, get_dir

FORMAT = 1
LOG, BEST, LAST = 'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'pytorch_model.pth')  # as timm names them
KEPT = (LOG, BEST, LAST)  # in the order they are written: once the last one is there, all of the epoch is kept
EARLIER = re.compile(r'checkpoint-(\d{8,})\.pth')
_NOT_A_CHECKPOINT = 'is damaged, or no file of weights'


# Reading --------------------------------------------------------------------------------------------------------------


def read_checkpoint(source: str | Path) -> dict:
    """The contents of a weights file, on the CPU; nothing is unpickled but tensors and plain types.

    Args:
        source: a path, a URL (downloaded once into torch's hub folder), `hf-hub:OWNER/NAME` or `local-dir:FOLDER` with
            one file of weights under a usual name; `.safetensors` or torch's own format.

    Raises:
        OSError: it is not there or cannot be downloaded.
        ValueError: it cannot be read safely, is damaged, or holds no dictionary.
    """
    return _read(source)[0]


def _read(source: str | Path) -> tuple[dict, bool]:
    """The contents, and whether a checksum vouches for them."""
    kind, _, rest = str(source).partition(':')
    if kind in ('hf-hub', 'hf_hub'):
        return _read_hub(rest), False
    if kind == 'local-dir':
        source = _find_weights(Path(rest))
    url = '://' in str(source)
    path = _download(str(source)) if url else Path(source)
    with open(path, 'rb') as file:  # what the system has to say comes first: not there, a folder, no permission
        if path.suffix == '.safetensors':
            return _read_safetensors(path), False
        sealed = _check_seal(file)
        try:
            # Released files of 2020-2022 hold the flags of their run as a Namespace, a plain bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of a file it cannot read torch warns first
                checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch raises a dozen kinds for one thing
            found = re.search(r'GLOBAL (\S+)', str(error))
            reason = f'holds {found[1]}, and only tensors and plain types are read' if found else _NOT_A_CHECKPOINT
            raise ValueError(reason + (f' (downloaded to {path})' if url else '')) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'holds a {type(checkpoint).__name__}, not a dictionary of weights')
    return checkpoint, sealed


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(_NOT_A_CHECKPOINT) from error


def _read_hub(name: str) -> dict[str, Tensor]:
    try:
        return load_state_dict_from_hf(name, weights_only=True)
    except Exception as error:  # the hub's client has a dozen kinds
        raise ValueError(f'cannot be had from the hub: {" ".join(str(error).split())}') from error


def _find_weights(folder: Path) -> Path:
    """The file of weights in a folder that was saved for the hub."""
    found = [folder / name for name in HUB_FILES if (folder / name).exists()]
    if not found:
        raise ValueError(f'there is none of {", ".join(HUB_FILES)} in it')
    return found[0]


def _download(url: str) -> Path:
    # torch.hub.load_state_dict_from_url would unpickle whatever the file asks for; only its download is used.
    # The hash tells two files of one name apart.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
    path = Path(get_dir()) / 'checkpoints' / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), progress=False)
    return path


# A zip archive ends with the length of its comment, two bytes, and the comment.
_SEAL = b'sha256:'
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size * 2


def _seal(archive: bytes | memoryview) -> bytes:
    """The last bytes of the archive with its checksum as its comment; they take the place of the last two."""
    return struct.pack('<H', _SEAL_BYTES) + _SEAL + hashlib.sha256(archive[:-2]).hexdigest().encode()


def _check_seal(file: BinaryIO) -> bool:
    """Whether a file has a checksum; it is rewound.

    Raises:
        ValueError: the checksum does not hold.
    """
    size = file.seek(0, os.SEEK_END) - 2 - _SEAL_BYTES
    file.seek(max(size, 0))
    end = file.read()
    file.seek(0)
    if size < 0 or not end.startswith(struct.pack('<H', _SEAL_BYTES) + _SEAL):
        return False
    digest = hashlib.sha256()
    while size:
        chunk = file.read(min(size, 1 << 20))
        digest.update(chunk)
        size -= len(chunk)
    file.seek(0)
    if end[-digest.digest_size * 2 :] != digest.hexdigest().encode():
        raise ValueError('is damaged: its checksum does not hold')
    return True


# Contents -------------------------------------------------------------------------------------------------------------


def has_progress(checkpoint: dict) -> bool:
    """Whether a checkpoint tells how far its run had come, or holds weights alone."""
    return {'optimizer', 'lr_scheduler', 'epoch'} <= checkpoint.keys()


def flags_of(checkpoint: dict) -> dict:
    """The flags of the run that wrote a checkpoint, none if it does not tell them."""
    flags = checkpoint.get('args')
    return vars(flags) if isinstance(flags, argparse.Namespace) else flags if isinstance(flags, dict) else {}


# Finding --------------------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """The states of a run that are there, newest first, the best one as the last resort."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if EARLIER.fullmatch(path.name)]
    earlier = sorted(found, key=step_of, reverse=True)
    return [path for path in (folder / LAST, *earlier, folder / BEST) if path.exists()]


def step_of(path: Path) -> int:
    return int(EARLIER.fullmatch(path.name)[1])


def read_newest(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest state in a run's folder that is whole.

    Returns:
        Its path, its contents, and what is wrong with the newer ones, a line each.

    Raises:
        ValueError: none is whole; says what is wrong with each.
    """
    faults = []
    for path in find_checkpoints(folder):
        try:
            checkpoint, sealed = _read(path)
            if 'format' in checkpoint and not sealed:
                raise ValueError('is damaged: its checksum is gone')
            return path, checkpoint, faults
        except (OSError, ValueError) as error:
            faults.append(f'{path.name} {getattr(error, "strerror", None) or error}')
    raise ValueError(f'{folder} holds no checkpoint that can be read: {"; ".join(faults) or "there is none"}')


def read_log(path: Path) -> list[dict]:
    """The rows of a log, none if there is no file.

    Raises:
        ValueError: a line is no JSON object with an epoch.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict) or not isinstance(rows[-1].get('epoch'), int):
            raise ValueError(f'line {number} of {path} is no row of a log of epochs')
    return rows


# Writing --------------------------------------------------------------------------------------------------------------


def write_durably(path: Path, data: bytes | memoryview, before_replace: Callable[[], None] | None = None) -> None:
    """Replaces a file in one step: whatever happens, the old or the new one is there, whole, and nothing else.

    Args:
        path: of the file.
        data: its new contents.
        before_replace: called once the new contents are on the disk, under another name.

    Raises:
        OSError: the disk is full or broken; the old file is as it was.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if before_replace is not None:
            before_replace()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Makes the new name of a file as lasting as its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


def serialize(contents: dict) -> memoryview:
    """A checkpoint as the bytes of its file, sealed with their checksum."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    seal = _seal(buffer.getbuffer())
    buffer.seek(-2, os.SEEK_END)
    buffer.write(seal)
    return buffer.getbuffer()
