"""Gradient accumulation, activation checkpointing, torch.compile and --device-augment."""

import math

import pytest
import torch
import toys

import main

pytestmark = [pytest.mark.more, pytest.mark.usefixtures('few_generated_images')]

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
def test_accumulated_step_equals_the_big_batch_step(run, tmp_path, capsys, mixing):
    flags = {**LOCAL, **mixing}
    big = run(**flags, batch_size=8, output_dir=tmp_path / 'big')
    assert '1 rank × 8 images = 8 per step' in capsys.readouterr().out
    small = run(**flags, batch_size=2, accum_steps=4, output_dir=tmp_path / 'small')
    assert '1 rank × 2 images × 4 passes = 8 per step' in capsys.readouterr().out
    for one, other in zip(small, big, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert one['train_lr'] == other['train_lr'] == pytest.approx(0.3 * 8 / 512)
    states = [toys.load(tmp_path / name / 'checkpoint.pth') for name in ('small', 'big')]
    assert states[0]['step'] == states[1]['step'] == 2 * 2
    for key, value in states[1]['model'].items():
        torch.testing.assert_close(states[0]['model'][key], value, rtol=1e-3, atol=1e-3)
    assert big[1]['train_loss'] < big[0]['train_loss']


def test_accumulated_sample_relations_see_one_micro_batch(run, tmp_path):
    flags = {**LOCAL, 'w_sample': 1, 'epochs': 1}
    big = run(**flags, batch_size=16, output_dir=tmp_path / 'big')
    small = run(**flags, batch_size=4, accum_steps=4, output_dir=tmp_path / 'small')
    assert small[0]['train_loss_mf_patch'] == pytest.approx(big[0]['train_loss_mf_patch'], rel=0.05)
    assert small[0]['train_loss_mf_sample'] < 0.9 * big[0]['train_loss_mf_sample']  # more entries are on the diagonal


def test_accumulated_run_resumes_to_the_bit(run, tmp_path, monkeypatch):
    flags = {'batch_size': 4, 'accum_steps': 2, 'epochs': 2, 'drop_path': 0.2, 'save_interval_steps': 1}
    run(**flags, output_dir=tmp_path / 'whole')
    after_step, steps = main.CheckpointManager.after_step, []

    def killed(self):
        after_step(self)
        steps.append(1)
        if len(steps) == 3:
            raise toys.KilledError

    with monkeypatch.context() as patch:
        patch.setattr(main.CheckpointManager, 'after_step', killed)
        with pytest.raises(toys.KilledError):
            run(**flags, output_dir=tmp_path / 'parts')
    assert toys.load(tmp_path / 'parts' / 'checkpoint.pth')['position'] == 8
    run(**flags, output_dir=tmp_path / 'parts', resume='auto')
    whole, parts = (toys.load(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'parts'))
    for key in ('model', 'model_ema', 'optimizer', 'step'):
        toys.assert_same(parts[key], whole[key])


def test_device_augment_resumes_to_the_bit(run, tmp_path):
    flags = {'device_augment': True, 'epochs': 2, 'reprob': 0.9}
    whole = run(**flags, output_dir=tmp_path / 'whole')
    first = tmp_path / 'whole' / 'checkpoint-00000002.pth'
    assert run(**flags, resume=first, output_dir=tmp_path / 'parts') == whole[1:]
    assert run(**{**flags, 'device_augment': None}, output_dir=tmp_path / 'plain') != whole


def test_non_finite_first_micro_batch_stops_the_step(run, monkeypatch):
    calls = []
    forward = main.ManifoldDistillationLoss.forward

    def poisoned(self, *args):
        calls.append(1)
        losses = forward(self, *args)
        return {**losses, 'mf_patch': losses['mf_patch'] * (math.nan if len(calls) == 3 else 1)}

    monkeypatch.setattr(main.ManifoldDistillationLoss, 'forward', poisoned)
    with pytest.raises(SystemExit):
        run(batch_size=4, accum_steps=2)
    assert len(calls) == 4  # both passes of the step run; then it is checked


def test_grad_checkpointing_saves_memory_and_changes_no_bit(run, tmp_path):
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


def test_unsupported_grad_checkpointing_is_a_usage_error(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(grad_checkpointing=True, model='dla46_c', model_kwargs=None, **toys.ALONE)
    assert stopped.value.code == 2
    assert 'error: --grad-checkpointing with --model dla46_c: model does not support' in capsys.readouterr().err


@pytest.mark.slow  # compiles for half a minute
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('what', ['blocks', 'models'])
def test_compiled_run_matches_plain_and_resumes_to_the_bit(run, tmp_path, what):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() keeps these
    flags = {'epochs': 2, 'lr': 0.3, 'warmup_epochs': 0, 'drop_path': 0, 'eval_ema': True}
    plain = run(**flags, output_dir=tmp_path / 'plain')
    rows = run(**flags, compile=what, output_dir=tmp_path / 'compiled')
    for one, other in zip(rows, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1.0)
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-3)
    low = run(**{**flags, 'epochs': 1}, compile=what, teacher_dtype='bfloat16', output_dir=tmp_path / 'low')
    assert low[0]['train_loss'] == pytest.approx(plain[0]['train_loss'], rel=0.05)
    states = [toys.load(tmp_path / name / 'checkpoint.pth') for name in ('plain', 'compiled')]
    for key in ('model', 'model_ema'):
        assert states[0][key].keys() == states[1][key].keys()
    # each kind of block, or each model, once for each type of weights
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 3
    flags |= {'drop_path': 0.2, 'compile': what}
    whole = run(**flags, output_dir=tmp_path / 'whole')
    first = tmp_path / 'whole' / 'checkpoint-00000002.pth'
    assert toys.load(first)['epoch'] == 0
    assert run(**flags, resume=first, output_dir=tmp_path / 'parts') == whole[1:]
    toys.assert_same(*(toys.load(tmp_path / name / 'checkpoint.pth')['model'] for name in ('whole', 'parts')))
    torch._dynamo.reset()


@pytest.mark.slow  # compiles for half a minute
@pytest.mark.filterwarnings('default')
def test_compiled_run_logs_gradient_shares(run, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))  # a cached graph may come from another run
    monkeypatch.setattr(torch._functorch.config, 'donated_buffer', True)
    (row,) = run(compile=True, log_grad_share=True, accum_steps=2, batch_size=4, output_dir=tmp_path / 'out')
    assert row['train_share_mf_patch'] > 0
    torch._dynamo.reset()
