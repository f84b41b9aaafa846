"""Augmentation on the device: numbers drawn in the loader processes, applied to a whole batch of uint8 images.

A loader process draws what timm would have drawn, from the same generators in the same order, but touches no pixel:
RandAugment or AutoAugment becomes a *plan*, random erasing a table of rectangles. The device applies them row by row,
all images of one operation at once, and since the host knows the plan it never waits for the device.

Letters: B images of a batch, G images of a group, R rows of a plan, E rectangles of an image; H, W height and width.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from types import MappingProxyType

import torch
import torch.nn.functional as F
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms.v2.functional import equalize

FILTERS = {0: 'nearest', 2: 'bilinear', 3: 'bicubic'}  # PIL's numbers


# Drawing, in the loader processes -------------------------------------------------------------------------------------


class PolicySampler:
    """Draws what a policy of timm would do to the next image.

    timm's own code does the drawing, on a copy of the policy whose operations take notes instead of changing an image.

    Args:
        policy: timm's RandAugment or AutoAugment.

    Attributes:
        rows: R, the most operations an image can get.
        fill: red, green, blue in 0 … 255, the colour beyond the edges of an image that is moved.

    Raises:
        ValueError: there is no implementation for batches of the policy, of an operation of it, or of its filter.
    """

    def __init__(self, policy: object) -> None:
        if not isinstance(policy, RandAugment | AutoAugment):
            raise ValueError(f'{type(policy).__name__} cannot be applied to a batch')
        self._policy = copy.deepcopy(policy)  # the caller's stays what it is
        self._notes: list[tuple[float, float, float]] = []
        if isinstance(policy, RandAugment):
            sequences, self.rows = [self._policy.ops], policy.num_layers
        else:
            sequences, self.rows = self._policy.policy, max(map(len, policy.policy))
        for op in chain(*sequences):
            # By its name: its function may have been replaced. The endings tell how magnitudes become arguments.
            name = op.name.removesuffix('Increasing').removesuffix('Original')
            if name not in OPERATIONS:
                raise ValueError(f'{op.name} cannot be applied to a batch')
            resample = op.kwargs['resample']
            filters = set(resample) if isinstance(resample, list | tuple) else {resample}
            if name in _MATRICES and not filters <= FILTERS.keys():
                raise ValueError(f'{op.name} with filters {filters} cannot be applied to a batch')
            self.fill = tuple(op.kwargs['fillcolor'])
            op.aug_fn = partial(self._note, name)

    def __call__(self) -> Tensor:
        """(R, 3) float32: the operation's place in OPERATIONS, its argument, and PIL's number of the filter, else 0."""
        self._notes = []
        self._policy(None)
        unused = self.rows - len(self._notes)
        return torch.tensor(self._notes + [(0, 0, 0)] * unused, dtype=torch.float32).view(self.rows, 3)

    def _note(self, name: str, image: None, argument: float = 0, *, resample: object, **_) -> None:
        moves = name in _MATRICES
        if moves and isinstance(resample, list | tuple):
            resample = random.choice(resample)  # timm draws it within the operation, and only where pixels move
        self._notes.append((OPERATIONS.index(name), argument, int(resample) if moves else 0))


class _Blank:
    """Stands for an image (3, H, W) under timm's RandomErasing and remembers where it is written."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self._size = (3, height, width)
        self.rectangles: list[list[int]] = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], _: Tensor) -> None:
        _, rows, columns = place
        self.rectangles.append([rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start])


def draw_erasures(erasing: RandomErasing, height: int, width: int) -> Tensor:
    """(E, 4) int64: top, left, height and width of what timm would erase in the next image; rows of 0 for nothing.

    Args:
        erasing: timm's; its filling is not drawn.
        height: H, pixels.
        width: W, pixels.
    """
    blank, erasing = _Blank(height, width), copy.copy(erasing)
    erasing.per_pixel = erasing.rand_color = False
    erasing.device = 'cpu'
    erasing(blank)
    missing = erasing.max_count - len(blank.rectangles)
    return torch.tensor(blank.rectangles + [[0] * 4] * missing, dtype=torch.int64)


# Applying, on the device ----------------------------------------------------------------------------------------------


def apply_policy(images: Tensor, plan: Tensor, fill: Sequence[int]) -> Tensor:
    """Does to each image what was drawn for it. Does not wait for the device.

    Colours come out as PIL's to within 1 of 255. Bilinear sampling differs from PIL's by rounding; bicubic sampling is
    torch's, whose kernel (a = −0.75) is a little softer than PIL's (a = −1).

    Args:
        images: (B, 3, H, W) uint8; is not changed.
        plan: (B, R, 3) on the CPU, from `Recorder`.
        fill: red, green, blue in 0 … 255, where an image is moved away.

    Returns:
        (B, 3, H, W) uint8.
    """
    for row in plan.unbind(1):
        # All that move pixels, by one filter, differ in their matrices alone.
        names = ['move' if number > len(_COLOURS) else OPERATIONS[int(number)] for number in row[:, 0].tolist()]
        kinds = list(zip(names, row[:, 2].tolist(), strict=True))
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        sizes = Counter(kinds[i] for i in order)
        order = torch.tensor(order)
        groups = images.index_select(0, _send(order, images.device)).split([*sizes.values()])
        done = []
        for (name, _), group, notes in zip(sizes, groups, row[order].split([*sizes.values()]), strict=True):
            if name == 'move':
                group = _move(group, notes.tolist(), fill)
            elif name:
                group = _COLOURS[name](group, _send(notes[:, 1].view(-1, 1, 1, 1), images.device))
            done.append(group)
        images = torch.cat(done).index_select(0, _send(order.argsort(), images.device))
    return images


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory a copy is sure not to wait for what the device is doing.
    return (tensor.pin_memory() if device.type == 'cuda' else tensor).to(device, non_blocking=True)


# Colours: (G, 3, H, W) uint8 and an argument for each image, (G, 1, 1, 1) float32, to uint8.


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low).float().mul_(255).div_(high - low)
    return torch.where(high > low, stretched, images).to(torch.uint8)  # a channel of one value stays as it is


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = (8 - bits).clamp(0, 8).int()
    return images & (256 - (1 << dropped)).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, ~images)


def _solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    return torch.where(images < 128, images + addend.to(torch.uint8), images)  # timm adds up to 128: never above 255


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """From another image at factor 0 to this one at 1 and beyond, fractions cut off as PIL does."""
    return images.sub(other).mul_(factor).add_(other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(G, 1, H, W) float32, whole numbers: PIL's luma, whose sums of weights times 2¹⁶ float32 holds exactly."""
    red, green, blue = images.float().split(1, dim=1)
    return red.mul(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).div_(65536).floor_()


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # Summed up in integers: float32 would round from 257² pixels on.
    total, pixels = _grey(images).int().sum((2, 3), keepdim=True), images[0, 0].numel()
    return _blend(images, ((2 * total + pixels) // (2 * pixels)).float(), factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    # PIL's degenerate image: the mean of 3 × 3 pixels, the middle one counted five times; the border stays as it is.
    wide = images.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = total.float().add_(6.5).div_(13).floor_()
    return _blend(images, smooth, factor)


_COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'AutoContrast': _autocontrast,
    'Equalize': lambda images, _: equalize(images),
    'Invert': lambda images, _: ~images,
    'Posterize': _posterize,
    'Solarize': _solarize,
    'SolarizeAdd': _solarize_add,
    'Color': lambda images, factor: _blend(images, _grey(images), factor),
    'Contrast': _contrast,
    'Brightness': lambda images, factor: _blend(images, 0.0, factor),
    'Sharpness': _sharpness,
}


# Geometry: from the argument, width and height to PIL's (a, b, c, d, e, f): the pixel whose centre is at (x, y) shows
# what is at (ax + by + c, dx + ey + f) of the image, in pixels from its upper left corner.


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

OPERATIONS = ('', *_COLOURS, *_MATRICES)  # a plan's numbers; 0 does nothing


def _move(images: Tensor, notes: Sequence[Sequence[float]], fill: Sequence[int]) -> Tensor:
    """Samples images (G, 3, H, W) where their rows of the plan say, all by one filter; fills what lies outside."""
    height, width = images.shape[2:]
    matrices = torch.tensor(
        [_MATRICES[OPERATIONS[int(number)]](argument, width, height) for number, argument, _ in notes],
        dtype=torch.float64,
    )
    # grid_sample counts from −1 to 1 across an image.
    scale = 2 / torch.tensor([[width], [height]], dtype=torch.float64)
    x, y, shift = (matrices.view(-1, 1, 2, 3) * scale).unbind(3)
    columns = x * (torch.arange(width) + 0.5)[:, None]
    rows = y * (torch.arange(height) + 0.5)[:, None] + shift - 1
    # What column and row contribute, (G, W, 2) and (G, H, 2), is only added there: no product that TF32 would round.
    grid = _send(rows.float(), images.device)[:, :, None] + _send(columns.float(), images.device)[:, None]
    # To PIL the left edge is inside, the right one is not; rounding shall not decide.
    inside = ((grid >= -1 - 1e-6) & (grid < 1 - 1e-6)).all(-1)[:, None]
    moved = F.grid_sample(images.float(), grid, FILTERS[notes[0][2]], 'border', align_corners=False)
    # PIL cuts fractions off; the hundredth is for whole numbers that float32 misses from below.
    moved = moved.add_(0.01).clamp_(0, 255).to(torch.uint8)
    return torch.where(inside, moved, _send(torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1), images.device))


def erase(images: Tensor, rectangles: Tensor, keys: Tensor, mode: str) -> None:
    """Fills rectangles of normalised images, in place. An image's filling is a function of its key alone.

    Args:
        images: (B, 3, H, W), floating point.
        rectangles: (B, E, 4) on the CPU, from `draw_erasures`.
        keys: (B,) int64 on the CPU.
        mode: 'pixel' for noise, 'rand' for one random colour, 'const' for 0.
    """
    generator = torch.Generator(images.device)
    for image, key, places in zip(images, keys.tolist(), rectangles.tolist(), strict=True):
        generator.manual_seed(key)
        for top, left, height, width in places:
            if height and width:
                area = image[:, top : top + height, left : left + width]
                if mode == 'const':
                    area.zero_()
                else:
                    size = {'pixel': area.shape, 'rand': (3, 1, 1)}[mode]
                    area.copy_(torch.randn(size, generator=generator, device=images.device))


class DevicePreprocess(nn.Module):
    """Makes of uint8 images what a model takes: applies the plan, normalises, erases. Does not wait for the device.

    Args:
        mean: of each channel, values in 0 … 1, subtracted.
        std: standard deviation of each channel, divided by.
        mode: filling of what is erased: 'pixel', 'rand' or 'const'.
        fill: red, green, blue in 0 … 255, where the plan moves an image away.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], mode: str = 'pixel', fill: Sequence[int] = (128, 128, 128)
    ) -> None:
        super().__init__()
        self.mode, self.fill = mode, fill
        # CUDA would multiply by the inverse of a plain number, with other bits.
        self.register_buffer('white', torch.tensor(255.0), persistent=False)
        self.register_buffer('mean', torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, aug_params: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """(B, 3, H, W) float32.

        Args:
            images: (B, 3, H, W) uint8, on the device of this module.
            todo: on the CPU, as far as there is something to do: `plan` (B, R, 3); `erase` (B, E, 4) and `key` (B,).

        Raises:
            TypeError: the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f'images are {images.dtype}, not uint8; normalised already?')
        if 'plan' in aug_params:
            images = apply_policy(images, aug_params['plan'], self.fill)
        # The steps of ToTensor and Normalize, and so their bits.
        images = images.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)
        if 'erase' in aug_params:
            erase(images, aug_params['erase'], aug_params['key'], self.mode)
        return images
