"""A peft folder read without its model: what its tensors alone say about the weights they change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_fx.adapter_file import AdapterFile
from lora_fx.errors import PeftFormatError
from lora_fx.matrix import MatrixForm, columns_form, rows_form
from lora_fx.peft_files import PREFIX, PeftFolder
from lora_fx.peft_import import from_peft
from lora_fx.peft_layers import BASE, Layer, LayerKind, Layout, plain_path
from lora_fx.sites import Site

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NOTE = (
    "read without its model: weights that it leaves alone are not listed, and Conv1D's shapes are transposed"
)


def outline(folder: PeftFolder) -> AdapterFile:
    """Return a peft adapter as an adapter file for a model of which only the adapted weights are known.

    Raises:
        PeftFormatError: it targets parameters, whose names and shapes the model alone knows, or holds
            what lora_fx cannot represent.
        AdapterFileError: it is damaged.
    """
    if folder.config.get("target_parameters"):
        raise PeftFormatError(
            "adapter_config.json: target_parameters",
            expected="an adapter of modules",
            got=repr(folder.config["target_parameters"]),
            advice="Load it into its model with load_adapter, and audit the model.",
        )
    layers = {layer.name: layer for layer in _layers(folder)}
    names = {key.removeprefix(PREFIX): value for key, value in folder.tensors.items() if ".lora_" not in key}
    state = {plain_path(name): value for name, value in names.items()}
    file = from_peft(
        folder,
        Layout(
            layers,
            tuple(_site(layer) for layer in layers.values()),
            tuple(layer.path for layer in layers.values()),
            state,
            frozenset(name for name in state if name.rpartition(".")[2] not in _STATISTICS),
        ),
    )
    return replace(file, plan=replace(file.plan, notes=(*file.plan.notes, _NOTE)))


def _layers(folder: PeftFolder) -> Iterator[Layer]:
    """Yield the adapted weights; the shapes of A and B tell which wrapper made them."""
    tensors = folder.tensors
    for key, a in tensors.items():
        for suffix, other in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            b = tensors.get(key.removesuffix(suffix) + other)
            if key.endswith(suffix) and b is not None:
                wrapped = key.removesuffix(suffix)
                attention = f"{wrapped}{BASE}.out_proj.lora_A.weight" in tensors
                kind, form = _read(a, b, embedding="embedding" in suffix)
                if attention or f"{BASE}.out_proj" in wrapped:
                    kind = "attention" if attention else "attention-out"
                attribute = "in_proj_weight" if attention else "weight"
                yield Layer(plain_path(wrapped.removeprefix(PREFIX)), attribute, kind, form)


def _read(a: Tensor, b: Tensor, *, embedding: bool) -> tuple[LayerKind, MatrixForm]:
    if embedding:
        return "embedding", columns_form((a.shape[1], b.shape[0]))
    shape = (b.shape[0], *a.shape[1:])
    return "linear" if a.dim() == 2 else "conv", rows_form(shape)


def _site(layer: Layer) -> Site:
    kind = "attention" if layer.kind == "attention-out" else layer.kind
    return Site(layer.name, kind, layer.form.shape, "float32", layer.form, (layer.name,), module=layer.path)
