"""The flags of main.py: those of the release, wrong use, and flags without effect."""

import argparse
import ast
from pathlib import Path

import pytest
import torch
import toys
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

import flag_hints
import flags
import main
import models
import summary
from losses import RELATION_TERMS
from utils import UsageError

ROOT = Path(main.__file__).parent

pytestmark = pytest.mark.usefixtures('few_generated_images')

# Flags of the release, by a value that fits: name and default.
RELEASE = {
    ('3',): {
        'batch-size': 64, 'epochs': 300, 'K': 192, 'input-size': 224, 'warmup-epochs': 5, 'cooldown-epochs': 10,
        'patience-epochs': 10, 'recount': 1, 'seed': 0, 'start_epoch': 0, 'num_workers': None, 'world_size': 1,
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
    'distillation-type': {'none', 'soft', 'hard', 'lskd', 'nkd'},  # the last two are new
    'data-set': {'CIFAR', 'IMNET', 'INAT', 'INAT19'},
    'inat-category': {'kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name'},
    # The release took any word here. These are the ones it understood, except the plateau schedule.
    'sched': {'cosine', 'tanh', 'step', 'poly'},
    'train-interpolation': {'random', 'bilinear', 'bicubic'},
    'remode': {'const', 'rand', 'pixel'},
    'mixup-mode': {'batch', 'pair', 'elem'},
}
FLAGS = [(flag, default, words) for words, table in RELEASE.items() for flag, default in table.items()]


def dest(flag: str) -> str:
    return flag.removeprefix('no-').replace('-', '_')


def test_release_table_has_74_flags():
    assert len(FLAGS) == len({flag for flag, _, _ in FLAGS}) == 74


@pytest.mark.parametrize(('flag', 'default', 'words'), FLAGS, ids=[flag for flag, _, _ in FLAGS])
def test_release_flag_keeps_name_default_and_choices(flag, default, words):
    parser = flags.get_args_parser()
    unset = getattr(parser.parse_args([]), dest(flag))
    assert unset == default
    assert type(unset) is type(default) or flag == 'decay-epochs'  # the release writes the float as 30
    # Of the release's defaults, 10 loader processes alone depend on the machine here: at most one per core.
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
    if flag == 'data-set':  # there are more names, and some are only prefixes
        assert all(parser.parse_args(['--data-set', name]).data_set == name for name in CHOICES[flag])
    else:
        assert choices == CHOICES.get(flag, set())


def test_dr_is_short_for_decay_rate():
    assert flags.get_args_parser().parse_args(['--dr', '0.3']).decay_rate == 0.3


def test_equals_sign_and_underscores_in_values():
    args = flags.get_args_parser().parse_args(['--output_dir=a_b=c_d', '--model_kwargs', 'img_size=3', '--s-id', '-1'])
    assert (args.output_dir, args.model_kwargs, args.s_id) == ('a_b=c_d', {'img_size': 3}, [-1])


class Watched(argparse.Namespace):
    """Records which of its values are read."""

    def __getattribute__(self, name: str):
        if not name.startswith('_'):
            super().__getattribute__('_asked').add(name)
        return super().__getattribute__(name)


def test_every_flag_has_help_and_is_read():
    parser = flags.get_args_parser()
    core = [path for path in ROOT.glob('*.py') if path.name != 'summary.py']
    nodes = [node for path in core for node in ast.walk(ast.parse(path.read_text()))]
    readers = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    args = Watched(_asked=set(), **vars(parser.parse_args([])))
    optimizer_kwargs(args), scheduler_kwargs(args)
    # timm reads some of the flags without effect too, but does not use them.
    idle = {action.dest for action in parser._actions if 'no effect' in (action.help or '')}
    assert idle == {'cooldown_epochs', 'patience_epochs', 'resplit', 'local_rank', 'distributed', 'world_size'}
    assert not idle & readers
    known = {action.dest for action in parser._actions} - {'help'}
    weights = {f'w_{name}' for name in RELATION_TERMS}  # read as one field, `weights`
    assert known - idle - readers - args._asked - weights == set()
    assert [action.dest for action in parser._actions if len(action.help or '') < 5] == []


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(['--help'])
    assert stopped.value.code == 0
    assert '--w-patch' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('word', 'meant'),
    [
        *((word, flag) for flag, words in flag_hints.GUESSES.items() for word in words.split()),
        ('--w-smaple=3', '--w-sample'),
        ('--save_intervall_steps', '--save-interval-steps'),
        ('--learning-rates', None),
        ('--frobnicate', None),
        ('stray', None),
    ],
)
def test_unknown_flag_suggests_the_nearest_one(word, meant):
    with pytest.raises(
        UsageError,
        match=f'^{word.replace("_", "-")}: unrecognized argument' + (f'; did you mean {meant}\\?$' if meant else '$'),
    ):
        flags.parse_args([word])


# First the flag and value that the message must name, then other flags of the run. Further words must appear too.
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
    ({'teacher_path': '{files}/teacher.pth', 'distillation_type': 'none', 's_id': None, 't_id': None}, 'soft or hard'),
    ({'s_id': '0 1', 't_id': '0 1', 'distillation_type': 'none', 'teacher_path': None}, '--distillation-type'),
    ({'teacher_pretrained': True, **toys.ALONE}, '--distillation-type'),
    ({'distillation_alpha': 1.5},),
    ({'distillation_tau': 0},),
    ({'w_patch': -1},),
    ({'w_rand': 'nan'},),
    ({'w_full': -1},),
    ({'relations': 'all'},),
    ({'relation_dtype': 'float16'},),
    ({'teacher_dtype': 'float16'},),
    ({'fused': 'talking-heads'}, '--teacher-model cait_s24_224', '4 heads of 12 channels'),
    ({'fused': 'none full'}, 'none cannot have other parts'),
    ({'fused': 'talking-heads', 'teacher_model': 'deit_tiny_patch16_224', 'teacher_path': '{files}/student.pth',
      'teacher_kwargs': toys.RUN['model_kwargs']}, '--teacher-model deit_tiny_patch16_224', 'no talking-heads'),
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
    ({'s_id': 'auto', 't_id': 'auto', 'model': 'densenet121', 'model_kwargs': None}, 'no blocks at a known place'),
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
    ({'data_path': '', **toys.FOLDER}, 'FOLDER'),
    ({'data_path': '{files}/no', **toys.FOLDER},),
    ({'data_path': '{files}/flat', **toys.FOLDER}, 'class folders'),
    ({'data_path': '{files}/empty', **toys.FOLDER},),
    ({'data_path': '{files}/unlike', **toys.FOLDER}, 'differ'),
    ({'data_path': '{files}/no_train', **toys.FOLDER},),
    ({'data_path': '{files}/no', 'data_set': 'IMNET', **toys.ALONE},),
    ({'data_path': '{files}/tree', 'data_set': 'IMNET', **toys.ALONE}, '--data-set FOLDER', 'c0'),
    ({'data_path': '{files}/tree', 'data_set': 'CIFAR', **toys.ALONE},),
    ({'data_path': '{files}/tree', 'data_set': 'INAT19', **toys.ALONE},),
    ({'batch_size': 32}, '16'),
    ({'batch_size': 0},),
    ({'data_set': 'hfds/cats', **toys.ALONE}, 'datasets'),
    ({'data_set': 'wds', 'data_path': '{files}/shards', **toys.ALONE}, 'wds/'),
    ({'data_path': '{files}/tree', **toys.SHARDS}, 'no _info.json'),
    ({'data_path': '{files}/no', **toys.SHARDS}, 'no _info.json'),
    ({'data_path': '{files}/one_shard', **toys.SHARDS}, 'no val/*.tar'),
    ({'num_classes': 2, 'data_path': '{files}/shards', **toys.SHARDS}, '3 classes, the last is 2'),
    ({'batch_size': 32, 'data_path': '{files}/shards', **toys.SHARDS}, '16 images'),
    ({'num_classes': 5, **toys.FOLDER, 'data_path': '{files}/tree'}, 'FOLDER'),
    ({'data_path': '{files}/tree', **toys.FOLDER, 'data_set': 'TAR'}, 'tar'),
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
    ({'bad_images': 'ignore'},),
    ({'output_dir': '{files}/run'}, '--resume'),
    ({'output_dir': '{files}/text.pth'},),
]  # fmt: skip


def case(changes: dict, *words: str) -> str:
    name, value = next(iter(changes.items()))
    extra = [key for key in changes if key in ('data_set', 'model_kwargs', 'eval', 'eval_ema')]
    return '-'.join([name, str(value).replace('{files}/', '').replace(' ', '_'), *extra])


@pytest.mark.parametrize('wrong', WRONG, ids=[case(*wrong) for wrong in WRONG])
def test_wrong_use_is_one_line_with_flag_and_value(wrong, files, tmp_path, epochs, capsys):
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
            {**toys.ALONE, 'w_full': 0, 'token_align': 'pool', 'teacher_input_size': 64, 'fused': 'talking-heads'},
            [
                '--token-align: no effect without a teacher',
                '--teacher-input-size, --fused talking-heads: no effect without a teacher',
            ],
        ),
        ({'fused': 'erasing', **toys.ALONE, 'w_full': 0}, []),
        ({'fused': 'erasing', 'no_aug': True}, ['--fused erasing: no effect without random erasing']),
        # Only the parts in vain are named.
        ({'fused': 'relations full', 'w_full': 0}, ['--fused full: no effect without --w-full above 0']),
        (
            {'fused': 'relations full erasing', 'w_sample': 0, 'w_patch': 0, 'w_rand': 0, 'reprob': 0},
            [
                '--fused relations: no effect without --w-sample, --w-patch or --w-rand above 0',
                '--fused erasing: no effect without random erasing',
            ],
        ),
        (
            {**toys.ALONE, 'fused': 'full relations erasing'},
            ['--w-full, --fused relations, --fused full: no effect without a teacher'],
        ),
        ({'fused': 'relations full', 'w_sample': 0, 'w_patch': 0}, []),
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
            {'distillation_type': 'hard', 'distillation_tau': 2},
            ['--distillation-tau: no effect without --distillation-type soft, lskd or nkd'],
        ),
        ({'distillation_type': 'lskd', 'distillation_tau': 2}, []),
        ({'distillation_type': 'nkd', 'distillation_tau': 2}, []),
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
            ['--aa, --reprob, --recount: no effect without augmentation', '--keep: no effect without --output_dir'],
        ),
        ({'distillation_alpha': 1, 'smoothing': 0.2}, ['--smoothing: no effect without --distillation-alpha below 1']),
        ({'relations': 'global'}, []),
        ({'aa': '3a', 'color_jitter': 0.1}, []),
        ({**toys.ALONE, 'w_full': 0, 'smoothing': 0.2, 'sched': 'poly', 'decay_rate': 0.5, 'min_lr': 0, 'keep': 3}, []),
    ],
)
def test_flags_without_effect_are_named(run, epochs, capsys, changes, words):
    run(**changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'no effect' in line]
    assert len(lines) == len(words), lines
    assert all(map(str.__contains__, lines, words)), lines


@pytest.mark.parametrize('words', [['--s-id', '0', '1', '--t-id', '0'], ['--device', 'mps'], ['--opt-betas', '1', '1']])
def test_list_blocks_ignores_other_wrong_flags(words, capsys):
    main.main(['--list-blocks', '--model', 'test_convnext', *words])
    assert 'blocks over patch tokens' in capsys.readouterr().out


@pytest.mark.parametrize('word', ['--non-finite', '--relation_scale=paper'])
def test_removed_flags_are_named_as_such(word):
    with pytest.raises(UsageError, match=r'this flag was removed, see CHANGELOG\.md$'):
        flags.parse_args([word])


@pytest.mark.parametrize(
    ('typed', 'device', 'capability', 'problem', 'parts'),
    [
        (None, 'cuda', (9, 0), '', flags.FUSED),
        (None, 'cuda', (8, 0), '', ('relations', 'full', 'erasing')),
        (None, 'cuda', (9, 0), 'no compiler', ()),
        (None, 'cpu', None, 'not tried', ()),
        ('none', 'cuda', (9, 0), '', ()),
        ('full', 'cuda', (8, 0), 'no compiler', ('full',)),
        ('full', 'cpu', None, 'not tried', ('full',)),
    ],
)
def test_parts_that_are_fused(monkeypatch, typed, device, capability, problem, parts):
    monkeypatch.setattr(flags, 'fusing_problem', lambda device: problem)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert toys.config(teacher_path='none', fused=typed).run.fused_parts(torch.device(device)) == parts


def test_evaluation_tries_no_compiler(monkeypatch, files):
    monkeypatch.setattr(flags, 'fusing_problem', lambda device: pytest.fail('tried'))
    run = toys.config(**toys.ALONE, eval=True, resume=files / 'student.pth').run
    assert run.fused_parts(torch.device('cuda')) == ()


def test_parts_and_the_problem_are_printed_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    config, teacher = toys.config(teacher_path='none', w_full=0), models.tap(toys.teacher(num_heads=3), [0], 32)
    for problem in ('', 'no compiler'):
        for module in (flags, summary):
            monkeypatch.setattr(module, 'fusing_problem', lambda device, problem=problem: problem)
        for device in ('cuda', 'cpu'):
            summary.log_fused(config, torch.device(device), teacher)
    assert capsys.readouterr().out.splitlines() == [
        'fused       relations, erasing',
        'fused       none (no compiler)',
    ]
