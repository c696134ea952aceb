"""Rules: which weights, and what is done with them, as plain data that JSON can hold."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, Self

from lora_fx.errors import PolicyError
from lora_fx.sites import ROLES, Site

Names = str | tuple[str, ...] | None
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
Compute = Literal["auto", "branch", "weight"]
COMPUTES = ("auto", "branch", "weight")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
_PEFT_TERMS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "module",
    "layers_to_transform": "depth",
    "init_lora_weights": "init",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
"""peft's words for options and filters, for the advice to who comes from there."""


@dataclass(frozen=True)
class Filters:
    """Which sites a rule is about: all given filters must hold; a tuple is a choice.

    ``name`` is a glob over the weight's qualified name (``*`` crosses dots) or ``re:<regex>``;
    ``module`` matches the owner's path by suffix (``"q_proj"``) or the owner's class; ``kind`` is a
    kind of the registry, or a glob over them; ``role`` is ``"q"``, ``"qv"``, ``("up", "down")``...;
    ``depth`` is a (low, high) share of the model's depth, or -n for the last n blocks, n for the
    first n; ``where`` is any predicate over a Site. A rule that matches nothing is an error, unless
    it is ``optional``.

    Raises:
        PolicyError: an unknown filter or role, or a value that does not fit; the valid ones are named.
    """

    name: Names = None
    module: Names = None
    kind: Names = None
    role: Names = None
    depth: tuple[float, float] | int | None = None
    where: Callable[[Site], bool] | None = None
    _: KW_ONLY
    optional: bool = False

    def __new__(cls, *_args: Any, **given: Any) -> Self:
        """Refuse what is no filter or option, naming those that are."""
        refuse_unknown(cls.__name__, given, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the values, and keep lists as tuples."""
        for field in ("name", "module", "kind", "role"):
            value: Any = getattr(self, field)
            if isinstance(value, (list, set, frozenset)):
                value = tuple(value if isinstance(value, list) else sorted(value))
                object.__setattr__(self, field, value)
            self._check_names(field, value)
        for role in self.roles:
            if role not in ROLES:
                raise PolicyError(
                    f"{type(self).__name__}(role={self.role!r})",
                    expected="roles of " + ", ".join(ROLES) + " (letters of qkvo may be joined)",
                    got=repr(role),
                    advice="Name a role of that list, or use name=, module= or kind=.",
                )
        self._check_depth()
        where: Any = self.where
        if where is not None and not callable(where):
            raise bad_value("where", "a function of a Site", where)

    def _check_names(self, field: str, value: Any) -> None:
        if value is None:
            return
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, tuple) or not items or not all(isinstance(i, str) and i for i in items):
            raise bad_value(field, "text or a non-empty list of texts", value)
        for item in items if field == "name" else ():
            if item.startswith("re:"):
                try:
                    re.compile(item[3:])
                except re.error as error:
                    raise bad_value(field, f"a regular expression ({error})", item) from error

    def _check_depth(self) -> None:
        depth: Any = self.depth
        if isinstance(depth, list):
            depth = tuple(depth)
            object.__setattr__(self, "depth", depth)
        if isinstance(depth, tuple) and len(depth) == 2 and all(map(_is_number, depth)):
            fine = 0 <= depth[0] <= depth[1] <= 1
        else:
            fine = depth is None or (isinstance(depth, int) and not isinstance(depth, bool) and depth != 0)
        if not fine:
            raise bad_value("depth", "(low, high) with 0 <= low <= high <= 1, or a number of blocks", depth)

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
            and (
                self.kind is None or any(fnmatch.fnmatchcase(site.kind, kind) for kind in choices(self.kind))
            )
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
        """Return the rule as its user wrote it, defaults left out (but never the rank)."""
        given = [
            f"{name}={_shown(value)}"
            for name, value in vars(self).items()
            if name == "rank" or value != type(self).__dataclass_fields__[name].default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class Rule(Filters):
    """Adapt the sites that match, with ``W = W0 + scale * B @ A``.

    ``scale`` is ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``, Kalajdzievski 2023);
    ``alpha`` is by default the rank. ``dropout`` acts on the branch's input; ``dora`` trains the
    rows' magnitudes too (Liu et al. 2024); ``init`` says how A and B start. ``compute`` says how the
    adapter is computed: ``"branch"`` adds thin products, ``"weight"`` reads ``W``, and ``"auto"`` takes a
    branch where every use allows it, in which ``W`` is formed where a cost model says that this is cheaper.

    Raises:
        PolicyError: a rank below 1, a dropout outside [0, 1), an unknown initialisation or computation.
    """

    _: KW_ONLY
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    compute: Compute = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        # A user's values may be of any type, whatever the annotations say.
        rank: Any = self.rank
        alpha: Any = self.alpha
        dropout: Any = self.dropout
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise bad_value("rank", "a whole number of at least 1", rank)
        if alpha is not None and not (_is_number(alpha) and 0 < alpha < math.inf):
            raise bad_value("alpha", "a number above 0", alpha)
        if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
            raise bad_value("dropout", "a number in [0, 1)", dropout)
        if self.init not in INITS:
            raise bad_value("init", " or ".join(INITS), self.init)
        if self.compute not in COMPUTES:
            raise bad_value("compute", " or ".join(COMPUTES), self.compute)
        for switch in ("rslora", "dora"):
            if not isinstance(getattr(self, switch), bool):
                raise bad_value(switch, "true or false", getattr(self, switch))

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
RULES: Mapping[str, type[Rule | Skip | Train]] = {"Rule": Rule, "Skip": Skip, "Train": Train}


def rule_to_data(rule: AnyRule) -> dict[str, dict[str, Any]]:
    """Return ``{"Rule": {"role": "qv", "rank": 8}}``: the class and what differs from its defaults.

    Raises:
        PolicyError: the rule has a ``where``, which JSON cannot hold.
    """
    if rule.where is not None:
        raise bad_value("where", "a policy of plain data", rule.where)
    given = {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) != f.default}
    return {type(rule).__name__: {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}}


def rule_from_data(data: Any) -> AnyRule:
    """Read what ``rule_to_data`` wrote, or what somebody wrote by hand.

    Raises:
        PolicyError: an unknown kind of rule, an unknown field, or a value that does not fit.
    """
    if not isinstance(data, Mapping) or len(data) != 1:
        raise bad_value(
            "a rule", 'an object with one key, {"Rule": {...}}, {"Skip": ...}, {"Train": ...}', data
        )
    [(name, given)] = data.items()
    if name not in RULES:
        raise bad_value("a rule", " or ".join(RULES), name)
    if not isinstance(given, Mapping):
        raise bad_value(name, "an object of filters and options", given)
    known = [f.name for f in fields(RULES[name]) if f.name != "where"]
    refuse_unknown(name, given, known)
    return RULES[name](**given)


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keys that are not known, naming the nearest ones that are."""
    valid = list(known)
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else "Remove it."
            if (term := _PEFT_TERMS.get(key)) in valid:
                advice = f"peft's {key} is {term}= here."
            raise PolicyError(where, expected="keys of " + ", ".join(valid), got=repr(key), advice=advice)


def choices(value: Names | Iterable[str]) -> tuple[str, ...]:
    """Read a filter's value, one or several, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def matches_name(name: str, pattern: str) -> bool:
    """Say whether a qualified name matches a glob (``*`` crosses dots) or a ``re:`` expression."""
    return _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=65536)
def _compiled(pattern: str) -> re.Pattern[str]:
    # A policy may hold hundreds of patterns (a rank for every layer): more than re's own cache keeps.
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def matches_path(path: str, pattern: str) -> bool:
    """Say whether a module's path is the pattern or ends with it, whole components only."""
    return path == pattern or path.endswith("." + pattern)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return getattr(value, "__name__", "<predicate>") if callable(value) else repr(value)


def bad_value(what: str, expected: str, got: object) -> PolicyError:
    """Return the error for one value of a policy."""
    return PolicyError(what, expected=expected, got=repr(got), advice="Correct the policy.")
