"""Which outputs of a graph random numbers reach, and what a certificate says of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CertificateError
from lora_fx.passes import certify_parity
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.onnx_draws import Draws

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Shuffled(nn.Module):
    """Gives rows in an order that it draws, as a masked autoencoder does, and what it took them from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = torch.tanh(self.linear(x))
        order = torch.rand(rows.shape, device=rows.device).argsort(1)
        return {"rows": rows, "shuffled": rows.gather(1, order), "order": order}


class Drawn(Shuffled):
    """Gives nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)["shuffled"]


def adapted(model: nn.Module) -> nn.Module:
    lora_fx.inject(model.eval(), lora_fx.Policy(lora_fx.Rule(rank=2)), X, seed=0)
    for parameter in lora_fx.parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def test_outputs_that_depend_on_drawn_numbers_are_named_and_the_others_compared(tmp_path: Path) -> None:
    """Before, such a file was refused: the exporter or onnxruntime were said to compute something else."""
    base = export_onnx(Shuffled().eval(), tmp_path / "base.onnx", X)
    folded = export_onnx(adapted(Shuffled()), tmp_path / "task.onnx", X)
    for certificate in (base, folded):
        assert certificate.ok
        note = next(note for note in certificate.notes if "draws random numbers" in note)
        assert "shuffled, order not compared" in note
        assert "rows" not in note
        assert certificate["parity"].data["example"]["folded"] < 2e-6


def test_drawn_numbers_excuse_no_fault_in_the_other_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = certify_parity.run, itertools.count()

    def off_for_the_folded_file(*args: Any) -> list[torch.Tensor]:
        factor = 1 + 1e-4 * (next(calls) % 2)
        return [out * factor if out.is_floating_point() else out for out in run(*args)]

    monkeypatch.setattr(certify_parity, "run", off_for_the_folded_file)
    with pytest.raises(CertificateError, match="against the folded model"):
        export_onnx(adapted(Shuffled()), tmp_path / "task.onnx", X)


def test_where_drawn_numbers_reach_everything_the_checks_say_that_they_compare_nothing(
    tmp_path: Path,
) -> None:
    certificate = export_onnx(adapted(Drawn()), tmp_path / "task.onnx", X)
    assert certificate.ok
    for name in ("parity", "effect"):
        assert "nothing to compare" in certificate[name].detail
    assert any("let the forward take the random numbers" in note for note in certificate.notes)
    assert certificate["delta"].ok


def drawn(text: str) -> Draws:
    header = '<ir_version: 10, opset_import: ["" : 20, "own" : 1]>\n'
    return Draws.of(ir.from_onnx_text(header + text))


def test_random_numbers_reach_through_branches_and_functions_and_not_through_shapes() -> None:
    found = drawn("""g (float[2] x, bool c) => (float[2] a, int64[1] b, float[2] d, float[2] e) {
        noise = RandomNormalLike (x)
        a = Add (x, noise)
        b = Shape (noise)
        d = If (c) <
            then_branch = t () => (float[2] y) { y = RandomUniform <shape = [2]> () },
            else_branch = f () => (float[2] z) { z = Identity (x) }
        >
        e = Neg (x)
    }""")
    assert found.reached == {0, 2}
    assert found.operators == ("RandomNormalLike", "RandomUniform")
    called = drawn("""g (float[2] x) => (float[2] a, float[2] b) { a = own.Noisy (x) b = Neg (x) }
    <domain: "own", opset_import: ["" : 20]> Noisy (x) => (y) { y = Bernoulli (x) }""")
    assert called.reached == {0}


@pytest.mark.parametrize(("training", "reached"), [("true", {0}), ("false", set()), (None, set())])
def test_dropout_draws_where_it_trains(training: str | None, reached: set[int]) -> None:
    given = "" if training is None else ", ratio, training"
    value = 1 if training == "true" else 0
    found = drawn(
        f"g (float[2] x) => (float[2] a) <float ratio = {{0.5}}, bool training = {{{value}}}>"
        f"{{ a = Dropout (x{given}) }}"
    )
    assert found.reached == reached
