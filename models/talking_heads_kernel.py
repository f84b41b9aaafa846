"""Talking-heads attention as two Triton kernels that write no attention map. Imported only where they run.

Letters: B images, N tokens, C channels, H heads, D = C / H channels of a head, M queries and J keys of a block.
All powers are powers of 2. Tuples hold a tensor per head, or one per head and part of its channels: the sizes of a
block must be powers of 2, so 48 channels are a part of 32 and a part of 16.
"""

# mypy: disable-error-code=assignment
# (In a kernel, tuples become longer by +=.)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# An interpreter (TRITON_INTERPRET=1) runs no machine instructions.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _two_weights(place):
    """Two float32 numbers. A plain load in a loop would be copied to shared memory first, which is slower."""
    if _INTERPRETED:
        return tl.load(place), tl.load(place + 1)
    else:
        return tl.inline_asm_elementwise(
            'ld.global.nc.v2.f32 {$0, $1}, [$2];',
            '=f,=f,l',
            [place.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def _mix(maps, weights, row: tl.constexpr, H: tl.constexpr):
    """Row `row` of the product of the weights (H, H) and H maps. H is even."""
    for h in tl.static_range(0, H, 2):
        one, two = _two_weights(weights + row * H + h)
        if h == 0:
            total = maps[0] * one
        else:
            total += maps[h] * one
        total += maps[h + 1] * two
    return total


@triton.jit
def _parts(D: tl.constexpr):
    """The channels of a head, as one or two ranges of at most 32: larger products would leave their warp."""
    if D <= 32:
        return (tl.arange(0, D),)
    else:
        return tl.arange(0, 32), 32 + tl.arange(0, D - 32)


@triton.jit
def _log_sums(
    qkv, mix_scores, log_sums, N, scale, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithm of the sum of the softmax, (B, H, N). One program per image and block of queries."""
    C: tl.constexpr = H * D
    parts = _parts(D)
    image = tl.program_id(0) // tl.cdiv(N, M)
    rows = tl.program_id(0) % tl.cdiv(N, M) * M + tl.arange(0, M)
    row = tl.minimum(rows, N - 1)  # rows and keys behind the last one repeat it, so their numbers are finite
    qkv += image.to(tl.int64) * N * (3 * C)
    queries = ()
    top = ()
    total = ()
    for h in tl.static_range(H):
        top += (tl.full([M], float('-inf'), tl.float32),)
        total += (tl.zeros([M], tl.float32),)
        for p in tl.static_range(len(parts)):
            queries += (tl.load(qkv + h * D + row[:, None] * (3 * C) + parts[p][None, :]),)
    for start in tl.range(0, N, J, num_stages=STAGES):
        keys = start + tl.arange(0, J)
        key = tl.minimum(keys, N - 1) * (3 * C)
        counts = tl.where(keys < N, 1.0, 0.0)[None, :]
        scores = ()
        for h in tl.static_range(H):
            score = tl.zeros([M, J], tl.float32)
            for p in tl.static_range(len(parts)):
                part = tl.trans(tl.load(qkv + C + h * D + key[:, None] + parts[p][None, :]))
                score = tl.dot(queries[h * len(parts) + p], part, score, input_precision=PRECISION)
            scores += (score,)
        new_top = ()
        new_total = ()
        for h in tl.static_range(H):
            # `start >> 30` is 0, which no compiler knows: it would keep all weights in registers.
            score = _mix(scores, mix_scores + (start >> 30), h, H) * scale
            highest = tl.maximum(top[h], tl.max(score, 1))
            powers = tl.exp2(score - highest[:, None]) * counts
            new_total += (total[h] * tl.exp2(top[h] - highest) + tl.sum(powers, 1),)
            new_top += (highest,)
        top = new_top
        total = new_total
    for h in tl.static_range(H):
        tl.store(log_sums + (image * H + h) * N + rows, top[h] + tl.log2(total[h]), mask=rows < N)


@triton.jit
def _attention(
    qkv, mix_scores, mix_maps, log_sums, shift, out, N, scale, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    J: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The output (B, N, C). Maps are transposed (J, M), so that all that follows a score stays in one warp."""
    C: tl.constexpr = H * D
    parts = _parts(D)
    image = tl.program_id(0) // tl.cdiv(N, M)
    rows = tl.program_id(0) % tl.cdiv(N, M) * M + tl.arange(0, M)
    row = tl.minimum(rows, N - 1)
    qkv += image.to(tl.int64) * N * (3 * C)
    queries = ()
    logs = ()
    totals = ()
    for h in tl.static_range(H):
        logs += (tl.load(log_sums + (image * H + h) * N + row)[None, :],)
        for p in tl.static_range(len(parts)):
            queries += (tl.trans(tl.load(qkv + h * D + row[:, None] * (3 * C) + parts[p][None, :])),)
            totals += (tl.zeros([parts[p].shape[0], M], tl.float32),)
    for start in tl.range(0, N, J, num_stages=STAGES):
        keys = start + tl.arange(0, J)
        key = tl.minimum(keys, N - 1) * (3 * C)
        scores = ()
        for h in tl.static_range(H):
            score = tl.zeros([J, M], tl.float32)
            for p in tl.static_range(len(parts)):
                part = tl.load(qkv + C + h * D + key[:, None] + parts[p][None, :])
                score = tl.dot(part, queries[h * len(parts) + p], score, input_precision=PRECISION)
            scores += (score,)
        maps = ()
        for h in tl.static_range(H):
            maps += (tl.exp2(_mix(scores, mix_scores + (start >> 30), h, H) * scale - logs[h]),)
        new_totals = ()
        for h in tl.static_range(H):
            mixed = _mix(maps, mix_maps + (start >> 30), h, H).to(qkv.dtype.element_ty)
            for p in tl.static_range(len(parts)):
                places = qkv + 2 * C + h * D + key[None, :] + parts[p][:, None]
                values = tl.load(places, mask=(keys < N)[None, :], other=0.0)
                new_totals += (tl.dot(values, mixed, totals[h * len(parts) + p], input_precision=PRECISION),)
        totals = new_totals
    out += image.to(tl.int64) * N * C
    for h in tl.static_range(H):
        for p in tl.static_range(len(parts)):
            channels = h * D + parts[p]
            total = totals[h * len(parts) + p] + tl.load(shift + image * C + channels)[:, None]
            places = out + row[None, :] * C + channels[:, None]
            tl.store(places, total.to(out.dtype.element_ty), mask=(rows < N)[None, :])


# M, J, warps and stages of `_log_sums` and of `_attention`. They need at most 99 KiB of shared memory, which every GPU
# of compute capability 8.0 or higher has.
_LARGE = ((64, 32, 4, 2), (32, 32, 4, 2))
_SMALL = ((16, 16, 1, 1), (16, 16, 2, 1))


def talking_heads_kernel(qkv: Tensor, mix_scores: Tensor, mix_maps: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention with mixed heads, for queries, keys and values (B, N, 3C) as `TalkingHeadAttn.qkv` returns them.

    Args:
        mix_scores: weights (H, H) that mix the heads before the softmax.
        mix_maps, bias: weights (H, H) and bias (H,) that mix the heads after it.
        heads: H, an even number up to 8.

    Returns:
        Tokens (B, N, C), before the last projection.
    """
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // heads
    sums, attention = _SMALL if qkv.dtype == torch.float32 or D > 48 else _LARGE
    precision = 'tf32x3' if qkv.dtype == torch.float32 else 'tf32'  # tf32x3 is nearly as exact as float32
    scale = D**-0.5 * math.log2(math.e)
    qkv, mix_scores, mix_maps = qkv.contiguous(), mix_scores.float().contiguous(), mix_maps.float().contiguous()
    # The bias is added after the product with the values, as in FrozenTalkingHeads.
    shift = bias.float().repeat_interleave(D, output_size=C) * qkv[..., 2 * C :].sum(dim=1, dtype=torch.float32)
    log_sums = qkv.new_empty((B, heads, N), dtype=torch.float32)
    out = qkv.new_empty((B, N, C))
    with torch.cuda.device_of(qkv):
        for kernel, tensors, (M, J, warps, stages) in (
            (_log_sums, (qkv, mix_scores, log_sums), sums),
            (_attention, (qkv, mix_scores, mix_maps, log_sums, shift, out), attention),
        ):
            kernel[(B * triton.cdiv(N, M),)](*tensors, N, scale, heads, D, M, J, precision, stages, num_warps=warps)
    return out
