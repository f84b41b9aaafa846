"""checkpoints.py: files read safely, written durably and found again; the training state; what a run leaves."""

import argparse
import copy
import errno
import io
import math
import os
import pickle
import random
import re
import signal
import zipfile
from collections import OrderedDict

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import toys
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import checkpoints
import main
import models
import utils
from checkpoints import RunFolder, TrainingState, read_checkpoint, read_log, read_newest, write_durably

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


# Training state -------------------------------------------------------------------------------------------------------


def make_state(
    model: torch.nn.Module | None = None,
    *,
    gradient: float = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    scaled: bool = False,
    opt: str = 'adamw',
) -> TrainingState:
    """A state whose optimizer has made one step, and whose moving average differs from the weights."""
    if model is None:
        torch.manual_seed(0)
        model = toys.student()
    optimizer = create_optimizer_v2(model, opt, lr, weight_decay)
    schedule = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=2, warmup_lr_init=1e-6)
    scaler = torch.amp.GradScaler('cpu', enabled=scaled)
    state = TrainingState(model, optimizer, schedule, scaler, ModelEmaV3(model, decay=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return state


def kinds(value) -> set[type]:
    if isinstance(value, dict):
        return {type(value)}.union(*map(kinds, value.keys()), *map(kinds, value.values()))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*map(kinds, value))
    return {type(value)}


@pytest.mark.R7
def test_a_checkpoint_holds_plain_types_only_and_fits_plain_timm(tmp_path):
    args = main.parse_args(toys.flags(teacher_path='t.pth', opt_betas='0.9 0.99', teacher_kwargs='drop_path_rate=None'))
    state = make_state(scaled=True)
    state.epoch = 3
    state.best_acc1 = 12.5
    contents = state.state_dict(vars(args), {})
    plain = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(contents) <= plain
    loaded = toys.load(toys.save(tmp_path / 'checkpoint.pth', contents))
    assert loaded['args'] == vars(args)
    assert loaded['args']['model_kwargs'] == toys.STUDENT
    assert (loaded['epoch'], loaded['best_acc1']) == (3, 12.5)
    fresh = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32, **toys.STUDENT)
    fresh.load_state_dict(loaded['model'], strict=True)
    toys.assert_same(fresh.state_dict(), state.model.state_dict())
    fresh.load_state_dict(loaded['model_ema'], strict=True)
    toys.assert_same(fresh.state_dict(), state.ema.module.state_dict())


def test_without_a_moving_average_the_checkpoint_has_none():
    state = make_state()
    state.ema = None
    assert 'model_ema' not in state.state_dict({}, {})


def test_progress_comes_back_with_the_rate_of_the_schedule_and_the_options_of_the_flags():
    saved = make_state(gradient=3, scaled=True)
    saved.epoch, saved.best_acc1, saved.position, saved.step, saved.skipped = 4, 12.5, 24, 43, 2
    saved.scaler.load_state_dict({**saved.scaler.state_dict(), 'scale': 1024.0, '_growth_tracker': 17})
    state = make_state(lr=5e-4, weight_decay=0.2, scaled=True)
    state.load_progress(saved.state_dict({}, {}), CPU)
    assert (state.epoch, state.best_acc1, state.position, state.step, state.skipped) == (4, 12.5, 24, 43, 2)
    toys.assert_same(state.optimizer.state_dict()['state'], saved.optimizer.state_dict()['state'])
    # Cosine from 5e-4 to 1e-5 over ten epochs, after epoch 4; the file's own rate was 1e-3.
    expected = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 4 / 10)) / 2
    assert [g['lr'] for g in state.optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-12)
    assert sorted(g['weight_decay'] for g in state.optimizer.param_groups) == [0, 0.2]
    assert state.scaler.state_dict() == saved.scaler.state_dict()
    assert state.scaler.get_scale() == 1024


@pytest.mark.parametrize('opt', ['adamw', 'sgd', 'lamb', 'adan', 'lookahead_adamw', 'madgrad', 'adafactor', 'lion'])
def test_every_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path, opt):
    def step(state: TrainingState, number: int) -> None:
        for parameter in state.model.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()

    saved = make_state(opt=opt)
    for number in range(8):
        step(saved, number)
    contents = toys.load(toys.save(tmp_path / 'checkpoint.pth', saved.state_dict({}, {})))
    state = make_state(opt=opt)
    state.model.load_state_dict(contents['model'])
    state.load_progress(contents, CPU)
    for number in range(8, 16):  # at the twelfth lookahead looks back
        step(saved, number), step(state, number)
    toys.assert_same(state.model.state_dict(), saved.model.state_dict())


@pytest.mark.parametrize('missing', ['optimizer', 'lr_scheduler', 'epoch'])
def test_a_file_without_optimizer_schedule_or_epoch_changes_nothing(missing):
    state, other = make_state(), make_state(gradient=3, lr=1.0)
    before = copy.deepcopy((state.optimizer.state_dict(), state.lr_scheduler.state_dict()))
    contents = other.state_dict({}, {})
    assert checkpoints.has_progress(contents)
    del contents[missing]
    assert not checkpoints.has_progress(contents)
    main.resume(main.parse_args(toys.flags(**toys.ALONE)), state, contents, steps=5)
    toys.assert_same((state.optimizer.state_dict(), state.lr_scheduler.state_dict()), before)
    assert (state.epoch, state.step, state.position, state.best_acc1) == (-1, 0, 0, 0.0)


def test_the_optimizer_of_another_model_is_refused():
    other = make_state(toys.student(depth=3))
    with pytest.raises(ValueError, match='parameter groups'):
        make_state().load_progress(other.state_dict({}, {}), CPU)


def released(state: TrainingState, epoch: int) -> dict:
    """A checkpoint as the 2022 release wrote it in mid-run: counters of the optimizer are ints, flags a Namespace."""
    optimizer = state.optimizer.state_dict()
    optimizer['state'] = {key: {**value, 'step': int(value['step'])} for key, value in optimizer['state'].items()}
    keep = ('params', 'lr', 'betas', 'eps', 'weight_decay', 'amsgrad')
    optimizer['param_groups'] = [{key: group[key] for key in keep} for group in optimizer['param_groups']]
    scaler = {'scale': 4096.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000}
    return {
        'model': state.model.state_dict(),
        'optimizer': optimizer,
        'lr_scheduler': {'base_values': [1.0, 1.0], '_step_count': 5},
        'epoch': epoch,
        'model_ema': state.ema.module.state_dict(),
        'scaler': {**scaler, '_growth_tracker': 3},
        'args': argparse.Namespace(lr=1.0, epochs=300),
    }


def test_a_file_of_the_release_resumes_in_mid_run():
    saved, state = make_state(gradient=3, scaled=True), make_state(scaled=True)
    state.load_progress(released(saved, epoch=6), CPU)
    assert (state.epoch, state.best_acc1, state.scaler.get_scale()) == (6, 0.0, 4096)
    moments = [
        (s['step'].item(), s['exp_avg'], s['exp_avg_sq']) for s in state.optimizer.state_dict()['state'].values()
    ]
    expected = [(1.0, s['exp_avg'], s['exp_avg_sq']) for s in saved.optimizer.state_dict()['state'].values()]
    toys.assert_same(moments, expected)
    state.optimizer.step()  # goes on from there
    assert {s['step'].item() for s in state.optimizer.state_dict()['state'].values()} == {2}


def test_the_scale_of_a_float16_run_is_no_obstacle_to_a_run_without_scaler():
    state = make_state()
    state.load_progress(make_state(scaled=True).state_dict({}, {}), CPU)
    assert not state.scaler.is_enabled()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'epoch': -2}, 'epoch is -2'),
        ({'epoch': '3'}, "epoch is '3'"),
        ({'epoch': 1.0}, 'epoch is 1.0'),
        ({'position': -1}, 'position is -1, no count'),
        ({'step': 2.5}, 'step is 2.5, no count'),
        ({'skipped': '0'}, "skipped is '0', no count"),
        ({'best_acc1': 'x'}, 'x'),
        ({'meters': {'names': ['loss'], 'totals': [[1.0, 2.0, 3.0]]}}, 'not as many values as names'),
        ({'format': checkpoints.FORMAT + 1}, 'newer than this program'),
    ],
)
def test_values_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_state().load_progress({**make_state().state_dict({}, {}), **changes}, CPU)


def test_moments_of_another_shape_than_their_parameter_are_refused():
    contents = copy.deepcopy(make_state().state_dict({}, {}))
    moments = contents['optimizer']['state'][4]
    moments['exp_avg'] = moments['exp_avg'].new_zeros([size + 1 for size in moments['exp_avg'].shape])
    with pytest.raises(ValueError, match='exp_avg number 4 has another shape'):
        make_state().load_progress(contents, CPU)


def test_a_state_says_how_far_it_has_come():
    state = make_state(torch.nn.Linear(3, 2))
    assert state.describe() == 'no epoch done'
    state.position, state.step = 1024, 8
    state.meters.update({'a': torch.tensor(1.0)}, 4)
    assert state.describe() == 'no epoch done, 1,024 images into the next'
    state.finish_epoch()
    assert (state.describe(), state.position, state.step) == ('epoch 0 done', 0, 8)
    assert state.meters.total is None


# Seals and finding ----------------------------------------------------------------------------------------------------


def small_state() -> TrainingState:
    return make_state(torch.nn.Linear(3, 2))


def contents(step: int = 0) -> dict:
    state = small_state()
    state.step = step
    return state.state_dict({'lr': 0.1}, {})


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


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Breaks in one of seven ways, until it is mended.

    Attributes:
        fault: the share of a file's bytes after which writing fails, or the call that does.
        name: of the file whose writing fails, any if empty.
    """

    FAULTS = (0.0, 0.01, 0.5, 0.99, 1.0, 'fsync', 'replace')

    def __init__(self, monkeypatch) -> None:
        self.fault, self.name, self.code = None, '', errno.ENOSPC
        self._writing = ''
        monkeypatch.setattr(checkpoints, 'open', self._open, raising=False)
        for call in ('fsync', 'replace'):
            monkeypatch.setattr(os, call, self._breaking(call, getattr(os, call)))

    def check(self, place) -> None:
        if self.fault == place and self.name in ('', self._writing):
            raise OSError(self.code, os.strerror(self.code))

    def _breaking(self, name: str, call):
        def instead(*args):
            self.check(name)
            return call(*args)

        return instead

    def _open(self, path, mode):
        disk = self

        class File(io.FileIO):
            def write(self, data) -> None:
                if isinstance(disk.fault, float):
                    super().write(data[: round(disk.fault * len(data))])
                    disk.check(disk.fault)
                    self.seek(0)
                super().write(data)

        if mode != 'wb':
            return open(path, mode)
        self._writing = path.name.removeprefix('.').removesuffix('.tmp')
        return File(path, mode)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def listing(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
        raise utils.StoppedError(15)

    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises(utils.StoppedError):
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


# The folder of a run --------------------------------------------------------------------------------------------------


class Clock:
    """Stands for the module `time`: nobody waits."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checkpoints, 'time', clock)
    return clock


@pytest.fixture
def save(tmp_path):
    """A function that saves the state of a step in the folder it is given, which may be none."""
    state = small_state()

    def write(folder: RunFolder, step: int, epoch: int | None = None, best: bool = False) -> None:
        state.step = step
        folder.save(state, {}, None if epoch is None else {'epoch': epoch}, best)

    return write


def step_of(path) -> int:
    return toys.load(path)['step']


def test_a_log_row_takes_the_place_of_its_epoch_and_of_later_ones(tmp_path):
    for epoch, loss in [(0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)]:
        RunFolder(tmp_path).save(small_state(), {}, {'train_loss': loss, 'epoch': epoch})
    assert toys.log_rows(tmp_path) == [{'train_loss': 3.0, 'epoch': 0}, {'train_loss': 2.5, 'epoch': 1}]


@each_fault
def test_a_save_that_fails_is_told_tried_again_and_made_good(tmp_path, disk, clock, save, capsys, fault):
    folder = RunFolder(tmp_path)
    save(folder, 1, epoch=0, best=True)
    before = listing(tmp_path)
    disk.fault = fault
    save(folder, 2, epoch=1, best=True)
    if fault == 'replace':  # the last one has its second name by then
        before['checkpoint-00000001.pth'] = before['checkpoint.pth']
    assert listing(tmp_path) == before
    line = f'warning: not saved: {tmp_path / "log.txt"}: No space left on device; training goes on, the next try is '
    assert capsys.readouterr().out == f'{line}in 60 s or with the next save\n'
    assert not folder.due()
    clock.now += 59
    assert not folder.due()
    clock.now += 1
    assert folder.due()
    save(folder, 3)  # the disk is still full
    assert listing(tmp_path) == before
    clock.now += 59
    assert not folder.due()
    disk.fault = None
    clock.now += 1
    assert folder.due()
    save(folder, 4)
    assert not folder.due()
    assert toys.log_rows(tmp_path) == [{'epoch': 0}, {'epoch': 1}]
    steps = {'checkpoint.pth': 4, 'best_checkpoint.pth': 2, 'checkpoint-00000001.pth': 1}
    assert listing(tmp_path).keys() == steps.keys() | {'log.txt'}
    assert {name: step_of(tmp_path / name) for name in steps} == steps


@each_fault
@pytest.mark.parametrize('name', checkpoints.KEPT)
def test_whichever_file_cannot_be_written_the_state_before_stays_and_the_end_makes_it_good(
    tmp_path, disk, clock, save, name, fault
):
    folder = RunFolder(tmp_path)
    save(folder, 1, epoch=0, best=True)
    disk.fault, disk.name = fault, name
    save(folder, 2, epoch=1, best=True)
    assert len(toys.log_rows(tmp_path)) == 1 + (name != 'log.txt')
    assert step_of(tmp_path / 'best_checkpoint.pth') == 1 + (name != 'best_checkpoint.pth')
    assert step_of(tmp_path / 'checkpoint.pth') == 1 + (name != 'checkpoint.pth')
    assert not list(tmp_path.glob('.*'))
    assert read_newest(tmp_path)[2] == []
    disk.fault = None
    folder.finish()
    assert clock.slept == [1.0]
    assert len(toys.log_rows(tmp_path)) == 2
    assert [step_of(tmp_path / name) for name in ('best_checkpoint.pth', 'checkpoint.pth')] == [2, 2]
    assert step_of(tmp_path / 'checkpoint-00000001.pth') == 1


def test_a_run_whose_last_state_cannot_be_written_says_so(tmp_path, disk, clock, save):
    folder = RunFolder(tmp_path)
    save(folder, 1)
    folder.finish()
    assert clock.slept == []  # there is nothing to be done
    disk.fault, disk.code = 0.5, errno.EIO
    save(folder, 2)
    with pytest.raises(checkpoints.NotSavedError, match=r'checkpoint\.pth: Input/output error'):
        folder.finish()
    assert clock.slept == [1.0, 2.0, 4.0]
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {'checkpoint.pth': 1}


def test_log_best_and_last_are_written_in_this_order(tmp_path, save, monkeypatch):
    order = []
    write = checkpoints.write_durably
    monkeypatch.setattr(checkpoints, 'write_durably', lambda path, *rest: order.append(path.name) or write(path, *rest))
    save(RunFolder(tmp_path), 1, epoch=0, best=True)
    assert order == ['log.txt', 'best_checkpoint.pth', 'checkpoint.pth']
    save(RunFolder(tmp_path), 2)
    assert order[3:] == ['checkpoint.pth']


@pytest.mark.parametrize('links', [True, False], ids=['links', 'no links'])
@pytest.mark.parametrize('keep', [0, 1, 3])
def test_no_more_than_last_best_and_the_history_asked_for_are_kept(tmp_path, save, monkeypatch, keep, links):
    seen = []

    def note(call):
        return lambda *args: seen.append({path.name for path in tmp_path.iterdir()}) or call(*args)

    for name in ('fsync', 'replace', 'unlink'):  # at every one of these the folder can be left as it is
        monkeypatch.setattr(os, name, note(getattr(os, name)))
    monkeypatch.setattr(os, 'link', note(os.link) if links else full_disk)
    folder = RunFolder(tmp_path, keep)
    for step in range(1, 8):
        save(folder, step, epoch=step, best=step == 2)
    assert step_of(tmp_path / 'best_checkpoint.pth') == 2
    earlier = {f'checkpoint-{step:08d}.pth' for step in range(7 - keep, 7)}
    assert listing(tmp_path).keys() == {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'} | earlier
    assert all(step_of(tmp_path / name) == int(name[11:19]) for name in earlier)
    for names in seen:
        assert len(names - {'log.txt', 'best_checkpoint.pth', 'checkpoint.pth'}) <= keep + 1
        assert sum(name.startswith('.') for name in names) <= 1
    assert max(len(names) for names in seen) == 3 + keep + 1  # it does look in the midst of writes


def test_a_damaged_last_state_never_drives_out_a_good_one_before_it(tmp_path, save):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        save(folder, step)
    (tmp_path / 'checkpoint.pth').write_bytes(HTML)
    found = []
    again = RunFolder(tmp_path, last_step=None)
    write, again._rotate = again._rotate, lambda: (write(), found.extend(read_newest(tmp_path)[:1]))
    save(again, 3)
    assert [path.name for path in found] == ['checkpoint-00000001.pth']
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {
        'checkpoint.pth': 3,
        'checkpoint-00000001.pth': 1,
    }


def test_a_folder_knows_the_last_state_it_began_with(tmp_path, save):
    save(RunFolder(tmp_path), 5)
    save(RunFolder(tmp_path, last_step=5), 6)
    assert {name: step_of(tmp_path / name) for name in listing(tmp_path)} == {
        'checkpoint.pth': 6,
        'checkpoint-00000005.pth': 5,
    }


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    ours = ['.checkpoint.pth.tmp', '.best_checkpoint.pth.tmp', '.log.txt.tmp', '.checkpoint-00000012.pth.tmp']
    others = ['.notes.tmp', 'checkpoint.pth.tmp', '.checkpoint.pth', 'weights.pth', 'checkpoint-00000012.pth', '.tmp']
    for name in ours + others:
        (tmp_path / name).write_text('x')
    RunFolder(tmp_path)
    assert listing(tmp_path).keys() == set(others)


def test_a_save_is_due_by_the_clock(tmp_path, clock, save):
    folder = RunFolder(tmp_path, interval=600)
    clock.now += 599
    assert not folder.due()
    clock.now += 1
    assert folder.due()
    save(folder, 1)
    assert not folder.due()
    clock.now += 10**9
    assert folder.due()
    assert not RunFolder(tmp_path).due()


def test_without_a_folder_nothing_is_kept_and_nothing_is_due(clock, save):
    folder = RunFolder(None, interval=1)
    clock.now += 10
    save(folder, 1, epoch=0, best=True)
    folder.finish()
    assert not folder.due()
    assert folder.saves == 0
    assert 'no --output_dir' in folder.describe()


class Calls:
    """Stands for `engine.Watch` and notes that it was asked."""

    skipped = 3
    looks = 0

    def look(self) -> int:
        self.looks += 1
        return 0


@pytest.mark.parametrize('every', [0, 2])
def test_steps_and_images_are_counted_and_saved_every_so_many(tmp_path, every):
    state, watch = small_state(), Calls()
    folder = RunFolder(tmp_path, keep=10)
    keeper = checkpoints.Keeper(state, folder, utils.RankConsensus(utils.Signals()), watch, {}, 8, every)
    for _ in range(5):
        keeper.after_step()
    assert (state.step, state.position) == (5, 40)
    saved = sorted(step_of(path) for path in checkpoints.find_checkpoints(tmp_path))
    assert saved == ([2, 4] if every else [])
    assert (watch.looks, state.skipped) == ((2, 3) if every else (0, 0))  # nothing unsound is kept


@pytest.mark.parametrize('when', ['after_step', 'poll', 'drain', 'finish'])
def test_a_run_that_is_told_to_stop_is_saved_and_says_where(tmp_path, when):
    signals = utils.Signals()
    keeper = checkpoints.Keeper(small_state(), RunFolder(tmp_path), utils.RankConsensus(signals), Calls(), {}, 8)
    signals.received = signal.SIGTERM
    with pytest.raises(utils.StoppedError, match=r'^stopped by SIGTERM: no epoch done.*, saved in .*checkpoint\.pth'):
        getattr(keeper, when)()
    saved = toys.load(tmp_path / 'checkpoint.pth')
    assert (saved['step'], saved['position']) == ((1, 8) if when == 'after_step' else (0, 0))


def test_a_run_that_is_told_to_stop_and_cannot_be_saved_says_that(tmp_path, disk, clock):
    signals = utils.Signals()
    keeper = checkpoints.Keeper(small_state(), RunFolder(tmp_path), utils.RankConsensus(signals), Calls(), {}, 8)
    signals.received, disk.fault = signal.SIGTERM, 0.5
    with pytest.raises(checkpoints.NotSavedError, match='No space'):
        keeper.after_step()


def test_a_file_that_is_the_beginning_of_a_seal_is_no_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(checkpoints._seal(b'no archive at all')[:20])
    with pytest.raises(ValueError, match='is damaged, or no file of weights'):
        checkpoints.read_checkpoint(path)
