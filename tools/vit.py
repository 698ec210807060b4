"""A small vision transformer, of PyTorch's own encoder layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ViT"]

INITIAL_STD = 0.02
PATCH = 4  # pixels a side


class ViT(nn.Module):
    """Class scores of images cut into patches: [N, channels, side, side] -> [N, classes] (Dosovitskiy et al., 2021).

    The mean of all tokens is classified, in place of a token of its own.
    """

    def __init__(
        self, classes: int = 10, channels: int = 3, side: int = 28, *, width: int = 64, heads: int = 4, layers: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, PATCH, PATCH)
        self.positions = nn.Parameter(torch.empty((side // PATCH) ** 2, width).normal_(std=INITIAL_STD))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # [N, patches, width]
        return self.head(self.encoder(tokens + self.positions).mean(1))
