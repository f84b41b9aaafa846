"""checkpoints.py: files read safely, written durably and found again; the training state; what a run leaves."""

import argparse
import errno
import os
import pickle
import random
import re
import zipfile

import huggingface_hub
import pytest
import safetensors.torch
import torch
import toys
from states import Disk, contents, listing

import checkpoints
import models
import stopping
from checkpoints import read_checkpoint, read_log, read_newest, write_durably

CPU = torch.device('cpu')


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Downloads of a test stay in its own folder."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub'


@pytest.mark.R7
def test_a_url_loads(toy, tmp_path, hub):
    torch.save({'model': toy().state_dict()}, tmp_path / 'released.pth')
    checkpoint = read_checkpoint((tmp_path / 'released.pth').as_uri())
    toys.assert_same(dict(models.named_weights(checkpoint)), dict(toy().state_dict()))
    assert list(hub.rglob('*.pth'))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A folder of the hub's cache for the model somebody/toy, and no way to the hub itself."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    revision = tmp_path / 'models--somebody--toy' / 'snapshots' / ('0' * 40)
    revision.mkdir(parents=True)
    (tmp_path / 'models--somebody--toy' / 'refs').mkdir()
    (tmp_path / 'models--somebody--toy' / 'refs' / 'main').write_text('0' * 40)
    return revision


@pytest.mark.R7
def test_weights_of_the_hub_load(toy, offline_hub):
    state = toy().state_dict()
    safetensors.torch.save_file(state, offline_hub / 'model.safetensors')
    toys.assert_same(read_checkpoint('hf-hub:somebody/toy'), dict(state))


@pytest.mark.R7
def test_what_the_hub_does_not_have_is_refused_in_a_line(offline_hub):
    with pytest.raises(ValueError, match='cannot be had from the hub') as caught:
        read_checkpoint('hf-hub:somebody/else')
    assert '\n' not in str(caught.value)


@pytest.mark.R7
@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_weights_of_a_folder_saved_for_the_hub_load(toy, tmp_path, name):
    state = toy().state_dict()
    (safetensors.torch.save_file if name.endswith('safetensors') else torch.save)(state, tmp_path / name)
    toys.assert_same(dict(read_checkpoint(f'local-dir:{tmp_path}')), dict(state))
    with pytest.raises(ValueError, match=r'there is none of model\.safetensors'):
        read_checkpoint(f'local-dir:{tmp_path / "no"}')


class Malicious:
    """What unpickling this does is make a folder: the marker of code that ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.R7
@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
def test_weights_of_the_hub_that_would_run_code_are_refused_and_run_none(tmp_path, offline_hub, source):
    marker = tmp_path / 'ran'
    torch.save({'model': Malicious(marker)}, offline_hub / 'pytorch_model.bin')
    place = offline_hub if source == 'local-dir' else 'somebody/toy'
    with pytest.raises(ValueError, match=r'only tensors and plain types|cannot be had from the hub'):
        read_checkpoint(f'{source}:{place}')
    assert not marker.exists()


@pytest.mark.R7
@pytest.mark.parametrize('as_url', [False, True], ids=['path', 'url'])
@pytest.mark.parametrize('place', ['weights', 'namespace', 'bare pickle', 'legacy'])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, hub, place, as_url):
    file, marker = tmp_path / 'released.pth', tmp_path / 'marker'
    evil = Malicious(marker)
    if place == 'bare pickle':
        file.write_bytes(pickle.dumps(evil))
    elif place == 'namespace':
        torch.save({'model': {'w': torch.zeros(1)}, 'args': argparse.Namespace(lr=evil)}, file)
    else:
        torch.save({'model': evil}, file, _use_new_zipfile_serialization=place == 'weights')
    with pytest.raises(ValueError, match=r'holds \S*mkdir|no file of weights') as caught:
        read_checkpoint(file.as_uri() if as_url else str(file))
    assert '\n' not in str(caught.value)
    assert not marker.exists()
    # the same file, read as it must never be: the marker does appear, so its absence above means something
    if place == 'bare pickle':
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize('name', ['nowhere.pth', 'nowhere.safetensors'])
def test_a_missing_file_is_an_os_error(tmp_path, hub, name):
    with pytest.raises(OSError, match='nowhere'):
        read_checkpoint(str(tmp_path / name))
    with pytest.raises(OSError, match='nowhere'):
        read_checkpoint((tmp_path / name).as_uri())


def broken(tmp_path, kind):
    """A file that is no checkpoint, as downloads and full disks leave it."""
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
        contents = file.read_bytes()
        kept = {'start': 5, 'half': len(contents) // 2, 'almost all': len(contents) - 20}
        file.write_bytes(contents[: next(n for word, n in kept.items() if word in kind)])
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
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, kind):
    with pytest.raises(ValueError, match='no file of weights') as caught:
        read_checkpoint(str(broken(tmp_path, kind)))
    assert '\n' not in str(caught.value)


def test_a_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match='directory'):
        read_checkpoint(str(tmp_path))


@pytest.mark.R7
@pytest.mark.parametrize('content', [[torch.zeros(1)], torch.zeros(3), 'words'], ids=['list', 'tensor', 'str'])
def test_a_file_that_holds_no_dictionary_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(ValueError, match=f'holds a {type(content).__name__}'):
        read_checkpoint(str(tmp_path / 'odd.pth'))


# Seals and finding ----------------------------------------------------------------------------------------------------


def test_a_sealed_file_is_one_that_plain_torch_reads(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    state = contents()
    path.write_bytes(checkpoints.serialize(state))
    for read in (toys.load, read_checkpoint):
        toys.assert_same(read(path), state)
    assert zipfile.ZipFile(path).testzip() is None


@pytest.fixture
def damage(tmp_path):
    """A function that puts bytes in the place of the last state, and returns what is then found and what is said.

    The state before is whole.
    """
    (tmp_path / 'checkpoint-00000003.pth').write_bytes(checkpoints.serialize(contents(3)))

    def put(data: bytes) -> tuple[int, list[str]]:
        (tmp_path / 'checkpoint.pth').write_bytes(data)
        path, found, faults = read_newest(tmp_path)
        assert path.name == ('checkpoint-00000003.pth' if found['step'] == 3 else 'checkpoint.pth')
        return found['step'], faults

    put.whole = bytes(checkpoints.serialize(contents(4)))
    assert put(put.whole) == (4, [])
    return put


def assert_detected(found: tuple[int, list[str]]) -> None:
    step, (fault,) = found
    assert step == 3
    assert re.fullmatch(r'checkpoint\.pth (is damaged.*|holds .*)', fault)


def test_a_file_cut_off_anywhere_is_detected(damage):
    lengths = [len(damage.whole) * i // 50 for i in range(50)]
    for length in [*lengths, *range(len(damage.whole) - 80, len(damage.whole))]:
        assert_detected(damage(damage.whole[:length]))


def test_a_single_flipped_bit_anywhere_is_detected(damage):
    # Most of a small file is padding, of which the zip archive's own sums know nothing.
    bits = random.Random(0).sample(range(8 * len(damage.whole)), 50)
    seal = range(8 * (len(damage.whole) - 75), 8 * len(damage.whole))
    for bit in [*bits, *seal]:
        data = bytearray(damage.whole)
        data[bit // 8] ^= 1 << bit % 8
        assert_detected(damage(bytes(data)))


HTML = b'<!DOCTYPE html>\n<html>\n<body>503: Service Unavailable</body>\n</html>\n'


@pytest.mark.parametrize('kind', ['nothing', 'html', 'zeros', 'more at the end', 'without its seal', 'of a list'])
def test_what_is_no_state_of_ours_is_detected(damage, tmp_path, kind):
    listed = checkpoints.io.BytesIO()
    torch.save([1, 2], listed)
    unsealed = checkpoints.io.BytesIO()
    torch.save(contents(4), unsealed)
    data = {'nothing': b'', 'html': HTML, 'zeros': bytes(len(damage.whole)), 'more at the end': damage.whole + b'x'}
    data |= {'of a list': listed.getvalue(), 'without its seal': unsealed.getvalue()}
    assert_detected(damage(data[kind]))


def test_a_folder_in_the_place_of_a_state_is_named(tmp_path):
    (tmp_path / 'checkpoint-00000003.pth').write_bytes(checkpoints.serialize(contents(3)))
    (tmp_path / 'checkpoint.pth').mkdir()
    assert read_newest(tmp_path)[2] == ['checkpoint.pth Is a directory']


def test_the_newest_whole_state_is_found_and_the_best_one_is_the_last_resort(tmp_path):
    order = ['checkpoint.pth', 'checkpoint-100000000.pth', 'checkpoint-99999999.pth', 'best_checkpoint.pth']
    for number, name in enumerate(reversed(order)):
        (tmp_path / name).write_bytes(checkpoints.serialize(contents(number)))
    for name in ('checkpoint-1.pth', 'checkpoint-00000001.pth.old', '.checkpoint.pth.tmp', 'other.pth'):
        (tmp_path / name).write_bytes(b'no state')
    for damaged in range(4):
        assert [path.name for path in checkpoints.find_checkpoints(tmp_path)] == order
        path, found, faults = read_newest(tmp_path)
        assert (path.name, found['step']) == (order[damaged], 3 - damaged)
        assert [fault.split()[0] for fault in faults] == order[:damaged]
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='holds no checkpoint that can be read: ') as caught:
        read_newest(tmp_path)
    assert all(name in str(caught.value) for name in order)


def test_an_empty_folder_and_none_hold_no_state(tmp_path):
    for folder in (tmp_path, tmp_path / 'none'):
        assert checkpoints.find_checkpoints(folder) == []
        with pytest.raises(ValueError, match='there is none'):
            read_newest(folder)


def test_a_file_of_the_release_needs_no_seal(tmp_path):
    toys.save(tmp_path / 'checkpoint.pth', {'model': {}, 'epoch': 3})
    assert read_newest(tmp_path)[1:] == ({'model': {}, 'epoch': 3}, [])


# Writing durably ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


each_fault = pytest.mark.parametrize('fault', Disk.FAULTS)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO], ids=['full', 'broken'])
@each_fault
def test_a_write_that_fails_leaves_the_old_file_whole_and_no_other(tmp_path, disk, fault, code):
    path = tmp_path / 'file'
    write_durably(path, b'old' * 1000)
    disk.fault, disk.code = fault, code
    with pytest.raises(OSError, match=os.strerror(code)):
        write_durably(path, b'new' * 1000)
    assert listing(tmp_path) == {'file': b'old' * 1000}
    disk.fault = None
    write_durably(path, b'new' * 1000)
    assert listing(tmp_path) == {'file': b'new' * 1000}


def test_an_interrupted_write_leaves_the_old_file_whole_and_no_other(tmp_path):
    def interrupt() -> None:
        raise stopping.StoppedError(15)

    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises(stopping.StoppedError):
        write_durably(tmp_path / 'file', b'new', interrupt)
    assert listing(tmp_path) == {'file': b'old'}


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, synced = tmp_path / 'file', []
    path.write_bytes(b'old')
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda handle: synced.append(os.fstat(handle)) or fsync(handle))

    def before_replace() -> None:
        assert path.read_bytes() == b'old'
        assert [place.st_size for place in synced] == [3]

    write_durably(path, b'new', before_replace)
    assert listing(tmp_path) == {'file': b'new'}
    assert synced[1].st_ino == tmp_path.stat().st_ino  # its name lasts too


@pytest.mark.parametrize('text', ['[1]\n', '{"lr": 1}\n', '{"epoch": "0"}\n', 'hello\n'])
def test_what_is_no_log_of_epochs_is_refused(tmp_path, text):
    (tmp_path / 'log.txt').write_text(text)
    with pytest.raises(ValueError, match=r'^line 1 of .*log\.txt is no row of a log of epochs$'):
        read_log(tmp_path / 'log.txt')


def test_a_file_that_is_the_beginning_of_a_seal_is_no_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(checkpoints._seal(b'no archive at all')[:20])
    with pytest.raises(ValueError, match='is damaged, or no file of weights'):
        checkpoints.read_checkpoint(path)
