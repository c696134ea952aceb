"""Whether a use can be a branch: is it made by a stock forward on the module's own weight?"""

from __future__ import annotations

import torch
from torch import fx, nn

from lora_fx.kinds import Kind
from lora_fx.kinds.base import Call, shape_of
from lora_fx.passes.reach import Found
from lora_fx.passes.subclass import own_class, stock_class


def branch_of(found: Found, home: nn.Module | None, path: str, names: tuple[str, ...]) -> tuple[bool, str]:
    """Say whether a use can be computed as a low-rank branch, and why.

    ``home`` is the module at ``path`` whose forward made the call, ``names`` the weight's names.
    """
    op = found.op
    call = f"{op} with {names[0]}"
    where = f"in the forward of {repr(path) if path else 'the model'} ({type(home).__name__})"
    if found.computed is not None:
        return False, f"{call} {where}: the weight is computed by {found.computed}"
    unbranched = f"there is no branch for {op}" if op not in found.kind.branches else _unbranched(found)
    if unbranched is not None:
        return False, f"{call} {where}: {unbranched}"
    if not _stands_alone(found):
        return False, f"{call} {where}: the weight is not the branch's own operand"
    if home is None:
        return False, f"{call} {where}: no module of the model"
    if isinstance(home, torch.jit.ScriptModule):
        return False, f"{call} {where}, which is compiled by TorchScript"
    if isinstance(home, fx.GraphModule) and not path:  # one inside the model keeps its graph
        if found.direct:
            return True, "in the module's own graph"
        return False, f"{call} {where}: the weight is a view of the parameter"
    return _stock(found.kind, home, path, names, f"{call} {where}")


def _unbranched(found: Found) -> str | None:
    node = found.node
    return found.kind.unbranched(Call(found.op, node.args, node.kwargs, shape_of(node)))


def _stands_alone(found: Found) -> bool:
    """Whether the weight itself is the operand that the branch replaces, and stands in no other."""
    node, position = found.node, found.kind.branch_weight.get(found.op, 1)
    given = node.args[position] if position < len(node.args) else node.kwargs.get("weight")
    return given is found.operand.weight and node.all_input_nodes.count(found.operand.weight) == 1


def _stock(kind: Kind, home: nn.Module, path: str, names: tuple[str, ...], call: str) -> tuple[bool, str]:
    stock = stock_class(home, kind.homes)
    if stock is None:
        return False, f"{call}, which is not a stock forward"
    own = {
        f"{path}.{key}" if path else key
        for key, _ in home.named_parameters(recurse=False, remove_duplicate=False)
    }
    if not own.intersection(names):
        return False, f"{call}, which does not own the weight"
    hidden = _instance_forward(home, stock)
    if hidden is not None:
        return False, f"{call}: {hidden}"
    wrapped = ", behind a forward wrapped on the instance" if "forward" in home.__dict__ else ""
    cls = own_class(home)
    inherited = "" if cls is stock else f", inherited by {cls.__name__}"
    return True, f"stock forward of {stock.__name__}{inherited}{wrapped}"


def _instance_forward(home: nn.Module, stock: type[nn.Module]) -> str | None:
    """Say why a forward set on the instance hides the stock one; None where it wraps it."""
    forward = home.__dict__.get("forward")
    if forward is None or getattr(forward, "__func__", None) is stock.forward:
        return None
    kept = home.__dict__.get("_old_forward")  # accelerate keeps the forward that it wraps
    if getattr(kept, "__func__", kept) is stock.forward:
        return None
    return "a forward set on the instance hides the class's"
