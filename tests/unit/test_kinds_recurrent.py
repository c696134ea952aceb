"""Recurrent networks: every module, layer, direction and projection, injected against folded."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lora_fx
from lora_fx.passes.fold import base_only, fold, folded
from lora_fx.passes.remove import unload
from lora_fx.passes.runtime import INJECTED
from tests.by_hand import adapt, check, distance, owned_forms, randomise, run

NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, two layers": (nn.LSTM, {"num_layers": 2, "batch_first": True}),
    "lstm, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm, projected": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "lstm, without bias": (nn.LSTM, {"bias": False}),
    "lstm, dropout": (nn.LSTM, {"num_layers": 3, "dropout": 0.5}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "rnn": (nn.RNN, {"num_layers": 2}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls, how = NETWORKS[name]
    return cls(4, 5, **how)


def weights(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.dim() == 2 and "lora" not in n}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant(name: str, dtype: torch.dtype) -> None:
    model, x = network(name).to(dtype), torch.randn(3, 6, 4, dtype=dtype)
    assert set(owned_forms(model)) == weights(model)
    base = run(model, x)
    adapt(model)
    assert distance(run(model, x), base) > 1e-3
    check(model, x)


def test_one_matrix_for_each_gate() -> None:
    forms = owned_forms(nn.LSTM(4, 5, proj_size=3))
    assert {n: (f.experts, f.out_features, f.in_features) for n, (_, f) in forms.items()} == {
        "weight_ih_l0": (4, 5, 4),
        "weight_hh_l0": (4, 5, 3),
        "weight_hr_l0": (None, 3, 5),
    }
    assert owned_forms(nn.GRU(4, 5))["weight_hh_l0"][1].experts == 3
    assert owned_forms(nn.RNN(4, 5))["weight_hh_l0"][1].experts is None


@pytest.mark.parametrize("name", ["lstm, projected", "gru"])
def test_packed_sequences_and_given_states(name: str) -> None:
    model = network(name).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    adapt(model)
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 2]))
    state = run(model, x)[1]

    def outputs() -> list[Tensor]:
        found, states = run(model, packed)
        return [found.data, *(states if isinstance(states, tuple) else (states,)), run(model, x, state)[0]]

    injected = outputs()
    with folded(model):
        reference = outputs()
    assert distance(injected, reference) < 1e-10


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cls: type[nn.Module]) -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = cls(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x:
                state = self.cell(step, state)
            return self.out(state[0] if isinstance(state, tuple) else state)

    model = Looped().double()
    adapt(model)
    check(model, torch.randn(4, 3, 4, dtype=torch.float64))


def test_the_module_goes_through_life_as_a_plain_one() -> None:
    model, x = network("lstm, both ways"), torch.randn(6, 3, 4)
    plain = copy.deepcopy(model)
    adapt(model)
    wanted = run(model, x)
    with folded(model):
        run(model, x)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert distance(run(other, x), wanted) == 0
        assert all(w is p for w, p in zip(other.__dict__["_flat_weights"], _base(other), strict=True))
    model.double()
    assert distance(run(model, x.double()), [t.double() for t in _tensors(wanted)]) < 1e-5
    model.float()
    model.flatten_parameters()
    with base_only(model):
        assert distance(run(model, x), run(plain, x)) == 0
    assert distance(run(model, x), wanted) == 0
    fold(copied)
    assert type(copied) is nn.LSTM
    assert distance(run(copied, x), wanted) < 1e-5
    assert all(w is p for w, p in zip(copied._flat_weights, _base(copied), strict=True))
    unload(pickled)
    assert distance(run(pickled, x), run(plain, x)) == 0
    assert sorted(pickled.__dict__) == sorted(plain.__dict__)
    assert INJECTED not in pickled.__dict__


def test_an_assigned_weight_is_the_new_base() -> None:
    model, x = network("lstm"), torch.randn(6, 3, 4)
    adapt(model)
    before = run(model, x)
    delta = model.weight_hh_l0.detach() - model._parameters["weight_hh_l0"].detach()
    new = nn.Parameter(torch.randn(20, 5))
    model.weight_hh_l0 = new
    assert model._parameters["weight_hh_l0"] is new
    torch.testing.assert_close(model.weight_hh_l0, new + delta)
    assert distance(run(model, x), before) > 1e-3
    check(model, x)


@pytest.mark.parametrize("parametrized", [False, True])
def test_an_injected_recurrence_is_exported(parametrized: bool) -> None:
    model, x = nn.Sequential(nn.GRU(4, 3)).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    if parametrized:
        nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    randomise(model)
    program = torch.export.export(model, (x,))
    assert distance(program.module()(x), model(x)) < 1e-12


def _base(model: nn.Module) -> list[nn.Parameter | None]:
    return [model._parameters[name] for name in model._flat_weights_names]


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in _tensors(v)]
