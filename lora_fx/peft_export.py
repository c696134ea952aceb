"""An adapter file and its model -> a peft folder that computes the same, or a refusal that names why not.

The parts of a fused weight become one LoRA: their A stacked, their B side by side, zero outside a part's
rows. A frozen start doubles the rank: ``B A - B0 A0 = [B, -B0] [A; A0]``. Both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.adapter_file import AdapterFile, tensor_key
from lora_fx.errors import PeftFormatError
from lora_fx.kinds.base import rows_index
from lora_fx.matrix import MatrixForm
from lora_fx.peft_layers import Layer, Layout, as_parameter
from lora_fx.plans import Decision, Part


@dataclass(frozen=True)
class Slot:
    """One wrapper that peft will make: ``delta = scale * B A`` in its layer's matrix form.

    ``a`` is (r, in) and ``b`` (out, r); for experts (E, r, in) and (E, out, r).
    """

    layer: Layer
    a: Tensor
    b: Tensor
    scale: float
    alpha: float
    dropout: float = 0.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank that peft's configuration says."""
        return int(self.a.shape[-2])

    def tensors(self) -> dict[str, Tensor]:
        """Return the wrapper's tensors by their keys inside it."""
        a, b, kind = self.a, self.b, self.layer.kind
        if kind == "embedding":
            found = {"lora_embedding_A": a, "lora_embedding_B": b}
        else:
            shape = self.layer.form.shape
            if kind == "conv":
                a, b = a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *[1] * (len(shape) - 2))
            elif a.dim() == 3:
                a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
            found = {"lora_A.weight": a, "lora_B.weight": b}
        if self.magnitude is not None:
            conv = (1, -1, *[1] * (len(self.layer.form.shape) - 2))
            shaped = self.magnitude.reshape(conv) if kind == "conv" else self.magnitude
            found["lora_magnitude_vector"] = shaped
        return found


def slots_of(file: AdapterFile, layout: Layout) -> tuple[Slot, ...]:
    """Return the wrappers that compute what the adapter computes, several for a tied weight.

    Raises:
        PeftFormatError: a weight's adapter has no counterpart in peft; the weight is named.
    """
    found = [slot for decision in file.plan.adapted for slot in _slots(file, decision, layout)]
    doras = {slot.magnitude is not None for slot in found}
    if len(doras) > 1:
        plain = next(s.layer.name for s in found if s.magnitude is None)
        raise _refused(
            plain, "DoRA at every weight or at none", "a plain adapter beside DoRA", "use_dora is one switch."
        )
    parameter = next((s.layer.name for s in found if s.layer.kind == "parameter"), None)
    if True in doras and parameter is not None:
        raise _refused(parameter, "no DoRA with target_parameters", "DoRA", "peft cannot do this.")
    return tuple(found)


def _slots(file: AdapterFile, decision: Decision, layout: Layout) -> list[Slot]:
    names = tuple(dict.fromkeys((decision.name, *decision.site.names)))
    layers = [_layer(name, layout) for name in names]
    _refuse_other_uses(decision, layers)
    a, b = _stacked(file, decision)
    magnitude = file.tensors.get(tensor_key(decision.name, None, "magnitude"))
    form, slots = decision.site.form, list[Slot]()
    rank = int(a.shape[-2])
    plain = decision.alpha if len(decision.parts) == 1 and decision.parts[0].rank == rank else None
    alpha = decision.scale * rank if plain is None else plain
    for layer in layers:
        matrices = _matrices(layer.form, form, a, b)
        if matrices is None or (magnitude is not None and layer.form != form):
            why = "another matrix form" if matrices is None else "DoRA along the other axis"
            raise _refused(layer.name, f"a weight that peft reads as {layer.kind}", why, _KEEP)
        slots.append(Slot(layer, *matrices, decision.scale, alpha, decision.dropout, magnitude))
    return slots


def _matrices(wanted: MatrixForm, form: MatrixForm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return A and B in the form that peft reads the weight in; None: the delta cannot be said in it."""
    if wanted == form:
        return a, b
    if wanted == form.transposed:
        return b.mT, a.mT
    if wanted.batch != (0,) or form.batch or form.view != form.shape:
        return None
    # One delta over all experts is one of the same rank for each of them: the factor that runs over the
    # experts is cut into theirs, the other is shared.
    count = form.shape[0]
    if form.inp[0] == 0 and len(form.inp) == 2:
        a, b = a.reshape(a.shape[0], count, -1).transpose(0, 1), b.expand(count, *b.shape)
    elif form.out[0] == 0 and len(form.out) == 2:
        a, b = a.expand(count, *a.shape), b.reshape(count, -1, b.shape[1])
    else:
        return None
    return (a, b) if wanted.out[0] in form.out else (b.mT, a.mT)


_KEEP = "Keep it in lora_fx's own format."


def _layer(name: str, layout: Layout) -> Layer:
    """Return how peft wraps a parameter, refusing what it cannot wrap."""
    layer = layout.layers.get(name)
    if layer is None:
        raise _refused(
            name, "a weight of the model", "none of that name", "Pass the model it was trained on."
        )
    if layer.kind == "attention-out":
        got = "the output projection of an nn.MultiheadAttention, whose delta peft applies twice up to 0.21.2"
        raise _refused(name, "a layer that peft adapts", got, _KEEP)
    if layer.obstacle is not None and layer.kind == "embedding":
        layer = as_parameter(layer)
    if layer.obstacle is not None:
        raise _refused(name, "a layer whose weight peft's adapter changes", layer.obstacle, _KEEP)
    return layer


def _refuse_other_uses(decision: Decision, layers: Sequence[Layer]) -> None:
    """Refuse a weight that is used outside of the module that owns it: peft's branch is not there.

    Raises:
        PeftFormatError: naming the use; a module under two names counts too, as peft wraps it once.
    """
    homes = {layer.path for layer in layers}
    for use in decision.site.uses:
        inside = use.home in homes or any(
            layer.kind == "parameter" and use.home.startswith(f"{layer.path}.") for layer in layers
        )
        if not inside:
            raise _refused(
                decision.name,
                f"uses in {', '.join(sorted(homes))} alone",
                f"a use by {use.op} in {use.home or 'the model itself'!r}",
                "peft's adapter acts in the module that owns the weight. " + _KEEP,
            )


def _stacked(file: AdapterFile, decision: Decision) -> tuple[Tensor, Tensor]:
    """Return one ``A: (r, in)`` and ``B: (out, r)`` for all parts, zero outside a part's rows."""
    pieces = [_piece(file, decision, part) for part in decision.parts]
    return torch.cat([a for a, _ in pieces], -2), torch.cat([b for _, b in pieces], -1)


def _piece(file: AdapterFile, decision: Decision, part: Part) -> tuple[Tensor, Tensor]:
    def get(field: str) -> Tensor | None:
        return file.tensors.get(tensor_key(decision.name, part.role, field))

    a, b = (
        file.tensors[tensor_key(decision.name, part.role, "A")],
        file.tensors[tensor_key(decision.name, part.role, "B")],
    )
    a0, b0 = get("A_start"), get("B_start")
    if a0 is not None and b0 is not None:
        a, b = torch.cat([a, a0], -2), torch.cat([b, -b0], -1)
    if part.rows is not None:
        whole = b.new_zeros(*b.shape[:-2], decision.site.form.out_features, b.shape[-1])
        b = whole.index_add(b.dim() - 2, rows_index(part.rows, b.device), b)
    return a, b


def scales_as_rslora(slots: Sequence[Slot]) -> bool:
    """Say whether alpha and scale are those of a rank-stabilised LoRA: ``alpha / sqrt(r)``."""
    fits = [abs(s.alpha / s.rank**0.5 - s.scale) <= 1e-9 * abs(s.scale) for s in slots]
    plain = [abs(s.alpha / s.rank - s.scale) <= 1e-9 * abs(s.scale) for s in slots]
    return bool(slots) and all(fits) and not all(plain)


def written_alpha(slot: Slot, *, rslora: bool) -> float | int:
    """Return the alpha from which peft computes the slot's scale; a whole number where it is one."""
    alpha = slot.scale * (slot.rank**0.5 if rslora else slot.rank)
    near = slot.alpha if abs(alpha - slot.alpha) <= 1e-9 * abs(alpha) else alpha
    return int(near) if float(near).is_integer() else near


def _refused(where: str, expected: str, got: str, advice: str) -> PeftFormatError:
    return PeftFormatError(where, expected=expected, got=got, advice=advice)
