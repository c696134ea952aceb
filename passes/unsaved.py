"""State that moves beside the adapters and is in no file of theirs: codebooks, running means.

Statistics of normalisations are frozen or the adapter's own. Other state that a forward moves in train
mode belongs to the base: the trained model has it, and the base with the adapter file has not.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_fx.errors import WeightWriteError
from lora_fx.fingerprints import Fingerprint, fingerprint
from lora_fx.passes.moved import written_in
from lora_fx.passes.norms import running_statistics
from lora_fx.passes.registers import own_buffers, plain
from lora_fx.passes.runtime import BINDING, Injected
from lora_fx.plans import Plan


def buffer_prints(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprints of the buffers that the model's own state dict holds."""
    return {name: fingerprint(buffer) for name, buffer in _saved_buffers(model).items()}


def moved_buffers(model: nn.Module, record: Injected, adapter: str) -> tuple[str, ...]:
    """Return the buffers whose values are others than at inject, but for those that the adapter holds."""
    held, apart = _saved_buffers(model), set(record.plans[adapter].buffers)
    return tuple(
        name
        for name, before in record.buffers.items()
        if name in held and name not in apart and _other_values(fingerprint(held[name]), before)
    )


def _other_values(now: Fingerprint, before: Fingerprint) -> bool:
    """Say whether values differ; a cast model's are not compared."""
    alike = (now.shape, now.dtype) == (before.shape, before.dtype)
    return alike and now.sha256 != before.sha256


def unsaved(model: nn.Module, graph: fx.Graph) -> str | None:
    """Say which state of the base a recorded run wrote into, or None where it wrote into none."""
    own = {plain(name) for name, _ in model.named_parameters()} | _saved_buffers(model).keys()
    names = sorted(written_in(graph) & own - {plain(name) for name in running_statistics(model)})
    return unsaved_text(names, "the forward itself writes into") if names else None


def unsaved_text(names: tuple[str, ...] | list[str], how: str) -> str:
    """Say what was moved, and what follows."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{how} {shown}: no adapter file holds that; keep it fixed while training, or save it as well "
        "(model.state_dict() has it)"
    )


@contextmanager
def named_writes(graph: fx.Graph, plan: Plan) -> Generator[None]:
    """Inside, a refused write to an adapted weight is told by the names of those the run wrote."""
    try:
        yield
    except WeightWriteError as error:
        planned = {name: d.name for d in (*plan.adapted, *plan.trained) for name in (d.name, *d.site.names)}
        names = sorted({planned[name] for name in written_in(graph) & planned.keys()})
        if not names:
            raise
        raise WeightWriteError(
            ", ".join(names[:5]),
            expected="weights that the forward only reads",
            got=f"a forward that writes into them ({error.where})",
            advice=f"Skip them: Skip(name={names[0]!r}).",
        ) from error


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of the base, with values, by plain name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        fleeting: set[str] = module.__dict__["_non_persistent_buffers_set"]
        added = _added(module)
        for name, buffer in own_buffers(module).items():
            if buffer is not None and name not in fleeting and name not in added and _has_bits(buffer):
                found[plain(f"{path}.{name}" if path else name)] = buffer
    return found


def _added(module: nn.Module) -> set[str]:
    held = module.__dict__.get(BINDING)
    specs = [] if held is None else [spec for each in held.sites.values() for spec in each.values()]
    return {name for spec in specs for name in spec.names}


def _has_bits(tensor: Tensor) -> bool:
    real = tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
    return real and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
