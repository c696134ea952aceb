"""Weights that a module computes from what it stores: the stored parameter gets the adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fx
from lora_fx.passes.tree import sites_from_modules
from tests.by_hand import check, distance, randomise, run

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
X, IMAGE, SEQUENCE = torch.randn(2, 3, 6), torch.randn(2, 3, 7, 7), torch.randn(2, 4, 7)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


Case = tuple[Callable[[], nn.Module], Tensor, str, str]
CASES: dict[str, Case] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 8)), X, "original1", "linear"),
    "weight_norm, axis 1": (
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=1),
        IMAGE,
        "original1",
        "conv",
    ),
    "weight_norm, whole": (
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=None),
        IMAGE,
        "original1",
        "conv",
    ),
    "weight_norm, transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3)),
        SEQUENCE,
        "original1",
        "conv_transpose",
    ),
    "weight_norm, recurrent": (
        lambda: parametrizations.weight_norm(nn.LSTM(6, 5), "weight_hh_l0"),
        X,
        "original1",
        "recurrent",
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 8)), X, "original", "linear"),
    "spectral_norm, conv": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        IMAGE,
        "original",
        "conv",
    ),
    "spectral_norm, embedding": (
        lambda: parametrizations.spectral_norm(nn.Embedding(9, 6)),
        torch.arange(8).reshape(2, 4),
        "original",
        "embedding",
    ),
    "of one's own": (lambda: symmetric(nn.Linear(6, 6)), X, "original", "linear"),
    "old weight_norm": (lambda: utils.weight_norm(nn.Linear(6, 8)), X, "weight_v", "linear"),
    "old weight_norm, conv": (lambda: utils.weight_norm(nn.Conv2d(3, 4, 3)), IMAGE, "weight_v", "conv"),
    "old spectral_norm": (lambda: utils.spectral_norm(nn.Linear(6, 8)), X, "weight_orig", "linear"),
    "old spectral_norm, conv": (
        lambda: utils.spectral_norm(nn.Conv2d(3, 4, 3)),
        IMAGE,
        "weight_orig",
        "conv",
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(6, 8), "weight", 0.4), X, "weight_orig", "linear"),
    "pruned, recurrent": (
        lambda: prune.random_unstructured(nn.LSTM(6, 5), "weight_hh_l0", 0.3),
        X,
        "weight_hh_l0_orig",
        "recurrent",
    ),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, str, str]:
    torch.manual_seed(0)
    make, x, stored, kind = CASES[request.param]
    with pytest.warns(FutureWarning) if "old weight_norm" in request.param else torch.no_grad():
        model = make()
    return model.double(), x.double() if x.is_floating_point() else x, stored, kind


def test_invariant(case: tuple[nn.Module, Tensor, str, str]) -> None:
    model, x, stored, kind = case
    base = run(model, x)
    plan = lora_fx.plan(model, EVERYTHING, x)
    sites = {d.site.attribute: d.site for d in plan.adapted}
    assert sites[stored].kind == kind
    lora_fx.inject(model, plan, x, seed=0)
    randomise(model)
    assert distance(run(model, x), base) > 1e-3
    check(model, x)


def test_folding_changes_what_is_stored_and_nothing_else(case: tuple[nn.Module, Tensor, str, str]) -> None:
    model, x, stored, _ = case
    model.eval()
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    before = copy.deepcopy(model.state_dict())
    randomise(model)
    wanted = run(model, x)
    names = {d.name for d in lora_fx.audit(model).rows if d.action == "adapt"}
    assert any(name.endswith(stored) for name in names)
    lora_fx.fold(model)
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == names
    assert distance(run(model, x), wanted) < 1e-12


def test_the_reason_names_what_computes_the_weight() -> None:
    plan = lora_fx.plan(parametrizations.spectral_norm(nn.Linear(6, 8)), EVERYTHING, X)
    (decision,) = plan.adapted
    assert decision.form == "weight"
    assert "the weight is computed by" in decision.form_reason


def test_a_mask_stays_over_the_delta() -> None:
    """The rule is about the stored weight: what is pruned away stays away."""
    layer = prune.l1_unstructured(nn.Linear(6, 8), "weight", 0.4)
    lora_fx.inject(layer, EVERYTHING, X, seed=0)
    randomise(layer)
    layer(X)
    assert not layer.weight[layer.weight_mask == 0].any()
    assert (layer.weight_orig - layer._parameters["weight_orig"])[layer.weight_mask == 0].any()


@pytest.mark.parametrize(
    "later",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.4),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        utils.spectral_norm,
    ],
    ids=["prune", "weight_norm", "spectral_norm", "old spectral_norm"],
)
def test_computing_an_adapted_weight_anew_is_refused(later: Callable[[nn.Module], nn.Module]) -> None:
    """Applied after inject, they would take W for the base weight, and adapt it twice."""
    layer = nn.Linear(6, 8)
    lora_fx.inject(layer, EVERYTHING, X, seed=0)
    randomise(layer)
    wanted = layer(X)
    with pytest.raises((lora_fx.WeightWriteError, TypeError)):
        later(layer)
    assert distance(layer(X), wanted) == 0


MADE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 6), X),
    "conv": (lambda: nn.Conv2d(3, 3, 3), IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), IMAGE),
    "embedding": (lambda: nn.Embedding(6, 6), torch.tensor([[1, 2]])),
    "bag": (lambda: nn.EmbeddingBag(6, 6), torch.tensor([[1, 2]])),
}


@pytest.mark.parametrize("made", MADE)
def test_a_weight_that_a_hook_makes_anew_in_every_forward(made: str) -> None:
    torch.manual_seed(0)
    build, x = MADE[made]
    layer = build().double()
    layer.weight_v = layer._parameters.pop("weight")

    def make(module: nn.Module, _: object) -> None:
        module.weight = nn.functional.normalize(module.weight_v, dim=1)

    layer.register_forward_pre_hook(make)
    model = nn.Sequential(layer)
    assert [(site.name, site.kind) for site in sites_from_modules(model)] == [("0.weight_v", "other")]
    x = x.double() if x.is_floating_point() else x
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    randomise(model)
    check(model, x)


class Doubled(nn.Module):
    """A parametrization with no inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def adapted_layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(4, 6).double()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    randomise(model)
    return model, x


AFTER: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral norm": utils.spectral_norm,
    "of one's own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}


@pytest.mark.parametrize("name", sorted(AFTER))
def test_a_parametrization_after_inject_is_refused_by_name(name: str) -> None:
    model, x = adapted_layers()
    before, state = model(x), set(model.state_dict())
    with pytest.raises(lora_fx.WeightWriteError, match=r"(?s)of Linear.*unload first"):
        AFTER[name](model[0])
    assert set(model.state_dict()) == state
    assert torch.equal(model(x), before)
    check(model, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_weight_norm_after_inject_says_what_it_took() -> None:
    model, x = adapted_layers()
    weight, before = model.get_parameter("0.weight"), model(x)
    with pytest.raises(lora_fx.WeightWriteError, match=r"'weight' of Linear.*Put it back .*unload first"):
        utils.weight_norm(model[0])
    with pytest.raises(lora_fx.WeightWriteError, match=r"'weight' of Linear.*took it away"):
        model(x)
    model[0].register_parameter("weight", weight)
    assert torch.equal(model(x), before)
    check(model, x)


def test_a_parametrized_bias_of_an_adapted_layer_stays() -> None:
    model, x = adapted_layers()
    before = type(model[0])
    parametrize.register_parametrization(model[0], "bias", Doubled())
    wanted, cls = model(x), type(model[0])
    check(model, x)
    assert type(model[0]) is cls
    assert torch.equal(run(model, x), wanted)
    parametrize.remove_parametrizations(model[0], "bias", leave_parametrized=False)
    assert type(model[0]) is before
    parametrize.register_parametrization(model[0], "bias", Doubled())
    lora_fx.fold(model)
    assert distance(run(model, x), wanted) < 1e-12
    assert parametrize.is_parametrized(model[0], "bias")
    parametrize.remove_parametrizations(model[0], "bias", leave_parametrized=False)
    assert type(model[0]) is nn.Linear


def test_a_parametrized_adapter_is_named() -> None:
    model, x = adapted_layers()
    parametrize.register_parametrization(model[0], "lora_A__weight__default", Doubled())
    with pytest.raises(lora_fx.WeightWriteError, match=r"lora_A__weight__default.*took it away"):
        model(x)
