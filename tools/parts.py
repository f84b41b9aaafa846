"""Parts of a data set of class folders: chosen by a fixed rule, and made as a folder of links.

The images of a class are put in the order of the SHA-256 sum of `<class>/<file name>`. Part `tune` takes them from the
start, `confirm` from the end, and neither takes more than half of a class: the two have no image in common. A smaller
part is contained in a larger one.
"""

import hashlib
import os
import shutil
from pathlib import Path

from tools.digits import write_digits
from utils import UsageError

PARTS = ('tune', 'confirm', 'all')


def choose(label: str, names: list[str], count: int | None, part: str) -> list[str]:
    """The file names of a class that belong to a part; all of them with part `all` and no count.

    Raises:
        UsageError: the class has too few images.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f'{label}/{name}'.encode()).digest())
    most = len(order) if part == 'all' else len(order) // 2
    count = most if count is None else count
    if count > most:
        raise UsageError(f'{label}: {count} images for part {part}, but there are {len(order)}; at most {most}')
    return order[len(order) - count :] if part == 'confirm' else order[:count]


def link_part(source: Path, target: Path, counts: dict[str, int | None], part: str) -> None:
    """Makes target/{train,val}/<class>/ with links to the chosen images of the same folders in source.

    Args:
        source: a data set in class folders.
        target: the folder to make. It appears when it is complete; if it exists, nothing is done.
        counts: images per class by split; None: as many as the part may have.
        part: one of `PARTS`.

    Raises:
        UsageError: source has no such folders, or a class has too few images.
    """
    if target.exists():
        return
    unfinished = target.with_name(f'{target.name}.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, count in counts.items():
        folders = [path for path in sorted((source / split).glob('*')) if path.is_dir() and path.name[0] != '.']
        if not folders:
            raise UsageError(f'{source / split}: has no class folders')
        for folder in folders:
            own = unfinished / split / folder.name
            own.mkdir(parents=True)
            names = [path.name for path in folder.iterdir() if path.is_file() and path.name[0] != '.']
            for name in choose(folder.name, names, count, part):
                _link((folder / name).resolve(), own / name)
    unfinished.rename(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        target.symlink_to(source)


def write_digits_once(target: Path) -> None:
    """Writes the digits. The folder appears when it is complete."""
    if not target.exists():
        unfinished = target.with_name(f'{target.name}.unfinished')
        write_digits(unfinished)
        unfinished.rename(target)
