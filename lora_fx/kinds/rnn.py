"""Recurrent weights: LSTM, GRU, RNN and their cells, one matrix per gate.

``weight_ih: (gates x hidden, in)`` and ``weight_hh: (gates x hidden, hidden)`` are the stacks
``(gates, hidden, in)``, so every gate has its own A and B; a projection ``weight_hr`` is one matrix.
The whole recurrence is one call, so the adapters take the weight form.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.kinds.base import Call, Kind, Operand, shape_of
from lora_fx.matrix import MatrixForm

_GATES: Mapping[str, int] = {
    "lstm": 4,
    "gru": 3,
    "rnn_tanh": 1,
    "rnn_relu": 1,
    "lstm_cell": 4,
    "gru_cell": 3,
    "rnn_tanh_cell": 1,
    "rnn_relu_cell": 1,
}
_CELLS: Mapping[type[nn.Module], int] = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
_FLAT_WEIGHTS = "_flat_weights"


def gate_form(shape: tuple[int, ...], gates: int) -> MatrixForm:
    """Return the form of a recurrent weight: one matrix per gate."""
    view, out, inp, batch = _axes(shape, gates)
    return MatrixForm(shape, view, out=out, inp=inp, batch=batch)


def _axes(
    shape: tuple[int, ...], gates: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return (view, out, inp, batch)."""
    if gates == 1:
        return shape, (0,), (1,), ()
    return (gates, shape[0] // gates, shape[1]), (1,), (2,), (0,)


class RecurrentKind(Kind):
    """``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, their cells, and the operations that those call."""

    name = "recurrent"
    ops = frozenset(_GATES)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The weights are one flat list, layer by layer; a cell's are its third and fourth argument."""
        gates = _GATES[call.op]
        if call.op.endswith("_cell"):
            pairs = ((call.arg(2, "w_ih"), call.arg(0, "input")), (call.arg(3, "w_hh"), _first(call.args[1])))
            return tuple(_operand(weight, x, gates) for weight, x in pairs if isinstance(weight, fx.Node))
        # (input, hx, weights, ...), or (data, batch_sizes, hx, weights, ...) for a packed sequence.
        given = call.arg(2, "params")
        weights = given if isinstance(given, Sequence) and _all_matrices(given) else call.arg(3, "params")
        if not isinstance(weights, Sequence):
            return ()
        matrices = [w for w in weights if isinstance(w, fx.Node) and len(shape_of(w)) == 2]
        hidden = shape_of(matrices[0])[0] // gates if matrices else 0
        inner = [_gates_of(shape_of(w), gates, hidden) for w in matrices]
        return tuple(
            _operand(w, call.args[0] if i == 0 else None, n)
            for i, (w, n) in enumerate(zip(matrices, inner, strict=True))
        )

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weights of a stock recurrent module."""
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if isinstance(module, nn.RNNBase):
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            return {
                name: gate_form(tuple(p.shape), _gates_of(tuple(p.shape), gates, module.hidden_size))
                for name, p in own.items()
                if name in _flat_names(module) and p.dim() == 2
            }
        gates = next((n for cls, n in _CELLS.items() if isinstance(module, cls)), 0)
        names = ("weight_ih", "weight_hh") if gates else ()
        return {name: gate_form(tuple(own[name].shape), gates) for name in names if name in own}

    def attributes(self, cls: type[nn.Module]) -> Mapping[str, Any]:
        """``nn.RNNBase`` computes with a list of references to its weights: compute that list anew."""
        if not issubclass(cls, nn.RNNBase):
            return {}
        return {
            _FLAT_WEIGHTS: property(_flat_weights, _set_flat_weights),
            "_init_flat_weights": _refer_to_base,
            "_update_flat_weights": _refer_to_base,
            "flatten_parameters": _nothing,
        }


def _operand(weight: fx.Node, x: Any, gates: int) -> Operand:
    view, out, inp, batch = _axes(shape_of(weight), gates)
    return Operand(weight, x if isinstance(x, fx.Node) else None, view, out, inp, batch)


def _gates_of(shape: tuple[int, ...], gates: int, hidden: int) -> int:
    """Return the gates of one matrix: all of them, or one for an LSTM's projection."""
    return gates if shape[0] == gates * hidden else 1


def _all_matrices(values: Sequence[Any]) -> bool:
    """Tell a list of weights from a pair of states: its first two entries are matrices."""
    return len(values) >= 2 and all(len(shape_of(v)) == 2 for v in values[:2])


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) and value else value


def _flat_names(module: nn.RNNBase) -> list[str]:
    names: list[str] = vars(module)["_flat_weights_names"]
    return names


def _flat_weights(self: nn.RNNBase) -> list[Any]:
    """Return the weights as the recurrence reads them: the adapted ones effective."""
    return [getattr(self, name, None) for name in _flat_names(self)]


def _set_flat_weights(self: nn.RNNBase, weights: list[Any]) -> None:
    """Keep the list for the module's own class, to which it returns when it is folded or unloaded."""
    vars(self)[_FLAT_WEIGHTS] = weights


def _refer_to_base(self: nn.RNNBase) -> None:
    """Let that kept list name the base weights, and no effective one that a fold left there.

    A weight that is computed (by a parametrization) stays what it was: the own class computes it anew.
    """
    if torch.compiler.is_compiling():
        return  # the program that is captured reads the computed list, and nothing of this one
    own: Mapping[str, Tensor | None] = vars(self)["_parameters"]
    names, kept = _flat_names(self), vars(self)[_FLAT_WEIGHTS]
    weights = [own[n] if n in own else _detached(old) for n, old in zip(names, kept, strict=True)]
    vars(self)[_FLAT_WEIGHTS] = weights
    vars(self)["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]


def _detached(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


def _nothing(self: nn.RNNBase) -> None:
    """Do nothing: the weights are computed for each call, so there is no memory of theirs to arrange."""
    del self
