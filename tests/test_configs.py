"""The shipped configs parse, and the list of settings is as it was agreed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hesstrace_cli.config import CompareConfig, TrainConfig, resolve, to_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "sample_configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_sample_configs_parse(file):
    config_class = CompareConfig if file.name.startswith("compare") else TrainConfig
    resolve(config_class, {}, str(file))


def test_a_config_survives_its_yaml(tmp_path):
    config = resolve(TrainConfig, {"reg": ["trace=0.1"], "mean": "0.5", "std": "2"}, None)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve(TrainConfig, {}, str(tmp_path / "c.yaml")) == config
