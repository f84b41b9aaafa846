"""The fused talking-heads attention on the CPU, by Triton's interpreter.

`TRITON_INTERPRET=1 python tests/interpret.py` checks the operator and prints relative errors against timm's attention
in float64, as JSON. It runs in float32: the interpreter's bfloat16 is wrong.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from timm.models.cait import TalkingHeadAttn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import talking_heads

# Heads, channels of a head, tokens. Blocks have 16 queries and keys; no number of tokens is a multiple of it.
SHAPES = [(4, 48, 19), (6, 48, 21), (8, 48, 17), (4, 64, 5), (2, 16, 1)]


def attention(heads: int, channels: int) -> TalkingHeadAttn:
    """timm's attention. With its initial mixings and biases, many errors would not show."""
    torch.manual_seed(heads)
    layer = TalkingHeadAttn(heads * channels, heads, qkv_bias=True).eval().requires_grad_(False)
    for parameter in (*layer.proj_l.parameters(), *layer.proj_w.parameters(), layer.qkv.bias):
        parameter.add_(torch.randn_like(parameter))
    return layer


def error(layer: TalkingHeadAttn, tokens: int, compiled: bool = False) -> float:
    """Of the fused attention in float32."""
    fused, x = copy.deepcopy(layer), torch.randn(2, tokens, layer.qkv.in_features)
    talking_heads.use_fast_talking_heads(fused, fused=True)
    run = torch.compile(fused, fullgraph=True, backend='aot_eager') if compiled else fused
    expected = layer.double()(x.double())
    return ((run(x) - expected).norm() / expected.norm()).item()


def main() -> None:
    talking_heads.fused_talking_heads_problem = lambda device: ''  # the interpreter needs no GPU
    assert 'models.talking_heads_kernel' not in sys.modules  # without triton it cannot be imported
    found = {f'{H} heads of {D}, {N} tokens': error(attention(H, D), N) for H, D, N in SHAPES}
    found['compiled'] = error(attention(4, 16), 9, compiled=True)
    kernel = sys.modules['models.talking_heads_kernel']
    kernel._SMALL = kernel._LARGE
    found['blocks of bfloat16'] = error(attention(4, 48), 35)
    arguments = (torch.randn(2, 5, 3 * 64), torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), 4)
    torch.library.opcheck(talking_heads.fused_talking_heads, arguments)
    print(json.dumps(found))


if __name__ == '__main__':
    main()
