"""Switch: which adapter is active, and what is trained."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import nn

from lora_fx.errors import AdapterNameError
from lora_fx.passes.registers import own_parameters, plain
from lora_fx.passes.runtime import Injected, SiteSpec, binding, injected, raw
from lora_fx.passes.sharded import is_replicated, reshard
from lora_fx.passes.synchronised import watch_wrappers


def adapter_sites(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, str, SiteSpec]]:
    """Yield (module path, owner, attribute, spec) of every weight that an adapter changes."""
    for path, module in model.named_modules():
        held = binding(module)
        if held is None:
            continue
        for attribute, specs in held.sites.items():
            if adapter in specs:
                yield plain(path), module, attribute, specs[adapter]


def record_of(model: nn.Module) -> Injected:
    """Return the model's record.

    Raises:
        AdapterNameError: the model has no adapters.
    """
    record = injected(model)
    if record is None:
        inner = next((n for n in ("module", "_orig_mod") if n in dict(model.named_children())), None)
        wraps = inner is not None and injected(model.get_submodule(inner)) is not None
        raise AdapterNameError(
            type(model).__name__,
            expected="a model with adapters",
            got="a wrapper of one" if wraps else "a model without",
            advice=f"Pass the model inside: its .{inner}."
            if wraps
            else "Call lora_fx.inject or lora_fx.load_adapter first.",
        )
    return record


def require(model: nn.Module, adapter: str | None) -> tuple[Injected, str]:
    """Return the record and the adapter's name (None: the active one, else the only one).

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
    """
    record = record_of(model)
    name = adapter if adapter is not None else record.state.active
    if not isinstance(name, str | None):
        raise AdapterNameError(
            "the adapter",
            expected=f"the name of one of {sorted(record.plans)}",
            got=repr(name),
            advice="One adapter is active at a time: pass the name of one only, as text.",
        )
    if name is None or name not in record.plans:
        raise AdapterNameError(
            f"adapter {adapter!r}",
            expected=f"one of {sorted(record.plans)}",
            got=repr(adapter),
            advice="Name an adapter of the model.",
        )
    return record, name


def trainable_base(model: nn.Module) -> list[str]:
    """Return the names of base parameters that require a gradient, by their first names."""
    added = {id(raw(m, n)) for m in model.modules() for n in _added(m)}
    return [plain(n) for n, p in model.named_parameters() if p.requires_grad and id(p) not in added]


def _added(module: nn.Module) -> Iterator[str]:
    held = binding(module)
    for specs in () if held is None else held.sites.values():
        for spec in specs.values():
            yield from spec.names


def trained_parameters(model: nn.Module, adapter: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what an adapter trains, each Parameter once: (all but B, the B matrices)."""
    reshard(model)  # an optimiser given FSDP2's gathered copies would train what is thrown away
    _freeze_replicated(model)
    slow: dict[int, nn.Parameter] = {}
    fast: dict[int, nn.Parameter] = {}
    for _, module, _, spec in adapter_sites(model, adapter):
        second = {part.b for part in spec.parts}
        for name in trained_names(spec):
            parameter = raw(module, name)
            if isinstance(parameter, nn.Parameter):
                (fast if name in second else slow)[id(parameter)] = parameter
    return list(slow.values()), list(fast.values())


def _freeze_replicated(model: nn.Module) -> None:
    """Freeze again the base's normalisations that SequenceParallel registered anew, trainable."""
    for module in model.modules():
        if binding(module) is not None:
            continue  # registering keeps the flags there
        for parameter in own_parameters(module).values():
            if parameter is not None and is_replicated(parameter):
                parameter.requires_grad_(False)


def apply_trainability(model: nn.Module, record: Injected) -> None:
    """Freeze the base; let the active adapter's Parameters be trained, if it is trainable."""
    reshard(model)  # the flags of FSDP2's gathered copies are those of the shards, and not the reverse
    free: set[int] = set()
    active = record.state.active
    if active is not None and record.trainable.get(active, False):
        for _, module, _, spec in adapter_sites(model, active):
            free.update(id(raw(module, name)) for name in trained_names(spec))
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in free)
    watch_wrappers(model)


def trained_names(spec: SiteSpec) -> tuple[str, ...]:
    """Return the Parameters of a spec that are trained: all but a frozen start and buffers."""
    if spec.buffer:
        return ()
    names = [n for part in spec.parts for n in (part.a, part.b)]
    return tuple(n for n in (*names, spec.full, spec.magnitude) if n is not None)


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Make one adapter active; it alone is computed and trained.

    Raises:
        AdapterNameError: the model has no adapter of this name.
    """
    record, name = require(model, adapter)
    record.state.active = name
    apply_trainability(model, record)


@contextmanager
def disable_adapter(model: nn.Module) -> Generator[nn.Module]:
    """Inside, the model computes what the base computes.

    Raises:
        AdapterNameError: the model has no adapters.
    """
    record = record_of(model)
    before = record.state.enabled
    record.state.enabled = False
    try:
        yield model
    finally:
        record.state.enabled = before
