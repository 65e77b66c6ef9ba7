"""Whether tr(H) = tr(G), decided from the operations that a forward pass has executed.

    tr(H) - tr(G) = (1/N) sum_i sum_c [dl/df_c] sum_w d2 f_c / dw2

vanishes where every logit is (piecewise) linear in every single weight w, the others held. The
graph that autograd has recorded is searched for that: a sum of such functions is one; so is a
product of two that share no weight; an operation that is not known here counts as neither.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hesstrace_cli.autodiff.graph import Params, topological

# Names of autograd's nodes, without "Backward" and number. Linear in all their operands at once:
_LINEAR = frozenset({
    "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "Alias", "AvgPool2D", "AvgPool3D", "Cat",
    "Clone", "Col2Im", "Complex", "Conj", "ConjPhysical", "ConstantPadNd", "Copy", "Cumsum",
    "Diagonal", "Embedding", "Expand", "FftC2C", "FftC2R", "FftR2C", "Flip", "Gather", "Im2Col",
    "Index", "IndexSelect", "MaskedFill", "Mean", "Neg", "NegView", "Permute", "PixelShuffle",
    "PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D", "Repeat", "ReplicationPad1D",
    "ReplicationPad2D", "ReshapeAlias", "Roll", "Rsub", "SafeSplit", "Select", "Slice", "Split",
    "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose", "Tril", "Triu",
    "Unbind", "Unfold", "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearestExact2D", "View", "ViewAsComplex",
    "ViewAsReal",
})  # fmt: skip
# Linear in each of the pieces that their operands' space is cut into, if these are real:
_PIECEWISE = frozenset({
    "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Clamp", "ClampMax",
    "ClampMin", "Hardshrink", "Hardtanh", "LeakyRelu", "Max", "Maximum", "MaxPool2DWithIndices",
    "MaxPool3DWithIndices", "Min", "Minimum", "Relu", "Softshrink", "Sort", "Threshold", "Topk",
    "Where",
})  # fmt: skip
# The two operands that are multiplied, by their place among the node's inputs:
_PRODUCTS = {
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Baddbmm": (1, 2),
    "Bmm": (0, 1),
    "Convolution": (0, 1),
    "Dot": (0, 1),
    "Mm": (0, 1),
    "Mul": (0, 1),
    "Mv": (0, 1),
    "PreluKernel": (0, 1),
}
_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


def operation(node: Any) -> str:
    """The name of the operation behind a node of the graph: "AddmmBackward0" is "Addmm".

    A user's own `autograd.Function` may be called anything: its name is marked.
    """
    if isinstance(node, BackwardCFunction):
        return f"autograd.Function {type(node).__name__.removesuffix('Backward')}"
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def own_functions(outputs: Tensor) -> set[str]:
    """The operations behind some outputs whose backward is not PyTorch's own, but a user's."""
    return {
        operation(node) for node in topological(outputs)
        if isinstance(node, BackwardCFunction) or "CppNode" in node.name()
    }  # fmt: skip


def why_not_linear(logits: Tensor, params: Params) -> str | None:
    """What keeps the logits from being piecewise linear in each single weight.

    Args:
        logits: The output of a forward pass, with the graph that it has recorded.
        params: The trainable parameters by name.

    Returns:
        None where tr(H) = tr(G); else a clause that names the operation or the weight.
    """
    names = {id(p): name for name, p in params.items()}
    bits = {name: 1 << i for i, name in enumerate(params)}
    below: dict[Any, int] = {}  # for every node, the set of parameters that it depends on
    for node in topological(logits):
        if hasattr(node, "variable"):
            below[node] = bits.get(names.get(id(node.variable), ""), 0)
            continue
        inputs = [0 if n is None else below[n] for n, _ in node.next_functions]
        below[node] = 0
        for each in inputs:
            below[node] |= each
        if below[node] == 0:
            continue
        problem = _problem(node, inputs)
        if isinstance(problem, int):
            shared = next(name for name, bit in bits.items() if bit & problem)
            return f"{shared!r} meets itself in {operation(node).lower()}: it is used twice"
        if problem is not None:
            return problem
    return None


def _problem(node: Any, inputs: list[int]) -> str | int | None:
    """A clause, or the set of the parameters that both factors of a product depend on."""
    name = operation(node)
    if name in _LINEAR:
        return None
    if name in _PIECEWISE:
        is_curved = name != "Where" and _takes_complex(node)
        return f"{name!r} of a complex number is not piecewise linear" if is_curved else None
    if name in _PRODUCTS:
        first, second = (inputs[i] if i < len(inputs) else 0 for i in _PRODUCTS[name])
        return first & second or None
    if name == "Div":
        divided_by = inputs[1] if len(inputs) > 1 else 0
        return "it divides by what depends on the weights" if divided_by else None
    if name in _BATCH_NORMS:
        if node._saved_training:
            return "batch norm takes its statistics from the batch"
        return inputs[0] & inputs[1] or None
    return f"{name!r} is not known to be piecewise linear"


def _takes_complex(node: Any) -> bool:
    return any(
        following is not None and following._input_metadata[place].dtype.is_complex
        for following, place in node.next_functions
    )
