"""The fused talking-heads attention of frozen CaiT teachers, as far as it can be tested without a GPU."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import toys
from interpret import SHAPES, attention
from torch._subclasses.fake_tensor import FakeTensorMode

import main
import models
from flags import FUSED, RunConfig
from models import talking_heads
from models.talking_heads import fused_talking_heads_problem, use_fast_talking_heads

pytestmark = pytest.mark.more

CUDA = torch.device('cuda', 0)


@pytest.fixture
def kernels_can_run(monkeypatch):
    monkeypatch.setattr(talking_heads, 'fused_talking_heads_problem', lambda device: '')


def both(heads: int = 4) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The default and the fused attention, with the same weights."""
    plain = attention(heads, 16)
    fused = copy.deepcopy(plain)
    use_fast_talking_heads(plain)
    use_fast_talking_heads(fused, fused=True)
    return plain, fused


def test_kernels_are_as_exact_as_float32():
    # An older interpreter does not run with the present numpy. The variable must be set before triton is imported.
    pytest.importorskip('triton', minversion='3.8')
    script = toys.ROOT / 'tests' / 'interpret.py'
    variables = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    ended = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    errors = json.loads(ended.stdout)
    assert len(errors) == len(SHAPES) + 2
    assert max(errors.values()) < 1e-6, errors


def test_fused_is_the_default_attention_where_kernels_cannot_run():
    (plain, fused), x = both(), torch.randn(2, 9, 64)
    assert type(plain).__name__ == 'FrozenTalkingHeads'
    assert type(fused).__name__ == 'FusedTalkingHeads'
    compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
    assert torch.equal(fused(x), plain(x))
    assert torch.equal(compiled(x), plain(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(fused(x), plain(x))


def test_default_attention_is_equal_to_the_bit_to_its_formula():
    (layer, _), x = both(), torch.randn(2, 9, 64)
    q, k, v = layer.qkv(x).view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4).contiguous()
    scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=layer.scale)
    maps = (layer.proj_l.weight @ scores.view(2, 4, 81)).view(2, 4, 9, 9).softmax(dim=-1)
    maps = (layer.proj_w.weight @ maps.flatten(2)).view(2, 4, 9, 9)
    out = maps @ v + layer.proj_w.bias.view(4, 1, 1) * v.sum(dim=2, keepdim=True)
    assert torch.equal(layer(x), layer.proj(out.transpose(1, 2).reshape(2, 9, 64)))


def test_kernels_are_not_asked_for_float64(kernels_can_run):
    (plain, fused), x = both(), torch.randn(2, 9, 64).double()
    assert torch.equal(fused.double()(x), plain.double()(x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_operator_gives_shape_dtype_and_device_without_running(kernels_can_run, dtype):
    _, fused = both(6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(2, 9, 3 * 96, dtype=dtype, device=CUDA)
        out = fused.attend(qkv)
    assert (out.shape, out.dtype, out.device) == ((2, 9, 96), dtype, CUDA)


def test_problem_names_what_is_missing(monkeypatch):
    assert 'GPU' in fused_talking_heads_problem(torch.device('cpu'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(talking_heads, 'HAS_TRITON', True)
    assert fused_talking_heads_problem(CUDA) == ''
    monkeypatch.setattr(talking_heads, 'HAS_TRITON', False)
    assert fused_talking_heads_problem(CUDA) == 'needs the package triton'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert '8.0' in fused_talking_heads_problem(CUDA)


@pytest.mark.parametrize(
    ('model', 'heads', 'reason'),
    [
        ('deit_tiny_patch16_224', 4, 'no talking-heads attention'),
        ('cait_s24_224', 3, '3 heads of 64 channels'),
        ('cait_s24_224', 8, '8 heads of 24 channels'),
    ],
)
def test_other_models_are_refused_and_not_changed(model, heads, reason):
    plain = timm.create_model(model, depth=1, embed_dim=192, num_heads=heads, img_size=32, patch_size=8)
    with pytest.raises(ValueError, match=reason):
        models.freeze(models.tap(plain, [0], 32), fused_talking_heads=True)
    assert 'TalkingHeads' not in repr(plain)


@pytest.mark.parametrize('heads', [4, 3])
def test_default_fuses_heads_that_can_be_fused(files, tmp_path, epochs, monkeypatch, heads):
    monkeypatch.setattr(RunConfig, 'fused_parts', lambda run, device: FUSED)
    kwargs = {'patch_size': 8, 'embed_dim': 16 * heads, 'depth': 6, 'num_heads': heads}
    path = toys.save(tmp_path / 'teacher.pth', toys.teacher(**kwargs).state_dict())
    main.main(toys.flags(teacher_path=path, teacher_kwargs=' '.join(f'{key}={value}' for key, value in kwargs.items())))
    name = 'FusedTalkingHeads' if heads == 4 else 'FrozenTalkingHeads'
    assert {type(block.attn).__name__ for block in epochs[-1].teacher.model.blocks} == {name}


def test_flag_on_a_cpu_warns_once(files, tmp_path, epochs, capsys):
    kwargs = {'patch_size': 8, 'embed_dim': 64, 'depth': 6, 'num_heads': 4}
    path = toys.save(tmp_path / 'teacher.pth', toys.teacher(**kwargs).state_dict())
    words = ' '.join(f'{key}={value}' for key, value in kwargs.items())
    for fused, name in (('talking-heads', 'FusedTalkingHeads'), (None, 'FrozenTalkingHeads')):
        main.main(toys.flags(teacher_path=path, teacher_kwargs=words, fused=fused))
        lines = [line for line in capsys.readouterr().out.splitlines() if '--fused' in line]
        assert len(lines) == bool(fused)
        assert all(line.startswith('warning: --fused talking-heads: needs an NVIDIA GPU') for line in lines)
        assert {type(block.attn).__name__ for block in epochs[-1].teacher.model.blocks} == {name}
