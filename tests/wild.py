"""Small models in the manner of well-known code, with its habits: code that a capture meets outside of test suites.

``WILD`` has them by name. ``step(number)`` of each draws a batch and gives the loss of that step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 32
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16
    dropout: float = 0.1


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (each.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for each in (q, k, v))
        dropout = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd),
                "c_proj": nn.Linear(4 * config.n_embd, config.n_embd),
            }
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Asserts on sizes, optional targets, one weight for the embedding and the head, a loop that generates."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or GPTConfig()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([GPTBlock(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        _, t = idx.size()
        assert t <= self.config.block_size, f"cannot forward {t} tokens, block size is only {self.config.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx_cond = idx if idx.size(1) <= self.config.block_size else idx[:, -self.config.block_size :]
            logits, _ = self(idx_cond)
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < v[:, [-1]]] = -float("Inf")
            idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
        return idx

    def step(self, number):
        """The loss of a step, on texts of other lengths and, in every fourth step, without targets."""
        text = torch.randint(self.config.vocab_size, (4, 5 + number % 3))
        logits, loss = self(text[:, :-1], text[:, 1:].contiguous() if number % 4 else None)
        return logits.square().mean() if loss is None else loss


OPERATIONS = {
    "none": lambda channels: Zero(),
    "skip_connect": lambda channels: nn.Identity(),
    "avg_pool_3x3": lambda channels: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "conv_3x3": lambda channels: nn.Sequential(
        nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels, affine=False)
    ),
}


class Zero(nn.Module):
    def forward(self, x):
        return x.mul(0.0)


def drop_path(x, drop_prob):
    if drop_prob > 0.0:
        keep_prob = 1.0 - drop_prob
        mask = x.new_empty(x.size(0), 1, 1, 1).bernoulli_(keep_prob)
        x.div_(keep_prob)
        x.mul_(mask)
    return x


class MixedOp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self._ops = nn.ModuleList([make(channels) for make in OPERATIONS.values()])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class Cell(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = MixedOp(channels), MixedOp(channels)

    def forward(self, s0, s1, weights, drop_prob):
        h1, h2 = self.first(s0, weights[0]), self.second(s1, weights[1])
        if self.training and drop_prob > 0.0:
            h1, h2 = drop_path(h1, drop_prob), drop_path(h2, drop_prob)
        return h1 + h2


class DARTS(nn.Module):
    """An attribute that a schedule sets before each forward, bare parameters, a head that only training has."""

    def __init__(self):
        super().__init__()
        self.drop_path_prob = 0.0
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.cells = nn.ModuleList([Cell(4) for _ in range(2)])
        self.auxiliary_head = nn.Linear(4, 3)
        self.classifier = nn.Linear(4, 3)
        self.alphas = nn.Parameter(1e-3 * torch.randn(2, len(OPERATIONS)))

    def forward(self, x):
        logits_aux = None
        s0 = s1 = self.stem(x)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, F.softmax(self.alphas, dim=-1), self.drop_path_prob)
            if i == len(self.cells) // 2 - 1 and self.training:
                logits_aux = self.auxiliary_head(s1.mean((2, 3)))
        return self.classifier(s1.mean((2, 3))), logits_aux

    def step(self, number):
        self.drop_path_prob = 0.3 * (number // 5) / 4  # five steps are an epoch
        logits, logits_aux = self(torch.randn(4, 3, 6, 6))
        target = torch.arange(4) % 3
        return F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(logits_aux, target)


class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class FeatureLoss(nn.Module):
    """A loss on the output of a middle block, kept by a hook."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1, self.layer2 = BasicBlock(4), BasicBlock(4)
        self.fc = nn.Linear(4, 3)
        self.features = {}
        self.layer1.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.features["layer1"] = output

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))

    def step(self, number):
        loss = F.cross_entropy(self(torch.randn(4, 3, 6, 6)), torch.arange(4) % 3)
        return loss + 0.1 * self.features["layer1"].square().mean()


class VAE(nn.Module):
    """Methods that are called in place of forward, and noise of its own."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.fc3, self.fc4 = nn.Linear(3, 8), nn.Linear(8, 12)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 12))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    def step(self, number):
        x = torch.rand(4, 3, 4)
        recon_x, mu, logvar = self(x)
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return F.binary_cross_entropy(recon_x, x.view(-1, 12), reduction="sum") + kld


class Experts(nn.Module):
    """A loss that forward leaves on the module, a count that it keeps, and tokens that each expert picks."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(3)])
        self.register_buffer("load", torch.zeros(3))
        self.aux_loss, self.calls = None, 0

    def forward(self, x):
        self.calls += 1
        scores = self.gate(x).softmax(-1)
        weight, chosen = scores.max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            y[mine] += weight[mine].unsqueeze(-1) * expert(x[mine])
        counts = F.one_hot(chosen, 3).float().mean(0)
        self.load.mul_(0.9).add_(counts, alpha=0.1)
        self.aux_loss = 3 * (counts * scores.mean(0)).sum()
        return x + y

    def step(self, number):
        x = torch.randn(16, 6)
        return F.mse_loss(self(x), x.flip(-1)) + 0.1 * self.aux_loss


WILD = {kind.__name__: kind for kind in (NanoGPT, DARTS, FeatureLoss, VAE, Experts)}
