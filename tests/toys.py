"""Toy runs of main.py: flags, weights files, folders of images, and checks that several test files share."""

import argparse
import io
import json
import math
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
import transforms
from flags import Config, parse_args
from run_dir import TrainingState

ROOT = Path(main.__file__).parent

STUDENT = {'patch_size': 8, 'embed_dim': 32, 'depth': 4, 'num_heads': 2}
TEACHER = {'patch_size': 8, 'embed_dim': 48, 'depth': 6, 'num_heads': 4}

RUN = {
    'data_set': 'FAKE',
    'input_size': 32,
    'model': 'deit_tiny_patch16_224',
    'model_kwargs': ' '.join(f'{key}={value}' for key, value in STUDENT.items()),
    'teacher_model': 'cait_s24_224',
    'teacher_kwargs': ' '.join(f'{key}={value}' for key, value in TEACHER.items()),
    'distillation_type': 'soft',
    's_id': '0 1 -1',
    't_id': '0 1 -1',
    'w_full': 1,
    'epochs': 1,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
}
ALONE = {'distillation_type': None, 's_id': None, 't_id': None, 'teacher_path': None}
# Without random augmentation two runs see the same images and labels.
PLAIN_IMAGES = {'aa': 'none', 'mixup': 0, 'cutmix': 0, 'reprob': 0, 'color_jitter': 0, 'no_repeated_aug': True}


def flags(**changes) -> list[str]:
    """The command line of a toy run. None leaves a flag out, True gives it without a value."""
    words = []
    for name, value in {**RUN, **changes}.items():
        if value is not None:
            words.append('--' + name.replace('_', '-'))
            words += [] if value is True else str(value).split() or ['']
    return words


def config(**changes) -> Config:
    """The configs of a toy run."""
    return parse_args(flags(**changes))


def state(model: torch.nn.Module, **changes) -> TrainingState:
    """Optimizer, schedule and EMA of a model, as the flags of a toy run ask for them."""
    optim = config(**changes).optim
    return main.build_state(optim, 0, model, optim.scaled_lr(1))


def student(num_classes: int = 10, size: int = 32, **changes) -> torch.nn.Module:
    kwargs = {**STUDENT, 'num_classes': num_classes, 'img_size': size, **changes}
    return timm.create_model('deit_tiny_patch16_224', **kwargs)


def teacher(num_classes: int = 10, size: int = 32, **changes) -> torch.nn.Module:
    torch.manual_seed(7)
    model = timm.create_model('cait_s24_224', num_classes=num_classes, img_size=size, **{**TEACHER, **changes})
    with torch.no_grad():  # with the initial layer scales of 1e-5 all CaiT blocks return nearly the same
        for name, parameter in model.named_parameters():
            if 'gamma' in name:
                parameter.fill_(0.5)
    return model


def favouring(model: torch.nn.Module, winner: int) -> torch.nn.Module:
    """Makes a model give every image one class, by a logit of 100."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()[winner] = 100
    return model


def save(path: Path, contents: dict) -> str:
    torch.save(contents, path)
    return str(path)


def write_images(folder: Path, counts: list[int], size: int) -> None:
    """Writes class folders `c0`, `c1`, … with these numbers of images. Each image has its own single colour."""
    number = 0
    for i, count in enumerate(counts):
        (folder / f'c{i}').mkdir(parents=True)
        for j in range(count):
            colour = tuple(number * step % 256 for step in (97, 61, 151))
            Image.new('RGB', (size, size), colour).save(folder / f'c{i}' / f'{j}.png')
            number += 1


def write_shard(path: Path, numbers: range, classes: int, size: int) -> None:
    """Writes a WebDataset shard. Image n has its own single colour and class n % classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for n in numbers:
            image = io.BytesIO()
            Image.new('RGB', (size, size), tuple(n * step % 256 for step in (97, 61, 151))).save(image, 'png')
            for ending, data in (('png', image.getvalue()), ('cls', str(n % classes).encode())):
                member = tarfile.TarInfo(f'{n:04d}.{ending}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(1, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def as_bytes(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """(3, H, W) uint8."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def train_transform(size: int = 16, **changes) -> transforms.TrainTransform:
    flags = {'color_jitter': 0.4, 'auto_augment': DEFAULT_AA, 'interpolation': 'bicubic', 'reprob': 0.25, 'recount': 1}
    return transforms.build_train_transform(size, **{**flags, **changes})


def log_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def load(path: Path) -> dict:
    """Reads one of our checkpoints, with no extra types allowed."""
    return torch.load(path, weights_only=True)


def assert_same(left, right) -> None:
    """Checks that two nested structures are equal to the bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


DEFAULT_AA = 'rand-m9-mstd0.5-inc1'
TRAIN_IMAGES, VAL_IMAGES = 16, 8
FOLDER = {'data_set': 'FOLDER', **ALONE}
SHARDS = {'data_set': 'wds/', **ALONE}
TERMS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']
RELEASE_KEYS = {
    'train_lr', 'train_loss', *(f'train_loss_{term}' for term in TERMS[:5]), 'test_loss', 'test_acc1', 'test_acc5',
    'epoch', 'n_parameters',
}  # fmt: skip


def assert_sound(row: dict, absent: set | None = None) -> None:
    """Checks for the keys of the release, finite values, terms that add up, and which terms are 0 (if given)."""
    assert absent is None or absent == {term for term in TERMS if row[f'train_loss_{term}'] == 0}
    assert row.keys() >= RELEASE_KEYS
    assert all(math.isfinite(value) for value in row.values())
    assert row['train_loss'] == pytest.approx(sum(row[f'train_loss_{term}'] for term in TERMS), rel=1e-6)


def as_release(state: dict, ema: dict | None = None, **more) -> dict:
    """The checkpoint layout of the release. Evaluation uses only its weights."""
    args = argparse.Namespace(model='deit_tiny_patch16_224', epochs=300, data_set='IMNET')
    scaler = {'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000}
    scaler['_growth_tracker'] = 0
    parts = {'model': state, 'optimizer': {'state': {}, 'param_groups': []}, 'lr_scheduler': {}, 'epoch': 299}
    return {**parts, 'model_ema': ema or state, 'scaler': scaler, 'args': args, **more}


class Slow(list):
    """Batches that each take some seconds."""

    def __init__(self, batches: list, seconds: float) -> None:
        super().__init__(batches)
        self.seconds = seconds

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


class KilledError(Exception):
    """Stands for a kill: ends a run at an unexpected point."""


def kill() -> None:
    raise KilledError


def refused(capsys, **changes) -> str:
    with pytest.raises(SystemExit) as stopped:
        main.main(flags(**changes))
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert stopped.value.code == 2
    return error


# Two epochs of four steps. Everything that draws random numbers is on, and the EMA weights move.
LONG = {'epochs': 2, 'batch_size': 4, 'drop_path': 0.1, 'lr': 3, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'K': 5}
LONG |= {'resume': 'auto', 'save_interval_steps': 1, 'keep': 20, 'eval_ema': True}
HALF = {'amp_dtype': 'float16', 'model': 'deit_tiny_distilled_patch16_224', 'clip_grad': 1}
forks = pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')  # Python 3.12 on


def outcome(folder) -> dict:
    """The parts of a run folder that must be equal for a resumed and an uninterrupted run."""
    last = load(folder / 'checkpoint.pth')
    keys = ('model', 'model_ema', 'optimizer', 'scaler', 'lr_scheduler', 'best_acc1', 'epoch', 'position', 'step')
    best = load(folder / 'best_checkpoint.pth')
    return {'log': log_rows(folder), 'best': best['model'], **{key: last[key] for key in keys}}


def differing(one: dict, other: dict) -> set[str]:
    found = set()
    for key in one:
        try:
            assert_same(one[key], other[key])
        except AssertionError:
            found.add(key)
    return found


def after_calls(patch, module, name: str, count: int, act) -> None:
    """Patches a function so that it calls `act` after its call number `count`."""
    call, calls = getattr(module, name), []

    def instead(*args, **kwargs):
        found = call(*args, **kwargs)
        calls.append(None)
        if len(calls) == count:
            act()
        return found

    patch.setattr(module, name, instead)


def listing(folder) -> dict[str, bytes]:
    """The files of a run's state by name, without what is written beside it."""
    logs = ('args.yaml', 'console.log', 'metrics.jsonl')
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in logs}


def fake_streams(patch) -> list:
    """Replaces CUDA streams; returns the list of what is done: `copy`, `wait`, and tensors as they are recorded."""
    done = []

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            pass

        def wait_stream(self, other: 'Stream') -> None:
            assert self is main_stream
            assert other in made
            done.append('wait')

    @contextmanager
    def use(stream: Stream):
        assert stream in made
        done.append('copy')
        yield

    def make(device: torch.device) -> Stream:
        made.append(Stream())
        return made[-1]

    def record(tensor: torch.Tensor, stream: Stream) -> None:
        assert stream is main_stream
        done.append(tensor)

    main_stream, made = Stream(), []
    patch.setattr(torch.cuda, 'Stream', make)
    patch.setattr(torch.cuda, 'stream', use)
    patch.setattr(torch.cuda, 'current_stream', lambda device: main_stream)
    patch.setattr(torch.Tensor, 'record_stream', record)
    return done


def line_with(capsys, word: str) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if word in line)
