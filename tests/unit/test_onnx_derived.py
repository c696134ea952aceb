"""Constants that the exporter computes from adapted weights: redone, proven, and not blamed on others."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fx.certificates import Check
from lora_fx.errors import ExportError
from lora_fx.passes.certify import certify, examine
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.passes.onnx_files import load, save
from lora_fx.passes.onnx_metadata import read_map
from tests.unit.onnx_adapters import adapter, subject_with
from tests.unit.onnx_models import export, export_pair, made, subject

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 4, 4], [2, 0, 9]])
BATCH = {"dynamic_shapes": {"x": {0: torch.export.Dim.AUTO}}}


class Summed(nn.Module):
    """Adds the sum of a weight that it also multiplies with; zeros, which an optimiser drops, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + 0.1 * self.a.weight.sum()


class Turned(nn.Module):
    """Multiplies with a weight turned upside down: the exporter's constant has a negative stride."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight.flip(0))


class Bags(nn.Module):
    """Looks up bags of words; the exporter makes a row of zeros of the table's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(11, 6, mode="sum"), nn.Linear(6, 3)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.out(self.table(x, offsets))


def status(base: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    found = read_map(load(base))
    assert found is not None
    return {name: (placement.status, placement.opaque) for name, placement in found.placements.items()}


def constant(path: Path) -> str:
    """Return the name of the constant that the sum became."""
    return next(v.name or "" for v in load(path).graph.initializers.values() if v.shape == [])


def spoiled(path: Path, name: str) -> Path:
    """Write a copy of a file in which an initializer is a little off."""
    model = load(path)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 1.001, name=name)
    save(model, path.parent / "spoiled.onnx")
    return path.parent / "spoiled.onnx"


def failures(checks: tuple[Check, ...]) -> dict[str, str]:
    return {check.name: check.place for check in checks if not check.ok}


def test_a_constant_computed_from_an_adapted_weight_is_computed_again(tmp_path: Path) -> None:
    model = made(Summed)
    base, folded, certificate = export_pair(model, ("a.weight", "b.weight"), X, tmp_path, **BATCH)
    assert certificate.ok
    assert "1 constants are what the exporter computes from W of a.weight" in certificate["derived"].detail
    session = onnxruntime.InferenceSession(str(folded), providers=["CPUExecutionProvider"])
    with subject(model, ("a.weight", "b.weight")).folded_state() as state, torch.no_grad():
        expected = state(X)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": X.numpy()})[0]), expected)
    assert status(base)["a.weight"] == ("opaque", (constant(base),))
    assert status(base)["b.weight"] == ("known", ())


def test_only_the_constant_of_a_changed_weight_may_change(tmp_path: Path) -> None:
    model = made(Summed)
    file = adapter(model, ("b.weight",))
    base, folded = tmp_path / "base.onnx", tmp_path / "task.onnx"
    export(subject_with(model, file), model, X, folded, base=base, **BATCH)
    assert certify(base, folded, adapter=file).ok
    name = constant(folded)
    found = certify(base, spoiled(folded, name), adapter=file)
    assert failures(found.checks) == {"untouched": f"initializer {name!r}"}


def test_what_files_alone_cannot_prove_is_not_called_proven(tmp_path: Path) -> None:
    model = made(Summed)
    file = adapter(model, ("a.weight", "b.weight"))
    base, folded = tmp_path / "base.onnx", tmp_path / "task.onnx"
    given = subject_with(model, file)
    assert export(given, model, X, folded, base=base, **BATCH).ok
    name = constant(folded)
    assert failures(certify(base, folded, adapter=file).checks) == {"derived": f"initializer {name!r}"}
    with pytest.raises(ExportError, match=r"a\.weight.*export_onnx"):
        fold_onnx(base, file, tmp_path / "fold.onnx")
    # Beside the model it is known what the constant should be.
    assert not failures(examine(base, folded, given.weights, derived=load(folded)).checks)
    wrong = examine(base, spoiled(folded, name), given.weights, derived=load(folded))
    assert failures(wrong.checks) == {"derived": f"initializer {name!r}"}


def test_a_constant_with_a_negative_stride(tmp_path: Path) -> None:
    base, _, certificate = export_pair(made(Turned), ("a.weight",), X, tmp_path, **BATCH)
    assert certificate.ok
    assert status(base)["a.weight"][0] == "known"


def test_a_constant_of_a_weights_shape_alone_hides_nothing(tmp_path: Path) -> None:
    model = made(Bags)
    export_onnx(model, tmp_path / "base.onnx", IDS, **BATCH)
    assert status(tmp_path / "base.onnx")["table.weight"] == ("known", ())
    file = adapter(model, ("out.weight",), full=("table.weight",))
    assert fold_onnx(tmp_path / "base.onnx", file, tmp_path / "task.onnx").ok


def test_inputs_that_the_model_refuses_are_not_tried(tmp_path: Path) -> None:
    inputs = (IDS.flatten(), torch.tensor([0, 2, 5]))
    certificate = export_pair(made(Bags), ("out.weight",), inputs, tmp_path)[2]
    assert certificate.ok
    assert [note.partition(" was not tried")[0] for note in certificate.notes] == [
        "another batch",
        "a random input",
        "base.onnx was not there: it was exported first, and kept",
    ]
    assert list(certificate["parity"].data) == ["example"]
