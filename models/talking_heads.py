"""CaiT's talking-heads attention for a frozen model: the same function, with fewer copies of the attention maps.

Letters: B images, N tokens, C channels, H heads.
"""

import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import Tensor, nn


class FrozenTalkingHeads(TalkingHeadAttn):
    """Talking-heads attention (Shazeer et al., 2020) in eval mode, equal to timm's up to rounding.

    To mix the heads, timm moves the H heads of a map (B, H, N, N) to the end and back, twice; here each mixing is the
    product of an H×H and an H×N² matrix. The first bias is left out, as a constant added before the softmax changes
    nothing. The second bias is added after the product with the values, to H·C numbers per image, not H·N².
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) → (B, N, C)."""
        B, N, C = x.shape
        H = self.num_heads
        # One copy for all three, or each matrix product would make a copy of its own.
        q, k, v = self.qkv(x).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).contiguous()
        # Scaled inside the product: scaled after it, float16 would overflow earlier.
        scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.scale)
        scores = self.proj_l.weight @ scores.view(B, H, N * N)
        # The softmax kernel sums in float32 for any input; autocast would also write a float32 map, twice as large.
        with torch.autocast(x.device.type, enabled=False):
            attention = scores.view(B, H, N, N).softmax(dim=-1)
        attention = (self.proj_w.weight @ attention.flatten(2)).view(B, H, N, N)
        x = attention @ v + self.proj_w.bias.view(H, 1, 1) * v.sum(dim=2, keepdim=True)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def _to_contiguous(embedding: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
    """Forward hook: the same tokens (B, N, C), contiguous in memory."""
    return tokens.contiguous()


def use_fast_talking_heads(model: nn.Module) -> None:
    """Replaces timm's talking-heads attention in a frozen model by `FrozenTalkingHeads`.

    Parameters and their names do not change. CaiT's patch tokens become contiguous.
    """
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = FrozenTalkingHeads
    # The tokens of a convolution are strided, and every block of CaiT would keep their strides.
    if isinstance(model, Cait):
        model.patch_embed.register_forward_hook(_to_contiguous)
