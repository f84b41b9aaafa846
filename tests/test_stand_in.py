"""A training step on stand-ins for CUDA tensors, for machines without a GPU.

A stand-in has a shape, a type and a device, but no values. An operator raises if its tensors are on two devices, or if
it would read a value. So a step that passes mixes no devices and never waits for one. Its numbers need a real GPU.
"""

import pytest
import torch
import toys
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import fused_losses
import main
import models
import transforms
import utils
from engine import TrainConfig, Trainer, train_one_epoch
from loaders import prefetch_to_device
from pair import build_student, register_student_hooks, register_teacher_hooks

CUDA, STEPS = torch.device('cuda', 0), 2
pytestmark = [pytest.mark.more, pytest.mark.filterwarnings('ignore')]  # torch warns about the stand-ins
PLAN = torch.tensor([[number, 0.5, 2 if number > len(transforms.COLOUR_OPERATIONS) else 0] for number in range(18)])


class StandIns(FakeTensorMode):
    """Replaces tensors on the GPU by stand-ins. Tensors on the CPU stay real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        named = any(isinstance(leaf, torch.device) and leaf == CUDA for leaf in given)
        if not named and not any(isinstance(leaf, FakeTensor) for leaf in given):
            return func(*args, **kwargs or {})
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        sides = {tensor.device for tensor in tensors if tensor.dim()}
        assert len(sides) < 2 or func is torch.ops.aten.copy_.default, f'{func} is given tensors of two devices'
        made = super().__torch_dispatch__(func, types, args, kwargs)
        back = {leaf.device for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)}
        assert back <= {CUDA} or all(tensor.device != CUDA for tensor in tensors), f'{func} waits for a value'
        return made


@pytest.fixture
def step(monkeypatch):
    """A function that trains a toy student on stand-ins for two steps, with these flags."""
    generator, autograd = torch.Generator, []

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == CUDA
        assert loss.requires_grad
        for parameter in autograd[0].parameters():
            parameter.grad = torch.zeros_like(parameter)

    # These need a driver: pinned memory, CUDA generators and the threads of autograd.
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator())
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: True)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(transforms, 'compile_for', lambda function, device: function)  # not compiled
    monkeypatch.setattr(utils.Meters, 'recent', lambda meters: {})
    monkeypatch.setattr(utils.Meters, 'means', lambda meters: {})
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def run(sync=lambda: None, prefetched=False, **changes) -> Trainer:
        changes = {'device': 'cuda', 'teacher_path': 'none', 'batch_size': 4, 's_id': '0 -1', 't_id': '0 -1', **changes}
        config = toys.config(**changes)
        student = register_student_hooks(config.model, build_student(config.model, 10))
        autograd[:] = [student]
        stats = models.normalisation(student.model)
        teacher = register_teacher_hooks(config.model, toys.teacher(), stats)
        criterion = main.build_criterion(config.loss, config.augment, config.run.fused or ())
        mixup = main.build_mixup(config.augment, 10)
        count = config.optim.rank_batch_size
        batch = (
            torch.zeros(count, 3, 32, 32, dtype=torch.uint8),
            torch.arange(count) % 10,
            torch.arange(count),
            {
                'plan': PLAN[(torch.arange(2 * count) % len(PLAN))].view(count, 2, 3),
                'erase': torch.tensor([[[1, 2, 3, 4]]]).expand(count, 1, 4),
                'key': torch.arange(count),
            },
        )
        with StandIns(allow_non_fake_inputs=True):
            try:
                student.to(CUDA), teacher.to(CUDA)
            except RuntimeError as error:  # torch 2.9
                if 'no NVIDIA driver' not in str(error):
                    raise
                pytest.skip('this version of torch makes no stand-ins for CUDA tensors without a driver')
            fused = 'erasing' in (config.run.fused or ())
            preprocess = transforms.DevicePreprocess(*stats, config.augment.remode, fused_erasing=fused).to(CUDA)
            settings = TrainConfig(
                CUDA,
                config.run.autocast_dtype(CUDA),
                accum_steps=config.optim.accum_steps,
                clip_grad=config.optim.clip_grad,
                global_relations=config.loss.relations == 'global',
            )
            state = toys.state(student.model, **changes)
            trainer = Trainer(student, teacher, criterion, state, settings, preprocess, mixup)
            monkeypatch.setattr(trainer.guard, 'sync', sync)
            loader = DataLoader([batch] * STEPS, batch_size=None)
            if prefetched:
                toys.fake_streams(monkeypatch)
                loader = prefetch_to_device(loader, CUDA, ('erase', 'key') if fused else ())
            train_one_epoch(trainer, loader, epoch=0)
        return trainer

    yield run
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_gpu_step_mixes_no_devices_and_never_waits(step):
    trainer = step(relations='global', clip_grad=1, accum_steps=2)
    assert {tensor.device for tensor in trainer.tapped.state_dict().values()} == {CUDA}
    assert {tensor.device for tensor in trainer.state.ema.module.state_dict().values()} == {CUDA}
    assert trainer.state.step == STEPS


@pytest.mark.parametrize('fused', [None, 'erasing'])
@pytest.mark.parametrize('prefetched', [False, True])
def test_gpu_step_takes_batches_from_both_sides(step, fused, prefetched):
    assert step(prefetched=prefetched, fused=fused).state.step == STEPS


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_gpu_step_with_fused_losses_mixes_no_devices_and_never_waits(step, dtype, monkeypatch):
    made = []
    # Not compiled.
    monkeypatch.setattr(fused_losses, 'compile_for', lambda function, device: made.append(device) or function)
    step(fused='relations full', teacher_dtype=dtype, relation_dtype=dtype)
    assert set(made) == {CUDA}


@pytest.mark.parametrize(
    ('changes', 'error', 'words'),
    [
        ({'opt': 'sgd'}, DataDependentOutputException, '_local_scalar_dense'),  # asks the host whether to update
        ({'sync': lambda: torch.zeros((), device=CUDA).item()}, DataDependentOutputException, '_local_scalar_dense'),
        ({'sync': lambda: torch.zeros((), device=CUDA).cpu()}, AssertionError, 'waits for a value'),
        ({'sync': lambda: torch.zeros(3, device=CUDA) + torch.zeros(3)}, AssertionError, 'tensors of two devices'),
    ],
    ids=['optimizer', 'item', 'cpu', 'mixed'],
)
def test_stand_in_notices_waits_and_mixed_devices(step, changes, error, words):
    with pytest.raises(error, match=words):
        step(**changes)
