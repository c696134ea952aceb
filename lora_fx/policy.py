"""Policies: an ordered list of rules and a few options. A policy never touches a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from lora_fx.budgets import parse_budget
from lora_fx.errors import PolicyError
from lora_fx.peft_config import policy_data
from lora_fx.rules import (
    AnyRule,
    Filters,
    Rule,
    Skip,
    Train,
    bad_value,
    choices,
    refuse_unknown,
    rule_from_data,
    rule_to_data,
)

POLICY_VERSION = 1

_DEFAULTS: Mapping[str, Any] = {"budget": None, "bias": "none", "norm_stats": "freeze"}

__all__ = ["AnyRule", "Filters", "Policy", "Rule", "Skip", "Train", "choices"]


class Policy:
    """An ordered list of rules: the first that matches a site decides it.

    ``budget`` limits what is trained, by lower ranks: a whole number of parameters (``1_000_000``), a
    share of the model's as a float in (0, 1) (``0.01``), or the size of the adapter as text (``"35MB"``;
    B, kB, MB, GB, KiB, MiB, GiB). ``bias`` says which biases are trained: ``"none"``,
    ``"all"``, or ``"lora_only"`` (those beside an adapted weight); ``norm_stats`` says whether a
    normalisation under frozen parameters uses (``"freeze"``) or moves (``"train"``) its running
    statistics in train mode.

    Raises:
        PolicyError: no rules, something that is no rule, or an unknown option.
    """

    def __init__(
        self,
        *rules: AnyRule,
        budget: int | float | str | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        norm_stats: Literal["freeze", "train"] = "freeze",
    ) -> None:
        unknown = [rule for rule in rules if not isinstance(rule, (Rule, Skip, Train))]  # pyright: ignore[reportUnnecessaryIsInstance]
        if not rules or unknown:
            raise bad_value("rules", "one or more of Rule, Skip, Train", unknown or "none")
        if bias not in ("none", "all", "lora_only"):
            raise bad_value("bias", "none, all or lora_only", bias)
        if norm_stats not in ("freeze", "train"):
            raise bad_value("norm_stats", "freeze or train", norm_stats)
        if budget is not None:
            parse_budget(budget)
        self.rules = rules
        self.budget = budget
        self.bias: Literal["none", "all", "lora_only"] = bias
        self.norm_stats: Literal["freeze", "train"] = norm_stats

    def __repr__(self) -> str:
        """Show the rules as their user wrote them."""
        options = [f"{key}={value!r}" for key, value in self._options().items()]
        return f"Policy({', '.join([rule.describe() for rule in self.rules] + options)})"

    def __eq__(self, other: object) -> bool:
        """Say whether the rules and all options are equal."""
        if not isinstance(other, Policy):
            return NotImplemented
        return (self.rules, self._options()) == (other.rules, other._options())

    def __hash__(self) -> int:
        """Hash by the rules and all options."""
        return hash((self.rules, tuple(self._options().items())))

    def _options(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        options = {"budget": self.budget, "bias": self.bias, "norm_stats": self.norm_stats}
        return {key: value for key, value in options.items() if value != _DEFAULTS[key]}

    def to_json(self) -> str:
        """Return the policy as JSON text, one rule a line; ``Policy.from_json`` reads it back equal.

        Raises:
            PolicyError: a rule has a ``where``, which JSON cannot hold.
        """
        rules = ",\n".join("    " + json.dumps(rule_to_data(rule)) for rule in self.rules)
        options = "".join(f",\n  {json.dumps(k)}: {json.dumps(v)}" for k, v in self._options().items())
        return f'{{\n  "policy_version": {POLICY_VERSION},\n  "rules": [\n{rules}\n  ]{options}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read what ``to_json`` wrote, or what somebody wrote by hand: only ``rules`` must be there.

        Raises:
            PolicyError: the text is no JSON, or not a policy; unknown keys are named.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise bad_value("a policy's JSON", "valid JSON", str(error)) from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Policy:
        """Read a policy from plain data, as JSON holds it."""
        if isinstance(data, Mapping) and "plan_version" in data:
            raise PolicyError(
                "a policy",
                expected='an object with "rules": [...]',
                got="a plan",
                advice="Read it with Plan.from_json, and pass it to inject in the policy's place.",
            )
        if not isinstance(data, Mapping) or not isinstance(data.get("rules"), list):
            raise bad_value("a policy", 'an object with "rules": [...]', data)
        refuse_unknown("a policy", data, ("policy_version", "rules", *_DEFAULTS))
        version = data.get("policy_version", POLICY_VERSION)
        if version != POLICY_VERSION:
            raise bad_value("policy_version", str(POLICY_VERSION), version)
        options = {key: data[key] for key in _DEFAULTS if key in data}
        return cls(*map(rule_from_data, data["rules"]), **options)

    @classmethod
    def from_peft(cls, config: object) -> Policy:
        """Read a peft ``LoraConfig``, or the contents of its ``adapter_config.json``.

        See ``peft_config`` for what is read and what is refused by name; peft is not imported.

        Raises:
            PeftFormatError: the configuration holds what lora_fx cannot do.
        """
        return cls.from_data(policy_data(config))

    @classmethod
    def default(cls, rank: int = 16) -> Policy:
        """Adapt every linear and convolution but the stem, the head, routers and embeddings."""
        return cls(
            Skip(role=("stem", "head", "router", "embedding"), optional=True),
            Skip(kind="embedding", optional=True),
            Rule(rank=rank),
        )

    @classmethod
    def paper(cls, rank: int = 8) -> Policy:
        """Adapt query and value of every attention (Hu et al. 2021, section 4.2 and table 5)."""
        return cls(Rule(role="qv", rank=rank))

    @classmethod
    def attention(cls, rank: int = 8) -> Policy:
        """Adapt query, key, value and output of every attention (Hu et al. 2021, table 5)."""
        return cls(Rule(role="qkvo", rank=rank))

    @classmethod
    def convs(cls, rank: int = 8) -> Policy:
        """Adapt every convolution, transposed ones too (LoCon)."""
        return cls(Rule(kind="conv*", rank=rank))


def checked_policy(given: object) -> Policy:
    """Return what was given as a policy, if it is one.

    Raises:
        PolicyError: it is not; how to make one of it is said.
    """
    if isinstance(given, Policy):
        return given
    raise PolicyError(
        "the policy",
        expected="a Policy, or for inject a Plan",
        got=given.describe() if isinstance(given, Filters) else repr(given),
        advice="Wrap rules in Policy(...); Policy.from_peft reads peft's configurations.",
    )
