"""Adapters as inputs: one file, onnxruntime's own adapters, and the injected model's outputs for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import pack_adapter, switch_onnx
from lora_fx.cli import main
from lora_fx.errors import BaseMismatchError, CertificateError, ExportError
from lora_fx.passes import onnx_branches, onnx_files
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.policy import Policy, Rule, Train
from tests.unit.onnx_adapters import adapter, subject_with
from tests.unit.onnx_models import Tied, made, settle

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)
RANDOM = torch.Generator().manual_seed(4)
POLICIES = {
    "a": Policy(Train(module="head"), Rule(kind=("linear", "conv"), rank=4, rslora=True)),
    "b": Policy(Rule(name="wide.*", rank=2, alpha=8), Rule(name="conv.*", rank=1)),
}


class Net(nn.Module):
    """A fused convolution, a grouped one, matrices before (MatMul) and after (Gemm) pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.wide, self.pooled, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        settle(self)

    def forward(self, image: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.bn(self.conv(image)))).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.pooled((x + torch.tanh(self.wide(x))).mean(1))))


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model with two adapters, and one file for both."""
    folder = tmp_path_factory.mktemp("switch")
    model = made(Net).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        patch.setattr(onnx_files, "ALWAYS_INLINE", 200)
        export_onnx(model, folder / "base.onnx", IMAGE, certify=False)
    for name, policy in POLICIES.items():
        lora_fx.inject(model, policy, IMAGE, adapter=name)
        with torch.no_grad():
            for parameter in lora_fx.parameters(model, name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=RANDOM))
        lora_fx.save_adapter(model, folder / f"{name}.safetensors", name)
    made_of = switch_onnx(folder / "base.onnx", folder / "a.safetensors", folder / "switch.onnx")
    assert made_of.ok
    assert [check.name for check in made_of.checks] == ["without", "with"]
    assert made_of.notes[-1].endswith("low-rank branch: grouped.weight, head.weight, head.bias")
    pack_adapter(folder / "switch.onnx", folder / "b.safetensors", folder / "switch.b.onnx_adapter")
    return model, folder / "switch.onnx"


def test_the_audit_of_a_switch_file_says_what_it_takes(switch: tuple[nn.Module, Path]) -> None:
    with pytest.raises(lora_fx.errors.AdapterFileError) as caught:
        lora_fx.audit(switch[1])
    assert "takes adapters at run time and holds none" in caught.value.got
    for name in ("wide.weight", "pooled.weight", "conv.weight", "values of grouped.weight"):
        assert name in caught.value.got
    assert "beside it switch.a.onnx_adapter, switch.b.onnx_adapter" in caught.value.got
    assert "base" not in caught.value.got


def test_every_adapter_over_one_file_is_the_injected_model(switch: tuple[nn.Module, Path]) -> None:
    model, path = switch
    session = lora_fx.session(path)
    feeds = {"image": IMAGE.numpy()}
    assert [item.name for item in session.get_inputs()] == ["image"]
    outputs: dict[str, Any] = {}
    for name in ("a", "b", "a"):
        held, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        held.Load(str(path.with_name(f"switch.{name}.onnx_adapter")))
        options.add_active_adapter(held)
        outputs[name] = session.run(None, feeds, options)[0]
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            expected = model(IMAGE).numpy()
        assert np.linalg.norm(outputs[name] - expected) <= 1e-5 * np.linalg.norm(expected)
    outputs["none"] = session.run(None, feeds)[0]
    with lora_fx.disable_adapter(model), torch.no_grad():
        np.testing.assert_allclose(outputs["none"], model(IMAGE).numpy(), rtol=1e-5, atol=1e-6)
    for one, other in (("a", "b"), ("a", "none"), ("b", "none")):
        assert np.abs(outputs[one] - outputs[other]).max() > 1e-2


def test_branches_are_low_rank_and_the_base_stays_in_its_file(switch: tuple[nn.Module, Path]) -> None:
    _, path = switch
    assert sorted(file.name for file in path.parent.glob("switch.*")) == [
        "switch.a.onnx_adapter",
        "switch.b.onnx_adapter",
        "switch.onnx",
    ]
    shapes = {name: value.shape() for name, value in parameters(path, "b").items()}
    assert shapes == {
        "conv.weight/A": [1, 3, 3, 3],
        "conv.weight/B": [8, 1, 1, 1],
        "wide.weight/A": [8, 2],
        "wide.weight/B": [2, 8],
    }
    onnx.checker.check_model(str(path), full_check=True)


def parameters(path: Path, name: str) -> Mapping[str, Any]:
    file = str(path.with_name(f"switch.{name}.onnx_adapter"))
    found: Mapping[str, Any] = onnxruntime.AdapterFormat.read_adapter(file).get_parameters()
    return found


def test_a_tied_weight_has_a_branch_in_both_places(tmp_path: Path) -> None:
    model = made(Tied)
    export_onnx(model, tmp_path / "base.onnx", IDS, certify=False)
    file = adapter(model, ("emb.weight", "up.weight"))
    certificate = switch_onnx(tmp_path / "base.onnx", file, tmp_path / "switch.onnx")
    assert certificate.ok
    assert not certificate.notes
    held, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    held.Load(str(tmp_path / "switch.adapter.onnx_adapter"))
    options.add_active_adapter(held)
    (found,) = lora_fx.session(tmp_path / "switch.onnx").run(None, {"ids": IDS.numpy()}, options)
    with subject_with(model, file).folded_state() as folded, torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), folded(IDS), rtol=1e-4, atol=1e-5)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    layers = (nn.Linear(8, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5))  # a MatMul and a Gemm
    model, signal = nn.Sequential(*layers).double().eval(), IMAGE[:, :, 0].double()
    export_onnx(model, tmp_path / "base.onnx", signal, certify=False)
    lora_fx.inject(model, Policy(Rule(rank=2, alpha=3.1)), signal)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=RANDOM))
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    certificate = switch_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "switch.onnx")
    assert certificate.ok
    assert not certificate.notes


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision(precision: str, tmp_path: Path) -> None:
    model = made(Tied)
    export_onnx(model, tmp_path / "base.onnx", IDS, precision=precision, certify=False)
    file = adapter(model, ("emb.weight", "up.weight"))
    paths = (tmp_path / "base.onnx", file, tmp_path / "switch.onnx")
    with pytest.raises(BaseMismatchError, match="float32"):
        switch_onnx(*paths)
    if precision == "bfloat16":  # the CPU provider has no kernels for it
        with pytest.raises(CertificateError, match=r"'runtime'.*NOT_IMPLEMENTED"):
            switch_onnx(*paths, base_check="shape", providers="cpu")
        assert not list(tmp_path.glob("switch*"))
        return
    assert switch_onnx(*paths, base_check="shape").ok
    pack_adapter(paths[2], file, tmp_path / "again.onnx_adapter", base_check="shape")
    packed = [tmp_path / f"{name}.onnx_adapter" for name in ("switch.adapter", "again")]
    assert packed[0].read_bytes() == packed[1].read_bytes()


def test_what_a_file_has_no_input_for_is_refused(switch: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, path = switch[1].with_name("base.onnx"), switch[1]
    model = made(Net)
    dora = adapter(model, ("wide.weight",), dora=("wide.weight",))
    with pytest.raises(ExportError, match=r"wide\.weight.*DoRA"):
        pack_adapter(path, dora, tmp_path / "dora.onnx_adapter")
    with pytest.raises(ExportError, match=r"adapters as inputs.*plain"):
        pack_adapter(base, dora, tmp_path / "dora.onnx_adapter")
    few = adapter(model, ("wide.weight",))
    switch_onnx(base, few, base.with_name("few.onnx"), certify=False)
    with pytest.raises(ExportError, match=r"pooled\.weight.*no input"):
        pack_adapter(
            base.with_name("few.onnx"), adapter(model, ("pooled.weight",)), tmp_path / "a.onnx_adapter"
        )
    with pytest.raises(BaseMismatchError, match=r"wide\.weight"):
        pack_adapter(path, adapter(made(Net, seed=1), ("wide.weight",)), tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())


def test_a_branch_that_computes_something_else_is_not_written(
    switch: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = switch[1].with_name("base.onnx")
    factors = onnx_branches.factors

    def doubled(*given: Any) -> Any:
        found = factors(*given)
        return None if found is None else (found[0], 2 * found[1])

    monkeypatch.setattr(onnx_branches, "factors", doubled)
    with pytest.raises(CertificateError, match="'with'"):
        switch_onnx(base, base.with_name("b.safetensors"), base.with_name("wrong.onnx"))
    assert not list(base.parent.glob("wrong*"))


def test_the_command(switch: tuple[nn.Module, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = switch[1].with_name("base.onnx")
    names = (base, base.with_name("b.safetensors"), base.with_name("told.onnx"))
    assert main(["switch", *map(str, names)]) == 0
    assert "told.onnx against base.onnx: holds" in capsys.readouterr().out
    assert base.with_name("told.b.onnx_adapter").is_file()
