"""Tapped models compared with plain hooks on plain timm models; building models; weights of every layout."""

import argparse
import copy
import json
import re
from itertools import permutations

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models.cait import TalkingHeadAttn
from timm.optim import create_optimizer_v2

import models
from checkpoints import read_checkpoint
from models.talking_heads import use_fast_talking_heads

# Number of class, distillation and register tokens before the patch tokens. CaiT's class token enters only after its
# patch blocks.
PREFIX = {'deit': 1, 'distilled': 2, 'cait': 0, 'registers': 5}
each_family = pytest.mark.parametrize('family', PREFIX)
SIZE, GRID, WIDTH, DEPTH, C = 32, 4, 32, 3, 10


def some_images(size=SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def plain_blocks(model, images):
    """The output of every block, from hooks that are independent of the wrapper."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output.detach())) for block in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return outputs


def same_weights(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


# Tokens ---------------------------------------------------------------------------------------------------------------


@each_family
def test_tokens_are_block_outputs_without_prefix_tokens(toy, family):
    images, ids = some_images(), [2, 0, -1, 0, -3]
    expected = plain_blocks(toy(family).eval(), images)
    tapped = models.tap(toy(family).eval(), ids, SIZE)
    tokens = tapped(images).tokens
    assert len(tokens) == len(ids)
    for i, x in zip(ids, tokens, strict=True):
        assert x.shape == (2, GRID * GRID, WIDTH)
        assert expected[i].shape[1] - x.shape[1] == PREFIX[family]
        assert torch.equal(x, expected[i][:, PREFIX[family] :])
    features = tapped(images).features
    assert all(torch.equal(x, expected[i]) for i, x in zip(ids, features, strict=True))
    assert tapped.block_ids == [2, 0, 2, 0, 0]
    assert (tapped.depth, tapped.grids) == (DEPTH, [(GRID, GRID)] * len(ids))
    assert {block.width for block in tapped.blocks} == {WIDTH}


@each_family
def test_logits_equal_the_plain_model_to_the_bit(toy, family):
    images = some_images()
    out = models.tap(toy(family).eval(), [0, -1], SIZE)(images)
    assert torch.equal(out.logits, toy(family).eval()(images))
    assert out.logits.shape == (2, C)
    assert out.kd_logits is out.logits


@each_family
def test_tapping_changes_no_name_weight_or_mode(toy, family):
    tapped = models.tap(toy(family), [1], SIZE)
    assert same_weights(tapped.model.state_dict(), toy(family).state_dict())
    assert tapped.model.training  # listing the blocks uses eval mode


def test_untapped_convolutional_model_returns_logits_only():
    images = some_images()
    tapped = models.tap(timm.create_model('resnet10t', num_classes=C).eval(), [], SIZE)
    out = tapped(images)
    assert out.tokens == ()
    assert torch.equal(out.logits, tapped.model(images))


@pytest.mark.parametrize('index', [DEPTH, -DEPTH - 1])
def test_block_out_of_range_names_index_and_depth(toy, index):
    with pytest.raises(ValueError, match=rf'no block {index}: the model has {DEPTH} blocks'):
        models.tap(toy(), [0, index], SIZE)


def test_patch_drop_rate_is_refused(toy):
    with pytest.raises(ValueError, match=r'patch_drop_rate is 0\.5'):
        models.tap(toy(patch_drop_rate=0.5), [0], SIZE)


def test_distilled_student_returns_two_heads_in_training_and_mean_in_eval(toy):
    images, plain = some_images(), toy('distilled').eval()
    features = plain.norm(plain_blocks(plain, images)[-1])
    heads = plain.head(features[:, 0]), plain.head_dist(features[:, 1])
    tapped = models.tap(toy('distilled'), [0], SIZE, two_heads=True)
    out = tapped.train()(images)
    assert torch.allclose(out.logits, heads[0], atol=1e-6)
    assert torch.allclose(out.kd_logits, heads[1], atol=1e-6)
    assert (heads[0] - heads[1]).abs().min() > 1e-5
    alone = models.tap(toy('distilled'), [0], SIZE)
    for out in (tapped.eval()(images), alone.train()(images), alone.eval()(images)):
        assert torch.allclose(out.logits, (heads[0] + heads[1]) / 2, atol=1e-6)
        assert out.kd_logits is out.logits


# Training, freezing, copying ------------------------------------------------------------------------------------------


@each_family
def test_token_gradients_reach_first_block(toy, family):
    tapped = models.tap(toy(family), [-1], SIZE)
    tapped(some_images()).tokens[0].square().mean().backward()
    assert all(p.grad is not None for p in tapped.model.blocks[0].parameters())
    assert tapped.model.patch_embed.proj.weight.grad.any()


def test_tokens_keep_gradients_with_activation_checkpointing(toy, monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', True)
    tapped = models.tap(toy(), [0, -1], SIZE)
    models.checkpoint_activations(tapped)
    assert all(x.requires_grad for x in tapped(some_images()).tokens)
    with pytest.raises(ValueError, match='does not support gradient checkpointing'):
        models.checkpoint_activations(models.tap(timm.create_model('convit_tiny', depth=1), [], SIZE))


@each_family
def test_frozen_model_has_no_gradients_and_stays_in_eval_mode(toy, family):
    teacher = models.freeze(models.tap(toy(family, drop_path_rate=0.5), [0, -1], SIZE))
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    out, again = teacher(some_images()), teacher(some_images())
    assert torch.equal(out.logits, again.logits)  # drop-path is off
    assert not any(x.requires_grad for x in (out.logits, out.kd_logits, *out.tokens))


def test_deep_copy_captures_its_own_tokens(toy):
    images, tapped = some_images(), models.tap(toy().eval(), [0, -1], SIZE)
    before = tapped(images)
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    found, expected = twin(images).tokens, plain_blocks(twin.model, images)
    assert torch.equal(found[0], expected[0][:, 1:])
    assert torch.equal(found[1], expected[-1][:, 1:])
    assert not torch.equal(found[1], before.tokens[1])
    assert all(torch.equal(x, y) for x, y in zip(tapped(images).tokens, before.tokens, strict=True))
    assert not tapped._captured
    assert not twin._captured


def talking_heads(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    kwargs = {'embed_dim': 48, 'depth': 3, 'num_heads': 4, 'patch_size': 8, 'img_size': SIZE, **changes}
    model = timm.create_model('cait_s24_224', num_classes=C, init_values=0.5, **kwargs).eval()
    with torch.no_grad():  # with timm's initial mixings and biases, many errors would not show
        for name, parameter in model.named_parameters():
            if 'proj_l' in name or 'proj_w' in name or 'bias' in name:
                parameter.add_(torch.randn_like(parameter))
    return model.to(dtype)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_fast_talking_heads_keep_outputs_names_and_weights(qkv_bias):
    # float64 checks the formula, float32 the rounding
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = talking_heads(dtype, qkv_bias=qkv_bias)
        reference, state = copy.deepcopy(model), model.state_dict()
        tapped = models.freeze(models.tap(copy.deepcopy(model).float(), [0, -1], SIZE))
        tapped.to(dtype).model.load_state_dict(state)
        assert same_weights(tapped.model.state_dict(), state)
        images = some_images().to(dtype)
        out, expected = tapped(images), plain_blocks(reference, images)
        torch.testing.assert_close(out.logits, reference(images), rtol=tolerance, atol=tolerance)
        for tokens, block in zip(out.tokens, (expected[0], expected[2]), strict=True):
            assert (tokens - block).norm() <= tolerance * block.norm()
            assert tokens.is_contiguous()
            assert not block.is_contiguous()
        assert [type(block.attn).__name__ for block in tapped.model.blocks] == ['FrozenTalkingHeads'] * 3


def test_fast_talking_heads_are_as_exact_as_timm_under_autocast():
    model = talking_heads()
    images = some_images()
    exact = model(images)
    with torch.autocast('cpu', torch.bfloat16):
        timm_logits = model(images)
        fast_logits = models.freeze(models.tap(copy.deepcopy(model), [0], SIZE))(images).logits
    assert fast_logits.dtype == timm_logits.dtype
    assert (fast_logits.float() - exact).norm() <= 1.5 * (timm_logits.float() - exact).norm()


def test_bfloat16_teacher_computes_in_bfloat16_under_any_autocast():
    model, images = talking_heads(), some_images()
    exact, stats = model(images), ((0.0,) * 3, (1.0,) * 3)
    prepare = models.TeacherPreprocess(stats, stats, None, torch.bfloat16)
    teacher = models.freeze(models.tap(model, [0], SIZE), prepare, dtype=torch.bfloat16)
    plain = teacher(images)
    assert {x.dtype for x in (*plain.tokens, plain.logits, *model.parameters())} == {torch.bfloat16}
    assert 0 < (plain.logits.float() - exact).norm() <= 0.03 * exact.norm()
    with torch.autocast('cpu', torch.float16):
        assert torch.equal(teacher(images).logits, plain.logits)


def test_fast_talking_heads_overflow_no_earlier_than_timm_in_float16():
    torch.manual_seed(0)
    x, saved = torch.randn(1, 9, 48).half(), 0
    for size in (1, 10, 20, 40, 60, 80):
        reference = TalkingHeadAttn(48, 4).eval().requires_grad_(False)
        torch.nn.init.normal_(reference.qkv.weight, std=0.5 * size)
        for mixing in (reference.proj_l, reference.proj_w):
            torch.nn.init.eye_(mixing.weight)
        fast = copy.deepcopy(reference).half()
        use_fast_talking_heads(fast)
        finite = reference.half()(x).isfinite().all()
        assert fast(x).isfinite().all() or not finite
        q, k, _ = fast.qkv(x).view(1, 9, 3, 4, 12).permute(2, 0, 3, 1, 4)
        saved += int(finite and not (q @ k.mT).isfinite().all())
    assert saved  # in some case, scaling after the product would overflow


def test_fast_talking_heads_need_a_frozen_model():
    assert 'FrozenTalkingHeads' not in repr(models.tap(talking_heads(), [0], SIZE))


@each_family
def test_teacher_without_logits_stops_after_last_tapped_block(toy, family):
    images, ids = some_images(), [1, 0]
    model, ran = toy(family), []
    for name, module in model.named_modules():
        if name in ('blocks.0', 'blocks.1', 'blocks.2', 'norm', 'head'):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    whole = models.freeze(models.tap(copy.deepcopy(model), ids, SIZE))(images)
    ran.clear()
    out = models.freeze(models.tap(model, ids, SIZE), with_logits=False)(images)
    assert ran[-2:] == ['blocks.0', 'blocks.1']
    assert out.logits is None
    assert all(torch.equal(x, y) for x, y in zip(out.tokens, whole.tokens, strict=True))


def test_no_tokens_are_kept_after_a_forward_pass(toy):
    tapped = models.tap(toy(), [0, -1], SIZE)
    assert not tapped._captured
    tapped(some_images())
    assert not tapped._captured
    tapped.model(some_images())
    assert not tapped._captured
    with pytest.raises(AssertionError):
        tapped(some_images(SIZE + 8))
    tapped.model(some_images())
    assert not tapped._captured


def test_deit_tiny_has_102_tensors_without_and_50_with_weight_decay():
    # the counts of the published recipe; given the wrapper, timm finds 100 and 52
    tapped = models.tap(timm.create_model('deit_tiny_patch16_224'), [0, -1], 224)
    groups = create_optimizer_v2(tapped.model, 'adamw', weight_decay=0.05).param_groups
    assert {group['weight_decay']: len(group['params']) for group in groups} == {0.0: 102, 0.05: 50}


# Building -------------------------------------------------------------------------------------------------------------

TOY_KWARGS = {'patch_size': 8, 'embed_dim': WIDTH, 'depth': DEPTH, 'num_heads': 2}


@pytest.mark.parametrize('size', [32, 48])
def test_build_passes_input_size(size):
    model = models.build('deit_tiny_patch16_224', C, size, kwargs=TOY_KWARGS)
    assert model.patch_embed.img_size == (size, size)
    assert model(some_images(size)).shape == (2, C)


@pytest.mark.parametrize('name', ['resnet10t', 'ghostnet_050'])
def test_build_drops_arguments_a_convolutional_model_does_not_take(name):
    model = models.build(name, C, SIZE, kwargs={'drop_path_rate': 0.0})
    assert model.eval()(some_images(48)).shape == (2, C)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('deit_tinny_patch16_224', {}, 'no such model; the nearest names are deit_tiny_patch16_224'),
        ('deit_tiny_patch16_224', {'nonsense': 1}, "unexpected keyword argument 'nonsense'"),
        ('deit_tiny_patch16_224', {**TOY_KWARGS, 'embed_dim': 33}, 'divisible by num_heads'),
        ('deit_tiny_patch16_224', {**TOY_KWARGS, 'depth': 'three'}, 'timm cannot build or run it'),
        # a requested drop-path must not be ignored
        ('ghostnet_050', {'drop_path_rate': 0.1}, "unexpected keyword argument 'drop_path_rate'"),
    ],
)
def test_build_error_is_one_line(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.build(name, C, SIZE, kwargs=kwargs)
    assert '\n' not in str(caught.value)


# Weights --------------------------------------------------------------------------------------------------------------


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    'model': lambda state: {'model': state},
    'state_dict': lambda state: {'state_dict': state},
    'bare': lambda state: state,
    'data parallel': lambda state: prefixed('module.', state),
    'compiled': lambda state: {'model': prefixed('_orig_mod.', state)},
    'compiled, then data parallel': lambda state: {'state_dict': prefixed('module._orig_mod.', state)},
    'data parallel, then compiled': lambda state: {'state_dict': prefixed('_orig_mod.module.', state)},
    # the released weights of CaiT
    'model, data parallel': lambda state: {'model': prefixed('module.', state)},
    # the 2022 release and DeiT save the flags as a Namespace with the weights
    'namespace': lambda state: {'model': state, 'epoch': 3, 'args': argparse.Namespace(lr=5e-4, model='deit')},
}


@pytest.mark.R8
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_weights_of_every_layout_load(toy, tmp_path, layout, zipped):
    source, target = toy(), toy()
    for p in target.parameters():
        torch.nn.init.normal_(p)
    file = tmp_path / 'weights.pth'
    torch.save(LAYOUTS[layout](source.state_dict()), file, _use_new_zipfile_serialization=zipped)
    models.load_weights(target, models.named_weights(read_checkpoint(str(file))))
    assert same_weights(target.state_dict(), source.state_dict())


@pytest.mark.R8
def test_safetensors_file_loads(toy, tmp_path):
    state = toy().state_dict()
    safetensors.torch.save_file(state, tmp_path / 'weights.safetensors')
    found = models.named_weights(read_checkpoint(str(tmp_path / 'weights.safetensors')))
    assert same_weights(found, state)


@pytest.mark.R8
@pytest.mark.parametrize('key', ['model_ema', 'state_dict_ema'])
def test_named_weights_returns_ema_weights_on_request(toy, key):
    raw, average = toy().state_dict(), {name: value + 1 for name, value in toy().state_dict().items()}
    checkpoint = {'model': raw, key: prefixed('module.', average)}
    assert same_weights(models.named_weights(checkpoint), raw)
    assert same_weights(models.named_weights(checkpoint, ema=True), average)
    with pytest.raises(ValueError, match='no EMA weights'):
        models.named_weights({'model': raw, 'model_ema': None}, ema=True)


@pytest.mark.R8
@pytest.mark.parametrize(
    'content',
    [{}, {'epoch': 3, 'lr': 0.1}, {'model': {}}, {'model': {'epoch': 3}}, {0: torch.zeros(1)}],
    ids=['empty', 'no tensors', 'empty model', 'model without tensors', 'unnamed tensors'],
)
def test_checkpoint_without_state_dict_is_refused(content):
    with pytest.raises(ValueError, match='there is no state dict'):
        models.named_weights(content)


@pytest.mark.R8
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'depth': 2}, r'\d+ unexpected tensors \(blocks\.2\.\S+, …\)'),
        ({'depth': 4}, r'\d+ missing tensors \(blocks\.3\.\S+, …\)'),
        ({'embed_dim': 48}, r'cls_token is \(1, 1, 32\) in the file and \(1, 1, 48\) in the model'),
        ({'num_classes': 7}, 'has a head of 10 classes, but 7 are needed'),
    ],
)
def test_weight_mismatch_names_what_differs(toy, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.load_weights(toy(**changes), toy().state_dict())
    assert '\n' not in str(caught.value)


# Fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('family', 'heads'), [('deit', ['head']), ('distilled', ['head', 'head_dist']), ('cait', ['head'])]
)
def test_adapt_resamples_positions_and_replaces_heads(toy, family, heads):
    old, model = toy(family).state_dict(), toy(family, img_size=64, num_classes=7)
    torch.nn.init.normal_(model.head.weight)
    fresh = copy.deepcopy(model.state_dict())
    state, done = models.adapt(model, old)

    prefix = PREFIX[family]
    grid = old['pos_embed'][:, prefix:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, (2 * GRID, 2 * GRID), mode='bicubic', antialias=True).flatten(2).mT
    assert torch.equal(state['pos_embed'][:, :prefix], old['pos_embed'][:, :prefix])
    assert torch.allclose(state['pos_embed'][:, prefix:], larger, atol=1e-5)
    replaced = {f'{head}.{part}' for head in heads for part in ('weight', 'bias')}
    assert all(torch.equal(state[key], fresh[key]) for key in replaced)
    assert all(torch.equal(state[key], old[key]) for key in old.keys() - replaced - {'pos_embed'})
    assert len(done) == 1 + len(heads)

    models.load_weights(model, state)
    assert model.eval()(some_images(64)).shape == (2, 7)


@each_family
def test_adapt_at_the_same_size_changes_nothing(toy, family):
    state, done = models.adapt(toy(family), toy(family).state_dict())
    assert same_weights(state, toy(family).state_dict())
    assert done == []


@pytest.mark.parametrize(('family', 'other'), list(permutations(PREFIX, 2)))
def test_adapt_from_another_family_is_refused(toy, family, other):
    model = toy(family)
    with pytest.raises(ValueError, match=r'does not fit the model'):
        models.load_weights(model, models.adapt(model, toy(other).state_dict())[0])


# Weights with other names ---------------------------------------------------------------------------------------------


def test_adapt_converts_names_of_the_original_authors():
    kwargs = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 2, 4), 'window_size': 4}
    model = models.build('swin_tiny_patch4_window7_224', C, 64, kwargs=kwargs)
    state = model.state_dict()
    released = {  # merging is at the end of a stage, masks are stored, and the head has another name
        re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key).replace(
            'head.fc', 'head'
        ): value
        for key, value in state.items()
    } | {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(16, 16)}
    found, done = models.adapt(model, released)
    assert same_weights({key: found[key] for key in state}, state)
    assert done == ['names converted by timm']
    models.load_weights(model, found)


def test_adapt_leaves_other_position_tables_to_load_weights():
    kwargs = {'embed_dim': 16, 'stages': (1, 1, 2, 1)}
    small, large = (models.build('hiera_tiny_224', C, size, kwargs=kwargs) for size in (64, 96))
    with pytest.raises(ValueError, match='does not fit the model: pos_embed'):
        models.load_weights(large, models.adapt(large, small.state_dict())[0])


def test_normalisation_prefers_the_configuration_stored_with_weights(toy, tmp_path):
    model = toy()
    (tmp_path / 'config.json').write_text(json.dumps({'pretrained_cfg': {'mean': [0.1, 0.2, 0.3], 'std': [1, 2, 3]}}))
    assert models.normalisation(model, f'local-dir:{tmp_path}') == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert models.normalisation(model, f'local-dir:{tmp_path / "no"}') == models.normalisation(model)
    assert models.normalisation(model, 'a/file.pth') == models.normalisation(model)


@pytest.mark.parametrize('classes', [0, 7])
def test_match_head_follows_the_weights(toy, classes):
    model, state = toy(), toy(num_classes=classes).state_dict()
    models.match_head(model, models.adapt(model, state, replace_heads=False)[0])
    models.load_weights(model, state)
    assert model.num_classes == classes
    assert model(some_images()).shape == (2, classes or WIDTH)


def test_teacher_preprocess_changes_normalisation_and_size():
    images = torch.rand(2, 3, 32, 32)
    prepare = models.TeacherPreprocess(((0.1, 0.2, 0.3), (0.5, 0.25, 1)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.25)), None)
    raw = images * torch.tensor([0.5, 0.25, 1]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(prepare(images), (raw - 0.5) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1), atol=1e-6)
    same = ((0.5,) * 3, (0.5,) * 3)
    assert models.TeacherPreprocess(same, same, 32)(images) is images
    assert models.TeacherPreprocess(same, same, 48)(images).shape == (2, 3, 48, 48)
    assert not models.TeacherPreprocess(same, same, None).state_dict()
