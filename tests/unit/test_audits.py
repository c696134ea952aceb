"""Audits and tables over plans: what they say must be what was decided."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import pytest
from rich.console import Console

from lora_fx.audits import audit_plan
from lora_fx.matrix import Rows
from lora_fx.plans import Plan
from lora_fx.policy import Policy, Rule, Skip, Train
from lora_fx.sites import Use
from lora_fx.tables import bytes_text, rows_text, trained_text
from tests.unit.site_builders import WEIGHT, fused, plan, site, transformer


def sample():
    sites = [
        site("embed.weight", (100, 8), kind="embedding", roles={"embedding": None}),
        fused("blocks.0.qkv.weight"),
        site("blocks.0.down.weight", (8, 32), roles={"down": None}, uses=(WEIGHT,)),
        site("head.weight", (10, 8), roles={"head": None}, names=("head.weight", "lm.weight")),
    ]
    policy = Policy(Train(role="head"), Skip(role="embedding"), Rule(role="qv", rank=2), Rule(rank=4))
    return plan(sites, policy, parameters={"head.bias": ((10,), "float32")}, base_parameters=1_500)


def test_totals_add_up():
    totals = audit_plan(sample()).totals
    assert (totals.sites, totals.adapted, totals.trained, totals.skipped, totals.extras) == (4, 2, 1, 1, 1)
    assert totals.sites == totals.adapted + totals.trained + totals.skipped
    assert totals.forms == {"branch": 1, "weight": 1}
    assert totals.branch_share == 0.5
    low = 2 * 2 * (8 + 8) + 4 * (8 + 8) + 4 * (32 + 8)  # q and v at 2, the rest of the weight at 4, down at 4
    assert totals.parameters == low + 80 + 10
    assert totals.share == totals.parameters / 1_500
    assert totals.adapter_bytes == 4 * totals.parameters


def test_rows_hold_every_weight_and_every_trained_parameter():
    made = sample()
    audit = audit_plan(made)
    assert [row.name for row in audit.rows] == [d.name for d in made.decisions] + ["head.bias"]
    assert sum(row.parameters for row in audit.rows) == made.parameters == audit.totals.parameters
    qkv = audit.rows[1]
    assert qkv.ranks == {"q": 2, "v": 2, "k": 4}
    assert qkv.roles == {"q": ((0, 8),), "k": ((8, 16),), "v": ((16, 24),)}
    assert (qkv.kind, qkv.shape, qkv.reason, qkv.form) == ("linear", (24, 8), "rule", "branch")


def test_deltas_are_found_by_any_name_of_a_tied_weight():
    audit = audit_plan(sample(), {"lm.weight": 0.25, "blocks.0.qkv.weight": 0.5}, source="model")
    assert [row.delta for row in audit.rows] == [None, 0.5, None, 0.25, None]
    assert audit.source == "model"


def test_one_other_parameter_is_counted_in_the_singular():
    made = sample()
    assert "1 other parameter trained" in " ".join(str(audit_plan(made)).split())
    none = audit_plan(plan([site("a.weight")], Policy(Skip())))
    assert "0 other parameters trained" in " ".join(str(none).split())


def test_json_holds_the_table():
    audit = audit_plan(sample(), {"blocks.0.qkv.weight": 0.5})
    data = json.loads(audit.to_json())
    assert data["totals"]["parameters"] == audit.totals.parameters
    assert [row["name"] for row in data["rows"]] == [row.name for row in audit.rows]
    assert data["rows"][1]["roles"]["k"] == [[8, 16]]
    assert data["rows"][1]["delta"] == 0.5
    assert data["rows"][3]["action"] == "train"


def test_a_model_without_parameters_to_adapt_has_no_share():
    audit = audit_plan(plan([site("a.weight")], Policy(Skip()), base_parameters=0))
    assert (audit.totals.share, audit.totals.branch_share, audit.totals.adapted) == (None, 0.0, 0)
    assert "skip-rule" in str(audit)


def test_the_tables_say_what_was_decided():
    made = sample()
    for text in (str(made), str(audit_plan(made))):
        flat = " ".join(text.split())
        assert "embed.weight" in flat
        assert "skip-rule" in flat
        assert "q:2 v:2 k:4" in flat
        assert "Rule(role='qv', rank=2)" in flat
        assert "read outside its module" in " ".join(flat.split())
        assert "of 1,500 parameters trained" in flat


NAMES = (
    "gpt_neox.layers.{0-1}.attention.query_key_value.weight",
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
)
INTERLEAVED: dict[str, Rows | None] = {
    role: tuple((at + start, at + start + 2) for at in range(0, 24, 6)) for start, role in enumerate("qkv")
}


def wide() -> tuple[Plan, Plan]:
    """Two plans with long names, many rows and long reasons."""
    qkv = "gpt_neox.layers.{}.attention.query_key_value.weight"
    sites = [site(qkv.format(i), (24, 8), roles=INTERLEAVED) for i in range(2)]
    sites.append(site(NAMES[1], roles={"up": None}))
    return plan(sites, Policy(Rule(role="qv", rank=40), Rule(role="up", rank=2, dora=True))), plan(
        sites, Policy(Rule(role="k", rank=1))
    )


def shown_at(width: int, record: Any) -> list[str]:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(record)
    return buffer.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 160, 300])
def test_tables_fit_name_weights_whole_and_cut_nothing_off(width: int) -> None:
    made, other = wide()
    for record, said in (
        (made, ("q[0:2,.. 4 ranges, 8 rows]", "rank 40 capped at 8", "no branch for it exists")),
        (audit_plan(made), ("v[2:4,.. 4 ranges, 8 rows]", "rank 40 capped at 8", "no branch for it exists")),
        (made.diff(other), ("adapt, rank 2, form weight, dora True", "skip, reason no-rule")),
    ):
        lines = shown_at(width, record)
        assert all(len(line) <= width for line in lines)
        text = " ".join(" ".join(lines).split())
        assert all(name in text for name in NAMES)
        # Word by word: the lines of cells side by side alternate.
        assert {word for words in said for word in words.split()} <= set(text.split())


def test_a_name_that_is_wider_than_the_terminal_is_broken_at_its_dots() -> None:
    lines = shown_at(30, wide()[0])
    assert all(len(line) <= 30 for line in lines)
    start = lines.index("gpt_neox.layers.{0-1}.")
    assert [line.rstrip() for line in lines[start + 1 : start + 3]] == [
        f"    {part}" for part in ("attention.query_key_value.", "weight")
    ]


def test_text_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = wide()
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(made).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, str(made).splitlines())) > 160


def test_equal_layers_share_a_line_and_different_ones_do_not():
    sites = [s for s in transformer(12, 8) if "query" in s.name]
    one = str(plan(sites, Policy(Rule(rank=2))))
    assert "layers.{0-11}.attention.query.weight" in one
    two = str(plan(sites, Policy(Rule(name="layers.3.*", rank=4), Rule(rank=2))))
    assert "layers.{0-2,4-11}.attention.query.weight" in two
    assert "layers.3.attention.query.weight" in two


def test_equal_layers_of_an_audit_share_a_line_with_the_range_of_their_deltas(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    made = plan([s for s in transformer(4, 8) if "query" in s.name], Policy(Rule(rank=2)))
    names = [d.name for d in made.decisions]
    [line] = [
        line
        for line in str(audit_plan(made, {name: 0.1 * i for i, name in enumerate(names, 1)})).splitlines()
        if "query" in line
    ]
    assert "layers.{0-3}.attention.query.weight" in line
    assert "0.1 to 0.4" in line
    assert "0.1 to" not in str(audit_plan(made, dict.fromkeys(names, 0.1)))
    assert len(audit_plan(made).rows) == 4


def test_a_reason_that_several_lines_share_is_told_once():
    sites = transformer(2, 8)
    made = plan(sites, Policy(Rule(rank=2, dora=True)))
    reason = made.adapted[0].form_reason
    for record in (made, audit_plan(made)):
        flat = " ".join("\n".join(shown_at(300, record)).split())
        assert flat.count(reason) == 1
        assert f"[f1] {reason}" in flat
        assert flat.count("weight form [f1]") > 1


def test_texts():
    assert rows_text(((0, 2), (4, 6))) == "0:2,4:6"
    assert rows_text(tuple((i, i + 2) for i in range(0, 12, 4))) == "0:2,.. 3 ranges, 6 rows"
    assert [bytes_text(n) for n in (999, 37_748_736, 350_000_000_000)] == ["999 B", "37.7 MB", "350.0 GB"]
    assert trained_text(4_718_592, 175_255_800_000).endswith("(0.0027%)")
    assert trained_text(5, 0) == "5 parameters trained"
    assert trained_text(0, 10).endswith("(0.00%)")
    assert trained_text(5, 10).endswith("(50.00%)")


def test_reasons_that_hold_a_weights_own_name_share_a_line():
    def own(name: str, i: int) -> Use:
        return Use("linear", "home", "linear", why=f"linear with {name} in the forward of 'a.{i}' (Gate)")

    sites = [site(f"a.{i}.gate.weight", uses=(own(f"a.{i}.gate.weight", i),)) for i in (0, 1, 2, 4)]
    made = plan(sites, Policy(Rule(rank=2)))
    for record in (made, audit_plan(made)):
        [line] = [line for line in shown_at(300, record) if "weight form" in line]
        assert line.startswith("a.{0-2,4}.gate.weight")
        assert "linear with a.{0-2,4}.gate.weight in the forward of 'a.{0-2,4}' (Gate)" in line
    assert made.decisions[3].form_reason == "linear with a.4.gate.weight in the forward of 'a.4' (Gate)"


@pytest.mark.parametrize(
    ("why", "lines"),
    [("in the forward of '{}' (Gate)", 1), ("at {} of it", 2), ("scaled by 0.{}", 2)],
)
def test_only_numbers_of_names_are_drawn_together(why: str, lines: int):
    sites = [site(f"{i}.weight", uses=(Use("linear", "", "linear", why=why.format(i)),)) for i in (5, 6)]
    shown = shown_at(300, plan(sites, Policy(Rule(rank=2))))
    assert sum("weight form" in line for line in shown) == lines
    assert any("in the forward of '{5-6}'" in line for line in shown) is (lines == 1)


def named(line: str) -> list[str]:
    """Return the names that the pattern at the start of a line stands for."""
    parts = []
    for part in line.split(maxsplit=1)[0].split("."):
        ranges = [r.split("-") for r in part.strip("{}").split(",")] if part.startswith("{") else None
        numbers = [] if ranges is None else [n for r in ranges for n in range(int(r[0]), int(r[-1]) + 1)]
        parts.append([part] if ranges is None else list(map(str, numbers)))
    return [".".join(each) for each in itertools.product(*parts)]


@pytest.mark.parametrize(
    ("reached", "lines"),
    [
        ({0: "0", 3: "01", 4: "0"}, 4),
        (dict.fromkeys(range(5), "01"), 2),
        ({0: "0", 1: "1", 2: "01", 3: "0", 4: "12"}, 8),
    ],
)
def test_a_line_names_the_weights_that_it_counts(reached: dict[int, str], lines: int):
    use = Use("linear", "home", "linear", branch=True)
    sites = [
        site(
            f"{layer}.e.{expert}.weight",
            uses=(use,) if str(expert) in experts else (),
            twin=None if str(expert) in experts else f"{layer}.e.{experts[0]}.weight",
        )
        for layer, experts in reached.items()
        for expert in range(3)
    ]
    made = plan(sites, Policy(Rule(rank=2)))
    for record in (made, audit_plan(made)):
        shown = [line for line in shown_at(300, record) if ".e." in line.split("twin")[0]]
        assert len(shown) == lines
        counted = [(named(line), int(line.split()[1])) for line in shown]
        assert all(len(names) == n for names, n in counted)
        assert sorted(n for names, _ in counted for n in names) == sorted(s.name for s in sites)
        for line, (_, n) in zip(shown, counted, strict=True):
            if " twin " in line:
                assert len(named(line.rpartition("as its twin ")[2])) <= n
