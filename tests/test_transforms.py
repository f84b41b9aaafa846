"""Augmentation of batches, against timm and Pillow image by image, and erasing; nothing waits for the device."""

import copy
import math
import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import (
    LEVEL_TO_ARG,
    AugmentOp,
    RandAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import ColorJitter, Compose, Normalize, ToTensor

import transforms
from transforms import OPERATIONS, DevicePreprocess, PolicySampler, apply_policy, draw_erasures, erase, erase_batch

H, W = 24, 20
FILL = (10, 200, 99)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = sorted(LEVEL_TO_ARG.keys() - {'Desaturate', 'GaussianBlur', 'GaussianBlurRand'})
MOVING = [name for name in NAMES if name.startswith(('Rotate', 'Shear', 'Translate'))]
COLOURS = [name for name in NAMES if name not in MOVING]
POLICIES = ['rand-m9-mstd0.5-inc1', 'rand-m9', 'rand-m7-n3-p0.8-mstd101', 'rand-m6-n4-mstd1-mmax12-inc1-tweights',
            'v0', 'v0r-mstd0.5', 'original', 'originalr-mstd2']  # fmt: skip
LEVELS = (0, 1, 2.3, 5, 7.7, 9, 10)


def pictures(kind='all', number=3):
    """(number, 3, H, W) uint8: gradients, noise, both, or a constant, in turn or of one kind."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.meshgrid(torch.linspace(0, 1, W), torch.linspace(0, 1, H), indexing='xy')
    found = []
    for i in range(number):
        smooth = torch.stack([20 + (200 - i) * x, 250 - (220 - i) * y, 70 * x + 90 * y + i])
        noise = torch.randint(0, 256, (3, H, W), generator=generator).float()
        kinds = {
            'smooth': smooth,
            'noise': noise,
            'both': 0.7 * smooth + 0.2 * noise,
            'plane': torch.full_like(noise, 250),
        }
        found.append(list(kinds.values())[i % 4] if kind == 'all' else kinds[kind])
    return torch.stack(found).to(torch.uint8)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seed(number):
    random.seed(number)
    np.random.seed(number)


def states():
    kind, numbers, *rest = np.random.get_state()
    return random.getstate(), kind, numbers.tolist(), rest


def posterize(image, bits, **_):
    # Pillow 13 raises an error for 0 bits; Pillow 12 returned black.
    return image.point(lambda value: 0) if bits <= 0 else ImageOps.posterize(image, min(bits, 8))


def operations(policy):
    sequences = [policy.ops] if isinstance(policy, RandAugment) else policy.policy
    return [op for ops in sequences for op in ops]


def timm_policy(words, **hparams):
    make = rand_augment_transform if words.startswith('rand') else auto_augment_transform
    policy = make(words, {'translate_const': 9, 'img_mean': FILL, **hparams})
    for op in operations(policy):
        op.aug_fn = posterize if 'Posterize' in op.name else op.aug_fn
    return policy


def one_operation(name, level, resample=Image.Resampling.BILINEAR):
    hparams = {'translate_const': 9, 'img_mean': FILL, 'interpolation': resample}
    op = AugmentOp(name, 1.0, level, hparams)
    op.aug_fn = posterize if 'Posterize' in name else op.aug_fn
    return RandAugment([op], 1)


def both_ways(policies, images):
    """Results of timm with Pillow, and of the batch, each (B, 3, H, W) int. Image i has policy i and seed i."""
    plans, expected = [], []
    for i, (policy, image) in enumerate(zip(policies, images, strict=True)):
        seed(i)
        expected.append(as_tensor(policy(as_pil(image))))
        seed(i)
        plans.append(PolicySampler(policy)())
    return torch.stack(expected).int(), apply_policy(images, torch.stack(plans), FILL).int()


def of_each_level(name, kind, resample=Image.Resampling.BILINEAR, each=4):
    """Absolute differences of `both_ways`, (B, 3, H, W), over all levels and both signs."""
    levels = [level for level in LEVELS for _ in range(each)]
    policies = [one_operation(name, level, resample) for level in levels]
    expected, found = both_ways(policies, pictures(kind, len(levels)))
    return (expected - found).abs()


def every_operation(copies=1):
    """A plan (copies · number of operations, 1, 3) with every operation."""
    arguments = {'Rotate': 20, 'Posterize': 3, 'Solarize': 100, 'SolarizeAdd': 60, 'TranslateX': 4, 'TranslateY': -5}
    rows = [[number, arguments.get(name, 0.3), 3] for number, name in enumerate(OPERATIONS)]
    return torch.tensor(rows, dtype=torch.float32)[:, None].repeat(copies, 1, 1)


class CallCounter(TorchDispatchMode):
    """Counts the calls of torch. Indexing by a mask counts as `mask`: it calls `nonzero` inside."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith('index') and any(getattr(leaf, 'dtype', None) == torch.bool for leaf in tree_leaves(args)):
            name = 'mask'
        self.calls[name] += 1
        return function(*args, **(kwargs or {}))


# Results against Pillow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', COLOURS)
def test_colour_operation_matches_pillow_to_1_of_255(name):
    difference = of_each_level(name, 'all')
    assert difference.max() <= 1
    assert (
        difference > 0
    ).float().mean() < 0.002  # AutoContrast, where Pillow's product is slightly below a whole number


@pytest.mark.parametrize('name', MOVING)
def test_bilinear_geometry_matches_pillow_to_1_of_255(name):
    for kind in ('smooth', 'noise', 'plane'):  # in a constant image a filled pixel is visible
        difference = of_each_level(name, kind)
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.03


@pytest.mark.parametrize('name', MOVING)
def test_bicubic_geometry_is_close_to_pillow(name):
    bicubic = Image.Resampling.BICUBIC
    assert of_each_level(name, 'plane', bicubic).max() == 0
    assert of_each_level(name, 'smooth', bicubic).max() <= 1
    assert of_each_level(name, 'noise', bicubic).float().mean() < 4  # of 255; two images of noise differ by 85


@pytest.mark.parametrize('name', MOVING)
def test_nearest_geometry_equals_pillow(name):
    # At levels 5 and 10 a position is halfway between two pixels, and both are right.
    levels = [level for level in LEVELS if level % 5 or 'Translate' not in name for _ in range(4)]
    policies = [one_operation(name, level, Image.Resampling.NEAREST) for level in levels]
    expected, found = both_ways(policies, pictures('noise', len(levels)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize('words', POLICIES)
def test_whole_policy_matches_timm_image_by_image(words):
    policy = timm_policy(words, interpolation=Image.Resampling.BILINEAR)
    expected, found = both_ways([policy] * 60, pictures('all', 60))
    # Equalize and Posterize make an earlier difference of 1 larger.
    assert ((expected - found).abs() > 1).float().mean() < 0.01
    assert (expected != pictures('all', 60)).float().mean() > 0.2


def test_posterize_in_a_batch_keeps_no_bits_or_all():
    number = OPERATIONS.index('Posterize')
    plan = torch.tensor([[[number, bits, 0]] for bits in (0.0, 8.0, 9.0, 1.0)])
    none, whole, more, one = apply_policy(pictures('noise', 4), plan, FILL)
    assert not none.any()
    assert torch.equal(whole, pictures('noise', 4)[1])
    assert torch.equal(more, pictures('noise', 4)[2])
    assert set(one.flatten().tolist()) == {0, 128}


def test_result_for_an_image_does_not_depend_on_its_batch():
    policy = timm_policy('rand-m9-n3-p0.9-mstd1-inc1')
    sampler, images = PolicySampler(policy), pictures('all', 40)
    seed(0)
    plan = torch.stack([sampler() for _ in images])
    assert set(plan[..., 0].flatten().tolist()) >= {0, *map(OPERATIONS.index, ('Equalize', 'Sharpness', 'Rotate'))}
    assert {2, 3} < set(plan[..., 2].flatten().tolist())
    together, untouched = apply_policy(images, plan, FILL), pictures('all', 40)
    assert torch.equal(images, untouched)
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], apply_policy(images[i : i + 1], plan[i : i + 1], FILL))


def test_zero_rows_do_nothing():
    assert torch.equal(apply_policy(pictures(), torch.zeros(3, 2, 3), FILL), pictures())


# Drawing --------------------------------------------------------------------------------------------------------------


class RecordingImage:
    """Replaces an image and records the filter of a geometric operation."""

    size = (W, H)

    def transform(self, size, method, matrix, resample, fillcolor):
        self.resample = int(resample)

    def rotate(self, degrees, resample, fillcolor):
        self.resample = int(resample)


def spied(policy):
    """A copy of the policy, and the list to which it adds (name, argument, filter) of each operation."""
    policy, done = copy.deepcopy(policy), []

    def spy(op, function):
        def aug_fn(image, *arguments, **kwargs):
            if op.name in MOVING:
                function(image, *arguments, **kwargs)
            resample = image.resample if op.name in MOVING else 0
            done.append((re.sub('(Increasing|Original)$', '', op.name), *(arguments or (0,)), resample))
            return image

        return aug_fn

    for op in operations(policy):
        op.aug_fn = spy(op, op.aug_fn)
    return policy, done


@pytest.mark.parametrize('resample', [None, Image.Resampling.BICUBIC])
@pytest.mark.parametrize('words', POLICIES)
def test_policy_sampler_draws_as_timm(words, resample):
    policy = timm_policy(words, **({'interpolation': resample} if resample is not None else {}))
    sampler, (spy, done), image = PolicySampler(policy), spied(policy), as_pil(pictures()[0])
    seen = set()
    assert sampler.rows == {'-n3': 3, '-n4': 4}.get(re.sub('.*(-n.).*', r'\1', words), 2)
    for number in range(60):
        seed(number)
        policy(image)
        after = states()
        seed(number)
        done.clear()
        spy(RecordingImage())
        seed(number)
        plan = sampler()
        assert states() == after
        assert plan.dtype == torch.float32
        assert plan.shape == (sampler.rows, 3)
        expected = [[OPERATIONS.index(name), argument, resample] for name, argument, resample in done]
        expected += [[0, 0, 0]] * (sampler.rows - len(done))
        assert torch.equal(plan, torch.tensor(expected, dtype=torch.float32))
        seen.update(name for name, *_ in done)
    assert len(seen) > 5


def test_policy_sampler_does_not_change_timm_transform():
    policy = create_transform(32, is_training=True, auto_augment='rand-m9-mstd0.5-inc1', mean=MEAN).transforms[2]
    seed(3)
    before = policy(as_pil(pictures('both')[0]))
    sampler = PolicySampler(policy)
    assert sampler.fill == (124, 116, 104)  # ImageNet's mean, of 255
    seed(3)
    sampler()
    seed(3)
    assert policy(as_pil(pictures('both')[0])) == before


def test_pickled_policy_sampler_draws_the_same():
    sampler = PolicySampler(timm_policy('rand-m9-n4-p1-mstd0.5'))
    twin = pickle.loads(pickle.dumps(sampler))
    seed(5)
    plan = sampler()
    seed(5)
    assert torch.equal(twin(), plan)
    assert plan.any()


@pytest.mark.parametrize(
    ('policy', 'named'),
    [
        (augment_and_mix_transform('augmix-m5', {'img_mean': FILL}), 'AugMixAugment'),
        (auto_augment_transform('3a'), 'Desaturate'),
        (rand_augment_transform('rand-m9', transforms=['Invert', 'GaussianBlur']), 'GaussianBlur'),
        (rand_augment_transform('rand-m9', {'interpolation': Image.Resampling.LANCZOS}), 'Rotate.*LANCZOS'),
        (ColorJitter(0.4), 'ColorJitter'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_unsupported_policy_is_named(policy, named):
    with pytest.raises(ValueError, match=named):
        PolicySampler(policy)


# Erasing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
@pytest.mark.parametrize(('probability', 'count'), [(0.5, 1), (1, 1), (0.8, 3)])
def test_rectangles_match_timm(probability, count, mode):
    erasing = RandomErasing(probability, max_area=0.5, mode=mode, max_count=count, device='cpu')
    sizes = Counter()
    for number in range(80):
        random.seed(number)
        expected = erasing(torch.full((3, H, W), 9.0)) != 9
        after = random.getstate()
        random.seed(number)
        noise = torch.get_rng_state()
        rectangles = draw_erasures(erasing, H, W)
        assert random.getstate() == after
        assert torch.equal(torch.get_rng_state(), noise)
        assert rectangles.dtype == torch.int64
        assert rectangles.shape == (count, 4)
        found = torch.zeros(3, H, W, dtype=torch.bool)
        for top, left, height, width in rectangles.tolist():
            found[:, top : top + height, left : left + width] = True
        assert torch.equal(found, expected)
        sizes[int((rectangles[:, 2] > 0).sum())] += 1
    assert erasing.mode == mode
    assert erasing.per_pixel == (mode == 'pixel')
    assert sizes[count] > 10
    assert probability == 1 or sizes[0] > 5


RECTANGLES = torch.tensor([[[3, 2, 9, 7], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2, [[1, 1, 5, 6], [12, 4, 8, 10]]])


def erased(rectangles, keys, mode='pixel'):
    images = torch.full((len(keys), 3, H, W), 9.0)
    erase(images, rectangles, torch.tensor(keys), mode)
    return images


def test_fill_depends_on_the_key_only():
    first, untouched, last = erased(RECTANGLES, [11, 12, 2**63 - 1])
    again = erased(RECTANGLES[[2, 0, 0]], [2**63 - 1, 11, 12])
    assert torch.equal(again[0], last)
    assert torch.equal(again[1], first)
    assert not torch.equal(again[2], first)
    assert (untouched == 9).all()


@pytest.mark.parametrize(('mode', 'values'), [('pixel', 3 * 8 * 10), ('rand', 3), ('const', 1)])
def test_fill_modes_change_only_the_rectangle(mode, values):
    images = erased(RECTANGLES, [11, 12, 13], mode)
    area = images[2, :, 12:20, 4:14]
    assert len(area.unique()) == values
    assert mode == 'const' or 0.1 < area.std() < 3
    assert (images != 9).sum((1, 2, 3)).tolist() == [3 * 9 * 7, 0, 3 * (5 * 6 + 8 * 10)]


def test_noise_is_standard_normal_and_differs_between_rectangles():
    areas = torch.tensor([[[0, 0, 12, W], [12, 0, 12, W]]])
    image = erased(areas, [5])[0]
    assert abs(float(image.mean())) < 0.1
    assert 0.9 < image.std() < 1.1
    assert not torch.equal(image[:, :12], image[:, 12:])


OVERLAPPING = torch.tensor([[[3, 2, 9, 7], [5, 4, 10, 9]], [[0, 0, 0, 0]] * 2, [[1, 1, 5, 6], [3, 3, 2, 2]]])
WHOLE = torch.tensor([[[0, 0, 64, 64]]])


def noise(keys, size=64, mode='pixel'):
    """(B, 3, size, size) float64: the noise in images that are erased as a whole."""
    keys = torch.as_tensor(keys)
    images = torch.full((len(keys), 3, size, size), torch.nan)
    return erase_batch(images, WHOLE.expand(len(keys), 1, 4), keys, mode).double()


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
@pytest.mark.parametrize('rectangles', [RECTANGLES, OVERLAPPING, RECTANGLES[:, :1]])
def test_batch_is_erased_where_single_images_are(mode, rectangles):
    images, keys = torch.full((3, 3, H, W), 9.0), torch.tensor([11, 12, 2**63 - 1])
    found, expected = erase_batch(images, rectangles, keys, mode), images.clone()
    erase(expected, rectangles, keys, mode)
    assert torch.equal(found == 9, expected == 9)
    assert mode != 'const' or torch.equal(found, expected)
    assert (images == 9).all()


def test_last_of_overlapping_colours_counts_as_in_single_images():
    images, keys = torch.full((3, 3, H, W), 9.0), torch.arange(3)
    found, single = erase_batch(images, OVERLAPPING, keys, 'rand'), images.clone()
    erase(single, OVERLAPPING, keys, 'rand')
    # Numbers differ; which pixels have the same colour does not.
    for one, other in zip(found.flatten(2), single.flatten(2), strict=True):
        assert torch.equal(one[:, :, None] == one[:, None], other[:, :, None] == other[:, None])


def test_noise_of_a_batch_is_a_function_of_the_key_and_the_pixel():
    keys = torch.tensor([7, 2**62 + 5, 7, 0])
    images = torch.randn(4, 3, H, W)
    # Key 7 again, in another rectangle: where both are erased, they are equal.
    rectangles = torch.tensor([[[0, 0, H, W]], [[2, 2, 8, 9]], [[1, 3, 20, 11]], [[0, 0, 0, 0]]])
    found = erase_batch(images, rectangles, keys, 'pixel')
    assert torch.equal(found[2, :, 1:21, 3:14], found[0, :, 1:21, 3:14])
    order = torch.tensor([3, 1, 0])
    assert torch.equal(erase_batch(images[order], rectangles[order], keys[order], 'pixel'), found[order])
    alone = erase_batch(images[1:2], rectangles[1:2], keys[1:2], 'pixel')
    assert torch.equal(alone, found[1:2])
    assert torch.equal(found[3], images[3])


def test_noise_of_a_batch_does_not_change_between_versions():
    # SplitMix64 and Box-Muller in Python's integers and float64.
    def number(key, place):
        z = (key * 0x9E3779B97F4A7C15 + place) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        radius = math.sqrt(-2 * math.log(((z >> 40) + 1) / 2**24))
        return radius * math.cos(2 * math.pi * (z % 2**24) / 2**24)

    keys = [0, 1, 12345678901234567, 2**63 - 1]
    expected = [[number(key, place) for place in range(3 * 64 * 64)] for key in keys]
    torch.testing.assert_close(noise(keys).flatten(1), torch.tensor(expected).double(), rtol=0, atol=5e-6)
    colours = [[number(key, place) for place in range(3)] for key in keys]
    torch.testing.assert_close(noise(keys, mode='rand')[..., 0, 0], torch.tensor(colours).double(), rtol=0, atol=5e-6)


KEYS = {
    'in a row': torch.arange(64),
    'high bits': torch.arange(64) << 50,
    'random': torch.arange(64) * 0x123456789ABCDF,
}


@pytest.mark.parametrize('keys', KEYS.values(), ids=KEYS)
def test_noise_of_a_batch_is_standard_normal_without_correlations(keys):
    x = noise(keys)
    count = x.numel()
    assert x.isfinite().all()
    assert abs(x.mean()) < 4 / count**0.5
    assert abs(x.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert x.unique().numel() > 0.9 * count
    # Of neighbours: in a row, a column, a channel, and of neighbouring keys; their sizes too.
    for size in (x, x**2 - 1):
        scale = size.var()
        for axis in range(4):
            last, first = size.narrow(axis, 1, size.shape[axis] - 1), size.narrow(axis, 0, size.shape[axis] - 1)
            assert abs((last * first).mean() / scale) < 4 / first.numel() ** 0.5


@pytest.mark.more
@pytest.mark.filterwarnings('default')
def test_erasing_a_batch_compiles_into_one_graph():
    keys, images = torch.tensor([11, 12, 2**63 - 1]), torch.randn(3, 3, H, W)
    for mode in ('pixel', 'rand', 'const'):
        compiled = torch.compile(erase_batch, fullgraph=True, dynamic=False, backend='aot_eager')
        found = compiled(images, OVERLAPPING, keys, mode)
        assert torch.equal(found, erase_batch(images, OVERLAPPING, keys, mode))


# DevicePreprocess -----------------------------------------------------------------------------------------------------


def test_normalisation_equals_totensor_and_normalize():
    images = torch.stack([torch.arange(256, dtype=torch.uint8).view(16, 16)] * 3)[None].repeat(2, 1, 1, 1)
    images[1] = images[1].flip(2)
    normalise = Compose([ToTensor(), Normalize(MEAN, STD)])
    expected = torch.stack([normalise(as_pil(image)) for image in images])
    found = DevicePreprocess(MEAN, STD)(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_preprocess_applies_plan_then_normalises_then_erases():
    images, plan = pictures(), every_operation()[[4, 11, 12]]
    aug_params = {'plan': plan, 'erase': RECTANGLES, 'key': torch.tensor([1, 2, 3])}
    expected = DevicePreprocess(MEAN, STD)(apply_policy(images, plan, FILL), {})
    erase(expected, RECTANGLES, aug_params['key'], 'rand')
    assert torch.equal(DevicePreprocess(MEAN, STD, 'rand', FILL)(images, aug_params), expected)
    assert torch.equal(images, pictures())


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_preprocess_erases_a_batch_only_with_its_flag(mode):
    images, aug_params = pictures(), {'erase': RECTANGLES, 'key': torch.tensor([1, 2, 3])}
    expected = erase_batch(DevicePreprocess(MEAN, STD)(images), *aug_params.values(), mode)
    fused, plain = (
        DevicePreprocess(MEAN, STD, mode, fused_erasing=fused)(images, aug_params) for fused in (True, False)
    )
    assert torch.equal(fused, expected)
    assert torch.equal(plain, expected) == (mode == 'const')


def test_normalised_images_are_refused():
    with pytest.raises(TypeError, match=r'must be uint8, but are torch\.float32'):
        DevicePreprocess(MEAN, STD)(torch.rand(2, 3, H, W), {})


# The device -----------------------------------------------------------------------------------------------------------


def calls(copies, erasing, fused=False):
    """The calls of torch by `DevicePreprocess` for a batch with `copies` images of every operation."""
    plan, preprocess = every_operation(copies), DevicePreprocess(MEAN, STD, fused_erasing=fused)
    images, aug_params = pictures('all', len(plan)), {'plan': plan}
    if erasing:
        aug_params |= {'erase': RECTANGLES[:1].repeat(len(plan), 1, 1), 'key': torch.arange(len(plan))}
    with CallCounter() as watched:
        preprocess(images, aug_params)
    return watched.calls


@pytest.mark.parametrize(('erasing', 'fused'), [(False, False), (True, False), (True, True)])
def test_no_call_waits_for_the_device(erasing, fused):
    found = calls(2, erasing, fused)
    assert found['grid_sampler_2d'] == 1
    assert not found.keys() & {'_local_scalar_dense', 'nonzero', 'mask', 'masked_select', 'equal'}


def test_number_of_calls_does_not_grow_with_the_batch():
    assert calls(1, False) == calls(8, False)
    assert calls(1, False).total() < 300
    assert calls(1, True, fused=True) == calls(8, True, fused=True)


def test_plan_needs_few_copies_to_the_device(monkeypatch):
    sent, send = [], transforms._send
    monkeypatch.setattr(transforms, '_send', lambda *args: sent.append(args[0]) or send(*args))
    plan = torch.cat([every_operation(2), every_operation(2).flip(0)], 1)
    apply_policy(pictures('all', len(plan)), plan, FILL)
    assert len(sent) == 1 + 2 * 3  # the colour; for each row order, arguments, and the grid of its one filter


def test_plan_works_on_the_meta_device():
    plan = torch.cat([every_operation(2), every_operation(2).flip(0)], 1)
    images = torch.empty(len(plan), 3, H, W, dtype=torch.uint8, device='meta')
    found = DevicePreprocess(MEAN, STD).to('meta')(images, {'plan': plan})
    assert found.shape == images.shape
    assert found.dtype == torch.float32
