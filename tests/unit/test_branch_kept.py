"""Effective weights kept between forwards without gradients, and everything that must drop them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.passes import kept, runtime


class Functional(nn.Module):
    """A weight that a custom forward uses: the weight form."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Functional()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), torch.randn(3, 8), seed=0)
    for parameter in lora_fx.parameters(model):
        nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    plain: Callable[..., Tensor] = runtime.effective_weight

    def counting(*args: object, **kwargs: object) -> Tensor:
        counted.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(runtime, "effective_weight", counting)
    return counted


def named(model: nn.Module, part: str) -> nn.Parameter:
    return next(p for n, p in model.named_parameters() if part in n)


def test_the_weight_is_computed_once(model: nn.Module, computed: list[int]) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(model(x), first) for _ in range(3))
    assert len(computed) == 1


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "A in place": lambda m: named(m, "lora_A").mul_(2),
    "A past its version": lambda m: named(m, "lora_A").data.mul_(2),
    "B past its version": lambda m: named(m, "lora_B").data.fill_(1),
    "W0 in place": lambda m: named(m, "proj.weight").mul_(2),
    "W0 past its version": lambda m: named(m, "proj.weight").data.mul_(2),
    "a row of W0 past its version": lambda m: named(m, "proj.weight").data[4].mul_(2),
    "a column of W0 past its version": lambda m: named(m, "proj.weight").data[:, 7].mul_(2),
    "W0 replaced": lambda m: setattr(named(m, "proj.weight"), "data", torch.randn(6, 8)),
    "state loaded": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_change_is_seen(model: nn.Module, name: str) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        CHANGES[name](model)
        after = model(x)
        wanted = model.train()(x)
    assert not torch.allclose(after, before)
    assert torch.equal(after, wanted)


def test_gradients_and_training_compute_anew(model: nn.Module, computed: list[int]) -> None:
    x = torch.randn(3, 8)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert named(model, "lora_B").grad is not None
    with torch.no_grad():
        model(x)
        model.train()
        model(x)
        model(x)
    assert len(computed) == 5


def test_inference_mode_keeps_its_own(model: nn.Module, computed: list[int]) -> None:
    x = torch.randn(3, 8)
    with torch.inference_mode():
        first = model(x).clone()
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), first)
        assert not model(x).is_inference()
    assert len(computed) == 2


def test_switching_is_seen(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        adapted = model(x)
        with lora_fx.disable_adapter(model):
            assert not torch.allclose(model(x), adapted)
        assert torch.equal(model(x), adapted)
        lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=1)), x, adapter="other", seed=1)
        lora_fx.set_adapter(model, "other")
        assert not torch.allclose(model(x), adapted)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (8, 8), (1, 5), (5, 1), (4, 3, 2), (7, 64), (64, 7)])
def test_every_row_and_column_of_the_base_is_looked_at(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape)
    kept._crossing(base).fill_(1)
    matrix = base.reshape(shape[0], -1)
    assert matrix.any(0).all()
    assert matrix.any(1).all()


PAST_THE_GUARD: dict[str, Callable[[Tensor], object]] = {
    "made a plain tensor": lambda w: Tensor._make_subclass(Tensor, w).zero_(),
    "torch's oldest constructor": lambda w: torch.Tensor(w).zero_(),
    "past its version": lambda w: Tensor._make_subclass(Tensor, w).data.mul_(2),
    "another library": lambda w: torch.from_dlpack(torch.utils.dlpack.to_dlpack(w)).zero_(),
    "a class of its own": lambda w: w.as_subclass(nn.Parameter).zero_(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", sorted(PAST_THE_GUARD))
def test_a_write_past_the_guard_is_refused_at_the_next_reading(
    model: nn.Module, name: str, mode: Callable[[], torch.no_grad]
) -> None:
    x = torch.randn(3, 8)
    with mode():
        before = model(x)
        PAST_THE_GUARD[name](model.proj.weight)
        with pytest.raises(lora_fx.WeightWriteError, match=r"'weight' of Linear: .*past its guard"):
            model(x)
        assert torch.equal(model(x), before)


def test_a_write_past_the_guard_that_changes_nothing_is_none(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        Tensor._make_subclass(Tensor, model.proj.weight).mul_(1)
        assert torch.equal(model(x), before)
        named(model, "proj.weight")[0, 0] = float("nan")
        assert all(torch.equal(model(x).isnan(), model(x).isnan()) for _ in range(2))
