"""Commands on the CPU and on a CUDA device that is not there, in one process.

    python -m tests.fakecuda.commands FOLDER

writes to FOLDER/found.json what each gave on either device, and where the device was waited for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
MODEL = """
from torch import nn

class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(32, 2, batch_first=True), nn.Linear(2, 10)

    def forward(self, X):
        return self.head(self.cell(X.reshape(len(X), 2, 32))[0][:, -1])
"""
TRAINED = f"{FOLDER}/cpu/{{}}/last.pt"  # the same weights for both devices
LSTM = ["--model", f"{FOLDER}/model.py:Sequence"]
CNN = ["--model-arg", "width=4"]
TRAIN = ["train", "--epochs", 1, "--train-examples", 40, "--warmup", 0, "--batch-size", 18]
ESTIMATE = ["--num-examples", 20, "--batch-size", 10]
COMMANDS = {
    "train G": [*TRAIN, *CNN, "--reg", "trace=0.01", "--out", "{out}/cnn"],
    "train H": [*TRAIN, *CNN, "--reg", "trace=0.001", "--curvature", "hessian", "--out", "{out}/h"],
    "train lstm": [*TRAIN, *LSTM, "--reg", "none", "--out", "{out}/lstm"],
    "exact": ["estimate-trace", TRAINED.format("cnn"), *ESTIMATE],
    "hutchinson": ["estimate-trace", TRAINED.format("cnn"), *ESTIMATE, "--method", "hutchinson",
                   "--max-passes", 1],
    "lstm, G": ["estimate-trace", TRAINED.format("lstm"), *LSTM, *ESTIMATE, "--curvature", "ggn",
                "--method", "hutchinson", "--max-passes", 1],
    "spectrum": ["spectrum", TRAINED.format("cnn"), *ESTIMATE, "--steps", 4, "--top", 1,
                 "--max-products", 4, "--num-probes", 1, "--num-directions", 1],
    "verify": ["verify", "--model-arg", "width=2", "--batch-size", 4],
    "verify lstm": ["verify", *LSTM, "--batch-size", 4],
}  # fmt: skip


def outcome(words: list, device: str) -> dict:
    """What a command wrote."""
    from typer.testing import CliRunner

    from hesstrace_cli.cli import app

    out = FOLDER / device
    out.mkdir(exist_ok=True)
    words = [str(word).format(out=out) for word in words]
    file = out / "result.json"
    more = [] if words[0] == "train" else ["--json", str(file)]
    result = CliRunner().invoke(app, [*words, *more, "--device", device])
    if result.exit_code:
        import traceback

        trace = "".join(traceback.format_exception(*result.exc_info)[-6:])
        return {"exit_code": result.exit_code, "error": result.output[-800:] + trace}
    if words[0] == "train":
        file = Path(words[-1]) / "summary.json"
    return {"exit_code": 0, **json.loads(file.read_text())}


def waits() -> dict:
    """Where a step, an evaluation, Lanczos and sharpness wait, and what sums in no fixed order."""
    import torch

    from hesstrace_cli.analysis.evaluation import evaluate
    from hesstrace_cli.config import TrainConfig, resolve
    from hesstrace_cli.curvature.spectrum.lanczos import Krylov
    from hesstrace_cli.training.run import Run
    from tests.fakecuda.tensors import logged

    found = {}
    rows = {
        "none": {"reg": ["none"]},
        "trace": {"reg": ["trace=0.01"]},
        "trace of H": {"reg": ["trace=0.01"], "curvature": "hessian"},
        "mixup": {"reg": ["mixup,trace=0.01"], "augment": "crop-flip"},
        "ema": {"reg": ["ema=0.9,asam=0.1,trace=0.01"], "draw": "labels", "label_noise": 0.2},
    }
    for number, (name, settings) in enumerate(rows.items()):
        given = {"train_examples": 60, "batch_size": 10, "epochs": 2, "warmup": 0.0,
                 "device": "cuda", "out": f"{FOLDER}/waits{number}", **settings}  # fmt: skip
        run = Run(resolve(TrainConfig, given, None))
        batches = list(run.trainer.examples(list(torch.arange(20).split(10))))
        run.trainer.take_step(batches[0])
        with logged() as log:
            run.trainer.take_step(batches[1])
        found[name] = {"waits": log.waits, "unordered": log.unordered}
        if name == "none":
            with logged() as log:
                evaluate(run.trainer.model, run.trainer.data.test, 50)
            found["an evaluation"] = {"waits": log.waits}
    A = torch.randn(300, 300, device="cuda")
    with logged() as log:
        Krylov(A + A.mT, torch.randn(300, device="cuda")).extend(24)
    found["24 products"] = {"waits": log.waits}
    return found


if __name__ == "__main__":
    from tests.fakecuda.device import install

    install(FOLDER)
    import torch

    torch.set_num_threads(1)
    (FOLDER / "model.py").write_text(MODEL)
    found = {name: {device: outcome(words, device) for device in ("cpu", "cuda")}
             for name, words in COMMANDS.items()}  # fmt: skip
    content = {"commands": found, "waits": waits()}
    (FOLDER / "found.json").write_text(json.dumps(content, default=str))
