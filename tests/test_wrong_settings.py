"""Settings that are none: every field of every command, YAML, and names meant otherwise."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import get_type_hints

import pytest
import torch

from hesstrace_cli.config import (
    CompareConfig,
    EstimateConfig,
    SpectrumConfig,
    TrainConfig,
    VerifyConfig,
    key_of,
    likely,
    resolve,
    shortened,
)
from hesstrace_cli.config.regularizers import parse_regularizers
from hesstrace_cli.config.rows import parse_tune
from hesstrace_cli.config.yaml_text import load_yaml
from hesstrace_cli.data.sources import open_source
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.models import build_model
from hesstrace_cli.storage.runs import default_folder
from hesstrace_cli.storage.state import checked
from tests.conftest import TINY, assert_one_line_error, invoke

CONFIGS = (TrainConfig, CompareConfig, EstimateConfig, SpectrumConfig, VerifyConfig)
FIELDS = [(c, f.name) for c in CONFIGS for f in dataclasses.fields(c)]
JUNK = [
    None,
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "1" * 5000,
    "[",
    "{}",
    [],
    {},
    [[]],
    [None],
    [[1], 2],
    {"a": {"b": []}},
    {1: 2},
    {"a": "\0"},
    [True],
    True,
    -1,
    0,
    10**30,
    -(10**400),
    10**5000,
    2**63,
    1.5,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    "inf",
    "nan",
    "1e400",
    1e308,
    b"x",
    object(),
    (),
    {1, 2},
    torch.zeros(2),
    torch.tensor(math.nan),
    1j,
    ["a", 1],
    "a=b",
    "a=[",
    "a=!!bool x",
    "=",
    ",",
    "none,trace",
    "trace=1e400",
    "a,,a",
]
TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


def fits(hint, value):
    """Whether a value is of a field's type."""
    kind = str(getattr(hint, "__name__", hint))
    if "None" in str(hint) and value is None:
        return True
    if str(hint).startswith("dict"):
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if "list" in str(hint):
        kind = str(hint).partition("[")[2].partition("]")[0]
        return isinstance(value, list) and all(isinstance(v, TYPES[kind]) for v in value)
    return isinstance(value, TYPES[kind.removesuffix(" | None")])


@pytest.mark.parametrize(("config_class", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_setting_is_of_its_type_or_refused_in_a_line(config_class, name):
    hint = get_type_hints(config_class)[name]
    taken = 0
    for junk in JUNK:
        try:
            config = resolve(config_class, {name: junk}, None)
        except ConfigError:
            continue
        value = getattr(config, name)
        assert fits(hint, value), (junk, value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and number != math.inf:
                assert abs(number) <= (2**31 if isinstance(number, int) else 3e38)
            if isinstance(number, str):
                assert "\0" not in number
        taken += 1
    assert taken < len(JUNK) - 15


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_setting_of_a_checkpoint_is_of_its_type_or_refused(name):
    for junk in JUNK:
        config = {**dataclasses.asdict(TrainConfig()), name: junk}
        try:
            said = checked({"state_dict": {}, "config": config})["config"]
        except ModelError:
            continue
        assert fits(get_type_hints(TrainConfig)[name], said[name]), junk


REFUSED = {
    "alias bomb": "k0: &k0 [x, x, x, x, x]\n"
    + "".join(f"k{i + 1}: &k{i + 1} [{','.join([f'*k{i}'] * 10)}]\n" for i in range(8)),
    "bomb of mappings": "k0: &k0 {p: x}\n"
    + "".join(f"k{i + 1}: &k{i + 1} {{p: *k{i}, q: *k{i}}}\n" for i in range(20)),
    "itself": "&a [*a]",
    "itself in a mapping": "reg: &x {y: *x}",
    "deep": "[" * 3000 + "]" * 3000,
    "deep mappings": "{a: " * 200 + "1" + "}" * 200,
    "open": "[" * 20_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(400)),
    "large": "a: " + "x" * 2_000_000,
    "many": "[" + "1," * 20_000 + "]",
    "digits": "epochs: " + "9" * 5000,
    "hexadecimal": "epochs: 0x" + "f" * 5000,
    "python": "!!python/object/apply:os.getcwd []",
    "name": "model: !!python/name:os.system",
    "foreign tag": "epochs: !foo 1",
    "set": "reg: !!set {a, b}",
    "omap": "reg: !!omap [a: 1]",
    "pairs": "reg: !!pairs [a: 1]",
    "binary": "model: !!binary aGVsbG8=",
    "date": "epochs: !!timestamp 2020-01-01",
    "no bool": "nesterov: !!bool maybe",
    "no int": "epochs: !!int ''",
    "no number": "lr: !!float abc",
    "no null": "epochs: !!null x",
    "no map": "!!map [1]",
    "no seq": "reg: !!seq {a: 1}",
    "text of a list": "model: !!str [1]",
    "two documents": "a: 1\n---\na: 2\n",
    "twice": "epochs: 1\nepochs: 2\n",
    "merge of none": "<<: 5",
    "no key": "? [1]\n: 2\n",
    "unknown alias": "epochs: *x",
    "control": "epochs: \x07",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_yaml_that_does_more_than_hold_plain_values(text, tmp_path):
    begin = time.monotonic()
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is not YAML that can be used") as caught:
        resolve(TrainConfig, {}, str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        resolve(TrainConfig, {"model_arg": [f"a={text}"]}, None)
    assert time.monotonic() - begin < 20  # not the hours that writing a bomb out would take


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &x [0.5]\nb: *x", {"a": [0.5], "b": [0.5]}),
        ("1e-3", 1e-3),
        ("+2E5", 2e5),
        ("2020-01-01", "2020-01-01"),
        ("!!str 5", "5"),
        ("!!float 1", 1.0),
        ("!!int '5'", 5),
        ("~", None),
        ("yes", True),
        ("'[a]'", "[a]"),
        ("{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
        ("", None),
        ("x1e3", "x1e3"),
    ],
)
def test_plain_yaml_is_read(text, value):
    assert load_yaml(text) == value


def test_what_is_long_is_shortened():
    for value in ("x" * 9999, [["y" * 50] * 50] * 50, 10**9999, {i: "z" * 99 for i in range(999)}):
        assert len(shortened(value)) < 1200


MEANT = [
    ("learning-rate", "lr"),
    ("learning_rate", "lr"),
    ("eta", "lr"),
    ("wd", "weight-decay"),
    ("bs", "batch-size"),
    ("num-epochs", "epochs"),
    ("max_epochs", "epochs"),
    ("workers", "num-workers"),
    ("arch", "model"),
    ("output-dir", "out"),
    ("pretrained", "init"),
    ("tolerance", None),
    ("epohcs", "epochs"),
    ("lambda_reg", "lambda"),
    ("val-split", "val-fraction"),
    ("xyzzy", None),
    ("amp", "precision"),
]


@pytest.mark.parametrize(("given", "meant"), MEANT)
def test_names_of_other_programs(given, meant, tmp_path):
    assert likely(given, [key_of(f.name) for f in dataclasses.fields(TrainConfig)]) == meant
    (tmp_path / "c.yaml").write_text(f"{given}: 1\n")
    hint = f"did you mean {meant!r}" if meant else "unknown key"
    assert_one_line_error(invoke("train", "--config", tmp_path / "c.yaml"), 2, given, hint)
    hint = f"did you mean '--{meant}'" if meant else "no option is called"
    assert_one_line_error(invoke("train", f"--{given}", "1"), 2, given, hint)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("trace:0.01", ["did you mean trace=0.01?"]),
        ("trace 0.01", ["trace=0.01?"]),
        ("cutout:8", ["cutout=8?"]),
        ("hessian:3", ["trace=3?"]),
        ("mixup(0.2)", ["mixup=0.2?"]),
        ("SAM", ["'sam'"]),
        ("label_smoothing", ["'label-smoothing'"]),
        ("tracee=1", ["trace=1?"]),
        ("none,trace", ["--reg none --reg trace"]),
        ("cutout=8,none", ["--reg cutout=8 --reg none"]),
        ("none=1", ["no strength"]),
        ("trace,", ["no regularizer"]),
        ("sam,nso", ["use one of them"]),
    ],
)
def test_regularizers_written_otherwise(entry, words):
    for config_class in (TrainConfig, CompareConfig):
        with pytest.raises(ConfigError) as caught:
            resolve(config_class, {"reg": [entry]}, None)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "tune", ["trace,sam=1:2", "trace=1=1:2", "trace=", "=1:2", "none=1:2", "trace=1:1", ",=1:2"]
)
def test_strengths_to_choose_from_that_are_none(tune):
    with pytest.raises(ConfigError):
        resolve(CompareConfig, {"reg": ["none", "trace"], "tune": [tune]}, None)


def test_the_default_of_compare_is_shown_as_it_is_typed():
    shown = " ".join(invoke("compare", "--help").stdout.split())
    assert "--reg none --reg trace" in shown
    default = CompareConfig().reg
    assert (
        resolve(CompareConfig, {"reg": default}, None).candidates() == CompareConfig().candidates()
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fashionmnist", "'fashion-mnist'"),
        ("FashionMNIST", "'fashion-mnist'"),
        ("CIFAR-10", "'cifar10'"),
        ("Cifar_100", "'cifar100'"),
        ("digit", "'digits'"),
        (".", "'imagefolder:.'"),
        ("data.py", "'data.py:data'"),
        ("qwertz", "Known:"),
    ],
)
def test_data_sets_written_otherwise(spec, words):
    with pytest.raises(ConfigError) as caught:
        open_source(spec)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ResNet18", "'resnet18'"),
        ("resnet-50", "'resnet50'"),
        ("resnet34", "'torchvision:resnet34'"),
        ("small_cnn", "'small-cnn'"),
        ("net.py", "'net.py:build'"),
        ("torchvision:resnet_18", "'resnet18'"),
        ("WRN-28-10", "'wrn-28-10'"),
        ("qwertz", "Built in:"),
    ],
)
def test_models_written_otherwise(spec, words):
    with pytest.raises(ModelError) as caught:
        build_model(spec, num_classes=2, in_shape=(1, 8, 8), model_args={}, seed=0)
    assert words in str(caught.value)


SPECS = [
    "digits",
    "a/d.npz",
    "b/d.npz",
    "d.npz",
    "a-d.npz",
    "/a/d.npz",
    "../d.npz",
    "a/m.py:build",
    "b/m.py:build",
    "a b.npz",
    "a+b.npz",
    "imagefolder:x/images",
    "imagefolder:y/images",
    "d" * 300 + ".npz",
    "d" * 299 + ".npz",
]


def test_runs_of_different_files_go_to_different_folders():
    for field in ("dataset", "model"):
        folders = [default_folder(TrainConfig(**{field: spec})).name for spec in SPECS]
        assert len({folder.lower() for folder in folders}) == len(SPECS)
        assert max(map(len, folders)) < 200
    rows = [f"{spec}:R=0.1" for spec in ("a/r.py", "a-r.py", "r.py", "b/r.py")]
    assert len({default_folder(TrainConfig(reg=[row])) for row in rows}) == len(rows)
    usual = default_folder(TrainConfig(reg=["trace=0.01", "label-smoothing=0.1"], seed=3))
    assert str(usual) == "runs/digits-small-cnn-trace0.01+label-smoothing0.1-seed3"


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "mlp,mlp"),
        ("--dataset", ","),
        ("--dataset", "digits,digits"),
        ("--model", "mlp,"),
        ("--dataset", "a:b.npz,a-b.npz"),
    ],
)
def test_rows_that_would_share_a_folder_are_refused_before_one_is_made(flags, tmp_path):
    result = invoke("compare", *TINY, *flags, "--reg", "none", "--out", "c")
    assert_one_line_error(result, 2)
    assert not (tmp_path / "c").exists()


LONG = ["x" * 300, "x" * 5000, "a/" * 3000, "\udcff" * 200]
PLACES = [
    ("train", "--config", ""),
    ("train", "--dataset", ".npz"),
    ("train", "--dataset", ".py:data"),
    ("train", "--dataset", ""),
    ("train", "--model", ".py:build"),
    ("train", "--model", ""),
    ("train", "--init", ".pt"),
    ("train", "--out", ""),
    ("train", "--reg", ".py:R=0.1"),
    ("compare", "--out", ""),
    ("compare", "", ""),
    ("estimate-trace", "", ".pt"),
    ("estimate-trace", "", ".safetensors"),
    ("estimate-trace", "--json", ".json"),
    ("spectrum", "--plot", ".png"),
]


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_names_that_no_file_can_have(place):
    command, flag, ending = place
    few = ("--epochs", "1", "--train-examples", "40", "--model-arg", "width=4")
    few = {"train": few, "compare": (*few, "--seeds", "0", "--reg", "none")}.get(command, ())
    few = few if flag else ()
    for name in LONG:
        checkpoint = ["nothing.pt"] if command in ("estimate-trace", "spectrum") and flag else []
        result = invoke(command, *([flag] if flag else []), name + ending, *checkpoint, *few)
        assert result.exit_code in (0, 2, 3, 4), (name[:9], result.output, result.exception)
        if result.exit_code:
            assert "Traceback" not in result.stderr


@pytest.mark.parametrize("folder", LONG, ids=["300", "5000", "levels", "bytes"])
def test_folders_that_cannot_be(folder):
    assert_one_line_error(invoke("train", "--dataset", f"imagefolder:{folder}"), 3)
    assert_one_line_error(invoke("train", "--dataset", "mnist", "--data-dir", folder), 3)


@pytest.mark.parametrize("file", ["=cmd.py", "a=b.py", "trace =1.py", "x=1:2.py"])
def test_a_regularizers_file_may_have_an_equals_sign(file):
    assert parse_regularizers([f"{file}:R=0.1"], None) == {f"{file}:R": 0.1}
    assert parse_regularizers([f"{file}:R"], 0.2) == {f"{file}:R": 0.2}
    assert parse_tune([f"{file}:R=0.1:0.3"], TrainConfig) == {f"{file}:R": [0.1, 0.3]}
    with pytest.raises(ConfigError, match=r"the strength of .* is 'x'"):
        parse_regularizers([f"{file}:R=x"], None)


@pytest.mark.parametrize("entry", ["trace=0.1:R", "trace=", "none=m:R", "trace=a.py:R"])
def test_and_a_known_name_ends_at_the_first(entry):
    with pytest.raises(ConfigError, match=r"strength"):
        parse_regularizers([entry], None)


@pytest.mark.parametrize("unit", ["a, ", "{a: b}, ", "[a], "])
def test_a_long_file_is_refused_before_it_is_read_whole(unit):
    with pytest.raises(ValueError, match="more than 10000 values"):  # not the bracket at its end
        load_yaml("[" + unit * 20_000 + "}")
