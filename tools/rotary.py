"""A small decoder over bytes in the manner of Llama: rotary positions, norms written by hand, a gated MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RotaryDecoder"]

INITIAL_STD = 0.02
SLOWEST = 10_000.0  # the base of the angles' geometric series (Su et al., 2021)


class Norm(nn.Module):
    """x / rms(x) * weight, over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotations(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles: two of [length, width]."""
    frequencies = SLOWEST ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosines + torch.cat((-right, left), -1) * sines


class Attention(nn.Module):
    """Causal self-attention: [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = rotated(query, cosines, sines), rotated(key, cosines, sines)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP (SwiGLU), each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = Norm(width), Attention(width, heads), Norm(width)
        inner = 8 * width // 3
        self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (width, inner), (inner, width))
        )

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cosines, sines)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class RotaryDecoder(nn.Module):
    """Scores of each next token: int64 [N, T] -> [N, T, vocabulary], for any T."""

    def __init__(
        self, vocabulary: int = 256, context: int = 64, *, width: int = 128, heads: int = 4, layers: int = 3
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)
        self.head_width = width // heads
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("project.weight", "down.weight"))  # to the residual path
                nn.init.normal_(parameter, std=INITIAL_STD / (math.sqrt(2 * layers) if added else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        turns = rotations(tokens.size(1), self.head_width, tokens.device)
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, *turns)
        return self.head(self.norm(x))
