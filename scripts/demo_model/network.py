"""The network, in torch: a small llama, written so that its tensors go into a GGUF as they are.

Rotary embeddings turn neighbouring pairs (llama.cpp's "norm" order), so that nothing need be
permuted on export.
Needs torch, which edgellm itself never imports.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """All widths are multiples of 32, so that weights and the KV cache can be stored as Q8_0."""

    vocabulary: int
    layers: int = 8
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    head: int = 32
    feed_forward: int = 512
    context: int = 512
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same, computed in float32."""
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.epsilon)


class Block(nn.Module):
    """Grouped-query attention and a gated feed-forward part, each on the normed residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head
        self.attn_norm = Norm(shape.width, shape.norm_epsilon)
        self.attn_q = nn.Linear(shape.width, shape.heads * shape.head, bias=False)
        self.attn_k = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_output = nn.Linear(shape.heads * shape.head, shape.width, bias=False)
        self.ffn_norm = Norm(shape.width, shape.norm_epsilon)
        self.ffn_gate = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.ffn_down = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, positions, width] to the same."""
        shape = self.shape
        rows, length, _ = x.shape
        normed = self.attn_norm(x)
        q = self.attn_q(normed).view(rows, length, shape.heads, shape.head).transpose(1, 2)
        k = self.attn_k(normed).view(rows, length, shape.kv_heads, shape.head).transpose(1, 2)
        v = self.attn_v(normed).view(rows, length, shape.kv_heads, shape.head).transpose(1, 2)
        mixed = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(rows, length, -1))
        normed = self.ffn_norm(x)
        gated = functional.silu(self.ffn_gate(normed)) * self.ffn_up(normed)
        out: Tensor = x + self.ffn_down(gated)
        return out


class Llama(nn.Module):
    """Embedding, blocks, norm, and the embedding again as the head (tied)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = Norm(shape.width, shape.norm_epsilon)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("attn_output.weight", "ffn_down.weight"))
                deviation = 0.02 * 2.0 if not last else 0.04 / (2 * shape.layers) ** 0.5
                nn.init.normal_(parameter, std=deviation)
        angle = torch.outer(
            torch.arange(shape.context).float(),
            shape.rope_base ** (-torch.arange(0, shape.head, 2).float() / shape.head),
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [rows, positions] to the normed hidden states [rows, positions, width]."""
        length = ids.shape[1]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, cos, sin)
        normed: Tensor = self.output_norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., vocabulary]."""
        return functional.linear(hidden, self.token_embd.weight)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [rows, heads, positions, head]; ``k`` and ``v`` have fewer heads.

    Written out: torch's fused kernel spends twice as long going back on rows as short as these.
    """
    rows, heads, length, head = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, head)  # the heads that share a key, one after another
    future = torch.full((length, length), -torch.inf).triu(1).repeat(heads // k.shape[1], 1)
    scores = (grouped @ k.transpose(-1, -2)).float() * head**-0.5 + future
    weights = scores.softmax(-1).to(v.dtype)
    mixed: Tensor = (weights @ v).view(rows, heads, length, head)
    return mixed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbours of [rows, heads, positions, head] by its position's angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
