"""The losses of other methods: equal to their formulas, known to plans, and run by a program of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from torch import Tensor

from flags import get_args_parser, parse_args
from losses import RELATION_TERMS
from tools import plans, results, rivals
from utils import UsageError

pytestmark = pytest.mark.more


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Of a student, width 5, and a teacher, width 7: 3 images of 4 tokens."""
    return torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 7)


def test_gram_loss_is_the_mean_over_all_pairs_of_tokens_of_an_image(tokens):
    student, teacher = tokens

    def similarity(x: Tensor, i: int, j: int) -> Tensor:
        return (x[i] @ x[j] / x[i].norm() / x[j].norm()).clamp(min=0)

    pairs = [(image, i, j) for image in range(3) for i in range(4) for j in range(4)]
    squares = [(similarity(student[b], i, j) - similarity(teacher[b], i, j)) ** 2 for b, i, j in pairs]
    expected = torch.stack(squares).mean()
    value = rivals.gram_loss(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (value, expected)))


def test_regression_loss_is_that_of_the_best_projector(tokens):
    student, teacher = tokens
    S, T = student.flatten(0, 1), teacher.flatten(0, 1)
    T = (T - T.mean(0)) / T.std(0, correction=0)
    ones = torch.ones(len(S), 1)

    def error(S: Tensor) -> Tensor:  # of an affine projector by least squares, through which autograd goes
        design = torch.cat([S, ones], dim=1).double()
        projector = torch.linalg.pinv(design) @ T.double()
        return (design @ projector - T).square().mean()

    value = rivals.regression_loss(student, teacher)
    assert value.item() == pytest.approx(error(S).item(), rel=1e-4)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (value, error(S))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_regression_loss_is_0_for_a_linear_map_and_1_for_constant_tokens(tokens):
    student = tokens[0].detach()
    many = torch.randn(20, 4, 5)
    assert rivals.regression_loss(many, 3 * many @ torch.randn(5, 7) + 2) < 1e-6
    assert rivals.regression_loss(torch.ones_like(student), tokens[1]).item() == pytest.approx(1, rel=1e-4)
    assert rivals.regression_loss(student[:1, :1], tokens[1][:1, :1]) == 0  # a single token is its own mean


def test_only_plans_and_their_own_program_know_rivals(tmp_path):
    words = [*toys.flags(teacher_path='T'), '--w-gram', '2']
    with rivals.registered():
        assert parse_args(words).loss.weights['gram'] == 2
        assert 'similarities clipped' in get_args_parser().format_help()
    assert not RELATION_TERMS.keys() & rivals.RIVALS.keys()
    with pytest.raises(UsageError, match='--w-gram: unrecognized argument'):
        parse_args(words)
    path = tmp_path / 'plan.yaml'
    path.write_text(
        f'data: {{source: flags}}\nseeds: [0]\ncontrol: a\nflags: {" ".join(toys.flags(**toys.ALONE))}\n'
        'rows: {a: "", b: --w_regress=2, c: {flags: --w-gram 1, ranks: 2}}\n'
    )
    runs = plans.make_runs(plans.read_plan(str(path)), Path('OUT'), [0])
    found = {run.row: ' '.join(results.command(run)[1:]).split(' --data-set')[0] for run in runs}
    assert found == {
        'a': 'main.py',
        'b': '-m tools.rivals',
        'c': '-m torch.distributed.run --standalone --nproc_per_node=2 -m tools.rivals',
    }


def test_run_with_rivals(tmp_path, files):
    words = toys.flags(teacher_path=files / 'teacher.pth', data_set='FAKE', output_dir=tmp_path, w_gram=1, w_regress=1)
    code = (
        'import datasets, runpy; datasets.FAKE_TRAIN = datasets.FAKE_VAL = 16; '
        "runpy.run_module('tools.rivals', run_name='__main__')"
    )
    subprocess.run([sys.executable, '-c', code, *words], cwd=toys.ROOT, check=True, timeout=300)
    (row,) = toys.log_rows(tmp_path)
    assert row['train_loss_mf_gram'] > 0 < row['train_loss_mf_regress']
    assert row['train_loss_mf_regress'] < 1
