"""The base graph and its map: blind to special values of weights, and never wrong about a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.errors import CertificateError, ExportError
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.onnx_files import load
from lora_fx.passes.onnx_mapping import ParameterMap, Recipe, Scale
from lora_fx.passes.onnx_match import recipes_for
from lora_fx.passes.onnx_metadata import read_map
from tests.unit.onnx_models import Mixed, export_pair, made

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Special(nn.Module):
    """Weights that an optimiser acts upon: zeros, ones, duplicates, symmetric and constant matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.twin = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.zero = nn.Linear(8, 8)
        self.eye = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(8))
        with torch.no_grad():
            self.first.bias.zero_()
            self.zero.weight.zero_()
            self.zero.bias.zero_()
            self.eye.weight.copy_(torch.eye(8))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.zero(torch.tanh(self.first(self.norm(x))))
        x = self.twin(x) * self.gain + self.shift
        return self.head(self.eye(x).mean(1))


def labels(path: Path) -> dict[str, str]:
    found = read_map(load(path))
    assert found is not None
    return {name: placement.label for name, placement in found.placements.items()}


def test_special_values_leave_every_parameter_in_its_place(tmp_path: Path) -> None:
    model = made(Special)
    export_onnx(model, tmp_path / "base.onnx", X)
    found = labels(tmp_path / "base.onnx")
    assert set(found.values()) == {"identity", "transpose"}, found
    for name in ("first.weight", "zero.weight", "eye.weight"):
        assert found[name] == "transpose"
    session = onnxruntime.InferenceSession(str(tmp_path / "base.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(X)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": X.numpy()})[0]), expected)


def test_an_adapter_on_special_values_keeps_the_structure(tmp_path: Path) -> None:
    names = tuple(name for name, _ in made(Special).named_parameters() if name != "gain")
    _, _, certificate = export_pair(made(Special), names, X, tmp_path)
    assert certificate.ok
    assert len(certificate["changed-set"].data["changed"]) == len(names)
    assert certificate["delta"].data["ulps"] == 0
    assert certificate["delta"].detail.endswith("hold exactly W, bit for bit")


def test_a_factor_that_the_runtime_drops_from_the_base_alone_is_no_equal_latency(tmp_path: Path) -> None:
    """The runtime drops a factor of exactly one; no export can keep it, and the certificate says so."""
    with pytest.raises(CertificateError, match="runtime-structure") as caught:
        export_pair(made(Special), ("gain", "first.weight"), X, tmp_path)
    assert "(Mul)" in str(caught.value)


def test_a_normalisation_trained_beside_its_convolution(tmp_path: Path) -> None:
    """Then the fused weight is a product of two changes, which only a new optimisation makes right."""
    image = torch.randn(2, 3, 8, 8)
    names = ("conv.weight", "bn.weight", "bn.bias", "qkv.weight")
    base, _, certificate = export_pair(made(Mixed), names, image, tmp_path)
    assert certificate.ok
    found = labels(base)
    assert found["conv.weight"] == "row scale"
    assert {found[name] for name in ("bn.weight", "bn.bias", "conv.bias")} == {"opaque"}
    assert "computes from W of bn.bias, bn.weight" in certificate["derived"].detail


class Untrained(nn.Module):
    """Normalisations as they start, whose fused biases are zeros: beside no bias, and beside one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.bare_bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.zero, self.zero_bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.up, self.up_bn = nn.ConvTranspose2d(4, 4, 2, bias=False), nn.BatchNorm2d(4)
        self.full, self.full_bn = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bare_bn(self.bare(x)))
        x = torch.relu(self.zero_bn(self.zero(x)))
        return self.full_bn(self.full(self.up_bn(self.up(x)).mean((2, 3))))


BIASES = tuple(name for name, _ in Untrained().named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("bare.weight", "up.weight", *BIASES), id="every-bias"),
        pytest.param(("bare.weight", "zero_bn.bias"), id="one-bias"),
        pytest.param(("bare_bn.weight", "up.weight", "full_bn.bias"), id="optimised-anew"),
    ],
)
def test_a_bias_trained_from_zero_in_a_fused_normalisation(names: tuple[str, ...], tmp_path: Path) -> None:
    base, _, certificate = export_pair(made(Untrained), names, torch.randn(2, 3, 8, 8), tmp_path)
    assert certificate.ok
    found = labels(base)
    assert {found[name] for name in BIASES if name != "zero.bias"} == {"identity"}
    assert found["zero.bias"] == "opaque"


class Hidden(nn.Module):
    """A weight used plainly, and again in a way that leaves another initializer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + F.linear(x, self.plain.weight[:4].repeat(2, 1) * 2)
        return self.other(x)


def test_a_weight_used_twice_in_different_ways(tmp_path: Path) -> None:
    base, _, certificate = export_pair(made(Hidden), ("plain.weight", "other.weight"), X, tmp_path)
    assert certificate.ok
    found = labels(base)
    assert found["plain.weight"] == "opaque"
    assert found["other.weight"] == "transpose"
    assert found["idle.weight"] == "unused"


class HiddenBesideSpecial(nn.Module):
    """A weight that only a new optimisation makes right, and biases that optimising merges or drops."""

    def __init__(self) -> None:
        super().__init__()
        self.special, self.hidden = Special(), Hidden()

    def forward(self, x: Tensor) -> Tensor:
        return self.special(self.hidden(x))


def test_a_new_optimisation_keeps_what_special_values_would_change(tmp_path: Path) -> None:
    names = ("hidden.plain.weight", "special.first.weight")
    base, _, certificate = export_pair(made(HiddenBesideSpecial), names, X, tmp_path)
    assert certificate.ok
    assert labels(base)["hidden.plain.weight"] == "opaque"


class _Temperatures(nn.Module):
    """Layers whose temperatures are computed from equal parameters, and biases gathered from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((2, 1, 1), 2.3)) for _ in range(3))
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(2, 5)) for _ in range(3))
        places = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale, offset in zip(self.layers, self.scales, self.offsets, strict=True):
            heads = layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
            scores = F.normalize(heads, dim=-1) @ F.normalize(heads, dim=-1).mT
            scores = scores * scale.clamp(max=4.6).exp() + offset[:, self.places]
            x = (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)
        return x


def test_what_is_computed_from_a_parameter_is_no_factor_of_it(tmp_path: Path) -> None:
    """A factor for each element, or the rows that agree, fit one value: the base is made of the true ones."""
    model = made(_Temperatures).eval()
    base, _, certificate = export_pair(model, ("layers.0.weight", "layers.2.weight"), X, tmp_path)
    assert certificate.ok
    session = onnxruntime.InferenceSession(base, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(X), rtol=1e-5, atol=1e-6)
    assert labels(base)["scales.0"] == "opaque"
    assert all(labels(base)[f"layers.{i}.weight"] == "transpose" for i in range(3))


@pytest.mark.parametrize("name", ["scales.1", "offsets.1"])
def test_a_change_to_what_equal_constants_are_computed_from(name: str, tmp_path: Path) -> None:
    base, _, certificate = export_pair(made(_Temperatures), (name, "layers.1.weight"), X, tmp_path)
    assert certificate.ok
    assert labels(base)[name] == "opaque"


class _Gate(nn.Module):
    """One parameter of which two expressions are equal at its start, and one that is used twice alike."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate, self.gain = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.left(x) * self.gate.sigmoid() + self.right(x) * (1 - self.gate.sigmoid())
        return (mixed * self.gain.exp()).tanh() * self.gain.exp()


def test_a_change_to_a_gate_that_starts_in_the_middle(tmp_path: Path) -> None:
    base, _, certificate = export_pair(made(_Gate), ("gate", "gain"), X, tmp_path)
    assert certificate.ok
    assert certificate["derived"].ok
    floats = [v for v in load(base).graph.initializers.values() if v.shape == (8,)]
    assert len(floats) == 2 + 2 + 1  # biases, both sides of the gate, one gain


@pytest.mark.parametrize("of", [torch.relu, torch.abs, lambda w: w.clamp(min=0)])
def test_a_function_that_leaves_positive_values_alone_is_no_copy(
    of: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(x, of(self.mix.weight), self.mix.bias))

    base, _, certificate = export_pair(made(Net), ("mix.weight", "out.weight"), X, tmp_path)
    assert certificate.ok
    assert labels(base)["mix.weight"] == "opaque"


def test_an_unused_weight_is_said_to_be_so(tmp_path: Path) -> None:
    _, _, certificate = export_pair(made(Hidden), ("idle.weight", "other.weight"), X, tmp_path)
    assert certificate.ok
    assert "not used by the exported graph: idle.weight" in certificate["changed-set"].detail


class _Short(nn.Module):
    """Its second linear is for what comes after the tenth column: nothing, on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x.mT), self.second(x[..., 10:].mT)], dim=1)


def test_a_weight_that_multiplies_nothing_is_unused(tmp_path: Path) -> None:
    names = ("first.weight", "second.weight")
    _, _, certificate = export_pair(made(_Short), names, torch.randn(2, 5, 4), tmp_path)
    assert certificate.ok
    assert "not used by the exported graph: second.weight" in certificate["changed-set"].detail


def value(content: Tensor) -> ir.Value:
    found = ir.val("t", ir.DataType.FLOAT, list(content.shape))
    found.const_value = ir.tensor(content.contiguous().numpy(), name="t")
    return found


W = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
S = torch.rand(6, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.mark.parametrize(
    ("weight", "held", "label"),
    [
        pytest.param(W, W, "identity", id="identity"),
        pytest.param(W, W.reshape(6, 12), "identity", id="reshaped"),
        pytest.param(W, W.permute(2, 0, 1), "transpose", id="permuted"),
        pytest.param(W[:, :, 0], W[:, :, 0].t(), "transpose", id="transposed"),
        pytest.param(W, W * S[:, None, None], "row scale", id="scaled"),
        pytest.param(W, W * S[:4, None], "row scale", id="scaled-inside"),
        pytest.param(W[:, 0], torch.cat([W[3:, 0], W[:3, 0]]), "rows", id="rows-reordered"),
        pytest.param(W[:, 0], torch.cat([S[:3, None].expand(3, 3), W[:, 0]]), "rows", id="part-of-more"),
        pytest.param(W[:, 0, 0], torch.stack([W[:, 0, 0], S]), "rows", id="vector-in-a-matrix"),
    ],
)
def test_recipes_are_found_and_apply_to_other_values(weight: Tensor, held: Tensor, label: str) -> None:
    weight = weight.contiguous()
    (recipe,) = recipes_for(weight, value(held))
    assert recipe.label == label
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert torch.equal(recipe.apply(weight, held.contiguous()), held)
    assert torch.equal(recipe.restore(held.contiguous(), tuple(weight.shape)), weight)
    doubled = recipe.apply(weight * 2, held.contiguous())
    assert torch.equal(recipe.restore(doubled, tuple(weight.shape)), weight * 2) or recipe.scale is not None


def test_a_column_of_any_stride_is_found() -> None:
    """Of one column the stride along the rows says nothing, and torch may keep any."""
    weight = S[:, None].as_strided((6, 1), (1, 6))
    held = torch.cat([S[:2], S])[:, None].as_strided((8, 1), (1, 8))
    (recipe,) = recipes_for(weight, value(held))
    assert torch.equal(recipe.restore(held, (6, 1)), weight)


def test_a_weight_of_one_number_of_any_stride(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(1, 1), nn.Tanh()), torch.randn(2, 1)
    model[0].weight = nn.Parameter(torch.randn(1, 4)[:, ::4].as_strided((1, 1), (4, 4)))
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=1)), x)
    with torch.no_grad():
        lora_fx.parameters(model)[1].fill_(1.0)
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    assert lora_fx.export_onnx(model, tmp_path / "a.onnx", x).ok


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(W + 1e-6, id="slightly-off"),
        pytest.param(W * torch.rand(W.shape), id="elementwise"),
        pytest.param(W[:5], id="a-part-only"),
        pytest.param(-W.flip(0), id="reversed-and-negated"),
    ],
)
def test_no_recipe_where_there_is_none(held: Tensor) -> None:
    assert recipes_for(W, value(held)) == ()


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.eye(4), torch.full((3, 3, 2), 0.5)])
def test_a_regular_value_fits_two_recipes(weight: Tensor) -> None:
    assert len(recipes_for(weight, value(weight))) == 2


def test_a_scale_brings_back_every_bit() -> None:
    weight, scaled = W, W * S[:, None, None]
    scale = Scale(0, tuple(S.tolist())).exact(weight, scaled)
    assert torch.equal(scale.undo(scaled), weight)
    assert Scale.from_json(scale.to_json()) == scale
    assert not torch.equal(Scale(0, tuple(S.tolist())).undo(scaled), weight)


def test_axes_are_called_batch_and_sequence(tmp_path: Path) -> None:
    export_onnx(made(Special), tmp_path / "base.onnx", X)
    model = load(tmp_path / "base.onnx")
    assert [str(dim) for dim in model.graph.inputs[0].shape] == ["batch", "sequence", "8"]
    assert [str(dim) for dim in model.graph.outputs[0].shape] == ["batch", "3"]


def test_a_map_of_another_version_is_refused() -> None:
    with pytest.raises(ExportError, match="mapping_version 99"):
        ParameterMap.from_json('{"mapping_version": 99, "parameters": {}}')


class Snake(nn.Module):
    """A factor of ones that is used as it is, and through its reciprocal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.alpha = nn.Conv1d(3, 3, 1), nn.Parameter(torch.ones(1, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


def test_the_reciprocal_of_a_factor_of_ones_is_not_taken_for_a_multiple_of_it(tmp_path: Path) -> None:
    certificate = export_onnx(made(Snake), tmp_path / "base.onnx", torch.randn(2, 3, 5))
    assert certificate.ok
