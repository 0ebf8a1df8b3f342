"""The demo model in PyTorch: a small Llama, laid out the way GGUF's architecture `llama` expects it.

Rotary embeddings turn neighbouring pairs (0,1), (2,3), …, so the trained projections go into the file as they are.
Parameter names are GGUF's own (`blk.0.attn_q.weight` is `blk[0].attn_q.weight` here), so exporting needs no name map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """Sizes. Every width that a tensor-parallel run cuts is a multiple of 12 * 32: it splits over 2, 3 and 4 ranks."""

    n_vocab: int = 1920
    n_ctx: int = 512
    n_embd: int = 192
    n_block: int = 5
    n_head: int = 12
    head_dim: int = 32
    n_ff: int = 768
    rope_freq_base: float = 10000.0
    norm_eps: float = 1e-5


def rope_table(config: Config, n_ctx: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each of shape (n_ctx, head_dim / 2)."""
    pair = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    angle = torch.arange(n_ctx, dtype=torch.float32)[:, None] * config.rope_freq_base ** (-pair / config.head_dim)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis of x, shape (batch, head, time, head_dim)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class Block(nn.Module):
    """Attention and a gated feed-forward network, each behind an RMS norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_head * config.head_dim
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn_q = nn.Linear(config.n_embd, width, bias=False)
        self.attn_k = nn.Linear(config.n_embd, width, bias=False)
        self.attn_v = nn.Linear(config.n_embd, width, bias=False)
        self.attn_output = nn.Linear(width, config.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.ffn_gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.ffn_up = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.ffn_down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(batch, time, head * head_dim) as (batch, head, time, head_dim)."""
        return x.unflatten(-1, (self.config.n_head, self.config.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (self.heads(project(h)) for project in (self.attn_q, self.attn_k, self.attn_v))
        mixed = functional.scaled_dot_product_attention(rope(q, cos, sin), rope(k, cos, sin), v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).flatten(-2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """Token ids (batch, time) in, logits (batch, time, n_vocab) out; the head is the embedding matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_block))
        self.output_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        cos, sin = rope_table(config, config.n_ctx)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight is self.token_embd.weight:
                # Larger: what tells one name from another must not drown in what all names have in common.
                nn.init.normal_(weight, std=0.08)
            elif weight.ndim == 2:
                # The two projections that write to the residual stream start smaller, as in GPT-2.
                into_residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.04 / (2 * config.n_block) ** 0.5 if into_residual else 0.04)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blk:
            x = block(x, cos, sin)
        return functional.linear(self.output_norm(x), self.token_embd.weight)
