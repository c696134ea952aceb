"""Running an ONNX file beside the torch model, and measuring how far their outputs lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.dlpack import from_dlpack

from lora_fx.errors import ExportError
from lora_fx.passes.onnx_inputs import tensors
from lora_fx.passes.onnx_subject import Inputs
from lora_fx.passes.onnx_tensors import ort_value

Outputs = Sequence[Tensor]

_FLOATS = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
}


class RuntimeFault(Exception):  # noqa: N818 - caught by the check that it becomes
    """The runtime refused to run a file on given inputs."""


def torch_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors of a model's output, in order, on the CPU."""
    made = model(*inputs[0], **inputs[1])
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def feeds_for(session: Any, inputs: Inputs) -> dict[str, Any]:
    """Return a session's feeds, as the runtime's own values, from torch inputs in the same order.

    Floats are cast to what the graph declares.

    Raises:
        ExportError: the graph takes another number of inputs than the model does.
    """
    declared = session.get_inputs()
    given = tensors(inputs)
    if len(declared) != len(given):
        raise ExportError(
            "the exported graph",
            expected=f"one input for each of the {len(given)} tensors of the example",
            got=f"{len(declared)} inputs: {', '.join(item.name for item in declared)}",
            advice="An input was removed as unused, or is no tensor: leave it out of the example inputs.",
        )
    return {item.name: ort_value(_as_declared(t, item.type)) for item, t in zip(declared, given, strict=True)}


def _as_declared(tensor: Tensor, declared: str) -> Tensor:
    return tensor.to(_FLOATS[declared]) if tensor.is_floating_point() and declared in _FLOATS else tensor


def run(session: Any, feeds: Mapping[str, Any], options: Any = None) -> list[Tensor]:
    """Run a session on values of the runtime and return its outputs as torch tensors.

    Raises:
        RuntimeFault: the runtime refused.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        made = session.run_with_ort_values(names, dict(feeds), options)
    except Exception as error:  # onnxruntime's classes differ from version to version
        raise RuntimeFault(str(error).strip().splitlines()[0]) from error
    return [_from_ort(value) for value in made]


def _from_ort(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        # Numpy cannot carry it.
        return from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(np.array(value.numpy()))


def distance(found: Outputs, reference: Outputs) -> float:
    """Return the largest of ``distances``."""
    return max(distances(found, reference), default=0.0)


def distances(found: Outputs, reference: Outputs) -> list[float]:
    """Return ``|found - reference| / |reference|`` by norm for each output, in float64.

    Equal infinities and equal nan count as agreement; any other non-finite value makes the distance
    infinite, as another number of outputs does. Of integer and boolean outputs it is the share of
    elements that differ.
    """
    if len(found) != len(reference):
        return [float("inf")] * max(len(found), len(reference))
    return [_distance(a, b) for a, b in zip(found, reference, strict=True)]


def _distance(found: Tensor, reference: Tensor) -> float:
    if found.shape != reference.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    if not (reference.is_floating_point() or reference.is_complex()):
        return float((found.to(reference.dtype) != reference).double().mean())
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = found.to(wide), reference.to(wide)
    odd = ~(a.isfinite() & b.isfinite())
    if bool(odd.any()):
        if not torch.equal(a[odd].nan_to_num(7.0), b[odd].nan_to_num(7.0)):
            return float("inf")
        a, b = a[~odd], b[~odd]
    norm = float(b.norm())
    gap = float((a - b).norm())
    return gap / norm if norm else gap
