"""CaiT's talking heads for a frozen model: the same function, with the heads mixed by one matrix product.

Letters: B images, N tokens, C channels, H heads.
"""

import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import Tensor, nn


class FrozenTalkingHeads(TalkingHeadAttn):
    """Talking-heads attention (Shazeer et al., 2020) in eval mode, equal to timm's up to rounding.

    timm moves the H heads of a map (B, H, N, N) to the end and back for either mixing; here it is an H×H by H×N²
    product. A constant added before the softmax changes nothing, so the first bias is left out; the second one is
    added behind the product with the values, to H·C numbers an image instead of H·N².
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) → (B, N, C)."""
        B, N, C = x.shape
        H = self.num_heads
        # All factors in one copy, or each product would make its own.
        q, k, v = self.qkv(x).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).contiguous()
        # Scaled inside the product: behind it float16 would overflow earlier.
        scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.scale)
        scores = self.proj_l.weight @ scores.view(B, H, N * N)
        # In bfloat16 too the kernel adds up in float32; autocast would write a map of twice the size, to no avail.
        with torch.autocast(x.device.type, enabled=False):
            attention = scores.view(B, H, N, N).softmax(dim=-1)
        attention = (self.proj_w.weight @ attention.flatten(2)).view(B, H, N, N)
        x = attention @ v + self.proj_w.bias.view(H, 1, 1) * v.sum(dim=2, keepdim=True)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def _rows(embedding: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
    """Forward hook: tokens (B, N, C) with their channels side by side."""
    return tokens.contiguous()


def use_fast_talking_heads(model: nn.Module) -> None:
    """Lets timm's talking heads of a frozen model run as `FrozenTalkingHeads`, CaiT's on tokens that lie row by row.

    Parameters and names stay.
    """
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = FrozenTalkingHeads
    # A convolution's tokens lie channel by channel, and CaiT adds to them, block after block, in the layout they have.
    if isinstance(model, Cait):
        model.patch_embed.register_forward_hook(_rows)
