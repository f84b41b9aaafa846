"""Fixtures of all tests: one thread, fixed seeds, toy models and toy runs. No test uses the network."""

import copy
import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import toys

import datasets
import engine
import main

# Model families, and the kwargs that make them small.
FAMILIES = {
    'deit': 'deit_tiny_patch16_224',
    'distilled': 'deit_tiny_distilled_patch16_224',
    'cait': 'cait_s24_224',
    'registers': 'vit_small_patch14_reg4_dinov2',
}
TOY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'num_classes': 10}


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def hangup_is_not_ignored():
    """`nohup` ignores SIGHUP, which some tests send."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory):
    """Tests keep the indexes of tars in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def toy():
    """A function that builds a small timm model of a family. Its weights are the same at every call."""

    def make(family: str = 'deit', **changes) -> torch.nn.Module:
        torch.manual_seed(1)
        return timm.create_model(FAMILIES[family], **{**TOY, **changes})

    return make


@pytest.fixture
def few_generated_images(monkeypatch):
    monkeypatch.setattr(datasets, 'FAKE_TRAIN', toys.TRAIN_IMAGES)
    monkeypatch.setattr(datasets, 'FAKE_VAL', toys.VAL_IMAGES)


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """A folder with good and bad files of weights and images, for the toy runs."""
    folder = tmp_path_factory.mktemp('files')
    teacher, student = toys.teacher(), toys.student()
    toys.save(folder / 'teacher.pth', {'model': {f'module.{k}': v for k, v in teacher.state_dict().items()}})
    toys.save(folder / 'student.pth', {'model': student.state_dict()})
    toys.save(folder / 'headless.pth', {k: v for k, v in teacher.state_dict().items() if not k.startswith('head.')})
    toys.save(folder / 'seven.pth', toys.teacher(num_classes=7).state_dict())
    toys.save(folder / 'list.pth', [1, 2])
    toys.save(folder / 'words.pth', {'model': 'a word'})
    toys.save(folder / 'code.pth', {'model': torch.nn.Linear(2, 2)})
    (folder / 'text.pth').write_text('no weights at all')
    progress = {'model': student.state_dict(), 'lr_scheduler': {}, 'epoch': 0}
    sgd = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    toys.save(folder / 'one_group.pth', {**progress, 'optimizer': sgd.state_dict()})
    toys.save(folder / 'no_groups.pth', {**progress, 'optimizer': {'state': {}}})
    toys.save(folder / 'no_optimizer.pth', {**progress, 'optimizer': None})
    state = toys.state(student, opt='sgd', **toys.ALONE)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    toys.save(folder / 'sgd.pth', {**progress, 'optimizer': state.optimizer.state_dict()})
    for tree in ('tree', 'no_train'):
        toys.write_images(folder / tree / 'val', [3, 2], 32)
    toys.write_images(folder / 'tree' / 'train', [4, 4], 32)
    for split, k in (('train', 0), ('train', 1), ('val', 0)):
        toys.write_shard(folder / 'shards' / f'{split}-{k}.tar', range(8 * k, 8 * k + 8), classes=3, size=32)
    toys.write_shard(folder / 'one_shard' / 'train.tar', range(8), classes=3, size=32)
    (folder / 'empty' / 'val' / 'c0').mkdir(parents=True)
    (folder / 'flat' / 'val').mkdir(parents=True)
    (folder / 'flat' / 'val' / '0.png').write_bytes((folder / 'tree' / 'val' / 'c0' / '0.png').read_bytes())
    for split, i in (('train', 0), ('val', 1)):
        toys.write_images(folder / 'unlike' / split, [1] * (i + 1), 8)
    shutil.rmtree(folder / 'unlike' / 'val' / 'c0')
    (folder / 'run').mkdir()
    (folder / 'run' / 'checkpoint.pth').write_text('of another run')
    return folder


@pytest.fixture
def run(files, tmp_path):
    """A function that runs main.main on a toy and returns the rows of its log."""

    def start(**changes) -> list[dict]:
        changes = {'teacher_path': files / 'teacher.pth', 'output_dir': tmp_path, **changes}
        main.main(toys.flags(**changes))
        return toys.log_rows(changes['output_dir']) if changes['output_dir'] else []

    return start


@pytest.fixture
def epochs(monkeypatch):
    """The arguments of each call of train_one_epoch, which is replaced and trains nothing."""
    calls = []

    def record(trainer, loader, epoch, *_) -> dict[str, float]:
        optimizer, config = copy.deepcopy(trainer.optimizer.state_dict()), trainer.config
        parts = {'student': trainer.tapped, 'teacher': trainer.teacher, 'optimizer': optimizer, 'epoch': epoch}
        calls.append(SimpleNamespace(**parts, train_mode=config.train_mode))
        return {'lr': max(group['lr'] for group in trainer.optimizer.param_groups), 'loss': 0.0}

    monkeypatch.setattr(engine, 'train_one_epoch', record)
    return calls


@pytest.fixture
def evaluation(files, capsys):
    """A function that evaluates on a folder without train/ and returns the result lines."""

    def start(**changes) -> list[str]:
        main.main(toys.flags(**{'data_path': files / 'no_train', **toys.FOLDER, 'eval': True, **changes}))
        return [line for line in capsys.readouterr().out.splitlines() if 'Acc' in line]

    return start


@pytest.fixture(scope='session')
def through(files, tmp_path_factory):
    """The folders of two uninterrupted runs (float32, float16), with a checkpoint of every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, 'FAKE_TRAIN', toys.TRAIN_IMAGES)
        patch.setattr(datasets, 'FAKE_VAL', toys.VAL_IMAGES)
        folders = {}
        for name, changes in (('float32', {}), ('float16', toys.HALF)):
            folders[name] = tmp_path_factory.mktemp(name)
            flags = {**toys.LONG, **changes, 'teacher_path': files / 'teacher.pth', 'output_dir': folders[name]}
            main.main(toys.flags(**flags))
    return folders
