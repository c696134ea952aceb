"""Training loops on one machine: resuming, precision, copies, and what others wrap around a model."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import Policy, Rule
from lora_fx.checkpoints import adapter_state, load_adapter_state, materialise, reset_adapter
from lora_fx.errors import (
    AdapterFileError,
    AdapterNameError,
    AdapterValueError,
    BaseMismatchError,
    PlanError,
    WrappedModelError,
)
from tests.integration.small import Net, adapted, base, batch, gap, loss, rules, train


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Loop:
    """A training loop with what loops have: autocast, a gradient scaler, accumulation, dropout's noise."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            for part in batch(step).chunk(2):
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(self.model, part) / 2
                self.scaler.scale(value).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()


def test_resumed_training_is_uninterrupted_training_bit_for_bit(tmp_path: Path) -> None:
    whole = Loop(adapted(dropout=0.1))
    torch.manual_seed(5)
    whole.run(0, 6)
    first = Loop(adapted(dropout=0.1))
    torch.manual_seed(5)
    first.run(0, 3)
    lora_fx.save_adapter(first.model, tmp_path / "adapter.safetensors")
    rest = {
        "optimizer": first.optimizer.state_dict(),
        "scaler": first.scaler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(rest, tmp_path / "loop.pt")
    rest = torch.load(tmp_path / "loop.pt", weights_only=True)
    model = lora_fx.load_adapter(base(), tmp_path / "adapter.safetensors", trainable=True)
    second = Loop(model)
    second.optimizer.load_state_dict(rest["optimizer"])
    second.scaler.load_state_dict(rest["scaler"])
    torch.set_rng_state(rest["rng"])
    second.run(3, 6)
    assert same(second.model, whole.model)
    assert not same(first.model, whole.model)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = adapted(), adapted()
    loss(whole, batch(0)).backward()
    for part in batch(0).chunk(2):
        (loss(parts, part) / 2).backward()
    for p, q in zip(lora_fx.parameters(whole), lora_fx.parameters(parts), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad)


def test_an_adapter_goes_back_to_a_file_in_place(tmp_path: Path) -> None:
    model = adapted()
    train(model)
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    held, values = lora_fx.parameters(model), model(batch(0)).detach()
    train(model)
    assert not torch.equal(model(batch(0)), values)
    lora_fx.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    assert torch.equal(model(batch(0)), values)
    assert all(p is q and q.requires_grad for p, q in zip(held, lora_fx.parameters(model), strict=True))


def test_replacing_refuses_other_plans_other_bases_and_models_without(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(adapted(), path)
    with pytest.raises(AdapterNameError, match="a model without"):
        lora_fx.load_adapter(base(), path, replace=True)
    with pytest.raises(PlanError, match="adapted otherwise"):
        lora_fx.load_adapter(adapted(alpha=1), path, replace=True)
    other = adapted()
    with torch.no_grad():
        dict(other.named_parameters())["blocks.0.up.weight"].add_(1)
    before = lora_fx.parameters(other)[0].detach().clone()
    with pytest.raises(BaseMismatchError, match=r"blocks\.0\.up"):
        lora_fx.load_adapter(other, path, replace=True)
    assert torch.equal(lora_fx.parameters(other)[0], before)


def test_states_are_live_and_complete() -> None:
    model, other = adapted(init="pissa", dora=True), adapted(init="pissa", dora=True)
    train(model)
    state = adapter_state(model)
    assert state.keys() <= model.state_dict().keys()
    assert {k.split("__")[0].rpartition(".")[2] for k in state} == {
        "lora_A", "lora_B", "lora_A0", "lora_B0", "lora_magnitude",
    }  # fmt: skip
    load_adapter_state(other, pickle.loads(pickle.dumps(state)))
    assert same(model, other)
    with pytest.raises(AdapterFileError, match="missing or of another shape"):
        load_adapter_state(other, {k: v for k, v in state.items() if "magnitude" not in k})


@pytest.mark.parametrize("options", [{}, {"init": "olora"}, {"dora": True}])
def test_a_model_without_memory_becomes_the_model_with(options: dict[str, object]) -> None:
    with torch.device("meta"):
        model = Net(tied=True)
    lora_fx.inject(model, rules(**options))
    with pytest.raises(AdapterValueError, match="meta"):
        lora_fx.save_adapter(model, "never.safetensors")
    materialise(model, "cpu")
    assert model.head._parameters["weight"] is model.emb._parameters["weight"]
    assert model.head.lora_A__weight__default is model.emb.lora_A__weight__default
    model.load_state_dict(base(tied=True).state_dict(), strict=False)
    reset_adapter(model, seed=1)
    alone = lora_fx.inject(base(tied=True), rules(**options), seed=1)
    assert same(model, alone)
    train(model)
    train(alone)
    assert same(model, alone)


def test_injected_models_pickle_with_their_adapters() -> None:
    model = adapted(tied=True)
    train(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(copied(batch(0)), model(batch(0)))
        assert copied.head._parameters["weight"] is copied.emb._parameters["weight"]
        train(copied)
        assert not torch.equal(copied(batch(0)), model(batch(0)))


def test_a_compiled_model_is_refused_and_its_inner_one_is_not() -> None:
    model = base()
    compiled = torch.compile(model, backend="eager")
    compiled(batch(0))
    with pytest.raises(WrappedModelError, match="_orig_mod"):
        lora_fx.inject(compiled, rules(), batch(0))
    lora_fx.inject(compiled._orig_mod, rules(), batch(0))
    train(model)
    assert gap(model, base()) > 1e-2
    assert gap(compiled, model) < 1e-6
    with pytest.raises(AdapterNameError, match="_orig_mod"):
        lora_fx.save_adapter(compiled, "never.safetensors")


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).relu())


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def plain() -> Linear:
    torch.manual_seed(0)
    return Linear()


def with_values(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


@pytest.mark.parametrize("first", ["inject", "dispatch"])
def test_hooks_that_place_a_model_on_devices(first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    wanted = with_values(lora_fx.inject(plain(), Policy(Rule(rank=2)), X, seed=1))(X)
    model: nn.Module = plain()
    if first == "dispatch":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with_values(lora_fx.inject(model, Policy(Rule(rank=2)), X, seed=1))
    if first == "inject":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(model(X), wanted)
    with lora_fx.folded(model):
        torch.testing.assert_close(model(X), wanted)
    assert torch.equal(model(X), wanted)
    lora_fx.inject(model, Policy(Rule(rank=1)), X, adapter="second")
    assert torch.equal(model(X), wanted)
    lora_fx.unload(model)
    assert torch.equal(model(X), plain()(X))


def test_offloaded_weights_are_refused_before_and_run_after() -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(WrappedModelError, match="before dispatching"):
        lora_fx.inject(accelerate.cpu_offload(plain(), torch.device("cpu")), Policy(Rule(rank=2)), X)
    model = with_values(lora_fx.inject(plain(), Policy(Rule(rank=2)), X, seed=1))
    wanted = model(X).detach()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(X), wanted)
    with pytest.raises(AdapterValueError, match="offloaded"):
        lora_fx.save_adapter(model, "never.safetensors")


def test_accelerator_prepares_an_injected_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner, alone = adapted(), adapted()
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(lora_fx.parameters(inner), lr=1e-2))
    for step in range(3):
        for part in batch(step).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, part))
                optimizer.step()
                optimizer.zero_grad()
    train(alone)
    assert gap(accelerator.unwrap_model(model), alone) < 1e-5
    lora_fx.save_adapter(accelerator.unwrap_model(model), tmp_path / "a.safetensors")
    assert gap(lora_fx.load_adapter(base(), tmp_path / "a.safetensors"), alone) < 1e-5


def test_what_moves_weights_moves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device map sets every weight to what it reads from the module: W there would be adapted twice."""
    modeling = pytest.importorskip("accelerate.utils.modeling")
    monkeypatch.setattr(modeling, "check_device_same", lambda *devices: False)  # as from one to another
    model = with_values(lora_fx.inject(plain(), Policy(Rule(rank=2)), X, seed=1))
    weights, wanted = {n: p.clone() for n, p in model.named_parameters()}, model(X).detach()
    for name in ("inner", "outer"):
        layer = model.get_submodule(name)
        modeling.set_module_tensor_to_device(layer, "weight", "cpu")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(X), wanted)
