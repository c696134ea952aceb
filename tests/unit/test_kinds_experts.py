"""Stacks of experts, however the model reaches one of them: one matrix and one rank r for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from tests.by_hand import check, distance, randomise, run

E, D, H = 3, 4, 8
EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))


def looped_linear(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros(len(x), w.shape[1])
    for e in ids.unique():
        rows = (ids == e).nonzero().flatten()
        y = y.index_add(0, rows, F.linear(x[rows], w[e]))
    return y


def looped_matmul(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros(len(x), w.shape[2])
    for e in range(len(w)):
        mask = (ids == e).unsqueeze(-1)
        y = y + torch.where(mask, x @ w[e], 0.0)
    return y


def gathered(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1)


def gathered_transposed(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), w[ids].to(x.dtype).transpose(1, 2)).squeeze(1)


def gathered_by_index_select(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("bi,boi->bo", x, w.index_select(0, ids))


def all_of_them(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    every = torch.einsum("bi,eoi->beo", x, w)
    return every[torch.arange(len(x)), ids]


def grouped(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    order = ids.argsort()
    ends = torch.bincount(ids, minlength=len(w)).cumsum(0).to(torch.int32)
    return F.grouped_mm(x[order], w.transpose(-2, -1), offs=ends)[order.argsort()]


class Mixture(nn.Module):
    """A router, then one of three experts for each token."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        best, ids = scores.max(-1)
        return torch.tanh(self.function(x, self.experts, ids)) * best.unsqueeze(-1)


USES: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "looped linear": (looped_linear, (E, H, D), "experts"),
    "looped matmul": (looped_matmul, (E, D, H), "experts"),
    "gathered": (gathered, (E, H, D), "experts"),
    "gathered, transposed": (gathered_transposed, (E, H, D), "experts"),
    "gathered, index_select": (gathered_by_index_select, (E, H, D), "experts"),
    "grouped": (grouped, (E, H, D), "experts"),
    "bmm": (
        lambda x, w, ids: torch.bmm(x.expand(E, -1, -1), w)[ids, torch.arange(len(x))],
        (E, D, H),
        "matmul",
    ),
    "baddbmm": (
        lambda x, w, ids: torch.baddbmm(x.new_zeros(1), x.expand(E, -1, -1), w)[ids, torch.arange(len(x))],
        (E, D, H),
        "matmul",
    ),
}


@pytest.mark.parametrize("use", sorted(USES))
def test_invariant(use: str) -> None:
    torch.manual_seed(0)
    function, shape, kind = USES[use]
    dtype = torch.float32 if use == "grouped" else torch.float64
    model, x = Mixture(function, shape).to(dtype), torch.randn(12, D, dtype=dtype)
    base = run(model, x).detach()
    assert len(model.router(x).argmax(-1).unique()) == E
    plan = lora_fx.plan(model, EVERYTHING, x)
    site = plan["experts"].site
    assert site.kind == kind
    assert (site.form.experts, site.form.out_features, site.form.in_features) == (E, H, D)
    lora_fx.inject(model, plan, x, seed=0)
    assert model.lora_A__experts__default.shape == (E, 2, D)
    assert model.lora_B__experts__default.shape == (E, H, 2)
    randomise(model)
    assert distance(run(model, x), base) > 1e-3
    check(model, x)


def test_every_expert_at_once_in_einsum_is_one_matrix_for_all() -> None:
    model, x = Mixture(all_of_them, (E, H, D)).double(), torch.randn(12, D, dtype=torch.float64)
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    randomise(model)
    check(model, x)


class Modules(nn.Module):
    """Experts that are modules; the example inputs reach the first one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)) for _ in range(E)
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = x
        for e in ids.unique().tolist():
            y = torch.where((ids == e).unsqueeze(-1), self.experts[e](x), y)
        return y


def test_experts_that_the_run_did_not_reach_are_twins() -> None:
    model = Modules().double()
    x, ids = torch.randn(5, D, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    plan = lora_fx.plan(model, EVERYTHING, (x, ids))
    assert {d.name: d.reason.value for d in plan.decisions if ".0.weight" in d.name} == {
        "experts.0.0.weight": "rule",
        "experts.1.0.weight": "twin",
        "experts.2.0.weight": "twin",
    }
    lora_fx.inject(model, plan, (x, ids), seed=0)
    randomise(model)
    check(model, x, torch.tensor([0, 1, 2, 1, 0]))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_transformers_experts(name: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    config = transformers.AutoConfig.for_model(
        name, **sizes, **heads, num_experts_per_tok=2, experts_implementation=implementation, pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    ids = {"input_ids": torch.arange(2, 14).reshape(2, 6)}
    plan = lora_fx.plan(model, EVERYTHING, ids)
    stacks = {d.name.rpartition(".")[2]: d.site for d in plan.adapted if len(d.site.shape) == 3}
    assert {
        n: (s.kind, s.form.experts, s.form.out_features, s.form.in_features) for n, s in stacks.items()
    } == {
        "gate_up_proj": ("experts", 3, 24, 16),
        "down_proj": ("experts", 3, 16, 12),
    }
    assert [d.site.roles for d in plan.adapted if "router" in d.site.roles] == [{"router": None}]
    lora_fx.inject(model, plan, ids, seed=0)
    lora_fx.verify(model, ids).raise_for_failure()
