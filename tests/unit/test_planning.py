"""Policy -> plan over synthetic sites: decisions, reasons, errors, and the paper's figures."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.claims import subtract_rows
from lora_fx.errors import PlanError, PolicyError
from lora_fx.matrix import Rows, stacked_form
from lora_fx.plans import Part, Plan, Reason
from lora_fx.policy import Policy, Rule, Skip, Train
from tests.unit.site_builders import BRANCH, WEIGHT, attention, fused, plan, site, transformer


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- the paper's figures (layers x width, policy, parameters by 2 * L * d * r) ---


@pytest.mark.parametrize(
    ("layers", "width", "roles", "rank", "expected"),
    [
        pytest.param(12, 768, "qv", 8, 294_912, id="RoBERTa-base"),
        pytest.param(24, 1024, "qv", 8, 786_432, id="RoBERTa-large"),
        pytest.param(48, 1536, "qv", 16, 4_718_592, id="DeBERTa-XXL"),
        pytest.param(24, 1024, "qv", 4, 393_216, id="GPT-2-medium"),
        pytest.param(36, 1280, "qv", 4, 737_280, id="GPT-2-large"),
        pytest.param(96, 12288, "qv", 1, 4_718_592, id="GPT-3-r1"),
        pytest.param(96, 12288, "qv", 8, 37_748_736, id="GPT-3-r8"),
        pytest.param(96, 12288, "qkvo", 4, 37_748_736, id="GPT-3-qkvo-r4"),
        pytest.param(96, 12288, "qv", 64, 301_989_888, id="GPT-3-r64"),
        pytest.param(96, 12288, "qkvo", 64, 603_979_776, id="GPT-3-qkvo-r64"),
    ],
)
def test_parameter_counts_of_the_paper(layers, width, roles, rank, expected):
    """Hu et al. 2021: figures of tables 2 to 4 by their own formula."""
    made = plan(transformer(layers, width), Policy(Rule(role=roles, rank=rank)))
    assert len(made.adapted) == len(roles) * layers
    assert made.parameters == expected == 2 * len(roles) * layers * width * rank


def test_the_papers_checkpoint_of_gpt_3():
    """q and v at r=4 in half precision are the paper's 35 MB (36 MiB), against 350 GB."""
    made = plan(transformer(96, 12288), Policy.paper(rank=4), base_parameters=175_255_800_000)
    in_half = made.parameters * 2
    assert in_half / 2**20 == 36.0
    assert made.adapter_bytes == 2 * in_half  # A and B are kept in float32
    assert made.parameters / made.base_parameters == pytest.approx(1e-4, rel=0.1)


def test_a_fused_weight_counts_its_rows_only():
    split = plan(attention("a", 64), Policy.paper(rank=4))
    together = plan([fused(width=64)], Policy.paper(rank=4))
    assert together.parameters == split.parameters == 2 * 2 * 64 * 4


# --- decisions ---


def test_first_rule_wins_and_every_site_has_a_decision():
    sites = transformer(2, 8)
    made = plan(sites, Policy(Skip(name="layers.0.*"), Rule(role="q", rank=2), Rule(kind="linear", rank=4)))
    assert [d.site for d in made.decisions] == sites
    assert made["layers.0.attention.query.weight"].reason is Reason.SKIP_RULE
    assert made["layers.1.attention.query.weight"].rank == 2
    assert made["layers.1.attention.key.weight"].rank == 4
    assert made["layers.1.attention.key.weight"].rule == "Rule(kind='linear', rank=4)"


def test_no_rule_is_a_reason():
    made = plan(attention("a", 8), Policy.paper(2))
    assert {d.reason for d in made.decisions if d.action == "skip"} == {Reason.NO_RULE}


def test_roles_of_a_fused_weight_are_parts():
    decision = plan([fused()], Policy(Rule(role="qv", rank=2))).decisions[0]
    assert decision.parts == (Part(2, "q", ((0, 8),)), Part(2, "v", ((16, 24),)))
    assert decision.rows == ((0, 8), (16, 24))
    assert decision.parameters == 2 * 2 * (8 + 8)


def test_all_roles_of_a_fused_weight_keep_one_part_each():
    decision = plan([fused()], Policy(Rule(role="qkv", rank=2))).decisions[0]
    assert [part.role for part in decision.parts] == ["q", "k", "v"]


def test_equal_rows_share_one_part():
    shared = site("kv.weight", (16, 8), roles={"q": ((0, 8),), "k": ((8, 16),), "v": ((8, 12), (12, 16))})
    decision = plan([shared], Policy(Rule(role="kv", rank=2))).decisions[0]
    assert decision.parts == (Part(2, "k+v", ((8, 16),)),)


def test_a_role_with_all_rows_adapts_the_whole_weight():
    shared = site("qk.weight", roles={"q": None, "k": ((0, 4), (4, 8))})
    for roles in ("q", "k", "qk"):
        assert plan([shared], Policy(Rule(role=roles, rank=2))).decisions[0].parts == (Part(2),)


def test_a_rule_without_roles_adapts_the_whole_fused_weight():
    assert plan([fused()], Policy(Rule(rank=2))).decisions[0].parts == (Part(2),)


def test_a_policy_means_the_same_on_a_fused_weight_as_on_three():
    """Later rules get the rows that earlier ones left, as they get the weights of a split model."""
    policy = Policy(Rule(role="q", rank=2), Skip(role="k"), Rule(rank=4))
    decision = plan([fused()], policy).decisions[0]
    assert decision.parts == (Part(2, "q", ((0, 8),)), Part(4, "v", ((16, 24),)))
    assert decision.rule == "Rule(role='q', rank=2); Skip(role='k'); Rule(rank=4)"
    split = plan([s for s in attention("a", 8) if "output" not in s.name], policy)
    assert {role: d.rank for d in split.decisions for role in d.site.roles} == {"q": 2, "k": None, "v": 4}


def test_rows_without_a_role_are_the_rest():
    odd = site("w.weight", (24, 8), roles={"q": ((0, 8),)})
    decision = plan([odd], Policy(Rule(role="q", rank=2), Rule(rank=4))).decisions[0]
    assert decision.parts == (Part(2, "q", ((0, 8),)), Part(4, "rest", ((8, 24),)))


def test_a_skip_of_some_rows_leaves_the_others_without_a_rule():
    decision = plan([fused(), *attention("a", 8)], Policy(Skip(role="k"), Rule(role="o", rank=2))).decisions[
        0
    ]
    assert (decision.action, decision.reason) == ("skip", Reason.SKIP_RULE)
    assert "rows of k skipped" in decision.detail


def test_rules_that_share_a_weight_must_agree_on_its_scale():
    with pytest.raises(PolicyError, match=r"attn\.qkv\.weight: expected one scale"):
        plan([fused()], Policy(Rule(role="q", rank=2, alpha=4), Rule(role="v", rank=2, alpha=2)))


def test_rank_is_capped_with_the_scale_kept():
    decision = plan([site("w.weight", (10, 64))], Policy(Rule(rank=64, alpha=128))).decisions[0]
    assert (decision.rank, decision.scale) == (10, 2.0)
    assert "rank 64 capped at 10, the most that 10 x 64 can hold; scale 2 kept" in decision.detail


def test_rank_is_capped_by_the_rows_of_a_part():
    multi_query = site("qkv.weight", (40, 32), roles={"q": ((0, 32),), "v": ((36, 40),)})
    decision = plan([multi_query], Policy(Rule(role="qv", rank=8))).decisions[0]
    assert [part.rank for part in decision.parts] == [8, 4]


def test_experts_cost_rank_r_each():
    stack = site("experts.up", (4, 16, 8), form=stacked_form((4, 16, 8)), kind="experts")
    assert plan([stack], Policy(Rule(rank=2))).parameters == 4 * 2 * (16 + 8)


def test_a_tied_weight_says_what_else_it_changes():
    tied = site("embed.weight", names=("embed.weight", "lm_head.weight"))
    for policy in (Policy(Rule(rank=2)), Policy(Train(name="lm_head.*"))):
        made = plan([tied], policy)
        assert "changes lm_head.weight too" in made["lm_head.weight"].detail
    assert plan([tied], Policy(Skip())).decisions[0].detail == ""


# --- forms ---


@pytest.mark.parametrize(
    ("uses", "form"), [((BRANCH, BRANCH), "branch"), ((WEIGHT,), "weight"), ((BRANCH, WEIGHT), "mixed")]
)
def test_form_follows_the_uses(uses, form):
    decision = plan([site("w.weight", uses=uses)], Policy(Rule(rank=2))).decisions[0]
    assert decision.form == form
    if WEIGHT in uses:
        assert "read outside its module" in decision.form_reason


def test_dora_takes_the_weight_form_and_trains_magnitudes():
    decision = plan([site("w.weight", (8, 4))], Policy(Rule(rank=2, dora=True))).decisions[0]
    assert decision.form == "weight"
    assert "DoRA" in decision.form_reason
    assert decision.parameters == 2 * (8 + 4) + 8


@pytest.mark.parametrize("uses", [(WEIGHT,), (BRANCH, WEIGHT)])
def test_dropout_in_weight_form_names_the_site(uses):
    with pytest.raises(PolicyError, match=r"b\.weight: expected dropout=0"):
        plan([site("a.weight"), site("b.weight", uses=uses)], Policy(Rule(rank=2, dropout=0.1)))
    fine = Policy(Rule(name="b.weight", rank=2), Rule(rank=2, dropout=0.1))
    assert plan([site("a.weight"), site("b.weight", uses=uses)], fine)["a.weight"].dropout == 0.1


# --- what cannot be adapted ---


def test_unfit_and_integer_weights_are_skipped_with_their_reason():
    sites = [site("a.weight"), site("b.weight", unfit="quantised"), site("c.weight", dtype="int8")]
    made = plan(sites, Policy(Rule(rank=2)))
    assert [d.reason for d in made.decisions] == [Reason.RULE, Reason.UNFIT, Reason.NOT_FLOAT]
    assert made["b.weight"].detail == "quantised"


def test_what_is_without_effect_has_its_own_reason():
    sites = [site("a.weight"), site("b.weight", unfit="no-effect: its result reaches no output of the run")]
    decision = plan(sites, Policy(Rule(rank=2)))["b.weight"]
    assert (decision.reason, decision.detail) == (Reason.NO_EFFECT, "its result reaches no output of the run")


def test_what_cannot_be_adapted_can_still_be_trained_in_full():
    position = site("position", (1, 16, 8), kind="other", unfit="read by add; never multiplied", uses=())
    made = plan([position, site("a.weight")], Policy(Train(name="position"), Rule(rank=2)))
    assert (made["position"].action, made["position"].parameters) == ("train", 128)
    made = plan([position, site("a.weight")], Policy(Rule(rank=2)))
    assert (made["position"].action, made["position"].reason) == ("skip", Reason.UNFIT)
    lazy = replace(site("lazy.weight", unfit="not initialised yet"), shape=())
    made = plan([lazy, site("a.weight")], Policy(Train(name="lazy.*"), Rule(rank=2)))
    assert (made["lazy.weight"].action, made["lazy.weight"].reason) == ("skip", Reason.UNFIT)


def test_a_weight_of_no_kind_needs_a_run():
    sites = [site("a.weight", kind="other", uses=()), site("b.weight", uses=())]
    made = plan(sites, Policy(Rule(rank=2)), traced=False)
    assert [d.reason for d in made.decisions] == [Reason.UNFIT, Reason.RULE]
    assert "example_inputs" in made["a.weight"].detail


def test_a_rule_whose_weights_are_all_skipped_is_warned_of():
    sites = [site("a.weight", unfit="quantised"), site("b.weight")]
    with pytest.warns(
        UserWarning, match=r"rule 1, .*adapts nothing: all 1 weight\(s\) that it decides .* unfit, quantised"
    ):
        plan(sites, Policy(Rule(name="a.*"), Rule(rank=2)))


def test_a_site_that_the_run_did_not_reach_is_decided_as_its_twin():
    reached = site("experts.0.up.weight", roles={"up": None}, depth=0.5)
    twin = site("experts.1.up.weight", uses=(), twin="experts.0.up.weight")
    alone = site("other.weight", uses=())
    made = plan([reached, twin, alone, site("used.weight")], Policy(Rule(role="up", rank=2), Rule(rank=4)))
    assert (made[twin.name].action, made[twin.name].reason) == ("adapt", Reason.TWIN)
    assert (made[twin.name].rank, made[twin.name].form) == (2, "branch")
    assert "twin experts.0.up.weight" in made[twin.name].detail
    assert made[twin.name].site is twin
    assert (made[alone.name].action, made[alone.name].reason) == ("skip", Reason.NOT_REACHED)


def test_a_skipped_twin_is_skipped_too():
    reached = site("experts.0.up.weight", roles={"up": None})
    twin = site("experts.1.up.weight", uses=(), twin="experts.0.up.weight")
    made = plan([reached, twin, site("a.weight")], Policy(Skip(role="up"), Rule(rank=4)))
    assert (made[twin.name].action, made[twin.name].reason) == ("skip", Reason.TWIN)


# --- parameters trained in full ---

HEAD = {"head.bias": ((8,), "float32"), "norm.weight": ((8,), "float32"), "norm.bias": ((8,), "float32")}


def test_train_takes_the_bias_with_the_weight():
    made = plan(
        [site("head.weight"), site("a.weight")],
        Policy(Train(name="head.weight"), Rule(rank=1)),
        parameters=HEAD,
    )
    assert (made["head.weight"].action, made["head.weight"].form) == ("train", "full")
    assert [e.name for e in made.extras] == ["head.bias"]
    assert made.parameters == 64 + 8 + 16


def test_train_reaches_parameters_that_are_no_sites():
    made = plan([site("a.weight")], Policy(Train(module="norm"), Rule(rank=1)), parameters=HEAD)
    assert [e.name for e in made.extras] == ["norm.weight", "norm.bias"]
    by_class = plan(
        [site("a.weight")], Policy(Train(module="LayerNorm")), parameters=HEAD, owners={"norm": "LayerNorm"}
    )
    assert by_class.extras[0].name == "norm.weight"
    assert by_class.parameters == 16


def test_a_skip_keeps_parameters_out_of_a_later_train():
    made = plan([site("a.weight")], Policy(Skip(name="*.bias"), Train(name="norm.*")), parameters=HEAD)
    assert [e.name for e in made.extras] == ["norm.weight"]


@pytest.mark.parametrize(
    ("mode", "names"), [("all", {"head.bias", "norm.bias"}), ("lora_only", {"head.bias"})]
)
def test_biases(mode, names):
    made = plan([site("head.weight"), site("a.weight")], Policy(Rule(rank=1), bias=mode), parameters=HEAD)
    assert {e.name for e in made.extras} == names


# --- errors and warnings ---


def test_a_rule_that_matches_nothing_says_what_there_is():
    with pytest.raises(PolicyError) as caught:
        plan(transformer(2, 8), Policy(Rule(module="querry")))
    text = str(caught.value)
    assert "Nearest to module='querry': query" in text
    assert "roles: q (2), k (2), v (2), o (2)" in text
    assert "kinds: linear (8)" in text
    assert "layers.* (8)" in text


def test_a_missing_role_lists_the_roles():
    with pytest.raises(PolicyError, match=r"roles: q \(2\)"):
        plan(transformer(2, 8), Policy(Rule(role="up")))


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(PolicyError, match="Nearest to kind='linaer': linear"):
        plan(transformer(2, 8), Policy(Rule(kind="linaer")))


def test_filters_that_exclude_each_other_are_counted_one_by_one():
    with pytest.raises(PolicyError, match=r"module='query' alone matches 2, role='k' alone matches 2"):
        plan(transformer(2, 8), Policy(Rule(module="query", role="k")))


def test_an_unknown_role_is_refused_at_once():
    with pytest.raises(PolicyError, match="roles of q, k, v, o"):
        Rule(role="query")


@pytest.mark.parametrize("rule", [Rule(role="q"), Rule(depth=-1), Skip(role="head"), Rule(depth=(0.5, 1.0))])
def test_dataflow_without_a_run_is_refused(rule):
    with pytest.raises(PolicyError, match="example_inputs"):
        plan(attention("a", 8), Policy(rule, Rule()), traced=False)


def test_without_a_run_sites_take_the_weight_form_unless_their_uses_are_known():
    made = plan([site("a.weight", uses=()), site("b.weight")], Policy(Rule(rank=1)), traced=False)
    assert [d.form for d in made.decisions] == ["weight", "branch"]


def test_a_shadowed_rule_is_warned_of_and_noted():
    with pytest.warns(UserWarning, match="rule 2, .*decides nothing.*taken by rule 1"):
        made = plan(attention("a", 8), Policy(Rule(rank=2), Rule(role="q", rank=4)))
    assert "rule 2" in made.notes[0]


def test_one_name_of_several_that_matches_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="module='vlaue' in .* matches no weight. Nearest .*: value"):
        plan(attention("a", 8), Policy(Rule(module=("query", "vlaue"), rank=4)))


def test_a_name_of_several_may_be_a_parameter_for_train_but_not_for_an_adapter():
    sites = [site("a.weight")]
    plan(sites, Policy(Train(name=("a.weight", "norm.weight"))), parameters=HEAD)
    with pytest.warns(UserWarning, match="name='norm.weight' in .* matches no weight"):
        plan(sites, Policy(Rule(name=("a.weight", "norm.weight"), rank=1)), parameters=HEAD)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(depth=(0.9, 0.95)), "Depths of the model's weights: 0.1, 0.5, 1."),
        (
            Rule(role="q", depth=(0.6, 0.9)),
            "Depths of the weights that the other filters match: 0.1, 0.5, 1.",
        ),
        (
            Rule(name="layers.1.*", depth=(0.6, 0.9)),
            "Depths of the weights that the other filters match: 0.5.",
        ),
        (
            Rule(name="layers.0.*", depth=-1),
            "Of 3 blocks, the weights that the other filters match lie in 0 (counted from 0).",
        ),
        (Rule(name="*.[01].*", depth=-1), "the weights that the other filters match lie in 0-1 (counted"),
        (
            Rule(name="other.*", depth=-1),
            "Of 3 blocks, none holds any of the weights that the other filters match: give depth as a share",
        ),
        (Rule(name="other.*", depth=(0.0, 1.0)), "the other filters match: none is known."),
    ],
)
def test_a_depth_that_nothing_has_says_what_depths_there_are(rule, said):
    depths = (0.1, 0.5, 1.0)
    layers = [replace(s, depth=depths[s.block[0]]) for s in transformer(3, 8)]
    with pytest.raises(PolicyError) as caught:
        plan([*layers, site("other.weight")], Policy(rule))
    assert said in str(caught.value)
    assert "Nearest" not in str(caught.value)


def test_of_many_depths_the_nearest_are_said():
    sites = [site(f"{i}.weight", depth=i / 20) for i in range(21)]
    said = "go from 0 to 1 in 21 steps; the nearest to (0.91, 0.93) are 0.9 and 0.95."
    with pytest.raises(PolicyError, match=re.escape(said)):
        plan(sites, Policy(Rule(depth=(0.91, 0.93))))


def test_a_depth_that_is_right_is_not_spoken_of():
    for rule in (Rule(module="querry"), Rule(module="querry", depth=-1)):
        with pytest.raises(PolicyError) as caught:
            plan(transformer(3, 8), Policy(rule))
        assert "epth" not in str(caught.value).replace("depth=-1", "")


@pytest.mark.parametrize(("depth", "end"), [(-100, "last"), (4, "first")])
def test_more_blocks_than_there_are_is_warned_of(depth, end):
    said = f"asks for the {end} {abs(depth)} blocks, and the model has 3: all"
    with pytest.warns(UserWarning, match=said):
        made = plan(transformer(3, 8), Policy(Rule(role="q", depth=depth)))
    assert said in made.notes[0]
    assert len(made.adapted) == 3
    assert plan(transformer(3, 8), Policy(Rule(role="q", depth=3))).notes == ()


def test_long_inventories_are_cut():
    sites = [site(f"part{i}.weight") for i in range(10)]
    with pytest.raises(PolicyError, match="and 2 more"):
        plan(sites, Policy(Rule(module="no")))


def test_presets_skip_what_is_not_there_without_a_word():
    made = plan(attention("a", 8), Policy.default(rank=2))
    assert len(made.adapted) == 4
    assert made.notes == ()


def test_a_preset_that_finds_nothing_says_what_the_model_has():
    convs = [site("stem.weight", (8, 3, 3, 3), kind="conv", roles={"stem": None})]
    for policy in (Policy.paper(), Policy.attention(), Policy.default()):
        warnings.simplefilter("ignore")
        with pytest.raises(PolicyError, match=r"roles: stem \(1\); kinds: conv \(1\)"):
            plan(convs, policy)
    with pytest.raises(PolicyError, match=r"kinds: linear \(4\)"):
        plan(attention("a", 8), Policy.convs())
    assert plan(convs, Policy.convs(2)).adapted


def test_a_plan_that_can_train_nothing_is_refused():
    sites = [site("a.weight", unfit="quantised"), site("b.weight", unfit="quantised")]
    with (
        pytest.raises(PolicyError, match=r"2 unfit; b\.weight: unfit, quantised"),
        pytest.warns(match="adapts nothing"),
    ):
        plan(sites, Policy(Rule()))


# --- budgets ---


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 32)), min_size=1, max_size=8),
    st.integers(1, 20_000),
)
def test_a_budget_is_kept_and_used(shapes, budget):
    sites = [site(f"l{i}.weight", (rows, columns)) for i, (rows, columns, _) in enumerate(shapes)]
    rules = [Rule(name=f"l{i}.weight", rank=rank, alpha=3.0) for i, (_, _, rank) in enumerate(shapes)]
    full = plan(sites, Policy(*rules))
    costs = [rows + columns for rows, columns, _ in shapes]
    if budget < min(costs):
        with pytest.raises(PolicyError, match="room for at least one adapter"):
            plan(sites, Policy(*rules, budget=budget))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = plan(sites, Policy(*rules, budget=budget))
    assert made.parameters <= budget
    assert (made == full) is False  # the arithmetic is always in the notes
    assert f"budget {budget:,} parameters" in made.notes[-1]
    for mine, asked, cost in zip(made.decisions, full.decisions, costs, strict=True):
        assert (mine.rank or 0) <= (asked.rank or 0)
        if mine.action == "adapt":
            assert mine.scale == asked.scale
            if mine.rank < asked.rank and sum(costs) <= budget:
                assert made.parameters + cost > budget  # no room was left unused
        else:
            assert mine.reason is Reason.NO_BUDGET
            assert sum(costs) > budget


def test_a_budget_scales_all_ranks_by_one_factor_and_hands_out_the_rest_in_order():
    sites = transformer(4, 8)  # 16 matrices, 16 numbers per rank
    made = plan(sites, Policy(Rule(rank=8), budget=16 * 16 * 3 + 16 * 2))
    assert [d.rank for d in made.decisions] == [4, 4] + [3] * 14
    assert made.parameters == 16 * 16 * 3 + 16 * 2
    assert "rank 8 scaled to 3 by the budget" in made.decisions[-1].detail
    assert "x 0.3906" in made.notes[0]
    assert "the rules ask 2,048" in made.notes[0]


def test_weights_that_the_budget_has_no_room_for_are_warned_of():
    with pytest.warns(UserWarning, match="no room for 2 of 4 adapters"):
        made = plan(
            transformer(1, 8),
            Policy(Rule(rank=8), budget=2 * 16 + 8, bias="lora_only"),
            parameters={f"layers.0.attention.{n}.bias": ((4,), "float32") for n in ("query", "output")},
        )
    assert "rank 1 for each takes 64: given in order as long as it fits, 32" in made.notes[0]
    assert [d.reason for d in made.decisions] == [Reason.RULE] * 2 + [Reason.NO_BUDGET] * 2
    assert [e.name for e in made.extras] == ["layers.0.attention.query.bias"]
    assert made["layers.0.attention.output.weight"].detail == "rank 8 scaled to 0 by the budget"


def test_a_share_and_bytes_are_budgets_too():
    sites = transformer(4, 8)
    assert plan(sites, Policy(Rule(rank=8), budget=0.01), base_parameters=102_400).parameters == 1024
    assert plan(sites, Policy(Rule(rank=8), budget="4KiB")).adapter_bytes == 4096
    doubles = [site(f"{i}.weight", dtype="float64") for i in range(16)]
    assert plan(doubles, Policy(Rule(rank=8), budget="4096 B")).parameters == 512


def test_what_is_trained_in_full_comes_off_the_budget():
    sites = [site("head.weight", (8, 8)), *transformer(1, 8)]
    made = plan(sites, Policy(Train(name="head.*"), Rule(rank=8), budget=64 + 2 * 64))
    assert [d.rank for d in made.adapted] == [2, 2, 2, 2]
    assert "64 are fixed" in made.notes[0]


@pytest.mark.parametrize("budget", [0, -1, 1.0, 0.0, True, "many", "-3MB", "0MB", [1]])
def test_a_budget_that_cannot_be_read(budget):
    with pytest.raises(PolicyError, match="budget"):
        Policy(Rule(), budget=budget)


# --- the record ---


def test_a_plan_survives_json():
    sites = [fused(), site("head.weight"), site("b.weight", unfit="no")]
    made = plan(sites, Policy(Train(name="head.*"), Rule(rank=2, dora=True), bias="all"), parameters=HEAD)
    assert Plan.from_json(made.to_json()) == made


# --- properties over drawn models and policies ---


@st.composite
def drawn_sites(draw):
    """Sites of 1 to 12 rows whose roles play any rows, with any number of uses."""
    sites = []
    for index in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 6))
        edges = draw(st.lists(st.integers(0, rows), max_size=4, unique=True).map(sorted))
        spans = list(pairwise(edges))
        played = st.one_of(
            st.none(), st.lists(st.sampled_from(spans or [(0, rows)]), min_size=1, unique=True)
        )
        roles = draw(st.dictionaries(st.sampled_from("qkvo"), played.map(lambda r: r and tuple(sorted(r)))))
        uses = draw(st.lists(st.sampled_from([BRANCH, WEIGHT]), max_size=3))
        unfit = draw(st.sampled_from([None, None, None, "quantised"]))
        dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "int8"]))
        sites.append(
            site(f"l.{index}.weight", (rows, columns), roles=roles, uses=uses, unfit=unfit, dtype=dtype)
        )
    return sites


drawn_filters = st.sampled_from(
    [{}, {"role": "q"}, {"role": "kv"}, {"role": "qkvo"}, {"name": "l.0.*"}, {"name": "l.1.*", "role": "q"}]
)
drawn_rules = st.lists(
    st.builds(
        lambda cls, given, rank: cls(**given, optional=True, **({"rank": rank} if cls is Rule else {})),
        st.sampled_from([Rule, Rule, Skip, Train]),
        drawn_filters,
        st.integers(1, 8),
    ),
    min_size=1,
    max_size=4,
)


def rows_of(part: Part, out: int) -> set[int]:
    return {i for start, stop in part.rows or ((0, out),) for i in range(start, stop)}


@given(drawn_sites(), drawn_rules)
def test_every_row_is_decided_by_the_first_rule_that_asks_for_it(sites, rules):
    """Row by row against the definition: the rank of a row's part is that of the first rule for it."""
    policy = Policy(*rules, Skip(optional=True))
    try:
        made = plan(sites, policy)
    except PolicyError as error:
        if error.expected != "at least one weight that is trained":
            raise
        return
    assert Plan.from_json(made.to_json()) == made
    for s, decision in zip(sites, made.decisions, strict=True):
        out, columns = s.shape
        assert decision.site is s
        assert len({part.role for part in decision.parts}) == len(decision.parts)
        if decision.action == "adapt":
            assert s.uses
            assert s.unfit is None
            assert decision.reason is Reason.RULE
            for part in decision.parts:
                assert 1 <= part.rank <= min(len(rows_of(part, out)), columns)
        if s.unfit or s.dtype == "int8" or not s.uses or decision.action == "train":
            continue
        if any(isinstance(rule, Train) and rule.matches(s) for rule in rules):
            continue  # takes all of it or nothing
        for row in range(out):
            first = next((rule for rule in rules if asks_for(rule, s, row)), Skip())
            ranks = {part.rank for part in decision.parts if row in rows_of(part, out)}
            if isinstance(first, Rule):
                assert ranks
                assert max(ranks) <= first.rank
            else:
                assert not ranks


def asks_for(rule, s, row) -> bool:
    if not rule.matches(s):
        return False
    if not rule.roles:
        return True
    played = [s.roles[role] for role in rule.roles if role in s.roles]
    return any(rows is None or any(a <= row < b for a, b in rows) for rows in played)


ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5)


@given(ranges, ranges)
def test_rows_are_subtracted_as_sets(left, right):
    def disjoint(spans) -> Rows:
        rows: list[tuple[int, int]] = []
        for start, length in sorted(spans):
            if not rows or start >= rows[-1][1]:
                rows.append((start, start + length))
        return tuple(rows)

    def members(rows: Rows) -> set[int]:
        return {i for start, stop in rows for i in range(start, stop)}

    a, b = disjoint(left), disjoint(right)
    assert members(subtract_rows(a, b)) == members(a) - members(b)


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        ("complex64", "adapters and trained copies are real"),
        ("float8_e4m3fn", "would round every small delta away"),
        ("int8", "cannot be trained"),
    ],
)
def test_dtypes_that_take_no_adapter_are_skipped_with_the_true_reason(dtype, why):
    decision = plan([site("w", dtype=dtype), site("v")], Policy(Rule()))["w"]
    assert (decision.action, decision.reason) == ("skip", Reason.NOT_FLOAT)
    assert why in decision.detail


def test_large_weights_in_the_weight_form_are_warned_of():
    sites = [
        site("large", (8192, 8192), uses=(WEIGHT,)),
        site("small", uses=(WEIGHT,)),
        site("plain", (9000, 9000)),
    ]
    with pytest.warns(
        UserWarning, match=r"2 weights .* 256 MiB in all; large for one: .*read outside"
    ) as seen:
        made = plan(sites, Policy(Rule()))
    assert [str(seen[0].message)] == list(made.notes)
    smaller = [site("large", (8192, 8191), uses=(WEIGHT,)), site("half", (8192, 8192), dtype="float16")]
    assert plan(smaller, Policy(Rule())).notes == ()


def test_a_policy_read_as_a_plan_and_the_other_way_round_are_told_apart():
    policy = Policy(Rule(role="qv", rank=4))
    with pytest.raises(PlanError, match=r"got a policy, which Policy\.from_json reads"):
        Plan.from_json(policy.to_json())
    with pytest.raises(PlanError, match="got no plan_version in it"):
        Plan.from_json("[]")
    with pytest.raises(PolicyError, match=r"got a plan\. Read it with Plan\.from_json"):
        Policy.from_json(plan(attention("a", 8), policy).to_json())


@pytest.mark.parametrize(
    ("shape", "rank", "said"),
    [
        ((24, 8), 6, ""),
        ((24, 8), 7, "A and B of rank 7 have 224 numbers, what they change 192; rank 5 would have fewer"),
        (
            (2, 768),
            2,
            "A and B of rank 2 have 1,540 numbers, what they change 1,536; rank 1 would have fewer",
        ),
        (
            (1, 8),
            1,
            "A and B of rank 1 have 9 numbers, what they change 8; so has every rank: Train trains fewer",
        ),
    ],
)
def test_an_adapter_larger_than_its_weight_is_remarked(shape, rank, said):
    decision = plan([site("a.weight", shape)], Policy(Rule(rank=rank))).decisions[0]
    assert decision.detail == said
    rows, columns = shape
    assert bool(said) is (decision.parameters > rows * columns)
    found = re.search(r"rank (\d+) would", said)
    if found is not None:
        smaller, next_one = int(found[1]), int(found[1]) + 1
        assert smaller * (rows + columns) < rows * columns <= next_one * (rows + columns)


def test_the_remark_is_on_the_rank_that_the_budget_leaves():
    sites = [site("a.weight", (24, 8)), site("b.weight", (24, 8))]
    made = plan(sites, Policy(Rule(rank=8), budget=4 * 2 * 32))
    assert {d.rank for d in made.decisions} == {4}
    assert not any("what they change" in d.detail for d in made.decisions)


def test_the_remark_counts_the_rows_of_a_role():
    made = plan([fused(width=8)], Policy(Rule(role="q", rank=5)))
    assert made.decisions[0].detail.endswith(
        "q: A and B of rank 5 have 80 numbers, what they change 64; rank 3 would have fewer"
    )


@pytest.mark.parametrize("rule", [Rule(name="nothing"), Skip(module="nothing"), Train(kind="conv")])
def test_the_error_of_a_rule_that_matches_nothing_tells_of_optional(rule):
    with pytest.raises(PolicyError, match="With optional=True it may match nothing"):
        plan(transformer(1, 8), Policy(rule, Rule(rank=2)))
    assert plan(transformer(1, 8), Policy(replace(rule, optional=True), Rule(rank=2))).adapted
