"""The penalty in a loop of one's own: its gradient, and all that such loops do beside it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import nn

import hesstrace_cli
from hesstrace_cli import TracePenalty, differentiable
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature import probes
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ConfigError, DataError, DerivativeError, ModelError
from hesstrace_cli.tasks import Tokens
from tests.curvature import oracles
from tests.curvature.zoo import make

N, D, C = 4, 2, 2


class Small(nn.Module):
    """With a norm, so that the penalty has much to go wrong at."""

    def __init__(self, norm=True):
        super().__init__()
        self.first, self.second = nn.Linear(D, 3), nn.Linear(3, C)
        self.norm = nn.LayerNorm(3) if norm else nn.Identity()

    def forward(self, X):
        return self.second(torch.tanh(self.norm(self.first(X))))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def filled(model, seed=0):
    """The same weights each time, in double precision."""
    model = model.double()
    for i, p in enumerate(model.parameters()):
        p.data = 0.5 * normal(*p.shape, seed=100 * seed + i)
    return model


X, Y = normal(N, D, seed=1), torch.arange(N) % C


def gradient(model, loss):
    return torch.cat([
        g.flatten() for g in torch.autograd.grad(loss, list(trainable(model).values()))
    ])  # fmt: skip


def penalised(model, penalty, X, y):
    """The gradient of a step's loss, written as a user writes it."""
    if penalty._settings["curvature"] != "hessian" and penalty._settings["penalty_examples"] == 1:
        with differentiable():
            outputs = model(X)
        return gradient(model, F.cross_entropy(outputs, y) + penalty(outputs, y))
    return gradient(model, penalty.loss(X, y))


def dense_trace_gradient(model, X, y, curvature, step=1e-4):
    """d tr / dw by differences of the trace of dense matrices, in the gradient's order."""
    params = trainable(model)

    def trace():
        objective = Objective(model, params)
        dense = oracles.dense_hessian(objective, X, y) if curvature == "hessian" else (
            oracles.dense_ggn(objective, X)
        )  # fmt: skip
        return dense.trace().item()

    slopes = []
    for p in params.values():
        flat = p.data.view(-1)
        for i in range(len(flat)):
            at, ends = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = at + sign * step
                ends.append(trace())
            flat[i] = at
            slopes.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.fixture(scope="module")
def truths():
    """By curvature: the gradients of the loss and of the trace."""
    model = filled(Small())
    plain = gradient(model, F.cross_entropy(model(X), Y))
    return {c: (plain, dense_trace_gradient(model, X, Y, c)) for c in ("ggn", "hessian")}


class AllDraws:
    """In place of chance: the rows of a Hadamard matrix as signs, every choice of what is kept.

    The mean of v v^T over the rows is I exactly, so that of a sample and of its gradient, which
    are quadratic in v, is what it is over all signs.
    """

    def __init__(self, monkeypatch, size):
        self.rows = torch.tensor(hadamard(size), dtype=torch.float64)
        for name in ("rademacher", "balanced_signs"):
            monkeypatch.setattr(probes, name, self._signs)
        monkeypatch.setattr(torch, "randperm", self._order)

    def _signs(self, like, *, generator):
        first, self.used = self.used, self.used + like.numel()
        assert self.used <= len(self.rows)
        return self.row[first : self.used].reshape(like.shape).to(like)

    def _order(self, n, **_):
        return torch.tensor([*self.first, *(i for i in range(n) if i not in self.first)])

    def mean(self, draw, choices=((),)):
        """Over all rows and choices of the gradient that `draw()` gives."""
        total, count = 0, 0
        for first, row in itertools.product(choices, self.rows):
            self.first, self.row, self.used = first, row, 0
            total, count = total + draw(), count + 1
        return total / count


TENSORS, EXAMPLES = range(6), range(N)
OPTIONS = {
    "all tensors": ({"form": "batch", "estimator": "hutchinson"}, [()]),
    "half the tensors": ({"form": "batch"}, list(itertools.combinations(TENSORS, 3))),
    "blocks": ({"form": "batch", "dropout_scheme": "block"}, [(i,) for i in TENSORS]),
    "by example": ({"form": "example", "estimator": "hutchinson"}, [()]),
    "default, by example, half the tensors": (
        {}, list(itertools.combinations(range(4), 2))
    ),
    "half the examples": (
        {"penalty_examples": 0.5, "form": "example", "estimator": "hutchinson"},
        list(itertools.combinations(EXAMPLES, 2)),
    ),
    "half the examples, batch form": (
        {"penalty_examples": 0.5, "form": "batch", "estimator": "hutchinson"},
        list(itertools.combinations(EXAMPLES, 2)),
    ),
    "H": ({"curvature": "hessian", "estimator": "hutchinson"}, [()]),
    "H, a sixth of the tensors": (
        {"curvature": "hessian", "keep_prob": 0.17}, [(i,) for i in TENSORS]
    ),
    "H, half the examples": (
        {"curvature": "hessian", "penalty_examples": 0.5, "estimator": "hutchinson"},
        list(itertools.combinations(EXAMPLES, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_the_mean_gradient_over_all_draws_is_that_of_the_dense_trace(option, truths, monkeypatch):
    settings, choices = OPTIONS[option]
    settings = {"curvature": "ggn", **settings}
    plain, of_trace = truths[settings["curvature"]]
    model = filled(Small())
    penalty = TracePenalty(model, 0.3, **settings)
    penalised(model, penalty, X, Y)  # looks at the derivatives, by chance
    draws = AllDraws(monkeypatch, 32)

    def draw():
        grad = penalised(model, penalty, X, Y)
        penalty.step()
        return grad

    mean = draws.mean(draw, choices)
    torch.testing.assert_close(mean, plain + 0.3 * of_trace, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{"num_probes": 2}, {"dropout_scheme": "entry"}], ids=str)
def test_two_probes_and_entries_are_unbiased(settings, truths):
    plain, of_trace = truths["ggn"]
    model, draws = filled(Small()), []
    penalty = TracePenalty(model, 0.3, form="example", **settings)
    for _ in range(300):
        draws.append(penalised(model, penalty, X, Y))
        penalty.step()
    draws = torch.stack(draws)
    error = (draws.mean(0) - plain - 0.3 * of_trace).square().sum()
    assert error < 5 * draws.var(0).sum() / len(draws)
    assert error < (0.1 * of_trace).square().sum()


def test_the_first_step_is_like_the_others():
    """Trying derivatives between forward and backward pass leaves the graph whole."""
    model = filled(Small())
    penalty = TracePenalty(model, 1.0)
    assert repr(penalty) == "TracePenalty(Small, 1, task='auto', curvature='auto', at step 0)"
    first, second = penalised(model, penalty, X, Y), penalised(model, penalty, X, Y)
    assert torch.equal(first, second)
    assert penalty.trace > 0


@pytest.mark.parametrize("name", ["transformer", "tied", "batch_norm_1d", "lstm"])
@pytest.mark.parametrize("form", ["batch", "example"])
def test_it_is_the_regularizers_own_for_other_models(name, form):
    """In a train-mode model the first sample of the loop is that of the library's `loss`."""
    model, inputs, y = make(name, train=True)
    penalty = TracePenalty(model, 1.0, form=form)
    with differentiable():
        outputs = model(inputs)
    loop = gradient(model, F.cross_entropy(outputs, y) + penalty(outputs, y))
    penalty._seen = 0
    torch.testing.assert_close(loop, gradient(model, penalty.loss(inputs, y)))


# -- other loops


def test_accumulation_of_four_is_one_big_batch():
    grads = []
    for parts in (1, 4):
        model = filled(Small())
        penalty = TracePenalty(model, 0.3, form="example")
        penalty.step()
        total = 0
        for inputs, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            total = total + penalised(model, penalty, inputs, y) / parts
        grads.append(total)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-13)


def test_accumulation_in_the_batch_form_is_unbiased(truths):
    plain, of_trace = truths["ggn"]
    model, draws = filled(Small()), []
    penalty = TracePenalty(model, 0.3, form="batch")
    for _ in range(200):
        halves = zip(X.chunk(2), Y.chunk(2), strict=True)
        draws.append(sum(penalised(model, penalty, *half) for half in halves) / 2)
        penalty.step()
    draws = torch.stack(draws)
    error = (draws.mean(0) - plain - 0.3 * of_trace).square().sum()
    assert error < 5 * draws.var(0).sum() / len(draws)


def train(model, penalty, steps, *, scaler=None, dtype=None):
    """A usual loop in float32; the last losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            with differentiable():
                outputs = model(X.float())
            loss = F.cross_entropy(outputs.float(), Y) + penalty(outputs, Y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        penalty.step()
        losses.append(loss.item())
    return losses


def test_the_penalty_may_be_taken_inside_of_autocast_or_outside():
    values = []
    for inside in (True, False):
        model = filled(Small()).float()
        penalty = TracePenalty(model, 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            with differentiable():
                outputs = model(X.float())
            if inside:
                values.append(penalty(outputs, Y).item())
        if not inside:
            values.append(penalty(outputs, Y).item())
    assert values[0] == pytest.approx(values[1], rel=0.02)


@pytest.mark.parametrize("form", ["batch", "example"])
def test_in_bfloat16_the_penalty_is_close(form):
    values = []
    for dtype in (None, torch.bfloat16):
        model = filled(Small()).float()
        penalty = TracePenalty(model, 0.01, form=form, estimator="hutchinson")
        train(model, penalty, 1, dtype=dtype)
        values.append(penalty.trace.item())
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_overflows_of_float16_are_left_out_and_the_penalty_goes_on():
    model = filled(Small()).float()
    penalty = TracePenalty(model, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    before = copy.deepcopy(model.state_dict())
    train(model, penalty, 1, scaler=scaler, dtype=torch.float16)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())  # left out
    losses = train(model, penalty, 60, scaler=scaler, dtype=torch.float16)
    assert scaler.get_scale() < 2.0**40
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_memory_does_not_grow():
    model = filled(Small()).float()
    penalty = TracePenalty(model, 0.01)

    def tensors_after(steps):
        train(model, penalty, steps)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    assert tensors_after(250) == tensors_after(250)


def test_channels_last_gives_the_same():
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, C)
        )
        model = filled(model).to(memory_format=layout)
        images = normal(N, 2, 6, 6).contiguous(memory_format=layout)
        grads.append(penalised(model, TracePenalty(model, 0.1, form="example"), images, Y))
    torch.testing.assert_close(*grads)


def test_dropout_and_running_statistics_are_those_of_the_loop_without_penalty():
    def one_step(with_penalty):
        torch.manual_seed(3)
        model = filled(nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Dropout(0.5),
                                     nn.Linear(6, C)))  # fmt: skip
        penalty, seen = TracePenalty(model, 0.1), []
        for _ in range(3):
            with differentiable():
                seen.append(model(X))
            if with_penalty:
                penalty(seen[-1], Y).backward()
                penalty.step()
        return [*seen, *model.buffers(), torch.get_rng_state()]

    for own, other in zip(one_step(True), one_step(False), strict=True):
        torch.testing.assert_close(own, other)


# -- which parameters


def test_frozen_parameters_are_left_out_and_a_thawed_one_is_taken_in():
    model = filled(Small())
    model.first.requires_grad_(False)
    penalty = TracePenalty(model, 1.0, estimator="hutchinson", form="example")
    penalised(model, penalty, X, Y)
    assert "of 4 tensors" in penalty.description()["form_reason"]
    model.first.requires_grad_(True)
    penalised(model, penalty, X, Y)
    assert "of 6 tensors" in penalty.description()["form_reason"]


def test_under_lora_only_what_trains_is_penalised():
    class Lora(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer.requires_grad_(False)
            self.A = nn.Parameter(torch.zeros(2, layer.in_features))
            self.B = nn.Parameter(torch.zeros(layer.out_features, 2))

        def forward(self, X):
            return self.layer(X) + X @ self.A.T @ self.B.T

    model = Small()
    model.first, model.second = Lora(model.first), Lora(model.second)
    model.norm.requires_grad_(False)
    model = filled(model)
    objective = Objective(model, trainable(model))
    assert set(objective.params) == {"first.A", "first.B", "second.A", "second.B"}
    truth = oracles.dense_ggn(objective, X).trace()
    penalty = TracePenalty(model, 1.0, estimator="hutchinson")
    values = []
    for _ in range(200):
        penalised(model, penalty, X, Y)
        values.append(penalty.trace)
        penalty.step()
    values = torch.stack(values)
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5


# -- what it says of itself


def test_every_and_warm_up_count_steps():
    model = filled(Small())
    penalty = TracePenalty(model, 1.0, every=2, warmup_steps=4)
    weights = []
    for _ in range(8):
        with differentiable():
            outputs = model(X)
        value = penalty(outputs, Y)
        weights.append((value / penalty.trace).item() if value.requires_grad else 0.0)
        penalty.step()
    assert weights == pytest.approx([0, 0, 0.5, 0, 1, 0, 1, 0])


def test_a_resumed_penalty_goes_on():
    model = filled(Small())
    grads = []
    for interrupted in (False, True):
        penalty = TracePenalty(model, 1.0, warmup_steps=5)
        for _ in range(2):
            penalised(model, penalty, X, Y)
            penalty.step()
        if interrupted:
            state = penalty.state_dict()
            penalty = TracePenalty(model, 1.0, warmup_steps=5)
            penalty.load_state_dict(state)
        grads.append(penalised(model, penalty, X, Y))
    assert torch.equal(*grads)


def test_seeds_are_streams_and_generators_are_not_advanced():
    model, generator = filled(Small()), seeded(5)
    before = generator.get_state()
    grads = [
        penalised(model, TracePenalty(model, 1.0, generator=g), X, Y)
        for g in (generator, seeded(5), None)
    ]
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])
    assert torch.equal(before, generator.get_state())


def test_targets_may_be_missing_where_nothing_hangs_on_them():
    model = filled(Small())
    grads = []
    for targets in (Y, None):
        penalty = TracePenalty(model, 1.0, task="classification")
        with differentiable():
            outputs = model(X)
        grads.append(gradient(model, penalty(outputs, targets)))
    assert torch.equal(*grads)


def test_copies_and_files_of_the_model_carry_nothing_of_it():
    model = filled(Small())
    penalty = TracePenalty(model, 1.0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(X)
    assert penalty._watch.inputs(N) is None
    penalised(model, penalty, X, Y)
    assert not model._forward_pre_hooks


def test_gradients_that_are_there_stay():
    model = filled(Small())
    F.cross_entropy(model(X), Y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    TracePenalty(model, 1.0).loss(X, Y)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


# -- what is refused


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, X):
        h = self.first(X).view(len(X), 1, 1, 4).expand(-1, 1, 3, 4)
        return self.last(F.scaled_dot_product_attention(h, h, h)[:, 0, 0])


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(D, C)), nn.Tanh())


@pytest.mark.parametrize("model", [Attention, weight_normed], ids=["attention", "weight norm"])
def test_a_forgotten_differentiable_is_found(model):
    model = filled(model())
    penalty = TracePenalty(model, 1.0)
    with pytest.raises(DerivativeError, match=r"outside hesstrace_cli.differentiable\(\)"):
        penalty(model(X), Y)
    penalised(model, penalty, X, Y)
    with pytest.raises(DerivativeError, match=r"outside hesstrace_cli.differentiable\(\)"):
        penalty(model(X), Y)  # later too


def test_where_nothing_is_replaced_it_may_be_forgotten():
    model = filled(Small())
    penalty = TracePenalty(model, 1.0)
    grads = [gradient(model, penalty(model(X), Y))]
    with differentiable():
        outputs = model(X)
    grads.append(gradient(model, penalty(outputs, Y)))
    torch.testing.assert_close(*grads)


def test_of_tr_h_the_outputs_are_not_enough():
    """A layer norm's third derivative would be wrong."""
    model = filled(Small())
    penalty = TracePenalty(model, 1.0, curvature="hessian")
    with pytest.raises(ConfigError, match=r"penalty.loss\(X, y\)"):
        penalty(model(X), Y)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X):
        ctx.save_for_backward(X)
        return torch.tanh(X)

    @staticmethod
    def backward(ctx, slope):
        (X,) = ctx.saved_tensors
        return slope * (1 - torch.tanh(X.detach()) ** 2)


class Wrong(Small):
    def forward(self, X):
        return self.second(WrongBackward.apply(self.first(X)))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_wrong_derivative_is_refused_before_the_first_step(curvature):
    model = filled(Wrong())
    penalty = TracePenalty(model, 1.0, curvature=curvature)
    with pytest.raises(DerivativeError, match="wrong"):
        penalised(model, penalty, X, Y)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("settings", [{}, {"form": "example"}, {"curvature": "hessian"}], ids=str)
def test_a_compiled_forward_pass_serves_the_loss_and_not_the_penalty(settings):
    model = filled(Small())
    grads = [gradient(model, TracePenalty(model, 0.3, **settings).loss(X, Y))]
    fast = compiled(model)
    penalty = TracePenalty(fast, 0.3, **settings)
    grads.append(gradient(model, penalty.loss(X, Y)))
    torch.testing.assert_close(*grads)
    if "curvature" not in settings:
        with pytest.raises(DerivativeError, match=r"compiled code.*penalty.loss\(X, y\)"):
            penalty(fast(X), Y)


def refused(call, kind, *words):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "--" not in message
    assert "\n" not in message
    for word in words:
        assert word in message


WRONG = {
    "keep_prob": ({"keep_prob": 2.0}, "keep_prob is 2"),
    "estimator": ({"estimator": "hutch"}, "estimator is 'hutch'"),
    "form": ({"form": "example", "curvature": "hessian"}, 'form="example"'),
    "strength": ({"strength": -1.0}, "strength is -1"),
    "strength huge": ({"strength": 10**400}, "strength is "),
    "strength nan": ({"strength": float("nan")}, "strength is nan"),
    "every": ({"every": 0}, "every is 0"),
    "warmup_steps": ({"warmup_steps": -1}, "warmup_steps is -1"),
    "penalty_examples": ({"penalty_examples": 1.5}, "penalty_examples is 1.5"),
    "task": ({"task": "clasification"}, "classification"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    settings, word = WRONG[name]

    def call():
        model = filled(Small())
        penalty = TracePenalty(model, **{"strength": 1.0, **settings})
        penalty(model(X), Y)

    refused(call, ConfigError, word)


def test_wrong_batches_are_one_line():
    def fresh(**settings):
        model = filled(Small())
        return model, TracePenalty(model, 1.0, **settings)

    model, penalty = fresh()
    refused(lambda: penalty(model(X).detach(), Y), ModelError, "no graph")
    refused(lambda: penalty(model(X)), ConfigError, "targets are missing", "task=")
    refused(lambda: penalty(model(X), F.one_hot(Y).double()), ConfigError, "multilabel")
    refused(lambda: penalty.loss(X, Y[:3]), DataError, "4 inputs and 3 targets")
    refused(lambda: penalty.loss(X, [1, 2]), DataError, "a list of 2")
    refused(lambda: penalty(model(X), [0, 1, 0, 1]), DataError, "a list")
    refused(lambda: TracePenalty(model, 1.0, generator=3), ConfigError, "torch.Generator")
    refused(lambda: TracePenalty("resnet18", 1.0), ConfigError, "a str")
    model, penalty = fresh()
    refused(lambda: penalty(model(X), Y + 7), ModelError, "gives 2 outputs", "up to 8")
    model, penalty = fresh()
    refused(lambda: penalty(model(X)[:, :1], Y), ModelError, "(4, 1)", "(4, 2)")
    model, penalty = fresh()
    outputs = filled(Small(), 1)(X)
    refused(lambda: penalty(outputs, Y), ModelError, "before the forward pass")
    model, penalty = fresh(penalty_examples=0.5)
    refused(lambda: penalty(model(X), Y), ConfigError, "penalty.loss(X, y)")


def test_tokens_with_an_ignored_index_and_dict_inputs():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.head(self.embedding(input_ids)) * attention_mask[..., None]}

    model = filled(Tagger())
    ids = torch.arange(24).reshape(6, 4) % 7
    batch = {"input_ids": ids, "attention_mask": (ids != 3).double()}
    y = torch.where(ids > 4, 0, ids % 5)
    penalty = TracePenalty(model, 1.0, task=Tokens(ignore_index=0), form="example")
    with differentiable():
        outputs = model(**batch)
    loss = F.cross_entropy(outputs["logits"].flatten(0, 1), y.flatten(), ignore_index=0)
    loop = gradient(model, loss + penalty(outputs, y))
    penalty._seen = 0
    torch.testing.assert_close(loop, gradient(model, penalty.loss(batch, y)))


def test_the_names_are_there_without_torch():
    assert hesstrace_cli.TracePenalty is TracePenalty
    assert set(hesstrace_cli.__all__) <= set(dir(hesstrace_cli))
    with pytest.raises(AttributeError, match="TracePenality"):
        _ = hesstrace_cli.TracePenality
