"""Every helper fails when it should."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.property.checks import (
    Snapshot,
    assert_base_kept,
    assert_close,
    assert_differs,
    assert_only_adapters_learn,
    assert_restored,
    assert_same_bits,
)

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def swapped(x: Tensor) -> Tensor:
    """The wrong model: two columns of its input are exchanged."""
    return x[:, [1, 0, 2, 3, 4, 5]]


def test_a_zeroed_output_is_not_close() -> None:
    out = model()(X)
    with pytest.raises(AssertionError, match="differs by 1"):
        assert_close(torch.zeros_like(out), out)
    with pytest.raises(AssertionError, match="norm 0"):
        assert_close(torch.zeros_like(out), torch.zeros_like(out))


def test_a_swapped_operand_is_not_close() -> None:
    out = model()(X)
    assert_close(out, out)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(model()(swapped(X)), out)
    with pytest.raises(AssertionError):
        assert_same_bits(model()(swapped(X)), out)


def test_nan_is_never_close() -> None:
    out = model()(X).detach()
    broken = out.clone()
    broken[0, 0] = float("nan")
    for pair in ((broken, out), (out, broken), (broken, broken)):
        with pytest.raises(AssertionError):
            assert_close(*pair)


def test_one_bit_is_not_the_same() -> None:
    out = model()(X).detach()
    other = out.clone()
    other.view(torch.int32)[0, 0] ^= 1
    assert_close(other, out)
    with pytest.raises(AssertionError):
        assert_same_bits(other, out)
    with pytest.raises(AssertionError, match="float64"):
        assert_same_bits(out.double(), out)


def test_equal_outputs_do_not_differ() -> None:
    out = model()(X).detach()
    assert_differs(out * 1.1, out)
    with pytest.raises(AssertionError, match="prove nothing"):
        assert_differs(out * (1 + 1e-7), out)


def test_a_base_weight_that_learns_is_found() -> None:
    subject = lora_fx.inject(model(), lora_fx.Policy(lora_fx.Rule(rank=2)), X)
    assert_only_adapters_learn(subject, X)
    subject[2].bias.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"2\.bias"):
        assert_only_adapters_learn(subject, X)


def test_adapters_that_do_not_learn_are_found() -> None:
    subject = lora_fx.inject(model(), lora_fx.Policy(lora_fx.Rule(rank=2)), X)
    for parameter in lora_fx.parameters(subject):
        parameter.requires_grad_(False)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_only_adapters_learn(subject, X)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.mul_(1.0000001),
        lambda m: m[0].bias.requires_grad_(False),
        lambda m: m[2].train(not m.training),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
        lambda m: setattr(m[0], "left_behind", 1),
        lambda m: setattr(m[0], "__class__", type("Linear", (nn.Linear,), {})),
        lambda m: m.register_buffer("extra", torch.zeros(1)),
    ],
    ids=["bits", "flag", "mode", "object", "attribute", "class", "buffer"],
)
def test_what_is_not_restored_is_found(change: Callable[[nn.Module], object]) -> None:
    subject = model()
    before = Snapshot.of(subject)
    assert_restored(before, subject)
    change(subject)
    with pytest.raises(AssertionError):
        assert_restored(before, subject)


def test_a_lost_key_is_found() -> None:
    subject = model()
    state = dict(subject.state_dict())
    before = Snapshot.of(copy.deepcopy(subject))
    assert_base_kept(before, state)
    del state["0.weight"]
    with pytest.raises(AssertionError, match="lost"):
        assert_base_kept(before, state)
