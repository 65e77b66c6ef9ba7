"""The shipped configs parse, and the list of settings is as it was agreed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hesstrace_cli.comparison import grid
from hesstrace_cli.config import CompareConfig, TrainConfig, TuneConfig, resolve, to_yaml
from hesstrace_cli.training.run import Run

CONFIGS = sorted((Path(__file__).parents[1] / "sample_configs").rglob("*.yaml"))


def is_comparison(file):
    names = "rivals" in (file.parent.name, file.stem.split("_")[-1])
    return names or file.name.startswith("compare")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_sample_configs_parse(file):
    tuned = TuneConfig if file.name.startswith("tune") else TrainConfig
    config_class = CompareConfig if is_comparison(file) else tuned
    resolve(config_class, {}, str(file))


def test_a_config_survives_its_yaml(tmp_path):
    config = resolve(TrainConfig, {"reg": ["trace=0.1"], "mean": "0.5", "std": "2"}, None)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve(TrainConfig, {}, str(tmp_path / "c.yaml")) == config


PAPER = [file for file in CONFIGS if file.parent.name == "paper"]


@pytest.mark.slow
@pytest.mark.parametrize("file", PAPER, ids=lambda f: f.name)
def test_paper_settings_train_for_a_step(file, tmp_path):
    """On made data, two images or windows of each split, every run of the config."""
    g = np.random.default_rng(0)
    classes = 100 if "cifar100" in file.name else 10
    arrays = {f"x_{part}": g.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
              for part in ("train", "test")}  # fmt: skip
    np.savez(tmp_path / "d.npz", y_train=[0, 1], y_test=[1, 0], **arrays)
    changes = {
        "dataset": str(tmp_path / "d.npz"), "num_classes": classes, "epochs": 1, "batch_size": 2,
        "out": str(tmp_path / "r"), "every": 1, "warmup": 0.0,
    }  # fmt: skip
    if "wikitext2" in file.name:
        for part in ("train", "valid", "test"):
            (tmp_path / f"{part}.txt").write_text("a b a c " * 10)
        changes |= {"dataset": f"text:{tmp_path}", "num_classes": None}
    if is_comparison(file):
        config = resolve(CompareConfig, {**changes, "seeds": [0]}, str(file))
        runs = [run.config for run in grid.plan(config)]
    else:
        runs = [resolve(TrainConfig, changes, str(file))]
    for config in runs:
        run = Run(config)
        assert [progress.step for progress in run.advance()] == [1]
