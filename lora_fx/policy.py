"""Policies: what a user asks for, as plain data. A policy never touches a module."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from lora_fx.budgets import parse_budget
from lora_fx.errors import PolicyError
from lora_fx.sites import ROLES, Site

Names = str | tuple[str, ...] | None
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")


@dataclass(frozen=True)
class Filters:
    """Which sites a rule is about: all given filters must hold; a tuple is a choice.

    ``name`` is a glob over the weight's qualified name (``*`` crosses dots) or ``re:<regex>``;
    ``module`` matches the owner's path by suffix (``"q_proj"``) or the owner's class; ``kind`` is a
    kind of the registry, or a glob over them; ``role`` is ``"q"``, ``"qv"``, ``("up", "down")``...;
    ``depth`` is a (low, high) share of the model's depth, or -n for the last n blocks, n for the
    first n; ``where`` is any predicate over a Site. A rule that matches nothing is an error, unless
    it is ``optional``.
    """

    name: Names = None
    module: Names = None
    kind: Names = None
    role: Names = None
    depth: tuple[float, float] | int | None = None
    where: Callable[[Site], bool] | None = None
    _: KW_ONLY
    optional: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown role at once."""
        for role in self.roles:
            if role not in ROLES:
                raise PolicyError(
                    f"{type(self).__name__}(role={self.role!r})",
                    expected="roles of " + ", ".join(ROLES) + " (letters of qkvo may be joined)",
                    got=repr(role),
                    advice="Name a role of that list, or use name=, module= or kind=.",
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles asked for, with ``"qv"`` read as ``("q", "v")``."""
        found: list[str] = []
        for item in choices(self.role):
            found.extend(item if item and set(item) <= set("qkvo") else [item])
        return tuple(dict.fromkeys(found))

    @property
    def needs_trace(self) -> bool:
        """Whether the filters ask for what only a recorded run can tell."""
        return bool(self.roles) or self.depth is not None

    def matches(self, site: Site) -> bool:
        """Say whether every given filter holds for this site."""
        return (
            self._name_matches(site)
            and self._module_matches(site)
            and (self.kind is None or any(fnmatch.fnmatchcase(site.kind, k) for k in choices(self.kind)))
            and (not self.roles or any(role in site.roles for role in self.roles))
            and self._depth_matches(site)
            and (self.where is None or bool(self.where(site)))
        )

    def matches_parameter(self, name: str, owner_class: str = "") -> bool:
        """Say whether the filters hold for a parameter that is no site: by name and module alone."""
        if self.kind is not None or self.roles or self.depth is not None or self.where is not None:
            return False
        owner = name.rpartition(".")[0]
        return (self.name is None or any(matches_name(name, p) for p in choices(self.name))) and (
            self.module is None
            or any(p == owner_class or matches_path(owner, p) for p in choices(self.module))
        )

    def _name_matches(self, site: Site) -> bool:
        if self.name is None:
            return True
        names = site.names or (site.name,)
        return any(matches_name(name, pattern) for pattern in choices(self.name) for name in names)

    def _module_matches(self, site: Site) -> bool:
        if self.module is None:
            return True
        owners = {name.rpartition(".")[0] for name in (site.name, *site.names)}
        return any(
            pattern == site.module_class or any(matches_path(owner, pattern) for owner in owners)
            for pattern in choices(self.module)
        )

    def _depth_matches(self, site: Site) -> bool:
        if self.depth is None:
            return True
        if isinstance(self.depth, tuple):
            low, high = self.depth
            return site.depth is not None and low <= site.depth <= high
        if site.block is None:
            return False
        index, total = site.block
        return index < self.depth if self.depth >= 0 else index >= total + self.depth

    def describe(self) -> str:
        """Return the rule as its user wrote it, defaults left out."""
        given = [
            f"{name}={_shown(value)}"
            for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class Rule(Filters):
    """Adapt the sites that match, with ``W = W0 + scale * B @ A``.

    ``scale`` is ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``, Kalajdzievski 2023);
    ``alpha`` is by default the rank. ``dropout`` acts on the branch's input; ``dora`` trains the
    rows' magnitudes too (Liu et al. 2024); ``init`` says how A and B start.

    Raises:
        PolicyError: a rank below 1, a dropout outside [0, 1), an unknown initialisation.
    """

    _: KW_ONLY
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        # A user's values may be of any type, whatever the annotations say.
        rank: Any = self.rank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise _bad("rank", "a whole number of at least 1", rank)
        if not 0.0 <= self.dropout < 1.0:
            raise _bad("dropout", "a number in [0, 1)", self.dropout)
        if self.init not in INITS:
            raise _bad("init", " or ".join(INITS), self.init)

    @property
    def scale(self) -> float:
        """What ``B @ A`` is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class Skip(Filters):
    """Leave the sites that match as they are."""


@dataclass(frozen=True)
class Train(Filters):
    """Train the whole parameter of the sites that match (a fresh head), biases beside them too."""


AnyRule = Rule | Skip | Train


class Policy:
    """An ordered list of rules: the first that matches a site decides it.

    ``budget`` limits what is trained; ``bias`` says which biases are trained: ``"none"``,
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
            raise _bad("rules", "one or more of Rule, Skip, Train", unknown or "none")
        if bias not in ("none", "all", "lora_only"):
            raise _bad("bias", "none, all or lora_only", bias)
        if norm_stats not in ("freeze", "train"):
            raise _bad("norm_stats", "freeze or train", norm_stats)
        if budget is not None:
            parse_budget(budget)
        self.rules = rules
        self.budget = budget
        self.bias = bias
        self.norm_stats: Literal["freeze", "train"] = norm_stats

    def __repr__(self) -> str:
        """Show the rules as their user wrote them."""
        return f"Policy({', '.join(rule.describe() for rule in self.rules)})"

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


def choices(value: Names | Iterable[str]) -> tuple[str, ...]:
    """Read a filter's value, one or several, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def matches_name(name: str, pattern: str) -> bool:
    """Say whether a qualified name matches a glob (``*`` crosses dots) or a ``re:`` expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def matches_path(path: str, pattern: str) -> bool:
    """Say whether a module's path is the pattern or ends with it, whole components only."""
    return path == pattern or path.endswith("." + pattern)


def _shown(value: object) -> str:
    return getattr(value, "__name__", "<predicate>") if callable(value) else repr(value)


def _bad(what: str, expected: str, got: object) -> PolicyError:
    return PolicyError(what, expected=expected, got=repr(got), advice="Correct the policy.")
