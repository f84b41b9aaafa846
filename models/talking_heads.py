"""CaiT's talking-heads attention for a frozen model: the same function, with fewer copies of the attention maps.

Letters: B images, N tokens, C channels, H heads.
"""

import importlib.util

import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import Tensor, nn

# What the kernels of `FusedTalkingHeads` can do.
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_HEADS = (2, 4, 6, 8)
FUSED_CHANNELS = (16, 32, 48, 64)  # of a head
HAS_TRITON = importlib.util.find_spec('triton') is not None


class FrozenTalkingHeads(TalkingHeadAttn):
    """Talking-heads attention (Shazeer et al., 2020) in eval mode, equal to timm's up to rounding.

    To mix the heads, timm moves the H heads of a map (B, H, N, N) to the end and back, twice; here each mixing is the
    product of an H×H and an H×N² matrix. The first bias is left out, as a constant added before the softmax changes
    nothing. The second bias is added after the product with the values, to H·C numbers per image, not H·N².
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) → (B, N, C)."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values (B, N, 3C) → (B, N, C)."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        H = self.num_heads
        # One copy for all three, or each matrix product would make a copy of its own.
        q, k, v = qkv.view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).contiguous()
        # Scaled inside the product: scaled after it, float16 would overflow earlier.
        scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.scale)
        scores = self.proj_l.weight @ scores.view(B, H, N * N)
        # The softmax kernel sums in float32 for any input; autocast would also write a float32 map, twice as large.
        with torch.autocast(qkv.device.type, enabled=False):
            attention = scores.view(B, H, N, N).softmax(dim=-1)
        attention = (self.proj_w.weight @ attention.flatten(2)).view(B, H, N, N)
        x = attention @ v + self.proj_w.bias.view(H, 1, 1) * v.sum(dim=2, keepdim=True)
        return x.transpose(1, 2).reshape(B, N, C)


class FusedTalkingHeads(FrozenTalkingHeads):
    """The same in two Triton kernels that write no map (B, H, N, N). Where they cannot run: `FrozenTalkingHeads`."""

    def attend(self, qkv: Tensor) -> Tensor:
        if fused_talking_heads_problem(qkv.device) or qkv.dtype not in FUSED_DTYPES:
            return super().attend(qkv)
        return fused_talking_heads(qkv, self.proj_l.weight, self.proj_w.weight, self.proj_w.bias, self.num_heads)


@torch.compiler.assume_constant_result  # torch.compile does not trace it
def fused_talking_heads_problem(device: torch.device) -> str:
    """What the kernels of `FusedTalkingHeads` need and do not have on this device, '' if they can run."""
    if device.type != 'cuda' or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return 'needs an NVIDIA GPU of compute capability 8.0 or higher'
    return '' if HAS_TRITON else 'needs the package triton'


# An operator of its own, so that torch.compile does not look inside.
@torch.library.custom_op('manifold_distillation::fused_talking_heads', mutates_args=())
def fused_talking_heads(qkv: Tensor, mix_scores: Tensor, mix_maps: Tensor, bias: Tensor, heads: int) -> Tensor:
    """`talking_heads_kernel`, which has the arguments. It has no gradient."""
    from models.talking_heads_kernel import talking_heads_kernel  # needs triton, which is not installed everywhere

    return talking_heads_kernel(qkv, mix_scores, mix_maps, bias, heads)


@fused_talking_heads.register_fake
def _(qkv: Tensor, mix_scores: Tensor, mix_maps: Tensor, bias: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def uses_fused_talking_heads(model: nn.Module) -> bool:
    """Whether the attention of this model is `FusedTalkingHeads`."""
    return any(isinstance(module, FusedTalkingHeads) for module in model.modules())


def _talking_heads(model: nn.Module) -> list[TalkingHeadAttn]:
    return [module for module in model.modules() if type(module) is TalkingHeadAttn]


def unfusible_heads(model: nn.Module) -> str:
    """Why the attention of a model of timm cannot be `FusedTalkingHeads`, '' if it can."""
    layers = _talking_heads(model)
    for layer in layers:
        H, D = layer.num_heads, layer.qkv.in_features // layer.num_heads
        if H not in FUSED_HEADS or D not in FUSED_CHANNELS:
            return f'{H} heads of {D} channels; needs 2, 4, 6 or 8 heads of 16, 32, 48 or 64 channels'
    return '' if layers else 'the model has no talking-heads attention'


def _to_contiguous(embedding: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
    """Forward hook: the same tokens (B, N, C), contiguous in memory."""
    return tokens.contiguous()


def use_fast_talking_heads(model: nn.Module, fused: bool = False) -> None:
    """Replaces timm's talking-heads attention in a frozen model by `FrozenTalkingHeads`, or by `FusedTalkingHeads`.

    Parameters and their names do not change. CaiT's patch tokens become contiguous.

    Raises:
        ValueError: `fused` is True, and the model has no talking heads or its heads have another size.
    """
    if fused and (problem := unfusible_heads(model)):
        raise ValueError(problem)
    for layer in _talking_heads(model):
        layer.__class__ = FusedTalkingHeads if fused else FrozenTalkingHeads
    # The tokens of a convolution are strided, and every block of CaiT would keep their strides.
    if isinstance(model, Cait):
        model.patch_embed.register_forward_hook(_to_contiguous)
