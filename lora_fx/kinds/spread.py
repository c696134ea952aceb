"""Branches on weights that tensor parallelism spreads over processes (DTensors): each on its own shard.

``y = x W^T + b + s (x A^T) B^T`` on a mesh of one dimension; ``Shard(n)`` is along axis n, a *partial*
tensor is the sum over all processes::

    W             x            A            B            y            dx           dA         dB
    Shard(rows)   Replicate    Replicate    Shard(0)     Shard(-1)    partial      partial    Shard(0)
    Shard(cols)   Shard(-1)    Shard(1)     Replicate    partial      Shard(-1)    Shard(1)   partial
    Replicate     any          Replicate    Replicate    as x         as x         partial    partial

so that an adapter adds no collective to a forward; in a backward the gradient of what is replicated is
summed. Parts on some rows of a W that is split by rows keep B replicated, each process taking what is in
its own rows. An embedding's ids are replicated: those of another process's columns look up zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lora_fx.errors import WrappedModelError
from lora_fx.kinds.base import Branch, LivePart, LiveParts
from lora_fx.kinds.effective import rows_between

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """Return the tensor where it is a DTensor, as FSDP2's are between forwards; else None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor."""
    # By its name first: most models are not distributed, and then nothing is imported for them.
    return type(tensor).__name__ == "DTensor" and as_dtensor(tensor) is not None


class Split(NamedTuple):
    """How one weight lies on a mesh of one dimension: by the rows of its matrix, its columns, or whole."""

    mesh: Any
    rows: bool
    columns: bool

    @property
    def layouts(self) -> tuple[Any, Any]:
        """Where A and B lie."""
        from torch.distributed.tensor import Replicate, Shard

        return (Shard(1) if self.columns else Replicate()), (Shard(0) if self.rows else Replicate())

    @property
    def place(self) -> int:
        """This process's number on the mesh."""
        return int(self.mesh.get_local_rank())

    def own(self, size: int) -> tuple[int, int]:
        """Return which of so many rows, or columns, are this process's: ``(start, stop)``."""
        each = -(-size // self.mesh.size())
        return min(self.place * each, size), min((self.place + 1) * each, size)


def split_of(weight: Tensor, row_axis: int) -> Split | None:
    """Return how a DTensor of two axes is split, or None where it lies in no way that branches know."""
    from torch.distributed.tensor import Replicate, Shard

    spread: Any = weight
    (layout, *more) = spread.placements
    # Of no subclass: a strided shard is no run along an axis. (And "is" is what torch.compile follows.)
    runs = type(layout) is Shard
    if more or not (runs or type(layout) is Replicate) or weight.dim() != 2:
        return None
    axis = layout.dim % 2 if runs else None
    return Split(spread.device_mesh, rows=axis == row_axis, columns=axis == 1 - row_axis)


def on_shards(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts) -> bool:
    """Say whether a branch computes shard by shard; its tensors must then all lie on the mesh.

    Raises:
        WrappedModelError: the weight is spread over processes, and its adapter, bias or input is not.
    """
    if not is_sharded(weight):
        return False
    if not all(is_sharded(part.a) and is_sharded(part.b) for part in lora):
        raise _refusal("a weight that is a DTensor beside an adapter that is none")
    if not is_sharded(x) or not (bias is None or is_sharded(bias)):
        raise _refusal("a weight that is a DTensor, with an input or a bias that is none")
    return True


def linear_on_shards(
    branch: Branch, composed: Branch, x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts
) -> Tensor:
    """Return the DTensor ``x W^T + b`` with its parts, by the branch of this process's shards."""
    split, layout = _split(weight, 0), _layout(weight)
    flow = _flow(split, x)
    parts = _local_parts(split, lora, flow.small, weight.shape[0])
    own_bias = None
    if bias is not None:
        own_bias = _local(bias, split.layouts[1], flow.bias)  # split as B is
        if split.columns:
            own_bias = own_bias / split.mesh.size()  # as torch does, bit for bit
    own = _local(weight, layout, layout if split.rows or split.columns else flow.small)
    # A part with no rows here still takes part in the sum of its gradients.
    compute = branch if all(part.b.shape[0] for part in parts) else composed
    y = compute(_local(x, flow.x, flow.dx), own, own_bias, lora=parts)
    return _spread(y, split, flow.y, (*x.shape[:-1], weight.shape[0]))


class _Flow(NamedTuple):
    """Where x, its gradient and y lie, and the gradients of what is replicated and of the bias."""

    x: Any
    dx: Any
    y: Any
    small: Any
    bias: Any


def _flow(split: Split, x: Tensor) -> _Flow:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last, layout = x.dim() - 1, _layout(x)
    features = Shard(last)
    if split.rows:
        return _Flow(x=Replicate(), dx=Partial(), y=features, small=Partial(), bias=Shard(0))
    if split.columns:
        return _Flow(x=features, dx=features, y=Partial(), small=Partial(), bias=Partial())
    if type(layout) is Shard and layout.dim % (last + 1) != last:
        return _Flow(x=layout, dx=layout, y=layout, small=Partial(), bias=Partial())
    return _Flow(x=Replicate(), dx=Replicate(), y=Replicate(), small=Replicate(), bias=Replicate())


def embedding_on_shards(
    branch: Branch, ids: Tensor, weight: Tensor, padding_idx: int | None, lora: LiveParts
) -> Tensor:
    """Return the DTensor ``W[ids]`` with its parts, by the branch of this process's shards."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    split, entries = _split(weight, 1), weight.shape[0]
    spread: Any = ids
    own_ids: Tensor = spread.redistribute(split.mesh, [Replicate()]).to_local()
    small = Partial() if split.rows or split.columns else Replicate()
    own = _local(weight, _layout(weight), _layout(weight))
    parts = _local_parts(split, lora, small, weight.shape[1])
    shape = (*ids.shape, weight.shape[1])
    padding = None if padding_idx is None else padding_idx % entries
    if not split.columns:
        y = branch(own_ids, own, padding, lora=parts)
        return _spread(y, split, Shard(ids.dim()) if split.rows else Replicate(), shape)
    start, stop = split.own(entries)
    inside = (own_ids >= start) & (own_ids < stop)
    here = padding is not None and start <= padding < stop
    padding = padding - start if here and padding is not None else None
    y = branch(torch.where(inside, own_ids - start, 0), own, padding, lora=parts)
    return _spread(torch.where(inside.unsqueeze(-1), y, 0), split, Partial(), shape)


def _split(weight: Tensor, row_axis: int) -> Split:
    split = split_of(weight, row_axis)
    if split is None:
        spread: Any = weight
        raise _refusal(f"a weight of {weight.dim()} axes that lies as {spread.placements}")
    return split


def _layout(tensor: Tensor) -> Any:
    spread: Any = tensor
    return spread.placements[0]


def _local_parts(split: Split, lora: LiveParts, small: Any, out: int) -> LiveParts:
    """Return this process's parts; ``small`` is how the gradient of what is replicated comes out."""
    return tuple(_local_part(split, part, small, out) for part in lora)


def _local_part(split: Split, part: LivePart, small: Any, out: int) -> LivePart:
    from torch.distributed.tensor import Replicate

    a, b = split.layouts
    some = split.rows and part.rows is not None
    b = Replicate() if some else b
    own = part._replace(
        a=_local(part.a, a, a if split.columns else small),
        b=_local(part.b, b, b if split.rows and not some else small),
        # Masks of different columns must differ, though all processes draw the same numbers.
        stream=split.place if split.columns else 0,
    )
    return rows_between(own, *split.own(out)) if some else own


def _local(tensor: Tensor, layout: Any, grad: Any) -> Tensor:
    """Return this process's share in a layout; its gradient is gathered to the layout of the tensor."""
    spread: Any = tensor
    shard: Tensor = spread.redistribute(spread.device_mesh, [layout]).to_local(grad_placements=[grad])
    return shard


def _spread(own: Tensor, split: Split, layout: Any, shape: tuple[int, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = DTensor.from_local(
        own, split.mesh, [layout], run_check=False, shape=torch.Size(shape), stride=stride
    )
    if not result.requires_grad or torch.compiler.is_compiling():
        return result
    once: Tensor = _once(result)
    return once


class _Once(Function):
    """The identity, differentiable once: torch's way to shards and back drops second derivatives."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        del ctx
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        first: Tensor = _first(grads[0]) if torch.is_grad_enabled() else grads[0]
        return first


class _First(Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        del ctx
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx, grads
        raise WrappedModelError(
            "the second derivative of an adapted layer that tensor parallelism split",
            expected="first derivatives",
            got="a derivative of its gradient, of which torch's DTensors drop terms",
            advice="Differentiate twice on the unsplit model.",
        )


_first: Any = _First.apply
_once: Any = _Once.apply


def _refusal(got: str) -> WrappedModelError:
    return WrappedModelError(
        "an adapted weight",
        expected="a weight that parallelize_module split after inject, along one axis",
        got=got,
        advice="Inject first, then call torch.distributed.tensor.parallel.parallelize_module.",
    )
