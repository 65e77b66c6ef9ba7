"""What a name that is not known was probably meant to be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_CLOSE = 0.6  # difflib's ratio

# By what they are called here: the names that other programs have for the same.
_ELSEWHERE = {
    "accumulate": "accumulation-steps grad-accum grad-accumulation gradient-accumulation-steps "
    "accumulate-grad-batches iter-size",
    "atol": "abs-tol absolute-tolerance",
    "augment": "aug augmentation data-augmentation transform transforms",
    "batch-size": "b bs batch batchsize train-batch-size per-device-train-batch-size mini-batch",
    "clip-grad": "clip grad-clip max-grad-norm gradient-clip-val clip-grad-norm clip-norm max-norm",
    "compile": "torch-compile",
    "curvature": "matrix hessian-type",
    "data-dir": "data data-path dataroot data-root root datadir",
    "dataset": "ds data-set task-name",
    "device": "gpu gpus gpu-id cuda no-cuda accelerator",
    "dropout-scheme": "scheme drop-scheme",
    "dtype": "double float64 fp64",
    "epochs": "e n-epochs num-epochs nepochs max-epochs num-train-epochs epoch",
    "estimator": "probe-type",
    "every": "interval penalty-every hessian-every",
    "image-size": "img-size imgsz size input-size resolution crop-size",
    "init": "pretrained weights init-from load finetune from-checkpoint",
    "jobs": "j parallel n-jobs",
    "json": "output-json save-json results",
    "keep-checkpoints": "save-total-limit save-top-k keep",
    "keep-prob": "p prob keep-probability q",
    "lambda": "lam lmbda reg-strength penalty strength penalty-weight reg-weight coef",
    "lr-warmup": "warmup-lr lr-warmup-ratio warmup-steps num-warmup-steps",
    "lr": "learning-rate eta lrate base-lr step-size",
    "max-passes": "max-iter max-iters iterations maxiter",
    "max-seconds": "timeout time-limit max-time",
    "method": "algorithm algo",
    "model": "arch architecture net network backbone m",
    "model-arg": "model-args model-kwargs width hidden depth",
    "momentum": "beta mom",
    "num-classes": "classes n-classes nclass",
    "num-examples": "subset n-examples max-examples num-samples-data max-samples limit",
    "num-probes": "probes n-probes num-samples n-samples samples n-v nv num-vectors n-vectors",
    "num-workers": "workers n-workers num-data-workers",
    "optimizer": "opt optim",
    "out": "o output output-dir outdir save-dir savedir logdir log-dir run-dir exp-dir save",
    "plot": "figure fig save-plot",
    "precision": "amp fp16 bf16 half mixed-precision use-amp",
    "reg": "regularizer regularization regularisation regularizers reg-type penalties",
    "resume": "continue restart",
    "rtol": "tol tolerance rel-tol relative-tolerance",
    "schedule": "scheduler lr-scheduler sched lr-schedule",
    "seq-len": "bptt sequence-length block-size context-length max-length max-seq-len seqlen",
    "seed": "random-seed manual-seed rng-seed",
    "seeds": "num-seeds n-seeds trials repeats",
    "split": "part data-split",
    "sync-bn": "syncbn sync-batchnorm",
    "tensorboard": "tb",
    "tokens": "tokenizer token-level",
    "top": "k num-eigenvalues n-eigs topk neigs num-eigenthings",
    "vocab-size": "vocabulary vocab num-tokens vocabulary-size",
    "train-examples": "num-train n-train train-size max-train-samples",
    "val-fraction": "val-split validation-split val-size val-ratio valid-size validation-fraction",
    "warmup": "warmup-epochs warmup-fraction warmup-ratio warm-up",
    "weight-decay": "wd l2 decay",
    # Regularizers.
    "trace": "hessian hessian-trace tr trace-penalty seht seht-h seht-d hutchinson fisher",
    "jacobian": "jac jacobian-reg",
    "confidence": "confidence-penalty entropy max-entropy",
    "grad-norm": "gradient-norm gradnorm gradient-penalty gnp",
    "label-smoothing": "ls smoothing label-smooth smooth",
    "sam": "sharpness-aware sharpness",
    "cutout": "cut-out random-erasing erasing",
    "mixup": "mix-up",
    "nso": "noise noise-stability",
    # Data and models.
    "fashion-mnist": "fmnist f-mnist",
    "cifar10": "cifar",
    "small-cnn": "cnn convnet simple-cnn",
    "mlp": "fc fcnet perceptron linear",
    "wikitext-2": "wikitext wt2 wiki-text-2",
    "lstm": "rnn recurrent",
    "gpt": "transformer gpt-2 nanogpt",
    "wrn-28-10": "wide-resnet wideresnet wrn",
}


def _bare(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


_OURS = {_bare(word): _bare(name) for name, words in _ELSEWHERE.items() for word in words.split()}


def likely(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: spelt otherwise, called otherwise, or the nearest.

    Args:
        name: As it was given.
        known: What there is.
    """
    bare = {_bare(one): one for one in known}
    given = _bare(name)
    if given in bare:
        return bare[given]
    if _OURS.get(given) in bare:
        return bare[_OURS[given]]
    near = get_close_matches(given, bare, n=1, cutoff=_CLOSE)
    return bare[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Half a sentence that names what was probably meant, or a full stop."""
    near = likely(name, known)
    return f"; did you mean {near!r}?" if near else "."
