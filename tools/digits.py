"""Writes scikit-learn's handwritten digits as a tree of class folders.

    python tools/digits.py runs/digits

1,797 real 8×8 scans (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998), enlarged to
32×32 by repeating pixels. Every fifth image is for validation.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(root: Path) -> None:
    """Writes root/{train,val}/<digit>/<number>.png. A second call writes the same files."""
    digits = load_digits()
    for i, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ('train' if i % 5 else 'val') / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.rint(scan * (255 / 16)).astype(np.uint8)  # pixel values are 0 to 16
        Image.fromarray(grey.repeat(4, axis=0).repeat(4, axis=1)).save(folder / f'{i:04}.png')


if __name__ == '__main__':
    write_digits(Path(sys.argv[1]))
