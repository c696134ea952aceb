"""How adapters are computed: what a plan expects is what runs, and what a rule asks is obeyed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.kinds import conv, embedding, embedding_bag, fused_linear, linear
from lora_fx.passes import runtime
from lora_fx.plans import Plan
from lora_fx.policy import Policy, Rule

COMPUTES = ("auto", "branch", "weight")
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


class Fused(nn.Module):
    """An attention with q, k and v in one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Siblings(nn.Module):
    """q, k and v are three weights on one input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Tied(nn.Module):
    """An embedding and a head share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(13, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class Looped(nn.Module):
    """One weight on inputs of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:1]).sum() + self.layer(x)


class Own(nn.Module):
    """A weight that a forward of one's own reads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class Experts(nn.Module):
    """Modules of which the run takes one; the other is its twin."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.experts[0](x))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 13, shape)


def attend(x: Tensor) -> Any:
    return (x, x, x)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the plan's words, how adapters are computed while a test runs."""
    told: list[str] = []

    def spy(module: Any, name: str, tell: Callable[..., str | None]) -> None:
        plain = getattr(module, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            if (word := tell(result, *args)) is not None:
                told.append(word)
            return result

        monkeypatch.setattr(module, name, spied)

    spy(linear, "merged_linear", lambda result, *_: None if result is None else "kept")
    spy(fused_linear, "_run", lambda _, *args: of_call(args[3]))
    spy(linear, "low_rank", lambda *_: "added")
    spy(conv, "fused_conv", lambda *_: "merged")
    spy(conv, "wide_conv", lambda *_: "added")
    spy(conv, "_low_rank_conv", lambda *_: "added")
    spy(embedding, "_looked_up", lambda *_: "added")
    spy(embedding_bag, "_bags", lambda *_: "added")
    spy(embedding, "effective_weight", lambda *_: "weight")
    spy(embedding_bag, "effective_weight", lambda *_: "weight")
    spy(runtime, "effective_weight", lambda *_: "weight")
    return told


def of_call(call: fused_linear.Call) -> str:
    if call.slots is not None and len(call.slots) > 1:
        return "stacked"
    ways = {(True, True): "merged", (True, False): "merged forward", (False, True): "merged backward"}
    return ways.get((call.merged, call.merged_back), "added")


Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], str]
CASES: dict[str, Case] = {
    "small linear": (lambda: nn.Linear(16, 16), lambda: torch.randn(2, 4, 16), {}, "kept"),
    "one row": (lambda: nn.Linear(16, 16), lambda: torch.randn(16), {}, "kept"),
    "few rows": (lambda: nn.Linear(300, 300), lambda: torch.randn(4, 300), {}, "added"),
    "many rows": (lambda: nn.Linear(64, 64), lambda: torch.randn(5, 200, 64), {}, "merged"),
    "wide": (lambda: nn.Linear(32, 512), lambda: torch.randn(128, 32), {}, "merged forward"),
    "narrow": (lambda: nn.Linear(512, 32), lambda: torch.randn(128, 512), {}, "merged backward"),
    "dropout": (lambda: nn.Linear(64, 64), lambda: torch.randn(1000, 64), {"dropout": 0.1}, "added"),
    "start": (lambda: nn.Linear(64, 64), lambda: torch.randn(1000, 64), {"init": "pissa"}, "stacked"),
    "dora": (lambda: nn.Linear(64, 64), lambda: torch.randn(1000, 64), {"dora": True}, "weight"),
    "parts": (Fused, lambda: torch.randn(2, 3, 8), {"role": "qv"}, "stacked"),
    "rows": (lambda: Fused(64), lambda: torch.randn(2, 500, 64), {"role": "q"}, "added"),
    "siblings": (Siblings, lambda: torch.randn(2, 3, 8), {}, "kept"),
    "Conv1D": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 8), {}, "added"),
    "Conv1D of many rows": (lambda: Conv1D(6, 8), lambda: torch.randn(8, 5, 8), {}, "merged"),
    "convolution": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(2, 3, 9, 9), {}, "merged"),
    "strided": (
        lambda: nn.Conv2d(16, 64, 3, stride=4, dilation=2), lambda: torch.randn(1, 16, 12, 12), {}, "added"
    ),
    "groups": (lambda: nn.Conv1d(8, 8, 3, groups=4), lambda: torch.randn(1, 8, 5), {}, "merged"),
    "named padding": (
        lambda: nn.Conv2d(3, 8, 3, padding="same"), lambda: torch.randn(2, 3, 9, 9), {}, "added"
    ),
    "no batch": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(3, 9, 9), {}, "added"),
    "dropped convolution": (
        lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(2, 3, 9, 9), {"dropout": 0.1}, "added"
    ),
    "embedding": (lambda: nn.Embedding(13, 8), lambda: ids(2, 3), {}, "added"),
    "by frequency": (lambda: nn.Embedding(13, 8, scale_grad_by_freq=True), lambda: ids(2, 3), {}, "weight"),
    "bag": (lambda: nn.EmbeddingBag(13, 8), lambda: ids(2, 3), {}, "added"),
    "maxima": (lambda: nn.EmbeddingBag(13, 8, mode="max"), lambda: ids(2, 3), {}, "weight"),
    "tied": (Tied, lambda: ids(2, 3), {}, "added, kept"),
    "looped": (Looped, lambda: torch.randn(5000, 40), {}, "kept, merged"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: attend(torch.randn(3, 2, 8)), {}, "weight"),
    "own forward": (Own, lambda: torch.randn(3, 8), {}, "weight"),
}  # fmt: skip


def cast_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype) if x.is_floating_point() else x


def injected(case: Case, compute: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Plan]:
    make, inputs, options, _ = case
    model, x = make().to(dtype).train(), inputs()
    x = tuple(map(cast_to(dtype), x)) if isinstance(x, tuple) else cast_to(dtype)(x)
    rule = Rule(rank=2, compute=cast("Any", compute), **options)
    plan = lora_fx.plan(model, Policy(rule), x)
    lora_fx.inject(model, plan, x, seed=0)
    return model, x, plan


@pytest.mark.parametrize("name", CASES)
def test_the_plan_expects_what_runs(name: str, seen: list[str]) -> None:
    model, x, plan = injected(CASES[name], "auto")
    decisions = plan.adapted
    assert {d.expected for d in decisions} == {CASES[name][3]}
    assert all(d.expected_reason for d in decisions)
    del seen[:]
    model(*x) if isinstance(x, tuple) else model(x)
    assert ", ".join(dict.fromkeys(seen)) == CASES[name][3]


@pytest.mark.parametrize("name", ["few rows", "many rows", "convolution", "groups", "Conv1D", "embedding"])
def test_half_precision_forms_no_weight(name: str, seen: list[str]) -> None:
    model, x, plan = injected(CASES[name], "auto", torch.bfloat16)
    assert {d.expected for d in plan.adapted} == {"added"}
    del seen[:]
    model(x)
    assert set(seen) == {"added"}


BRANCHED = sorted(set(CASES) - {"attention", "own forward", "dora", "by frequency", "maxima"})


@pytest.mark.parametrize("name", BRANCHED)
def test_a_branch_that_is_asked_for_forms_no_weight(name: str, seen: list[str]) -> None:
    model, x, plan = injected(CASES[name], "branch")
    assert {d.form for d in plan.adapted} == {"branch"}
    wanted = {"stacked" if CASES[name][3] == "stacked" else "added"}
    assert {d.expected for d in plan.adapted} == wanted
    del seen[:]
    model(x)
    assert set(seen) == wanted
    auto = CASES[name][3]
    if auto in {"kept", "merged", "merged forward", "merged backward"}:
        assert all(f"without compute='branch' {auto}, " in d.expected_reason for d in plan.adapted)


@pytest.mark.parametrize("name", sorted(n for n, case in CASES.items() if "dropout" not in case[2]))
def test_a_weight_that_is_asked_for_is_read(name: str, seen: list[str]) -> None:
    model, x, plan = injected(CASES[name], "weight")
    assert {(d.form, d.expected) for d in plan.adapted} == {("weight", "weight")}
    del seen[:]
    model(*x) if isinstance(x, tuple) else model(x)
    assert set(seen) == {"weight"}
    idle = name in {"attention", "own forward", "dora", "by frequency", "maxima"}
    assert all(("changes nothing" in d.form_reason) is idle for d in plan.adapted)


def trained(model: nn.Module) -> list[nn.Parameter]:
    generator, found = torch.Generator().manual_seed(3), list(lora_fx.parameters(model))
    for parameter in found:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def step(model: nn.Module, x: Any) -> list[Tensor]:
    """The output, and the gradients of the adapter and of an input of floats."""
    parameters = list(lora_fx.parameters(model))
    given = x if isinstance(x, tuple) else (x,)
    given = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in given)
    leaves = [t for t in given[:1] if t.requires_grad]
    y = model(*given)
    y = y[0] if isinstance(y, tuple) else y
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [*parameters, *leaves])]


EQUAL = sorted(n for n, case in CASES.items() if "dropout" not in case[2])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", EQUAL)
def test_every_form_is_the_same_function(name: str, dtype: torch.dtype) -> None:
    results: dict[str, list[Tensor]] = {}
    for compute in COMPUTES if name in BRANCHED else ("auto", "weight"):
        torch.manual_seed(0)
        make = CASES[name][0]
        base = make().to(dtype).train().state_dict()
        torch.manual_seed(0)
        model, x, _ = injected(CASES[name], compute, dtype)
        given = x if isinstance(x, tuple) else (x,)
        with torch.no_grad():
            start = first(model(*given))
        with lora_fx.disable_adapter(model), torch.no_grad():
            assert torch.equal(start, first(model(*given)))
        trained(model)
        results[compute] = step(model, x)
        with lora_fx.folded(model), torch.no_grad():
            assert distance(results[compute][0], first(model(*given))) <= LIMITS[dtype]
        assert distance(results[compute][0], start) > 1e-3, "the adapter changes nothing"
        lora_fx.verify(model, x).raise_for_failure()
        lora_fx.unload(model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    wanted = results.pop("auto")
    for found in results.values():
        assert all(distance(f, w) <= LIMITS[dtype] for f, w in zip(found, wanted, strict=True))


def first(y: Any) -> Tensor:
    return cast("Tensor", y[0] if isinstance(y, tuple) else y)


def test_a_twin_is_expected_to_do_as_its_twin() -> None:
    plan = lora_fx.plan(Experts(), Policy(Rule(rank=2)), torch.randn(3, 8))
    reached, twin = plan.decisions
    assert twin.reason == "twin"
    assert (twin.expected, twin.expected_reason) == (reached.expected, reached.expected_reason)
    assert twin.expected == "kept"


def test_reasons_have_the_numbers_of_the_recorded_run() -> None:
    linear_plan = lora_fx.plan(nn.Linear(32, 512), Policy(Rule(rank=2)), torch.randn(4, 32, 32))
    assert linear_plan.decisions[0].expected_reason == (
        "128 rows, 32 in, 512 out, rank 2: 2 x 16,384 elements of W' against 65,536 of y "
        "and, backward, 4,096 of dx"
    )
    conv_plan = lora_fx.plan(nn.Conv2d(3, 8, 3), Policy(Rule(rank=2)), torch.randn(2, 3, 9, 9))
    assert conv_plan.decisions[0].expected_reason == (
        "98 places, 27 in, 8 out, rank 2: 6,860 multiplications of thin products against 2 x 432 of forming "
        "W'; dA and dB by thin products"
    )
    weighed = lora_fx.plan(nn.Linear(32, 512), Policy(Rule(rank=2, compute="weight")), torch.randn(128, 32))
    assert weighed.decisions[0].expected_reason.startswith(
        "W is computed in every training step, 16,384 elements by 32,768 multiplications; "
        "without compute='weight' merged forward, 128 rows"
    )


def test_expectations_stand_in_tables_and_audits() -> None:
    plan = lora_fx.plan(nn.Linear(300, 300), Policy(Rule(rank=2, compute="branch")), torch.randn(1000, 300))
    text = str(plan)
    assert "branch [c1]" in text
    assert "[c1] added: thin products; without compute='branch' merged, 1,000 rows" in text
    assert "branch [c1]" in str(lora_fx.audit(plan))
    [row] = json.loads(lora_fx.audit(plan).to_json())["rows"]
    assert (row["compute"], row["expected"]) == ("branch", "added")
    assert row["expected_reason"] == plan.decisions[0].expected_reason


def test_a_budget_that_lowers_ranks_is_seen() -> None:
    policy = Policy(Rule(rank=8), budget=600)
    plan = lora_fx.plan(nn.Linear(300, 300), policy, torch.randn(4, 300))
    assert plan.decisions[0].rank == 1
    assert "rank 1:" in plan.decisions[0].expected_reason


# --- what cannot be ---


@pytest.mark.parametrize("name", ["attention", "own forward", "dora"])
def test_a_branch_that_cannot_be_is_refused(name: str) -> None:
    make, inputs, options, _ = CASES[name]
    with pytest.raises(lora_fx.PolicyError, match="compute='branch' asks") as caught:
        lora_fx.plan(make(), Policy(Rule(compute="branch", **options)), inputs())
    assert "weight" in caught.value.where
    assert "weight form" in caught.value.got


class Both(Own):
    """A weight that its module's forward reads too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.proj(x)


def test_some_uses_as_a_branch_are_not_enough(seen: list[str]) -> None:
    with pytest.raises(lora_fx.PolicyError, match="the mixed form"):
        lora_fx.plan(Both(), Policy(Rule(compute="branch")), torch.randn(3, 8))
    plan = lora_fx.plan(Both(), Policy(Rule(rank=2)), torch.randn(3, 8))
    assert plan.decisions[0].expected == "weight, kept"
    model, x, plan = injected((Both, lambda: torch.randn(3, 8), {}, ""), "weight")
    assert plan.decisions[0].form_reason == "compute='weight' asks for it"
    del seen[:]
    model(x)
    assert seen == ["weight", "weight"]


def test_a_weight_in_half_precision_is_said_to_be_rounded() -> None:
    model, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8).bfloat16()
    [decision] = lora_fx.plan(model, Policy(Rule(rank=2, compute="weight")), x).decisions
    assert "48 elements by 96 multiplications, rounded to bfloat16; without" in decision.expected_reason


def test_a_branch_needs_a_recorded_run_and_a_weight_does_not() -> None:
    with pytest.raises(lora_fx.PolicyError, match="Pass example_inputs"):
        lora_fx.plan(nn.Linear(4, 4), Policy(Rule(compute="branch")))
    plan = lora_fx.plan(nn.Linear(4, 4), Policy(Rule(compute="weight")))
    assert (plan.decisions[0].form, plan.decisions[0].expected) == ("weight", "")
    assert plan.decisions[0].form_reason == "compute='weight' asks for it"


def test_a_weight_with_dropout_is_refused() -> None:
    with pytest.raises(
        lora_fx.PolicyError, match=r"^weight: expected dropout=0.*compute='weight' asks for it"
    ):
        lora_fx.plan(nn.Linear(4, 4), Policy(Rule(compute="weight", dropout=0.1)), torch.randn(2, 4))


def test_parts_of_one_weight_are_computed_in_one_way() -> None:
    policy = Policy(Rule(role="q", compute="weight"), Rule(role="v"))
    with pytest.raises(lora_fx.PolicyError, match="one compute for the rules that share"):
        lora_fx.plan(Fused(), policy, torch.randn(2, 3, 8))


# --- files, other adapters, other models ---


@pytest.mark.parametrize("compute", COMPUTES)
def test_files_keep_what_is_asked(compute: str, tmp_path: Path, seen: list[str]) -> None:
    case = CASES["many rows"]
    model, x, plan = injected(case, compute)
    assert Plan.from_json(plan.to_json()) == plan
    assert Policy.from_json(Policy(Rule(compute=cast("Any", compute))).to_json()).rules[0].compute == compute  # type: ignore[union-attr]
    trained(model)
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    other = nn.Linear(64, 64)
    other.load_state_dict({"weight": model.state_dict()["weight"], "bias": model.state_dict()["bias"]})
    lora_fx.load_adapter(other, tmp_path / "a.safetensors")
    del seen[:]
    assert torch.equal(other(x), model(x))
    expected = {"auto": "merged", "branch": "added", "weight": "weight"}[compute]
    assert seen == [expected, expected]
    copied = copy.deepcopy(other)
    del seen[:]
    copied(x)
    assert seen == [expected]


def test_files_of_before_are_read() -> None:
    plan = lora_fx.plan(nn.Linear(4, 4), Policy(Rule(rank=2)), torch.randn(2, 4))
    data = json.loads(plan.to_json())
    for decision in data["decisions"]:
        for field in ("compute", "expected", "expected_reason"):
            del decision[field]
    [read] = Plan.from_json(json.dumps(data)).decisions
    assert (read.compute, read.expected, read.expected_reason) == ("auto", "", "")
    assert not Plan.from_json(json.dumps(data)).diff(plan)


def test_plans_that_differ_in_what_is_asked_differ() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    plans = [lora_fx.plan(model, Policy(Rule(rank=2, compute=c)), x) for c in ("auto", "branch")]
    [change] = plans[0].diff(plans[1]).changes
    assert (change.what, change.before, change.after) == ("compute", "auto", "branch")
    larger = lora_fx.plan(model, Policy(Rule(rank=2)), torch.randn(99999, 4))
    assert larger.decisions[0].expected != plans[0].decisions[0].expected
    assert not larger.diff(plans[0])


def test_pefts_folders_do_not_hold_it(tmp_path: Path) -> None:
    case: Case = (lambda: nn.Sequential(nn.Linear(64, 64)), lambda: torch.randn(1000, 64), {}, "")
    model, x, _ = injected(case, "weight")
    trained(model)
    lora_fx.save_adapter(model, tmp_path / "peft", format="peft")
    other = nn.Sequential(nn.Linear(64, 64))
    other[0].load_state_dict({k: model.state_dict()[f"0.{k}"] for k in ("weight", "bias")})
    with pytest.warns(UserWarning, match="base"):
        lora_fx.load_adapter(other, tmp_path / "peft")
    [decision] = [row for row in lora_fx.audit(other).rows if row.action == "adapt"]
    assert decision.compute == "auto"
    assert distance(other(x), model(x)) <= 1e-5


def test_adapters_of_one_weight_are_computed_each_in_its_way(seen: list[str]) -> None:
    model, x = nn.Linear(64, 64), torch.randn(1000, 64)
    outputs: dict[str, Tensor] = {}
    for compute in COMPUTES:
        plan = lora_fx.plan(model, Policy(Rule(rank=2, compute=cast("Any", compute))), x)
        lora_fx.inject(model, plan, x, adapter=compute, seed=0)
    words = {"auto": "merged", "branch": "added", "weight": "weight"}
    for compute, word in words.items():
        lora_fx.set_adapter(model, compute)
        trained(model)
        del seen[:]
        outputs[compute] = model(x)
        assert seen == [word]
    assert distance(outputs["branch"], outputs["auto"]) <= 1e-5
    assert distance(outputs["weight"], outputs["auto"]) <= 1e-5


def test_a_weight_that_is_asked_for_leaves_the_forward_alone() -> None:
    model, _, _ = injected(CASES["many rows"], "weight")
    assert type(model) is not nn.Linear
    assert type(model).forward is nn.Linear.forward


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_graph_of_ones_own_is_computed_as_asked(compute: str, seen: list[str]) -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    x = torch.randn(1000, 64)
    plan = lora_fx.plan(model, Policy(Rule(rank=2, compute=cast("Any", compute))), x)
    lora_fx.inject(model, plan, x, seed=0)
    del seen[:]
    model(x)
    assert seen == [plan.adapted[0].expected]
    lora_fx.verify(model, x).raise_for_failure()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("name", ["many rows", "small linear", "convolution", "groups"])
def test_gradients_twice(name: str, compute: str) -> None:
    model, x, _ = injected(CASES[name], compute, torch.float64)
    small = x.flatten(0, -2)[:3] if name != "convolution" and name != "groups" else x[..., :4]
    parameters = trained(model)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        names = [n for n, p in model.named_parameters() if any(p is q for q in parameters)]
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).sum(0)

    assert torch.autograd.gradgradcheck(
        run, (small.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)),
        fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("compute", COMPUTES)
def test_compilers_compile_once_for_each_state(compute: str) -> None:
    frames: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        frames.append(graph)
        return graph

    model, x, _ = injected(CASES["many rows"], compute)
    trained(model)
    wanted = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for _ in range(2):
        assert distance(compiled(x), wanted) <= 1e-5
        assert len(frames) == 1
    for _ in range(2):
        with lora_fx.disable_adapter(model):
            compiled(x)
        compiled(x)
    assert len(frames) == 2


def test_the_refusal_names_every_weight_that_has_no_branch() -> None:
    model, x = nn.Sequential(nn.LSTM(4, 4, num_layers=2)), torch.randn(3, 2, 4)
    with pytest.raises(lora_fx.PolicyError, match=r"Rule\(kind='recurrent', \.\.\.\) without compute"):
        lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2, compute="branch")), x)
    asked = lora_fx.Rule(rank=2, compute="branch", name=("*ih_l0", "*ih_l1"))
    named = r"Rule\(name=\('0\.weight_ih_l0', '0\.weight_ih_l1'\), \.\.\.\)"
    with pytest.raises(lora_fx.PolicyError, match=named):
        lora_fx.plan(model, lora_fx.Policy(asked, lora_fx.Rule(rank=2)), x)
