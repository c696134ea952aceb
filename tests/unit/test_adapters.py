"""Several adapters on one model: switching, disabling, fresh heads, statistics, files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, Rule, Train
from tests.odd_models import Convs, Fused

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def convs() -> nn.Module:
    torch.manual_seed(0)
    return Convs().eval()


def train(model: nn.Module, inputs: torch.Tensor, steps: int = 5) -> None:
    model.train()
    optimiser = torch.optim.SGD(lora_fx.parameters(model), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()
    model.eval()


def test_two_adapters_take_turns() -> None:
    model = convs()
    base = model(X).detach()
    lora_fx.inject(model, Policy(Rule(rank=2)), X, seed=0)
    train(model, X)
    first = model(X).detach()
    assert not torch.allclose(first, base)
    lora_fx.inject(model, Policy(Rule(kind="linear", rank=1)), X, adapter="second", seed=1)
    assert torch.equal(model(X), first), "a second adapter is added inactive"
    lora_fx.set_adapter(model, "second")
    assert torch.equal(model(X), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.lora_A__weight__second",
        "head.lora_B__weight__second",
    }
    train(model, X)
    second = model(X).detach()
    lora_fx.set_adapter(model, "default")
    assert torch.equal(model(X), first)
    with lora_fx.disable_adapter(model):
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), first)
    lora_fx.unload(model, "default")
    lora_fx.set_adapter(model, "second")
    assert torch.equal(model(X), second)
    lora_fx.unload(model)
    assert torch.equal(model(X), base)


def test_the_active_adapter_is_saved(tmp_path: Path) -> None:
    """What is computed, exported and trained is what a file holds where none is named."""
    model = convs()
    lora_fx.inject(model, Policy(Rule(rank=2)), X, seed=0)
    train(model, X)
    first = model(X).detach()
    lora_fx.inject(model, Policy(Rule(rank=2)), X, adapter="second", seed=1)
    lora_fx.set_adapter(model, "second")
    train(model, X, 3)
    second = model(X).detach()
    assert not torch.allclose(first, second)
    lora_fx.save_adapter(model, tmp_path / "active.safetensors")
    lora_fx.save_adapter(model, tmp_path / "named.safetensors", "default")
    for file, wanted in (("active", second), ("named", first)):
        loaded = lora_fx.load_adapter(convs(), tmp_path / f"{file}.safetensors")
        assert torch.equal(loaded(X), wanted)


def test_a_fresh_head_is_trained_saved_and_folded(tmp_path: Path) -> None:
    model = convs()
    before = copy.deepcopy(model.state_dict())
    policy = Policy(Train(module="head"), Rule(kind="conv", rank=2))
    lora_fx.inject(model, policy, X, seed=0)
    nn.init.zeros_(model.head.weight)  # a fresh start: it is the adapter's own copy that is written to
    assert torch.equal(model(X), model.head.bias.expand(4, 4))
    train(model, X + 1)
    trained = model(X).detach()
    assert all(torch.equal(before[k], model.state_dict()[k]) for k in before)
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    other = lora_fx.load_adapter(convs(), tmp_path / "a.safetensors")
    assert torch.equal(other(X), trained)
    lora_fx.fold(model)
    assert type(model.head) is nn.Linear
    assert torch.allclose(model(X), trained, atol=1e-6)
    assert not any("lora" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["freeze", "train"])
def test_running_statistics(how: str, tmp_path: Path) -> None:
    model = convs()
    base = model(X).detach()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora_fx.inject(model, Policy(Rule(rank=2), norm_stats=how), X, seed=0)
    train(model, X + 3)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], before[name]), "the base's own never move"
    with lora_fx.disable_adapter(model):
        assert torch.equal(model(X), base)
    if how == "freeze":
        with torch.no_grad():
            assert torch.equal(model.train()(X), model.eval()(X))
    else:
        assert int(model.norm.num_batches_tracked) == 5
        assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    model.eval()
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    other = lora_fx.load_adapter(convs(), tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(other(X), model(X))
        with lora_fx.folded(model):
            folded = model(X)
        assert float((folded - model(X)).norm() / folded.norm()) < 1e-5
    lora_fx.verify(model, X).raise_for_failure()
    lora_fx.unload(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_rows_of_a_fused_weight_alone_are_adapted() -> None:
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(2, 5, 16)
    lora_fx.inject(model, Policy.paper(rank=2), x, seed=0)
    names = [n for n, _ in model.qkv.named_parameters() if "lora" in n]
    assert names == [f"lora_{m}_{role}__weight__default" for role in "qv" for m in "AB"]
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_()
    delta = (model.qkv.weight - dict(model.named_parameters())["qkv.weight"]).detach()
    assert delta[:16].abs().min() > 0
    assert delta[16:32].abs().max() == 0
    assert delta[32:].abs().min() > 0
    assert torch.linalg.matrix_rank(delta[:16]) == 2
    # The branch is the same as the weight: loralib's MergedLinear.
    assert torch.allclose(model.qkv(x), F.linear(x, model.qkv.weight, model.qkv.bias), atol=1e-4)


def test_lora_plus_groups() -> None:
    model = lora_fx.inject(convs(), Policy(Rule(rank=2)), X)
    slow, fast = lora_fx.parameters(model, lr_ratio=16, lr=0.01)
    assert (slow["lr"], fast["lr"]) == (0.01, 0.16)
    second = {id(p) for n, p in model.named_parameters() if "lora_B" in n}
    assert {id(p) for p in fast["params"]} == second
    assert len(slow["params"]) + len(fast["params"]) == len(lora_fx.parameters(model))


def test_the_audit_of_a_trained_model_file_and_plan(tmp_path: Path) -> None:
    model = lora_fx.inject(convs(), Policy(Rule(kind="conv", rank=2)), X, seed=0)
    assert {row.delta for row in lora_fx.audit(model).rows if row.action == "adapt"} == {0.0}
    train(model, X)
    weight, base = model.same.weight.detach(), dict(model.named_parameters())["same.weight"]
    wanted = float((weight - base).norm() / base.norm())
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    for source in (model, tmp_path / "a.safetensors"):
        rows = {row.name: row for row in lora_fx.audit(source).rows}
        assert rows["same.weight"].delta == pytest.approx(wanted, rel=1e-5)
        assert rows["head.weight"].action == "skip"
    with pytest.raises(lora_fx.AdapterNameError):
        lora_fx.audit(convs())


def test_an_adapter_loaded_for_inference_says_that_it_is_not_trained(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(convs(), Policy(Rule(rank=2)), X), path)
    with pytest.warns(UserWarning, match=r"'default' was loaded for inference.*trainable=True") as warned:
        held = lora_fx.parameters(lora_fx.load_adapter(convs(), path))
    assert warned[0].filename == __file__
    assert not any(p.requires_grad for p in held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lora_fx.load_adapter(convs(), path, trainable=True)
        assert all(p.requires_grad for p in lora_fx.parameters(model))
        lora_fx.inject(model, Policy(Rule(rank=1)), X, adapter="inactive")
        assert lora_fx.parameters(model, "inactive")


@pytest.mark.parametrize("rule", [lora_fx.Rule(rank=2), lora_fx.Train(name="0.weight")])
def test_a_weight_whose_elements_share_memory_is_refused_by_name(rule: lora_fx.Rule | lora_fx.Train) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(5, 6)
    model[0].weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))
    before = model.state_dict().keys()
    with pytest.raises(lora_fx.PlanError, match=r"^0\.weight: .* a place of its own .* strides \(0, 1\)"):
        lora_fx.inject(model, lora_fx.Policy(rule), x)
    assert model.state_dict().keys() == before
    assert type(model[0]) is nn.Linear
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    lora_fx.verify(lora_fx.inject(model, lora_fx.Policy(rule), x), x).raise_for_failure()
