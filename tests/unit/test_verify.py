"""Verify tells rounding from a wrong gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import InputError
from lora_fx.passes import comparing
from lora_fx.passes import verify as verify_pass
from lora_fx.passes.comparing import gradients_compared
from lora_fx.passes.precisions import dtypes_through
from tests.property.building import build
from tests.property.specs import Layer, ModelSpec


def test_gradients_that_are_small_by_cancellation() -> None:
    """Keys that a looped tanh has drawn together: the slopes of q and k are 1e-13 of the largest."""
    layers = (Layer("fused", "looped", bias=False), Layer("mha_kdim", bias=False))
    model, x = build(ModelSpec(layers, length=2, seed=1), torch.float64)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=1, init="orthogonal")), x, seed=1)
    report = lora_fx.verify(model, x)
    assert any(c.what.endswith("k_proj_weight") for c in report.comparisons)
    report.raise_for_failure()


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9])
def test_a_small_gradient_of_the_wrong_sign_is_found(size: float) -> None:
    right: list[Tensor | None] = [torch.full((4,), size, dtype=torch.float64)]
    wrong: list[Tensor | None] = [-right[0]] if right[0] is not None else []
    held = frozenset({torch.float64})
    assert gradients_compared("w", right, right, "eval", 1.0, held).ok
    assert not gradients_compared("w", wrong, right, "eval", 1.0, held).ok


def test_a_few_roundings_of_the_largest_gradient_are_no_difference() -> None:
    step = torch.finfo(torch.float64).eps
    right: list[Tensor | None] = [torch.full((1,), 1e-12, dtype=torch.float64)]
    held = frozenset({torch.float64})
    for roundings, fine in ((comparing.DISCOUNT, True), (4 * comparing.DISCOUNT, False)):
        found: list[Tensor | None] = [torch.full((1,), 1e-12 + 0.9 * roundings * step, dtype=torch.float64)]
        assert gradients_compared("w", found, right, "eval", 1.0, held).ok is fine


def test_a_gradient_that_is_noise_is_compared_beside_the_largest() -> None:
    step, held = 1e-9, frozenset({torch.float64})
    noise: list[Tensor | None] = [torch.full((1,), 1e-12, dtype=torch.float64)]
    other: list[Tensor | None] = [torch.full((1,), -1e-12, dtype=torch.float64)]
    fault: list[Tensor | None] = [torch.full((1,), 2 * step, dtype=torch.float64)]
    assert not gradients_compared("bias", other, noise, "train", 1.0, held).ok
    assert gradients_compared("bias", other, noise, "train", 1.0, held, noise=True).ok
    assert not gradients_compared("bias", fault, noise, "train", 1.0, held, noise=True).ok


@pytest.mark.parametrize("fault", [False, True])
def test_a_bias_that_a_normalisation_takes_away(fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slope is zero, but for the roundings of a normalisation over nearly equal rows."""
    layers = (Layer("addmm", bias=False), Layer("right", bias=False), Layer("batch_norm"))
    model, x = build(ModelSpec(layers, head="none", length=2, seed=0), torch.float32)
    rule = lora_fx.Rule(rank=3, init="pissa")
    lora_fx.inject(model, lora_fx.Policy(rule, bias="all", norm_stats="train"), x, seed=0)
    if fault:
        run = verify_pass.injected_run

        def wrong(*given: Any) -> verify_pass.Run:
            found = run(*given)
            slopes = found.gradients["layers.2.0.bias"]
            largest = max(comparing.size(g) for g in found.gradients.values())
            slope = slopes[0]
            assert slope is not None
            slope.add_(1e-3 * largest)
            return found

        monkeypatch.setattr(verify_pass, "injected_run", wrong)
    report = lora_fx.verify(model, x)
    assert report.ok is not fault
    assert ("layers.2.0.bias" in {c.what for c in report.failures}) is fault
    assert (
        any(c.what == "layers.2.0.bias" and c.case.endswith("in float64") for c in report.comparisons)
        is not fault
    )


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, adjacency: Tensor) -> Tensor:
        return self.linear(torch.sparse.mm(adjacency, self.weight))


def test_a_sparse_input_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    adjacency = torch.randn(6, 6).relu().to_sparse()
    model = lora_fx.inject(_Sparse(), lora_fx.Policy(lora_fx.Rule(rank=2)), adjacency)
    report = lora_fx.verify(model, adjacency)
    assert report.ok
    assert {"eval, example inputs", "eval, other values"} <= {c.case for c in report.comparisons}


def test_inputs_that_the_model_does_not_run_on_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), torch.randn(3, 4))
    with pytest.raises(InputError, match="RuntimeError in '0'"):
        lora_fx.verify(model, torch.randn(3, 5))
    assert model.training
    assert lora_fx.verify(model, torch.randn(3, 4)).ok


class _Lowered(nn.Module):
    """Float32 weights whose products, or whose activations alone, are half precision."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            for layer in self.layers:
                x = layer(x if self.how != "rounded" else x.bfloat16().float()).tanh()
        return x.float()


@pytest.mark.parametrize(("how", "halves"), [("autocast", True), ("rounded", True), ("plain", False)])
def test_the_tolerance_follows_the_computation(how: str, halves: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    model = lora_fx.inject(_Lowered(how), lora_fx.Policy(lora_fx.Rule(rank=4)), x, seed=0)
    assert (torch.bfloat16 in dtypes_through(model, "default")) is halves
    assert lora_fx.verify(model, x).ok


def test_inject_under_autocast_sees_weights_that_were_written_to() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model = lora_fx.inject(_Lowered("plain"), lora_fx.Policy(lora_fx.Rule(rank=4)), x, seed=0)
        assert torch.is_autocast_cache_enabled()
        assert lora_fx.verify(model, x).ok


def test_a_fault_is_found_in_half_precision() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(8, 64), _Lowered("autocast")
    model.kept = model.layers[0].weight.detach().t()
    model.layers[0].register_forward_hook(lambda m, args, y: y + 5 * (args[0] @ model.kept))
    with pytest.raises(lora_fx.ProbeError, match=r"layers\.0\.weight"):
        lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=4)), x, seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["missing", "doubled"])
def test_a_gradient_that_is_missing_or_doubled_is_found_in_half_precision(
    dtype: torch.dtype, fault: str
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype), torch.randn(5, 8)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x.to(dtype), seed=0)
    assert lora_fx.verify(model, x.to(dtype)).ok
    factor = {"missing": 0.0, "doubled": 2.0}[fault]

    def faulty(module: nn.Module, _: object, y: Tensor) -> Tensor:
        # The value as it is; the gradient times the factor where the adapter is computed.
        return y if type(module) is nn.Linear else y.detach() + factor * (y - y.detach())

    model[2].register_forward_hook(faulty)
    report = lora_fx.verify(model, x.to(dtype))
    assert not report.ok
    assert all(c.ok for c in report.comparisons if c.what == "outputs")


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 4)), torch.randn(5, 300)
    return lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0), x


def test_float64_decides_where_float32_differs_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    monkeypatch.setitem(comparing.TOLERANCES, torch.float32, 1e-8)
    report = lora_fx.verify(model, x).raise_for_failure()
    assert any("in float64" in c.case for c in report.comparisons)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_small_fault_is_one_in_float64_too() -> None:
    model, x = small()
    model[2].register_forward_hook(lambda m, _, out: out if type(m) is nn.Linear else out * (1 + 5e-5))
    report = lora_fx.verify(model, x)
    assert not report.ok
    assert all("in float64" not in c.case for c in report.comparisons)


class _Steep(nn.Module):
    """A linear whose rounding is blown up: after the sine, a relative change of e is one of ``size * e``."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(300, 300), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.size * self.linear(x))


def steep(size: float, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = _Steep(size).to(dtype), torch.randn(5, 300, dtype=dtype)
    return lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_does_to_the_base_is_no_fault(dtype: torch.dtype) -> None:
    model, x = steep(1e7, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = lora_fx.verify(model, x).raise_for_failure()
    assert any(c.case.endswith("within the base's own rounding") for c in report.comparisons)
    assert any("moves the base itself by up to" in note for note in report.notes)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("size", "fault"), [(1e7, 1e-11), (1e4, 1e-11), (1.0, 1e-8)])
def test_a_fault_larger_than_the_bases_rounding_is_one(size: float, fault: float) -> None:
    model, x = steep(size, torch.float64)
    model.linear.register_forward_hook(lambda m, _, y: y if type(m) is nn.Linear else y * (1 + fault))
    assert not lora_fx.verify(model, x).ok


def test_inject_finds_a_fault_beyond_the_bases_rounding() -> None:
    torch.manual_seed(0)
    model, x = _Steep(1e7).double(), torch.randn(5, 300, dtype=torch.float64)
    model.linear.register_forward_hook(lambda m, _, y: y if type(m) is nn.Linear else y * (1 + 1e-13))
    with pytest.raises(lora_fx.ProbeError):
        lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)


def test_a_base_without_digits_is_not_said_to_hold() -> None:
    model, x = steep(1.0, torch.float64)
    model.size = 1e13
    report = lora_fx.verify(model, x)
    assert not report.ok
    assert any("no comparison can hold to less" in note for note in report.notes)
    with pytest.raises(lora_fx.VerifyError, match="moves the base itself"):
        report.raise_for_failure()


class Masked(nn.Module):
    """Drops features in training, chosen as speech models do: with a generator that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw, self.inner, self.outer = draw, nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.training:
            kept = torch.tensor([self.draw() < 0.5 for _ in range(hidden.shape[-1])])
            hidden = hidden * kept
        return self.outer(hidden)


def numpy_draws() -> float:
    return float(np.random.rand())  # noqa: NPY002 - models draw from NumPy's global state


def next_draws() -> tuple[float, float]:
    return numpy_draws(), random.random()


@pytest.mark.parametrize("draw", [numpy_draws, random.random], ids=["NumPy", "Python"])
def test_numbers_that_others_than_torch_draw(draw: Callable[[], float]) -> None:
    model, x = Masked(draw).train(), torch.randn(3, 6)
    array, plain = np.random.get_state(), random.getstate()  # noqa: NPY002 - as above
    expected = next_draws()
    np.random.set_state(array)  # noqa: NPY002 - as above
    random.setstate(plain)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    report = lora_fx.verify(model, x)
    assert report.ok, report
    assert next_draws() == expected


def test_an_adapter_that_was_loaded_is_verified_and_stays_frozen(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    source = lora_fx.inject(nn.Sequential(nn.Linear(8, 8)), lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    lora_fx.save_adapter(source, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(8, 8))
    model.load_state_dict({key: source.state_dict()[key] for key in model.state_dict()})
    lora_fx.load_adapter(model, tmp_path / "a.safetensors")
    report = lora_fx.verify(model, x)
    assert report.ok
    assert {c.what for c in report.comparisons} == {"outputs", "0.weight"}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_factor_is_found_where_half_precision_hides_it(dtype: torch.dtype) -> None:
    layers = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4)
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(4, 16).to(dtype)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    report = lora_fx.verify(model, x)
    assert report.ok
    assert any(c.case.endswith("in float32") and c.tolerance <= 1e-4 for c in report.comparisons)

    def too_much(input: Tensor) -> Tensor:  # noqa: A002
        module = model[2]
        base = module._parameters["weight"]
        return nn.functional.linear(input, base + (module.weight - base) * 1.05, module.bias)

    model[2].forward = too_much
    failed = lora_fx.verify(model, x).failures
    assert failed
    assert all("in float32" in c.case for c in failed if c.what == "outputs")


class _AlwaysHalf(nn.Module):
    """Computes in bfloat16 whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), self.mix.weight.bfloat16(), self.mix.bias.bfloat16())


def test_a_model_that_is_half_in_float32_too_is_compared_as_it_is() -> None:
    model, x = _AlwaysHalf().bfloat16(), torch.randn(4, 8).bfloat16()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    report = lora_fx.verify(model, x)
    assert report.ok
    assert not any("in float32" in c.case for c in report.comparisons)
    assert any("in half precision alone" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_a_normalisation_takes_away_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(5, 6).to(dtype)
    policy = lora_fx.Policy(lora_fx.Rule(rank=2), bias="all", norm_stats="train")
    lora_fx.inject(model, policy, x, seed=0)
    report = lora_fx.verify(model, x)
    report.raise_for_failure()
    assert any(c.what == "0.bias" and c.case.endswith("in float32") for c in report.comparisons)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_frozen_starts_in_float32_leave_a_half_base_half(init: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    x = torch.randn(5, 6).bfloat16()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, init=init)), x, seed=0)
    assert lora_fx.verify(model, x).ok
    model[0].register_forward_hook(lambda m, _, out: out if type(m) is nn.Linear else out * 1.05)
    assert not lora_fx.verify(model, x).ok


class _Scaled(nn.Module):
    """A block behind a layer scale, as ConvNeXt and CaiT start with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 1.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_behind_a_small_scale_is_found(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), _Scaled(), _Scaled(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(5, 6).to(dtype)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    run = verify_pass.injected_run

    def wrong(*given: Any) -> verify_pass.Run:
        found = run(*given)
        slopes = [None if slope is None else slope * factor for slope in found.gradients["1.up.weight"]]
        return verify_pass.Run(found.outputs, {**found.gradients, "1.up.weight": slopes})

    monkeypatch.setattr(verify_pass, "injected_run", wrong)
    report = lora_fx.verify(model, x)
    assert report.ok is (factor == 1.0)
    assert {c.what for c in report.failures} == (set() if factor == 1.0 else {"1.up.weight"})
