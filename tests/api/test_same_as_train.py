"""A loop written by hand against `hesstrace train`, and several processes against one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hesstrace_cli import TracePenalty, differentiable, estimate_trace
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.models import build_model
from hesstrace_cli.randomness import derived_seed
from hesstrace_cli.training.trainer import Trainer
from tests.api.test_penalty import C, D, filled, normal
from tests.conftest import make_run
from tests.jobs import joined, run_job

SETTINGS = {
    "default": {},
    "no norm": {"model_arg": {"width": 4, "norm": "none"}},
    "by example": {"form": "example"},
    "H": {"curvature": "hessian", "model_arg": {"width": 4, "norm": "none"}},
    "H, group norm, two probes": {
        "curvature": "hessian", "num_probes": 2, "model_arg": {"width": 4, "norm": "group"}
    },
    "entries of half the examples": {"dropout_scheme": "entry", "penalty_examples": 0.5},
    "every other step": {"every": 2},
}  # fmt: skip
OWN = ("form", "curvature", "num_probes", "dropout_scheme", "penalty_examples", "every")


def loop(trainer: Trainer, settings) -> nn.Module:
    """What a user writes: model, optimizer, penalty and a loop over the same batches."""
    config = trainer.config
    model = build_model(
        config.model, num_classes=10, in_shape=(1, 8, 8), model_args=config.model_arg,
        seed=derived_seed(config.seed, "weights"),
    ).train()  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    penalty = TracePenalty(
        model, 0.01, generator=torch.Generator().manual_seed(config.seed),
        **{name: settings[name] for name in OWN if name in settings},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "order", 0))
    order = torch.randperm(len(trainer.data.train), generator=generator)
    for rows in order.split(config.batch_size):
        ((X, y),) = trainer.data.train.parts([rows])
        if "curvature" in settings or "penalty_examples" in settings:
            loss = penalty.loss(X, y)
        else:
            with differentiable():
                outputs = model(X)
            loss = F.cross_entropy(outputs, y) + penalty(outputs, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.step()
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loop_gives_the_weights_of_train_to_the_bit(name, tmp_path):
    settings = SETTINGS[name]
    run = make_run(
        tmp_path / "run", reg=["trace=0.01"], warmup=0.0, epochs=1, schedule="constant", seed=3,
        **settings,
    )  # fmt: skip
    own = loop(run.trainer, settings).state_dict()
    for _ in run.advance():
        pass
    for key, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(tensor, own[key]), key


# -- DistributedDataParallel

X, Y = normal(16, D, seed=4), torch.arange(16) % C
PARALLEL = {
    "batch": {"form": "batch"},
    "example": {"form": "example"},
    "entries, two probes": {"form": "batch", "dropout_scheme": "entry", "num_probes": 2},
    "H": {"curvature": "hessian"},
}  # fmt: skip


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, C)

    def forward(self, X):
        return self.last(torch.tanh(self.norm(self.first(X))))


def three_steps(model, rank, size, settings, parts=1):
    """The weights after three steps on every size-th example, and an estimate between them."""
    inner = model.module if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    penalty = TracePenalty(model, 0.3, **settings)
    for step in range(3):
        optimizer.zero_grad()
        for inputs, y in zip(X[rank::size].chunk(parts), Y[rank::size].chunk(parts), strict=True):
            if "curvature" in settings:
                loss = penalty.loss(inputs, y)
            else:
                with differentiable():
                    outputs = model(inputs)
                loss = F.cross_entropy(outputs, y) + penalty(outputs, y)
            (loss / parts).backward()
        optimizer.step()
        penalty.step()
        if step == 0:
            estimate_trace(inner, [(X, Y)])  # must not cut the hooks of DistributedDataParallel
    return {name: p.detach() for name, p in inner.named_parameters()}


def work(rank, ports):
    joined(rank, 2, ports)
    found = {}
    for name, settings in PARALLEL.items():
        for parts in (1, 2):
            if parts == 1 or name in ("example", "H"):  # others are unbiased, no more
                model = DistributedDataParallel(filled(Wide()))
                found[name, parts] = three_steps(model, rank, 2, settings, parts)
    sharded = fully_shard(filled(Wide()), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ConfigError, match="FSDP"):
        TracePenalty(sharded, 0.3)
    with pytest.raises(ConfigError, match="static_graph"):
        TracePenalty(DistributedDataParallel(filled(Wide()), static_graph=True), 0.3)
    return found


def test_two_processes_give_the_weights_of_one(tmp_path):
    first, second = run_job(2, work, tmp_path)
    for (name, parts), weights in first.items():
        alone = three_steps(filled(Wide()), 0, 1, PARALLEL[name])
        for key, tensor in alone.items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-9, atol=1e-12)
            assert torch.equal(weights[key], second[name, parts][key])
