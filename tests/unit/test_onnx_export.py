"""Export: base and folded files, their certificate, what is left behind, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lora_fx.certificates import Certificate
from lora_fx.errors import BaseMismatchError, CertificateError, ExportError
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.onnx_diff import compare
from lora_fx.passes.onnx_files import load
from lora_fx.passes.onnx_metadata import CHANGES_KEY, PLAN_KEY, read_map
from tests.unit.onnx_models import Mixed, Recurrent, Tied, export, export_pair, made, subject

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)
FRAMES = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))
TARGETS = ("conv.weight", "qkv.weight", "o.weight", "p.weight", "head.weight", "head.bias")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Certificate]:
    return export_pair(made(Mixed), TARGETS, IMAGE, tmp_path_factory.mktemp("pair"))


def test_certificate_holds_with_every_check(pair: tuple[Path, Path, Certificate]) -> None:
    certificate = pair[2]
    assert certificate.ok
    assert [check.name for check in certificate.checks] == [
        "structure",
        "changed-set",
        "delta",
        "untouched",
        "runtime-structure",
        "parity",
        "effect",
    ]
    assert len(certificate["changed-set"].data["changed"]) == len(TARGETS)
    assert certificate["delta"].data["ulps"] == 0
    said = "hold exactly what W becomes (1 of them W scaled by a folded normalisation), bit for bit"
    assert certificate["delta"].detail == f"{len(TARGETS)} changed initializers {said}"
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert "holds" in str(certificate)


def test_runtime_computes_the_folded_model(pair: tuple[Path, Path, Certificate]) -> None:
    model = made(Mixed).eval()
    session = onnxruntime.InferenceSession(str(pair[1]), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(None, {"image": image.numpy()})
        with subject(model, TARGETS).folded_state() as folded, torch.no_grad():
            expected = folded(image)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert [output.name for output in session.get_outputs()] == ["output"]


def test_files_hold_the_plan_and_no_machine_paths(pair: tuple[Path, Path, Certificate]) -> None:
    base, folded = onnx.load(pair[0]), onnx.load(pair[1])
    metadata = {item.key: item.value for item in folded.metadata_props}
    assert metadata[PLAN_KEY] == '{"plan": "of the test"}'
    assert set(json.loads(metadata[CHANGES_KEY])) == set(TARGETS)
    for proto in (base, folded):
        text = proto.SerializeToString()
        assert b".py" not in text
        assert str(Path.cwd()).encode() not in text
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        onnx.checker.check_model(proto, full_check=True)


def test_base_names_every_layout(pair: tuple[Path, Path, Certificate]) -> None:
    mapping = read_map(load(pair[0]))
    assert mapping is not None
    labels = {name: mapping.placements[name].label for name in (*TARGETS, "conv.bias")}
    assert labels == {
        "conv.weight": "row scale",
        "qkv.weight": "transpose",
        "o.weight": "transpose",
        "p.weight": "transpose",
        "head.weight": "identity",
        "head.bias": "identity",
        "conv.bias": "opaque",
    }


@pytest.mark.parametrize(
    ("build", "names", "inputs"),
    [
        pytest.param(Mixed, ("conv.weight", "conv.bias", "qkv.weight"), IMAGE, id="fused-bias"),
        pytest.param(Tied, ("emb.weight", "up.weight"), IDS, id="tied"),
        pytest.param(
            Recurrent,
            ("lstm.weight_ih_l0", "lstm.weight_hh_l0_reverse", "gru.weight_hh_l0"),
            FRAMES,
            id="gates",
        ),
        pytest.param(Recurrent, ("lstm.bias_ih_l0", "gru.weight_ih_l0"), FRAMES, id="opaque-gates"),
    ],
)
def test_folded_equals_a_full_export_of_the_folded_model(build, names, inputs, tmp_path: Path) -> None:
    model = made(build)
    # A second export of a recurrent model in one process differs when its sequence may vary (torch's bug).
    options = {"dynamic_shapes": {"x": {0: torch.export.Dim.AUTO}}} if build is Recurrent else {}
    _, folded, certificate = export_pair(model, names, inputs, tmp_path, **options)
    assert certificate.ok
    with subject(model, names).folded_state() as state:
        export_onnx(state, tmp_path / "full.onnx", inputs, **options)
    comparison = compare(load(folded), load(tmp_path / "full.onnx"))
    assert comparison.difference is None
    for ours, theirs in comparison.pairs:
        assert ours.const_value.tobytes() == theirs.const_value.tobytes(), ours.name


def test_without_a_base_path_no_base_is_kept(tmp_path: Path) -> None:
    model = made(Tied)
    certificate = export(subject(model, ["up.weight"]), model, IDS, tmp_path / "t.onnx")
    assert certificate.ok
    assert [path.name for path in tmp_path.iterdir()] == ["t.onnx"]


def test_sequence_and_batch_vary_by_default(tmp_path: Path) -> None:
    export_onnx(made(Tied), tmp_path / "base.onnx", IDS[:1])
    session = onnxruntime.InferenceSession(str(tmp_path / "base.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 5)):
        (found,) = session.run(None, {"ids": torch.zeros(shape, dtype=torch.long).numpy()})
        assert found.shape == (*shape, 50)


def test_another_models_base_is_refused(tmp_path: Path) -> None:
    export_onnx(made(Tied, seed=0), tmp_path / "base.onnx", IDS)
    other = made(Tied, seed=1)
    with pytest.raises(BaseMismatchError, match=r"up\.weight"):
        export(subject(other, ["up.weight"]), other, IDS, tmp_path / "t.onnx", base=tmp_path / "base.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


def test_another_architectures_base_is_refused(tmp_path: Path) -> None:
    export_onnx(nn.Linear(3, 4), tmp_path / "base.onnx", torch.randn(2, 3))
    other = made(Tied)
    with pytest.raises(BaseMismatchError, match="none of the weights that the adapter changes"):
        export(subject(other, ["up.weight"]), other, IDS, tmp_path / "t.onnx", base=tmp_path / "base.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


def test_an_adapter_without_effect_fails_and_leaves_the_old_file(tmp_path: Path) -> None:
    model = made(Tied)
    export_onnx(model, tmp_path / "t.onnx", IDS)
    before = (tmp_path / "t.onnx").read_bytes()
    with pytest.raises(CertificateError, match="changes no weight"):
        export(subject(model, ["up.weight"], size=0.0), model, IDS, tmp_path / "t.onnx")
    assert (tmp_path / "t.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.onnx"]


def test_what_cannot_be_translated_says_why(tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="Stubborn"):
        export_onnx(Stubborn(), tmp_path / "t.onnx", torch.randn(2, 3))
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = made(Mixed)
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [id(parameter) for parameter in model.parameters()]
    export_onnx(model, tmp_path / "base.onnx", IMAGE, precision="float16")
    assert [module.training for module in (model, model.bn, model.head)] == [True, False, True]
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Remembers(nn.Module):
    """Returns an object that is no tensor and no container that torch knows, unless told not to."""

    class Memory:
        def __init__(self, held: torch.Tensor) -> None:
            self.held = held

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, use_cache: bool = True) -> object:
        made = self.layer(x)
        return {"logits": made, "past": self.Memory(made)} if use_cache else {"logits": made}


def test_a_cache_in_the_outputs_is_named(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    text = r'Remembers: expected .*; got a Memory in its output, .*add "use_cache": False'
    with pytest.raises(ExportError, match=text):
        export_onnx(Remembers(), tmp_path / "base.onnx", {"x": x})
    assert not list(tmp_path.iterdir())
    assert export_onnx(Remembers(), tmp_path / "base.onnx", {"x": x, "use_cache": False}).ok
