"""Writes to adapted weights act on W0 or raise; ties survive; models may begin without memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.checkpoints import reset_adapter
from tests.by_hand import check, distance, randomise, run
from tests.odd_models import Tied

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
IDS = torch.arange(10).reshape(2, 5)


def injected(model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Tied().double() if model is None else model
    lora_fx.inject(model, EVERYTHING, IDS, seed=0)
    randomise(model)
    return model


def shares(model: nn.Module) -> bool:
    names = ("weight", "lora_A__weight__default", "lora_B__weight__default")
    return all(model.embedding._parameters[n] is model.head._parameters[n] for n in names)


def no_grad(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return torch.no_grad()(write)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda w: w.data.fill_(0),
    "a new data": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "init": nn.init.xavier_uniform_,
    "init, constant": lambda w: nn.init.constant_(w, 1.0),
    "init, orthogonal": nn.init.orthogonal_,
    "an item": no_grad(lambda w: w.__setitem__(0, 0.0)),
    "in place": no_grad(lambda w: w.mul_(2)),
    "an operator": no_grad(lambda w: exec("w += 1", {"w": w})),
    "detached": lambda w: w.detach().add_(1),
    "copied into": lambda w: w.data.copy_(torch.zeros_like(w)),
    "out": no_grad(lambda w: torch.add(w, w, out=w)),
    "a view": no_grad(lambda w: w.view(-1)[3:].zero_()),
    "a view of a view": lambda w: w.detach().T.unsqueeze(0).narrow(1, 0, 2).zero_(),
    "a chunk": lambda w: w.detach().chunk(2)[0].zero_(),
    "a diagonal": lambda w: w.data.diagonal().zero_(),
    "strided": lambda w: w.data.as_strided((2,), (1,)).zero_(),
    "many at once": no_grad(lambda w: torch._foreach_zero_([w])),
    "an activation in place": no_grad(lambda w: torch.nn.functional.relu(w, inplace=True)),
    "another memory": lambda w: w.data.set_(torch.zeros_like(w)),
    "an overload": no_grad(lambda w: torch.ops.aten.fill_.Scalar(w, 0.0)),
    "another library": lambda w: torch.from_dlpack(w.detach()).zero_(),
    "resized": lambda w: w.data.resize_(2, 2),
    "the flag": lambda w: w.requires_grad_(False),
    "the flag as an attribute": lambda w: setattr(w, "requires_grad", False),
    "a gradient": lambda w: setattr(w, "grad", torch.zeros_like(w)),
    "as a plain tensor": lambda w: w.detach().as_subclass(Tensor).zero_(),
    "the data of a plain tensor": lambda w: w.as_subclass(Tensor).data.view(-1).zero_(),
    "a hook": lambda w: w.register_hook(lambda g: 2 * g),
}


@pytest.mark.parametrize("what", sorted(WRITES))
@pytest.mark.parametrize("name", ["head", "body"])
def test_a_write_to_the_effective_weight_raises(what: str, name: str) -> None:
    model = injected()
    wanted = run(model, IDS)
    with pytest.raises(lora_fx.WeightWriteError, match="W0"):
        WRITES[what](getattr(model, name).weight)
    assert torch.equal(run(model, IDS), wanted)


class Bounded(nn.Module):
    """Keeps its own weight within bounds while it is trained, as Gemma 3n does."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.mix, self.bound = nn.Linear(6, 6), bound

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mix.weight.data.clamp_(-self.bound, self.bound)
        return self.mix(x)


def test_a_clamp_to_bounds_that_the_weight_is_within_is_no_write() -> None:
    model, x = Bounded(100.0).eval(), torch.randn(3, 6)
    base = model.mix.weight.detach().clone()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    assert lora_fx.verify(model, x).ok
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in lora_fx.parameters(model))
    lora_fx.unload(model)
    assert torch.equal(model.mix.weight, base)


def test_a_factor_of_one_is_no_write() -> None:
    model = injected()
    before = run(model, IDS)
    with torch.no_grad():
        assert model.body.weight.mul_(1) is not None
        model.body.weight.div_(1.0)
        for write in (model.body.weight.mul_, model.body.weight.div_):
            with pytest.raises(lora_fx.WeightWriteError, match="W0"):
                write(2)
    assert torch.equal(run(model, IDS), before)


@pytest.mark.parametrize("bound", [0.01, float("nan")])
def test_a_clamp_that_moves_the_weight_raises(bound: float) -> None:
    model, x = Bounded(bound).eval(), torch.randn(3, 6)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    model.train()
    with pytest.raises(lora_fx.WeightWriteError, match=r"clamp_.*W0"):
        model(x)


def test_a_write_to_its_array_raises() -> None:
    model = injected()
    for array in (model.head.weight.detach().numpy(), model.body.weight.detach().__array__()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_reset_parameters_raises() -> None:
    model = injected()
    for module in (model.head, model.body, model.embedding):
        with pytest.raises(lora_fx.WeightWriteError):
            module.reset_parameters()


def test_reading_and_computing_does_not_raise() -> None:
    weight = injected().body.weight
    values = [weight.sum(), weight.norm(), (weight * 2).relu_(), weight.clone().zero_(), weight @ weight.T]
    assert all(type(v) is Tensor for v in values)
    assert weight.tolist()
    assert repr(weight)


def test_writes_to_the_base_take_effect() -> None:
    model = injected()
    before, delta = run(model, IDS), (model.body.weight - model.get_parameter("body.weight")).detach()
    with torch.no_grad():
        dict(model.named_parameters())["body.weight"].mul_(2)
    assert distance(run(model, IDS), before) > 1e-3
    torch.testing.assert_close(model.body.weight.detach(), 2 * _half(model) + delta)
    with lora_fx.disable_adapter(model):
        nn.init.zeros_(model.body.weight)
    assert not model.get_parameter("body.weight").any()
    check(model, IDS)


def _half(model: nn.Module) -> Tensor:
    return model.get_parameter("body.weight").detach() / 2


def test_an_assigned_parameter_is_the_new_base() -> None:
    model, new = injected(), nn.Parameter(torch.randn(8, 8).double())
    delta = (model.body.weight - model.get_parameter("body.weight")).detach()
    model.body.weight = new
    assert model.get_parameter("body.weight") is new
    torch.testing.assert_close(model.body.weight.detach(), new.detach() + delta)
    check(model, IDS)
    for other in (None, nn.Parameter(torch.randn(9, 8).double())):
        with pytest.raises(lora_fx.WeightWriteError, match="shape"):
            model.body.weight = other
    assert model.get_parameter("body.weight") is new


def test_assigning_one_of_two_tied_weights_unties_them() -> None:
    model = injected()
    model.head.weight = nn.Parameter(torch.randn(13, 8).double())
    check(model, IDS)
    assert not shares(model)


@pytest.mark.parametrize("adapted", ["both", "one"])
def test_weights_tied_after_inject_keep_an_adapter_each(adapted: str) -> None:
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double(), torch.randn(3, 5).double()
    rules = (lora_fx.Rule(rank=2),) if adapted == "both" else (lora_fx.Skip(name="2.*"), lora_fx.Rule(rank=2))
    lora_fx.inject(model, lora_fx.Policy(*rules), x, seed=0)
    randomise(model)
    model[2].weight = model.get_parameter("0.weight")
    check(model, x)
    wanted, apart = run(model, x), model[0].weight.detach() - model[2].weight.detach()
    assert apart.norm() > 1e-3
    assert not lora_fx.verify(model, x).notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fx.fold(model)
    assert distance(run(model, x), wanted) < 1e-12
    torch.testing.assert_close(model[0].weight.detach() - model[2].weight.detach(), apart)


def test_a_module_put_in_place_of_an_adapted_one_is_named(tmp_path: Path) -> None:
    model = injected()
    model.body = nn.Linear(8, 8).double()
    with pytest.raises(lora_fx.PlanError, match="put there after inject"):
        lora_fx.save_adapter(model, tmp_path / "adapter.safetensors")


def test_a_module_put_in_place_of_its_like_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    model[2] = model[0]
    told = "adapter 'default' has one change left for both 0.weight and 2.weight"
    assert any(note.startswith(told) for note in lora_fx.verify(model, x).notes)
    with pytest.warns(UserWarning, match="one change left"), lora_fx.folded(model):
        pass
    with pytest.raises(lora_fx.PlanError, match="one module in both places"):
        lora_fx.save_adapter(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


def saved_and_loaded(model: nn.Module, base: nn.Module, path: Path) -> nn.Module:
    lora_fx.save_adapter(model, path)
    return lora_fx.load_adapter(base, path)


def test_weights_tied_after_inject_are_saved_with_an_adapter_each(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()

    def tie(model: nn.Module) -> None:
        model[2].weight = model.get_parameter("0.weight")
        model[2].bias = model.get_parameter("0.bias")

    x, policy = torch.randn(3, 5).double(), lora_fx.Policy(lora_fx.Rule(rank=2), bias="all")
    model = lora_fx.inject(base(), policy, x, seed=0)
    tie(model)
    randomise(model)
    assert not torch.equal(model[0].bias, model[2].bias)
    other = base()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(other[2], name).copy_(getattr(other[0], name))
    loaded = saved_and_loaded(model, other, tmp_path / "a.safetensors")
    assert torch.equal(run(loaded, x), run(model, x))
    reset_adapter(model, seed=0)
    with lora_fx.disable_adapter(model):
        wanted = run(model, x)
    assert torch.equal(run(model, x), wanted)


def test_an_adapters_parameter_in_two_places_is_saved_twice(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

    model, x = base(), torch.randn(3, 5)
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    model[2].lora_A__weight__default = model[0].lora_A__weight__default
    randomise(model)
    loaded = saved_and_loaded(model, base(), tmp_path / "a.safetensors")
    assert torch.equal(run(loaded, x), run(model, x))


@pytest.mark.parametrize("what", ["trained", "moving"])
def test_a_norm_put_in_place_of_its_like_is_told(what: str, tmp_path: Path) -> None:
    norm = nn.LayerNorm if what == "trained" else nn.BatchNorm1d
    model, x = nn.Sequential(nn.Linear(4, 4), norm(4), nn.Linear(4, 4), norm(4)), torch.randn(3, 4)
    policy = lora_fx.Policy(lora_fx.Train(name=("1.*", "3.*")))
    if what == "moving":
        policy = lora_fx.Policy(lora_fx.Rule(rank=1), norm_stats="train")
    lora_fx.inject(model, policy, x)
    model[1] = model[3]
    assert any("one change left for both 1." in note for note in lora_fx.verify(model, x).notes)
    with pytest.raises(lora_fx.PlanError, match="one module in both places"):
        lora_fx.save_adapter(model, tmp_path / "adapter.safetensors")


def test_an_adapter_that_went_with_its_module_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    assert lora_fx.verify(model, x).notes == ()
    model[2] = nn.Linear(4, 2)
    told = "adapter 'default' is gone from 2.weight: the module there was put in place after inject"
    assert any(note.startswith(told) for note in lora_fx.verify(model, x).notes)
    with pytest.warns(UserWarning, match="gone from 2.weight"), lora_fx.folded(model):
        pass
    with pytest.warns(UserWarning, match="gone from 2.weight"):
        lora_fx.export_onnx(model, tmp_path / "a.onnx", x, certify=False)
    with pytest.warns(UserWarning, match="gone from 2.weight"):
        lora_fx.fold(model)


def test_a_write_to_the_memory_of_the_effective_weight_raises() -> None:
    model = injected()
    before = run(model, IDS)
    for write in (
        lambda storage: storage.fill_(0),
        lambda storage: storage.copy_(storage.clone()),
        lambda storage: storage.resize_(0),
        lambda storage: storage.__setitem__(0, 0),
    ):
        with pytest.raises(lora_fx.WeightWriteError, match="untyped_storage"), torch.no_grad():
            write(model.body.weight.untyped_storage())
    assert model.body.weight.untyped_storage().nbytes() == 8 * model.body.weight.numel()
    assert distance(run(model, IDS), before) == 0
    model.body._parameters["weight"].untyped_storage().fill_(0)  # W0's own memory may be written
    assert distance(run(model, IDS), before) > 0


def test_a_write_to_its_typed_storage_raises() -> None:
    model = injected()
    before = run(model, IDS)
    for write in (
        lambda storage: storage.fill_(0),
        lambda storage: storage.copy_(storage.clone()),
        lambda storage: storage.resize_(0),
        lambda storage: storage.__setitem__(0, 0),
    ):
        with pytest.raises(lora_fx.WeightWriteError, match="storage"), torch.no_grad():
            write(model.body.weight.storage())
    assert model.body.weight.storage()[0] == model.body.weight.flatten()[0]
    assert distance(run(model, IDS), before) == 0


@pytest.mark.parametrize("first", [True, False])
def test_exchanging_the_effective_weight_raises(first: bool) -> None:
    model = injected()
    other = nn.Parameter(torch.zeros_like(model.body._parameters["weight"]))
    pair = (model.body.weight, other) if first else (other, model.body.weight)
    with pytest.raises(lora_fx.WeightWriteError, match="W0"):
        torch.utils.swap_tensors(*pair)
    assert type(other) is nn.Parameter
    assert not other.any()


def test_a_state_dict_of_the_base_or_of_the_whole() -> None:
    model, other = injected(), Tied().double()
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all("lora_" in name for name in missing)
    assert shares(model)
    lora_fx.unload(model)
    assert torch.equal(run(model, IDS), run(other, IDS))


@pytest.mark.parametrize("wrapped", [False, True])
def test_assigned_state_dicts_keep_ties(wrapped: bool) -> None:
    model, source = injected(), injected(Tied().double())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(0.7)
    outer = nn.ModuleDict({"inner": model}) if wrapped else model
    state = {(f"inner.{k}" if wrapped else k): v.clone() for k, v in source.state_dict().items()}
    outer.load_state_dict(state, assign=True)
    assert shares(model)
    assert torch.equal(run(model, IDS), run(source, IDS))
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    check(model, IDS)


def test_one_tied_name_in_an_assigned_state_dict_is_the_value_of_both() -> None:
    model = injected()
    new = torch.randn(13, 8).double()
    for name in ("head.weight", "embedding.weight"):
        model.load_state_dict({name: new.clone()}, strict=False, assign=True)
        assert shares(model)
        assert torch.equal(model.get_parameter("head.weight"), new)
        new = new + 1


def test_different_values_for_tied_names_are_refused() -> None:
    model = injected()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["head.weight"] += 1
    with pytest.raises(lora_fx.WeightWriteError, match="one value for what is tied"):
        model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("policy", ["low rank", "dora", "pissa", "train"])
def test_a_model_on_the_meta_device_is_injected_and_materialised_later(policy: str) -> None:
    rules = {
        "low rank": lora_fx.Rule(rank=2),
        "dora": lora_fx.Rule(rank=2, dora=True),
        "pissa": lora_fx.Rule(rank=2, init="pissa"),
        "train": lora_fx.Train(),
    }
    torch.manual_seed(0)
    real = Tied().double()
    with torch.device("meta"):
        model = Tied().double()
    lora_fx.inject(model, lora_fx.Policy(rules[policy]), IDS, seed=0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    missing, _ = model.load_state_dict(real.state_dict(), strict=False)
    assert all(name in missing for name in model.state_dict() if "lora_" in name)
    # No adapter has values yet, and what lay in that memory is not taken for one.
    assert bool(run(model, IDS).isnan().any())
    reset_adapter(model, seed=0)
    wanted = lora_fx.inject(copy.deepcopy(real), lora_fx.Policy(rules[policy]), IDS, seed=0)
    assert torch.equal(run(model, IDS), run(wanted, IDS))
    for mine, its in zip(lora_fx.parameters(model), lora_fx.parameters(wanted), strict=True):
        assert torch.equal(mine, its)
    randomise(model)
    check(model, IDS)


def test_planning_on_the_meta_device_reads_no_values() -> None:
    with torch.device("meta"):
        model = Tied()
    real = Tied()
    plans = [lora_fx.plan(m, EVERYTHING, IDS) for m in (model, real)]
    assert plans[0].decisions == plans[1].decisions


def test_a_refused_write_names_the_weight_and_says_what_to_do() -> None:
    body = injected().body
    for write in (
        WRITES["in place"],
        WRITES["a view of a view"],
        WRITES["many at once"],
        WRITES["another memory"],
    ):
        with pytest.raises(lora_fx.WeightWriteError, match=r"'weight' of Linear, Tensor\..*Skip this weight"):
            write(body.weight)


@pytest.mark.parametrize("how", [{}, {"dora": True}, {"compute": "weight"}, {"compute": "branch"}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_share_of_the_weight_put_past_the_module_is_named(how: dict[str, Any], mode: Any) -> None:
    # As transformers' apply_tensor_parallelism does: local shares, written into the register itself.
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, **how)), x)
    whole = model[0]._parameters["weight"]
    model[0]._parameters["weight"] = nn.Parameter(whole.detach()[:2].clone())
    told = r"'weight' of Linear: .*shape \(4, 6\).*got one of shape \(2, 6\).*parallelize_module"
    with mode(), pytest.raises(lora_fx.WrappedModelError, match=told):
        model(x)
    model[0]._parameters["weight"] = whole
    with mode():
        assert model(x).shape == (3, 4)
