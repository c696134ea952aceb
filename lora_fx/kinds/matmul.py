"""Matrix products with a parameter on either side: matmul, mm, bmm, addmm, baddbmm, tensordot, chains.

``y = x W`` has ``W: (.., in, out)`` and ``y = W x`` has ``W: (.., out, in)``; leading axes are a stack
of matrices. transformers' ``Conv1D`` is ``addmm(b, x, W)`` with ``W: (in, out)``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.kinds.base import (
    NOWHERE,
    Branch,
    Call,
    Kind,
    LiveParts,
    Operand,
    add_rows,
    has_weight,
    low_rank,
    shape_of,
)
from lora_fx.kinds.expected import Expected, Work, added
from lora_fx.kinds.fused_linear import expected_linear, fusable, fused_linear
from lora_fx.matrix import MatrixForm, columns_form

_FACTORS: Mapping[str, tuple[int, str, str]] = {
    "matmul": (0, "input", "other"),
    "linalg_matmul": (0, "input", "other"),
    "mm": (0, "input", "mat2"),
    "bmm": (0, "input", "mat2"),
    "mv": (0, "input", "vec"),
    "addmm": (1, "mat1", "mat2"),
    "addmv": (1, "mat", "vec"),
    "addbmm": (1, "batch1", "batch2"),
    "baddbmm": (1, "batch1", "batch2"),
    "sparse_mm": (0, "mat1", "mat2"),
}
"""The position of the left factor, and the names of both."""
_IN_PLACE = frozenset({"addmm_", "addmv_", "addbmm_", "baddbmm_"})
_CHAINS = frozenset({"linalg_multi_dot", "multi_dot", "chain_matmul"})


def adapted_addmm(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    lora: LiveParts,
) -> Tensor:
    """Return ``beta * input + alpha * (x W0 + sum over parts of scale * (x A^T) B^T)`` for ``x = mat1``."""
    if lora and _is_linear(beta, alpha, input.dim(), mat1.dim()) and fusable(mat1, mat2, input, lora):
        return fused_linear(mat1, mat2, input, lora, columns=True)
    result = torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
    for part in lora:
        result = add_rows(result, low_rank(mat1, part), part.rows, -1, alpha)
    return result


def _is_linear(beta: float, alpha: float, bias: int, x: int) -> bool:
    """Say whether ``addmm`` on a bias and an input of so many dimensions is a linear."""
    return beta == 1 and alpha == 1 and bias == 1 and x == 2


class MatmulKind(Kind):
    """Matrix products; the weight is whichever factor is a parameter."""

    name = "matmul"
    ops = frozenset({*_FACTORS, *_IN_PLACE, *_CHAINS, "tensordot", "inner"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``addmm`` with the weight on the right."""
        return {"addmm": adapted_addmm}

    @property
    def branch_weight(self) -> Mapping[str, int]:
        """``addmm(bias, x, weight)``."""
        return {"addmm": 2}

    def branch_form(self, call: Call, shape: tuple[int, ...]) -> MatrixForm:
        """``x W``: columns first."""
        del call
        return columns_form(shape)

    def expected(self, call: Call, weight: tuple[int, ...], work: Work) -> Expected:
        """As a linear without the weight that is kept; with scaled terms, thin products."""
        bias, x = (shape_of(call.arg(i, name)) for i, name in enumerate(("input", "mat1")))
        if not _is_linear(call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1), len(bias), len(x)):
            return added(work, "an addmm with scales, or another bias than a vector")
        columns, out = weight
        return expected_linear(x[0], out, columns, work, keeps=False)

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """The ``Conv1D`` of transformers, where it is in use."""
        return _conv1d()

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """Both factors are places for a weight."""
        if call.op == "tensordot":
            return _tensordot(call)
        if call.op == "inner":
            return _inner(call)
        if call.op in _CHAINS:
            return _chain(call)
        place, left_name, right_name = _FACTORS[call.op.rstrip("_")]
        left, right = call.arg(place, left_name), call.arg(place + 1, right_name)
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return ()
        dims, found = (len(shape_of(left)), len(shape_of(right))), list[Operand]()
        if 1 in dims:
            # A vector may be one row of a weight: its other rows are multiplied elsewhere.
            vectors = [(w, x) for w, x in ((right, left), (left, right)) if len(shape_of(w)) == 1]
            found += [Operand(w, x, shape_of(w), (), (0,), channel=NOWHERE) for w, x in vectors]
        if dims[1] >= 2:
            batch, (inp, out) = _axes(dims[1])
            found.append(Operand(right, left, shape_of(right), (out,), (inp,), batch, channel=-1))
        if dims[0] >= 2:
            batch, (out, inp) = _axes(dims[0])
            channel = -1 if dims[1] == 1 else -2
            found.append(Operand(left, right, shape_of(left), (out,), (inp,), batch, channel=channel))
        return tuple(found)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of transformers' ``Conv1D``."""
        if isinstance(module, _conv1d()) and has_weight(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
            return {"weight": columns_form(tuple(weight.shape))}
        return {}


def _conv1d() -> tuple[type[nn.Module], ...]:
    """Return transformers' ``Conv1D`` if its module is loaded; a model that has one has loaded it."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def _axes(dims: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    return tuple(range(dims - 2)), (dims - 2, dims - 1)


def _inner(call: Call) -> tuple[Operand, ...]:
    """``inner(x, W)`` sums over the last axes of both."""
    left, right = call.arg(0, "input"), call.arg(1, "other")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return ()
    pairs = ((right, left, True), (left, right, False))
    return tuple(
        _contraction(weight, other, [-1], last=last)
        for weight, other, last in pairs
        if len(shape_of(weight)) >= 2
    )


def _chain(call: Call) -> tuple[Operand, ...]:
    """A product of several matrices: each after the first is multiplied from the right."""
    given = call.args[0] if call.args and isinstance(call.args[0], (list, tuple)) else call.args
    factors: Sequence[Any] = given or call.kwargs.get("tensors", ())
    if not all(isinstance(factor, fx.Node) for factor in factors):
        return ()
    found: list[Operand] = []
    channels = {0: -2, len(factors) - 1: -1}
    for place, factor in enumerate(factors):
        if len(shape_of(factor)) == 2:
            out, inp = ((0,), (1,)) if place == 0 else ((1,), (0,))
            other, channel = factors[1 if place == 0 else place - 1], channels.get(place, NOWHERE)
            found.append(Operand(factor, other, shape_of(factor), out, inp, channel=channel))
    return tuple(found)


def _tensordot(call: Call) -> tuple[Operand, ...]:
    left, right, dims = call.arg(0, "a"), call.arg(1, "b"), call.arg(2, "dims", 2)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return ()
    if isinstance(dims, int):
        n = len(shape_of(left))
        contracted = (list(range(n - dims, n)), list(range(dims)))
    elif isinstance(dims, Sequence) and len(dims) == 2:
        contracted = (_listed(dims[0]), _listed(dims[1]))
    else:
        return ()
    return (
        _contraction(right, left, contracted[1], last=True),
        _contraction(left, right, contracted[0], last=False),
    )


def _listed(axes: Any) -> list[int]:
    return [axes] if isinstance(axes, int) else [int(a) for a in axes]


def _contraction(weight: fx.Node, other: fx.Node, contracted: list[int], *, last: bool) -> Operand:
    shape = shape_of(weight)
    inp = tuple(sorted(axis % len(shape) for axis in contracted))
    out = tuple(axis for axis in range(len(shape)) if axis not in inp)
    free = len(shape_of(other)) - len(inp)
    return Operand(weight, other, shape, out, inp, channel=-1 if last else -1 - free)
