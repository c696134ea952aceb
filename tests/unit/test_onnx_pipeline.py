"""From an injected model to ONNX and back, with the public functions alone."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.passes import onnx_files
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.passes.onnx_diff import compare
from tests.unit.onnx_models import Mixed, Tied, made

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)


def trained(
    model: nn.Module, policy: lora_fx.Policy, inputs: torch.Tensor, adapter: str = "default"
) -> nn.Module:
    lora_fx.inject(model.eval(), policy, inputs, adapter=adapter, seed=0)
    lora_fx.set_adapter(model, adapter)
    model.train()
    optimiser = torch.optim.SGD(lora_fx.parameters(model, adapter), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()
    return model


POLICIES = {
    "roles": lora_fx.Policy(lora_fx.Rule(role="qv", rank=2), lora_fx.Train(role="head")),
    "all": lora_fx.Policy(lora_fx.Rule(rank=2)),
    "dora": lora_fx.Policy(lora_fx.Rule(kind="linear", rank=2, dora=True)),
    "biases": lora_fx.Policy(lora_fx.Rule(role="qv", rank=2), bias="all"),
    "statistics": lora_fx.Policy(lora_fx.Rule(kind="conv", rank=2), norm_stats="train"),
}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_injected_equals_exported(name: str, tmp_path: Path) -> None:
    model = trained(made(Mixed), POLICIES[name], IMAGE).eval()
    certificate = lora_fx.export_onnx(model, tmp_path / "task.onnx", IMAGE, base=tmp_path / "base.onnx")
    assert certificate.ok
    session = lora_fx.session(tmp_path / "task.onnx")
    with torch.no_grad():
        expected = model(IMAGE)
    found = torch.from_numpy(session.run(None, {"image": IMAGE.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "task.onnx" in str(lora_fx.audit(tmp_path / "task.onnx"))


@pytest.mark.parametrize("name", ["all", "dora", "roles"])
def test_folding_the_file_is_exporting_the_model(name: str, tmp_path: Path) -> None:
    model = trained(made(Mixed), POLICIES[name], IMAGE).eval()
    lora_fx.export_onnx(model, tmp_path / "export.onnx", IMAGE, base=tmp_path / "base.onnx")
    lora_fx.save_adapter(model, tmp_path / "task.safetensors")
    certificate = fold_onnx(tmp_path / "base.onnx", tmp_path / "task.safetensors", tmp_path / "fold.onnx")
    assert certificate.ok
    exported, folded = (onnx_files.load(tmp_path / f"{stem}.onnx") for stem in ("export", "fold"))
    comparison = compare(exported, folded)
    assert comparison.difference is None
    for a, b in comparison.pairs:
        assert a.const_value is not None
        assert b.const_value is not None
        assert a.const_value.tobytes() == b.const_value.tobytes(), a.name
    assert exported.metadata_props["lora_fx.plan"] == folded.metadata_props["lora_fx.plan"]
    assert lora_fx.certify(
        tmp_path / "base.onnx", tmp_path / "export.onnx", adapter=tmp_path / "task.safetensors"
    ).ok


def test_one_base_for_two_adapters(tmp_path: Path) -> None:
    model = made(Tied)
    base = tmp_path / "base.onnx"
    lora_fx.export_onnx(model, base, IDS)
    outputs: list[torch.Tensor] = []
    for adapter, rule in (("a", lora_fx.Rule(name="up.weight", rank=2)), ("b", lora_fx.Rule(rank=2))):
        trained(model, lora_fx.Policy(rule), IDS, adapter)
    for adapter in ("a", "b"):
        lora_fx.set_adapter(model, adapter)
        lora_fx.export_onnx(model, tmp_path / f"{adapter}.onnx", IDS, base=base)
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{adapter}.onnx"), providers=["CPUExecutionProvider"]
        )
        outputs.append(torch.from_numpy(session.run(None, {"ids": IDS.numpy()})[0]))
        with torch.no_grad():
            torch.testing.assert_close(outputs[-1], model(IDS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*outputs)
    before = base.read_bytes()
    with lora_fx.disable_adapter(model):
        lora_fx.export_onnx(model, tmp_path / "again.onnx", IDS)
    assert compare(onnx_files.load(base), onnx_files.load(tmp_path / "again.onnx")).difference is None
    assert base.read_bytes() == before


def test_export_leaves_an_injected_model_as_it_was(tmp_path: Path) -> None:
    model = trained(made(Mixed), POLICIES["all"], IMAGE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    lora_fx.export_onnx(model, tmp_path / "task.onnx", IMAGE)
    assert [type(module) for module in model.modules()] == classes
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class _TwoNames(nn.Module):
    """A parametrized layer under two names, by the second of which torch.export knows its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.again(x.tanh())


def test_a_change_is_known_by_every_name_of_its_module(tmp_path: Path) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    model = trained(made(_TwoNames), POLICIES["all"], x).eval()
    certificate = lora_fx.export_onnx(model, tmp_path / "task.onnx", x, base=tmp_path / "base.onnx")
    assert certificate.ok
    found = lora_fx.session(tmp_path / "task.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_another_base_of_the_same_graph_is_told_without_the_adapter(tmp_path: Path) -> None:
    model = trained(made(Mixed), POLICIES["roles"], IMAGE).eval()
    lora_fx.export_onnx(model, tmp_path / "task.onnx", IMAGE, base=tmp_path / "base.onnx")
    right = lora_fx.certify(tmp_path / "base.onnx", tmp_path / "task.onnx")
    assert right.ok
    assert any("by how much" in note for note in right.notes)
    lora_fx.export_onnx(made(Mixed, seed=5).eval(), tmp_path / "other.onnx", IMAGE)
    wrong = lora_fx.certify(tmp_path / "other.onnx", tmp_path / "task.onnx")
    assert not wrong.ok
    assert "another base?" in wrong["changed"].detail
    assert wrong["structure"].ok
