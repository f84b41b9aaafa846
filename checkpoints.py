"""Weights files and checkpoints: read safely, write durably, find the newest.

A run has in its folder `checkpoint.pth` (the newest state), `checkpoint-<step>.pth` (older ones), `best_checkpoint.pth`
and `log.txt`. Checkpoints contain only tensors and plain types, so that `torch.load(weights_only=True)` reads them.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import safetensors.torch
import torch
from huggingface_hub import logging as hub_logging
from timm.models import load_state_dict_from_hf
from torch.hub import download_url_to_file, get_dir

import utils

FORMAT = 1
LOG, BEST, LAST, LOCK = 'log.txt', 'best_checkpoint.pth', 'checkpoint.pth', '.lock'
KEPT = (LOG, BEST, LAST)  # in the order of writing: once the last one is written, the whole epoch is saved
EARLIER = re.compile(r'checkpoint-(\d{8,})\.pth')
HUB_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'pytorch_model.pth')  # the names timm uses
FOLDER_BIT = 0x10  # of a zip member's attributes; torch then reads nothing and returns uninitialized memory
_UNREADABLE = 'is damaged or not a weights file'
_ONLY_PLAIN = 'only tensors and plain types are loaded, so save model.state_dict() and not the model'
# How files start that are often taken for weights.
_OTHER_FILES = {
    b'version https://git-lfs': ': it is a pointer of Git LFS; fetch the file itself with `git lfs pull`',
    b'<': ': it is an HTML or XML page; was the address that of a download?',
}

# Reading --------------------------------------------------------------------------------------------------------------


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """Reads a weights file on the CPU. Nothing is unpickled but tensors, plain types and `argparse.Namespace`.

    Args:
        source: a path, a URL (downloaded once into torch's hub folder), `hf-hub:OWNER/NAME`, or `local-dir:FOLDER` for
            a folder that has one of `HUB_FILES`. The file is in the format of torch or of safetensors.

    Raises:
        OSError: the file does not exist or cannot be downloaded.
        ValueError: the file is damaged, is not safe to read, or does not contain a dictionary.
    """
    kind, _, rest = str(source).partition(':')
    if kind in ('hf-hub', 'hf_hub'):
        hub_logging.set_verbosity_error()  # it prints a warning for each of its ten attempts
        try:
            return load_state_dict_from_hf(rest, weights_only=True)
        except Exception as error:  # the Hub's client raises many types
            raise ValueError(f'download from the Hub failed: {" ".join(str(error).split())}') from error
    if kind == 'local-dir':
        found = [Path(rest) / name for name in HUB_FILES if (Path(rest) / name).exists()]
        if not found:
            raise ValueError(f'contains none of {", ".join(HUB_FILES)}')
        source = found[0]
    is_url = '://' in str(source)
    path = _download(str(source)) if is_url else Path(source)
    cached = f' (downloaded to {path}; delete it to download it again)' if is_url else ''
    _check_is_file(path)
    with open(path, 'rb') as file:
        try:
            checkpoint = _read_file(file, path)
        except ValueError as error:
            raise ValueError(f'{error}{cached}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'contains a {type(checkpoint).__name__}, not a dictionary of weights')
    return checkpoint


def _check_is_file(path: Path) -> None:
    """Raises OSError if there is no such file, with what is probably meant."""
    if path.is_dir():
        found = [path / name for name in (LAST, BEST, *HUB_FILES) if (path / name).exists()]
        hint = f'; did you mean {found[0]}?' if found else ''
        raise IsADirectoryError(errno.EISDIR, f'is a folder{hint}', str(path))
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT) + utils.path_hint(path), str(path))


def _read_file(file: BinaryIO, path: Path) -> object:
    """The contents of a file in the format of torch or of safetensors, whatever its name is."""
    head = file.read(64)
    file.seek(0)
    if head[8:9] == b'{':  # after the length of its header
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(_UNREADABLE) from error
    try:
        return _read_torch(file)
    except ValueError as error:
        what = next((text for start, text in _OTHER_FILES.items() if head.lstrip().startswith(start)), '')
        raise ValueError(f'{error}{what}') from error


def _read_torch(file: BinaryIO) -> object:
    _check_archive(file)
    try:
        # Files of the release and of DeiT contain the flags of their run as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns before it fails
            return torch.load(file, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a file that it cannot read
        found = re.search(r'GLOBAL (\S+)', str(error))
        reason = f'contains {found[1]}; {_ONLY_PLAIN}' if found else _UNREADABLE
        raise ValueError(reason) from error


def _check_archive(file: BinaryIO) -> None:
    """Compares the members of a zip archive with their checksums, which torch writes but does not check."""
    try:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
            # torch can be told to write no checksums; they are all 0 then.
            damaged = any(member.CRC for member in members) and archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'wrong checksum of {damaged}')
            if any(member.external_attr & FOLDER_BIT for member in members):
                raise zipfile.BadZipFile('a member is marked as a folder')
    except Exception as error:  # a damaged header can lead to any type
        raise ValueError(f'is damaged: {" ".join(str(error).split()) or type(error).__name__}') from error
    file.seek(0)


def _download(url: str) -> Path:
    # Not torch.hub.load_state_dict_from_url: it reads no safetensors, and it unpacks other archives next to the file.
    # The hash keeps files of the same name apart.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
    path = Path(get_dir()) / 'checkpoints' / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), progress=False)
    return path


def has_progress(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint contains the progress of its run, and not weights alone."""
    return {'optimizer', 'lr_scheduler', 'epoch'} <= checkpoint.keys()


def flags_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint, {} if they are not in it."""
    flags = checkpoint.get('args')
    return vars(flags) if isinstance(flags, argparse.Namespace) else flags if isinstance(flags, dict) else {}


# Finding --------------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step in the name of a `checkpoint-<step>.pth`."""
    return int(path.stem.removeprefix('checkpoint-'))


def find_earlier(folder: Path) -> list[Path]:
    """The `checkpoint-<step>.pth` of a run, newest first."""
    found = (path for path in folder.glob('checkpoint-*.pth') if EARLIER.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def find_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, newest first, the best one last."""
    return [path for path in (folder / LAST, *find_earlier(folder), folder / BEST) if path.exists()]


def read_newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Returns path and contents of the newest undamaged checkpoint of a run, and an error message for each newer one.

    Raises:
        ValueError: none can be read; the message gives the reason for each.
    """
    errors: list[str] = []
    for path in find_checkpoints(folder):
        try:
            return path, read_checkpoint(path), errors
        except (OSError, ValueError) as error:
            errors.append(f'{path.name} {getattr(error, "strerror", None) or error}')
    raise ValueError(f'no checkpoint in {folder} can be read: {"; ".join(errors) or "there is none"}')


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, none if there is no file. Raises ValueError if a line is not a JSON object with an epoch."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text().rstrip().splitlines() if path.exists() else ()
    for number, line in enumerate(lines, start=1):
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict) or not isinstance(rows[-1].get('epoch'), int):
            raise ValueError(f'line {number} of {path} is not a log row: it must be a JSON object with an epoch')
    return rows


# Writing --------------------------------------------------------------------------------------------------------------


def write_durably(path: Path, data: bytes | memoryview, before_replace: Callable[[], None] | None = None) -> None:
    """Replaces a file in one step. Whatever happens, either the old or the new file is there, complete.

    It calls `before_replace` when the new contents are on the disk under a temporary name. After an OSError the old
    file is unchanged.
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
    """Makes the new name of a file survive a power failure, like its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system supports it
            raise
    finally:
        os.close(handle)


def serialize(contents: dict[str, Any]) -> memoryview:
    """Returns the bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getbuffer()
