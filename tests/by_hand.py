"""Adapt a model by a plan made by hand, and hold it against itself folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.kinds import KINDS
from lora_fx.matrix import MatrixForm
from lora_fx.passes.fold import folded
from lora_fx.passes.insert import insert
from lora_fx.passes.preserve import preserved
from lora_fx.passes.runtime import BINDING
from lora_fx.passes.slopes import float_leaves
from lora_fx.passes.switch import trained_parameters
from lora_fx.passes.verify import verify
from lora_fx.plans import Decision, Part, Plan, Reason
from lora_fx.sites import Site


def owned_forms(model: nn.Module) -> dict[str, tuple[str, MatrixForm]]:
    """Return kind and form of every weight that a stock module owns, by its first name."""
    found: dict[str, tuple[str, MatrixForm]] = {}
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for path, module in model.named_modules():
        for kind in KINDS:
            for attribute, form in kind.owned(module).items():
                name = f"{path}.{attribute}" if path else attribute
                parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
                if parameter is not None:
                    found.setdefault(first[id(parameter)], (kind.name, form))
    return found


def adapt(
    model: nn.Module,
    forms: Mapping[str, tuple[str, MatrixForm]] | None = None,
    *,
    rank: int = 2,
    adapter: str = "default",
    **how: Any,
) -> Plan:
    """Inject an adapter on every weight of ``forms`` (those that stock modules own), and randomise it."""
    forms = owned_forms(model) if forms is None else forms
    names = dict(model.named_parameters(remove_duplicate=False))
    decisions = []
    for name, (kind, form) in forms.items():
        tied = tuple(n for n, p in names.items() if p is names[name])
        site = Site(name, kind, form.shape, str(names[name].dtype).removeprefix("torch."), form, tied)
        part = Part(min(rank, form.max_rank))
        decisions.append(
            Decision(site, "adapt", Reason.RULE, parts=(part,), form="weight", **{"scale": 1.5, **how})
        )
    plan = Plan(tuple(decisions))
    insert(model, plan, adapter, seed=0)
    randomise(model, adapter)
    return plan


def randomise(model: nn.Module, adapter: str = "default", size: float = 0.1) -> None:
    """Move every trained tensor of an adapter by random numbers."""
    generator = torch.Generator().manual_seed(5)
    slow, fast = trained_parameters(model, adapter)
    with torch.no_grad():
        for parameter in (*slow, *fast):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(size * noise.to(parameter))


def branched(model: nn.Module) -> set[str]:
    """Return the names of the weights that are computed as branches."""
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        held = module.__dict__.get(BINDING)
        if held is not None:
            found |= {f"{path}.{name}" if path else name for name in held.branched}
    return found


def distance(found: Any, wanted: Any) -> float:
    """Return the largest relative difference of two outputs, by norm."""
    pairs = zip(float_leaves(found), float_leaves(wanted), strict=True)
    return max(float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach()) for a, b in pairs)


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the model from one random state, and leave its buffers as they were."""
    with preserved(model):
        torch.manual_seed(0)
        return model(*args, **kwargs)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Assert the invariant: injected == folded, in train and eval, outputs and gradients."""
    report = verify(model, (args, kwargs))
    report.raise_for_failure()
    assert len(report.comparisons) > 2, report
    tensors = [*float_leaves((args, kwargs)), *model.parameters()]
    limit = 1e-10 if all(t.dtype == torch.float64 for t in tensors if t.is_floating_point()) else 1e-5
    for mode in (True, False):
        model.train(mode)
        found = run(model, *args, **kwargs)
        with folded(model):
            wanted = run(model, *args, **kwargs)
        assert distance(found, wanted) <= limit
    with torch.no_grad():
        assert distance(run(model, *args, **kwargs), wanted) <= limit


def doubled(model: nn.Module, *inputs: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the model and its inputs in float64."""
    moved = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)
    return model.double(), moved
