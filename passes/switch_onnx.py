"""Adapters as inputs: one ONNX file for every request, and small files that onnxruntime switches between.

``switch_onnx`` gives a base file inputs for an adapter (``onnx_branches``) and writes the adapter itself in
onnxruntime's own format beside it; ``pack_adapter`` writes that of another adapter. Without an active adapter
the file computes what the base does. Each request costs the branches; a folded file costs nothing::

    lora_fx.switch_onnx("base.onnx", "a.safetensors", "switch.onnx")          # and switch.a.onnx_adapter
    lora_fx.pack_adapter("switch.onnx", "b.safetensors", "b.onnx_adapter")
    adapter = onnxruntime.LoraAdapter(); adapter.Load("b.onnx_adapter")
    options = onnxruntime.RunOptions(); options.add_active_adapter(adapter)
    lora_fx.session("switch.onnx").run(None, feeds, options)

Keep ``adapter`` for as long as ``options`` is used: the options do not. onnxruntime (1.31) ignores active
adapters where inputs are bound (``run_with_iobinding``), and of two active ones that hold the same names
takes the first, without a word.
"""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.adapter_file import AdapterFile
from lora_fx.certificates import Certificate, Check
from lora_fx.errors import ExportError, LoraFxError
from lora_fx.files import atomic_write
from lora_fx.fingerprints import BaseCheck
from lora_fx.passes import onnx_files, onnx_parity
from lora_fx.passes.certify import environment
from lora_fx.passes.fold_onnx import check_base, relative, relocated
from lora_fx.passes.onnx_adapter import base_map
from lora_fx.passes.onnx_branches import add_inputs, branch_inputs
from lora_fx.passes.onnx_feeds import runnable_feeds
from lora_fx.passes.onnx_patch import find_patches
from lora_fx.passes.onnx_refusals import refuse_folded, refuse_onto, refuse_onto_data
from lora_fx.passes.onnx_serve import adapted_session
from lora_fx.passes.onnx_session import open_session
from lora_fx.passes.onnx_tensors import TORCH, can_hold_weights, ort_value
from lora_fx.passes.weights import adapter_weights
from lora_fx.providers import Providers, Runtime, choose, onnxruntime

SUFFIX = ".onnx_adapter"
SWITCH_KEY = "lora_fx.switch"
_TOLD = 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""How far the branches may lie from the folded weights: a folded weight is rounded once more."""


def switch_onnx(
    base_onnx: str | Path,
    adapter: str | Path | AdapterFile,
    out: str | Path,
    *,
    base_check: BaseCheck = "exact",
    certify: bool = True,
    providers: Providers = "auto",
) -> Certificate:
    """Write the base with inputs for an adapter, and beside it the adapter, ``<out>.<name>.onnx_adapter``.

    Linear weights, embeddings and convolutions of one group get a low-rank branch of any rank; all others
    are inputs as a whole. The certificate says that the file computes the base without an adapter, and
    with this one what the folded base computes, on random inputs.

    Raises:
        ExportError: a weight lies in the base in a way that is not known, or ``out`` is the base or its data.
        BaseMismatchError: the adapter was made for another base, or one is folded into this file already.
        AdapterFileError: the adapter file cannot be read.
        CertificateError: the file computes something else, or the runtime refuses it (bfloat16 on a CPU);
            nothing was written to ``out``.
    """
    base_path, target = Path(base_onnx), Path(out)
    refuse_onto(target, base_path, "the base")
    file = adapter if isinstance(adapter, AdapterFile) else AdapterFile.read(adapter)
    model = onnx_files.load(base_path)
    refuse_folded(model, base_path)
    refuse_onto_data(target, model, base_path.parent)
    check_base(model, base_map(model, file), file, base_path, base_check)
    patches = find_patches(model, base_map(model, file), adapter_weights(file)).require(str(base_path))
    branched = add_inputs(model, patches, file)
    model.metadata_props[SWITCH_KEY] = json.dumps(branched)
    label = Path(adapter).stem if isinstance(adapter, (str, Path)) else "adapter"
    content = _packed(parameters_for(model, file, str(target)))
    beside = relative(base_path.parent, target.parent) if _has_data(model) else Path()
    with onnx_files.draft(target) as draft:
        with relocated(model, beside):
            atomic_write(draft.path, ir.to_proto(model).SerializeToString())
        if certify:
            runtime = choose(providers)
            checks = _checks(base_path, draft.path, file, content, runtime, base_check)
            made = Certificate(base_path.name, target.name, checks, environment(runtime)).raise_for_failure()
        else:
            made = Certificate(base_path.name, target.name, (), {}, ("not certified, as asked",))
        atomic_write(target.with_name(f"{target.stem}.{label}{SUFFIX}"), content)
        draft.publish()
    whole = _whole_inputs(model, branched)
    note = f"inputs as a whole, without a low-rank branch: {', '.join(whole[:5])}"
    return made.noted(note) if whole else made


def pack_adapter(
    switch: str | Path,
    adapter: str | Path | AdapterFile,
    out: str | Path,
    *,
    base_check: BaseCheck = "exact",
) -> None:
    """Write another adapter for a file that ``switch_onnx`` made; of other ranks, or on fewer weights.

    Raises:
        ExportError: the file has no input for a weight of this adapter, or was not made by ``switch_onnx``.
        BaseMismatchError: the adapter was made for another base.
        AdapterFileError: the adapter file cannot be read.
    """
    path = Path(switch)
    file = adapter if isinstance(adapter, AdapterFile) else AdapterFile.read(adapter)
    model = onnx_files.load(path)
    if SWITCH_KEY not in model.metadata_props:
        raise ExportError(
            str(path),
            expected="a file with adapters as inputs",
            got="a plain ONNX file",
            advice="Make it with switch_onnx(base, adapter, out).",
        )
    check_base(model, base_map(model, file), file, path, base_check)
    atomic_write(out, _packed(parameters_for(model, file, str(path))))


def taken_text(model: ir.Model, path: Path) -> str | None:
    """Say which weights a switch file takes adapters on, and which lie beside it; None for any other file."""
    if SWITCH_KEY not in model.metadata_props:
        return None
    branched = [str(name) for name in json.loads(model.metadata_props[SWITCH_KEY])]
    whole = _whole_inputs(model, branched)
    beside = sorted(found.name for found in path.parent.glob(f"{glob.escape(path.stem)}.*{SUFFIX}"))
    told = [
        f"low-rank ones on {_listed(branched)}",
        f"values of {_listed(whole)}" if whole else "",
        f"beside it {_listed(beside)}" if beside else "",
    ]
    return "; ".join(text for text in told if text)


def _whole_inputs(model: ir.Model, branched: Iterable[str]) -> list[str]:
    mine = {f"{name}/{letter}" for name in branched for letter in "AB"}
    return [str(v.name) for v in model.graph.inputs if v.is_initializer() and v.name not in mine]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return (", ".join(names[:_TOLD]) or "nothing") + more


def parameters_for(model: ir.Model, file: AdapterFile, where: str) -> dict[str, Tensor]:
    """Return the values of a switch file's inputs for an adapter, by their names."""
    branched = set(json.loads(model.metadata_props[SWITCH_KEY]))
    patches = find_patches(model, base_map(model, file), adapter_weights(file))
    initializers = model.graph.initializers
    found: dict[str, Tensor] = {}
    for patch in patches.require(where):
        name, recipe = patch.steps[0].name, patch.steps[0].recipe
        if name not in branched:
            if not initializers[patch.initializer].is_graph_input():
                raise _no_input(where, patch.owner, "no input for it")
            found[patch.initializer] = patch.value()
            continue
        pair = branch_inputs(model, file, name, recipe)
        if pair is None:
            raise _no_input(
                where, name, "a low-rank branch for it, and this adapter is none (DoRA, or whole)"
            )
        dtype = _dtype(initializers[f"{name}/A"])
        found |= {f"{name}/{letter}": value.to(dtype) for letter, value in zip("AB", pair, strict=True)}
    return found


def _no_input(where: str, name: str, got: str) -> ExportError:
    return ExportError(
        f"{where}: {name}",
        expected="an input for every weight that the adapter changes",
        got=got,
        advice="Make the file with the adapter that changes most: switch_onnx(base, adapter, out).",
    )


def _packed(parameters: Mapping[str, Tensor]) -> bytes:
    """Return onnxruntime's adapter file of these parameters."""
    made = onnxruntime().AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters({name: ort_value(value) for name, value in parameters.items()})
    with tempfile.TemporaryDirectory(prefix="lora_fx-") as folder:
        path = Path(folder) / f"packed{SUFFIX}"
        made.export_adapter(str(path))
        return path.read_bytes()


@contextmanager
def active(content: bytes) -> Generator[Any]:
    """Give run options under which an adapter is active; they do not keep it alive themselves."""
    adapter, options = onnxruntime().LoraAdapter(), onnxruntime().RunOptions()
    with tempfile.TemporaryDirectory(prefix="lora_fx-") as folder:
        path = Path(folder) / f"packed{SUFFIX}"
        path.write_bytes(content)
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
        yield options


def _checks(
    base: Path, switch: Path, file: AdapterFile, content: bytes, runtime: Runtime, base_check: BaseCheck
) -> tuple[Check, ...]:
    """Compare the file without an adapter with its base, and with the adapter with the folded base."""
    try:
        plain, made = open_session(base, runtime), open_session(switch, runtime)
        folded = adapted_session(base, file, runtime, base_check=base_check)
    except LoraFxError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's classes differ from version to version
        return (Check("runtime", ok=False, detail=str(error).strip().splitlines()[0], place="the file"),)
    feeds = runnable_feeds(plain, seed=0)
    held = onnx_files.load(base).graph.initializers.values()
    limit = max(TOLERANCE[_dtype(value)] for value in held if can_hold_weights(value.const_value))
    found: list[Check] = []
    with active(content) as options:
        for name, other, under in (("without", plain, None), ("with", folded, options)):
            against = "the base" if under is None else "the folded base"
            try:
                gap = onnx_parity.distance(onnx_parity.run(made, feeds, under), onnx_parity.run(other, feeds))
            except onnx_parity.RuntimeFault as error:
                found.append(Check(name, ok=False, detail=str(error), place="the runtime"))
                continue
            detail = f"error {gap:.2g} against {against}, of {limit:.2g} allowed"
            place = "" if gap <= limit else "the outputs"
            found.append(Check(name, ok=gap <= limit, detail=detail, place=place))
    return tuple(found)


def _has_data(model: ir.Model) -> bool:
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def _dtype(value: ir.Value) -> torch.dtype:
    assert value.const_value is not None
    return TORCH[value.const_value.dtype]
