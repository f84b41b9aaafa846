"""main.py in process: its flags, what it refuses, the parts it builds, and whole runs of toys on generated images."""

import argparse
import ast
import copy
import gc
import inspect
import json
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import toys
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

import checkpoints
import datasets
import engine
import main
import utils
from utils import UsageError

TRAIN_IMAGES, VAL_IMAGES = 16, 8


@pytest.fixture(autouse=True)
def few_generated_images(monkeypatch):
    monkeypatch.setattr(datasets, 'FAKE_TRAIN', TRAIN_IMAGES)
    monkeypatch.setattr(datasets, 'FAKE_VAL', VAL_IMAGES)


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """A folder of weights and images, good and bad, that the runs below are pointed to."""
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
    state = main.build_state(main.parse_args(toys.flags(opt='sgd', **toys.ALONE)), student)
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
    (folder / 'unlike' / 'train' / 'c0').mkdir(parents=True)
    (folder / 'unlike' / 'val' / 'c1').mkdir(parents=True)
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
    """What train_one_epoch was called with; it trains nothing."""
    calls = []

    def record(student, teacher, criterion, loader, optimizer, scaler, meters, watch, **options) -> dict[str, float]:
        parts = {'student': student, 'teacher': teacher, 'optimizer': copy.deepcopy(optimizer.state_dict())}
        calls.append(SimpleNamespace(**parts, scaler=scaler.state_dict(), **options))
        return {'lr': max(group['lr'] for group in optimizer.param_groups), 'loss': 0.0}

    monkeypatch.setattr(main, 'train_one_epoch', record)
    return calls


# Flags ----------------------------------------------------------------------------------------------------------------

# The release's, as its parser had them: words that fit, then name and default.
RELEASE = {
    ('3',): {
        'batch-size': 64, 'epochs': 300, 'K': 192, 'input-size': 224, 'warmup-epochs': 5, 'cooldown-epochs': 10,
        'patience-epochs': 10, 'recount': 1, 'seed': 0, 'start_epoch': 0, 'num_workers': 10, 'world_size': 1,
        'local_rank': 0,
    },
    ('0.25',): {
        'distillation-alpha': 0.5, 'distillation-beta': 1.0, 'distillation-tau': 1.0, 'w-sample': 1.0, 'w-patch': 1.0,
        'w-rand': 1.0, 'drop': 0.0, 'drop-path': 0.0, 'model-ema-decay': 0.99996, 'opt-eps': 1e-8, 'clip-grad': None,
        'momentum': 0.9, 'weight-decay': 0.05, 'lr': 5e-4, 'lr-noise-pct': 0.67, 'lr-noise-std': 1.0, 'warmup-lr': 1e-6,
        'min-lr': 1e-5, 'decay-epochs': 30, 'decay-rate': 0.1, 'color-jitter': 0.4, 'smoothing': 0.1, 'reprob': 0.25,
        'mixup': 0.8, 'cutmix': 1.0, 'mixup-prob': 1.0, 'mixup-switch-prob': 0.5,
    },
    ('3', '4'): {'s-id': None, 't-id': None},
    ('0.25', '0.75'): {'opt-betas': None, 'lr-noise': None, 'cutmix-minmax': None},
    ('step',): {'sched': 'cosine'},
    ('bilinear',): {'train-interpolation': 'bicubic'},
    ('const',): {'remode': 'pixel'},
    ('elem',): {'mixup-mode': 'batch'},
    ('hard',): {'distillation-type': 'none'},
    ('INAT19',): {'data-set': 'IMNET'},
    ('order',): {'inat-category': 'name'},
    ('a_word',): {
        'model': 'deit_base_patch16_224', 'opt': 'adamw', 'aa': 'rand-m9-mstd0.5-inc1', 'teacher-model': 'cait_s24_224',
        'teacher-path': '', 'finetune': '', 'data-path': '', 'output_dir': '', 'device': 'cuda', 'resume': '',
        'dist_url': 'env://',
    },
    (): {
        'model-ema': True, 'no-model-ema': True, 'model-ema-force-cpu': False, 'repeated-aug': True,
        'no-repeated-aug': True, 'resplit': False, 'eval': False, 'dist-eval': True, 'pin-mem': True,
        'no-pin-mem': True, 'distributed': False,
    },
}  # fmt: skip
CHOICES = {
    'distillation-type': {'none', 'soft', 'hard'},
    'data-set': {'CIFAR', 'IMNET', 'INAT', 'INAT19'},
    'inat-category': {'kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name'},
    # Free words in the release; these are what its parts understood, but for the plateau schedule.
    'sched': {'cosine', 'tanh', 'step', 'poly'},
    'train-interpolation': {'random', 'bilinear', 'bicubic'},
    'remode': {'const', 'rand', 'pixel'},
    'mixup-mode': {'batch', 'pair', 'elem'},
}
FLAGS = [(flag, default, words) for words, table in RELEASE.items() for flag, default in table.items()]


def dest(flag: str) -> str:
    return flag.removeprefix('no-').replace('-', '_')


def test_the_table_holds_the_74_flags_of_the_release():
    assert len(FLAGS) == len({flag for flag, _, _ in FLAGS}) == 74


@pytest.mark.parametrize(('flag', 'default', 'words'), FLAGS, ids=[flag for flag, _, _ in FLAGS])
def test_a_flag_of_the_release_keeps_name_default_choices_and_both_spellings(flag, default, words):
    parser = main.get_args_parser()
    unset = getattr(parser.parse_args([]), dest(flag))
    assert unset == default
    assert type(unset) is type(default) or flag == 'decay-epochs'  # 30 stands there for a float
    spellings = [f'--{flag}', f'--{flag.replace("-", "_")}', f'--{flag.replace("_", "-")}']
    parsed = [vars(parser.parse_args([spelling, *words])) for spelling in spellings]
    assert parsed[0] == parsed[1] == parsed[2]
    if not words:
        assert bool(parsed[0][dest(flag)]) is not flag.startswith('no-')
    elif len(words) == 1 and flag not in CHOICES and words != ('a_word',):
        assert parsed[0][dest(flag)] == ast.literal_eval(words[0])
    elif len(words) == 2:
        assert parsed[0][dest(flag)] == [ast.literal_eval(word) for word in words]
    else:
        assert parsed[0][dest(flag)] == words[0]
    action = next(action for action in parser._actions if f'--{flag}' in action.option_strings)
    choices = set(action.choices or ())
    if flag == 'data-set':  # more than those, and names that only begin like a choice
        assert all(parser.parse_args(['--data-set', name]).data_set == name for name in CHOICES[flag])
    else:
        assert choices == CHOICES.get(flag, set())


def test_the_short_name_of_the_decay_rate_is_known_too():
    assert main.get_args_parser().parse_args(['--dr', '0.3']).decay_rate == 0.3


def test_a_flag_can_be_joined_to_its_value_and_values_keep_their_underscores():
    args = main.get_args_parser().parse_args(['--output_dir=a_b=c_d', '--model_kwargs', 'img_size=3', '--s-id', '-1'])
    assert (args.output_dir, args.model_kwargs, args.s_id) == ('a_b=c_d', {'img_size': 3}, [-1])


class Watched(argparse.Namespace):
    """Remembers which of its values were asked for."""

    def __getattribute__(self, name: str):
        if not name.startswith('_'):
            super().__getattribute__('_asked').add(name)
        return super().__getattribute__(name)


def test_every_flag_has_help_and_a_reader_or_says_that_it_has_no_effect():
    parser = main.get_args_parser()
    tree = ast.parse(inspect.getsource(main))
    readers = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'args'
    }
    args = Watched(_asked=set(), **vars(parser.parse_args([])))
    optimizer_kwargs(args), scheduler_kwargs(args)
    # timm's bridge asks for the idle ones too, and does nothing with them.
    idle = {action.dest for action in parser._actions if 'no effect' in (action.help or '')}
    assert idle == {'cooldown_epochs', 'patience_epochs', 'resplit', 'local_rank', 'distributed', 'world_size'}
    assert not idle & readers
    known = {action.dest for action in parser._actions} - {'help'}
    assert known - idle - readers - args._asked == set()
    assert [action.dest for action in parser._actions if len(action.help or '') < 5] == []


def test_help_prints_and_ends_the_run_well(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(['--help'])
    assert stopped.value.code == 0
    assert '--w-patch' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('word', 'meant'), [('--batchsize', '--batch-size'), ('--w-smaple=3', '--w-sample'), ('stray', None)]
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(word, meant):
    with pytest.raises(UsageError, match=f'^{word}: no such flag' + (f'.*{meant}' if meant else '$')):
        main.parse_args([word])


# Wrong use ------------------------------------------------------------------------------------------------------------

FOLDER = {'data_set': 'FOLDER', **toys.ALONE}
STREAM = {'data_set': 'wds/', 'num_classes': 3, 'bad_images': 'skip', **toys.ALONE}
# The flag and the value that the line must name come first; then what else the run needs, and further words.
WRONG = [
    # the method
    ({'s_id': '0 1 2', 't_id': '0 1'}, '--t-id 0 1'),
    ({'s_id': '0 1', 't_id': None}, '--t-id'),
    ({'t_id': '0', 's_id': None}, '--s-id'),
    ({'s_id': '0 4', 't_id': '0 1'}, 'no block 4'),
    ({'t_id': '-7 0', 's_id': '0 1'}, 'no block -7'),
    ({'s_id': 'first', 't_id': '0'},),
    ({'K': 0},),
    ({'K': 'all'},),
    ({'distillation_type': 'medium'},),
    ({'distillation_type': 'soft', 'teacher_path': ''}, '--teacher-path'),
    ({'distillation_type': 'hard', 'teacher_path': ''}, '--teacher-path'),
    ({'distillation_alpha': 1.5},),
    ({'distillation_tau': 0},),
    ({'w_patch': -1},),
    ({'w_rand': 'nan'},),
    ({'w_full': -1},),
    ({'relations': 'all'},),
    ({'relation_scale': 'sum'},),
    ({'relation_dtype': 'float16'},),
    ({'teacher_dtype': 'float16'},),
    ({'accum_steps': 0},),
    ({'device_augment': True, 'aa': 'none'}, '--aa'),
    ({'device_augment': True, 'no_aug': True}, '--no-aug'),
    ({'device_augment': True, 'aa': '3a'}, '3a with --device-augment'),
    ({'device_augment': True, 'aa': 'augmix-m5-w4-d2'}, 'AugMix', '--device-augment'),
    ({'log_grad_share': True, 's_id': None, 't_id': None}, '--s-id'),
    ({'log_grad_share': True, **toys.ALONE}, 'teacher'),
    # models
    ({'model': 'deit_tinny_patch16_224'}, 'deit_tiny_patch16_224'),
    ({'teacher_model': 'cait_s42_224'}, 'cait_s24_224'),
    ({'model': 'densenet121', 'model_kwargs': None}, '--s-id'),
    ({'model': 'deit_tiny_patch16_224', 'model_kwargs': 'patch_size=16 embed_dim=32 depth=4 num_heads=2'},
     '--token-align error', '2×2', '--teacher-model cait_s24_224', '4×4', 'pool', 'interpolate', 'merge'),
    ({'token_align': 'merge', 'max_patches': 16, 'model_kwargs': 'patch_size=16 embed_dim=32 depth=4 num_heads=2'},
     '4×4', '--max-patches'),
    ({'token_align': 'crop'},),
    ({'max_patches': 0},),
    ({'teacher_input_size': 0},),
    ({'teacher_input_size': 48}, '6×6', '4×4', 'token-align'),
    ({'s_id': 'auto', 't_id': '0'}, '--t-id 0'),
    ({'t_id': 'auto 1', 's_id': 'auto 1'}, 'auto'),
    ({'s_id': 'auto', 't_id': 'auto', 'model': 'densenet121', 'model_kwargs': None}, 'no blocks at a place'),
    ({'teacher_model': 'local-dir:{files}/no', 'teacher_path': None},),
    ({'teacher_path': 'local-dir:{files}/tree'}, 'model.safetensors'),
    ({'teacher_path': '{files}/headless.pth'}, 'no head', '--distillation-alpha 0'),
    ({'teacher_path': '{files}/headless.pth', 'distillation_alpha': 0, 's_id': None, 't_id': None}, '--s-id'),
    ({'teacher_path': '{files}/headless.pth', 'distillation_alpha': 0, 'eval_teacher': True}, '--eval-teacher'),
    ({'teacher_path': '{files}/seven.pth'}, '7', '10'),
    ({'model_kwargs': 'depth'},),
    ({'model': 'deit_tiny_patch16_224', 'model_kwargs': 'no_such_thing=3'}, 'no_such_thing'),
    ({'model': 'deit_tiny_patch16_224', 'model_kwargs': 'num_classes=3'}, 'num_classes'),
    ({'input_size': 4, **toys.ALONE},),
    ({'input_size': 0},),
    ({'eval_teacher': True, **toys.ALONE}, '--teacher-path'),
    # weights
    ({'teacher_path': '{files}/no.pth'}, 'No such file'),
    ({'teacher_path': '{files}'},),
    ({'teacher_path': '{files}/text.pth'},),
    ({'teacher_path': '{files}/student.pth'}, 'does not fit'),
    ({'teacher_path': '{files}/teacher.pth', 'data_set': 'FOLDER', 'data_path': '{files}/tree'}, '10', '2'),
    ({'resume': '{files}/no.pth'}, 'No such file'),
    ({'resume': 'auto', 'output_dir': ''}, '--output_dir'),
    ({'resume': '{files}/list.pth'},),
    ({'resume': '{files}/words.pth'},),
    ({'resume': '{files}/code.pth'}, 'Linear'),
    ({'resume': '{files}/teacher.pth'}, 'does not fit'),
    ({'resume': '{files}/one_group.pth'}, 'parameter groups'),
    ({'resume': '{files}/no_groups.pth'},),
    ({'resume': '{files}/no_optimizer.pth'},),
    ({'resume': '{files}/sgd.pth'},),
    ({'finetune': '{files}/no.pth'}, 'No such file'),
    ({'finetune': '{files}/text.pth'},),
    ({'finetune': '{files}/teacher.pth'},),
    ({'eval': True}, '--resume'),
    ({'resume': '{files}/no.pth', 'eval': True}, 'No such file'),
    ({'eval_ema': True, 'eval': True, 'finetune': '{files}/student.pth'}, '--resume'),
    ({'resume': '{files}/student.pth', 'eval': True, 'eval_ema': True}, 'EMA'),
    # data
    ({'data_set': 'IMAGENET'},),
    ({'data_path': '', **FOLDER}, 'FOLDER'),
    ({'data_path': '{files}/no', **FOLDER},),
    ({'data_path': '{files}/flat', **FOLDER}, 'class folders'),
    ({'data_path': '{files}/empty', **FOLDER},),
    ({'data_path': '{files}/unlike', **FOLDER}, 'differ'),
    ({'data_path': '{files}/no_train', **FOLDER},),
    ({'data_path': '{files}/no', 'data_set': 'IMNET', **toys.ALONE},),
    ({'data_path': '{files}/tree', 'data_set': 'CIFAR', **toys.ALONE},),
    ({'data_path': '{files}/tree', 'data_set': 'INAT19', **toys.ALONE},),
    ({'input_size': 24, 'data_path': '{files}/tree', **FOLDER}, '32×32'),
    ({'batch_size': 32}, '16'),
    ({'batch_size': 0},),
    ({'data_set': 'hfds/cats', **toys.ALONE}, 'datasets'),
    ({'data_set': 'wds/', 'data_path': '{files}/tree', **toys.ALONE}, '--num-classes'),
    ({'data_path': '{files}/tree', **STREAM}, 'no _info.json'),
    ({'data_path': '{files}/no', **STREAM}, 'no _info.json'),
    ({'bad_images': 'stop', 'data_path': '{files}/shards', **{**STREAM, 'bad_images': 'stop'}}, '--data-set wds/'),
    ({'repeated_aug': True, 'data_path': '{files}/shards', **STREAM}, '--data-set wds/'),
    ({'num_workers': 2, 'data_path': '{files}/one_shard', **STREAM}, '1 shard'),
    ({'batch_size': 32, 'data_path': '{files}/shards', **STREAM}, '16 images'),
    ({'num_classes': 5, **FOLDER, 'data_path': '{files}/tree'}, 'FOLDER'),
    ({'data_path': '{files}/tree', **FOLDER, 'data_set': 'TAR'}, 'tar'),
    # recipe
    ({'batch_size': 7}, 'even'),
    ({'batch_size': 1, 'mixup': 0}, 'even'),
    ({'sched': 'plateau'}, 'cosine'),
    ({'epochs': 0},),
    ({'epochs': -1},),
    ({'opt': 'adamx'},),
    ({'opt_betas': '0.9'},),
    ({'opt_betas': '0.9 1.0'},),
    ({'lr': 'nan'},),
    ({'lr_noise': '0.1 0.2 0.3'},),
    ({'clip_grad': 0},),
    ({'smoothing': 1, 'mixup': 0, 'cutmix': 0},),
    ({'aa': 'rand-q9'},),
    ({'cutmix_minmax': '0.2'},),
    ({'cutmix_minmax': '0.8 0.2'},),
    ({'cutmix_minmax': '0.5 0.5'},),
    ({'num_workers': -1},),
    # run
    ({'device': 'gpu'},),
    ({'amp_dtype': 'int8'},),
    ({'print_freq': 0},),
    ({'keep': -1},),
    ({'save_interval_minutes': -1},),
    ({'save_interval_steps': 0.5},),
    ({'non_finite': 'skip'},),
    ({'non_finite': 'skip:-1'},),
    ({'bad_images': 'ignore'},),
    ({'output_dir': '{files}/run'}, '--resume'),
    ({'output_dir': '{files}/text.pth'},),
]  # fmt: skip


def case(changes: dict, *words: str) -> str:
    name, value = next(iter(changes.items()))
    extra = [key for key in changes if key in ('data_set', 'model_kwargs', 'eval', 'eval_ema')]
    return '-'.join([name, str(value).replace('{files}/', '').replace(' ', '_'), *extra])


@pytest.mark.parametrize('wrong', WRONG, ids=[case(*wrong) for wrong in WRONG])
def test_wrong_use_is_one_line_that_names_flag_and_value_before_any_training(wrong, files, tmp_path, epochs, capsys):
    changes, *words = wrong
    changes = {k: v.format(files=files) if isinstance(v, str) else v for k, v in changes.items()}
    name, value = next(iter(changes.items()))
    with pytest.raises(SystemExit) as stopped:
        main.main(toys.flags(**{'teacher_path': files / 'teacher.pth', 'output_dir': tmp_path, **changes}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count('\n') == 1
    assert error.startswith('main.py: error: ')
    assert f'--{name}'.replace('_', '-') in error.replace('_', '-')
    for word in [*words, '' if value is True else str(value)]:
        assert word in error
    assert not epochs
    assert list(tmp_path.iterdir()) == []


# The parts of a run ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_published_recipe():
    args = main.parse_args(toys.flags(epochs=None, batch_size=512, **toys.ALONE))  # all else as in the release
    state = main.build_state(args, timm.create_model('deit_tiny_patch16_224'))
    without, with_decay = sorted((len(g['params']), g['weight_decay']) for g in state.optimizer.param_groups)[::-1]
    assert (without, with_decay) == ((102, 0.0), (50, 0.05))
    rates = []
    for epoch in range(300):
        rates.append([group['lr'] for group in state.optimizer.param_groups])
        state.lr_scheduler.step(epoch)
    published = {0: 1e-6, 1: 1e-6, 2: 1.008e-4, 299: 1.0054e-5}
    assert {epoch: rates[epoch][0] for epoch in published} == pytest.approx(published, rel=1e-4)
    # Five epochs of warm-up, then half a cosine over all 300; everything one epoch late.
    warm = [1e-6 + t / 5 * (5e-4 - 1e-6) for t in range(5)]
    cosine = [1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * t / 300)) / 2 for t in range(5, 299)]
    expected = [1e-6, *warm, *cosine]
    np.testing.assert_allclose(rates, np.stack([expected, expected], axis=1), rtol=1e-9)


@pytest.mark.parametrize(('batch', 'scaled'), [(64, 6.25e-5), (1024, 1e-3)])
def test_the_rate_is_scaled_by_the_batch_and_neither_warm_up_nor_minimum_are(batch, scaled):
    state = main.build_state(main.parse_args(toys.flags(epochs=300, batch_size=batch, **toys.ALONE)), toys.student())
    rate = lambda: state.optimizer.param_groups[0]['lr']  # noqa: E731
    assert rate() == 1e-6
    state.lr_scheduler.step(5)
    assert rate() == pytest.approx(scaled, rel=1e-3)
    state.lr_scheduler.step(300)
    assert rate() == pytest.approx(1e-5)


def test_the_epoch_loop_steps_the_schedule_one_epoch_late(run, epochs):
    # Peak 64 * 5e-4 * 8/512 = 5e-4; two epochs of warm-up, then the middle of a cosine over four.
    rows = run(epochs=4, warmup_epochs=2, lr=64 * 5e-4)
    assert [row['train_lr'] for row in rows] == pytest.approx([1e-6, 1e-6, (1e-6 + 5e-4) / 2, (1e-5 + 5e-4) / 2])


def test_dropout_reaches_positions_projections_and_mlp_but_neither_head_nor_attention_nor_teacher(files):
    args = main.parse_args(toys.flags(drop=0.3, drop_path=0.2, teacher_path=files / 'teacher.pth'))
    student, teacher = main.build_student(args, 10), main.build_teacher(args)
    block = student.blocks[-1]
    on = [student.pos_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2]
    assert [module.p for module in on] == [0.3] * 4
    assert [module.p for module in (student.head_drop, block.attn.attn_drop)] == [0] * 2
    assert [path.drop_prob for path in (block.drop_path1, block.drop_path2)] == pytest.approx([0.2] * 2)
    assert {module.p for module in teacher.modules() if isinstance(module, torch.nn.Dropout)} == {0}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({**toys.ALONE, 'w_full': 5, 'relations': 'global'}, ['--w-full, --relations: no effect without a teacher']),
        ({'s_id': None, 't_id': None, 'w_full': 0, 'K': 5}, ['--K: no effect without --s-id and --t-id']),
        (
            {'relations': 'global', 'w_sample': 0, 'w_rand': 0, 'w_full': 0, 'K': 5},
            ['--K: no effect without --w-rand above 0', '--relations: no effect without --w-sample, --w-rand or'],
        ),
        (
            {**toys.ALONE, 'w_full': 0, 'token_align': 'pool', 'teacher_input_size': 64},
            ['--token-align: no effect without a teacher', '--teacher-input-size: no effect without a teacher'],
        ),
        ({'max_patches': 5}, ['--max-patches: no effect without --token-align merge']),
        (
            {'distillation_beta': 0, 'distillation_alpha': 0, 'distillation_tau': 2},
            [
                '--s-id, --w-full, --distillation-beta: no effect without a relation whose weight is not 0',
                '--distillation-type: no effect without a weight of KD or of a relation',
                '--distillation-tau: no effect without --distillation-alpha above 0',
            ],
        ),
        (
            {'sched': 'step', 'min_lr': 0, 'decay_rate': 0.5, 'decay_epochs': 2, 'mixup': 0, 'mixup_switch_prob': 1},
            ['--min-lr: no effect without --sched cosine', '--mixup-switch-prob: no effect without both'],
        ),
        (
            {'decay_rate': 0.5, 'lr_noise_pct': 0.1, 'color_jitter': 0.1, 'no_model_ema': True, 'model_ema_decay': 0.9},
            [
                '--model-ema-decay: no effect without --model-ema',
                '--decay-rate: no effect without --sched step or poly',
                '--lr-noise-pct: no effect without --lr-noise',
                '--color-jitter: no effect without --aa none',
            ],
        ),
        (
            {'no_aug': True, 'reprob': 0.5, 'recount': 2, 'aa': 'original', 'keep': 3, 'output_dir': None},
            ['--aa, --reprob, --recount: no effect without augmentation', '--keep: no effect without --output-dir'],
        ),
        ({'distillation_alpha': 1, 'smoothing': 0.2}, ['--smoothing: no effect without --distillation-alpha below 1']),
        ({'relations': 'global'}, []),
        ({'aa': '3a', 'color_jitter': 0.1}, []),
        ({**toys.ALONE, 'w_full': 0, 'smoothing': 0.2, 'sched': 'poly', 'decay_rate': 0.5, 'min_lr': 0, 'keep': 3}, []),
    ],
)
def test_flags_that_have_no_effect_are_named(run, epochs, capsys, changes, words):
    run(**changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'no effect' in line]
    assert len(lines) == len(words), lines
    assert all(map(str.__contains__, lines, words)), lines


# Whole runs -----------------------------------------------------------------------------------------------------------

TERMS = ['base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand', 'mf_full']
RELEASE_KEYS = {
    'train_lr', 'train_loss', *(f'train_loss_{term}' for term in TERMS[:5]), 'test_loss', 'test_acc1', 'test_acc5',
    'epoch', 'n_parameters',
}  # fmt: skip


def assert_sound(row: dict, absent: set | None = None) -> None:
    """The keys of the release, finite values, terms that add up; which of them are 0, where that is asked."""
    assert absent is None or absent == {term for term in TERMS if row[f'train_loss_{term}'] == 0}
    assert row.keys() >= RELEASE_KEYS
    assert all(math.isfinite(value) for value in row.values())
    assert row['train_loss'] == pytest.approx(sum(row[f'train_loss_{term}'] for term in TERMS), rel=1e-6)


@pytest.mark.parametrize('kind', ['none', 'soft', 'hard'])
def test_every_kind_of_distillation_trains_and_logs_the_keys_of_the_release(run, tmp_path, kind):
    (row,) = run(distillation_type=kind)
    assert_sound(row)
    assert row['n_parameters'] == sum(p.numel() for p in toys.student().parameters())
    assert (row['epoch'], row['train_lr']) == (0, 1e-6)
    absent = {term for term in TERMS if row[f'train_loss_{term}'] == 0}
    assert absent == (set(TERMS) - {'base'} if kind == 'none' else set())
    checkpoint = toys.load(tmp_path / 'checkpoint.pth')
    keys = {'model', 'optimizer', 'lr_scheduler', 'epoch', 'model_ema', 'scaler', 'args', 'best_acc1', 'versions'}
    keys |= {'position', 'step', 'skipped', 'meters', 'data', 'repeated_aug', 'ranks', 'format'}
    assert checkpoint.keys() == keys
    assert (checkpoint['epoch'], checkpoint['args']['distillation_type']) == (0, kind)
    toys.student().load_state_dict(checkpoint['model'], strict=True)


# Each ran into the ground in the release, or is easily forgotten.
@pytest.mark.parametrize(
    'changes',
    [
        {'mixup': 0},
        {'cutmix': 0},
        {'mixup': 0, 'cutmix': 0, 'batch_size': 5},
        {'mixup': 0, 'cutmix': 0, 'smoothing': 0},
        {'mixup_mode': 'elem', 'cutmix_minmax': '0.2 0.8'},
        {'aa': 'none'},
        {'aa': ''},
        {'aa': '', 'color_jitter': 0, 'reprob': 0, 'train_interpolation': 'random', 'input_size': 32},
        {'repeated_aug': True},
        {'no_model_ema': True},
        {'model_ema_force_cpu': True, 'eval_ema': True},
        {'amp_dtype': 'float16'},
        {'amp_dtype': 'bfloat16'},
        {'clip_grad': 1, 'drop': 0.1, 'drop_path': 0.1},
        {'opt': 'sgd', 'sched': 'step'},
        {'opt_betas': '0.9 0.99', 'lr_noise': '0.1 0.9'},
        {'K': 10**6},
        {'s_id': '-1 0 0', 't_id': '0 -1 3'},
        {'model': 'vit_small_patch14_reg4_dinov2'},
        {'model': 'deit_tiny_distilled_patch16_224', 'distillation_alpha': 1},
        {'teacher_model': 'deit_tiny_distilled_patch16_224', 'teacher_path': '{two_headed}'},
    ],
    ids=lambda changes: ' '.join(f'{key}={value}' for key, value in changes.items()),
)
def test_a_run_with_these_flags_trains(run, tmp_path, changes):
    torch.manual_seed(3)
    two_headed = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=10, img_size=32, **toys.TEACHER)
    path = toys.save(tmp_path / 'two_headed.pth', two_headed.state_dict())
    (row,) = run(**{k: path if v == '{two_headed}' else v for k, v in changes.items()})
    assert_sound(row)
    assert row['train_loss_dist'] > 0
    assert row['train_loss_mf_rand'] > 0
    assert ('model_ema' in toys.load(tmp_path / 'checkpoint.pth')) is not ('no_model_ema' in changes)


@pytest.mark.parametrize(('alpha', 'absent'), [(0, 'dist'), (1, 'base')])
def test_at_either_end_of_alpha_the_relation_terms_stay(run, alpha, absent):
    (row,) = run(distillation_alpha=alpha)
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == {absent}


def test_the_weights_of_the_terms_are_those_of_the_flags(run, monkeypatch):
    seen = []
    build = main.build_criterion
    monkeypatch.setattr(main, 'build_criterion', lambda args: seen.append(build(args)) or seen[-1])
    names = ['alpha', 'tau', 'beta', 'w_sample', 'w_patch', 'w_rand', 'K', 'w_full', 'relations', 'relation_scale']
    values = [0.25, 2.0, 3.0, 0.1, 4.0, 0.2, 7, 0.5, 'global', 'paper']
    run(**{f'distillation_{name}' if i < 3 else name: values[i] for i, name in enumerate(names)})
    assert [getattr(seen[0], name) for name in names] == values


def test_without_layer_lists_there_are_no_relations_and_the_first_screen_says_so(run, capsys):
    (row,) = run(s_id=None, t_id=None)
    assert_sound(row)
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == set(TERMS[2:])
    assert 'no relation terms' in capsys.readouterr().out


def test_the_full_term_is_off_unless_its_flag_is_typed_and_is_logged_as_0(run):
    (row,) = run(w_full=None)
    assert_sound(row)
    assert {term for term in TERMS if row[f'train_loss_{term}'] == 0} == {'mf_full'}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'w_full': None}, '1·sample + 1·patch + 1·random of 192 tokens), means over the 8 images of a rank'),
        ({'w_full': 0.5}, '1·random of 192 tokens + 0.5·full), means over the 8 images of a rank'),
        ({'relations': 'global'}, 'means over the 8 images of 1 rank'),
        ({'relation_scale': 'paper'}, "the paper's sums over the 8 images of a rank"),
    ],
)
def test_the_first_screen_says_which_relations_are_compared(run, capsys, changes, words):
    run(**changes)
    assert words in capsys.readouterr().out


def test_in_one_process_the_relations_of_all_ranks_are_its_own(run, tmp_path):
    one, other = (run(relations=relations, output_dir=tmp_path / relations) for relations in ('rank', 'global'))
    assert one == other


def test_the_paper_s_sums_are_the_means_times_layer_pairs_and_entries(run, tmp_path):
    options = {'lr': 1e-12, 'warmup_epochs': 0, 'K': 5}  # both runs stay where they begin
    (mean,), (paper,) = (run(relation_scale=s, output_dir=tmp_path / s, **options) for s in ('mean', 'paper'))
    B, N, K, L = 8, 16, 5, 3
    for term, entries in {'sample': B**2, 'patch': N**2, 'rand': K**2, 'full': (B * N) ** 2}.items():
        key = f'train_loss_mf_{term}'
        assert paper[key] == pytest.approx(mean[key] * entries * L, rel=1e-4)
    assert paper['train_loss_dist'] == pytest.approx(mean['train_loss_dist'], rel=1e-4)


def test_gradient_shares_stand_in_the_log_lines_on_demand_and_change_nothing(run, tmp_path, capsys):
    silent = run(output_dir=tmp_path / 'silent')
    assert 'share_' not in capsys.readouterr().out
    assert run(output_dir=tmp_path / 'shown', log_grad_share=True) == silent
    toys.assert_same(*(toys.load(tmp_path / name / 'checkpoint.pth')['model'] for name in ('silent', 'shown')))
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r'Epoch: \[0\] \[', line)]
    assert len(lines) == 2
    for line in lines:
        shares = dict(re.findall(r'share_(\w+): ([0-9.]+)%', line))
        assert list(shares) == TERMS
        assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)


def test_the_first_screen_says_what_will_run(run, capsys):
    run(batch_size=4, lr=0.01)
    screen, training = capsys.readouterr().out.split('Epoch: [0]', 1)
    for words in [
        f'torch {torch.__version__}',
        f'timm {timm.__version__}',
        'cpu',
        'float32',
        'FAKE',
        '10 classes',
        '1 rank × 4 images = 4 a step',
        f'{0.01 * 4 / 512:g}',
        '16 for training',
        '8 for validation',
        '4 steps',
        'shuffled',
        f'{sum(p.numel() for p in toys.student().parameters()):,} parameters, blocks 0 1 3 of 4',
        f'{sum(p.numel() for p in toys.teacher().parameters()):,} parameters, blocks 0 1 5 of 6',
    ]:
        assert words in screen
    assert all(f'loss_{term}: ' in training for term in TERMS)


def test_a_missing_gpu_is_said_and_the_cpu_taken(run, capsys):
    run(device='cuda:3')
    assert '--device cuda:3' in capsys.readouterr().out


@pytest.mark.parametrize(('typed', 'said'), [(True, 'repeated augmentation: 3 distinct'), (None, 'without repeats')])
def test_in_one_process_images_repeat_only_if_the_flag_is_typed(run, capsys, typed, said):
    run(repeated_aug=typed)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ('decay', 'epochs', 'warns'), [(0.5, 2, True), (0.5, 3, False), (0.99996, 3, True), (0, 2, False)]
)
def test_a_moving_average_that_cannot_move_is_warned_of(run, capsys, decay, epochs, warns):
    run(model_ema_decay=decay, epochs=epochs)  # two steps an epoch; fewer than three lengths of the average are few
    assert ('--model-ema-decay' in capsys.readouterr().out) is warns


def test_the_teacher_is_frozen_and_in_no_checkpoint(run, files, tmp_path, monkeypatch):
    built = []
    tap = main.tap_teacher
    monkeypatch.setattr(main, 'tap_teacher', lambda *args: built.append(tap(*args)) or built[0])
    run(epochs=2, opt='sgd', lr=10)
    original = toys.teacher()
    toys.assert_same(built[0].model.state_dict(), original.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in built[0].parameters())
    images = torch.randn(3, 3, 32, 32)
    # Its talking heads are put otherwise, which rounds otherwise.
    torch.testing.assert_close(built[0](images).logits, original.eval()(images), rtol=1e-5, atol=1e-5)
    checkpoint = toys.load(tmp_path / 'checkpoint.pth')
    assert checkpoint['model'].keys() == checkpoint['model_ema'].keys() == toys.student().state_dict().keys()
    held = [index for group in checkpoint['optimizer']['param_groups'] for index in group['params']]
    assert len(held) == len(list(toys.student().parameters()))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # webdataset closes no file it read
def test_a_run_on_a_stream_trains_evaluates_each_image_once_and_goes_on_at_an_epoch_as_if_never_stopped(
    run, files, tmp_path, capsys
):
    options = {**STREAM, 'data_path': files / 'shards', 'num_workers': 2, 'batch_size': 4, 'seed': 3}
    whole = run(**options, epochs=2, output_dir=tmp_path / 'whole')
    assert 'Accuracy of the network on the 8 test images' in capsys.readouterr().out
    first = run(**options, epochs=1, output_dir=tmp_path / 'parts')
    parts = run(**options, epochs=2, output_dir=tmp_path / 'parts', resume='auto')
    assert first == parts[:1]
    assert len(parts) == 2
    assert parts[0]['train_loss'] == whole[0]['train_loss']
    gc.collect()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_stream_that_goes_on_in_mid_epoch_says_what_that_means(run, files, tmp_path, capsys, monkeypatch):
    options = {**STREAM, 'data_path': files / 'shards', 'batch_size': 4, 'save_interval_steps': 1}
    after_step = checkpoints.Keeper.after_step

    def stop_after_two(self):
        after_step(self)
        if self.state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Keeper, 'after_step', stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    monkeypatch.undo()
    monkeypatch.setattr(datasets, 'FAKE_VAL', VAL_IMAGES)
    assert len(run(**options, resume='auto')) == 1
    out = capsys.readouterr().out
    assert 'a stream cannot be entered in its midst' in out
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] == 4
    gc.collect()


# Pairs of models ------------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_model_are_listed_with_index_grid_width_and_path(capsys):
    main.main(['--list-blocks', '--model', 'swin_tiny_patch4_window7_224'])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == 'swin_tiny_patch4_window7_224, 224 pixels: 12 blocks over patch tokens'
    assert rows[0].split() == ['0', '56×56', '96', 'layers.0.blocks.0']
    assert rows[11].split() == ['11', '7×7', '768', 'layers.3.blocks.1']


def test_auto_pairs_the_blocks_of_the_recipe_and_the_run_keeps_their_numbers(run, tmp_path, capsys):
    run(s_id='auto', t_id='auto')
    flags = toys.load(tmp_path / 'checkpoint.pth')['args']
    assert (flags['s_id'], flags['t_id']) == ([0, 1, 2, 3], [0, 1, 4, 5])  # of 4 and 6
    run(s_id='auto', t_id='auto', epochs=2, resume='auto')
    assert 'differ' not in capsys.readouterr().out.split('--epochs')[0].split('resume')[0]


def test_a_teacher_without_a_head_teaches_relations_alone(run, files, capsys):
    (row,) = run(teacher_path=files / 'headless.pth', distillation_alpha=0)
    assert_sound(row, absent={'dist'})
    assert 'loss        CE, no KD + 1·(' in capsys.readouterr().out


def test_a_teacher_of_other_classes_teaches_relations_alone_also_two_heads(run, files):
    (row,) = run(teacher_path=files / 'seven.pth', distillation_alpha=0, model='deit_tiny_distilled_patch16_224')
    assert_sound(row, absent={'dist'})


@pytest.mark.parametrize('how', ['pool', 'interpolate', 'merge'])
def test_a_teacher_of_another_size_meets_the_student_on_one_grid(run, capsys, how):
    (row,) = run(token_align=how, teacher_input_size=64, max_patches=16)  # 8×8 patches beside 4×4
    assert_sound(row)
    lines = capsys.readouterr().out.splitlines()
    assert 'position embeddings resampled to 8×8' in next(line for line in lines if line.startswith('teacher  '))
    assert f'align       {how}, of student and teacher: 4×4 and 8×8 on 4×4' in lines


def test_a_convolutional_student_learns_from_the_teacher_and_is_evaluated_and_fine_tuned(run, files, tmp_path, capsys):
    options = {'model': 'test_convnext', 'model_kwargs': None}
    (row,) = run(**options, s_id='auto', t_id='auto', token_align='pool')
    assert_sound(row)
    main.main(toys.flags(**options, **toys.ALONE, eval=True, resume=tmp_path / 'best_checkpoint.pth'))
    assert f'* Acc@1 {row["test_acc1"]:.3f}' in capsys.readouterr().out
    (row,) = run(**options, **toys.ALONE, data_set='FOLDER', data_path=files / 'tree',
                 finetune=tmp_path / 'best_checkpoint.pth', output_dir=tmp_path / 'tuned')  # fmt: skip
    assert toys.load(tmp_path / 'tuned' / 'checkpoint.pth')['model']['head.fc.weight'].shape[0] == 2
    assert 'head.fc replaced by a fresh one of 2 classes' in capsys.readouterr().out


def test_the_teacher_sees_the_student_s_images_in_its_own_normalisation(run, epochs, monkeypatch):
    run(model='test_convnext', model_kwargs=None, s_id=None, t_id=None)
    taught = epochs[0].teacher
    images = torch.rand(2, 3, 32, 32)
    ours, theirs = (timm.create_model(name).pretrained_cfg for name in ('test_convnext', 'cait_s24_224'))
    assert ours['mean'] != theirs['mean']
    raw = images * torch.tensor(ours['std']).view(3, 1, 1) + torch.tensor(ours['mean']).view(3, 1, 1)
    expected = (raw - torch.tensor(theirs['mean']).view(3, 1, 1)) / torch.tensor(theirs['std']).view(3, 1, 1)
    assert torch.allclose(taught(images).logits, taught.model(expected), atol=1e-5)


def test_models_come_from_a_folder_saved_for_the_hub_with_their_weights(run, files, tmp_path, capsys):
    kwargs = {'img_size': 32, 'num_classes': 10, **toys.TEACHER}
    folder = tmp_path / 'hub'
    folder.mkdir()
    config = {'architecture': 'cait_s24_224', 'num_classes': 10, 'model_args': kwargs,
              'pretrained_cfg': {'input_size': [3, 32, 32], 'num_classes': 10, 'classifier': 'head'}}  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors.torch.save_file(toys.teacher().state_dict(), folder / 'model.safetensors')
    (plain,) = run(output_dir=tmp_path / 'plain')
    hub = {'teacher_model': f'local-dir:{folder}', 'teacher_kwargs': None}
    assert run(**hub, teacher_path=None, output_dir=tmp_path / 'model') == [plain]
    assert run(teacher_path=f'local-dir:{folder}', output_dir=tmp_path / 'weights') == [plain]


def test_an_evaluation_that_is_not_finite_is_told_beside_its_accuracy(tmp_path, capsys):
    student = toys.student()
    for name, bias in (('sound', 0.0), ('spoilt', torch.nan)):
        with torch.no_grad():
            student.head.bias[0] += bias
        weights = toys.save(tmp_path / f'{name}.pth', student.state_dict())
        main.main(toys.flags(**toys.ALONE, eval=True, resume=weights))
        warned = 'warning: not finite: logits of the network; its accuracy means nothing' in capsys.readouterr().out
        assert warned == (name == 'spoilt')


def test_imagenet_with_two_class_folders_keeps_its_1000_classes_and_warns(run, files, tmp_path, capsys):
    (row,) = run(data_set='IMNET', data_path=files / 'tree', **toys.ALONE)
    assert_sound(row)
    assert toys.load(tmp_path / 'checkpoint.pth')['model']['head.weight'].shape[0] == 1000
    warning = next(line for line in capsys.readouterr().out.splitlines() if 'class folders' in line)
    assert warning.endswith('has 2 class folders of 1000; labels are their order, not those of ImageNet')


@pytest.mark.parametrize(('option', 'stops_at'), [({}, 'loss_dist'), ({'s_id': None, 't_id': None}, 'loss_dist')])
def test_a_teacher_that_answers_nan_stops_the_run_with_the_name_of_the_term(run, tmp_path, capsys, option, stops_at):
    teacher = toys.teacher()
    with torch.no_grad():
        teacher.head.bias[0] = torch.nan
    path = toys.save(tmp_path / 'nan.pth', teacher.state_dict())
    with pytest.raises(SystemExit) as stopped:
        run(teacher_path=path, output_dir=tmp_path / 'out', **option)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count('\n') == 1
    assert f'not finite at step 0 of epoch 0 on rank 0: {stops_at}, teacher logits; images ' in error
    assert 'loss_mf' not in error
    assert list((tmp_path / 'out').iterdir()) == []


def test_the_best_checkpoint_is_the_best_by_the_raw_model_and_remembered(run, tmp_path, monkeypatch, epochs):
    accuracies = iter([40.0, 60.0, 50.0, 55.0, 65.0])

    def evaluate(*_) -> dict[str, float]:
        return {'loss': 1.0, 'acc1': next(accuracies), 'acc5': 90.0, 'images': 8}

    monkeypatch.setattr(main, 'evaluate', evaluate)
    last, best = tmp_path / 'checkpoint.pth', tmp_path / 'best_checkpoint.pth'
    run(epochs=3)
    assert (toys.load(last)['epoch'], toys.load(last)['best_acc1']) == (2, 60)
    assert (toys.load(best)['epoch'], toys.load(best)['best_acc1']) == (1, 60)
    run(epochs=4, resume=last)  # better than the last, worse than the best
    assert (toys.load(last)['epoch'], toys.load(best)['epoch']) == (3, 1)
    run(epochs=5, resume=last)
    assert toys.load(best)['epoch'] == 4


# Evaluation -----------------------------------------------------------------------------------------------------------


def as_release(state: dict, ema: dict | None = None, **more) -> dict:
    """The layout of the release's checkpoints; no part but the weights matters in evaluation."""
    args = argparse.Namespace(model='deit_tiny_patch16_224', epochs=300, data_set='IMNET')
    scaler = {'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000}
    scaler['_growth_tracker'] = 0
    parts = {'model': state, 'optimizer': {'state': {}, 'param_groups': []}, 'lr_scheduler': {}, 'epoch': 299}
    return {**parts, 'model_ema': ema or state, 'scaler': scaler, 'args': args, **more}


LAYOUTS = {
    'release': as_release,
    'deit': lambda state: {'model': state},
    'timm': lambda state: {'state_dict': state, 'epoch': 7},
    'bare': lambda state: state,
    'ddp': lambda state: {'model': {f'module.{key}': value for key, value in state.items()}},
    'compiled': lambda state: {'model': {f'_orig_mod.{key}': value for key, value in state.items()}},
    'safetensors': None,
}
# Of the five images three show c0: a model that always says so is right on 60 % of them and 100 logits off on 40 %.
C0 = ['* Acc@1 60.000 Acc@5 100.000 loss 40.000', 'Accuracy of the network on the 5 test images: 60.0%']
C1 = ['* Acc@1 40.000 Acc@5 100.000 loss 60.000', 'Accuracy of the network on the 5 test images: 40.0%']


@pytest.fixture
def evaluation(files, capsys):
    """A function that evaluates on the tree without train/ and returns the lines with results."""

    def start(**changes) -> list[str]:
        main.main(toys.flags(**{'data_path': files / 'no_train', **FOLDER, 'eval': True, **changes}))
        return [line for line in capsys.readouterr().out.splitlines() if 'Acc' in line]

    return start


@pytest.mark.R8
@pytest.mark.parametrize('layout', LAYOUTS)
def test_evaluation_prints_the_lines_of_the_release_from_files_of_any_layout(evaluation, tmp_path, layout):
    state = toys.favouring(toys.student(2), 0).state_dict()
    path = tmp_path / f'weights.{"safetensors" if layout == "safetensors" else "pth"}'
    if layout == 'safetensors':
        safetensors.torch.save_file(state, path)
    else:
        toys.save(path, LAYOUTS[layout](state))
    assert evaluation(resume=path) == C0
    assert evaluation(finetune=path) == C0


@pytest.mark.parametrize(('eval_ema', 'lines'), [(True, C1), (None, C0)])
def test_the_moving_average_is_evaluated_when_asked_for(evaluation, tmp_path, eval_ema, lines):
    states = [toys.favouring(toys.student(2), winner).state_dict() for winner in (0, 1)]
    assert evaluation(resume=toys.save(tmp_path / 'released.pth', as_release(*states)), eval_ema=eval_ema) == lines


def test_our_own_checkpoint_evaluates_to_what_training_found(run, tmp_path, capsys):
    (row,) = run(eval_ema=True, lr=10, warmup_epochs=0, model_ema_decay=0.5, epochs=1)
    capsys.readouterr()
    for eval_ema, name in [(None, 'test'), (True, 'test_ema')]:
        expected = '* Acc@1 {:.3f} Acc@5 {:.3f} loss {:.3f}'.format(
            *(row[f'{name}_{k}'] for k in ('acc1', 'acc5', 'loss'))
        )
        main.main(toys.flags(eval=True, resume=tmp_path / 'checkpoint.pth', eval_ema=eval_ema, **toys.ALONE))
        assert expected in capsys.readouterr().out.splitlines()
    assert row['test_loss'] != row['test_ema_loss']


def test_the_teacher_is_evaluated_when_asked_for(run, files, tmp_path, capsys):
    path = toys.save(tmp_path / 'c1.pth', toys.favouring(toys.teacher(2), 1).state_dict())
    run(eval_teacher=True, teacher_path=path, data_set='FOLDER', data_path=files / 'tree', output_dir=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    found = lines.index('Accuracy of the teacher on the 5 test images: 40.0%')
    assert lines[found - 1] == C1[0]
    assert not any(line.startswith('Epoch') for line in lines[:found])


# Small micro-batches, activation checkpointing, compilation -----------------------------------------------------------

LOCAL = {
    'opt': 'sgd',
    'w_sample': 0,
    'w_rand': 0,
    'w_full': 0,
    'lr': 0.3,
    'warmup_epochs': 0,
    'drop_path': 0,
    'epochs': 2,
}


@pytest.mark.parametrize('mixing', [{}, {'mixup': 0, 'cutmix': 0}])
def test_an_accumulated_step_is_the_step_of_the_big_batch_for_terms_of_single_images(run, tmp_path, capsys, mixing):
    flags = {**LOCAL, **mixing}
    big = run(**flags, batch_size=8, output_dir=tmp_path / 'big')
    assert '1 rank × 8 images = 8 a step' in capsys.readouterr().out
    small = run(**flags, batch_size=2, accum_steps=4, output_dir=tmp_path / 'small')
    assert '1 rank × 2 images × 4 passes = 8 a step' in capsys.readouterr().out
    for one, other in zip(small, big, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert one['train_lr'] == other['train_lr'] == pytest.approx(0.3 * 8 / 512)
    states = [toys.load(tmp_path / name / 'checkpoint.pth') for name in ('small', 'big')]
    assert states[0]['step'] == states[1]['step'] == 2 * 2
    for key, value in states[1]['model'].items():
        torch.testing.assert_close(states[0]['model'][key], value, rtol=1e-3, atol=1e-3)
    assert big[1]['train_loss'] < big[0]['train_loss']


def test_accumulated_relations_across_images_see_a_micro_batch(run, tmp_path):
    flags = {**LOCAL, 'w_sample': 1, 'epochs': 1}
    big = run(**flags, batch_size=16, output_dir=tmp_path / 'big')
    small = run(**flags, batch_size=4, accum_steps=4, output_dir=tmp_path / 'small')
    assert small[0]['train_loss_mf_patch'] == pytest.approx(big[0]['train_loss_mf_patch'], rel=0.05)
    assert small[0]['train_loss_mf_sample'] < 0.9 * big[0]['train_loss_mf_sample']  # more of its entries are diagonal


def test_a_run_of_accumulated_steps_resumed_in_mid_epoch_is_the_whole_one_to_the_bit(run, tmp_path, monkeypatch):
    flags = {'batch_size': 4, 'accum_steps': 2, 'epochs': 2, 'drop_path': 0.2, 'save_interval_steps': 1}
    run(**flags, output_dir=tmp_path / 'whole')
    after_step, steps = main.Keeper.after_step, []

    def killed(self):
        after_step(self)
        steps.append(1)
        if len(steps) == 3:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(main.Keeper, 'after_step', killed)
        with pytest.raises(KilledError):
            run(**flags, output_dir=tmp_path / 'parts')
    assert toys.load(tmp_path / 'parts' / 'checkpoint.pth')['position'] == 8
    run(**flags, output_dir=tmp_path / 'parts', resume='auto')
    whole, parts = (toys.load(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'parts'))
    for key in ('model', 'model_ema', 'optimizer', 'step'):
        toys.assert_same(parts[key], whole[key])


def test_augmentation_on_the_device_trains_and_resumes_to_the_bit(run, tmp_path):
    flags = {'device_augment': True, 'epochs': 2, 'reprob': 0.9}
    whole = run(**flags, output_dir=tmp_path / 'whole')
    first = tmp_path / 'whole' / 'checkpoint-00000002.pth'
    assert run(**flags, resume=first, output_dir=tmp_path / 'parts') == whole[1:]
    assert run(**{**flags, 'device_augment': None}, output_dir=tmp_path / 'plain') != whole


def test_what_is_not_finite_in_the_first_of_several_passes_stops_the_step(run, monkeypatch):
    calls = []
    forward = main.ManifoldDistillationLoss.forward

    def poisoned(self, *args):
        calls.append(1)
        losses = forward(self, *args)
        return {**losses, 'mf_patch': losses['mf_patch'] * (math.nan if len(calls) == 3 else 1)}

    monkeypatch.setattr(main.ManifoldDistillationLoss, 'forward', poisoned)
    with pytest.raises(SystemExit):
        run(batch_size=4, accum_steps=2)
    assert len(calls) == 4  # it is known when the step is judged, before it is taken


def test_activation_checkpointing_keeps_less_and_changes_no_bit(run, tmp_path):
    flags = {'epochs': 1, 'drop_path': 0.3, 'lr': 0.3, 'warmup_epochs': 0}
    kept = []
    for name, extra in (('plain', {}), ('checkpointed', {'grad_checkpointing': True})):
        count = [0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, count=count: count.__setitem__(0, count[0] + x.numel()) or x, lambda x: x
        ):
            run(**flags, **extra, output_dir=tmp_path / name)
        kept.append(count[0])
    plain, checkpointed = (toys.load(tmp_path / name / 'checkpoint.pth') for name in ('plain', 'checkpointed'))
    toys.assert_same(checkpointed['model'], plain['model'])
    assert kept[1] < kept[0]


def test_activation_checkpointing_that_a_model_does_not_know_is_refused_in_words(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(grad_checkpointing=True, model='dla46_c', model_kwargs=None, **toys.ALONE)
    assert stopped.value.code == 2
    assert 'error: --grad-checkpointing with --model dla46_c: it knows no' in capsys.readouterr().err


@pytest.mark.slow  # half a minute of a compiler
@pytest.mark.filterwarnings('default')
def test_a_compiled_run_has_the_losses_and_the_keys_of_a_plain_one_and_resumes_to_the_bit(run, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset leaves alone
    flags = {'epochs': 2, 'lr': 0.3, 'warmup_epochs': 0, 'drop_path': 0, 'eval_ema': True}
    plain = run(**flags, output_dir=tmp_path / 'plain')
    rows = run(**flags, compile=True, output_dir=tmp_path / 'compiled')
    for one, other in zip(rows, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1.0)
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-3)
    low = run(**{**flags, 'epochs': 1}, compile=True, teacher_dtype='bfloat16', output_dir=tmp_path / 'low')
    assert low[0]['train_loss'] == pytest.approx(plain[0]['train_loss'], rel=0.05)
    states = [toys.load(tmp_path / name / 'checkpoint.pth') for name in ('plain', 'compiled')]
    for key in ('model', 'model_ema'):
        assert states[0][key].keys() == states[1][key].keys()
    assert (
        torch._dynamo.utils.counters['stats']['unique_graphs'] == 3
    )  # each kind of block once for each type of weights
    flags |= {'drop_path': 0.2, 'compile': True}
    whole = run(**flags, output_dir=tmp_path / 'whole')
    first = tmp_path / 'whole' / 'checkpoint-00000002.pth'
    assert toys.load(first)['epoch'] == 0
    assert run(**flags, resume=first, output_dir=tmp_path / 'parts') == whole[1:]
    toys.assert_same(*(toys.load(tmp_path / name / 'checkpoint.pth')['model'] for name in ('whole', 'parts')))
    torch._dynamo.reset()


@pytest.mark.slow  # half a minute of a compiler
@pytest.mark.filterwarnings('default')
def test_a_compiled_run_finds_the_shares_of_the_gradient(run, tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))  # found there, a graph may be another's
    monkeypatch.setattr(torch._functorch.config, 'donated_buffer', True)
    run(compile=True, log_grad_share=True, accum_steps=2, batch_size=4, output_dir=tmp_path / 'out')
    assert 'share_mf_patch' in capsys.readouterr().out
    torch._dynamo.reset()


# Resuming and fine-tuning ---------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for whatever ends a run between two epochs."""


@pytest.mark.parametrize('changes', [{}, {'model': 'deit_tiny_distilled_patch16_224', 'amp_dtype': 'float16'}])
def test_two_epochs_are_one_and_resume_and_one_to_the_bit(run, tmp_path, monkeypatch, changes):
    flags = {'epochs': 2, 'drop_path': 0.1, 'lr': 0.3, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'eval_ema': True}
    flags |= {'teacher_kwargs': f'{toys.RUN["teacher_kwargs"]} drop_path_rate=0.3', **changes}
    rows = run(**flags, output_dir=tmp_path / 'through')
    finish_epoch = main.finish_epoch

    def killed_in_epoch_1(args, parts, state, *rest):
        if state.epoch == 0:
            raise KilledError
        finish_epoch(args, parts, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(main, 'finish_epoch', killed_in_epoch_1)
        with pytest.raises(KilledError):
            run(**flags)
    assert run(**flags, resume=tmp_path / 'checkpoint.pth') == rows
    through, resumed = (toys.load(folder / 'checkpoint.pth') for folder in (tmp_path / 'through', tmp_path))
    for key in ('model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'best_acc1'):
        toys.assert_same(resumed[key], through[key])
    assert [row['epoch'] for row in rows] == [0, 1]
    assert abs(rows[0]['test_loss'] - rows[1]['test_loss']) > 1e-3  # it did train


def test_a_run_without_moving_average_resumes_without_one(run, tmp_path):
    run(no_model_ema=True)
    rows = run(no_model_ema=True, epochs=2, resume=tmp_path / 'checkpoint.pth')
    assert [row['epoch'] for row in rows] == [0, 1]
    assert 'model_ema' not in toys.load(tmp_path / 'checkpoint.pth')


def released_in_mid_run(path, epoch: int) -> dict:
    """A file as the release wrote it after some epoch, by an optimizer that counted its steps in ints."""
    model = toys.student()
    state = main.build_state(main.parse_args(toys.flags(**toys.ALONE)), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    state.optimizer.step()
    optimizer = state.optimizer.state_dict()
    for moments in optimizer['state'].values():
        moments['step'] = int(moments['step'])
    contents = as_release(model.state_dict(), toys.student().state_dict(), optimizer=optimizer, epoch=epoch)
    toys.save(path, contents)
    return contents


@pytest.mark.R8
def test_a_file_of_the_release_resumes_after_its_last_finished_epoch(run, tmp_path, capsys, epochs):
    contents = released_in_mid_run(tmp_path / 'released.pth', epoch=6)
    # A decay of 1 keeps the average as it is: it must be the file's, which differs from the file's weights.
    rows = run(resume=tmp_path / 'released.pth', epochs=8, model_ema_decay=1, lr=64 * 5e-4, warmup_epochs=2)
    assert [row['epoch'] for row in rows] == [7]
    assert 'epoch 6 done' in capsys.readouterr().out
    (call,) = epochs
    assert call.epoch == 7
    toys.assert_same(call.student.model.state_dict(), contents['model'])
    for index, moments in call.optimizer['state'].items():
        assert moments['step'] == 1
        assert torch.equal(moments['exp_avg'], contents['optimizer']['state'][index]['exp_avg'])
        assert torch.equal(moments['exp_avg_sq'], contents['optimizer']['state'][index]['exp_avg_sq'])
    # The rate of the eighth epoch: 64 * 5e-4 * 8/512 is the peak; after six epochs of eight the cosine is here.
    rate = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 6 / 8)) / 2
    assert [group['lr'] for group in call.optimizer['param_groups']] == pytest.approx([rate] * 2)
    toys.assert_same(toys.load(tmp_path / 'checkpoint.pth')['model_ema'], contents['model_ema'])


def test_a_file_of_the_release_trains_on(run, tmp_path):
    released_in_mid_run(tmp_path / 'released.pth', epoch=0)
    (row,) = run(resume=tmp_path / 'released.pth', epochs=2, amp_dtype='float16')
    assert_sound(row)
    assert toys.load(tmp_path / 'checkpoint.pth')['scaler']['scale'] <= 65536
    steps = {m['step'].item() for m in toys.load(tmp_path / 'checkpoint.pth')['optimizer']['state'].values()}
    assert steps <= {1, 2, 3}


@pytest.mark.parametrize('start', [None, 1])
def test_a_file_of_weights_alone_starts_fresh_with_the_average_of_its_weights(
    run, files, tmp_path, capsys, epochs, start
):
    rows = run(resume=files / 'student.pth', start_epoch=start, epochs=2, model_ema_decay=1)
    assert [row['epoch'] for row in rows] == list(range(start or 0, 2))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('resume'))
    assert 'weights only' in line
    assert f'epoch {start or 0}' in line
    assert 'average from these weights' in line
    assert epochs[0].optimizer['state'] == {}
    weights = toys.load(files / 'student.pth')['model']
    toys.assert_same(epochs[0].student.model.state_dict(), weights)
    toys.assert_same(toys.load(tmp_path / 'checkpoint.pth')['model_ema'], weights)


def test_a_run_that_is_done_already_says_so_and_ends_well(run, tmp_path, capsys, epochs):
    before = run(epochs=2)
    epochs.clear()
    assert run(epochs=2, resume=tmp_path / 'checkpoint.pth') == before
    assert epochs == []
    assert '--epochs 2' in capsys.readouterr().out


@pytest.mark.parametrize('taught', [False, True], ids=['without_teacher', 'with_teacher'])
def test_fine_tuning_adapts_positions_and_head_and_trains_in_train_mode_only_with_a_teacher(
    run, files, tmp_path, capsys, epochs, taught
):
    path = toys.save(tmp_path / 'teacher.pth', toys.teacher(2, 48).state_dict())
    tree = tmp_path / 'images'
    toys.write_images(tree / 'train', [4, 4], 48)
    toys.write_images(tree / 'val', [1, 1], 48)
    flags = {'teacher_path': path} if taught else toys.ALONE
    run(finetune=files / 'student.pth', data_set='FOLDER', data_path=tree, input_size=48, **flags)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('finetune'))
    assert 'position embeddings' in line
    assert 'head' in line
    (call,) = epochs
    assert call.train_mode is taught
    assert (call.teacher is not None) is taught
    state, original = call.student.model.state_dict(), toys.load(files / 'student.pth')['model']
    adapted = {key for key in state if state[key].shape != original[key].shape}
    assert adapted == {'pos_embed', 'head.weight', 'head.bias'}
    assert state['pos_embed'].shape[1] == 1 + 6 * 6
    assert torch.equal(state['pos_embed'][:, 0], original['pos_embed'][:, 0])
    toys.assert_same(
        {k: v for k, v in state.items() if k not in adapted}, {k: original[k] for k in state if k not in adapted}
    )


def test_without_fine_tuning_the_student_trains_in_train_mode(run, epochs):
    run(**toys.ALONE)
    assert epochs[0].train_mode is True


def test_another_seed_is_another_run_and_the_same_seed_the_same(run, tmp_path):
    rows = [run(seed=seed, output_dir=tmp_path / name) for seed, name in [(1, 'a'), (1, 'b'), (2, 'c')]]
    assert rows[0] == rows[1]
    assert all(rows[0][0][f'train_loss_{term}'] != rows[2][0][f'train_loss_{term}'] for term in TERMS)


# What must not be lost ------------------------------------------------------------------------------------------------


def _refused(capsys, **changes) -> str:
    with pytest.raises(SystemExit) as stopped:
        main.main(toys.flags(**changes))
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert stopped.value.code == 2
    return error


@pytest.mark.parametrize('resumed', ['best_checkpoint.pth', 'weights.pth', None])
def test_a_finished_run_is_written_over_by_nothing_but_its_own_continuation(run, tmp_path, capsys, resumed):
    run(**toys.ALONE)
    toys.save(tmp_path / 'weights.pth', toys.student().state_dict())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resume = str(tmp_path / resumed) if resumed else None
    error = _refused(capsys, **toys.ALONE, epochs=2, output_dir=tmp_path, resume=resume)
    assert f'--output_dir {tmp_path}: holds log.txt and best_checkpoint.pth and checkpoint.pth already' in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('text', ['{"epoch": 299}\n', 'hello\n', '[1]\n'])
def test_a_log_of_another_kind_is_noticed_before_training_and_kept(epochs, tmp_path, capsys, text):
    (tmp_path / 'log.txt').write_text(text)
    assert '--output_dir' in _refused(capsys, **toys.ALONE, output_dir=tmp_path)
    assert (tmp_path / 'log.txt').read_text() == text
    assert not epochs


def test_a_kill_between_the_two_files_of_an_epoch_leaves_the_best_weights(run, tmp_path, monkeypatch):
    write = checkpoints.write_durably

    def write_or_die(path, *rest):
        if path.name == 'checkpoint.pth':
            raise KilledError
        write(path, *rest)

    monkeypatch.setattr(checkpoints, 'write_durably', write_or_die)
    with pytest.raises(KilledError):
        run(**toys.ALONE)
    assert toys.load(tmp_path / 'best_checkpoint.pth')['epoch'] == 0


def test_the_first_epoch_can_be_chosen_without_a_checkpoint(run):
    rows = run(**toys.ALONE, start_epoch=2, epochs=3, warmup_epochs=4, lr=0.5)
    assert [row['epoch'] for row in rows] == [2]
    # the schedule lags one epoch: epoch 2 has the rate of the second quarter of the warm-up, 0.5·8/512 being its top
    assert rows[0]['train_lr'] == pytest.approx(1e-6 + (0.5 * 8 / 512 - 1e-6) / 4)


@pytest.mark.R8
def test_a_head_of_another_size_is_not_evaluated(files, capsys):
    weights = files / 'student.pth'
    error = _refused(capsys, **FOLDER, eval=True, data_path=files / 'no_train', finetune=weights)
    assert f'--finetune {weights}: does not fit the model' in error
    assert 'head.weight' in error


@pytest.mark.R11
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_stops_the_run_in_one_line_with_its_name(files, tmp_path, capsys, workers):
    toys.write_images(tmp_path / 'val', [2, 2], 32)
    damaged = tmp_path / 'val' / 'c1' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:40])
    weights = toys.save(tmp_path / 'weights.pth', toys.student(2).state_dict())
    flags = {**toys.ALONE, **FOLDER, 'data_path': tmp_path, 'num_workers': workers}
    with pytest.raises(SystemExit) as stopped:
        main.main(toys.flags(**flags, eval=True, resume=weights))
    assert stopped.value.code == 1
    assert f'{damaged}: ' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.R13
@pytest.mark.parametrize(
    ('changes', 'word'),
    [
        ({'epoch': '3'}, "epoch is '3'"),
        ({'epoch': -5}, 'epoch is -5'),
        ({'best_acc1': 'x'}, 'x'),
        ({'args': {'opt': 'lamb'}}, '--opt lamb'),
        ({'optimizer': {}}, 'optimizer'),
    ],
)
def test_a_checkpoint_with_one_odd_value_is_refused_in_words(run, tmp_path, capsys, changes, word):
    run(**toys.ALONE)
    odd = toys.save(tmp_path / 'odd.pth', {**toys.load(tmp_path / 'checkpoint.pth'), **changes})
    error = _refused(capsys, **toys.ALONE, resume=odd, output_dir=tmp_path / 'new', epochs=2)
    assert f'--resume {odd}' in error
    assert word in error


# Going on -------------------------------------------------------------------------------------------------------------

# Two epochs of four steps with all that draws random numbers, and an average that moves.
LONG = {'epochs': 2, 'batch_size': 4, 'drop_path': 0.1, 'lr': 3, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'K': 5}
LONG |= {'resume': 'auto', 'save_interval_steps': 1, 'keep': 20, 'eval_ema': True}
HALF = {'amp_dtype': 'float16', 'model': 'deit_tiny_distilled_patch16_224', 'clip_grad': 1}
forks = pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')  # Python 3.12 on


@pytest.fixture(scope='module')
def through(files, tmp_path_factory):
    """The folder of an uninterrupted run with every one of its states, in float32 or float16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, 'FAKE_TRAIN', TRAIN_IMAGES)
        patch.setattr(datasets, 'FAKE_VAL', VAL_IMAGES)
        folders = {}
        for name, changes in (('float32', {}), ('float16', HALF)):
            folders[name] = tmp_path_factory.mktemp(name)
            flags = {**LONG, **changes, 'teacher_path': files / 'teacher.pth', 'output_dir': folders[name]}
            main.main(toys.flags(**flags))
    return folders


def outcome(folder) -> dict:
    """All in which a resumed run must equal one that was never interrupted."""
    last = toys.load(folder / 'checkpoint.pth')
    keys = ('model', 'model_ema', 'optimizer', 'scaler', 'lr_scheduler', 'best_acc1', 'epoch', 'position', 'step')
    best = toys.load(folder / 'best_checkpoint.pth')
    return {'log': toys.log_rows(folder), 'best': best['model'], **{key: last[key] for key in keys}}


def differing(one: dict, other: dict) -> set[str]:
    found = set()
    for key in one:
        try:
            toys.assert_same(one[key], other[key])
        except AssertionError:
            found.add(key)
    return found


def interrupted(through, after: int, folder, **changes) -> None:
    """What a run leaves that was killed after some step: its state, changed, and the log and best one of before."""
    state = {**toys.load(through / f'checkpoint-{after:08d}.pth'), **changes}
    (folder / 'checkpoint.pth').write_bytes(checkpoints.serialize(state))
    if state['epoch'] == 0:
        lines = (through / 'log.txt').read_text().splitlines(keepends=True)
        (folder / 'log.txt').write_text(lines[0])
        shutil.copy(through / 'checkpoint-00000004.pth', folder / 'best_checkpoint.pth')


def test_the_whole_run_does_train_and_saves_every_step(through):
    for folder in through.values():
        rows = toys.log_rows(folder)
        assert [row['epoch'] for row in rows] == [0, 1]
        assert abs(rows[0]['test_loss'] - rows[1]['test_loss']) > 1e-3
        assert max(row['test_acc1'] for row in rows) == toys.load(folder / 'checkpoint.pth')['best_acc1']
        states = [toys.load(folder / f'checkpoint-{step:08d}.pth') for step in range(1, 8)]
        # The state of the last step of an epoch is written again once it is evaluated.
        assert [(s['epoch'], s['position']) for s in states] == [
            (-1, 4), (-1, 8), (-1, 12), (0, 0), (0, 4), (0, 8), (0, 12)
        ]  # fmt: skip
        assert not any('teacher' in name for name in listing(folder))


@pytest.mark.parametrize('step', [1, 3, 4, 6, 7])
@pytest.mark.parametrize('kind', ['float32', 'float16'])
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one_to_the_bit(run, through, tmp_path, kind, step):
    interrupted(through[kind], step, tmp_path)
    run(**LONG, **(HALF if kind == 'float16' else {}))
    assert differing(outcome(tmp_path), outcome(through[kind])) == set()


@pytest.mark.parametrize(
    ('dropped', 'differs'),
    [
        ({'position': 0}, {'model', 'optimizer', 'log'}),
        ({'step': 0}, {'model', 'log'}),
        ({'model_ema': None}, {'model_ema', 'log'}),
        ({'optimizer': None}, {'model', 'optimizer'}),
        ({'meters': {}}, {'log'}),
        ({'best_acc1': 99.0}, {'best_acc1'}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_without_any_part_of_its_state_it_would_be_another_one(run, through, tmp_path, dropped, differs):
    if 'optimizer' in dropped:
        whole = toys.load(through['float32'] / 'checkpoint-00000006.pth')['optimizer']
        dropped = {'optimizer': {**whole, 'state': {}}}
    interrupted(through['float32'], 6, tmp_path, **dropped)
    run(**LONG)
    assert differing(outcome(tmp_path), outcome(through['float32'])) >= differs


def after_calls(patch, module, name: str, count: int, act) -> None:
    """Makes a function act on its own after so many calls."""
    call, calls = getattr(module, name), []

    def instead(*args, **kwargs):
        found = call(*args, **kwargs)
        calls.append(None)
        if len(calls) == count:
            act()
        return found

    patch.setattr(module, name, instead)


def die() -> None:
    raise KilledError


PLACES = {
    'the first step': (utils, 'seed_step', 1),
    'a step': (utils, 'seed_step', 7),
    'an evaluation': (engine, '_count_correct', 3),
    'a save': (checkpoints, 'serialize', 5),
}


@forks
@pytest.mark.parametrize(('place', 'workers'), [*((place, 0) for place in PLACES), ('a step', 2)])
def test_a_run_that_dies_goes_on_to_the_same_end(run, through, tmp_path, monkeypatch, place, workers):
    with monkeypatch.context() as patch:
        after_calls(patch, *PLACES[place], die)
        with pytest.raises(KilledError):
            run(**LONG, num_workers=workers)
    run(**LONG)
    assert differing(outcome(tmp_path), outcome(through['float32'])) == set()


@forks
@pytest.mark.parametrize(
    ('number', 'place', 'workers'),
    [
        (signal.SIGTERM, 'the first step', 0),
        (signal.SIGINT, 'a step', 2),
        (signal.SIGUSR1, 'an evaluation', 0),
        (signal.SIGTERM, 'a save', 0),
    ],
)
def test_a_signal_saves_and_stops_and_no_step_is_lost(
    run, through, tmp_path, monkeypatch, capsys, number, place, workers
):
    flags = {**LONG, 'save_interval_steps': 0, 'num_workers': workers}
    module, name, count = PLACES[place]
    with monkeypatch.context() as patch:
        # Saved by nothing but the signal and the end of an epoch.
        after_calls(patch, module, name, 1 if place == 'a save' else count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            run(**flags)
    assert stopped.value.code == 128 + number
    error = capsys.readouterr().err
    assert error.startswith(f'main.py: error: stopped by {number.name}: ')
    assert error.count('\n') == 1
    assert f'saved in {tmp_path / "checkpoint.pth"}' in error
    steps = {'the first step': 1, 'a step': 7, 'an evaluation': 4, 'a save': 4}
    # During a save at the end of an epoch: the next step is made, for there the ranks agree.
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] - steps[place] in ((0, 1) if place == 'a save' else (0,))
    run(**flags)
    assert differing(outcome(tmp_path), outcome(through['float32'])) == set()


def test_a_signal_before_there_is_anything_to_save_ends_the_run_at_once(run, tmp_path, monkeypatch, capsys):
    after_calls(monkeypatch, main, 'build_val_loader', 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 143
    assert capsys.readouterr().err == 'main.py: error: stopped by SIGTERM: nothing was trained\n'
    assert listing(tmp_path) == {}


def test_a_signal_ends_a_plain_evaluation(evaluation, files, tmp_path, monkeypatch):
    path = toys.save(tmp_path / 'weights.pth', toys.student(2).state_dict())
    after_calls(monkeypatch, engine, '_count_correct', 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        evaluation(resume=path)
    assert stopped.value.code == 143


def listing(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def line_with(capsys, word: str) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if word in line)


def test_auto_begins_in_an_empty_folder_and_goes_on_in_a_used_one(run, tmp_path, capsys, epochs):
    run(resume='auto')
    assert f'auto: no checkpoint in {tmp_path}, the run begins' in line_with(capsys, 'resume ')
    rows = run(resume='auto', epochs=2)
    assert 'resume      auto: epoch 0 done, its moving average, best Acc@1 ' in capsys.readouterr().out
    assert [call.epoch for call in epochs] == [0, 1]
    assert [row['epoch'] for row in rows] == [0, 1]


@pytest.mark.parametrize('resume', ['auto', '{folder}/checkpoint.pth'])
@pytest.mark.parametrize('damage', [b'', b'<html>404</html>', None], ids=['empty', 'html', 'truncated'])
def test_a_damaged_newest_state_is_named_and_the_one_before_taken(run, tmp_path, capsys, epochs, resume, damage):
    run(epochs=2)
    last = tmp_path / 'checkpoint.pth'
    last.write_bytes(last.read_bytes()[:-100] if damage is None else damage)
    (earlier,) = tmp_path.glob('checkpoint-*.pth')
    assert toys.load(earlier)['epoch'] == 0
    capsys.readouterr(), epochs.clear()
    rows = run(epochs=2, resume=resume.format(folder=tmp_path))
    warning = line_with(capsys, 'warning: --resume')
    assert 'checkpoint.pth is damaged' in warning
    assert f'going back to {earlier.name}' in warning
    assert [call.epoch for call in epochs] == [1]
    assert [row['epoch'] for row in rows] == [0, 1]
    assert {toys.load(path)['epoch'] for path in tmp_path.glob('checkpoint*.pth')} == {0, 1}


@pytest.mark.parametrize('resume', ['auto', '{folder}/checkpoint.pth'])
def test_a_folder_in_which_all_is_damaged_is_refused_and_kept(run, tmp_path, capsys, epochs, resume):
    run(epochs=2)
    for path in tmp_path.glob('*.pth'):
        path.write_bytes(b'')
    before = listing(tmp_path)
    capsys.readouterr()
    error = _refused(capsys, resume=resume.format(folder=tmp_path), epochs=3, output_dir=tmp_path, **toys.ALONE)
    assert all(f'{name} is damaged' in error for name in before if name.endswith('.pth'))
    assert listing(tmp_path) == before


def test_a_log_whose_checkpoint_is_gone_is_not_written_over_by_auto(tmp_path, capsys, epochs):
    (tmp_path / 'log.txt').write_text('{"epoch": 0}\n{"epoch": 1}\n')
    error = _refused(capsys, **toys.ALONE, resume='auto', output_dir=tmp_path)
    assert f'--output_dir {tmp_path}: holds log.txt already' in error
    assert (tmp_path / 'log.txt').read_text().count('\n') == 2


def test_a_run_killed_between_its_first_row_and_its_first_state_begins_again(run, tmp_path):
    (tmp_path / 'log.txt').write_text('{"epoch": 0}\n')
    (row,) = run(resume='auto', epochs=1)
    assert_sound(row)


@pytest.mark.parametrize(('keep', 'earlier'), [(None, [4]), (0, []), (2, [2, 4])])
def test_as_many_states_are_kept_as_asked_for(run, tmp_path, epochs, monkeypatch, keep, earlier):
    train = main.finish_epoch

    def counted(args, parts, state, *rest):
        state.step += 2
        train(args, parts, state, *rest)

    monkeypatch.setattr(main, 'finish_epoch', counted)
    run(epochs=3, keep=keep)
    assert sorted(int(path.name[11:19]) for path in tmp_path.glob('checkpoint-*.pth')) == earlier


@pytest.mark.R13
def test_flags_that_differ_are_shown_in_a_table(run, tmp_path, capsys, epochs):
    run(drop_path=0.1)
    capsys.readouterr()
    changed = {'lr': 0.3, 'epochs': 2, 'batch_size': 4, 's_id': '0 1 2', 'num_workers': 1, 'print_freq': 3}
    run(resume='auto', **changed)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if 'flags that differ' in line)
    table = [line.split(maxsplit=1) for line in lines[start + 2 : start + 7]]
    assert {flag: ' '.join(values.split()) for flag, values in table} == {
        '--lr': '0.0005 0.3',
        '--epochs': '1 2',
        '--batch-size': '8 4',
        '--s-id': '0 1 -1 0 1 2',
        '--drop-path': '0.1 0.0',
    }
    assert not lines[start + 7].startswith(' ')


@pytest.mark.R13
def test_where_no_flag_differs_there_is_no_table(run, capsys, epochs):
    run()
    run(resume='auto')
    assert 'differ' not in capsys.readouterr().out


@pytest.mark.R13
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'model': 'deit_small_patch16_224'}, 'was trained with --model deit_tiny_patch16_224, now it is deit_small'),
        ({'model_kwargs': 'patch_size=8 embed_dim=32 depth=4 num_heads=4'}, 'was trained with --model-kwargs'),
        ({'seed': 1}, 'was trained with --seed 0, now it is 1'),
        ({'opt': 'sgd'}, 'was trained with --opt adamw, now it is sgd'),
        ({'data_set': 'FOLDER', 'data_path': '{tree}'}, 'does not fit the model'),  # another number of classes
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_model_seed_optimizer_or_head_is_refused_in_one_line(
    run, files, tmp_path, capsys, epochs, changes, words
):
    run(**toys.ALONE)
    before = listing(tmp_path)
    capsys.readouterr(), epochs.clear()
    changes = {key: str(value).format(tree=files / 'tree') for key, value in changes.items()}
    error = _refused(capsys, **{**toys.ALONE, **changes}, epochs=2, resume='auto', output_dir=tmp_path)
    assert f'--resume auto: {words}' in error
    assert (listing(tmp_path), epochs) == (before, [])


@pytest.mark.R13
@pytest.mark.parametrize(
    ('counts', 'names', 'words'),
    [
        ([5, 4], None, 'was trained on 8 images of 2 classes, now there are 9 of 2'),
        ([4, 4], ['c0', 'x'], 'was trained on classes of other names'),
        ([4, 4], None, None),
    ],
    ids=['images', 'names', 'another place'],
)
def test_other_data_are_refused_in_one_line_but_for_their_place(
    run, files, tmp_path, capsys, epochs, counts, names, words
):
    flags = {**toys.ALONE, 'data_set': 'FOLDER', 'batch_size': 4, 'output_dir': tmp_path / 'out'}
    run(**flags, data_path=files / 'tree')
    for split, numbers in (('train', counts), ('val', [1, 1])):
        toys.write_images(tmp_path / 'data' / split, numbers, 32)
        for i, name in enumerate(names or ()):
            (tmp_path / 'data' / split / f'c{i}').rename(tmp_path / 'data' / split / name)
    flags |= {'data_path': tmp_path / 'data', 'resume': 'auto', 'epochs': 2}
    capsys.readouterr()
    if words is None:
        assert len(run(**flags)) == 2
        return
    error = _refused(capsys, **flags)
    assert f'--data-path {tmp_path / "data"}: --resume auto {words}' in error


# What is not finite, and what cannot be read --------------------------------------------------------------------------


def poisoned(monkeypatch, *steps: int) -> None:
    """Makes the loss of these steps NaN, whatever was resumed."""
    seed_step, build = utils.seed_step, main.build_criterion
    now = []
    monkeypatch.setattr(utils, 'seed_step', lambda *args: now.append(args[2]) or seed_step(*args))

    def poison(module, inputs, losses):
        return {**losses, 'mf_rand': losses['mf_rand'] * (math.nan if now[-1] in steps else 1)}

    def built(args):
        criterion = build(args)
        criterion.register_forward_hook(poison)
        return criterion

    monkeypatch.setattr(main, 'build_criterion', built)


def test_a_loss_that_is_not_finite_leaves_the_state_before_it(run, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 5)
    with pytest.raises(SystemExit) as stopped:
        run(**LONG)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith('main.py: error: not finite at step 1 of epoch 1 on rank 0: loss_mf_rand; images ')
    assert toys.load(tmp_path / 'checkpoint.pth')['step'] == 5
    assert all(value.isfinite().all() for value in toys.load(tmp_path / 'checkpoint.pth')['model'].values())


def test_as_many_updates_are_left_out_as_allowed_counted_across_a_resume(run, through, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 2, 6)
    flags = {**LONG, 'non_finite': 'skip:1'}
    run(**{**flags, 'epochs': 1})
    assert 'update withheld, 1 of 1 allowed' in capsys.readouterr().out
    state = toys.load(tmp_path / 'checkpoint.pth')
    assert (state['step'], state['skipped']) == (4, 1)
    assert {moments['step'].item() for moments in state['optimizer']['state'].values()} == {3}
    with pytest.raises(SystemExit):
        run(**flags)
    assert 'not finite at step 2 of epoch 1' in capsys.readouterr().err
    run(**{**flags, 'non_finite': 'skip:2'})
    assert toys.load(tmp_path / 'checkpoint.pth')['skipped'] == 2
    assert differing(outcome(tmp_path), outcome(through['float32'])) >= {'model', 'model_ema', 'log'}


@pytest.mark.R11
@forks
@pytest.mark.parametrize('workers', [0, 2])
def test_bad_images_are_left_out_if_asked_for_and_listed(run, files, tmp_path, capsys, workers):
    tree = tmp_path / 'tree'
    shutil.copytree(files / 'tree', tree)
    bad = [tree / 'train' / 'c0' / '1.png', tree / 'train' / 'c1' / '3.png', tree / 'val' / 'c1' / '1.png']
    for path in bad:
        path.write_bytes(path.read_bytes()[:40])
    flags = {**toys.ALONE, 'data_set': 'FOLDER', 'data_path': tree, 'batch_size': 4, 'epochs': 2}
    rows = run(**flags, bad_images='skip', num_workers=workers, output_dir=tmp_path / 'out')
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith('Accuracy of the network on the 4 test images') for line in lines)
    assert sum('[2/2]' in line for line in lines) == 2  # as many steps as without
    ends = ['replaced by the next one', 'replaced by the next one', 'left out of evaluation']
    warnings = [f'warning: cannot be read, {end}: {path} (class {path.parent.name})'
                for end, path in zip(ends, bad, strict=True)]  # fmt: skip
    assert [line for line in lines if 'cannot be read' in line] == warnings * 2  # when they are found, and at the end
    assert rows == run(**flags, bad_images='skip', num_workers=2 - workers, output_dir=tmp_path / 'again')
    with pytest.raises(SystemExit) as stopped:
        run(**flags, num_workers=0, output_dir=tmp_path / 'stops')
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert any(f'{path}: ' in error and error.endswith(f'(class {path.parent.name})') for path in bad[:2])


def test_the_teacher_is_in_no_file(through):
    names = set(toys.teacher().state_dict()) - set(toys.student().state_dict())
    assert len(names) > 10
    for path in through['float32'].iterdir():
        data = path.read_bytes()
        assert not any(name.encode() in data for name in names)
        if path.suffix == '.pth':
            assert toys.load(path)['model'].keys() == toys.student().state_dict().keys()


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(run, tmp_path, monkeypatch, capsys):
    run(**toys.ALONE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read = torch.load

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(**toys.ALONE, epochs=2, resume='auto')
    assert stopped.value.code == 128 + signal.SIGTERM
    assert 'damaged' not in ''.join(capsys.readouterr())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_auto_has_nothing_to_evaluate_in_an_empty_folder(tmp_path, capsys):
    error = _refused(capsys, **toys.ALONE, eval=True, resume='auto', output_dir=tmp_path)
    assert f'--resume auto: there is no checkpoint in --output_dir {tmp_path}' in error


def test_a_checkpoint_of_another_seed_and_optimizer_is_evaluated(run, tmp_path, capsys):
    run(**toys.ALONE, seed=3, opt='sgd')
    main.main(toys.flags(**toys.ALONE, eval=True, resume=tmp_path / 'checkpoint.pth'))
    assert 'Accuracy of the network' in capsys.readouterr().out


def test_a_damaged_file_that_is_named_is_not_evaluated_by_another(run, tmp_path, capsys):
    run(**toys.ALONE, epochs=2)
    last = tmp_path / 'checkpoint.pth'
    last.write_bytes(last.read_bytes()[:-2000])
    assert 'is damaged' in _refused(capsys, **toys.ALONE, eval=True, resume=last, output_dir=tmp_path)
