"""Taps against plain hooks on plain timm models; weights of every layout, and what has none."""

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

# What the blocks of each family put out before the patch tokens: class, distillation and register tokens. CaiT's
# class token enters only after its patch blocks.
PREFIX = {'deit': 1, 'distilled': 2, 'cait': 0, 'registers': 5}
each_family = pytest.mark.parametrize('family', PREFIX)
SIZE, GRID, WIDTH, DEPTH, C = 32, 4, 32, 3, 10


def some_images(size=SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def plain_blocks(model, images):
    """What every block puts out, by hooks of our own that know nothing of the wrapper."""
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
def test_tokens_are_the_outputs_of_the_asked_blocks_without_prefix_tokens(toy, family):
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
def test_logits_equal_those_of_the_plain_model_bit_for_bit(toy, family):
    images = some_images()
    out = models.tap(toy(family).eval(), [0, -1], SIZE)(images)
    assert torch.equal(out.logits, toy(family).eval()(images))
    assert out.logits.shape == (2, C)
    assert out.kd_logits is out.logits


@each_family
def test_tapping_leaves_the_names_and_weights_of_the_model_alone(toy, family):
    tapped = models.tap(toy(family), [1], SIZE)
    assert same_weights(tapped.model.state_dict(), toy(family).state_dict())
    assert tapped.model.training  # measuring needs eval mode, but does not leave it behind


def test_a_model_without_flat_blocks_gives_logits_alone_when_nothing_is_tapped():
    images = some_images()
    tapped = models.tap(timm.create_model('resnet10t', num_classes=C).eval(), [], SIZE)
    out = tapped(images)
    assert out.tokens == ()
    assert torch.equal(out.logits, tapped.model(images))


@pytest.mark.parametrize('index', [DEPTH, -DEPTH - 1])
def test_a_block_out_of_range_is_refused_with_its_number_and_the_depth(toy, index):
    with pytest.raises(ValueError, match=rf'no block {index}: it has {DEPTH}'):
        models.tap(toy(), [0, index], SIZE)


def test_a_model_that_drops_patches_is_refused(toy):
    with pytest.raises(ValueError, match='patch_drop_rate'):
        models.tap(toy(patch_drop_rate=0.5), [0], SIZE)


def test_a_distilled_student_has_two_heads_in_training_and_their_mean_in_eval(toy):
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


# Life of a tapped model -----------------------------------------------------------------------------------------------


@each_family
def test_gradients_of_the_tokens_reach_the_first_block(toy, family):
    tapped = models.tap(toy(family), [-1], SIZE)
    tapped(some_images()).tokens[0].square().mean().backward()
    assert all(p.grad is not None for p in tapped.model.blocks[0].parameters())
    assert tapped.model.patch_embed.proj.weight.grad.any()


def test_checkpointed_activations_keep_the_gradients_of_the_tokens(toy, monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', True)
    tapped = models.tap(toy(), [0, -1], SIZE)
    models.checkpoint_activations(tapped)
    assert all(x.requires_grad for x in tapped(some_images()).tokens)
    with pytest.raises(ValueError, match='does not support gradient checkpointing'):
        models.checkpoint_activations(models.tap(timm.create_model('convit_tiny', depth=1), [], SIZE))


@each_family
def test_a_frozen_model_has_no_gradients_and_stays_in_eval_mode(toy, family):
    teacher = models.freeze(models.tap(toy(family, drop_path_rate=0.5), [0, -1], SIZE))
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    out, again = teacher(some_images()), teacher(some_images())
    assert torch.equal(out.logits, again.logits)  # drop-path is off
    assert not any(x.requires_grad for x in (out.logits, out.kd_logits, *out.tokens))


def test_a_deep_copy_captures_into_itself(toy):
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
    with torch.no_grad():  # timm begins with mixings and biases at which much would go unnoticed
        for name, parameter in model.named_parameters():
            if 'proj_l' in name or 'proj_w' in name or 'bias' in name:
                parameter.add_(torch.randn_like(parameter))
    return model.to(dtype)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_a_frozen_cait_has_timm_s_outputs_names_and_weights_with_its_heads_mixed_otherwise(qkv_bias):
    # in float64 the formula shows, in float32 what rounding makes of it
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = talking_heads(dtype, qkv_bias=qkv_bias)
        theirs, state = copy.deepcopy(model), model.state_dict()
        tapped = models.freeze(models.tap(copy.deepcopy(model).float(), [0, -1], SIZE))
        tapped.to(dtype).model.load_state_dict(state)
        assert same_weights(tapped.model.state_dict(), state)
        images = some_images().to(dtype)
        out, expected = tapped(images), plain_blocks(theirs, images)
        torch.testing.assert_close(out.logits, theirs(images), rtol=tolerance, atol=tolerance)
        for tokens, block in zip(out.tokens, (expected[0], expected[2]), strict=True):
            assert (tokens - block).norm() <= tolerance * block.norm()
            assert tokens.is_contiguous()
            assert not block.is_contiguous()
        assert [type(block.attn).__name__ for block in tapped.model.blocks] == ['FrozenTalkingHeads'] * 3


def test_under_autocast_a_frozen_cait_is_as_near_to_float32_as_timm_s():
    model = talking_heads()
    images = some_images()
    exact = model(images)
    with torch.autocast('cpu', torch.bfloat16):
        theirs = model(images)
        ours = models.freeze(models.tap(copy.deepcopy(model), [0], SIZE))(images).logits
    assert ours.dtype == theirs.dtype
    assert (ours.float() - exact).norm() <= 1.5 * (theirs.float() - exact).norm()


def test_a_teacher_of_bfloat16_weights_computes_in_bfloat16_under_any_autocast():
    model, images = talking_heads(), some_images()
    exact, stats = model(images), ((0.0,) * 3, (1.0,) * 3)
    prepare = models.TeacherPreprocess(stats, stats, None, torch.bfloat16)
    teacher = models.freeze(models.tap(model, [0], SIZE), prepare, dtype=torch.bfloat16)
    plain = teacher(images)
    assert {x.dtype for x in (*plain.tokens, plain.logits, *model.parameters())} == {torch.bfloat16}
    assert 0 < (plain.logits.float() - exact).norm() <= 0.03 * exact.norm()
    with torch.autocast('cpu', torch.float16):
        assert torch.equal(teacher(images).logits, plain.logits)


def test_in_float16_a_frozen_cait_overflows_no_earlier_than_timm_s():
    torch.manual_seed(0)
    x, saved = torch.randn(1, 9, 48).half(), 0
    for size in (1, 10, 20, 40, 60, 80):
        theirs = TalkingHeadAttn(48, 4).eval().requires_grad_(False)
        torch.nn.init.normal_(theirs.qkv.weight, std=0.5 * size)
        for mixing in (theirs.proj_l, theirs.proj_w):
            torch.nn.init.eye_(mixing.weight)
        ours = copy.deepcopy(theirs).half()
        use_fast_talking_heads(ours)
        finite = theirs.half()(x).isfinite().all()
        assert ours(x).isfinite().all() or not finite
        q, k, _ = ours.qkv(x).view(1, 9, 3, 4, 12).permute(2, 0, 3, 1, 4)
        saved += int(finite and not (q @ k.mT).isfinite().all())
    assert saved  # products that are scaled too late would overflow


def test_only_a_frozen_model_is_changed():
    assert 'FrozenTalkingHeads' not in repr(models.tap(talking_heads(), [0], SIZE))


@each_family
def test_without_logits_a_teacher_stops_behind_the_last_tapped_block(toy, family):
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


def test_no_tokens_are_left_behind_also_when_the_inner_model_is_called_by_itself(toy):
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
def test_the_input_size_reaches_models_that_take_it(size):
    model = models.build('deit_tiny_patch16_224', C, size, kwargs=TOY_KWARGS)
    assert model.patch_embed.img_size == (size, size)
    assert model(some_images(size)).shape == (2, C)


@pytest.mark.parametrize('name', ['resnet10t', 'ghostnet_050'])
def test_convolutional_models_are_built_without_an_image_size_or_an_idle_drop_path(name):
    model = models.build(name, C, SIZE, kwargs={'drop_path_rate': 0.0})
    assert model.eval()(some_images(48)).shape == (2, C)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'words'),
    [
        ('deit_tinny_patch16_224', {}, 'no such model; the nearest names: deit_tiny_patch16_224'),
        ('deit_tiny_patch16_224', {'nonsense': 1}, "unexpected keyword argument 'nonsense'"),
        ('deit_tiny_patch16_224', {**TOY_KWARGS, 'embed_dim': 33}, 'divisible by num_heads'),
        ('deit_tiny_patch16_224', {**TOY_KWARGS, 'depth': 'three'}, 'timm cannot build or run it'),
        # a drop-path that was asked for must not be dropped in silence
        ('ghostnet_050', {'drop_path_rate': 0.1}, "unexpected keyword argument 'drop_path_rate'"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, kwargs, words):
    with pytest.raises(ValueError, match=words) as caught:
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
    # as CaiT's released weights
    'model, data parallel': lambda state: {'model': prefixed('module.', state)},
    # as the release and DeiT save: the flags as a Namespace beside the weights
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
def test_a_safetensors_file_loads(toy, tmp_path):
    state = toy().state_dict()
    safetensors.torch.save_file(state, tmp_path / 'weights.safetensors')
    found = models.named_weights(read_checkpoint(str(tmp_path / 'weights.safetensors')))
    assert same_weights(found, state)


@pytest.mark.R8
@pytest.mark.parametrize('key', ['model_ema', 'state_dict_ema'])
def test_averaged_weights_are_taken_when_asked_for(toy, key):
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
def test_a_dictionary_without_named_tensors_is_refused(content):
    with pytest.raises(ValueError, match='holds no state dict'):
        models.named_weights(content)


@pytest.mark.R8
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'depth': 2}, r'has unknown \d+ tensors \(blocks\.2\.\S+, …\)'),
        ({'depth': 4}, r'lacks \d+ tensors \(blocks\.3\.\S+, …\)'),
        ({'embed_dim': 48}, r'cls_token is \(1, 1, 32\) in the file, \(1, 1, 48\) in the model'),
        ({'num_classes': 7}, r'head\.weight is \(10, 32\) in the file, \(7, 32\) in the model'),
    ],
)
def test_weights_of_another_shape_are_refused_by_key_and_shapes(toy, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        models.load_weights(toy(**changes), toy().state_dict())
    assert '\n' not in str(caught.value)


# Fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('family', 'heads'), [('deit', ['head']), ('distilled', ['head', 'head_dist']), ('cait', ['head'])]
)
def test_fine_tuning_resamples_positions_and_replaces_heads_of_another_size(toy, family, heads):
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
def test_fine_tuning_at_the_same_size_changes_nothing(toy, family):
    state, done = models.adapt(toy(family), toy(family).state_dict())
    assert same_weights(state, toy(family).state_dict())
    assert done == []


@pytest.mark.parametrize(('ours', 'theirs'), list(permutations(PREFIX, 2)))
def test_fine_tuning_from_another_family_is_refused_in_words(toy, ours, theirs):
    model = toy(ours)
    with pytest.raises(ValueError, match=r'does not fit the model'):
        models.load_weights(model, models.adapt(model, toy(theirs).state_dict())[0])


# Weights as others released them --------------------------------------------------------------------------------------


def test_weights_under_their_authors_names_are_converted_by_timm_s_rules():
    kwargs = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 2, 4), 'window_size': 4}
    model = models.build('swin_tiny_patch4_window7_224', C, 64, kwargs=kwargs)
    state = model.state_dict()
    released = {  # merging stands at the end of a stage there, masks are kept, the head has no pooling above it
        re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key).replace(
            'head.fc', 'head'
        ): value
        for key, value in state.items()
    } | {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(16, 16)}
    found, done = models.adapt(model, released)
    assert same_weights({key: found[key] for key in state}, state)
    assert done == ["converted by timm's rules for the model"]
    models.load_weights(model, found)


def test_positions_that_are_no_flat_table_are_refused_in_words_not_in_a_traceback():
    kwargs = {'embed_dim': 16, 'stages': (1, 1, 2, 1)}
    small, large = (models.build('hiera_tiny_224', C, size, kwargs=kwargs) for size in (64, 96))
    with pytest.raises(ValueError, match='does not fit the model: pos_embed'):
        models.load_weights(large, models.adapt(large, small.state_dict())[0])


def test_the_configuration_beside_weights_tells_their_normalisation(toy, tmp_path):
    model = toy()
    (tmp_path / 'config.json').write_text(json.dumps({'pretrained_cfg': {'mean': [0.1, 0.2, 0.3], 'std': [1, 2, 3]}}))
    assert models.normalisation(model, f'local-dir:{tmp_path}') == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert models.normalisation(model, f'local-dir:{tmp_path / "no"}') == models.normalisation(model)
    assert models.normalisation(model, 'a/file.pth') == models.normalisation(model)


@pytest.mark.parametrize('classes', [0, 7])
def test_a_model_gets_a_head_of_as_many_classes_as_its_weights_have(toy, classes):
    model, state = toy(), toy(num_classes=classes).state_dict()
    models.match_head(model, models.adapt(model, state, replace_heads=False)[0])
    models.load_weights(model, state)
    assert model.num_classes == classes
    assert model(some_images()).shape == (2, classes or WIDTH)


def test_images_are_prepared_for_another_model_s_normalisation_and_size():
    images = torch.rand(2, 3, 32, 32)
    prepare = models.TeacherPreprocess(((0.1, 0.2, 0.3), (0.5, 0.25, 1)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.25)), None)
    raw = images * torch.tensor([0.5, 0.25, 1]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(prepare(images), (raw - 0.5) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1), atol=1e-6)
    same = ((0.5,) * 3, (0.5,) * 3)
    assert models.TeacherPreprocess(same, same, 32)(images) is images
    assert models.TeacherPreprocess(same, same, 48)(images).shape == (2, 3, 48, 48)
    assert not models.TeacherPreprocess(same, same, None).state_dict()
