"""Adapters of a weight that tensor parallelism splits after inject: laid out beside it, or it is refused.

``parallelize_module`` registers every Parameter of a module anew, as a DTensor in the layout that its
style has for the weight. A and B then take the layouts that their branch computes in (``kinds.spread``),
whatever order they come in; what reads ``W`` whole (DoRA) keeps its adapter on every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx.errors import WrappedModelError
from lora_fx.kinds.spread import is_sharded, split_of
from lora_fx.matrix import MatrixForm, columns_form
from lora_fx.passes.registers import own_parameters
from lora_fx.passes.runtime import Binding, SiteSpec
from lora_fx.passes.stock_forward import stock_home

_HOMES = frozenset({"linear", "embedding"})
"""Kinds whose branches compute shard by shard."""
_ADVICE = "Leave it out of the tensor-parallel plan, Skip it when injecting, or use fully_shard."


def refuse_unspreadable(module: nn.Module, held: Binding, name: str, param: nn.Parameter) -> None:
    """Refuse what would be silently wrong with this Parameter spread over processes.

    Raises:
        WrappedModelError: adapters of the module are shared with another, its branches do not compute
            shard by shard, or the weight is laid out as no branch knows.
    """
    where = f"{name} of {held.base_class.__name__}"
    if held.shared:
        shared = f"{min(held.shared)!r} that another module holds too: each would get an adapter of its own"
        raise _refusal(where, "a weight of one module", shared)
    home = stock_home(held.base_class)
    if held.branched and (home is None or home[1].name not in _HOMES):
        raise _refusal(where, "an nn.Linear or nn.Embedding", f"adapters on {held.base_class.__name__}")
    if name not in held.branched:
        return
    spread: Any = param
    split = split_of(param, _row_axis(held.branched[name].form))
    if split is None:
        layout = f"{spread.placements} on a mesh of {spread.device_mesh.ndim}"
        raise _refusal(where, "a mesh of one dimension, and the weight in equal runs along one axis", layout)
    if split.columns and getattr(module, "scale_grad_by_freq", False):
        raise _refusal(where, "each process to count all ids", "scale_grad_by_freq on a split vocabulary")


def spread_adapters(module: nn.Module, held: Binding) -> None:
    """Lay out, beside each weight that is a DTensor, what of its adapters is one."""
    for attribute, specs in held.sites.items():
        for spec in specs.values():
            for name, layout in _layouts(module, held, attribute, spec).items():
                _lay_out(module, name, layout)


def _layouts(module: nn.Module, held: Binding, attribute: str, spec: SiteSpec) -> dict[str, Any]:
    """Return where each of an adapter's Parameters is to lie, of a weight that is a DTensor."""
    weight = own_parameters(module).get(attribute)
    if weight is None or not is_sharded(weight):
        return {}
    from torch.distributed.tensor import Replicate

    spread: Any = weight
    if spec.full is not None:
        return {spec.full: list(spread.placements)}
    whole = [Replicate()] * spread.device_mesh.ndim
    layouts = dict.fromkeys(spec.names, whole)
    if spec.form is None or attribute not in held.branched or not spec.by_branch:
        return layouts
    split = split_of(weight, _row_axis(spec.form))
    if split is None:
        return layouts
    a, b = split.layouts
    for part in spec.parts:
        layouts.update({n: [a] for n in (part.a, part.start_a) if n is not None})
        if part.rows is None:
            layouts.update({n: [b] for n in (part.b, part.start_b) if n is not None})
    return layouts


def _row_axis(form: MatrixForm) -> int:
    return 1 if form == columns_form(form.shape) else 0


def _lay_out(module: nn.Module, name: str, layout: list[Any]) -> None:
    held = own_parameters(module)[name]
    spread: Any = held
    if held is None or not is_sharded(held) or list(spread.placements) == layout:
        return
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        own, mesh = spread.redistribute(spread.device_mesh, layout).to_local(), spread.device_mesh
        # A run of columns of its own: FSDP2 takes no view of more.
        options: Any = {"run_check": False, "shape": held.shape, "stride": held.stride()}
        moved = DTensor.from_local(own.contiguous(), mesh, layout, **options)
    own_parameters(module)[name] = nn.Parameter(moved, requires_grad=held.requires_grad)


def _refusal(where: str, expected: str, got: str) -> WrappedModelError:
    return WrappedModelError(where, expected=expected, got=got, advice=_ADVICE)
