"""--compile models: whole forward passes, traced and run without a compiler, so that a test takes seconds."""

import functools

import pytest
import torch
import torch.distributed as dist
import toys
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

import models

pytestmark = [pytest.mark.more, pytest.mark.filterwarnings('default'), pytest.mark.usefixtures('few_generated_images')]
SIZE = 32


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The graphs that torch.compile made; they run as they are."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        # Without it, a checkpoint would draw other random numbers in the backward pass than before.
        return aot_eager(graph, inputs) if 'checkpoint' in graph.code else graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=keep))
    yield found
    torch._dynamo.reset()


def student(**changes) -> models.TappedModel:
    torch.manual_seed(1)
    return models.tap(toys.student(**changes), [0, 1, -1], SIZE, two_heads=True).train()


def images(seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def gradients(call: nn.Module, tapped: models.TappedModel, seed: int) -> list[torch.Tensor]:
    """Of a sum over logits and all tokens."""
    tapped.zero_grad()
    torch.manual_seed(seed)  # drop-path
    out = call(images(seed))
    (out.logits.sum() + sum((i + 1) * x.square().sum() for i, x in enumerate(out.tokens))).backward()
    return [parameter.grad.clone() for parameter in tapped.model.parameters()]


@pytest.fixture
def reports():
    return []


@pytest.mark.parametrize('checkpointed', [False, True])
def test_whole_student_is_one_graph_with_the_gradients_of_eager_mode(graphs, reports, checkpointed):
    tapped = student(drop_path_rate=0.3)
    if checkpointed:
        models.checkpoint_activations(tapped)
    names = [name for name, _ in tapped.named_parameters()]
    expected = [gradients(tapped, tapped, seed) for seed in (0, 1)]
    models.compile_model(tapped, reports.append)
    toys.assert_same([gradients(tapped, tapped, seed) for seed in (0, 1)], expected)
    assert (len(graphs), reports) == (1, [])
    assert [name for name, _ in tapped.named_parameters()] == names


@pytest.mark.parametrize('options', [{}, {'with_logits': False}, {'dtype': torch.bfloat16}])
def test_whole_teacher_is_one_graph_under_autocast(graphs, reports, options):
    stats = ((0.5,) * 3, (0.5,) * 3), ((0.4,) * 3, (0.3,) * 3)
    prepare = models.TeacherPreprocess(*stats, 48, options.get('dtype'))
    teacher = models.freeze(models.tap(toys.teacher(size=48), [0, 1, -2], 48), prepare, **options)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = [teacher(images(seed)) for seed in (0, 1)]
        models.compile_model(teacher, reports.append)
        toys.assert_same([teacher(images(seed)) for seed in (0, 1)], expected)
    assert (len(graphs), reports) == (1, [])
    assert (expected[0].logits is None) == ('with_logits' in options)


def test_whole_student_in_ddp(graphs, reports, tmp_path):
    tapped = student()
    expected = [gradients(tapped, tapped, seed) for seed in (0, 1)]
    models.compile_model(tapped, reports.append)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "meet"}', rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tapped)
        found = [gradients(wrapped, tapped, seed) for seed in (0, 1)]
    finally:
        dist.destroy_process_group()
    toys.assert_same(found, expected)
    assert graphs
    assert reports == []


class Untraceable(nn.Module):
    """A layer that torch.compile cannot look through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


def test_model_that_cannot_be_traced_is_compiled_per_block(graphs, reports):
    tapped = student()
    tapped.model.norm_pre = Untraceable()
    expected = [gradients(tapped, tapped, seed) for seed in (0, 1)]
    models.compile_model(tapped, reports.append)
    toys.assert_same([gradients(tapped, tapped, seed) for seed in (0, 1)], expected)
    assert len(graphs) == 1  # all blocks are of one kind
    (report,) = reports
    assert report.startswith('compiled per block: Call to `torch._dynamo.graph_break()`')
    assert '\n' not in report


def test_model_without_known_blocks_that_cannot_be_traced_runs_as_it_is(graphs, reports):
    tapped = models.tap(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4), Untraceable()), [], SIZE)
    assert tapped(images()).logits.shape == (2, 4)
    models.compile_model(tapped, reports.append)
    assert tapped(images()).logits.shape == (2, 4)
    assert graphs == []
    assert reports[0].startswith('not compiled: ')


def test_failing_compiler_is_reported_by_its_own_error(reports, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError('there is no compiler')

    tapped = student()
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'compile', functools.partial(torch.compile, backend=fail))
        models.compile_model(tapped, reports.append)
        patch.undo()
    assert tapped(images()).logits.shape == (2, 10)
    assert reports == ['compiled per block: RuntimeError: there is no compiler']


def test_run_with_whole_models_equals_a_plain_run_and_resumes_to_the_bit(run, tmp_path, capsys):
    flags = {'epochs': 2, 'lr': 0.3, 'warmup_epochs': 0, 'drop_path': 0.2, 'eval_ema': True, 'accum_steps': 2}
    flags |= {'batch_size': 4, 'log_grad_share': True}
    plain = run(**flags, output_dir=tmp_path / 'plain')
    capsys.readouterr()
    assert run(**flags, compile='models', output_dir=tmp_path / 'whole') == plain
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('compile ')]
    assert lines[0] == 'compile     student and teacher, each as a whole, in the first step'
    assert [line.rsplit(' ', 2)[0] for line in lines[1:]] == [
        f'compile     {role}: first forward pass took' for role in ('teacher', 'student')
    ]
    first = tmp_path / 'whole' / 'checkpoint-00000002.pth'
    assert toys.load(first)['epoch'] == 0
    assert run(**flags, compile='models', resume=first, output_dir=tmp_path / 'rest') == plain[1:]
    states = [toys.load(tmp_path / name / 'checkpoint.pth') for name in ('plain', 'whole', 'rest')]
    for key in ('model', 'model_ema'):
        toys.assert_same(states[1][key], states[0][key])
        toys.assert_same(states[2][key], states[0][key])
