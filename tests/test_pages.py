"""The commands and the code of the pages for users, run with toy models and toy data."""

import re
from pathlib import Path

import pytest
import timm
import torch
import toys

import main
import models
from losses import RELATION_TERMS, ManifoldDistillationLoss

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
