"""An adapter file and its model -> the folder that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_fx.adapter_file import AdapterFile, tensor_key
from lora_fx.errors import PeftFormatError
from lora_fx.notices import warn_user
from lora_fx.peft_export import Slot, scales_as_rslora, slots_of, written_alpha
from lora_fx.peft_files import PREFIX, PeftFolder
from lora_fx.peft_layers import BASE, Layout, wrapped_path


@dataclass(frozen=True)
class _Whole:
    """What is saved in full: modules, whose every parameter and buffer is, and single biases."""

    modules: tuple[str, ...]
    biases: tuple[str, ...]


def to_peft(file: AdapterFile, layout: Layout) -> PeftFolder:
    """Return the adapter as a peft folder.

    Raises:
        PeftFormatError: something of it has no counterpart in peft's format; it is named.
    """
    slots = slots_of(file, layout)
    if not slots:
        raise PeftFormatError(
            "the adapter",
            expected="at least one low-rank adapter",
            got="none",
            advice="Save it as a file of its own.",
        )
    wrappers = Counter(slot.layer.path for slot in slots)
    whole = _whole(file, layout, wrappers)
    tensors: dict[str, Tensor] = {}
    seen = Counter[str]()
    order = {name: index for index, name in enumerate(layout.layers)}
    for slot in sorted(slots, key=lambda slot: order[slot.layer.name]):
        path = slot.layer.path
        seen[path] += 1
        # Of several wrappers of one module, the first is the innermost.
        key = PREFIX + wrapped_path(path, wrappers) + BASE * (wrappers[path] - seen[path])
        tensors |= {f"{key}.{name}": tensor for name, tensor in slot.tensors().items()}
        if slot.layer.kind == "attention":
            tensors |= _idle_out_proj(slot, key, layout)
    tensors |= _saved(file, layout, whole, wrappers)
    return PeftFolder(_config(slots, whole, layout), tensors)


def _idle_out_proj(slot: Slot, key: str, layout: Layout) -> dict[str, Tensor]:
    """Return an adapter of the output projection that does nothing: peft makes one in any case."""
    out, inp = layout.state[f"{slot.layer.path}.out_proj.weight"].shape
    key = f"{key}{BASE}.out_proj"
    return {
        f"{key}.lora_A.weight": slot.a.new_zeros(slot.rank, inp),
        f"{key}.lora_B.weight": slot.b.new_zeros(out, slot.rank),
    }


def _whole(file: AdapterFile, layout: Layout, wrappers: Mapping[str, int]) -> _Whole:
    """Say which modules are saved in full, and which biases on their own."""
    plan = file.plan
    trained = [name for d in plan.trained for name in dict.fromkeys((d.name, *d.site.names))]
    owners = {_owner(name) for name in [*trained, *plan.buffers]}
    biases: list[str] = []
    for extra in plan.extras:
        owner = _owner(extra.name)
        if owner in owners:
            continue
        if extra.name.rpartition(".")[2] == "bias" and (
            owner in wrappers or extra.detail.startswith("bias=")
        ):
            biases.append(extra.name)
        else:
            owners.add(owner)
    modules = tuple(m for m in layout.modules if m and any(m.endswith(owner) for owner in owners if owner))
    for module in ("", *modules) if "" in owners else modules:
        inside = next((p for p in wrappers if p == module or p.startswith(f"{module}.") or not module), None)
        above = next((m for m in modules if m != module and module.startswith(f"{m}.")), None)
        if inside is not None or above is not None or not module:
            raise PeftFormatError(
                module or "the model's top level",
                expected="a module that peft can save whole",
                got=f"parameters of it are trained in full, and {inside or above} is adapted inside of it"
                if module
                else "parameters of its own that are trained in full",
                advice="Keep it in lora_fx's own format.",
            )
    return _Whole(modules, tuple(biases))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _saved(
    file: AdapterFile, layout: Layout, whole: _Whole, wrappers: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the tensors of modules that are saved whole, and biases."""
    changed = _changed(file)
    found: dict[str, Tensor] = {}
    for module in whole.modules:
        for name, base in layout.state.items():
            if name.startswith(f"{module}."):
                key = PREFIX + wrapped_path(module, wrappers) + name.removeprefix(module)
                found[key] = changed.get(name, base)
    for name in whole.biases:
        owner = _owner(name)
        found[f"{PREFIX}{wrapped_path(owner, wrappers)}{BASE * wrappers.get(owner, 0)}.bias"] = changed[name]
    return found


def _changed(file: AdapterFile) -> dict[str, Tensor]:
    """Return what stands in the place of parameters and buffers, by every qualified name."""
    plan = file.plan
    named = [(d.name, name) for d in plan.trained for name in (d.name, *d.site.names)]
    named += [(extra.name, extra.name) for extra in plan.extras]
    found = {name: file.tensors[tensor_key(first, None, "full")] for first, name in named}
    return found | {name: file.tensors[tensor_key(name, None, "buffer")] for name in plan.buffers}


def _config(slots: Sequence[Slot], whole: _Whole, layout: Layout) -> dict[str, Any]:
    rslora = scales_as_rslora(slots)
    ranks = {slot.layer.key: slot.rank for slot in slots}
    alphas = {slot.layer.key: written_alpha(slot, rslora=rslora) for slot in slots}
    rank, rank_pattern = _with_patterns(ranks)
    alpha, alpha_pattern = _with_patterns(alphas)
    modules = [slot.layer.path for slot in slots if slot.layer.kind != "parameter"]
    parameters = [slot.layer.name for slot in slots if slot.layer.kind == "parameter"]
    _refuse_ambiguous(parameters, layout)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": layout.origin,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": _dropout(slots, targeted=bool(parameters)),
        "target_modules": _targets(modules, layout.modules),
        "modules_to_save": list(whole.modules) or None,
        "bias": _bias(whole.biases, {slot.layer.path for slot in slots}),
        "use_rslora": rslora,
        "use_dora": slots[0].magnitude is not None,
        "fan_in_fan_out": _fan_in_fan_out(slots),
        "init_lora_weights": True,
    }
    return config | ({"target_parameters": parameters} if parameters else {})


def _with_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for each layer that has another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(key)}": value for key, value in values.items() if value != common}


def _targets(paths: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """Return peft's target_modules for exactly these paths: last names, whole paths, or an expression."""
    wanted, all_paths = set(paths), [m for m in modules if m]
    for names in ({p.rpartition(".")[2] for p in wanted}, wanted):
        if {m for m in all_paths if any(m == n or m.endswith(f".{n}") for n in names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))


def _refuse_ambiguous(parameters: Sequence[str], layout: Layout) -> None:
    """Refuse target_parameters that peft would find elsewhere too: it compares by suffix."""
    for name in parameters:
        others = [n for n in layout.parameters if n.endswith(f".{name}") and n not in parameters]
        if others:
            raise PeftFormatError(
                name,
                expected="a name that no other parameter ends with",
                got=", ".join(sorted(others)[:3]),
                advice="Keep it in lora_fx's own format.",
            )


def _dropout(slots: Sequence[Slot], *, targeted: bool) -> float:
    values = Counter(slot.dropout for slot in slots)
    common = 0.0 if targeted else values.most_common(1)[0][0]
    if set(values) != {common}:
        warn_user(
            f"peft has one lora_dropout for all layers: {common:g} is written, in training others had "
            f"{sorted(set(values) - {common})}; what the adapter computes is the same"
        )
    return common


def _bias(biases: Sequence[str], adapted: set[str]) -> str:
    if not biases:
        return "none"
    return "lora_only" if {_owner(name) for name in biases} <= adapted else "all"


def _fan_in_fan_out(slots: Sequence[Slot]) -> bool:
    """Say whether every linear is transformers' Conv1D; peft corrects the others, with a warning."""
    linears = [slot.layer.form.out == (0,) for slot in slots if slot.layer.kind == "linear"]
    return bool(linears) and not any(linears)
