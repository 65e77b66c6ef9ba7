"""Second derivatives of a model's own operations, for which PyTorch does not answer."""

from __future__ import annotations

from collections.abc import Iterator

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.curvature.checks.copies import checked, tries
from hesstrace_cli.curvature.checks.verdicts import Row, is_settled, merged
from hesstrace_cli.curvature.data_loss import Batch, DataLoss
from hesstrace_cli.curvature.per_example.linearity import own_functions
from hesstrace_cli.errors import DerivativeError

_EXAMPLES = 64  # of a batch: a Function may matter to few


def check_own_functions(data: DataLoss, curvature: str, seed: int) -> list[str]:
    """Hold products with H or G against differences where a model runs its own Functions.

    All batches are looked at, each Function is tried on the first that runs it.

    Args:
        data: The loss, its model in its mode.
        curvature: "hessian" or "ggn".
        seed: Of the directions looked along.

    Returns:
        A clause for each of what differences do not settle.

    Raises:
        DerivativeError: If the product is wrong, or there is none.
    """
    return data.ranks.together(lambda: list(_doubts(data, curvature, seed)))


def _doubts(data: DataLoss, curvature: str, seed: int) -> Iterator[str]:
    known: set[str] = set()
    for batch in data:
        functions = own_functions(native_outputs(data.objective.model, batch.X)) - known
        known |= functions
        if not functions:
            continue
        names = ", ".join(sorted(functions))
        rows = _rows(data, batch, curvature, seed)
        bad = [row for row in rows if row.verdict in ("wrong", "refused")]
        if bad:
            what = "is wrong" if bad[0].verdict == "wrong" else "does not exist"
            raise DerivativeError(
                f"the model runs {names}, and its second derivative {what} ({bad[0].check}: "
                f"{bad[0].detail}); write its backward so that it can be differentiated, without "
                "detach(), no_grad() or numbers"
            )
        if not is_settled(rows):
            yield f"differences do not settle, so that {names} is not proved"


def _rows(data: DataLoss, batch: Batch, curvature: str, seed: int) -> list[Row]:
    rows: list[Row] = []
    first = min(_EXAMPLES, len(batch.X))
    for X, y, number in tries(data.objective, batch.X, batch.y, first, seed):
        with checked(data.objective, X, y, seed=number) as check:
            found = check.estimate_of_ggn() if curvature == "ggn" else check.estimate()
        rows = merged(rows, found)
        if is_settled(rows):
            break
    return rows
