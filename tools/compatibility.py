"""Runs every student with every teacher and writes docs/compatibility.md.

    python -m tools.compatibility                 all STUDENTS and TEACHERS, about half an hour on two cores
    python -m tools.compatibility --only swin     models with this word in their names; the page is not written

Weights are random, the two images are noise, blocks are paired like `--s-id auto --t-id auto`, and tokens are aligned
like `--token-align pool`. Each model runs forward once, and its tokens serve for all pairs. A pair passes if all
relation terms are finite and their gradient reaches the student's first block. A model passes if a change at one place
of the image changes its tokens most at that place.
"""

import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import models
from losses import ManifoldDistillationLoss

IMAGES, K, SMALL = 2, 192, 128
PAGE = Path(__file__).parent.parent / 'docs' / 'compatibility.md'

STUDENTS = (
    'deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_tiny_patch16_224 deit3_small_patch16_224 '
    'eva02_tiny_patch14_224 xcit_nano_12_p16_224 cait_xxs24_224 convit_tiny pit_ti_224 '
    'tnt_s_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 focalnet_tiny_srf '
    'gcvit_xxtiny pvt_v2_b0 hiera_tiny_224 mvitv2_tiny nest_tiny '
    'levit_128s maxvit_pico_rw_256 coatnet_nano_rw_224 caformer_s18 mobilevit_xxs '
    'tiny_vit_5m_224 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 fastvit_t8 '
    'repvit_m0_9 swiftformer_xs convnext_atto mambaout_femto '
    'starnet_s1 mobilenetv3_small_100 mobilenetv4_conv_small ghostnet_100 efficientnet_b0 resnet18 '
    'regnetx_002 mixer_s32_224 sequencer2d_s nextvit_small visformer_tiny iformer_t densenet121'
).split()
TEACHERS = (
    'cait_s24_224 deit_small_patch16_224 deit_base_distilled_patch16_224 hiera_base_224 convnextv2_tiny '
    'deit3_base_patch16_224 '
    'vit_base_patch16_224 vit_small_patch16_384 vit_base_patch32_224 vit_small_patch14_dinov2 '
    'vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 convnext_tiny '
    'vit_base_patch16_siglip_224 vit_base_patch16_clip_224 '
    'eva02_small_patch14_224 beit_base_patch16_224 xcit_small_12_p8_224 '
    'samvit_base_patch16 flexivit_small swin_small_patch4_window7_224 swin_base_patch4_window12_384 '
    'swinv2_small_window8_256 focalnet_small_srf davit_small pvt_v2_b3 twins_pcpvt_base hiera_small_224 '
    'mvitv2_small nest_small volo_d1_224 crossvit_small_240 maxvit_tiny_rw_224 '
    'caformer_s36 tiny_vit_21m_224 inception_next_small mambaout_tiny '
    'resnet50 regnety_032 efficientnet_b4 vit_base_r26_s32_224 vitamin_small_224 naflexvit_base_patch16_siglip '
    'inception_v3'
).split()


@dataclass
class Side:
    """A model that has run: the tokens and description of each block, and the parameters of its first block."""

    name: str
    parameters: int
    size: int
    tokens: list[Tensor]
    blocks: list[models.Block]
    first: list[nn.Parameter]

    def select(self, ids: list[int]) -> list[tuple[Tensor, tuple[int, int]]]:
        return [(self.tokens[i], self.blocks[i].grid) for i in ids]


def run_model(name: str, student: bool) -> Side:
    """Runs the images, and once more with a change at one place to check the positions of the tokens."""
    torch.manual_seed(0)
    model, size = build(name)
    for key, parameter in model.named_parameters():
        # At timm's 1e-5, the outputs of all blocks would be equal.
        if 'gamma' in key or 'layer_scale' in key:
            nn.init.constant_(parameter, 0.5)
    blocks = models.list_blocks(model, size)
    tapped = models.tap(model.eval().requires_grad_(student), range(len(blocks)), size)
    images = torch.randn(IMAGES, 3, size, size)
    with torch.set_grad_enabled(student):
        tokens = tapped(images).tokens
    check_place(tapped, tokens, images)
    first = list(model.get_submodule(blocks[0].path).parameters()) if student else []
    return Side(name, sum(p.numel() for p in model.parameters()), size, list(tokens), blocks, first)


def build(name: str) -> tuple[nn.Module, int]:
    """The model and the size of its images: small ones, or its default size if it takes no other."""
    try:
        return models.build(name, None, SMALL), SMALL
    except ValueError:
        size = min(timm.get_pretrained_cfg(name).input_size[1], 384)
        return models.build(name, None, size), size


@torch.no_grad()
def check_place(tapped: models.TappedModel, tokens: tuple[Tensor, ...], images: Tensor) -> None:
    """Raises ValueError if a change near the right edge of the images shows elsewhere in the first block's tokens."""
    size = images.shape[-1]
    top, left = size // 8, 5 * size // 8
    changed = images.clone()
    changed[..., top : top + size // 8, left : left + size // 8] += 5
    difference = tapped(changed).tokens[0] - tokens[0]
    h, w = tapped.grids[0]
    row, column = divmod(int(difference.square().sum(dim=(0, 2)).argmax()), w)
    if max(abs((row + 0.5) / h - 3 / 16), abs((column + 0.5) / w - 11 / 16)) > 1 / 16 + 1 / h:
        raise ValueError(f'tokens are not at their place of the image: the change is at {row},{column} of {h}×{w}')


def run_pair(student: Side, teacher: Side) -> None:
    """Computes the loss and its gradient; raises ValueError if they are not as they should be."""
    ids = models.pair_ids(len(student.blocks), len(teacher.blocks))
    student_tokens, teacher_tokens = [], []
    for (s, s_grid), (t, t_grid) in zip(student.select(ids[0]), teacher.select(ids[1]), strict=True):
        s_target, t_target = models.common_grid(s_grid, t_grid, 'pool', K)
        student_tokens.append(models.resample(s, s_grid, s_target, 'pool'))
        teacher_tokens.append(models.resample(t, t_grid, t_target, 'pool'))
    logits = torch.zeros(IMAGES, 2, requires_grad=True)
    criterion = ManifoldDistillationLoss(nn.CrossEntropyLoss(), 'soft', alpha=0, w_full=1, K=K)
    generator = torch.Generator().manual_seed(0)
    found = criterion(
        (logits, logits, student_tokens), (None, None, teacher_tokens), torch.zeros(IMAGES, dtype=torch.long), generator
    )
    found.pop('base')
    if not all(torch.isfinite(value) for value in found.values()):
        raise ValueError('a term is not finite')
    total = torch.stack(list(found.values())).sum()
    gradients = torch.autograd.grad(total, student.first, retain_graph=True, allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    if not all(torch.isfinite(gradient).all() for gradient in used) or not any(map(torch.any, used)):
        raise ValueError('no gradient reaches the first block')


def run_all(names: list[str], student: bool, partners: list[Side], failed: dict[str, str]) -> list[Side]:
    """Runs models and returns those that pass. A student must pass with all `partners`, which are the teachers."""
    sides: list[Side] = []
    for name in names:
        try:
            side = run_model(name, student)
            wrong = {}
            for partner in partners:
                try:
                    run_pair(side, partner)
                except ValueError as error:
                    wrong[partner.name] = str(error)
            if wrong:
                raise ValueError(f'with {len(wrong)} of {len(partners)} teachers, {next(iter(wrong.items()))}')
        except ValueError as error:
            failed[name] = str(error)
            print(f'{name}: {error}', flush=True)
            continue
        if student:  # its graph is large and no longer needed
            side.tokens, side.first = [], []
        sides.append(side)
        print(f'{name}: {len(side.blocks)} blocks', flush=True)
    return sides


def table(sides: list[Side], failed: dict[str, str], names: list[str]) -> str:
    rows = ['| model | parameters | pixels | blocks | grids of patches | width |', '|---|---|---|---|---|---|']
    done = {side.name: side for side in sides}
    for name in names:
        if name not in done:
            rows.append(f'| `{name}` | | | | **fails:** {failed[name]} | |')
            continue
        side = done[name]
        grids = dict.fromkeys(models.format_grid(block.grid) for block in side.blocks)
        widths = [block.width for block in side.blocks]
        span = str(widths[0]) if len(set(widths)) == 1 else f'{min(widths)}–{max(widths)}'
        millions = f'{side.parameters / 1e6:.1f} M'
        rows.append(f'| `{name}` | {millions} | {side.size} | {len(side.blocks)} | {", ".join(grids)} | {span} |')
    return '\n'.join(rows)


def page(students: list[Side], teachers: list[Side], failed: dict[str, str], seconds: float) -> str:
    pairs = len(students) * len(teachers)
    versions = f'torch {torch.__version__.split("+")[0]}, timm {timm.__version__}, {platform.machine()}'
    return f"""# Compatible models

Written by `python -m tools.compatibility`, which runs each model with random weights on two images, with
`--s-id auto --t-id auto` and `--token-align pool`. Every student in the table was run with every teacher in the table,
**{len(students)} × {len(teachers)} = {pairs:,} pairs**: all relation terms are finite, and their gradient reaches the
student's first block. Each model's tokens are in the order of the image. How well a pair learns was not measured.

{versions}, {torch.get_num_threads()} threads, {seconds / 60:.0f} minutes.

## Students

{table(students, failed, STUDENTS)}

## Teachers

{table(teachers, failed, TEACHERS)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='run only models with this in their names; the page is not written')
    only = parser.parse_args().only
    if not any(only in name for name in STUDENTS + TEACHERS):
        parser.error(f'argument --only: no model has {only!r} in its name')
    start, failed = time.monotonic(), dict[str, str]()
    teachers = run_all([name for name in TEACHERS if only in name], False, [], failed)
    students = run_all([name for name in STUDENTS if only in name], True, teachers, failed)
    print(f'{len(students)} × {len(teachers)} pairs, {len(failed)} models fail, {time.monotonic() - start:.0f} s')
    if not only:
        PAGE.write_text(page(students, teachers, failed, time.monotonic() - start))


if __name__ == '__main__':
    main()
