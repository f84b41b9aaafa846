"""Flags from YAML files, and the args.yaml of a run."""

import shutil
from pathlib import Path

import pytest
import toys
import yaml

import flags
import main
from tools import plans
from utils import UsageError

pytestmark = pytest.mark.usefixtures('few_generated_images')

CONFIGS = sorted((Path(main.__file__).parent / 'configs').glob('*.yaml'))


def config_of(tmp_path, text: str, *words: str) -> flags.Config:
    (tmp_path / 'flags.yaml').write_text(text)
    return flags.parse_args(['--config', str(tmp_path / 'flags.yaml'), *words])


def test_values_of_all_kinds_are_those_of_the_command_line(tmp_path):
    text = """
        data-set: FAKE
        input_size: 32
        s_id: [0, -1]
        t_id: [0, -1]
        teacher_path: x.pth
        distillation-type: soft
        model_kwargs: {depth: 4, mlp_ratio: 2.5, qkv_bias: false}
        model-ema: false
        no_pin_mem: true
        repeated_aug: always
        w-patch: 4
        lr: 5e-3
        eval_ema: true
        opt_betas: null
    """
    found = config_of(tmp_path, text)
    words = """--data-set FAKE --input-size 32 --s-id 0 -1 --t-id 0 -1 --teacher-path x.pth --distillation-type soft
        --model-kwargs depth=4 mlp_ratio=2.5 qkv_bias=False --no-model-ema --no-pin-mem --repeated-aug --w-patch 4
        --lr 5e-3 --eval-ema""".split()
    expected = flags.parse_args(words)
    assert {**found.flags(), 'config': ''} == expected.flags()
    assert found.typed - {'config'} == expected.typed


@pytest.mark.parametrize(
    ('text', 'words', 'value'),
    [
        ('false', [], False),
        ('true', ['--compile'], True),
        ('blocks', ['--compile', 'blocks'], True),
        ('models', ['--compile=models'], 'models'),
    ],
)
def test_compile_takes_a_value_or_none(tmp_path, text, words, value):
    found = config_of(tmp_path, f'data_set: FAKE\ncompile: {text}\n')
    assert found.run.compile == flags.parse_args(['--data-set', 'FAKE', *words]).run.compile == value
    assert type(found.run.compile) is type(value)
    again = config_of(tmp_path, yaml.safe_dump({'data_set': 'FAKE', 'compile': found.run.compile}))
    assert again.run.compile == value


def test_command_line_has_priority(tmp_path):
    found = config_of(tmp_path, 'data_set: FAKE\nlr: 0.1\nrepeated_aug: false\n', '--lr', '0.2', '--repeated-aug')
    assert (found.optim.lr, found.augment.repeated_aug) == (0.2, 'always')


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        ('learning_rate: 1', 'learning_rate is no flag'),
        ('input-sise: 1', 'input-sise is no flag; did you mean input_size?'),
        ('lr: [', 'is not a YAML file'),
        ('- lr', 'must have one `flag: value` per line'),
        ('help: true', 'help is no flag'),
        ('compile: model', '--compile: model: must be blocks or models'),
        ('lr: fast', '--lr: fast: must be a number above 0'),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path, text, answer):
    with pytest.raises(UsageError) as caught:
        config_of(tmp_path, 'data_set: FAKE\n' + text if text[0] != '-' else text)
    assert answer in str(caught.value)
    assert '\n' not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    (tmp_path / 'flags.yaml').write_text('')
    with pytest.raises(UsageError, match=r'--config .*flag.yaml: No such file .* did you mean .*/flags.yaml'):
        flags.parse_args(['--config', str(tmp_path / 'flag.yaml')])


def test_args_of_a_run_make_the_same_run_again(run, tmp_path):
    first = run(epochs=2, batch_size=4, output_dir=tmp_path / 'a', s_id='auto', t_id='auto', no_model_ema=True)
    shutil.copy(tmp_path / 'a' / 'args.yaml', tmp_path / 'args.yaml')
    main.main(['--config', str(tmp_path / 'args.yaml'), '--output_dir', str(tmp_path / 'b')])
    assert toys.log_rows(tmp_path / 'b') == first
    one, other = (yaml.safe_load((tmp_path / name / 'args.yaml').read_text()) for name in 'ab')
    assert {**one, 'output_dir': ''} == {**other, 'output_dir': ''}
    head = (tmp_path / 'a' / 'args.yaml').read_text().splitlines()[:3]
    assert all(line.startswith('# ') for line in head)
    assert 'torch ' in head[1]
    assert 'commit ' in head[2]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_accepted(path):
    config = yaml.safe_load(path.read_text())
    words = ['--teacher-path', 'x'] if 'distillation_type' in config else []
    found = flags.parse_args(['--config', str(path), '--data-path', 'x', *words]).flags()
    assert {name: found[name] for name in config} == config


def test_release_config_is_the_recipe_of_the_script():
    script = (Path(main.__file__).parent / 'scripts' / 'train_deit_tiny_cait_s24.sh').read_text()
    words = script[script.index('--distributed') :].replace('\\\n', ' ').replace('"${@:4}"', '').split()
    typed = flags.parse_args([word.strip('"') for word in words])
    config = Path(main.__file__).parent / 'configs' / 'deit_tiny_cait_s24.yaml'
    paths = ['--data-path', '$data', '--teacher-path', '$teacher', '--output_dir', '$output']
    found = flags.parse_args(['--config', str(config), *paths])
    assert {**found.flags(), 'config': ''} == typed.flags()


def test_config_of_short_training_is_the_confirmed_row_of_the_plan():
    root = Path(main.__file__).parent
    plan = plans.read_plan(str(root / 'plans' / 'cifar10_small.yaml'), 'IMAGES')
    (row,) = [run for run in plans.make_runs(plan, Path('OUT'), [0]) if run.row == 'release']
    confirmed = flags.parse_args(row.words)
    path = root / 'configs' / 'short_training.yaml'
    found = flags.parse_args(['--config', str(path), '--data-path', 'x', '--teacher-path', 'x']).flags()
    assert found['s_id'] == found['t_id'] == ['auto']  # of 4 blocks: 0 1 2 3
    assert confirmed.model.s_id == confirmed.model.t_id == [0, 1, 2, 3]
    differing = {name for name, value in confirmed.flags().items() if value != found[name]}
    models_and_files = {'model', 'model_kwargs', 'teacher_model', 'teacher_kwargs', 'teacher_path', 'input_size',
                        'data_path', 'output_dir', 'resume', 'config'}  # fmt: skip
    assert differing - models_and_files <= {'s_id', 't_id', 'num_workers', 'print_freq', 'log_grad_share'}
