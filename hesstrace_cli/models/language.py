"""Language models: indices of tokens (N, T) to logits of the tokens that follow, (N, T, C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesstrace_cli.models.small import activation_of


@runtime_checkable
class Carrying(Protocol):
    """A model that can go on where it ended, as a recurrent one does.

    `model(X)` begins with a state of zeros and gives the outputs, as any model does.
    `model(X, state=state)` begins with that, and gives a dict of `logits` and the new `state`.
    """

    def zero_state(self, num_examples: int) -> Tensor:
        """The state that a text begins with, floating point, shape (N, ...)."""
        ...

    def __call__(self, X: Tensor, *, state: Tensor) -> Any:
        """The outputs, and where it ended."""
        ...


class LSTM(nn.Module):
    """A word-level LSTM, of the shape and with the initial weights of PyTorch's own example.

    Called with the indices alone it begins with a state of zeros. Called with a state too, as
    `zero_state` or its own last output gives it, it goes on from there, and says where it ended.

    The layers are modules of their own, so that the dropout between them draws from PyTorch's
    generator on a GPU too, and a run goes on to the bit.

    Args:
        num_classes: The size of the vocabulary.
        width: Of the embedding and of every layer.
        layers: How many.
        dropout: Drop probability of the embedding and of each layer's output, in training mode.
        tied: Whether the decoder's weight is the embedding's.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(num_classes, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.decoder = nn.Linear(width, num_classes)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.embedding.weight

    def zero_state(self, num_examples: int) -> Tensor:
        """The state that a text begins with, shape (N, 2, layers, width)."""
        weight = self.embedding.weight
        shape = (num_examples, 2, len(self.layers), self.width)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def forward(self, X: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits (N, T, C) of indices (N, T); with a state `logits` and the new `state`."""
        hidden = self.dropout(self.embedding(X))
        ends = []
        for number, layer in enumerate(self.layers):
            begin = None
            if state is not None:
                h, c = state[:, :, number].to(hidden.dtype).unbind(1)
                begin = h[None].contiguous(), c[None].contiguous()
            hidden, (h, c) = layer(hidden, begin)
            hidden = self.dropout(hidden)
            ends.append(torch.stack([h[0], c[0]], 1))
        logits: Tensor = self.decoder(hidden)
        return logits if state is None else {"logits": logits, "state": torch.stack(ends, 2)}


class _Block(nn.Module):
    """Attention to what came before, and a perceptron, each behind a norm and beside a skip."""

    def __init__(self, width: int, heads: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.activation = activation_of(activation)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        N, T, width = hidden.shape
        parts = self.attend(self.norm1(hidden)).view(N, T, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = self.project(mixed.transpose(1, 2).reshape(N, T, width))
        hidden = hidden + self.dropout(mixed)
        wide = self.activation(self.widen(self.norm2(hidden)))
        output: Tensor = hidden + self.dropout(self.narrow(wide))
        return output


class GPT(nn.Module):
    """A small causal transformer, its norms in front (GPT-2's arrangement and initial weights).

    Args:
        num_classes: The size of the vocabulary.
        in_shape: (T,), the length of a window, which is the longest that it takes.
        width: Of the embedding.
        layers: Blocks of attention and perceptron.
        heads: Of attention; they divide the width.
        dropout: Drop probability of the embedding and of what each half of a block adds.
        activation: "gelu", "relu", "silu" or "tanh".
        tied: Whether the decoder's weight is the embedding's.
    """

    def __init__(
        self,
        num_classes: int,
        in_shape: Sequence[int],
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        activation: str = "gelu",
        tied: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads, which is {heads}")
        self.embedding = nn.Embedding(num_classes, width)
        self.positions = nn.Parameter(torch.empty(in_shape[0], width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(width, heads, dropout, activation) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, num_classes, bias=False)
        if tied:
            self.decoder.weight = self.embedding.weight
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """Normal weights of deviation .02; those that add to the skip smaller, as they add up."""
        nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                adds = name.endswith(("project", "narrow"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, X: Tensor) -> Tensor:
        """Logits (N, T, C) of indices (N, T)."""
        hidden = self.dropout(self.embedding(X) + self.positions[: X.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.decoder(self.norm(hidden))
        return logits
