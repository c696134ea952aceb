"""Half precisions: folded in float32, cast once, what is lost is said, and the graphs are valid."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterValueError, ExportError
from lora_fx.passes.certify import certify
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.extent import Extent
from lora_fx.passes.onnx_files import load
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_metadata import read_changes, read_map
from lora_fx.passes.onnx_tensors import as_torch
from tests.unit.onnx_adapters import adapter, subject_with
from tests.unit.onnx_models import Mixed, Tied, export, export_pair, made, subject

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)
NAMES = ("conv.weight", "qkv.weight", "o.weight", "p.weight", "head.weight")


def held(path: Path, mapping: ParameterMap, name: str) -> Tensor:
    placement = mapping.placements[name]
    tensor = load(path).graph.initializers[placement.recipes[0].initializer].const_value
    assert tensor is not None
    return placement.restored(tensor)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_are_folded_in_float32_and_cast_once(precision: str, tmp_path: Path) -> None:
    model, dtype = made(Mixed), getattr(torch, precision)
    base, folded, certificate = export_pair(model, NAMES, IMAGE, tmp_path, precision=dtype)
    assert certificate.ok
    onnx.checker.check_model(str(folded), full_check=True)
    mapping = read_map(load(base))
    assert mapping is not None
    for name, change in subject(model, NAMES).changes.items():
        if mapping.placements[name].status == "known" and mapping.placements[name].recipes[0].scale is None:
            assert torch.equal(held(folded, mapping, name), change.after.to(dtype))
    declared = load(folded)
    assert {str(v.dtype) for v in (*declared.graph.inputs, *declared.graph.outputs)} == {
        "FLOAT16" if precision == "float16" else "BFLOAT16"
    }
    # The parity is that of the precision, not that of a broken graph.
    assert 1e-5 < max(item["folded"] for item in certificate["parity"].data.values()) < 2e-2


def test_bfloat16_runs_as_a_float32_twin_where_there_are_no_kernels(tmp_path: Path) -> None:
    _, _, certificate = export_pair(made(Tied), ("up.weight",), IDS, tmp_path, precision=torch.bfloat16)
    if certificate.environment["provider"] == "CPUExecutionProvider":
        assert any("twins" in note for note in certificate.notes)


def test_a_change_below_the_precision_is_noted_or_refused(tmp_path: Path) -> None:
    model = made(Mixed)
    small = subject(model, ("o.weight",), size=1e-5)
    with pytest.raises(AdapterValueError, match=r"o\.weight"):
        export(small, model, IMAGE, tmp_path / "t.onnx", precision=torch.bfloat16)
    assert not list(tmp_path.iterdir())
    middle = subject(model, ("o.weight",), size=1e-3)
    certificate = export(middle, model, IMAGE, tmp_path / "t.onnx", precision=torch.bfloat16, min_retained=0)
    assert any("o.weight" in note and "lost" in note for note in certificate.notes)
    extents = read_changes(load(tmp_path / "t.onnx").metadata_props)
    assert extents is not None
    assert extents["o.weight"].retained < 0.9
    assert extents["o.weight"].delta == pytest.approx(8e-3, rel=0.5)


def test_retained_is_the_share_of_the_change_that_is_stored() -> None:
    before, after = torch.full((4,), 1.0), torch.full((4,), 1.0 + 2**-9)
    assert Extent.of(before, after, after).retained == 1
    assert Extent.of(before, after, after.bfloat16()).retained == pytest.approx(0)
    assert Extent.of(before, after, after.half()).retained == 1


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float16"):
        export_onnx(made(Tied), tmp_path / "t.onnx", IDS, precision="int8")


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    base, folded, certificate = export_pair(made(Tied), ("up.weight",), IDS, tmp_path, opset=opset)
    assert certificate.ok
    assert load(folded).opset_imports[""] == load(base).opset_imports[""] == opset


def test_a_bfloat16_model_exports_as_it_is_and_is_judged_as_one(tmp_path: Path) -> None:
    model: nn.Module = made(Mixed).bfloat16()
    base, folded, certificate = export_pair(model, NAMES, IMAGE.bfloat16(), tmp_path)
    assert certificate.ok
    onnx.checker.check_model(str(folded), full_check=True)
    assert load(base).opset_imports[""] == 22


def test_a_half_precision_model_exports_as_it_is(tmp_path: Path) -> None:
    model: nn.Module = made(Tied).half()
    file = adapter(model, ("up.weight",))
    export(subject_with(model, file), model, IDS, tmp_path / "t.onnx", base=tmp_path / "b.onnx")
    assert certify(tmp_path / "b.onnx", tmp_path / "t.onnx", adapter=file).ok
    tensor = load(tmp_path / "t.onnx").graph.outputs[0]
    assert str(tensor.dtype) == "FLOAT16"
    assert all(
        as_torch(value.const_value).dtype == torch.float16
        for value in load(tmp_path / "t.onnx").graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    )
