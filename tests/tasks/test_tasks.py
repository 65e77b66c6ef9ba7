"""Every task's loss, factor, columns and traces against a dense Hessian of its own loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.errors import ConfigError, DataError, ModelError
from hesstrace_cli.tasks import (
    TASKS,
    Classification,
    Multilabel,
    Regression,
    Segmentation,
    Tokens,
    choose_task,
    task_of,
)

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def integers(high, *shape):
    return torch.randint(high, shape, generator=generator)


def some_ignored(targets, index):
    targets = targets.clone()
    targets[0] = index  # an example without any
    targets.flatten()[-1] = index
    return targets


W = (0.5, 2.0, 1.0, 0.0)
SOFT = torch.softmax(normal(5, 4), 1)
CASES = {
    "classes": (Classification(), normal(5, 4), integers(4, 5)),
    "one class": (Classification(), normal(3, 1), torch.zeros(3, dtype=torch.long)),
    "probabilities": (Classification(), normal(5, 4), SOFT),
    "smoothed": (Classification(label_smoothing=0.3), normal(5, 4), integers(4, 5)),
    "weighted": (Classification(class_weights=W), normal(5, 4), integers(4, 5)),
    "weighted, smoothed": (
        Classification(class_weights=W, label_smoothing=0.3), normal(5, 4), integers(4, 5)
    ),
    "weighted probabilities": (Classification(class_weights=W), normal(5, 4), SOFT),
    "tokens": (Tokens(), normal(3, 2, 4), integers(4, 3, 2)),
    "tokens, ignored": (Tokens(), normal(3, 2, 4), some_ignored(integers(4, 3, 2), -100)),
    "tokens, padded with a class": (
        Tokens(ignore_index=0, class_weights=W), normal(3, 2, 4),
        some_ignored(integers(3, 3, 2) + 1, 0),
    ),
    "pixels weighted, ignored beyond the classes": (
        Segmentation(ignore_index=255, class_weights=W), normal(2, 4, 2, 2),
        some_ignored(integers(4, 2, 2, 2), 255),
    ),
    "pixels": (
        Segmentation(ignore_index=255, label_smoothing=0.1), normal(2, 3, 2, 2),
        some_ignored(integers(3, 2, 2, 2), 255),
    ),
    "regression": (Regression(), normal(5, 3), normal(5, 3)),
    "regression of images": (Regression(), normal(3, 1, 2, 2), normal(3, 1, 2, 2)),
    "labels": (Multilabel(), normal(5, 3), integers(2, 5, 3)),
    "labels between": (Multilabel(), normal(5, 3), torch.rand(5, 3, generator=generator)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def blocks(task, outputs, targets):
    """M times the Hessian of the mean loss in the outputs: an example's block after another."""
    size = math.prod(outputs.shape[1:])
    H = torch.autograd.functional.hessian(lambda f: task.loss(f, targets), outputs)
    H = H.reshape(len(outputs), size, len(outputs), size) * task.num_terms(targets)
    off = H.clone()
    off[range(len(outputs)), :, range(len(outputs))] = 0
    assert off.abs().max() < 1e-12  # examples do not touch
    return H[range(len(outputs)), :, range(len(outputs))]


def reference(task, outputs, targets):
    """The mean loss over the terms that count, one by one, with the definition in words."""
    if isinstance(task, Regression):
        return (outputs - targets).square().mean()
    if isinstance(task, Multilabel):
        p, y = torch.sigmoid(outputs), targets.double()
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dim = task.class_dim
    log_p = outputs.movedim(dim, -1).log_softmax(-1).flatten(0, -2)
    C = log_p.shape[-1]
    w = torch.tensor(task.class_weights or [1.0] * C, dtype=torch.float64)
    total, count = 0.0, 0
    flat = targets if targets.is_floating_point() else targets.flatten()
    for row, y in zip(log_p, flat, strict=True):
        if not targets.is_floating_point() and int(y) == getattr(task, "ignore_index", None):
            continue
        t = y.double() if targets.is_floating_point() else F.one_hot(y, C).double()
        t = (1 - task.label_smoothing) * t + task.label_smoothing / C
        total, count = total - (t * w * row).sum(), count + 1
    return total / count


def test_loss(case):
    task, outputs, targets = case
    torch.testing.assert_close(task.loss(outputs, targets), reference(task, outputs, targets))


def test_root_is_a_factor_of_the_hessian(case):
    task, outputs, targets = case
    H = blocks(task, outputs, targets)
    size = H.shape[1]
    columns = [
        task.root(outputs, targets, e.reshape(1, *outputs.shape[1:]).expand_as(outputs))
        for e in torch.eye(size, dtype=torch.float64)
    ]
    B = torch.stack([c.flatten(1) for c in columns], -1)
    torch.testing.assert_close(B @ B.mT, H)


def test_product_is_that_with_the_hessian(case):
    task, outputs, targets = case
    v = normal(*outputs.shape)
    product = torch.einsum("nij,nj->ni", blocks(task, outputs, targets), v.flatten(1))
    torch.testing.assert_close(task.curve(outputs, targets, v).flatten(1), product)


def test_columns_sum_to_the_hessian_and_keep_terms_apart(case):
    task, outputs, targets = case
    columns = task.columns(outputs, targets)
    assert columns.shape == (task.num_columns(outputs), *outputs.shape)
    flat = columns.flatten(2)
    H = blocks(task, outputs, targets)
    torch.testing.assert_close(torch.einsum("kni,knj->nij", flat, flat), H)
    if hasattr(task, "class_dim") and len(columns):
        terms = columns.movedim(task.class_dim + 1, -1).any(-1)
        terms = terms.reshape(len(columns), len(outputs), -1).sum(-1)
        assert terms.max() <= 1


def test_traces_of_terms(case):
    task, outputs, targets = case
    traces = task.curvature_traces(outputs, targets)
    expected = blocks(task, outputs, targets).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(traces.reshape(len(outputs), -1).sum(1), expected)


def test_batches_add_up_by_their_terms(case):
    task, outputs, targets = case
    parts = [slice(0, 2), slice(2, None)]
    sums = [task.loss(outputs[p], targets[p]) * task.num_terms(targets[p]) for p in parts]
    assert sum(task.num_terms(targets[p]) for p in parts) == task.num_terms(targets)
    torch.testing.assert_close(
        sum(sums) / task.num_terms(targets), task.loss(outputs, targets)
    )  # fmt: skip


def test_a_batch_without_terms_has_no_loss():
    task, targets = Tokens(), torch.full((2, 3), -100)
    outputs = normal(2, 3, 4).requires_grad_()
    loss = task.loss(outputs, targets)
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()


def test_roots_have_finite_gradients_where_probabilities_underflow():
    for task, outputs, targets in (
        (Classification(), torch.tensor([[2000.0, 0.0, -2000.0]]), torch.tensor([0])),
        (Multilabel(), torch.tensor([[2000.0, 0.0, -2000.0]]), torch.ones(1, 3)),
    ):
        outputs.requires_grad_()
        (grad,) = torch.autograd.grad(task.root(outputs, targets, torch.ones(1, 3)).sum(), outputs)
        assert torch.isfinite(grad).all()


def test_metrics_do_not_depend_on_batches(case):
    task, outputs, targets = case
    whole, parts = task.meter(), task.meter()
    whole.add(outputs, targets)
    for p in (slice(0, 1), slice(1, None)):
        parts.add(outputs[p], targets[p])
    assert parts.result() == pytest.approx(whole.result())
    assert all(math.isfinite(value) for value in whole.result().values())
    plain = isinstance(task, Tokens) and task.class_weights is None and not task.label_smoothing
    assert whole.takes_loss == plain
    mean = pytest.approx(task.loss(outputs, targets).item()) if plain else None
    assert whole.loss == parts.loss == mean


def test_metrics_of_known_predictions():
    logits = torch.tensor([[9.0, 0], [9, 0], [9, 0], [0, 9]])
    meter = Classification().meter()
    meter.add(logits, torch.tensor([0, 0, 1, 1]))
    found = meter.result()
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["calibration_error"] == pytest.approx(0.25, abs=1e-3)
    meter = Tokens().meter()
    meter.add(torch.zeros(1, 2, 7), torch.tensor([[0, -100]]))
    assert meter.result() == pytest.approx({"perplexity": 7, "accuracy": 1})
    meter = Segmentation().meter()
    meter.add(logits.T[None, :, None], torch.tensor([[[0, 0, 1, 1]]]))
    assert meter.result() == pytest.approx({"accuracy": 0.75, "mean_iou": (2 / 3 + 1 / 2) / 2})
    meter = Regression().meter()
    meter.add(torch.tensor([[1.0], [3]]), torch.tensor([[0.0], [4]]))
    assert meter.result() == pytest.approx({"rmse": 1, "r2": 1 - 2 / 8})
    meter = Multilabel().meter()
    meter.add(torch.tensor([[1.0, -1], [1, 1]]), torch.tensor([[1, 0], [1, 0]]))
    assert meter.result() == pytest.approx({"accuracy": 0.75, "exact_match": 0.5, "f1": 0.8})


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (torch.tensor([0, 1]), "classification"),
        (torch.tensor([[0.5, 0.5], [0.0, 1.0]]), "classification"),
        (torch.tensor([[0.5, 0.4], [0.0, 1.0]]), "regression"),
        (torch.tensor([[1.0], [1.0]]), "regression"),
        (torch.zeros(2, 5, dtype=torch.long), "tokens"),
        (torch.zeros(2, 5, 5, dtype=torch.uint8), "segmentation"),
    ],
)
def test_auto_goes_by_the_targets(targets, name):
    found, reason = choose_task(targets)
    assert found == name
    assert "auto: targets of shape" in reason


@pytest.mark.parametrize(
    "targets", [torch.zeros(3), torch.zeros(2, 3, 4, 5, dtype=torch.long), torch.zeros(2, 2) * 1j]
)
def test_what_no_task_has_is_refused(targets):
    with pytest.raises(DataError, match="no task has targets of shape"):
        choose_task(targets)


BAD_TARGETS = [
    ("classification", torch.tensor([0.5, 1.0])),
    ("classification", torch.tensor([[0.5, 0.6]])),
    ("classification", torch.tensor([[1.5, -0.5]])),
    ("classification", torch.tensor([[float("nan"), 1.0]])),
    ("classification", torch.tensor([0, -100])),
    ("classification", torch.tensor([[0, 1]])),
    ("classification", torch.tensor([True, False])),
    ("tokens", torch.tensor([0, 1])),
    ("tokens", torch.tensor([[0.0, 1.0]])),
    ("tokens", torch.tensor([[0, -1]])),
    ("tokens", torch.tensor([[-100, -100]])),
    ("segmentation", torch.tensor([[0, 1]])),
    ("regression", torch.tensor([0.5, 1.0])),
    ("regression", torch.tensor([[0, 1]])),
    ("regression", torch.tensor([[0.0, float("inf")]])),
    ("multilabel", torch.tensor([[0.0, 2.0]])),
    ("multilabel", torch.tensor([[0, -1]])),
    ("multilabel", torch.tensor([0, 1])),
]


@pytest.mark.parametrize(("name", "targets"), BAD_TARGETS)
def test_targets_that_do_not_fit_are_refused(name, targets):
    with pytest.raises(DataError, match=r"set \(train\)") as caught:
        task_of(name).check_targets(targets, "set (train)")
    assert "\n" not in str(caught.value)


BAD_OUTPUTS = [
    ("classification", (2, 3, 4), torch.tensor([0, 1])),
    ("classification", (3, 4), torch.tensor([0, 1])),
    ("classification", (2, 4), torch.tensor([[0.5, 0.5], [0.5, 0.5]])),
    ("tokens", (2, 4), torch.tensor([[0, 1], [0, 1]])),
    ("tokens", (2, 4, 2), torch.tensor([[0, 1], [0, 1]])),
    ("segmentation", (1, 2, 3, 3), torch.zeros(1, 2, 3, dtype=torch.long)),
    ("regression", (2,), torch.zeros(2, 1)),
    ("multilabel", (2, 1), torch.zeros(2, 2)),
]


@pytest.mark.parametrize(("name", "shape", "targets"), BAD_OUTPUTS)
def test_outputs_that_do_not_fit_are_refused(name, shape, targets):
    task = task_of(name)
    task.check_targets(targets, "set")
    with pytest.raises(ModelError, match=f"--task {name} expects"):
        task.check_outputs(torch.zeros(shape), targets, "net")


def test_integer_outputs_are_refused():
    with pytest.raises(ModelError, match="type int64"):
        Classification().check_outputs(torch.zeros(2, 3).long(), torch.tensor([0, 1]), "net")


@pytest.mark.parametrize("index", [-100, 255, 1])
def test_the_ignored_index_is_no_class(index):
    assert Segmentation(ignore_index=index).num_outputs(torch.tensor([[[0, index, 2]]])) == 3


def test_class_weights_need_classes():
    with pytest.raises(ConfigError, match="--task regression has none"):
        task_of("regression", class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="2 weights, the model gives 3"):
        task_of("classification", class_weights=(1.0, 2.0)).check_outputs(
            torch.zeros(2, 3), torch.tensor([0, 1]), "net"
        )


@pytest.mark.parametrize("name", TASKS)
def test_what_makes_no_sense_is_refused_by_name(name):
    task = task_of(name)
    for regularizer, reason in task.refuses.items():
        assert regularizer in {"mixup", "cutout", "dropout", "label-smoothing", "confidence"}
        assert reason
    if "label-smoothing" in task.refuses:
        with pytest.raises(ConfigError, match=f"--task {name}"):
            task.smoothed(0.1)
    if "confidence" in task.refuses:
        with pytest.raises(ConfigError, match=f"--task {name}"):
            task.entropy(torch.zeros(2, 2), torch.zeros(2, 2))
    if "mixup" in task.refuses:
        with pytest.raises(ConfigError, match=f"--task {name}"):
            task.mixable(torch.zeros(2, 2), 2)
