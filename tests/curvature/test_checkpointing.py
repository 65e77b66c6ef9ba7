"""Models that checkpoint their activations have the same derivatives as those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.checkpointing import plain_checkpoints
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit


class Checkpointed(nn.Module):
    """Normalized in a checkpointed part: its operations are replaced in the forward pass."""

    def __init__(self, norm, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.head = nn.Linear(8, 16), norm(16), nn.Linear(16, 3)
        self.reentrant = reentrant

    def forward(self, X):
        hidden = self.inner(X)
        if self.reentrant is None:
            return self.head(torch.tanh(self.norm(hidden)))
        normalized = checkpoint.checkpoint(self.norm, hidden, use_reentrant=self.reentrant)
        return self.head(torch.tanh(normalized))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["auto", "hutchinson", "dropout", "hutch++", "xtrace"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_every_method_takes_them(method, curvature, reentrant):
    X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = TensorSplit(X, torch.arange(20) % 3, Preprocess(), torch.float64)
    config = EstimateConfig(method=method, curvature=curvature, num_probes=6, max_passes=1)
    for norm in (nn.LayerNorm, nn.BatchNorm1d):
        expected, got = (
            estimate(Checkpointed(norm, how).double(), split, config).result.total
            for how in (None, reentrant)
        )
        assert got.value == pytest.approx(expected.value, rel=1e-9)


def test_torchs_own_checkpointing_is_back_afterwards():
    own = (checkpoint.CheckpointFunction, checkpoint._checkpoint_hook)
    with plain_checkpoints(), plain_checkpoints():
        assert checkpoint.CheckpointFunction is not own[0]
    assert (checkpoint.CheckpointFunction, checkpoint._checkpoint_hook) == own
