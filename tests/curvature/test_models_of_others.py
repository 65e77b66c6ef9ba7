"""Networks of torchvision, timm and Hugging Face, untrained, against differences of gradients.

The truth is H_jj = dg_j/dw_j by central differences in float64, for all weights of a few small
tensors, with the model's own operations.
"""

from __future__ import annotations

import pytest
import torch
from torchvision import models as torchvision_models

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit

pytestmark = pytest.mark.slow

CLASSES, EXAMPLES = 5, 6
MOST_WEIGHTS, TENSORS = 16, 3
PIECEWISE_LINEAR = {
    "alexnet", "resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5",
    "densenet121", "googlenet", "resnext50_32x4d", "wide_resnet50_2",
}  # fmt: skip
TORCHVISION = (
    *sorted(PIECEWISE_LINEAR), "mobilenet_v3_small", "regnet_y_400mf", "regnet_x_400mf",
    "efficientnet_b0", "convnext_tiny", "swin_t",
)  # fmt: skip
TIMM = (
    "test_resnet", "test_vit", "test_efficientnet", "resnet10t", "mobilenetv3_small_050",
    "lcnet_050", "tinynet_e", "ghostnet_050", "edgenext_xx_small", "poolformer_s12", "repvgg_a0",
    "test_convnext", "test_mambaout", "test_byobnet",
)  # fmt: skip
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "num_labels": CLASSES}  # fmt: skip
TEXT = {
    "bert": {}, "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "albert": {"embedding_size": 8}, "roberta": {}, "electra": {"embedding_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2}, "mistral": {"num_key_value_heads": 2}, "opt": {},
    "deberta-v2": {}, "gpt_neox": {},
}  # fmt: skip
VISION = {
    "vit": {"image_size": 32, "patch_size": 8}, "deit": {"image_size": 32, "patch_size": 8},
    "beit": {"image_size": 32, "patch_size": 8}, "dinov2": {"image_size": 28, "patch_size": 14},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
               "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}  # fmt: skip


def images(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EXAMPLES, 3, size, size, generator=generator, dtype=torch.float64)


def tokens(vocabulary=90, length=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (EXAMPLES, length), generator=generator)


def small_tensors(params):
    names = [name for name, p in params.items() if p.numel() <= MOST_WEIGHTS]
    names = names or [min(params, key=lambda name: params[name].numel())]
    step = max(1, len(names) // TENSORS)
    return names[::-1][::step][:TENSORS]


def diagonal(objective, X, y, name, step=3e-9):  # so short that it crosses no kink
    """The trace of a tensor's block of H, by differences of its gradient."""
    p, total = objective.params[name], 0.0
    for index in range(min(p.numel(), 4 * MOST_WEIGHTS)):
        slopes = []
        for t in (step, -step):
            moved = p.detach().clone().flatten()
            moved[index] += t
            leaf = moved.reshape(p.shape).requires_grad_()
            outputs = native_outputs(objective.model, X, {name: leaf})
            loss = objective.task.loss(outputs, y)
            (g,) = torch.autograd.grad(loss, leaf)
            slopes.append(g.flatten()[index].item())
        total += (slopes[0] - slopes[1]) / (2 * step)
    return total


class OfFloats(torch.nn.Module):
    """Token numbers that arrive as floating-point ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, X):
        return self.model(X.long())


@torch.no_grad()
def settle(model, X):
    """Statistics of these inputs: those of a fresh network let all signals die out, or grow."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()(X)


def check(model, X, *, is_exact=False):
    model = model.double()
    settle(model, X)
    model.eval()
    y = torch.arange(EXAMPLES) % CLASSES
    split = TensorSplit(X, y, Preprocess(), torch.float64)
    got = estimate(model, split, EstimateConfig(batch_size=4, num_probes=4, max_passes=4))
    assert "held constant" not in got.reason
    assert "depend on the others" not in got.reason
    assert not is_exact or got.method == "exact", got.reason
    objective = Objective(model, trainable(model))
    scale = got.result.total.value
    for name in small_tensors(objective.params):
        if objective.params[name].numel() > 4 * MOST_WEIGHTS:
            continue
        truth = sum(
            diagonal(objective, X_b, y_b, name) * len(X_b) / EXAMPLES
            for X_b, y_b in split.batches(4)
        )
        part = got.result.tensors[name]
        allowed = 1e-5 * abs(truth) + 1e-6 * abs(scale) + 6 * (part.stderr or 0.0)
        assert abs(part.value - truth) <= allowed, (name, part, truth, got.method)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torch.manual_seed(0)
    settings = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = torchvision_models.get_model(name, weights=None, num_classes=CLASSES, **settings)
    check(model, images(64 if name == "alexnet" else 32), is_exact=name in PIECEWISE_LINEAR)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    settings = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
    check(model, images(32))


@pytest.mark.parametrize("name", TEXT)
def test_text_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, **{**TINY, "vocab_size": 90, "max_position_embeddings": 40, **TEXT[name]}
    )
    config.pad_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    check(OfFloats(model), tokens().double())


@pytest.mark.parametrize("name", VISION)
def test_vision_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**TINY, **VISION[name]})
    if name == "deit":  # of which there are two
        config.architectures = ["DeiTForImageClassification"]
    model = transformers.AutoModelForImageClassification.from_config(config)
    check(model, images(VISION[name].get("image_size", 64)))
