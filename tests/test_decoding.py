"""Decoding: all images have the pixels that Pillow reads."""

import warnings

import numpy as np
import pytest
import torch
import toys
from PIL import Image

import readers
from datasets import BadImageError, build_dataset


def oddity(kind):
    """An unusual image file as some data sets contain it, and its file extension."""
    image = toys.noise(40, 24)
    if kind == 'cmyk':
        return toys.encoded(image.convert('CMYK'), 'JPEG'), 'jpeg'
    if kind == 'grey':
        return toys.encoded(image.convert('L'), 'JPEG'), 'jpeg'
    if kind == 'grey and alpha':
        return toys.encoded(image.convert('LA'), 'PNG'), 'png'
    if kind == 'palette and alpha':
        return toys.encoded(image.convert('P'), 'PNG', transparency=bytes(range(256))), 'png'
    if kind == 'one bit':
        return toys.encoded(image.convert('1'), 'PNG'), 'png'
    if kind == 'animated':
        frames = [toys.noise(40, 24, seed).convert('P') for seed in (1, 2)]
        return toys.encoded(toys.noise(40, 24), 'WEBP', save_all=True, append_images=frames, lossless=True), 'webp'
    if kind == 'animated gif':
        return toys.encoded(
            image, 'GIF', save_all=True, append_images=[toys.noise(40, 24, 1)]
        ), 'png'  # the extension does not matter
    assert kind == 'rotated'
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90°
    return toys.encoded(image, 'JPEG', exif=exif), 'jpeg'


KINDS = (
    'cmyk',
    'grey',
    'grey and alpha',
    'palette and alpha',
    'one bit',
    'animated',
    'animated gif',
    'rotated',
)


@pytest.mark.R11
@pytest.mark.parametrize('kind', KINDS)
def test_unusual_image_has_the_pixels_that_pillow_reads(tmp_path, kind):
    data, ending = oddity(kind)
    path = tmp_path / 'val' / 'a' / f'odd.{ending}'
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = Image.open(path).convert('RGB')
    assert expected.size == (40, 24)
    (found, _), *others = build_dataset('FOLDER', str(tmp_path), False)[0]
    assert (found.dtype, others) == (torch.uint8, [])
    assert torch.equal(found, toys.as_bytes(expected))
    assert found.float().std() > 1


def test_16_bits_become_8_and_unknown_modes_are_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for ending in ('png', 'tiff', 'pgm'):
        Image.fromarray(ramp).save(tmp_path / f'deep.{ending}')
        image = readers.load_image(str(tmp_path / f'deep.{ending}'))
        assert image.tolist() == [[list(range(16 * row, 16 * row + 16)) for row in range(16)]] * 3
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(BadImageError, match=r'float\.tiff: unsupported image mode F'):
        readers.load_image(str(tmp_path / 'float.tiff'))


def test_error_for_a_file_that_is_no_image_has_no_object_address(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    with pytest.raises(BadImageError, match=r'a\.png: cannot identify image file$'):
        readers.load_image(str(tmp_path / 'a.png'))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('subsampling', [0, 1, 2])
def test_jpeg_has_the_bytes_of_pillow(tmp_path, monkeypatch, mode, subsampling):
    options = {'quality': 90, 'subsampling': subsampling, 'progressive': subsampling == 1}
    (tmp_path / 'a.jpg').write_bytes(toys.encoded(toys.noise(37, 23).convert(mode), 'JPEG', **options))
    decoded, decode = [], readers.decode_jpeg
    monkeypatch.setattr(readers, 'decode_jpeg', lambda *args: decoded.append(1) or decode(*args))
    found = readers.load_image(str(tmp_path / 'a.jpg'))
    assert torch.equal(found, toys.as_bytes(Image.open(tmp_path / 'a.jpg').convert('RGB')))
    assert decoded == [1]
