"""One run per folder: a lock that ends with the process that holds it."""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import utils
from checkpoints import LOCK
from loggers import log_rank0
from utils import UsageError, usage_error_context

WAIT = 25.0  # seconds until a folder that is in use is refused: a run that was stopped saves in this time


class NotSavedError(Exception):
    """The state of a run could not be written."""


_locks: dict[Path, IO[str]] = {}  # open files, by path: closing one releases its lock


def lock(output_dir: str) -> None:
    """Reserves an existing folder for this run, until `unlock` or the end of the process.

    It is the process that holds the lock: a file `.lock` that a killed run has left means nothing. Loader processes do
    not inherit it.

    Raises:
        UsageError: another run has reserved it.
    """
    path, holder = Path(output_dir).resolve() / LOCK, ''
    if utils.get_rank() == 0 and path.parent.is_dir() and path not in _locks:
        with usage_error_context('--output_dir', output_dir):
            until = time.monotonic() + WAIT
            while (holder := _try_lock(path)) and time.monotonic() < until:
                time.sleep(0.5)
    if holder := utils.gather_objects(holder)[0]:
        advice = f'if that process no longer exists, delete {path}'
        raise UsageError(f'--output_dir {output_dir}: is used by another run, {holder}; {advice}')


def _try_lock(path: Path) -> str:
    """Locks a file, and returns '' or, if another process has locked it, which one."""
    file = open(path, 'a+')  # noqa: SIM115 (stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            with file:
                file.seek(0)
                return file.read().strip() or 'of an unknown process'
        log_rank0(f'warning: {path.parent}: cannot be locked against other runs: {error.strerror}')
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()
        return _try_lock(path)  # the run before removed the file in this moment
    _locks[path] = file
    with suppress(OSError):  # a full disk
        file.truncate(0)
        print(f'process {os.getpid()} on {socket.gethostname()}', file=file, flush=True)
    return ''


def keep(folder: Path) -> None:
    """Locks a folder again that was locked, if the file `.lock` or the folder was removed meanwhile.

    Raises:
        NotSavedError: another run uses the folder now.
    """
    path = folder.resolve() / LOCK
    file = _locks.get(path)
    if file is None or (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        return
    holder = _try_lock(path)
    file.close()  # its file is gone
    if holder:
        raise NotSavedError(f'{LOCK} was removed from --output_dir {folder}, which is now used by {holder}')


def unlock() -> None:
    """Ends all locks of this process."""
    while _locks:
        path, file = _locks.popitem()
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            file.close()
