"""What a kind of weight has to tell the passes: how it is matched, its matrix form, its branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.eager import widens
from lora_fx.kinds.expected import Expected, Work
from lora_fx.matrix import MatrixForm, Rows, rows_form


@dataclass(frozen=True)
class Call:
    """One recorded call as a kind sees it: canonical operation, arguments, result's shape.

    Arguments are fx Nodes (or nested lists of them) where they were tensors, and plain values
    otherwise.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shape: tuple[int, ...] | None = None

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the recorded shape of a tensor-valued node, or () where it has none."""
    if not isinstance(node, fx.Node):
        return ()
    return tuple(node.meta.get("shape", ()))


NOWHERE = 1 << 16
"""The ``channel`` of an operand whose output rows no axis of the call's result runs over."""


@dataclass(frozen=True)
class Operand:
    """One weight operand of a call.

    ``weight`` is the node that stands in the weight's place and ``input`` the node it is multiplied
    with. ``view`` is the operand's shape with axes split where the algebra needs it (groups of a
    transposed convolution); ``out``, ``inp`` and ``batch`` are axes of ``view``. ``channel`` is the
    axis of the call's result that runs over the output rows (negative: from the end).
    ``roles`` are roles that the operation itself gives to rows of the operand.
    """

    weight: fx.Node
    input: fx.Node | None
    view: tuple[int, ...]
    out: tuple[int, ...]
    inp: tuple[int, ...]
    batch: tuple[int, ...] = ()
    channel: int = -1
    roles: Mapping[str, Rows | None] = field(default_factory=dict[str, "Rows | None"], hash=False)
    unfit: str | None = None

    @property
    def form(self) -> MatrixForm:
        """The matrix form of the operand itself."""
        return MatrixForm(shape_of(self.weight), self.view, self.out, self.inp, self.batch)


class LivePart(NamedTuple):
    """What a branch computes with: ``y[..., rows] += scale * (dropout(x) A^T) B^T``.

    ``a`` is (r, in) or (E, r, in), ``b`` (rows, r) or (E, rows, r); ``dropout`` is the probability
    in force now (0.0 outside training), ``stream`` tells apart the masks of inputs that are one process's
    columns of a whole. ``added`` forbids forming W' = W + scale * B A instead.
    """

    a: Tensor
    b: Tensor
    scale: float
    rows: Rows | None = None
    dropout: float = 0.0
    stream: int = 0
    added: bool = False


def transposed(part: LivePart) -> LivePart:
    """Return the part of the transposed weight: ``(B A)^T = A^T B^T``; only of whole weights."""
    return part._replace(a=part.b.mT, b=part.a.mT)


LiveParts = tuple[LivePart, ...]


def since_start(part: LivePart, start: tuple[Tensor, Tensor] | None) -> LiveParts:
    """Return a part less its frozen start (A0, B0): ``B A - B0 A0 = B (A - A0) + (B - B0) A0``.

    At the start both terms are products with zeros, so that exactly nothing is added, whatever the kernel.
    """
    if start is None:
        return (part,)
    a0, b0 = start
    return (part._replace(a=part.a - a0), part._replace(a=a0, b=part.b - b0))


Branch = Callable[..., Tensor]
"""An operation with its adapter: the operation's own signature plus ``lora: LiveParts``."""


class Kind:
    """One kind of weight. Subclasses override what differs; instances are stateless.

    ``name`` is what policies filter by; ``ops`` the canonical operations that it matches;
    ``branches`` maps an operation to its adapted form (same signature, plus ``lora=``);
    ``homes`` are the classes whose stock ``forward`` may be rewritten, and ``owned`` the weights of
    stock modules for plans made without example inputs.
    """

    name: str = ""
    ops: frozenset[str] = frozenset()

    @property
    def branches(self) -> Mapping[str, Branch]:
        """Adapted operations by canonical name; an operation not listed takes the weight form."""
        return {}

    def unbranched(self, call: Call) -> str | None:
        """Say why a recorded call of an operation with a branch looks W itself up; None: it is a branch."""
        del call
        return None

    @property
    def branch_weight(self) -> Mapping[str, int]:
        """The weight's position among the arguments of a branch's operation, where it is not 1."""
        return {}

    def branch_form(self, call: Call, shape: tuple[int, ...]) -> MatrixForm:
        """Return the matrix form that a call's branch computes with; by default rows first.

        A weight adapted in the transposed form (a tied embedding and head) is given to the branch as
        ``(B^T, A^T)``; one adapted in another form takes the weight form there.
        """
        del call
        return rows_form(shape)

    def expected(self, call: Call, weight: tuple[int, ...], work: Work) -> Expected:
        """Say how the branch of a recorded call on a weight of this shape will be computed, and why.

        It asks of the recorded sizes what the branch asks of those of a run; most branches have one way.
        """
        del weight, work
        return Expected("added", f"thin products: the branch of {call.op} has no other way")

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """Module classes whose own ``forward`` is safe to rewrite (facts: stock forwards only)."""
        return ()

    @property
    def defaults(self) -> frozenset[str]:
        """Optional arguments of the homes' forwards that a rewritten forward takes at their defaults.

        A call that gives one runs the home's own forward, which reads the weight by its property.
        """
        return frozenset()

    def attributes(self, cls: type[nn.Module]) -> Mapping[str, Any]:
        """Return what the subclass of an adapted module needs beside a property for each weight."""
        del cls
        return {}

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """Return the places of the call where a weight may stand."""
        raise NotImplementedError

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """Return the weights of a stock module of this kind by attribute, with their forms."""
        del module
        return {}

    def unfit(self, module: nn.Module) -> str | None:
        """Say why a module's weight of this kind cannot be adapted; None: it can."""
        del module
        return None


def has_weight(module: nn.Module) -> bool:
    """Say whether a module has its weight now: a hook may make it anew in every forward."""
    return isinstance(getattr(module, "weight", None), Tensor)


def low_rank(x: Tensor, part: LivePart) -> Tensor:
    """Return ``scale * (dropout(x) A^T) B^T`` for an input whose last axis is ``in``.

    Where the input is in half precision and A in float32, the result is in float32; else it is computed
    in the input's dtype.
    """
    x = F.dropout(x, part.dropout) if part.dropout else x
    x = x.float() if widens(x, part.a) else x
    return _product(x, part.a, part.b) * part.scale


def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def add_rows(result: Tensor, update: Tensor, rows: Rows | None, axis: int, scale: float = 1.0) -> Tensor:
    """Return ``result`` with ``scale * update`` added to the rows of ``axis``, out of place, rounded once."""
    dtype = result.dtype
    if rows is None:
        return torch.add(result, update, alpha=scale).to(dtype)
    index, common = rows_index(rows, result.device), torch.promote_types(dtype, update.dtype)
    return result.to(common).index_add(axis, index, update.to(common), alpha=scale).to(dtype)


def strided_as(made: Tensor, weight: Tensor) -> Tensor:
    """Return a new tensor with the strides of the weight that it stands for, gaps between them included.

    The strides of axes of one entry say which memory format it is in, and with it the kernel and the format
    of what is computed: a 1x1 kernel in channels_last is contiguous, too. Those of a view of a larger tensor
    choose the kernel of a product, and so its last bit. A weight whose entries share memory has none to give.
    """
    if made.stride() == weight.stride():
        return made
    if made.is_contiguous() and weight.is_contiguous():
        return made.as_strided(weight.shape, weight.stride())
    if not _apart(weight):
        return made
    return made.new_empty_strided(weight.shape, weight.stride()).copy_(made)


def _apart(tensor: Tensor) -> bool:
    """Say whether every entry has memory of its own, whatever lies between them."""
    reach = 0
    for step, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


def rows_index(rows: Rows, device: torch.device) -> Tensor:
    """Return the row numbers that ``rows`` names, as an index tensor; of a band between them, none."""
    if not rows:
        return torch.empty(0, dtype=torch.long, device=device)
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])
