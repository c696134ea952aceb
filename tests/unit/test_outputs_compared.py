"""What the probe and ``verify`` see of outputs: complex ones, objects of any kind, values beside a mask's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, ProbeError, Rule
from lora_fx.passes.comparing import outputs_compared, unmasked

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@dataclass
class Held:
    y: Tensor


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.y = y


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "complex": torch.fft.rfft,
    "conjugated": lambda y: torch.fft.rfft(y).conj(),
    "object": Plain,
    "dataclass": Held,
    "dataclass in a list": lambda y: [Held(y)],
    "dataclass in a dictionary": lambda y: {"y": Held(y)},
    "masked": lambda y: y.masked_fill(X[:, :1] > 0, -1e9),
    "masked by the lowest": lambda y: y.masked_fill(X[:, :1] > 0, torch.finfo(y.dtype).min),
}


class Stale(nn.Module):
    """Reads one weight past its module, if it is to: its adapter does not act there."""

    def __init__(self, hold: Callable[[Tensor], Any], *, stale: bool) -> None:
        super().__init__()
        self.hold, self.stale = hold, stale
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.cache = [self.a.weight.detach()]

    def forward(self, x: Tensor) -> Any:
        inner = F.linear(x, self.cache[0]) + 0.01 * self.a(x) if self.stale else self.a(x)
        return self.hold(self.b(inner))


def made(holder: str, *, stale: bool = False) -> Stale:
    torch.manual_seed(0)
    return Stale(HOLDERS[holder], stale=stale)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_weight_read_past_its_module_is_found(holder: str) -> None:
    with pytest.raises(ProbeError):
        lora_fx.inject(made(holder, stale=True), Policy(Rule(rank=2)), X, seed=0)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_fault_of_the_injected_forward_alone_is_found(holder: str, shift: float) -> None:
    # Thin products: W' formed, as on so small layers, has the folded model's very bits and proves nothing.
    model = lora_fx.inject(made(holder), Policy(Rule(rank=2, compute="branch")), X, seed=0)
    model.a.register_forward_hook(lambda m, _, out: out if type(m) is nn.Linear else out + shift)
    report = lora_fx.verify(model, X)
    assert report.ok is (shift == 0.0)
    assert any(c.what == "outputs" for c in report.failures) is (shift != 0.0)
    assert any(c.difference > 0 for c in report.comparisons if c.what == "outputs")


def test_only_what_is_alike_and_far_larger_is_a_mask() -> None:
    wanted = torch.tensor([1.0, -2.0, 1e9, -1e9, float("-inf"), 3.0])
    found = torch.tensor([1.1, -2.1, 1e9, -1e9 + 256, float("-inf"), 3.0])
    assert unmasked(found, wanted).tolist() == [True, True, True, True, False, True]
    found[3] = -1e9
    assert unmasked(found, wanted).tolist() == [True, True, False, False, False, True]
    assert unmasked(wanted, wanted).all()


def test_values_beside_what_cancels_are_no_mask() -> None:
    """Rounding against rounding is no comparison: the ordinary values stay in the norm."""
    wanted, found = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 3e-9, 0.0])
    assert unmasked(found, wanted).all()
    assert outputs_compared([found], [wanted], "eval", frozenset({torch.float32})).ok
