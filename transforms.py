"""From a decoded image to the input of a model: crops in the loader processes, the rest on the device.

Images are bytes, (3, H, W) uint8, or PIL images (CIFAR, FAKE). Random numbers are drawn as timm draws them, from the
same generators in the same order. What is left to the device is only drawn in the loader process: RandAugment or
AutoAugment becomes an *augmentation plan*, random erasing a table of rectangles. The device applies them to a whole
batch, all images with the same operation at once. The host knows the plan, so it never waits for the device.

Letters: B images of a batch, G images of a group, R rows of a plan, E rectangles of an image; H, W height and width.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ToNumpy
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomCrop, Resize, ToTensor
from torchvision.transforms.v2.functional import equalize

from readers import to_uint8

SMALL_SIZE = 32  # up to this input size images are not cropped from larger ones, as in the release for CIFAR
FILTERS = {0: 'nearest', 2: 'bilinear', 3: 'bicubic'}  # PIL's numbers
_TO_FLOAT = (ToTensor, PILToTensor, MaybeToTensor, ToNumpy)  # steps that end timm's work on PIL images


# Transforms of one image, in the loader processes ---------------------------------------------------------------------


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def seed_augmentation(seed: int) -> None:
    """Seeds the global generators that timm and torchvision use for augmentation."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class RandomResizedCrop:
    """timm's random crop with the same boxes, on bytes (3, H, W): torch resizes several times as fast as PIL."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: Tensor) -> Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        # In an image of a few pixels timm's box may be empty.
        top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
        height, width = max(height, 1), max(width, 1)
        mode = self.crop.interpolation
        mode = random.choice(mode) if isinstance(mode, tuple | list) else mode
        box = image[None, :, top : top + height, left : left + width]
        # This layout, which PIL has too, takes half the time.
        box = box.contiguous(memory_format=torch.channels_last)
        return F.interpolate(box, self.crop.size, mode=mode.value, antialias=True)[0]


def patch_posterize(steps: Iterable) -> None:
    """Lets the Posterize operations in timm's transforms keep 0 bits, in place.

    Policies with increasing strength ask for 0 bits. That gave black up to Pillow 12 and is an error from Pillow 13 on.
    """
    for step in steps:
        if not isinstance(step, AugmentOp):
            patch_posterize(step if isinstance(step, list) else getattr(step, 'ops', getattr(step, 'policy', [])))
        elif 'Posterize' in step.name:
            step.aug_fn = posterize_pil


def posterize_pil(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """PIL's posterize, for any number of bits: 0 gives black, 8 or more change nothing."""
    if bits == 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


@dataclass(frozen=True)
class TrainTransform:
    """Image → (bytes (3, H, W), augmentation parameters for `DevicePreprocess`)."""

    steps: Callable[..., Tensor]  # PIL image or bytes → bytes
    policy: 'PolicySampler | None' = None  # draws the augmentation plan, `plan`
    erasing: RandomErasing | None = None  # timm's, from which the rectangles `erase` are drawn

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.steps(image)
        aug_params = {}
        if self.policy is not None:
            aug_params['plan'] = self.policy()
        if self.erasing is not None:
            aug_params['erase'] = draw_erasures(self.erasing, *pixels.shape[1:])
        return pixels, aug_params


def build_train_transform(
    input_size: int,
    color_jitter: float,
    auto_augment: str | None,
    interpolation: str,
    reprob: float,
    recount: int,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    on_device: bool = False,
) -> TrainTransform:
    """DeiT's training augmentation by timm. `DevicePreprocess` normalises and erases.

    Args:
        input_size: height and width in pixels. Up to 32 a random crop with padding 4 replaces the resized crop, and
            an image of another size is first resized so that its shorter side fits.
        color_jitter: strength; used only without auto-augmentation.
        auto_augment: timm's policy string; None: no auto-augmentation.
        interpolation: 'random', 'bilinear' or 'bicubic'.
        reprob, recount: probability of random erasing, number of rectangles.
        mean: of each channel, in 0 … 1; the colour of areas that geometric operations uncover.
        on_device: leave auto-augmentation to the device, too.

    Raises:
        ValueError: `on_device` does not support this policy.
    """
    steps = create_transform(
        input_size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=interpolation,
        re_prob=reprob,
        re_count=recount,
        mean=tuple(mean),
    ).transforms
    crop, flip, *colours = steps[: next(i for i, step in enumerate(steps) if isinstance(step, _TO_FLOAT))]
    if input_size > SMALL_SIZE:
        crop = RandomResizedCrop(crop)
    else:
        # An image whose shorter side has this size stays as it is.
        crop = Compose([Resize(input_size, InterpolationMode.BICUBIC), RandomCrop(input_size, padding=4)])
    patch_posterize(colours)
    policy = None
    if on_device:
        if len(colours) != 1:
            raise ValueError('only a single policy can be applied to a batch')
        policy, colours = PolicySampler(*colours), []
    if colours:
        colours = [_to_pil, *colours, to_uint8]
    erasing = steps[-1] if isinstance(steps[-1], RandomErasing) else None
    return TrainTransform(Compose([to_uint8, crop, flip, *colours]), policy, erasing)


def build_eval_transform(input_size: int) -> Callable[[Image.Image | Tensor], Tensor]:
    """PIL image or bytes → bytes: PIL resizes the shorter side to 256/224 of the input size, the centre is cropped.

    Up to 32 pixels the shorter side is resized to the input size, so an image of exactly that size stays as it is.
    """
    side = input_size if input_size <= SMALL_SIZE else int(256 / 224 * input_size)
    resize_by_pil = Resize(side, InterpolationMode.BICUBIC)
    return Compose([to_uint8, _to_pil, resize_by_pil, CenterCrop(input_size), to_uint8])


# What the device is to do, drawn in the loader processes --------------------------------------------------------------


class PolicySampler:
    """Draws what a policy of timm would do to the next image.

    timm's own code draws, on a copy of its RandAugment or AutoAugment with operations that only record their arguments.

    Attributes:
        rows: R, the largest number of operations on an image.
        fill: red, green, blue in 0 … 255, the colour of areas that geometric operations uncover.

    Raises:
        ValueError: the policy, one of its operations or its filter is not implemented for batches.
    """

    def __init__(self, policy: object) -> None:
        policy = copy.deepcopy(policy)  # the original must not change
        if isinstance(policy, RandAugment):
            sequences, self.rows = [policy.ops], policy.num_layers
        elif isinstance(policy, AutoAugment):
            sequences, self.rows = policy.policy, max(map(len, policy.policy))
        else:
            raise ValueError(f'{type(policy).__name__} cannot be applied to a batch')
        self._policy = policy
        self._recorded: list[tuple[float, float, float]] = []
        for op in chain(*sequences):
            # By name, since the function may have been replaced. The endings choose how strength becomes an argument.
            name = op.name.removesuffix('Increasing').removesuffix('Original')
            if name not in OPERATIONS:
                raise ValueError(f'{op.name} cannot be applied to a batch')
            resample = op.kwargs['resample']
            filters = set(resample) if isinstance(resample, list | tuple) else {resample}
            if name in _MATRICES and not filters <= FILTERS.keys():
                raise ValueError(f'{op.name} with filters {filters} cannot be applied to a batch')
            self.fill = tuple(op.kwargs['fillcolor'])
            op.aug_fn = partial(self._record, name)

    def __call__(self) -> Tensor:
        """(R, 3) float32: index in OPERATIONS, argument, PIL's number of the filter (0 if the operation has none)."""
        self._recorded = []
        self._policy(None)
        unused = self.rows - len(self._recorded)
        return torch.tensor(self._recorded + [(0, 0, 0)] * unused, dtype=torch.float32).view(self.rows, 3)

    def _record(self, name: str, image: None, argument: float = 0, *, resample: Any, **_: object) -> None:
        moves = name in _MATRICES
        if moves and isinstance(resample, list | tuple):
            resample = random.choice(resample)  # timm draws it inside the operation, only where pixels move
        self._recorded.append((OPERATIONS.index(name), argument, int(resample) if moves else 0))


class _RecordingImage:
    """Replaces an image (3, H, W) in timm's RandomErasing and records the rectangles that are written."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self._size = (3, height, width)
        self.rectangles: list[list[int]] = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        self.rectangles.append([rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start])


def draw_erasures(erasing: RandomErasing, height: int, width: int) -> Tensor:
    """Draws what timm would erase in the next image, of H×W pixels, without the values it would fill in.

    Returns (E, 4) int64: top, left, height and width; rows of 0 for nothing.
    """
    image, erasing = _RecordingImage(height, width), copy.copy(erasing)
    erasing.per_pixel = erasing.rand_color = False
    erasing.device = 'cpu'
    erasing(image)
    missing = erasing.max_count - len(image.rectangles)
    return torch.tensor(image.rectangles + [[0] * 4] * missing, dtype=torch.int64)


# What the device does to a batch --------------------------------------------------------------------------------------


def apply_policy(images: Tensor, plan: Tensor, fill: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) uint8 → the same after an augmentation plan. Does not wait for the device.

    Colours are PIL's to within 1 of 255. Bilinear sampling differs from PIL's by rounding. Bicubic sampling is
    torch's; its kernel (a = −0.75) is a little softer than PIL's (a = −1).

    Args:
        images: uint8; are not changed.
        plan: (B, R, 3) on the CPU, from `PolicySampler`.
        fill: red, green, blue in 0 … 255, the colour of areas that are uncovered.
    """
    device = images.device
    colour = _send(torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1), device)
    for row in plan.unbind(1):
        # Geometric operations with the same filter differ only in their matrices, so they form one group.
        names = ['move' if op > len(COLOUR_OPERATIONS) else OPERATIONS[int(op)] for op in row[:, 0].tolist()]
        kinds = list(zip(names, row[:, 2].tolist(), strict=True))
        order = torch.tensor(sorted(range(len(kinds)), key=kinds.__getitem__))
        sizes = Counter(kinds[i] for i in order.tolist())
        # One copy for all groups: a copy costs the host more than a small kernel does.
        there, back = _send(torch.stack([order, order.argsort()]), device).unbind()
        arguments = _send(row[order, 1].view(-1, 1, 1, 1), device)
        parts = (x.split([*sizes.values()]) for x in (images.index_select(0, there), arguments, row[order]))
        done = []
        for (name, _), group, argument, rows in zip(sizes, *parts, strict=True):
            if name == 'move':
                group = _move(group, rows.tolist(), colour)
            elif name:
                group = COLOUR_OPERATIONS[name](group, argument)
            done.append(group)
        images = torch.cat(done).index_select(0, back)
    return images


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself if it is there already."""
    # Only a copy from pinned memory is sure not to wait for the device.
    pinned = device.type == 'cuda' and not tensor.is_cuda
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


# Colour operations: (G, 3, H, W) uint8 and an argument for each image, (G, 1, 1, 1) float32 → uint8.


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low).float().mul_(255).div_(high - low)
    return torch.where(high > low, stretched, images).to(torch.uint8)  # a constant channel stays as it is


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """`other` at factor 0, `images` at factor 1, extrapolated beyond. Truncates fractions as PIL does."""
    return images.sub(other).mul_(factor).add_(other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(G, 1, H, W) float32, whole numbers: PIL's luma. float32 holds its sums, scaled by 2¹⁶, exactly."""
    red, green, blue = images.float().split(1, dim=1)
    return red.mul(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).div_(65536).floor_()


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # In integers: float32 sums would be rounded from 257² pixels on.
    total, pixels = _grey(images).int().sum((2, 3), keepdim=True), images[0, 0].numel()
    return _blend(images, ((2 * total + pixels) // (2 * pixels)).float(), factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    # PIL blends with the mean of 3 × 3 pixels, with weight 5 for the middle one. The border does not change.
    wide = images.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = total.float().add_(6.5).div_(13).floor_()
    return _blend(images, smooth, factor)


COLOUR_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'AutoContrast': _autocontrast,
    'Equalize': lambda images, _: equalize(images),
    'Invert': lambda images, _: ~images,
    'Posterize': lambda images, bits: images & (256 - (1 << (8 - bits).clamp(0, 8).int())).to(torch.uint8),
    'Solarize': lambda images, threshold: torch.where(images < threshold, images, ~images),
    # timm adds at most 128: no overflow.
    'SolarizeAdd': lambda images, addend: torch.where(images < 128, images + addend.to(torch.uint8), images),
    'Color': lambda images, factor: _blend(images, _grey(images), factor),
    'Contrast': _contrast,
    'Brightness': lambda images, factor: _blend(images, 0.0, factor),
    'Sharpness': _sharpness,
}


# Geometric operations: argument, width and height → PIL's (a, b, c, d, e, f). The output pixel with its centre at
# (x, y) shows the input at (ax + by + c, dx + ey + f), in pixels from the upper left corner.


def _rotate(degrees: float, width: int, height: int) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


_MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    'Rotate': _rotate,
    'ShearX': lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    'ShearY': lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    'TranslateX': lambda pixels, width, height: (1, 0, pixels, 0, 1, 0),
    'TranslateY': lambda pixels, width, height: (1, 0, 0, 0, 1, pixels),
    'TranslateXRel': lambda share, width, height: (1, 0, share * width, 0, 1, 0),
    'TranslateYRel': lambda share, width, height: (1, 0, 0, 0, 1, share * height),
}

OPERATIONS = ('', *COLOUR_OPERATIONS, *_MATRICES)  # a plan holds their indices; 0 does nothing


def _move(images: Tensor, rows: Sequence[Sequence[float]], fill: Tensor) -> Tensor:
    """Applies geometric operations with the same filter: images (G, 3, H, W), and G rows of a plan on the host."""
    height, width = images.shape[2:]
    parameters = [_MATRICES[OPERATIONS[int(op)]](argument, width, height) for op, argument, _ in rows]
    # grid_sample counts from −1 to 1 across an image.
    scale = 2 / torch.tensor([[width], [height]], dtype=torch.float64)
    x, y, shift = (torch.tensor(parameters, dtype=torch.float64).view(-1, 1, 2, 3) * scale).unbind(3)
    columns = x * (torch.arange(width) + 0.5)[:, None]
    lines = y * (torch.arange(height) + 0.5)[:, None] + shift - 1
    # The device only adds the parts of columns (G, W, 2) and lines (G, H, 2): TF32 would round products.
    lines, columns = _send(torch.cat([lines, columns], 1).float(), images.device).split([height, width], 1)
    grid = lines[:, :, None] + columns[:, None]
    # For PIL the left edge is inside, the right one is not. The tolerance keeps rounding from deciding.
    inside = ((grid >= -1 - 1e-6) & (grid < 1 - 1e-6)).all(-1)[:, None]
    moved = F.grid_sample(images.float(), grid, FILTERS[int(rows[0][2])], 'border', align_corners=False)
    # PIL truncates. The hundredth keeps whole numbers whole where float32 is slightly below them.
    moved = moved.add_(0.01).clamp_(0, 255).to(torch.uint8)
    return torch.where(inside, moved, fill)


def erase(images: Tensor, rectangles: Tensor, keys: Tensor, mode: str) -> None:
    """Fills rectangles of normalised images, in place. The noise in an image depends only on its key.

    Args:
        images: (B, 3, H, W), floating point.
        rectangles: (B, E, 4) on the CPU, from `draw_erasures`.
        keys: (B,) int64 on the CPU.
        mode: fill mode: 'pixel' for noise, 'rand' for one random colour, 'const' for 0.
    """
    generator = torch.Generator(images.device)
    for image, key, places in zip(images, keys.tolist(), rectangles.tolist(), strict=True):
        generator.manual_seed(key)
        for top, left, height, width in places:
            area = image[:, top : top + height, left : left + width]
            if mode == 'const':
                area.zero_()
            elif area.numel():
                size = {'pixel': area.shape, 'rand': (3, 1, 1)}[mode]
                area.copy_(torch.randn(size, generator=generator, device=images.device))


def erase_batch(images: Tensor, rectangles: Tensor, keys: Tensor, mode: str) -> Tensor:
    """Like `erase`, for a whole batch at once and with other noise: a function of key, channel, row and column alone.

    All tensors are on one device, and no operation waits for it. Compiled it is one kernel, see `compiled_erase_batch`.
    Where rectangles overlap, the colour of the last one counts; noise is the same in both.

    Args:
        images: (B, 3, H, W), floating point; are not changed.
        rectangles: (B, E, 4), from `draw_erasures`.
        keys: (B,) int64.
        mode: fill mode, as in `erase`.
    """
    C, H, W = images.shape[1:]
    channels, rows, columns = (torch.arange(size, device=images.device) for size in (C, H, W))
    channels, rows, keys = channels.view(C, 1, 1), rows.view(H, 1), keys.view(-1, 1, 1, 1)
    fill = _normal_noise(keys, (channels * H + rows) * W + columns).to(images.dtype) if mode == 'pixel' else 0.0
    for number, rectangle in enumerate(rectangles.view(*rectangles.shape, 1, 1, 1).unbind(1)):
        top, left, height, width = rectangle.unbind(1)  # (B, 1, 1, 1) each
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        if mode == 'rand':
            fill = _normal_noise(keys, number * C + channels).to(images.dtype)
        images = torch.where(inside, fill, images)
    return images


def _normal_noise(keys: Tensor, places: Tensor) -> Tensor:
    """A standard normal number, float32, for each key and place, int64 both: a function of these two alone."""
    # SplitMix64: state number `key` plus the place, and its output function. Products of int64 wrap around on every
    # device; uint64 has no products in torch. The masks clear the copies of the sign that a shift brings in.
    z = keys * -0x61C8864680B583EB + places
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    z = z ^ (z >> 31 & (1 << 33) - 1)
    # Box and Muller's transform of 24 bits for the radius, in (0, 1], and 24 bits for the angle.
    radius = (-2 * ((z >> 40 & 0xFFFFFF) + 1).float().mul(2**-24).log()).sqrt()
    return radius * (z & 0xFFFFFF).float().mul(2 * math.pi * 2**-24).cos()


@cache
def compiled_erase_batch() -> Callable[[Tensor, Tensor, Tensor, str], Tensor]:
    """`erase_batch` in one kernel. Each shape and mode is compiled at its first call."""
    return torch.compile(erase_batch, fullgraph=True, dynamic=False)


class DevicePreprocess(nn.Module):
    """uint8 images → input of a model: applies the plan, normalises, erases. Does not wait for the device.

    Args:
        mean: of each channel, values in 0 … 1, subtracted.
        std: of each channel, divided by.
        mode: fill mode of `erase`.
        fill: red, green, blue in 0 … 255, the colour of areas that the plan uncovers.
        fused_erasing: erase by `erase_batch`, on a GPU compiled.
    """

    white: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        mode: str = 'pixel',
        fill: Sequence[int] = (128, 128, 128),
        fused_erasing: bool = False,
    ) -> None:
        super().__init__()
        self.mode, self.fill, self.fused_erasing = mode, fill, fused_erasing
        # As a tensor: CUDA would multiply by the inverse of a Python number, with other bits.
        self.register_buffer('white', torch.tensor(255.0), persistent=False)
        self.register_buffer('mean', torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, aug_params: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """Images (B, 3, H, W) uint8 → float32. Any other dtype is a TypeError.

        `aug_params` are on the CPU, from `TrainTransform`: `plan` (B, R, 3); `erase` (B, E, 4) with `key` (B,). With
        `fused_erasing`, `erase` and `key` may be on the device; if they are, and without `plan`, a CUDA graph can
        capture this call.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f'images must be uint8, but are {images.dtype}; are they normalised already?')
        if 'plan' in aug_params:
            images = apply_policy(images, aug_params['plan'], self.fill)
        # The steps of ToTensor and Normalize, to the bit.
        images = images.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)
        if 'erase' not in aug_params:
            return images
        rectangles, keys = aug_params['erase'], aug_params['key']
        if not self.fused_erasing:
            erase(images, rectangles, keys, self.mode)
            return images
        call = compiled_erase_batch() if images.is_cuda else erase_batch
        return call(images, _send(rectangles, images.device), _send(keys, images.device), self.mode)
