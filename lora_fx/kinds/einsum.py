"""``torch.einsum`` with a parameter among its operands.

An axis of the weight that the result keeps is *out*, or *batch* where another operand has it too; an
axis that is summed over is *in*: ``"bti,hio->bhto"`` has out = o, in = i and a stack over h if some
other operand has h, else out = (h, o). In the middle of a chain, ``"bi,io,ok->bk"``, what the first
other operand has (i) is *in* and the rest (o) *out*.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.kinds.base import NOWHERE, Call, Kind, Operand, shape_of


class EinsumKind(Kind):
    """Any equation with an explicit or implicit result."""

    name = "einsum"
    ops = frozenset({"einsum"})

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """Every operand is a place for a weight."""
        equation = call.arg(0, "equation")
        given = call.args[1:] or (call.kwargs.get("operands", ()),)
        tensors: list[Any] = (
            list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else [*given]
        )
        if not isinstance(equation, str) or not all(isinstance(t, fx.Node) for t in tensors):
            return ()  # the form with lists of axis numbers
        terms, result = _terms(equation, tensors)
        if len(terms) != len(tensors):
            return ()
        found = (_operand(i, terms, result, tensors) for i in range(len(tensors)))
        return tuple(operand for operand in found if operand is not None)


def _terms(equation: str, tensors: list[fx.Node]) -> tuple[list[list[str]], list[str]]:
    """Return the labels of every operand and of the result, with ``...`` spelt out from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spread = [len(shape_of(t)) - len(s.replace("...", "")) for s, t in zip(terms, tensors, strict=False)]
    most = max((n for s, n in zip(terms, spread, strict=False) if "..." in s), default=0)
    names = [f".{i}" for i in range(most)]
    if not arrow:
        once = sorted(label for label in set(left) - set(".,") if left.count(label) == 1)
        right = "..." * (most > 0) + "".join(once)
    labels = [_labels(s, names[most - n :]) for s, n in zip(terms, spread, strict=False)]
    return labels, _labels(right, names)


def _labels(term: str, spread: list[str]) -> list[str]:
    before, dots, behind = term.partition("...")
    return [*before, *(spread if dots else []), *behind]


def _operand(index: int, terms: list[list[str]], result: list[str], tensors: list[Any]) -> Operand | None:
    labels = terms[index]
    shape = shape_of(tensors[index])
    if len(set(labels)) != len(labels) or len(labels) != len(shape) or len(shape) < 2:
        return None  # a diagonal
    others = {label for i, term in enumerate(terms) if i != index for label in term}
    kept = [a for a, label in enumerate(labels) if label in result]
    out = tuple(a for a in kept if labels[a] not in others)
    batch = tuple(a for a in kept if labels[a] in others)
    inp = tuple(a for a, label in enumerate(labels) if label not in result)
    source = next((t for i, t in enumerate(tensors) if i != index), None)
    if len(inp) > 1 and not out:
        first = next((set(term) for i, term in enumerate(terms) if i != index), set[str]())
        inp, out = _split(inp, labels, first)
        return Operand(tensors[index], source, shape, out, inp, batch, channel=NOWHERE)
    if not inp or not out:
        return None  # no matrix: an elementwise product, or a sum
    channel = result.index(labels[out[-1]]) - len(result)
    return Operand(tensors[index], source, shape, out, inp, batch, channel=channel)


def _split(summed: tuple[int, ...], labels: list[str], first: set[str]) -> tuple[tuple[int, ...], ...]:
    """Return (in, out) of axes that are all summed over, as in the middle of a chain of products.

    In are those that the first other operand has; where that is all or none of them, all but the first.
    """
    inp = tuple(a for a in summed if labels[a] in first)
    if not inp or inp == summed:
        inp = summed[1:]
    return inp, tuple(a for a in summed if a not in inp)
