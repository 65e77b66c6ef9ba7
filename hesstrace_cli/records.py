"""The JSON records that commands write: their keys and types. What each says: docs/records.md."""

from typing_extensions import NotRequired, TypedDict

Numbers = dict[str, float | None]
"""Metrics by name; null where one is infinite or none."""


class Selection(TypedDict):
    """What the task picks by."""

    metric: str
    higher_is_better: bool


class Preprocess(TypedDict):
    """What is done to inputs."""

    mean: list[float] | None
    std: list[float] | None
    scale: float | None
    channels: int | None


class Origin(TypedDict):
    """Which checkpoint and data a record is of."""

    checkpoint: str
    epoch: int | None
    model: str
    dataset: str
    preprocess: Preprocess


class Layer(TypedDict):
    """The trace of a parameter's diagonal block."""

    name: str
    num_parameters: int
    trace: float
    stderr: float | None


class Report(TypedDict):
    """Losses on both splits, and what generalization bounds combine."""

    train_loss: float | None
    test_loss: float | None
    generalization_gap: float | None
    train_accuracy: float | None
    test_accuracy: float | None
    accuracy_gap: float | None
    train_metrics: Numbers
    metrics: Numbers
    input_jacobian: float | None
    input_jacobian_stderr: float | None
    trace: float


class Block(TypedDict):
    """The same by its name alone."""

    name: str
    trace: float
    stderr: float | None


class Estimated(TypedDict):
    """An estimate of a trace, and how it was made."""

    trace: float
    stderr: float | None
    ci95: list[float] | None
    method: str
    reason: str
    num_probes: int
    passes: int


class Estimate(Estimated):
    """An estimate with its blocks, as the library gives it."""

    per_layer: list[Block]


class Trace(Estimated):
    """`estimate-trace`, and the `trace` of a run's summary."""

    schema: str
    curvature: str
    num_examples: int
    num_population: int
    subset_stderr: float | None
    num_parameters: int
    loss: float
    accuracy: float | None
    collapsed: str | None
    task: str
    selection: Selection
    loss_name: str
    num_terms: int
    metrics: Numbers
    per_layer: NotRequired[list[Layer]]
    report: NotRequired[Report]
    split: str
    dtype: str
    device: str
    seed: int
    seconds: float
    versions: dict[str, str]
    checkpoint: NotRequired[str]
    epoch: NotRequired[int | None]
    model: NotRequired[str]
    dataset: NotRequired[str]
    preprocess: NotRequired[Preprocess]


class NoTrace(TypedDict):
    """The `trace` of a run whose model has none, and why."""

    trace: None
    stderr: None
    ci95: None
    method: None
    reason: str
    per_layer: list[Layer]
    checkpoint: str
    model: str
    dataset: str


class Epoch(TypedDict):
    """A line of `metrics.jsonl`."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    penalty_trace: float | None
    skipped_steps: NotRequired[int]
    val_loss: NotRequired[float | None]
    val_accuracy: NotRequired[float | None]
    val_metrics: NotRequired[Numbers]
    trace: NotRequired[float | None]
    trace_stderr: NotRequired[float | None]
    seconds: float


class TraceChange(TypedDict):
    """How tr(G) changed from the first step on, and by which of its factors."""

    before: float | None
    after: float | None
    with_curvature_after: float | None
    with_jacobian_after: float | None
    of_curvature: float | None
    of_curvature_stderr: float | None
    of_jacobian: float | None
    of_jacobian_stderr: float | None
    num_examples: int
    reason: str | None


class Figures(TypedDict):
    """What the weights of a run are judged by."""

    dataset: str
    model: str
    seed: int
    epochs: int
    task: str
    selection: Selection
    num_terms: int
    train_loss: float
    train_accuracy: float | None
    collapsed: str | None
    val_loss: float | None
    val_accuracy: float | None
    test_loss: float
    test_accuracy: float | None
    calibration_error: float | None
    metrics: Numbers
    train_metrics: Numbers
    val_metrics: Numbers | None
    trace: Trace | NoTrace
    trace_change: TraceChange | None
    input_jacobian: float | None
    top_eigenvalue: float | None


class Asked(TypedDict):
    """What a summary says beside its figures where it was asked for."""

    num_averaged: NotRequired[int]
    label_noise: NotRequired[float]


class Run(Figures, Asked):
    """`summary.json` of a run."""

    schema: str
    regularizers: str
    trace_penalty: dict[str, object] | None
    seconds: float
    device: str
    versions: dict[str, str]


class Density(TypedDict):
    """The spectral density."""

    grid: list[float]
    values: list[float]


class StabilityFigures(TypedDict):
    """Linear stability of training with a learning rate."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    threshold: float
    largest_over_threshold: float
    num_unstable: int
    num_unstable_is_lower_bound: bool
    largest_stable_lr: float | None
    linearly_stable: bool
    flow_unstable_directions: int
    flow_unstable_bounds: list[int]
    fastest_time_constant: float | None
    slowest_time_constant: float | None


class Stability(StabilityFigures):
    """The same, and in words."""

    sentence: str


class Sharpness(TypedDict):
    """The rise of the loss at a distance."""

    average: float | None
    average_stderr: float | None
    worst: float | None


class Flatness(TypedDict):
    """Sharpness by two distances."""

    radius: float
    num_directions: int
    plain: Sharpness
    filter_normalized: Sharpness


class Slice(TypedDict):
    """The loss along random directions, at every place of a grid."""

    dimensions: int
    grid: list[float]
    losses: list[float | None] | list[list[float | None]]


class Eigenvalues(TypedDict):
    """Of a matrix, and their density with its moments."""

    eigenvalues: list[float]
    residuals: list[float]
    smallest: float
    smallest_residual: float
    products: int
    density: Density
    trace: float
    trace_stderr: float | None
    frobenius_norm: float
    frobenius_norm_stderr: float | None
    negative_share: float
    negative_share_bounds: list[float]
    effective_dimension: float | None
    bulk_edge: float
    largest_over_bulk_edge: float | None


class ModelSpectrum(Eigenvalues):
    """`spectrum` of a model."""

    schema: str
    stability: Stability | None
    flatness: Flatness
    slice: Slice | None
    curvature: str
    num_examples: int
    num_parameters: int
    loss: float
    accuracy: float | None
    task: str
    selection: Selection
    loss_name: str
    num_terms: int
    metrics: Numbers
    device: str
    seed: int
    seconds: float
    versions: dict[str, str]


class Spectrum(Origin, ModelSpectrum):
    """`spectrum`."""

    split: str
    dtype: str


class Verdict(TypedDict):
    """A row of `verify`."""

    check: str
    verdict: str
    detail: str


class ModelVerification(TypedDict):
    """`verify` of a model."""

    task: str
    right: bool
    rows: list[Verdict]
    device: str
    seed: int
    versions: dict[str, str]


class Verification(ModelVerification):
    """`verify`."""

    schema: str
    model: str
    dataset: str
    task_note: str | None
    dtype: str


class Rise(TypedDict):
    """A predicted rise of the loss."""

    value: float
    stderr: float | None


class Weight(TypedDict):
    """What rounding a weight costs; what goes by bits has their number, a text, as key."""

    name: str
    shape: list[int]
    num_parameters: int
    trace: float
    stderr: float | None
    mean_trace: float
    mean_trace_stderr: float | None
    num_scales: int
    error: dict[str, float]
    rise: dict[str, Rise]
    slope: dict[str, float]
    large: list[int]


class Alone(TypedDict):
    """A weight rounded alone, measured."""

    name: str
    bits: int
    rise: float | None
    predicted: float
    stderr: float | None
    slope: float
    large: bool


class ByBits(TypedDict):
    """How prediction and measurement of the weights go together at a width."""

    bits: int
    rank_correlation: float | None
    rank_correlation_with_slope: float | None
    within_interval: float | None
    num_large: int


class Allocation(TypedDict):
    """A whole allocation, measured."""

    rule: str
    allocation: dict[str, int] | None
    average_bits: float | None
    size_mb: float | None
    predicted_rise: Rise | None
    rise: float | None
    spread: list[float] | None


class Measured(TypedDict):
    """What `--check` has measured."""

    alone: list[Alone]
    by_bits: list[ByBits]
    allocations: list[Allocation]


class Figured(TypedDict):
    """What an allocation costs."""

    allocation: dict[str, int]
    average_bits: float
    size_mb: float
    predicted_rise: Rise


class Chosen(Figured):
    """An allocation by traces, and which of its decisions hang on their errors."""

    flips: dict[str, list[int]]


class EstimatedBy(TypedDict):
    """How traces were estimated."""

    method: str
    reason: str


class ModelSensitivity(EstimatedBy):
    """`sensitivity` of a model."""

    schema: str
    weights: list[Weight]
    bits: list[int]
    per: str
    scale: str
    curvature: str
    loss: float
    metrics: Numbers
    task: str
    loss_name: str
    split: str
    num_examples: int
    num_terms: int
    num_parameters: int
    dtype: str
    device: str
    seed: int
    versions: dict[str, str]
    allocation: dict[str, int] | None
    average_bits: float | None
    size_mb: float | None
    predicted_rise: Rise | None
    flips: dict[str, list[int]] | None
    measured: Measured | None


class Sensitivity(Origin, ModelSensitivity):
    """`sensitivity`."""

    seconds: float


class ChosenRuns(TypedDict):
    """`chosen.json` of a comparison."""

    by: list[str]
    at_edge: NotRequired[list[str]]
    runs: list[str]


class RowOfEqualTime(TypedDict):
    """How long a row trains for the time of the slowest."""

    dataset: str
    model: str
    regularizer: str
    seconds_per_epoch: float | None
    epochs: int


class EqualTime(TypedDict):
    """`equal_time.json` of a comparison."""

    epochs: int
    settings: NotRequired[dict[str, object]]
    rows: list[RowOfEqualTime]


class Planned(TypedDict):
    """What a run of a comparison is."""

    dataset: str
    model: str
    regularizers: str
    seed: int


class Diverged(Planned):
    """The note of a run that stopped with a loss that is not finite."""

    reason: str


class Spread(TypedDict):
    """A figure over seeds."""

    mean: float | None
    std: float | None
    ci95: list[float] | None
    stderr: NotRequired[float | None]


class Difference(TypedDict):
    """A mean difference over seeds, paired."""

    mean: float | None
    ci95: list[float] | None
    p_value: float | None
    p_holm: NotRequired[float | None]


class Differences(TypedDict):
    """Of a row to another, measure by measure."""

    test_accuracy: Difference
    test_loss: Difference
    train_loss: Difference
    generalization_gap: Difference
    calibration_error: Difference
    trace: Difference
    input_jacobian: Difference
    top_eigenvalue: Difference
    metrics: dict[str, Difference]


class Row(TypedDict):
    """A row of a comparison."""

    regularizer: str
    strengths: dict[str, float]
    row_settings: dict[str, object]
    group: int
    settings: dict[str, object]
    dataset: str
    model: str
    task: str | None
    selection: Selection | None
    num_seeds: int
    num_diverged: int
    num_unfinished: int
    num_collapsed: int
    test_accuracy: Spread
    test_loss: Spread
    train_loss: Spread
    generalization_gap: Spread
    calibration_error: Spread
    trace: Spread
    input_jacobian: Spread
    top_eigenvalue: Spread
    metrics: dict[str, Spread]
    difference_to_none: Differences | None
    step_cost: float | None
    wins: list[str]
    runs: list[str]


class Comparison(TypedDict):
    """`results.json` of a comparison."""

    schema: str
    num_runs: int
    num_unfinished: int
    settings: list[dict[str, object]]
    chosen_by: NotRequired[list[str]]
    at_edge: NotRequired[list[str]]
    rows: list[Row]


class Trial(TypedDict):
    """A strength that `tune` tried."""

    strength: float
    epochs: int
    val_loss: float | None
    above_best: float | None
    stderr: float | None
    pruned: bool


class Tuning(TypedDict):
    """`tune`."""

    schema: str
    regularizer: str
    strength: float
    val_loss: float
    first: float
    trials: list[Trial]
    at_edge: bool
    range: list[float]
    budget: float
    spent: float
    step_cost: float
    run: str
    command: str
