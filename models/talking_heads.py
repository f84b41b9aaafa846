"""CaiT's talking heads for a frozen model: the same function, with the heads mixed by one matrix product.

Letters: B images, N tokens, C channels, H heads.
"""

import torch
from timm.models.cait import TalkingHeadAttn
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
        q, k, v = self.qkv(x).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
        # Scaled before the product, as timm does it, or float16 would overflow earlier.
        scores = self.proj_l.weight @ (q * self.scale @ k.mT).flatten(2)
        # In bfloat16 too the kernel adds up in float32; autocast would write a map of twice the size, to no avail.
        with torch.autocast(x.device.type, enabled=False):
            attention = scores.view(B, H, N, N).softmax(dim=-1)
        attention = (self.proj_w.weight @ attention.flatten(2)).view(B, H, N, N)
        x = attention @ v + self.proj_w.bias.view(H, 1, 1) * v.sum(dim=2, keepdim=True)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def hasten(model: nn.Module) -> None:
    """Lets timm's talking heads of a frozen model run as `FrozenTalkingHeads`; parameters and names stay."""
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = FrozenTalkingHeads
