"""The arithmetic of budgets by itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.budgets import Budget, fit_ranks, parse_budget


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (5, Budget("parameters", 5)),
        (0.25, Budget("share", 0.25)),
        ("7B", Budget("bytes", 7)),
        ("1.5 kB", Budget("bytes", 1500)),
        ("3GB", Budget("bytes", 3_000_000_000)),
        ("3MiB", Budget("bytes", 3 * 2**20)),
        ("35MB", Budget("bytes", 35_000_000)),
        ("2 gib", Budget("bytes", 2 * 2**30)),
        (" 1MiB ", Budget("bytes", 2**20)),
    ],
)
def test_what_can_be_written(value, budget):
    assert parse_budget(value) == budget


def test_a_share_is_of_the_base_model_and_rounded_down():
    assert parse_budget(0.001).limit(12_345) == 12
    assert parse_budget(100).limit(12_345) == 100
    assert parse_budget("1.5kB").limit(12_345) == 1500


def test_small_ranks_keep_1_and_the_others_pay_for_it():
    """A common factor of 40 / 72 gives 0.56 to the first: it keeps 1, and 39 / 71 is the others' factor."""
    fit = fit_ranks([1, 8, 63], [1, 1, 1], 40)
    assert fit.factor == 39 / 71
    assert fit.floored == 1 + 4 + 34
    assert fit.ranks == (1, 5, 34)
    assert fit.spent == 40


def test_what_flooring_left_goes_round_in_order():
    assert fit_ranks([4, 4, 4], [10, 1, 1], 25).ranks == (2, 3, 2)  # 1 is left, too little for the first
    assert fit_ranks([9, 9], [3, 3], 30).ranks == (5, 5)
    assert fit_ranks([9, 9], [3, 3], 33).ranks == (6, 5)


def test_without_room_for_all_rank_1_goes_in_order():
    fit = fit_ranks([8, 8, 8], [5, 9, 4], 10)
    assert (fit.ranks, fit.spent) == ((1, 0, 1), 9)


slots = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 500)), min_size=1, max_size=10)


@given(slots, st.integers(1, 50_000))
def test_the_stated_rule(pairs, available):
    wanted, costs = zip(*pairs, strict=True)
    fit = fit_ranks(wanted, costs, available)
    assert all(rank <= most for rank, most in zip(fit.ranks, wanted, strict=True))
    assert fit.spent == sum(r * c for r, c in zip(fit.ranks, costs, strict=True))
    if sum(w * c for w, c in pairs) <= available:
        assert fit.ranks == wanted
    elif sum(costs) <= available:
        scaled = [max(1, math.floor(fit.factor * w)) for w in wanted]
        assert fit.floored == sum(r * c for r, c in zip(scaled, costs, strict=True)) <= available
        assert all(rank >= least for rank, least in zip(fit.ranks, scaled, strict=True))
        # Flooring the others is all that the factor leaves unused.
        assert sum(max(1.0, fit.factor * w) * c for w, c in pairs) == pytest.approx(available)
    if sum(costs) <= available:
        idle = [c for r, w, c in zip(fit.ranks, wanted, costs, strict=True) if r < w]
        assert all(fit.spent + cost > available for cost in idle)
    else:
        assert max(fit.ranks) <= 1
    assert fit.spent <= available
