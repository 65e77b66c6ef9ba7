"""Text as data for `--task tokens`, and two models of it: an LSTM and a small transformer.

    python examples/text.py TEXT_FOLDER words.npz
    hesstrace train --dataset words.npz --task tokens --model examples/text.py:lstm

TEXT_FOLDER holds `*train*` and `*test*` files of words, as WikiText-2 does.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def words_of(folder: Path, split: str) -> list[str]:
    """The words of a split, each end of a line one of them."""
    (file,) = folder.glob(f"*{split}*")
    return file.read_text(encoding="utf-8").replace("\n", " <eos> ").split()


def save(folder: Path, file: Path, *, vocabulary: int, length: int, windows: int) -> None:
    """Windows of words and of those that follow, the rare ones as one."""
    train, test = words_of(folder, "train"), words_of(folder, "test")
    common = Counter(train).most_common(vocabulary - 1)
    number = {word: i for i, (word, _) in enumerate(common, start=1)}  # 0 is every other word

    def cut(words: list[str], most: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([number.get(word, 0) for word in words[: most * length + 1]])
        n = (len(ids) - 1) // length
        return ids[: n * length].reshape(n, length), ids[1 : n * length + 1].reshape(n, length)

    (x, y), (x_test, y_test) = cut(train, windows), cut(test, max(1, windows // 10))
    np.savez(file, x_train=x, y_train=y, x_test=x_test, y_test=y_test)


class LSTM(nn.Module):
    """Word by word, with states that begin at 0 in every window."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.decoder = nn.Linear(width, num_classes)

    def forward(self, X: Tensor) -> Tensor:
        """Logits (N, T, C) of indices (N, T)."""
        return self.decoder(self.recurrent(self.embedding(X))[0])


class Transformer(nn.Module):
    """Causal, with the norms before attention and after it."""

    def __init__(self, num_classes: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.position = nn.Parameter(0.02 * torch.randn(256, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, num_classes)

    def forward(self, X: Tensor) -> Tensor:
        """Logits (N, T, C) of indices (N, T), T at most 256."""
        length = X.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=X.device)
        hidden = self.embedding(X) + self.position[:length]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask.to(hidden.dtype), is_causal=True)
        return self.decoder(self.norm(hidden))


def lstm(num_classes: int, width: int = 64) -> LSTM:
    """A factory for `--model`."""
    return LSTM(num_classes, width)


def transformer(num_classes: int, width: int = 64, layers: int = 2, heads: int = 4) -> Transformer:
    """A factory for `--model`."""
    return Transformer(num_classes, width, layers, heads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4000)
    args = parser.parse_args()
    save(args.folder, args.file, vocabulary=args.vocabulary, length=args.length,
         windows=args.windows)  # fmt: skip
