"""What the documents say is so: every command in them runs, small; lists are those of the code."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets, models
from torchvision.transforms.v2.functional import to_pil_image

from hesstrace_cli.data.sources import open_source
from hesstrace_cli.models import BUILT_IN
from tests.conftest import invoke

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(file.read_text() for file in TEXTS)
SCRIPTS = sorted((ROOT / "sample_configs").rglob("*.sh"))
CONFIGS = sorted((ROOT / "sample_configs").rglob("*.yaml"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
WORDS = (
    "hesstrace",
    "python",
    "torchrun",
    "make",
    "pip",
    "sbatch",
    "parallel",
    "benchmarks/gpu.sh",
)


def commands_in(text):
    """Its commands: lines of code blocks and in backticks, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in text.splitlines():
        inline = re.findall(r"`([^`]+)`", line)
        block = [line.strip().removeprefix("# ")] if re.match(r"( {4}|#? *\w)", line) else []
        for command in inline or block:
            command = re.sub(r"\s+#.*|\s+\|$|\s*\|\s.*|\s*> .*", "", command.strip())
            if re.match(rf"({'|'.join(WORDS)}) [-a-z./]", command) and "`" not in command:
                yield command


def all_commands():
    found = {}
    for file in [*TEXTS, *SCRIPTS, *CONFIGS]:
        text = file.read_text()
        if file.suffix == ".yaml":
            text = "".join(line for line in text.splitlines(True) if line.startswith("#"))
        if file.suffix == ".md":  # prose is not code
            text = "".join(
                line for line in text.splitlines(True)
                if re.match(r" {4}|hesstrace |torchrun |make |pip ", line) or "`" in line
            )  # fmt: skip
        for command in commands_in(text):
            found.setdefault(command, file.name)
    for file in BENCHMARKS:
        for command in commands_in(file.read_text().split('"""')[1]):
            found.setdefault(command, file.name)
    return found


COMMANDS = all_commands()
NOT_RUN = {
    "make demo": "runs the commands that are run here, in full",
    "make test": "is what runs this",
    "make test-slow": "is what runs this",
    "pip install": "needs the network",
    "sbatch": "needs Slurm",
    "parallel": "needs GNU parallel; what it is fed with is run by tests/test_comparison.py",
    "torchrun": "tests/test_torchrun.py runs it with two processes",
    "benchmarks/gpu.sh": "needs a GPU for what it measures; its flags are looked at below",
    "hesstrace train --config sample_configs/paper/": "tests/test_configs.py does it",
    "python examples/": "the folder of these commands is made with it",
}


def reason_not_to_run(command):
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


SMALLER = {
    "resnet18/last.pt --dataset imagefolder:CIFAR_DIR": "last.pt",
    "transformer/last.pt --model examples/text.py:transformer": "text.pt --model mymodel.py:text",
    "lstm/last.pt --model examples/text.py:lstm": "text.pt --model mymodel.py:text",
    "segmentation-none/last.pt segmentation-weak/last.pt segmentation-trace/last.pt "
    "--model examples/tasks.py:pixels": "none/last.pt trace/last.pt",
    "regression-none/last.pt regression-weak/last.pt regression-trace/last.pt": "last.pt",
    "multilabel-none/last.pt multilabel-weak/last.pt multilabel-trace/last.pt": "last.pt",
    "--dataset imagefolder:DIR": "--dataset imagefolder:images",
    "imagefolder:CIFAR_DIR": "imagefolder:images",
    "imagefolder:DIR": "imagefolder:images",
    "text:DIR": "text:text",
    "--seq-len 128": "--seq-len 8",
    "--data-dir DIR": "--data-dir data",
    "--data-dir data": "--data-dir data",
    "--download": "",
    "--config sample_configs/": f"--config {ROOT}/sample_configs/",
    "--config FILE": f"--config {ROOT}/sample_configs/train_digits.yaml",
    "resnet50.pth --model torchvision:resnet50 --num-classes 1000": (
        "resnet18.pth --model torchvision:resnet18 --num-classes 3"
    ),
    "--image-size 224": "--image-size 32",
    "--num-examples 500": "--num-examples 6",
    "--model small-cnn,resnet18": "--model small-cnn,mlp",
    "--jobs 4": "",
    "--jobs 2": "",
    "--seeds 0,1,2,3,4": "--seeds 0",
    "--seeds 0,1,2": "--seeds 0",
    '"$out"': "planned",
    '"trace=$strength"': "trace=0.001",
    '"runs/sweep/$strength"': "runs/sweep/0.001",
    "[--model-arg norm=none]": "",
    "[--dataset fashion-mnist --train-examples 2000]": "",
    "--out cmp --plan": "--out planned --plan",
    "--train-examples 6000 --epochs 5": "",
}
FLAGS = {
    "train": "--epochs 1 --train-examples 12 --val-fraction 0",
    "compare": "--epochs 1 --train-examples 12 --seeds 0",
    "estimate-trace": "--num-examples 6",
    "spectrum": "--num-examples 6",
    "verify": "",
    "sensitivity": "--num-examples 6",
    "tune": "--epochs 1 --train-examples 40 --budget 20",
}
BENCHMARK_FLAGS = {
    "coverage.py": "--repeats 5 --sketch-repeats 3",
    "data.py": "--batch-size 2 --model mlp --workers 0",
    "language_trace.py": "--tokens 70 --peer-tokens 70 --samples 2 --steps 1 --width 4 "
                         "--batch-size 2 --cache cache",
    "penalty_settings.py": "--epochs 1 --train-examples 12 --batch-size 4 --seeds 0 --draws 2 "
                           "--val-fraction 0 --only none example",
    "spectrum.py": "--model small-cnn --train-steps 2 --examples 8 --count-examples 8 "
                   "--batch-size 4 --rounds 1 --most 3",
    "step_cost.py": "--model small-cnn --image 8 --channels 1 --batch-size 4 --rounds 1 --draws 2 "
                    "--only none",
    "trace_to_tolerance.py": "--networks relu-cnn-bn --examples 8 --epochs 1 --samples 2 "
                             "--truth-products 4 --seconds 1 --cache cache",
}  # fmt: skip
SLOW = (
    "trace_to_tolerance.py",
    "language_trace.py",
    "penalty_settings.py",
    "--dataset wikitext-2 --data-dir DIR --model lstm",
    "--batches 1",
    "--epochs 27",
    "_time.yaml",
    "--equal time",
    "--dataset text:words",
    "--dataset mnist,fashion-mnist",
)


FOR_OUR_OWN = {"--model resnet18": "--model small-cnn --model-arg width=2"}


def small(command):
    own = FOR_OUR_OWN if command.startswith("hesstrace") else {}
    for what, instead in {**SMALLER, **own}.items():
        command = command.replace(what, instead)
    return command


def images(folder, number=12):
    for part in ("train", "test"):
        for index in range(number):
            file = folder / part / "abc"[index % 3] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            X = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
            to_pil_image(X).save(file)


def idx_files(folder):
    """Sixty images in torchvision's layout of MNIST."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        X = torch.randint(0, 256, (60, 28, 28), dtype=torch.uint8).numpy()
        y = (np.arange(60) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", X), (f"{part}-labels-idx1-ubyte", y)):
            head = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (folder / name).write_bytes(head + array.tobytes())


PLUG_IN = """
from torch import nn


def build(num_classes, in_shape, width=4):
    inputs = 1
    for size in in_shape:
        inputs *= size
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.GELU(),
                         nn.Linear(width, num_classes))


def text(num_classes, width=4):
    return nn.Sequential(nn.Embedding(num_classes, width), nn.Linear(width, num_classes))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the documents' commands speak of."""
    folder = tmp_path_factory.mktemp("documents")
    images(folder / "images")
    for name in (datasets.MNIST, datasets.FashionMNIST):
        idx_files(folder / "data" / name.__name__ / "raw")
    X, y = np.random.default_rng(0).random((12, 1, 8, 8), dtype=np.float32), np.arange(12) % 3
    np.savez(folder / "arrays.npz", x_train=X, y_train=y, x_test=X, y_test=y)
    (folder / "mymodel.py").write_text(PLUG_IN)
    torch.save(models.resnet18(num_classes=3).state_dict(), folder / "resnet18.pth")
    for name in ("sample_configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "text").mkdir()
    for part in ("train", "valid", "test"):
        (folder / "text" / f"{part}.txt").write_text("a b c d\n a b a c\n" * 200)
    (folder / "data" / "wikitext-2").symlink_to(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in ("tasks.py data . --examples 80", "text.py text words.npz --windows 40"):
            name, *words = shlex.split(script)
            patch.setattr(sys, "argv", [name, *words])
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        flags = [*shlex.split(FLAGS["train"]), "--model-arg", "width=2"]
        text = ("--dataset", "words.npz", "--task", "tokens", "--model", "mymodel.py:text")
        assert invoke("train", *flags, *text, "--out", "text-run").exit_code == 0
        (folder / "text.pt").symlink_to(folder / "text-run" / "last.pt")
        for name in ("runs/one", "none", "trace", "runs/sweep/seen"):
            assert invoke("train", *flags, "--out", name).exit_code == 0
        (folder / "last.pt").symlink_to(folder / "none" / "last.pt")
        flags = [*shlex.split(FLAGS["compare"]), "--model-arg", "width=2"]
        assert invoke("compare", *flags, "--reg", "none", "--out", "cmp").exit_code == 0
    return folder


def run_tool(command, folder):
    _, name, *rest = shlex.split(small(command))
    if name.startswith("-"):
        return invoke(name, *rest)
    words = [
        path
        for word in rest
        for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    flags = shlex.split(FLAGS[name])
    if "plateau" in words:  # goes by the validation
        flags = flags[: flags.index("--val-fraction")]
    collects = name == "compare" and words and not words[0].startswith("-")
    if collects:
        words, flags = ["cmp"], []
    elif name == "tune":
        flags += ["--out", str(folder / "search")]
    elif name == "train" and "--out" not in words:
        flags += ["--out", str(folder / "run")]
    elif name == "compare" and "--tune" not in words and "--config" not in words:
        flags += ["--out", str(folder / "comparison")]
    elif name == "compare":  # tuning trains as many runs as there are strengths: planned here
        flags += ["--out", str(folder / "comparison"), "--plan"]
    return invoke(name, *words, *flags)


def cases():
    for command, file in COMMANDS.items():
        slow = [pytest.mark.slow] if any(part in command for part in SLOW) else []
        yield pytest.param(command, id=f"{file}: {command}", marks=slow)


@pytest.mark.parametrize("command", list(cases()))
def test_a_documented_command_runs(command, workplace, tmp_path, monkeypatch, capsys):
    reason = reason_not_to_run(command)
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    monkeypatch.chdir(workplace)
    if command.startswith("hesstrace"):
        result = run_tool(command, tmp_path)
        assert result.exit_code == 0, (small(command), result.output[-2000:])
        return
    script, *rest = shlex.split(small(command))[1:]
    flags = BENCHMARK_FLAGS[Path(script).name]
    if "--batches" in rest:
        flags += " --steps 1"
    rest = [word for word in rest if word not in ("--grid", "--compile")]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *rest, *shlex.split(flags)])
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / script), run_name="__main__")
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| ---" in printed
    assert "not possible" not in printed


def test_the_documents_commands_are_found():
    """The search has not gone blind: each kind, and every benchmark, is among them."""
    for start in ("hesstrace train", "hesstrace estimate-trace", "hesstrace compare",
                  "hesstrace spectrum", "hesstrace verify", "torchrun", "make test"):  # fmt: skip
        assert any(command.startswith(start) for command in COMMANDS), start
    text = " ".join(COMMANDS)
    assert all(f"benchmarks/{file.name}" in text for file in BENCHMARKS)
    for file in CONFIGS:
        named = file.parent.name == "paper" or any(file.name in command for command in COMMANDS)
        assert named, f"{file.name}: no command says how to use it"


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def test_every_flag_in_the_documents_exists():
    ours = set()
    for name in FLAGS:
        ours |= flags_in(invoke(name, "--help").output)
    theirs = {"--help", "--version", "--nproc-per-node", "--array", "--joblog", "--gres",
              "--cpus-per-task", "--time", "--requeue"}  # fmt: skip
    for file in BENCHMARKS:
        theirs |= set(re.findall(r'add_argument\("(--[a-z-]+)"', file.read_text()))
    for file in [*TEXTS, *SCRIPTS, ROOT / "benchmarks" / "gpu.sh"]:
        unknown = flags_in(file.read_text()) - ours - theirs
        assert not unknown, f"{file.name}: {sorted(unknown)}"


def test_files_named_in_the_documents_exist():
    for file in TEXTS:
        text = file.read_text()
        named = re.findall(
            r"(?:docs|benchmarks|sample_configs|tests)/[\w/.-]*\w\.(?:md|py|sh|yaml)", text
        )
        missing = [path for path in named if not (ROOT / path).exists()]
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        missing += [link for link in links if not (file.parent / link).exists()]
        assert not missing, f"{file.name}: {missing}"


# What the documents say of models and data


def settings_of(factory):
    """The names that a built-in model takes by --model-arg."""
    target = factory
    while isinstance(target, partial):
        target = target.func
    parameters = inspect.signature(target).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_models_arguments_are_listed():
    rows = dict(re.findall(r"^\| (`[a-z].*?`) \| (.*?) \|$", TEXT, re.M))
    said = {}
    for names, arguments in rows.items():
        for name in re.findall(r"`([a-z0-9-]+)`", names):
            if name in BUILT_IN:
                said[name] = set(re.findall(r"`(\w+)`", arguments))
    assert said == {name: settings_of(factory) for name, factory in BUILT_IN.items()}


def python_with(containing):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    return next(block for block in blocks if containing in block)


def test_the_factories_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(python_with("def build("))
    result = invoke("train", "--model", "mine.py:build", "--dataset", "mine.py:data",
                    "--model-arg", "width=3", "--epochs", "1", "--out", "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state_dict"]
    assert any(3 in value.shape for value in state.values())


def test_the_regularizer_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(python_with("class LogitNorm"))
    flags = shlex.split(FLAGS["train"])
    result = invoke("train", "--reg", "mine.py:LogitNorm=0.01", *flags, "--out", "run")
    assert result.exit_code == 0, result.output


def test_the_array_keys(tmp_path):
    """Each key is needed, and the layouts that are named are taken."""
    keys = re.search(r"`FILE.npz` with the arrays (.*?):", TEXT, re.S)
    assert keys is not None
    keys = re.findall(r"`(\w+)`", keys[1])
    g, y = np.random.default_rng(0), np.arange(6) % 2
    layouts = {(8, 8): (1, 8, 8), (1, 8, 8): (1, 8, 8), (8, 8, 3): (3, 8, 8), (5,): (5,)}
    for given, seen in layouts.items():
        for x in (
            g.random((6, *given), dtype=np.float32),
            g.integers(0, 256, (6, *given), np.uint8),
        ):
            arrays = {key: x if key.startswith("x") else y for key in keys}
            np.savez(tmp_path / "a.npz", **arrays)
            source = open_source(str(tmp_path / "a.npz"))
            assert tuple(source.train.inputs.shape[1:]) == seen
            for key in keys:
                np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if k != key})
                with pytest.raises(Exception, match=f"lacks {key}"):
                    open_source(str(tmp_path / "b.npz"))
