"""Gram matrices of patches from those of pixels, and the ways that a convolution may take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.per_example.rules import convolution
from hesstrace_cli.curvature.per_example.rules.pixels import PixelWindows
from hesstrace_cli.curvature.probes import Draws, draw_signs
from tests.curvature.test_by_example import (
    assert_same,
    forward,
    generator,
    per_example_truth,
    truthful,
)
from tests.curvature.test_exact import SHAPES, build

CONVOLUTIONS = [name for name in SHAPES if "conv" in name or "group" in name or "depthwise" in name
                or name == "time folded into the batch"]  # fmt: skip


@pytest.mark.parametrize("settings", [
    {"kernel_size": (3, 3), "padding": (1, 1)},
    {"kernel_size": (2, 3), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": (1, 1), "stride": (2, 3)},
    {"kernel_size": (3, 2), "stride": (3, 4)},
])  # fmt: skip
def test_patches(settings):
    images = torch.randn(4, 3, 7, 9, dtype=torch.float64)
    patches = F.unfold(images, **settings).mT  # (4, positions, numbers)
    defaults = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0)} | settings
    size, stride = defaults["kernel_size"], defaults["stride"]
    dilation, padding = defaults["dilation"], defaults["padding"]
    sides = zip(images.shape[2:], size, stride, dilation, padding, strict=True)
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in sides]
    windows = PixelWindows(size, stride, dilation, padding, places, num_images=2)
    pixels = windows.pixels(images).flatten(2).mT.reshape(2, windows.num_pixels, 3)
    both = patches.reshape(2, -1, patches.shape[2])  # two images an example
    gram = (pixels @ pixels.mT).requires_grad_()
    own = windows.sums(gram)
    torch.testing.assert_close(own, both @ both.mT)
    slope = torch.randn_like(own)
    (spread,) = torch.autograd.grad(own, gram, slope)
    torch.testing.assert_close(windows.spread(slope), spread)


@pytest.mark.parametrize("way", ["pixels", "groups", "derivatives", "unfolding"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_way_is_right(name, way, monkeypatch):
    """Whichever is the cheapest: each one made to be."""
    if way == "unfolding" and "3d" in name:
        return
    rule = convolution._Convolution
    chosen = {
        "pixels": lambda self, g, layout, _: self._by_pixels(
            g, layout, self._windows(self._operands(g, self.X)[1], len(g) // layout.num_examples)
        ),
        "unfolding": lambda self, g, layout, _: self._by_unfolding(g, layout),
        "groups": rule._by_groups,
        "derivatives": rule._by_groups,
    }[way]
    monkeypatch.setattr(rule, "_of_weight", chosen)
    monkeypatch.setattr(
        "hesstrace_cli.curvature.per_example.rules.own_weights.keeps_derivatives",
        lambda *_: way == "derivatives",
    )
    monkeypatch.setattr(
        "hesstrace_cli.curvature.per_example.by_example.output_layer", lambda *_: {}
    )
    objective, X, y = build(SHAPES[name])
    form = ByExample()
    (value,) = form.samples(
        forward(objective, X), objective.params, objective.task, y, draws=Draws(scheme="none"),
        generator=generator(),
    )  # fmt: skip
    outputs = truthful(objective, X)
    keep = {n: torch.ones((), dtype=torch.float64) for n in objective.params}
    whole = [n for n, w in form.ways.items() if w.kind == "batch"]
    signs = draw_signs(outputs, generator(), balanced=True)
    truth = per_example_truth(outputs, objective, y, keep, signs, whole)
    assert_same(value, truth, objective.params)
