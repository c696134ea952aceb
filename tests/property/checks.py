"""What must hold of every injected model: helpers that raise AssertionError with the reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SEEN = 1e-4
"""A difference, relative by norm, that no rounding makes."""


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Run a model without gradients, its buffers put back afterwards."""
    held = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        out: Tensor = model(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(held[name])
    return out


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    """The two tensors are equal bit for bit."""
    assert found.dtype == wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
    assert torch.equal(found, wanted), f"differs by {(found - wanted).abs().max():.3g}"


def assert_close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """The two tensors agree by norm, to the tolerance of their dtype; neither is zero or has NaN."""
    limit = TOLERANCE[wanted.dtype] if tolerance is None else tolerance
    assert found.shape == wanted.shape, f"{found.shape} is not {wanted.shape}"
    size = float(wanted.norm())
    assert 0 < size < float("inf"), f"the reference has the norm {size}"
    difference = distance(found, wanted)
    assert difference <= limit, f"differs by {difference:.3g}, more than {limit:g}"


def assert_differs(found: Tensor, wanted: Tensor) -> None:
    """The two tensors are not the same, by more than rounding."""
    difference = distance(found, wanted)
    assert difference > SEEN, f"differs by {difference:.3g} only: the comparison would prove nothing"


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return how far two tensors are apart, by norm, relative to the second."""
    return float((found - wanted).norm() / wanted.norm())


def assert_only_adapters_learn(model: nn.Module, x: Tensor) -> None:
    """A backward pass gives gradients to what the adapter trains, to some of it, and to nothing else."""
    trained = {id(p) for p in lora_fx.parameters(model)}
    model(x).square().sum().backward()
    got = [n for n, p in model.named_parameters() if p.grad is not None]
    named = dict(model.named_parameters())
    strays = [n for n in got if id(named[n]) not in trained]
    assert not strays, f"these received a gradient: {strays}"
    assert got, "nothing received a gradient"
    for parameter in model.parameters():
        parameter.grad = None


@dataclass(frozen=True)
class Snapshot:
    """All that unloading must bring back."""

    state: dict[str, Tensor]
    objects: dict[str, int]
    flags: dict[str, bool]
    modules: dict[str, tuple[type, bool, tuple[str, ...]]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        named = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            state=copy.deepcopy(dict(model.state_dict())),
            objects={n: id(p) for n, p in named.items()},
            flags={n: p.requires_grad for n, p in named.items()},
            modules={
                n: (type(m), m.training, tuple(sorted(m.__dict__)))
                for n, m in model.named_modules(remove_duplicate=False)
            },
        )


def assert_base_kept(before: Snapshot, state: dict[str, Any]) -> None:
    """Every entry of the base's state is still there under its key, with its bits."""
    missing = [k for k in before.state if k not in state]
    assert not missing, f"the state lost {missing}"
    for key, value in before.state.items():
        assert torch.equal(state[key], value), f"{key} has other bits"


def assert_restored(before: Snapshot, model: nn.Module) -> None:
    """Every bit, object, flag, class, mode and attribute is as it was, and nothing was added."""
    after = Snapshot.of(model)
    assert list(after.state) == list(before.state), "the state has other keys"
    assert_base_kept(before, after.state)
    assert after.flags == before.flags, "other parameters require a gradient"
    assert after.objects == before.objects, "a Parameter is another object"
    for name, wanted in before.modules.items():
        assert after.modules[name] == wanted, f"{name or 'the model'}: {after.modules[name]} was {wanted}"
