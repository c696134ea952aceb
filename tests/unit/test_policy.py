"""Rules and policies: filters, checks of values, and JSON that people can write."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.errors import PolicyError
from lora_fx.policy import Policy, Rule, Skip, Train
from lora_fx.rules import COMPUTES, INITS
from lora_fx.sites import ROLES
from tests.unit.site_builders import attention, site

# --- filters ---

SITE = site(
    "model.layers.3.self_attn.q_proj.weight",
    names=("model.layers.3.self_attn.q_proj.weight", "tied.proj.weight"),
    roles={"q": None},
    depth=0.25,
    block=(3, 12),
)


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ({}, True),
        ({"name": "*.q_proj.weight"}, True),
        ({"name": "q_proj.weight"}, False),
        ({"name": "tied.*"}, True),
        ({"name": "model.layers.?.*"}, True),
        ({"name": r"re:.*layers\.[0-4]\..*"}, True),
        ({"name": "re:layers"}, False),  # the whole name, not a part of it
        ({"name": ("*.k_proj.*", "*.q_proj.*")}, True),
        ({"module": "q_proj"}, True),
        ({"module": "self_attn.q_proj"}, True),
        ({"module": "proj"}, True),  # by its tied name
        ({"module": "j"}, False),
        ({"module": "self_attn"}, False),
        ({"module": "Linear"}, True),
        ({"kind": "linear"}, True),
        ({"kind": "lin*"}, True),
        ({"kind": "conv"}, False),
        ({"role": "q"}, True),
        ({"role": "kv"}, False),
        ({"role": ("up", "qk")}, True),
        ({"depth": (0.0, 0.25)}, True),
        ({"depth": (0.5, 1.0)}, False),
        ({"depth": 4}, True),
        ({"depth": 3}, False),
        ({"depth": -9}, True),
        ({"depth": -8}, False),
        ({"where": lambda s: s.shape == (8, 8)}, True),
        ({"module": "q_proj", "role": "k"}, False),
    ],
)
def test_filters(filters, matches):
    assert Rule(**filters).matches(SITE) is matches
    assert Skip(**filters).matches(SITE) is matches
    assert Train(**filters).matches(SITE) is matches


def test_depth_of_a_site_without_one_matches_nothing():
    bare = site("a.weight")
    assert not Rule(depth=(0.0, 1.0)).matches(bare)
    assert not Rule(depth=-1).matches(bare)


def test_parameters_that_are_no_sites_are_matched_by_name_and_module_alone():
    assert Train(name="*.norm.*").matches_parameter("a.norm.weight")
    assert Train(module="norm").matches_parameter("a.norm.weight")
    assert Train(module="LayerNorm").matches_parameter("a.norm.weight", "LayerNorm")
    assert Train().matches_parameter("x")
    assert not Train(module="norm", role="head").matches_parameter("a.norm.weight")
    assert not Train(kind="linear").matches_parameter("a.norm.weight")


# --- values ---


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": 1.5},
        {"rank": True},
        {"rank": "8"},
        {"alpha": 0},
        {"alpha": -1.0},
        {"alpha": math.inf},
        {"alpha": math.nan},
        {"alpha": "16"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": "0.1"},
        {"init": "zeros"},
        {"compute": "fast"},
        {"compute": None},
        {"dora": 1},
        {"rslora": "yes"},
        {"name": ""},
        {"name": ()},
        {"name": 3},
        {"name": ("a", 3)},
        {"name": "re:("},
        {"role": ()},
        {"role": "quv"},
        {"role": "query"},
        {"depth": 0},
        {"depth": True},
        {"depth": (0.5,)},
        {"depth": (0.9, 0.1)},
        {"depth": (0.0, 2.0)},
        {"depth": ("a", "b")},
        {"where": "q"},
    ],
)
def test_values_that_cannot_be_are_refused(values):
    with pytest.raises(PolicyError, match=next(iter(values))):
        Rule(**values)


@pytest.mark.parametrize(
    ("word", "value", "term"),
    [
        ("r", 8, "rank"),
        ("lora_alpha", 16, "alpha"),
        ("lora_dropout", 0.1, "dropout"),
        ("target_modules", ["q"], "module"),
        ("use_rslora", True, "rslora"),
        ("use_dora", True, "dora"),
    ],
)
def test_the_words_of_peft_are_translated(word, value, term):
    with pytest.raises(PolicyError, match=rf"keys of .*{term}.*got '{word}'. peft's {word} is {term}= here"):
        Rule(**{word: value})


def test_what_skip_has_no_word_for_is_not_translated():
    with pytest.raises(PolicyError, match=r"got 'r'. Remove it"):
        Skip(r=8)


def test_an_unknown_filter_names_the_valid_ones():
    with pytest.raises(
        PolicyError, match=r"keys of name, module, kind.*rank.*got 'modul'. Did you mean 'module'"
    ):
        Rule(modul="q_proj")
    with pytest.raises(PolicyError, match=r"Skip: expected keys of name, module, .*optional; got 'rank'"):
        Skip(rank=3)


def test_rules_are_copied_and_pickled():
    rule = Rule(role="qv", rank=4)
    assert copy.deepcopy(rule) == pickle.loads(pickle.dumps(rule)) == replace(rule, rank=4) == rule


@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        (Rule(rank=8), 1.0),
        (Rule(rank=8, alpha=16), 2.0),
        (Rule(rank=4, alpha=16, rslora=True), 8.0),
        (Rule(rank=16, rslora=True), 4.0),
    ],
)
def test_scale(rule, scale):
    assert rule.scale == scale


def test_lists_are_kept_as_tuples():
    rule = Rule(name=["a", "b"], depth=[0.0, 0.5])  # type: ignore[arg-type]
    assert rule == Rule(name=("a", "b"), depth=(0.0, 0.5))
    assert hash(rule) == hash(Rule(name=("a", "b"), depth=(0.0, 0.5)))


@pytest.mark.parametrize("rules", [(), ("q",), (Rule(), None)])
def test_a_policy_is_made_of_rules(rules):
    with pytest.raises(PolicyError, match="rules"):
        Policy(*rules)


@pytest.mark.parametrize(
    "options", [{"bias": "some"}, {"norm_stats": "move"}, {"budget": 0}, {"budget": "9"}]
)
def test_options_are_checked(options):
    with pytest.raises(PolicyError, match=next(iter(options))):
        Policy(Rule(), **options)


def test_presets_read_like_the_literature():
    assert Policy.paper(4) == Policy(Rule(role="qv", rank=4))
    assert Policy.attention(4).rules[0].roles == ("q", "k", "v", "o")
    sites = [
        *attention("a", 8),
        site("c.weight", (8, 3, 3, 3), kind="conv"),
        site("t.weight", kind="conv_transpose"),
    ]
    assert [s.name for s in sites if Policy.convs().rules[0].matches(s)] == ["c.weight", "t.weight"]
    default = Policy.default(4)
    taken = [next(r for r in default.rules if r.matches(s)) for s in sites]
    assert set(taken) == {Rule(rank=4)}
    for role in ("stem", "head", "router", "embedding"):
        assert isinstance(
            next(r for r in default.rules if r.matches(site("x.weight", roles={role: None}))), Skip
        )


def test_a_policy_shows_as_it_was_written():
    policy = Policy(Skip(role="head", optional=True), Rule(role="qv", rank=4), budget="35MB", bias="all")
    text = "Policy(Skip(role='head', optional=True), Rule(role='qv', rank=4), budget='35MB', bias='all')"
    assert repr(policy) == text
    assert eval(text) == policy


# --- JSON ---

texts = st.text("abq*._", min_size=1, max_size=6)
names = st.one_of(st.none(), texts, st.lists(texts, min_size=1, max_size=3).map(tuple))
roles = st.one_of(
    st.none(), st.just("qv"), st.lists(st.sampled_from(ROLES), min_size=1, max_size=3).map(tuple)
)
shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair)))
filters = {
    "name": names,
    "module": names,
    "kind": names,
    "role": roles,
    "depth": st.one_of(st.none(), shares, st.integers(-9, 9).filter(bool)),
    "optional": st.booleans(),
}
adapters = filters | {
    "rank": st.integers(1, 512),
    "alpha": st.one_of(st.none(), st.integers(1, 64), st.floats(1e-3, 1e3)),
    "dropout": st.floats(0, 0.99),
    "rslora": st.booleans(),
    "dora": st.booleans(),
    "init": st.sampled_from(INITS),
    "compute": st.sampled_from(COMPUTES),
}
policies = st.builds(
    lambda rules, options: Policy(*rules, **options),
    st.lists(
        st.one_of(st.builds(Rule, **adapters), st.builds(Skip, **filters), st.builds(Train, **filters)),
        min_size=1,
        max_size=4,
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "budget": st.one_of(
                st.integers(1, 10**9), st.floats(0.001, 0.999), st.integers(1, 99).map("{}MB".format)
            ),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "norm_stats": st.sampled_from(["freeze", "train"]),
        },
    ),
)


@given(policies)
def test_policies_survive_json(policy):
    text = policy.to_json()
    read = Policy.from_json(text)
    assert read == policy
    assert hash(read) == hash(policy)
    assert read.to_json() == text
    assert json.loads(text)["policy_version"] == 1


def test_json_written_by_hand():
    policy = Policy.from_json(
        """{
          "rules": [
            {"Skip": {"role": ["stem", "head"], "optional": true}},
            {"Rule": {"role": "qv", "rank": 8, "depth": [0.5, 1.0]}},
            {"Train": {"module": "classifier"}}
          ],
          "budget": "35MB"
        }"""
    )
    assert policy == Policy(
        Skip(role=("stem", "head"), optional=True),
        Rule(role="qv", rank=8, depth=(0.5, 1.0)),
        Train(module="classifier"),
        budget="35MB",
    )


def test_json_is_one_rule_a_line():
    lines = Policy(Rule(role="qv"), Skip(name="a")).to_json().splitlines()
    assert '    {"Rule": {"role": "qv"}},' in lines
    assert '    {"Skip": {"name": "a"}}' in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "valid JSON"),
        ("[]", '"rules"'),
        ('{"rules": {}}', '"rules"'),
        ('{"rules": []}', "one or more"),
        ('{"rules": [{"Rule": {}}], "bugdet": 3}', "Did you mean 'budget'"),
        ('{"rules": [{"Rule": {}}], "policy_version": 9}', "policy_version"),
        ('{"rules": [{"Rules": {}}]}', "Rule or Skip or Train"),
        ('{"rules": [{"Rule": {}, "Skip": {}}]}', "one key"),
        ('{"rules": ["Rule"]}', "one key"),
        ('{"rules": [{"Rule": 3}]}', "object of filters"),
        ('{"rules": [{"Rule": {"rnak": 3}}]}', "Did you mean 'rank'"),
        ('{"rules": [{"Skip": {"rank": 3}}]}', "keys of name, module"),
        ('{"rules": [{"Rule": {"where": "x"}}]}', "'where'"),
        ('{"rules": [{"Rule": {"rank": "3"}}]}', "rank"),
        ('{"rules": [{"Rule": {"role": {"q": 1}}}]}', "role"),
        ('{"rules": [{"Rule": {}}], "bias": ["all"]}', "bias"),
        ('{"rules": [{"Rule": {}}], "budget": {}}', "budget"),
    ],
)
def test_json_that_is_no_policy_says_what_is_wrong(text, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_json(text)


def test_a_predicate_cannot_be_written():
    with pytest.raises(PolicyError, match="where"):
        Policy(Rule(where=lambda s: True)).to_json()
