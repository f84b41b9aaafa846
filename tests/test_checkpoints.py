"""checkpoints.py: files are read safely, written durably and found again."""

import argparse
import email.message
import errno
import hashlib
import io
import os
import pickle
import random
import re
import struct
import zipfile

import huggingface_hub
import pytest
import safetensors.torch
import torch
import toys
from states import Disk, contents

import checkpoints
import models
import stopping
from checkpoints import read_checkpoint, read_log, read_newest, write_durably

# Reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's hub folder, inside the test's own folder."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub'


@pytest.mark.R7
def test_url_loads(toy, tmp_path, hub):
    torch.save({'model': toy().state_dict()}, tmp_path / 'released.pth')
    checkpoint = read_checkpoint((tmp_path / 'released.pth').as_uri())
    toys.assert_same(dict(models.named_weights(checkpoint)), dict(toy().state_dict()))
    assert list(hub.rglob('*.pth'))


@pytest.mark.R7
def test_url_of_safetensors_loads(toy, tmp_path, hub):
    state = toy().state_dict()
    safetensors.torch.save_file(state, tmp_path / 'model.safetensors')
    toys.assert_same(read_checkpoint((tmp_path / 'model.safetensors').as_uri()), dict(state))


def test_urls_with_the_same_file_name_do_not_collide(tmp_path, hub):
    for name in 'ab':
        (tmp_path / name).mkdir()
        torch.save({'name': name}, tmp_path / name / 'model.pth')
    for _ in range(2):
        assert [read_checkpoint((tmp_path / name / 'model.pth').as_uri())['name'] for name in 'ab'] == ['a', 'b']


def test_url_is_downloaded_once(tmp_path, hub):
    file = tmp_path / 'model.pth'
    torch.save({'weight': 1}, file)
    read_checkpoint(file.as_uri())
    file.unlink()
    assert read_checkpoint(file.as_uri()) == {'weight': 1}


def test_interrupted_download_leaves_nothing(tmp_path, hub, monkeypatch):
    file = tmp_path / 'model.pth'
    torch.save({'weight': torch.ones(100)}, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, 'urlopen', lambda _: Interrupted(file.read_bytes()[:200]))
        with pytest.raises(ConnectionResetError):
            read_checkpoint(file.as_uri())
    assert [path for path in hub.rglob('*') if path.is_file()] == []
    toys.assert_same(read_checkpoint(file.as_uri()), {'weight': torch.ones(100)})


def test_damaged_download_says_how_to_repeat_it(tmp_path, hub):
    file = broken(tmp_path, 'half zip')
    with pytest.raises(
        ValueError, match=r'not a weights file \(downloaded to .*broken.pth; delete it to download it again'
    ):
        read_checkpoint(file.as_uri())
    (cached,) = hub.rglob('*.pth')
    torch.save({'weight': 1}, file)
    cached.unlink()
    assert read_checkpoint(file.as_uri()) == {'weight': 1}


class Interrupted(io.BytesIO):
    """A connection that breaks after some bytes."""

    def info(self) -> email.message.Message:
        return email.message.Message()

    def read(self, *size) -> bytes:
        data = super().read(*size)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return data


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The Hub's cache folder for the model somebody/toy, without access to the Hub itself."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    revision = tmp_path / 'models--somebody--toy' / 'snapshots' / ('0' * 40)
    revision.mkdir(parents=True)
    (tmp_path / 'models--somebody--toy' / 'refs').mkdir()
    (tmp_path / 'models--somebody--toy' / 'refs' / 'main').write_text('0' * 40)
    return revision


@pytest.mark.R7
def test_hub_weights_load(toy, offline_hub):
    state = toy().state_dict()
    safetensors.torch.save_file(state, offline_hub / 'model.safetensors')
    toys.assert_same(read_checkpoint('hf-hub:somebody/toy'), dict(state))


@pytest.mark.R7
def test_missing_hub_model_is_an_error_in_one_line(offline_hub):
    with pytest.raises(ValueError, match='download from the Hub failed') as caught:
        read_checkpoint('hf-hub:somebody/else')
    assert '\n' not in str(caught.value)


@pytest.mark.R7
@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_local_dir_weights_load(toy, tmp_path, name):
    state = toy().state_dict()
    (safetensors.torch.save_file if name.endswith('safetensors') else torch.save)(state, tmp_path / name)
    toys.assert_same(dict(read_checkpoint(f'local-dir:{tmp_path}')), dict(state))
    with pytest.raises(ValueError, match=r'contains none of model\.safetensors'):
        read_checkpoint(f'local-dir:{tmp_path / "no"}')


class Malicious:
    """Unpickling this creates a folder, which shows that code was run."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.R7
@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
def test_malicious_hub_weights_are_refused(tmp_path, offline_hub, source):
    marker = tmp_path / 'ran'
    torch.save({'model': Malicious(marker)}, offline_hub / 'pytorch_model.bin')
    place = offline_hub if source == 'local-dir' else 'somebody/toy'
    with pytest.raises(ValueError, match=r'only tensors and plain types|download from the Hub failed'):
        read_checkpoint(f'{source}:{place}')
    assert not marker.exists()


@pytest.mark.R7
@pytest.mark.parametrize('as_url', [False, True], ids=['path', 'url'])
@pytest.mark.parametrize('place', ['weights', 'namespace', 'bare pickle', 'legacy'])
def test_malicious_file_is_refused(tmp_path, hub, place, as_url):
    file, marker = tmp_path / 'released.pth', tmp_path / 'marker'
    evil = Malicious(marker)
    if place == 'bare pickle':
        file.write_bytes(pickle.dumps(evil))
    elif place == 'namespace':
        torch.save({'model': {'w': torch.zeros(1)}, 'args': argparse.Namespace(lr=evil)}, file)
    else:
        torch.save({'model': evil}, file, _use_new_zipfile_serialization=place == 'weights')
    with pytest.raises(ValueError, match=r'contains \S*mkdir|not a weights file') as caught:
        read_checkpoint(file.as_uri() if as_url else str(file))
    assert '\n' not in str(caught.value)
    assert not marker.exists()
    # Unsafe loading of the same file does run its code, so the assertion above means something.
    if place == 'bare pickle':
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize('name', ['nowhere.pth', 'nowhere.safetensors'])
def test_missing_file_is_an_os_error(tmp_path, hub, name):
    with pytest.raises(OSError, match='nowhere'):
        read_checkpoint(str(tmp_path / name))
    with pytest.raises(OSError, match='nowhere'):
        read_checkpoint((tmp_path / name).as_uri())


def broken(tmp_path, kind):
    """A file such as failed downloads and full disks leave."""
    file = tmp_path / ('broken.safetensors' if 'safetensors' in kind else 'broken.pth')
    weights = {'weight': torch.randn(64, 64)}
    if 'html' in kind:
        file.write_text('<!DOCTYPE html>\n<html>\n<body>404: Not Found</body>\n</html>\n')
    elif 'empty' in kind:
        file.touch()
    else:
        if 'safetensors' in kind:
            safetensors.torch.save_file(weights, file)
        else:
            torch.save(weights, file, _use_new_zipfile_serialization='legacy' not in kind)
        data = file.read_bytes()
        kept = {'start': 5, 'half': len(data) // 2, 'almost all': len(data) - 20}
        file.write_bytes(data[: next(n for word, n in kept.items() if word in kind)])
    return file


@pytest.mark.R7
@pytest.mark.parametrize(
    'kind',
    [
        f'{what} {layout}'
        for layout in ('zip', 'legacy', 'safetensors')
        for what in ('html', 'empty', 'start', 'half', 'almost all')
        if (what, layout) not in (('html', 'legacy'), ('empty', 'legacy'))  # the same as those of zip
    ],
)
def test_broken_file_is_refused_in_one_line(tmp_path, kind):
    with pytest.raises(ValueError, match='not a weights file') as caught:
        read_checkpoint(str(broken(tmp_path, kind)))
    assert '\n' not in str(caught.value)


def test_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match='is a folder'):
        read_checkpoint(str(tmp_path))
    (tmp_path / 'best_checkpoint.pth').write_bytes(b'')
    with pytest.raises(OSError, match=f'is a folder; did you mean {tmp_path}/best_checkpoint.pth'):
        read_checkpoint(str(tmp_path))


@pytest.mark.R7
@pytest.mark.parametrize('content', [[torch.zeros(1)], torch.zeros(3), 'words'], ids=['list', 'tensor', 'str'])
def test_file_without_a_dictionary_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(ValueError, match=f'contains a {type(content).__name__}'):
        read_checkpoint(str(tmp_path / 'odd.pth'))


# Damage and finding ---------------------------------------------------------------------------------------------------


def test_plain_torch_reads_a_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    state = contents()
    path.write_bytes(checkpoints.serialize(state))
    for read in (toys.load, read_checkpoint):
        toys.assert_same(read(path), state)
    assert zipfile.ZipFile(path).testzip() is None


class Damage:
    """A run folder with two checkpoints, of which the last one can be damaged."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.state = contents(4)
        self.whole = bytes(checkpoints.serialize(self.state))
        (folder / 'checkpoint-00000003.pth').write_bytes(checkpoints.serialize(contents(3)))

    def is_detected(self, data: bytes) -> bool:
        """Puts bytes in the place of the last checkpoint. Either they are refused or they load as it would."""
        (self.folder / 'checkpoint.pth').write_bytes(data)
        path, found, errors = read_newest(self.folder)
        if path.name == 'checkpoint.pth':
            assert errors == []
            toys.assert_same(found, self.state)
            return False
        assert (path.name, found['step']) == ('checkpoint-00000003.pth', 3)
        (error,) = errors
        assert re.fullmatch(r'checkpoint\.pth (is damaged.*|contains .*)', error)
        return True


@pytest.fixture
def damage(tmp_path):
    damage = Damage(tmp_path)
    assert not damage.is_detected(damage.whole)
    return damage


def test_truncation_anywhere_is_detected(damage):
    lengths = [len(damage.whole) * i // 50 for i in range(50)]
    for length in [*lengths, *range(len(damage.whole) - 80, len(damage.whole))]:
        assert damage.is_detected(damage.whole[:length])


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_flipped_bit_is_detected_or_changes_nothing(damage):
    size = 8 * len(damage.whole)
    directory = 8 * damage.whole.index(b'PK\1\2')
    bits = [*random.Random(0).sample(range(size), 50), *random.Random(1).sample(range(directory, size), 100)]
    found = [damage.is_detected(flipped(damage.whole, bit)) for bit in bits]
    assert sum(found) > 50


def test_flipped_bit_in_any_record_is_detected(damage):
    for member in zipfile.ZipFile(io.BytesIO(damage.whole)).infolist():
        start = member.header_offset
        name, extra = struct.unpack('<HH', damage.whole[start + 26 : start + 30])
        first = 8 * (start + 30 + name + extra)
        for bit in (0, 4 * member.file_size, 8 * member.file_size - 1):
            assert damage.is_detected(flipped(damage.whole, first + bit)), member.filename


def test_member_marked_as_a_folder_is_detected(damage):
    start = 8 * (damage.whole.index(b'PK\1\2') + 38)  # external attributes of the first member
    assert zipfile.ZipFile(io.BytesIO(flipped(damage.whole, start + 4))).testzip() is None
    assert damage.is_detected(flipped(damage.whole, start + 4))


HTML = b'<!DOCTYPE html>\n<html>\n<body>503: Service Unavailable</body>\n</html>\n'


@pytest.mark.parametrize('kind', ['empty', 'html', 'zeros', 'a list'])
def test_file_that_is_no_checkpoint_is_detected(damage, kind):
    listed = io.BytesIO()
    torch.save([1, 2], listed)
    data = {'empty': b'', 'html': HTML, 'zeros': bytes(len(damage.whole)), 'a list': listed.getvalue()}
    assert damage.is_detected(data[kind])


def test_extra_bytes_at_the_end_are_detected_or_change_nothing(damage):
    damage.is_detected(damage.whole + b'x')


def test_checkpoint_with_a_seal_of_an_earlier_version_loads(damage):
    # Earlier versions put a checksum into the comment of the archive.
    comment = b'sha256:' + hashlib.sha256(damage.whole[:-2]).hexdigest().encode()
    sealed = damage.whole[:-2] + struct.pack('<H', len(comment)) + comment
    assert zipfile.ZipFile(io.BytesIO(sealed)).comment == comment
    assert not damage.is_detected(sealed)


def test_file_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = toys.save(tmp_path / 'weights.pth', {'weight': torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(path).testzip() is not None
    toys.assert_same(read_checkpoint(path), {'weight': torch.ones(3)})


def test_folder_in_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / 'checkpoint-00000003.pth').write_bytes(checkpoints.serialize(contents(3)))
    (tmp_path / 'checkpoint.pth').mkdir()
    assert read_newest(tmp_path)[2] == ['checkpoint.pth is a folder']


def test_newest_undamaged_checkpoint_is_found(tmp_path):
    order = ['checkpoint.pth', 'checkpoint-100000000.pth', 'checkpoint-99999999.pth', 'best_checkpoint.pth']
    for number, name in enumerate(reversed(order)):
        (tmp_path / name).write_bytes(checkpoints.serialize(contents(number)))
    for name in ('checkpoint-1.pth', 'checkpoint-00000001.pth.old', '.checkpoint.pth.tmp', 'other.pth'):
        (tmp_path / name).write_bytes(b'not a checkpoint')
    for damaged in range(4):
        assert [path.name for path in checkpoints.find_checkpoints(tmp_path)] == order
        path, found, errors = read_newest(tmp_path)
        assert (path.name, found['step']) == (order[damaged], 3 - damaged)
        assert [error.split()[0] for error in errors] == order[:damaged]
        path.write_bytes(b'')
    with pytest.raises(ValueError, match=r'no checkpoint in .* can be read: ') as caught:
        read_newest(tmp_path)
    assert all(name in str(caught.value) for name in order)


def test_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / 'none'):
        assert checkpoints.find_checkpoints(folder) == []
        with pytest.raises(ValueError, match='there is none'):
            read_newest(folder)


def test_release_checkpoint_is_found(tmp_path):
    toys.save(tmp_path / 'checkpoint.pth', {'model': {}, 'epoch': 3})
    assert read_newest(tmp_path)[1:] == ({'model': {}, 'epoch': 3}, [])


# Writing durably ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


each_fault = pytest.mark.parametrize('fault', Disk.FAULTS)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO], ids=['full', 'broken'])
@each_fault
def test_failed_write_keeps_the_old_file_and_no_other(tmp_path, disk, fault, code):
    path = tmp_path / 'file'
    write_durably(path, b'old' * 1000)
    disk.fault, disk.code = fault, code
    with pytest.raises(OSError, match=os.strerror(code)):
        write_durably(path, b'new' * 1000)
    assert toys.listing(tmp_path) == {'file': b'old' * 1000}
    disk.fault = None
    write_durably(path, b'new' * 1000)
    assert toys.listing(tmp_path) == {'file': b'new' * 1000}


def test_interrupted_write_keeps_the_old_file_and_no_other(tmp_path):
    def interrupt() -> None:
        raise stopping.StoppedError(15)

    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises(stopping.StoppedError):
        write_durably(tmp_path / 'file', b'new', interrupt)
    assert toys.listing(tmp_path) == {'file': b'old'}


def test_old_file_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, synced = tmp_path / 'file', []
    path.write_bytes(b'old')
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda handle: synced.append(os.fstat(handle)) or fsync(handle))

    def before_replace() -> None:
        assert path.read_bytes() == b'old'
        assert [place.st_size for place in synced] == [3]

    write_durably(path, b'new', before_replace)
    assert toys.listing(tmp_path) == {'file': b'new'}
    assert synced[1].st_ino == tmp_path.stat().st_ino  # the folder is synced too


@pytest.mark.parametrize('text', ['[1]\n', '{"lr": 1}\n', '{"epoch": "0"}\n', 'hello\n'])
def test_file_that_is_no_log_is_refused(tmp_path, text):
    (tmp_path / 'log.txt').write_text(text)
    with pytest.raises(ValueError, match=r'^line 1 of .*log\.txt is not a log row'):
        read_log(tmp_path / 'log.txt')
