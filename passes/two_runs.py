"""What one run of an adapted model gives, injected and folded: outputs, and the gradients of its adapters."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.passes.changes import weight_key
from lora_fx.passes.examples import own_copy
from lora_fx.passes.fold import folded
from lora_fx.passes.other_inputs import Inputs
from lora_fx.passes.preserve import preserved
from lora_fx.passes.registers import plain
from lora_fx.passes.rounding import weights_rounded
from lora_fx.passes.runtime import effective, raw
from lora_fx.passes.slopes import outputs_and_slopes
from lora_fx.passes.switch import adapter_sites, trained_names


@dataclass(frozen=True)
class Run:
    """What one run gave: its float outputs, and the gradients of each weight's adapter."""

    outputs: list[Tensor]
    gradients: Mapping[str, list[Tensor | None]]


def folded_run(model: nn.Module, adapter: str, inputs: Inputs, seed: int | None = None) -> Run:
    """Run the folded model, with its weights rounded if there is a seed.

    Its gradients are with respect to the weights themselves: they go on to the adapters that made them.
    """
    with folded(model, adapter), nullcontext() if seed is None else weights_rounded(model, seed):
        named = model.named_parameters(remove_duplicate=False)
        weights = {plain(name): p for name, p in named if p.is_floating_point()}
        outputs, slopes = _run(model, inputs, list({id(p): p for p in weights.values()}.values()))
    by_name = {name: slopes.get(id(p)) for name, p in weights.items()}
    made = dict(effective_weights(model, adapter))
    shares: dict[int, Tensor] = {}
    for name, (weight, parameters) in made.items():
        slope = by_name.get(name)
        if slope is None:
            continue
        parts = torch.autograd.grad(weight, parameters, slope.to(weight.dtype))
        for parameter, share in zip(parameters, parts, strict=True):
            # Weights that were tied and then assigned apart share one adapter.
            known = shares.get(id(parameter))
            shares[id(parameter)] = share if known is None else known + share
    return Run(
        outputs,
        {
            name: [shares.get(id(p)) for p in parameters]
            for name, (_, parameters) in made.items()
            if by_name.get(name) is not None
        },
    )


def injected_run(model: nn.Module, adapter: str, inputs: Inputs) -> Run:
    """Run the injected model as it is; its gradients are those that training would see."""
    sites = {name: parameters for name, (_, parameters) in effective_weights(model, adapter)}
    distinct = list({id(p): p for parameters in sites.values() for p in parameters}.values())
    outputs, slopes = _run(model, inputs, distinct)
    return Run(outputs, {name: [slopes.get(id(p)) for p in ps] for name, ps in sites.items()})


def _run(
    model: nn.Module, inputs: Inputs, distinct: list[nn.Parameter]
) -> tuple[list[Tensor], dict[int, Tensor | None]]:
    """Return the float outputs, and the slope of each of these parameters by its identity."""

    def run() -> Any:
        args, kwargs = own_copy(*inputs)
        return model(*args, **kwargs)

    with preserved(model), trainable(distinct):
        outputs, slopes = outputs_and_slopes(model, run, distinct)
    if slopes is None:
        return outputs, {}
    return outputs, {id(p): g for p, g in zip(distinct, slopes, strict=True)}


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return what the adapter trains, or would: one that was loaded is frozen."""
    found = (raw(m, n) for _, m, _, spec in adapter_sites(model, adapter) for n in trained_names(spec))
    return list({id(p): p for p in found if isinstance(p, nn.Parameter)}.values())


@contextmanager
def trainable(parameters: list[nn.Parameter]) -> Generator[None]:
    """Inside, these parameters ask for gradients."""
    flags = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def effective_weights(
    model: nn.Module, adapter: str
) -> Iterator[tuple[str, tuple[Tensor, list[nn.Parameter]]]]:
    """Yield (first name, (W with its graph, the adapter's trained Parameters)) of every base weight."""
    seen: set[tuple[int, ...]] = set()
    for path, module, attribute, spec in adapter_sites(model, adapter):
        key = weight_key(module, attribute, spec)
        if key in seen:
            continue
        seen.add(key)
        parameters = [p for n in trained_names(spec) if isinstance(p := raw(module, n), nn.Parameter)]
        with torch.enable_grad(), trainable(parameters):
            weight = effective(module, attribute, spec)
        yield (f"{path}.{attribute}" if path else attribute), (weight, parameters)
