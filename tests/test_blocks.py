"""What is true of models of every family, one row each. The slow tests check it under torch.compile, too."""

import copy
import dataclasses
import functools
import math

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from losses import ManifoldDistillationLoss
from models import grids

pytestmark = pytest.mark.more

SIZE, C = 64, 10
FLAT = {'embed_dim': 48, 'depth': 3, 'num_heads': 3}
STAGES = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 2, 4), 'window_size': 4}
# family: timm's name, arguments that make it small; per block the height of the grid and the width; prefix tokens
FAMILIES = {
    'ViT': ('vit_tiny_patch16_224', FLAT, '4 4 4', '48 48 48', 1),
    'DeiT': ('deit_tiny_patch16_224', FLAT, '4 4 4', '48 48 48', 1),
    'DeiT, distilled': ('deit_tiny_distilled_patch16_224', FLAT, '4 4 4', '48 48 48', 2),
    'DeiT III': ('deit3_small_patch16_224', FLAT, '4 4 4', '48 48 48', 1),
    'CaiT': ('cait_xxs24_224', FLAT, '4 4 4', '48 48 48', 0),
    'DINOv2': ('vit_small_patch14_reg4_dinov2', {**FLAT, 'patch_size': 16}, '4 4 4', '48 48 48', 5),
    'DINOv3': ('vit_small_patch16_dinov3', FLAT, '4 4 4', '48 48 48', 5),
    'EVA': ('eva02_tiny_patch14_224', {**FLAT, 'patch_size': 16}, '4 4 4', '48 48 48', 1),
    'BEiT': ('beit_base_patch16_224', FLAT, '4 4 4', '48 48 48', 1),
    'SigLIP': ('vit_base_patch16_siglip_224', FLAT, '4 4 4', '48 48 48', 0),
    'XCiT': ('xcit_nano_12_p16_224', {**FLAT, 'depth': 2}, '4 4', '48 48', 0),
    'TNT': ('tnt_s_patch16_224', {'embed_dim': 48, 'depth': 2, 'inner_dim': 8}, '4 4', '48 48', 1),
    'Mixer': ('mixer_s32_224', {}, ' '.join(['2'] * 8), ' '.join(['512'] * 8), 0),
    'SAM': ('samvit_base_patch16', {**FLAT, 'depth': 2}, '4 4', '48 48', 0),
    'Swin': ('swin_tiny_patch4_window7_224', STAGES, '16 8 4 4 2', '16 32 64 64 128', 0),
    'Swin V2': ('swinv2_tiny_window8_256', STAGES, '16 8 4 4 2', '16 32 64 64 128', 0),
    'FocalNet': (
        'focalnet_tiny_srf', {}, '16 16 8 8 ' + '4 ' * 6 + '2 2', '96 96 192 192 ' + '384 ' * 6 + '768 768', 0,
    ),
    'PVT v2': ('pvt_v2_b0', {'depths': (1, 1, 1, 1)}, '16 8 4 2', '32 64 160 256', 0),
    'Twins': (
        'twins_svt_small',
        {'embed_dims': (16, 32, 48, 64), 'num_heads': (1, 2, 2, 4), 'depths': (1, 1, 2, 1), 'wss': (4, 4, 4, 2)},
        '16 8 4 4 2', '16 32 48 48 64', 0,
    ),
    'Hiera': ('hiera_tiny_224', {'embed_dim': 16, 'stages': (1, 1, 2, 1)}, '16 8 4 4 2', '16 32 64 64 128', 0),
    'MViT v2': ('mvitv2_tiny', {}, '16 8 8 4 4 4 4 4 2 2', '96 192 192 384 384 384 384 384 768 768', 0),
    'NesT': ('nest_tiny', {}, '16 16 8 8 4 4 4 4 4 4 4 4', '96 96 192 192 384 384 384 384 384 384 384 384', 0),
    'PiT': ('pit_ti_224', {'depth': (1, 1, 1)}, '7 4 2', '64 128 256', 1),
    'CoaT': (
        'coat_lite_tiny', {'serial_depths': (1, 1, 2, 1), 'embed_dims': (16, 32, 48, 64)},
        '16 8 4 4 2', '16 32 48 48 64', 1,
    ),
    'LeViT': (
        'levit_128s', {'embed_dim': (32, 48, 64), 'depth': (1, 2, 1), 'num_heads': (2, 3, 4)},
        '4 2 2 1', '32 48 48 64', 0,
    ),
    'GC ViT': ('gcvit_xxtiny', {}, '16 16 8 8 ' + '4 ' * 6 + '2 2', '64 64 128 128 ' + '256 ' * 6 + '512 512', 0),
    'MaxViT': ('test_maxvit', {}, '16 8 4 2', '32 64 96 128', 0),
    'CoAtNet': ('test_coatnet', {}, '16 8 4 4 2', '32 64 96 96 128', 0),
    'TinyViT': (
        'tiny_vit_5m_224',
        {'embed_dims': (16, 16, 32, 32), 'depths': (1, 1, 2, 1), 'num_heads': (1, 1, 2, 2), 'window_sizes': [4] * 4},
        '16 8 4 4 2', '16 16 32 32 32', 0,
    ),
    'MobileViT': ('mobilevit_xxs', {}, '32 16 16 16 8 8 4 4 2 2', '16 24 24 24 48 48 64 64 80 80', 0),
    'FastViT': ('fastvit_t8', {}, '16 16 8 8 4 4 4 4 2 2', '48 48 96 96 192 192 192 192 384 384', 0),
    'EfficientFormer V2': (
        'efficientformerv2_s0', {'depths': (1, 1, 2, 2), 'embed_dims': (16, 32, 48, 64), 'num_vit': 1},
        '16 8 4 4 2 2', '16 32 48 48 64 64', 0,
    ),
    'ConvNeXt': ('test_convnext', {}, '16 8 8 4 4 4 4 2 2', '24 32 32 48 48 48 48 64 64', 0),
    'MambaOut': ('test_mambaout', {}, '16 8 4 4 4 2', '16 32 48 48 48 64', 0),
    'EfficientNet': ('test_efficientnet', {}, '32 16 8 4 2', '16 24 32 48 64', 0),
    'ResNet': ('test_resnet', {}, '16 8 4 2', '32 48 192 96', 0),
    'RegNet': ('regnetx_002', {}, '16 8 ' + '4 ' * 4 + '2 ' * 7, '24 56 ' + '152 ' * 4 + '368 ' * 7, 0),
}  # fmt: skip
# With this scope, all tests of a family run one after the other and share the model that `build` keeps.
each_family = pytest.mark.parametrize('family', FAMILIES, scope='module')


@functools.lru_cache(maxsize=3)
def build(family: str, seed: int) -> nn.Module:
    name, kwargs, *_ = FAMILIES[family]
    torch.manual_seed(seed)
    model = models.build(name, C, SIZE, kwargs=kwargs)
    for name, parameter in model.named_parameters():
        if 'gamma' in name or 'layer_scale' in name:  # at timm's 1e-5 the outputs of all blocks would be equal
            nn.init.constant_(parameter, 0.5)
    return model


def make(family: str, seed: int = 1) -> nn.Module:
    """A small model of a family, with the same weights at every call."""
    return copy.deepcopy(build(family, seed))


def some_images(seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@each_family
def test_block_list_has_grid_width_and_prefix_in_order_of_computation(family):
    _, _, heights, widths, prefix = FAMILIES[family]
    blocks = models.list_blocks(make(family), SIZE)
    assert [block.grid for block in blocks] == [(int(h), int(h)) for h in heights.split()]
    assert [block.width for block in blocks] == [int(width) for width in widths.split()]
    assert {block.prefix for block in blocks} == {prefix}


@each_family
def test_tapping_keeps_logits_and_returns_tokens_in_requested_order(family):
    plain, images = make(family).eval(), some_images()
    depth = len(FAMILIES[family][2].split())
    ids = [depth - 1, 0, -1, 0, depth // 2]
    found = models.list_blocks(plain, SIZE)
    tapped = models.tap(make(family).eval(), ids, SIZE)
    out = tapped(images)
    assert torch.equal(out.logits, plain(images))
    for i, tokens in zip(ids, out.tokens, strict=True):
        assert tokens.shape == (2, math.prod(found[i].grid), found[i].width)
    assert torch.equal(out.tokens[0], out.tokens[2])
    assert torch.equal(out.tokens[1], out.tokens[3])
    assert tapped.block_ids == [depth - 1, 0, depth - 1, 0, depth // 2]


@each_family
def test_local_image_change_shows_at_its_grid_position(family):
    # not on the diagonal, so that swapped rows and columns, or swapped channels, would show
    images = some_images()
    changed = images.clone()
    changed[:, :, 8:16, 40:48] += 5
    blocks = models.list_blocks(make(family), SIZE)
    tapped = models.tap(make(family).eval(), range(len(blocks)), SIZE)
    with torch.no_grad():
        differences = [a - b for a, b in zip(tapped(images).tokens, tapped(changed).tokens, strict=True)]
    fine = [(x, block) for x, block in zip(differences, blocks, strict=True) if block.grid[0] >= 4]
    for difference, block in fine or [(differences[0], blocks[0])]:
        h, w = block.grid
        row, column = divmod(int(difference.square().sum(dim=(0, 2)).argmax()), w)
        assert abs((row + 0.5) / h - 12 / SIZE) <= 1 / h
        assert abs((column + 0.5) / w - 44 / SIZE) <= 1 / w


@pytest.fixture(scope='module')
def one_rank(tmp_path_factory):
    """A process group of one process: enough for DistributedDataParallel to notice unused parameters."""
    rendezvous = tmp_path_factory.mktemp('group') / 'rendezvous'
    dist.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore:Grad strides do not match')  # a copy, for convolutions with one channel
@each_family
def test_relation_gradients_reach_first_block_under_ddp(family, one_rank):
    student = models.tap(make(family), [0, -1], SIZE, two_heads=True)
    teacher = models.freeze(models.tap(make('DeiT', seed=3), [0, -1], SIZE))
    grids = [models.common_grid(block.grid, (4, 4), 'pool', 196) for block in student.blocks]
    for tapped, targets in zip((student, teacher), zip(*grids, strict=True), strict=True):
        tapped.align(targets, 'pool')
    criterion = ManifoldDistillationLoss(nn.CrossEntropyLoss(), 'soft', w_full=1.0)
    wrapped = DistributedDataParallel(student)
    for seed in (0, 1):  # a parameter without gradient in the first step stops the second
        losses = criterion(wrapped(some_images(seed)), teacher(some_images(seed)), torch.tensor([0, 1]))
        assert all(torch.isfinite(value) for value in losses.values())
        student.zero_grad()
        sum(losses[name] for name in losses if name.startswith('mf_')).add(0 * sum(losses.values())).backward()
    first = student.model.get_submodule(models.list_blocks(student.model, SIZE)[0].path)
    gradients = [p.grad for p in first.parameters() if p.grad is not None]
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.slow
@each_family
def test_tapped_model_compiles_into_one_graph(family):
    torch._dynamo.reset()
    # Without gradients: in eval mode LeViT and others keep tensors of a forward pass, which may have no graph.
    plain = models.tap(make(family).eval().requires_grad_(False), [0, -1], SIZE)
    compiled = torch.compile(plain, fullgraph=True, backend='eager')
    for seed in (0, 1):
        expected, found = plain(some_images(seed)), compiled(some_images(seed))
        assert torch.equal(found.logits, expected.logits)
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, expected.tokens, strict=True))


# Pairs and grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('depths', 'student', 'teacher'),
    [
        ((12, 24), [0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 20, 21, 22, 23]),  # the recipe: DeiT-Tiny and CaiT-S24
        ((12, 5), [0, 1, 10, 11], [0, 1, 3, 4]),
        ((3, 12), [0, 2], [0, 11]),
        ((1, 12), [0], [11]),
    ],
)
def test_pair_ids_are_first_and_last_blocks(depths, student, teacher):
    assert models.pair_ids(*depths) == (student, teacher)


TARGETS = {'pool': (2, 3), 'interpolate': (3, 2), 'merge': (2, 3)}


@pytest.mark.parametrize('how', TARGETS)
def test_resample_equals_plain_loops(how):
    (h, w), target, D = (4, 6), TARGETS[how], 5
    tokens = torch.randn(2, h * w, D, dtype=torch.float64)
    image = tokens.reshape(2, h, w, D)
    found = grids.resample(tokens, (h, w), target, how)
    cells = [(slice(2 * r, 2 * r + 2), slice(2 * c, 2 * c + 2)) for r in range(2) for c in range(3)]
    if how == 'pool':
        expected = [image[:, rows, columns].mean(dim=(1, 2)) for rows, columns in cells]
    elif how == 'merge':
        expected = [image[:, rows, columns].reshape(2, -1) for rows, columns in cells]
    else:  # for each axis a triangle filter with a half-width of one step

        def weights(old, new):
            step = old / new
            rows = [[max(0, 1 - abs(i + 0.5 - (t + 0.5) * step) / step) for i in range(old)] for t in range(new)]
            rows = torch.tensor(rows, dtype=torch.float64)
            return rows / rows.sum(1, keepdim=True)

        image = torch.einsum('th,bhwd,sw->btsd', weights(h, target[0]), image, weights(w, target[1]))
        expected = image.flatten(1, 2).unbind(1)
    assert torch.allclose(found, torch.stack(list(expected), dim=1), atol=1e-12)
    assert grids.resample(tokens, (h, w), (h, w), how) is tokens


@pytest.mark.parametrize(
    ('student', 'teacher', 'how', 'expected'),
    [
        ((14, 14), (14, 14), 'error', ((14, 14), (14, 14))),
        ((14, 14), (16, 16), 'pool', ((14, 14), (14, 14))),
        ((2, 8), (4, 4), 'pool', ((2, 4), (2, 4))),
        ((14, 14), (7, 7), 'interpolate', ((14, 14), (14, 14))),
        ((14, 14), (56, 56), 'merge', ((14, 14), (14, 14))),
        ((28, 14), (56, 28), 'merge', ((14, 7), (14, 7))),
        ((14, 14), (14, 14), 'merge', ((14, 14), (14, 14))),
    ],
)
def test_common_grid(student, teacher, how, expected):
    assert models.common_grid(student, teacher, how, 196) == expected


@pytest.mark.parametrize(
    ('how', 'teacher', 'message'),
    [
        ('error', (16, 16), 'the student has 14×14 patch tokens and the teacher 16×16'),
        (
            'merge',
            (7, 7),
            '14×14 .* 7×7; with --max-patches 196 they become 14×14 and 7×7; --max-patches 49 works',
        ),
        ('merge', (17, 13), '17×13; with --max-patches 196 17×13 cannot be merged; no --max-patches brings'),
    ],
)
def test_grid_mismatch_names_both_grids(how, teacher, message):
    with pytest.raises(ValueError, match=message):
        models.common_grid((14, 14), teacher, how, 196)


def test_bfloat16_tokens_are_pooled_in_float32():
    tokens = torch.tensor([2048.0, 1, 1, 1]).to(torch.bfloat16).view(1, 4, 1)
    pooled = grids.resample(tokens, (2, 2), (1, 1), 'pool')
    assert pooled.dtype == torch.float32
    assert pooled.item() == 512.75


def test_ambiguous_layout_follows_blocks_of_the_same_class():
    swin = models.list_blocks(make('Swin'), SIZE)
    tiny = models.list_blocks(make('TinyViT'), SIZE)
    assert (swin[0].grid, swin[0].width, swin[0].layout) == ((16, 16), 16, 'NHWD')
    assert (tiny[0].grid, tiny[0].width, tiny[0].layout) == ((16, 16), 16, 'NDHW')


def test_grids_of_rectangular_images():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(32, 64), **FLAT)
    assert {block.grid for block in models.list_blocks(vit, (32, 64))} == {(2, 4)}
    for name in ('test_convnext', 'pvt_v2_b0', 'test_mambaout'):
        blocks = models.list_blocks(timm.create_model(name), (32, 96))
        assert (blocks[0].grid, blocks[-1].grid) == ((8, 24), (1, 3))


@pytest.mark.parametrize('name', ['densenet121', 'dla34', 'vgg11'])
def test_model_without_known_blocks_is_refused(name):
    with torch.device('meta'):  # without weights, which would take a second to fill
        model = timm.create_model(name, num_classes=C)
    with pytest.raises(ValueError, match='the model has no blocks at a known place'):
        models.tap(model, [0], 96)


def listed_blocks(model: nn.Module, monkeypatch, min_work: float) -> tuple[list[models.Block], list[str]]:
    """The blocks, without functions, and the devices of the images that were run to list them."""
    devices = []
    monkeypatch.setattr(models.blocks, 'META_MIN_WORK', min_work)
    with model.register_forward_pre_hook(lambda _, inputs: devices.append(inputs[0].device.type)):
        blocks = models.list_blocks(model, SIZE)
    return [dataclasses.replace(block, to_plain_layout=None) for block in blocks], devices


@each_family
def test_block_list_on_meta_device_equals_cpu(family, monkeypatch):
    model = make(family)
    state = copy.deepcopy(model.state_dict())
    computed, devices = listed_blocks(model, monkeypatch, math.inf)
    assert devices == ['cpu']
    traced, devices = listed_blocks(model, monkeypatch, 0)
    assert devices == ['meta']
    assert traced == computed
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {'cpu'}


def test_model_that_reads_values_is_listed_on_cpu(monkeypatch):
    model = make('ConvNeXt')
    expected, _ = listed_blocks(model, monkeypatch, math.inf)
    model.stem.register_forward_hook(lambda _, __, output: output * (1 + output.sum().item()))
    assert listed_blocks(model, monkeypatch, 0) == (expected, ['meta', 'cpu'])


@pytest.mark.parametrize('min_work', [0, math.inf], ids=['meta', 'cpu'])
def test_listing_changes_no_mode_cache_or_hook(min_work, monkeypatch):
    monkeypatch.setattr(models.blocks, 'META_MIN_WORK', min_work)
    model = make('LeViT').train()
    model.stages[1].eval()
    modes = [module.training for module in model.modules()]
    models.list_blocks(model, SIZE)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(getattr(module, 'attention_bias_cache', None) for module in model.modules())
