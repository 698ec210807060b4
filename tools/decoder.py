"""A small GPT-style decoder over bytes, written out in plain products, so that its inner activations are layers too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Decoder"]

INITIAL_STD = 0.02  # of every weight, as in GPT-2 (Radford et al., 2019, and its published code)


class Attention(nn.Module):
    """Causal self-attention: [N, T, width] -> [N, T, width]."""

    future: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.scale = 1 / math.sqrt(width // heads)
        self.register_buffer("future", torch.ones(context, context, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query * self.scale, key.transpose(-2, -1))  # [N, heads, T, T]
        length = x.size(1)
        weights = scores.masked_fill(self.future[:length, :length], -math.inf).softmax(-1)
        return self.project(torch.matmul(weights, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a GELU MLP, each behind a norm and beside a residual path ("pre-norm")."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Scores of each next token: int64 [N, T] -> [N, T, vocabulary], for T up to ``context``.

    The embedding of the tokens is also the output head's weight (Press and Wolf, 2017): one parameter, two readers.
    """

    def __init__(
        self, vocabulary: int = 256, context: int = 64, *, width: int = 128, heads: int = 4, layers: int = 3
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Layers that add to the residual path begin smaller: the path's variance does not grow with depth.
                added = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / (math.sqrt(2 * layers) if added else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.size(1), device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.positions(place))
        return self.head(self.norm(x))
