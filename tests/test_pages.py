"""The commands and the code of the pages for users, run with toy models and toy data."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import toys
import yaml
from torch.distributed.run import get_args_parser

import flags
import main
import models
import tools.export
import tools.plot
from losses import RELATION_TERMS, ManifoldDistillationLoss

pytestmark = pytest.mark.more

DOCS = Path(main.__file__).parent / 'docs'


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', (DOCS / page).read_text(), re.DOTALL)


# Your own loop --------------------------------------------------------------------------------------------------------

SMALL = {'embed_dim': 32, 'depth': 4, 'num_heads': 2}


@pytest.fixture
def small_models(monkeypatch):
    """`timm.create_model` makes small models, whatever the name; the teacher is wider and deeper."""
    create = timm.create_model

    def small(name, **kwargs):
        return create(name, **{**SMALL, **({'embed_dim': 48, 'depth': 6} if 'small' in name else {}), **kwargs})

    monkeypatch.setattr(timm, 'create_model', small)


def test_example_of_own_loop_trains_with_all_its_terms(small_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, _ = blocks('own_loop.md', 'python')
    names: dict = {}
    exec(example, names)
    teacher = timm.create_model('vit_small_patch16_224', num_classes=3).eval()
    with torch.no_grad():
        teacher.head.weight *= 20  # a teacher that is sure, and that agrees with the labels
        loader = [(images, teacher(images).argmax(dim=1)) for images in torch.randn(2, 4, 3, 224, 224)]
    torch.save(teacher.state_dict(), 'teacher.pth')
    student = names['distil'](loader, num_classes=3, epochs=6)
    rows = [eval(line.split(' ', 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    for name in ('base', 'dist', 'mf_sample', 'mf_patch', 'mf_rand'):
        assert 0 < rows[-1][name] < rows[0][name], name
    assert rows[0]['mf_full'] == 0
    again = timm.create_model('deit_tiny_patch16_224', num_classes=3).eval()
    again.load_state_dict(torch.load('student.pth', weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(loader[0][0]), student(loader[0][0]))


def test_example_of_different_grids_in_own_loop():
    student = models.tap(toys.student(), [0, 1], 32)
    teacher = models.freeze(models.tap(toys.student(patch_size=4, depth=6), [0, 5], 32))
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    criterion = ManifoldDistillationLoss(torch.nn.CrossEntropyLoss(), 'soft')
    with pytest.raises(ValueError, match='differ in images or patch tokens'):
        criterion(student(images), teacher(images), targets)
    exec(blocks('own_loop.md', 'python')[1], {'student': student, 'teacher': teacher, 'models': models})
    found = criterion(student(images), teacher(images), targets)
    assert all(found[f'mf_{name}'] > 0 for name, term in RELATION_TERMS.items() if term.default_weight)


# Commands -------------------------------------------------------------------------------------------------------------

CLASSES = ('n01440764', 'n01443537')  # folders that --data-set IMNET knows
TINY = {'patch_size': 16, 'embed_dim': 16, 'num_heads': 2}
MODELS = {
    'deit_tiny_patch16_224': {**TINY, 'depth': 12},
    'deit_small_patch16_224': {**TINY, 'depth': 4},
    'cait_s24_224': {**TINY, 'depth': 24},
    'swin_tiny_patch4_window7_224': {'patch_size': 2, 'window_size': 2, 'embed_dim': 16, 'depths': (1, 1, 2, 1),
                                     'num_heads': (1, 1, 2, 2)},
}  # fmt: skip
TOY_RUN = (
    '--input-size 32 --epochs 1 --batch-size 4 --accum-steps 1 --num_workers 0 --device cpu --no-model-ema'.split()
)


def toy_model(name: str, classes: int = 1000) -> torch.nn.Module:
    return timm.create_model(name, num_classes=classes, img_size=32, **MODELS[name])


def commands(text: str) -> list[list[str]]:
    """The commands of a block, of loops the first round, without launchers other than `python`."""
    found = []
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line.replace('$seed', '0').removesuffix('&'), comments=True)
        if words[:1] == ['srun']:
            words = words[1:]
        if words[:1] in (['python'], ['torchrun']):
            found.append(words)
    return found


def flags_of(words: list[str]) -> list[str]:
    """The flags of main.py, after a check that the launcher accepts its own."""
    start = words.index('main.py')
    if words[0] == 'torchrun':
        launcher = get_args_parser().parse_args([*words[1:start], 'main.py'])
        assert launcher.nproc_per_node == '8'
    return words[start + 1 :]


def toy_flags(words: list[str]) -> list[str]:
    """The flags of a command, with small models and one short epoch."""
    config = yaml.safe_load(Path(words[words.index('--config') + 1]).read_text()) if '--config' in words else {}
    found = [*words, '--input-size', '32', '--num_workers', '0', '--device', 'cpu']
    for flag, kwargs in (('--model', '--model-kwargs'), ('--teacher-model', '--teacher-kwargs')):
        name = words[words.index(flag) + 1] if flag in words else config.get(flag[2:].replace('-', '_'))
        if name in MODELS:
            found += [kwargs, *(f'{key}={value}'.replace(' ', '') for key, value in MODELS[name].items())]
    return found if '--eval' in words else found + TOY_RUN


def run_command(words: list[str]) -> None:
    if words[:2] == ['python', '-m']:
        tool = {'tools.export': tools.export, 'tools.plot': tools.plot}[words[2]]
        assert tool.main(words[3:]) == 0
    else:
        main.main(toy_flags(flags_of(words)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the configs of the program and the data of the pages."""
    (tmp_path / 'configs').symlink_to(DOCS.parent / 'configs')
    for split in ('train', 'val'):
        toys.write_images(tmp_path / 'IMAGENET' / split, [4, 4], 32)
        for old, new in zip(('c0', 'c1'), CLASSES, strict=True):
            (tmp_path / 'IMAGENET' / split / old).rename(tmp_path / 'IMAGENET' / split / new)
    shutil.copytree(tmp_path / 'IMAGENET', tmp_path / 'DATA')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_own_data_run_one_after_the_other(folder, capsys):
    *first, pretrained = [words for text in blocks('own_data.md', 'bash') for words in commands(text)]
    assert len(first) == 6
    for words in first:
        run_command(words)
    said = capsys.readouterr().out
    assert re.search('--teacher-model deit_small_patch16_224 .*, from --teacher-path TEACHER/checkpoint.pth', said)
    rows = {name: toys.log_rows(folder / name)[-1] for name in ('TEACHER', 'KD', 'RELATIONS')}
    toys.assert_sound(rows['TEACHER'], absent=set(toys.TERMS[1:]))
    toys.assert_sound(rows['KD'], absent=set(toys.TERMS) - {'dist'})
    toys.assert_sound(rows['RELATIONS'], absent={'base', 'mf_full'})
    assert (folder / 'curves.png').exists()
    exec(blocks('own_data.md', 'python')[0])
    assert capsys.readouterr().out.endswith(f'{list(CLASSES)}\n')
    assert '--pretrained' in pretrained
    run_command([word.replace('deit_small_patch16_224', 'local-dir:STUDENT') for word in pretrained])
    assert (folder / 'PRETRAINED' / 'checkpoint.pth').exists()


def test_settings_of_own_data_on_the_page_are_those_of_the_config():
    page = (DOCS / 'own_data.md').read_text()
    found = flags.parse_args(['--config', str(DOCS.parent / 'configs' / 'own_data.yaml'), '--data-path', 'x'])
    for name, value in (('batch_size', '64 on one'), ('lr', '4e-3'), ('warmup_epochs', '2'), ('epochs', '100')):
        assert re.search(rf'^\| `--{name.replace("_", "-")}` \| [^|]+ \| {value} \|', page, re.MULTILINE), name
        assert getattr(found.optim, name) == float(value.split()[0])
    assert not any((found.augment.uses_mixing, found.augment.policy, found.augment.reprob, found.optim.model_ema))


def test_commands_of_reproduce_run_one_after_the_other(folder, capsys, monkeypatch):
    monkeypatch.setattr(tools.plot, 'save_figure', lambda *_: None)  # the commands of own_data.md write one
    torch.save({'model': toy_model('cait_s24_224').state_dict()}, 'S24_224.pth')
    args = {'model': 'deit_tiny_patch16_224', 'model_kwargs': MODELS['deit_tiny_patch16_224'], 'input_size': 32}
    release = toys.as_release(toy_model('deit_tiny_patch16_224').state_dict()) | {'args': argparse.Namespace(**args)}
    torch.save(release, 'manifold_kd_deit_76.4.pth')
    for text in blocks('reproduce.md', 'bash'):
        for words in commands(text):
            run_command(words)
    control, taught = (toys.log_rows(folder / f'{name}-0')[-1] for name in ('KD', 'RELATIONS'))
    toys.assert_sound(control, absent=set(toys.TERMS) - {'dist'})
    toys.assert_sound(taught, absent={'base', 'mf_full'})
    for name, gain in (('KD', 0), ('RELATIONS', 2)):
        for seed in (0, 1, 2):
            (folder / f'{name}-{seed}').mkdir(exist_ok=True)
            (folder / f'{name}-{seed}' / 'log.txt').write_text(f'{{"test_acc1": 0}}\n{{"test_acc1": {gain + seed}}}\n')
    capsys.readouterr()
    exec(blocks('reproduce.md', 'python')[0], {})
    assert capsys.readouterr().out == '+2.00 ± 0.00 [2, 2, 2]\n'


def test_commands_of_several_machines_run_in_one_process(folder):
    torch.save({'model': toy_model('cait_s24_224').state_dict()}, 'S24_224.pth')
    first, slurm = blocks('several_machines.md', 'bash')
    (by_hand,), (by_slurm,) = commands(first), commands(slurm)
    assert flags_of(by_hand) == flags_of(by_slurm)
    run_command(by_hand)
    toys.assert_sound(toys.log_rows(folder / 'SHARED' / 'OUT')[-1], absent={'base', 'mf_full'})
    subprocess.run(['bash', '-n'], input=slurm, text=True, check=True)


def test_example_of_a_pairing_runs(folder):
    torch.save({'model': toy_model('swin_tiny_patch4_window7_224').state_dict()}, 'swin.pth')
    (text,) = [text for text in blocks('models.md', 'bash') if '--token-align' in text]
    ((*words,),) = commands(text.replace('--teacher-pretrained', '--teacher-path swin.pth'))
    run_command(words)
    toys.assert_sound(toys.log_rows(folder / 'OUT')[-1], absent={'base', 'mf_full'})
