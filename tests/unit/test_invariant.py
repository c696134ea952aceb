"""The invariant on models that use weights in odd ways, through the public functions alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from tests.odd_models import ODD_MODELS

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))


@pytest.fixture(params=sorted(ODD_MODELS))
def odd(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, inputs = ODD_MODELS[request.param]
    return make().eval(), inputs()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_fx.parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant(odd: tuple[nn.Module, torch.Tensor], dtype: torch.dtype, mode: bool) -> None:
    model, inputs = odd
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    # torch picks kernels by requires_grad (matmul's folding, attention's fast path): hold it equal.
    model.requires_grad_(False)
    with torch.no_grad():
        base = model(inputs)
        lora_fx.inject(model, EVERYTHING, inputs, seed=0)
        assert torch.equal(model(inputs), base)
    randomise(model)
    model.train(mode)
    found = model(inputs).detach()
    assert distance(found, base) > 1e-3, "the adapters change nothing: the test would prove nothing"
    with lora_fx.folded(model):
        folded = model(inputs).detach()
    assert distance(found, folded) <= (1e-5 if dtype == torch.float32 else 1e-10)
    lora_fx.verify(model, inputs).raise_for_failure()


def test_every_weight_that_multiplies_is_adapted(odd: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = odd
    wanted = {id(p) for p in model.parameters() if p.dim() >= 2}
    plan = lora_fx.plan(model, EVERYTHING, inputs)
    named = dict(model.named_parameters())
    assert {id(named[d.name]) for d in plan.adapted} == wanted


def test_unload_restores_everything(odd: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = odd
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    classes = {n: (type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()}
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    lora_fx.inject(model, EVERYTHING, inputs, seed=0)
    assert set(before) <= set(model.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    randomise(model)
    model(inputs).sum().backward()
    lora_fx.unload(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: (type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()} == classes
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards


def test_save_and_load(odd: tuple[nn.Module, torch.Tensor], tmp_path: object) -> None:
    model, inputs = odd
    plain = copy.deepcopy(model)
    lora_fx.inject(model, EVERYTHING, inputs, seed=0)
    randomise(model)
    path = f"{tmp_path}/adapter.safetensors"
    lora_fx.save_adapter(model, path)
    lora_fx.load_adapter(plain, path)
    with torch.no_grad():
        assert torch.equal(plain(inputs), model(inputs))
    assert not any(p.requires_grad for p in plain.parameters())


def test_copies_are_independent(odd: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = odd
    lora_fx.inject(model, EVERYTHING, inputs, seed=0)
    randomise(model)
    wanted = model(inputs)
    other = copy.deepcopy(model)
    assert torch.equal(other(inputs), wanted)
    with lora_fx.disable_adapter(other):
        assert not torch.equal(other(inputs), wanted)
        assert torch.equal(model(inputs), wanted)
    lora_fx.unload(other)
    assert torch.equal(model(inputs), wanted)


class _WritesInPlace(nn.Module):
    """Writes into what its layers return, as activations in place do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256, bias=False), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += 1
        return self.second(y).mul_(2)


def test_outputs_can_be_written_in_place() -> None:
    inputs = torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(3))
    model = lora_fx.inject(_WritesInPlace(), EVERYTHING, inputs, seed=0)
    lora_fx.verify(model, inputs).raise_for_failure()
    model(inputs).sum().backward()
