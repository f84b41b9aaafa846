"""cuda_graph.py on a stand-in for CUDA graphs, see recorded_call.py. test_cuda.py has the tests on a GPU."""

import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import recorded_call
import torch
import toys

import cuda_graph
import datasets
import main

# Three epochs of two steps. Everything that draws random numbers is on, and the last epoch has another learning rate.
LIVELY = {'epochs': 3, 'batch_size': 2, 'accum_steps': 2, 'drop': 0.1, 'drop_path': 0.1, 'lr': 3, 'warmup_epochs': 0}
LIVELY |= {'model_ema_decay': 0.5, 'K': 5, 'clip_grad': 1, 'eval_ema': True, 'log_grad_share': True, 'w_rand': 1}
SHORT = {'epochs': 2, 'eval_ema': None, 'log_grad_share': None}


@pytest.fixture
def trained(files, tmp_path, monkeypatch):
    """A function that trains a toy with --cuda-graph after so many steps, and returns what came of it."""
    monkeypatch.setattr(datasets, 'FAKE_TRAIN', 8)
    monkeypatch.setattr(datasets, 'FAKE_VAL', 8)
    made = recorded_call.install(monkeypatch)

    def run(name: str, warm_up: int = 2, **changes) -> dict:
        monkeypatch.setattr(cuda_graph, 'WARM_UP', warm_up)
        options = {
            **LIVELY,
            'no_cuda_graph': True,
            'cuda_graph': True,
            'teacher_path': files / 'teacher.pth',
            **changes,
        }
        main.main(toys.flags(output_dir=tmp_path / name, **options))
        return toys.outcome(tmp_path / name)

    run.made = made
    return run


@pytest.mark.parametrize(
    'changes',
    [
        {},
        pytest.param(
            {'amp_dtype': 'bfloat16', 'model': 'deit_tiny_distilled_patch16_224', 'accum_steps': None, 'batch_size': 4},
            marks=pytest.mark.more,
        ),
        pytest.param({'mixup': 0, 'cutmix': 0, 'mixup_mode': None, 'opt': 'adam'}, marks=pytest.mark.more),
    ],
    ids=['accumulated', 'bfloat16', 'classes'],
)
def test_replayed_steps_equal_launched_ones_to_the_bit(trained, changes):
    replayed, launched = trained('replayed', **changes), trained('launched', 1000, **changes)
    assert [call.replays for call in trained.made] == [4, 0]
    assert [call.is_closed for call in trained.made] == [True, False]  # one that captured nothing has nothing to free
    assert toys.differing(replayed, launched) == set()


@pytest.mark.more
def test_graph_trains_as_without_it(trained):
    graph, plain = trained('graph'), trained('plain', cuda_graph=None)
    for one, other in zip(graph['log'], plain['log'], strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # the learning rate is rounded to float32
    assert [group['lr'] for group in graph['optimizer']['param_groups']] == [
        group['lr'] for group in plain['optimizer']['param_groups']
    ]
    assert not any(group['capturable'] for group in graph['optimizer']['param_groups'])


@pytest.mark.more
def test_resume_in_mid_epoch_goes_on_with_a_graph(trained, tmp_path, monkeypatch):
    whole, saving = trained('whole'), {'save_interval_steps': 1, 'keep': 9}

    with monkeypatch.context() as patch:
        toys.after_calls(patch, main.Trainer, 'train_step', 4, toys.kill)
        with pytest.raises(toys.KilledError):
            trained('resumed', **saving)
    assert toys.differing(trained('resumed', resume='auto', **saving), whole) == set()
    assert [call.replays for call in trained.made] == [4, 2, 1]


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        pytest.param({'amp_dtype': 'float16'}, 'with float16', marks=pytest.mark.more),
        ({'opt': 'sgd', 'lr': 0.1}, 'with SGD the host decides whether to update'),
        pytest.param({'model_ema_force_cpu': True}, '--model-ema-force-cpu makes', marks=pytest.mark.more),
    ],
)
def test_run_that_has_no_graph_says_why_and_trains(trained, changes, reason, capsys):
    graph = trained('graph', **changes, epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'graph' in line and 'warning' in line]
    assert len(lines) == 1
    assert lines[0].startswith(f'warning: --cuda-graph: {reason}')
    assert trained.made == []
    assert toys.differing(graph, trained('plain', cuda_graph=None, epochs=1, **changes)) == set()


def test_graph_is_the_default_on_one_gpu(trained):
    chosen, asked = trained('chosen', **SHORT, cuda_graph=None, no_cuda_graph=None), trained('asked', **SHORT)
    assert [call.replays for call in trained.made] == [2, 2]
    assert toys.differing(chosen, asked) == set()


@pytest.mark.more
def test_default_without_a_graph_is_no_warning(trained, capsys):
    trained('run', cuda_graph=None, no_cuda_graph=None, opt='sgd', lr=0.1, epochs=1)
    out = capsys.readouterr().out
    assert 'cuda graph  none: with SGD the host decides whether to update; use --opt adam or adamw' in out
    assert 'warning: --cuda-graph' not in out


def test_default_on_several_gpus_is_no_graph(trained, monkeypatch, capsys):
    state = toys.state(toys.student(), teacher_path='none')
    assert cuda_graph.wants_graph(None, state, torch.device('cpu'))
    monkeypatch.setattr(cuda_graph, 'get_world_size', lambda: 2)
    assert not cuda_graph.wants_graph(None, state, torch.device('cpu'))
    assert 'cuda graph  none: not tried with several GPUs; --cuda-graph tries it' in capsys.readouterr().out
    assert cuda_graph.wants_graph(True, state, torch.device('cpu'))


@pytest.mark.usefixtures('few_generated_images')
def test_without_a_gpu_there_is_no_graph(files, capsys):
    main.main(toys.flags(cuda_graph=True, teacher_path=files / 'teacher.pth'))
    assert 'warning: --cuda-graph: needs an NVIDIA GPU; steps are' in capsys.readouterr().out


def make_loss_wait(patch) -> None:
    forward = main.ManifoldDistillationLoss.forward

    def waiting(self, student_out, *others):
        student_out[0].sum().item()
        return forward(self, student_out, *others)

    patch.setattr(main.ManifoldDistillationLoss, 'forward', waiting)


@pytest.mark.more
def test_step_that_waits_is_launched_and_the_place_is_named(trained, monkeypatch, capsys):
    launched = trained('launched', 1000)
    make_loss_wait(monkeypatch)
    waiting = trained('waiting')
    assert 'waits for the GPU at aten._local_scalar_dense.default; steps are' in capsys.readouterr().out
    assert trained.made[-1].replays == 0
    assert toys.differing(waiting, launched) == set()


def test_step_that_cannot_be_captured_is_launched(trained, monkeypatch, capsys):
    launched = trained('launched', 1000, **SHORT)

    def fail(self, call):
        states = [generator.get_state() for generator in self.generators]
        with monkeypatch.context() as patch:
            toys.after_calls(patch, main.Trainer, 'forward_backward', 1, toys.kill)
            with pytest.raises(toys.KilledError):  # after one of two passes: its traces must not count
                call()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)  # as after a real capture
        raise cuda_graph.CaptureError('out of memory\nand more')

    monkeypatch.setattr(recorded_call.RecordedCall, 'capture', fail)
    run = trained('run', **SHORT)
    told = 'warning: --cuda-graph: the step cannot be captured (out of memory); steps are launched kernel by kernel'
    assert capsys.readouterr().out.count(told) == 1
    assert trained.made[-1].replays == 0
    assert toys.differing(run, launched) == set()


def test_failed_capture_keeps_no_memory(monkeypatch):
    for name in ('Stream', 'CUDAGraph', 'current_stream', 'synchronize'):
        monkeypatch.setattr(torch.cuda, name, lambda: Mock())
    monkeypatch.setattr(torch.cuda, 'graph', lambda *args, **options: nullcontext())
    made = []

    def fail():
        activations = torch.ones(1)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError('out of memory')

    def capture() -> str:
        try:
            cuda_graph.CapturedCall([]).capture(fail)
        except cuda_graph.CaptureError as error:
            return str(error)

    assert capture() == 'out of memory'
    assert made[0]() is None  # at once, without the garbage collector


@pytest.mark.more
def test_other_ranks_are_not_left_alone_with_a_graph(trained, monkeypatch, capsys):
    def fail(self, call):
        raise cuda_graph.CaptureError('out of memory')

    monkeypatch.setattr(recorded_call.RecordedCall, 'capture', fail)
    monkeypatch.setattr(cuda_graph, 'get_world_size', lambda: 2)
    with pytest.raises(SystemExit) as stopped:
        trained('run')
    assert stopped.value.code == 2
    assert 'captured (out of memory); run with --no-cuda-graph' in capsys.readouterr().err


@pytest.mark.more
def test_capture_that_breaks_the_gpu_is_one_line(trained, monkeypatch, capsys):
    monkeypatch.setattr(recorded_call.RecordedCall, 'find_wait', lambda self, call: (call(), ''))
    make_loss_wait(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        trained('run')
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count('\n') == 1
    assert '--cuda-graph: the step cannot be captured (operation not permitted); run with --no-cuda-graph' in error


def test_step_that_is_not_finite_is_withheld_and_named_in_a_replay(trained, tmp_path, monkeypatch, capsys):
    prepare = main.Trainer.prepare_batch

    def spoil(trainer, batch):
        images, targets = prepare(trainer, batch)
        return (images * torch.nan if trainer.state.step == 4 else images), targets

    monkeypatch.setattr(main.Trainer, 'prepare_batch', spoil)
    with pytest.raises(SystemExit) as stopped:
        trained('spoilt', epochs=1, batch_size=1, accum_steps=None, mixup=0, cutmix=0, save_interval_steps=1)
    assert stopped.value.code == 1
    assert 'not finite at step 4 of epoch 0 on rank 0: loss_base, ' in capsys.readouterr().err
    last = toys.load(tmp_path / 'spoilt' / 'checkpoint.pth')
    assert last['step'] == 4
    assert (trained.made[-1].replays, trained.made[-1].is_closed) == (3, True)


def test_graph_refuses_inputs_of_another_shape(trained):
    weight = torch.nn.Parameter(torch.ones(3))
    graph = cuda_graph.StepGraph(
        lambda x, y: cuda_graph.StepResult((), (), x + y), torch.optim.AdamW([weight]), torch.Generator()
    )
    graph(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r'of torch.float32 \(2, 3\), not torch.float32 \(1, 3\)'):
        graph(torch.ones(1, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r'not torch\.int64'):
        graph(torch.ones(2, 3), torch.ones(2, 3).long())


@pytest.mark.more
def test_graph_on_two_ranks_equals_distributed_data_parallel(tmp_path):
    script = Path(recorded_call.__file__)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path.stem: toys.load(path) for path in tmp_path.glob('*.pth')}
    for way in recorded_call.WAYS:
        toys.assert_same(found[f'{way}0'], found[f'{way}1'])
    toys.assert_same(found['replay0'], found['host0'])
    for name, value in found['DDP0'].items():
        assert torch.allclose(value, found['host0'][name], rtol=1e-5, atol=1e-6), name
