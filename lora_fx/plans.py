"""The Plan: frozen decisions, one per site, the only thing that passes from deciding to rewriting."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_fx.diffs import PlanDiff, diff_plans
from lora_fx.errors import NoPlanFileError, PlanError
from lora_fx.files import atomic_write
from lora_fx.matrix import Rows, row_count
from lora_fx.rules import Compute
from lora_fx.sites import Site, rows_from_json
from lora_fx.tables import as_text, plan_table

if TYPE_CHECKING:
    from rich.console import Group

PLAN_VERSION = 1

Action = Literal["adapt", "skip", "train"]
Form = Literal["branch", "weight", "mixed", "full"]
"""How an adapter is computed: as a low-rank branch at every use, as an effective weight, as a branch
at some uses and an effective weight at others, or (``full``) as a trained copy of the weight."""


class Reason(StrEnum):
    """Why a site was decided as it was: the closed list."""

    RULE = "rule"  # the first rule that matched asks for it
    TWIN = "twin"  # not reached by the run; decided as its structural twin
    SKIP_RULE = "skip-rule"  # a Skip matched first
    NO_RULE = "no-rule"  # no rule matched
    NOT_REACHED = "not-reached"  # the run did not use it, and it has no twin
    NO_EFFECT = "no-effect"  # its uses reach no output of the run, or pass no gradient
    NOT_FLOAT = "not-float"  # its dtype takes no adapter
    UNFIT = "unfit"  # the kind cannot be adapted; the detail says why
    NO_BUDGET = "no-budget"  # the budget leaves no rank for it


@dataclass(frozen=True)
class Part:
    """One pair ``A: (r, in)``, ``B: (rows, r)`` of a site; a fused weight has one per role.

    ``role`` names it in files (None: the whole weight); ``rows`` are the output rows that it adapts
    (None: all).
    """

    rank: int
    role: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class Decision:
    """What is done with one site, and why.

    ``rule`` is the text of the rule that decided; ``detail`` completes ``reason`` in words; ``form``
    and ``form_reason`` say how an adapter is computed. ``scale`` multiplies ``B @ A``. ``compute`` is what
    the rule asks of it; ``expected`` and ``expected_reason`` say what the cost model expects at the sizes
    of the recorded run (``kinds/expected.py`` has the words), "" where there was none.
    """

    site: Site
    action: Action
    reason: Reason
    rule: str | None = None
    detail: str = ""
    form: Form | None = None
    form_reason: str = ""
    parts: tuple[Part, ...] = ()
    alpha: float | None = None
    scale: float = 1.0
    dropout: float = 0.0
    dora: bool = False
    init: str = "kaiming"
    compute: Compute = "auto"
    expected: str = ""
    expected_reason: str = ""

    @property
    def name(self) -> str:
        """The site's qualified name."""
        return self.site.name

    @property
    def rank(self) -> int | None:
        """The largest rank among the parts, or None where nothing low-rank is trained."""
        return max((part.rank for part in self.parts), default=None)

    @property
    def rows(self) -> Rows | None:
        """The adapted output rows, or None for all of them."""
        if not self.parts or any(part.rows is None for part in self.parts):
            return None
        return tuple(sorted({r for part in self.parts for r in part.rows or ()}))

    @property
    def parameters(self) -> int:
        """The number of trained numbers: ``r * (in + rows)`` per part and stacked matrix."""
        form = self.site.form
        if self.action == "train":
            return numel(self.site.shape)
        stack = form.experts or 1
        low = sum(p.rank * (form.in_features + row_count(p.rows, form)) for p in self.parts)
        return stack * (low + (form.out_features if self.dora else 0))

    @property
    def adapter_bytes(self) -> int:
        """The size of the trained numbers on disk: A and B in float32 or wider."""
        dtype = self.site.dtype
        return self.parameters * (itemsize(dtype) if self.action == "train" else adapter_itemsize(dtype))

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``from_json``."""
        data = {k: v for k, v in vars(self).items() if k not in {"site", "parts"}}
        data["reason"] = self.reason.value
        data["site"] = self.site.to_json()
        data["parts"] = [
            {"role": p.role, "rank": p.rank, "rows": None if p.rows is None else [list(r) for r in p.rows]}
            for p in self.parts
        ]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        """Read what ``to_json`` wrote."""
        fields = dict(data)
        fields["reason"] = Reason(data["reason"])
        fields["site"] = Site.from_json(data["site"])
        fields["parts"] = tuple(
            Part(rank=int(p["rank"]), role=p.get("role"), rows=rows_from_json(p.get("rows")))
            for p in data.get("parts", ())
        )
        return cls(**fields)


@dataclass(frozen=True)
class Extra:
    """A parameter that is no site (a bias, a norm's weight) and is trained in full, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """Every decision about one model: frozen, serialisable, independent of the model's objects.

    ``model`` is the class the plan was made for; ``examples`` says where the example inputs came
    from (None: there were none, and the sites come from the module tree alone); ``notes`` hold
    remarks such as the budget's arithmetic or a shadowed rule. ``buffers`` names the running statistics
    that move in training (``norm_stats="train"``); each adapter has its own copy of them.
    """

    decisions: tuple[Decision, ...]
    model: str = ""
    examples: str | None = None
    extras: tuple[Extra, ...] = ()
    buffers: tuple[str, ...] = ()
    norm_stats: Literal["freeze", "train"] = "freeze"
    notes: tuple[str, ...] = ()
    base_parameters: int = 0
    _index: dict[str, Decision] = field(
        default_factory=dict[str, Decision], init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        """Index the decisions by every name of their sites."""
        for decision in self.decisions:
            for name in (decision.name, *decision.site.names):
                self._index[name] = decision

    def __getitem__(self, name: str) -> Decision:
        """Return the decision about the weight of this qualified name (tied names too)."""
        if name not in self._index:
            raise KeyError(name)
        return self._index[name]

    def __contains__(self, name: object) -> bool:
        """Say whether there is a decision about the weight of this name."""
        return name in self._index

    @property
    def adapted(self) -> tuple[Decision, ...]:
        """The decisions that add a low-rank adapter."""
        return tuple(d for d in self.decisions if d.action == "adapt")

    @property
    def trained(self) -> tuple[Decision, ...]:
        """The decisions that train the whole parameter."""
        return tuple(d for d in self.decisions if d.action == "train")

    @property
    def parameters(self) -> int:
        """The number of trained numbers, extras included."""
        return sum(d.parameters for d in self.decisions if d.action != "skip") + sum(
            numel(e.shape) for e in self.extras
        )

    @property
    def adapter_bytes(self) -> int:
        """The size of the trained numbers on disk, extras included, file headers not."""
        return sum(d.adapter_bytes for d in self.decisions if d.action != "skip") + sum(
            numel(e.shape) * itemsize(e.dtype) for e in self.extras
        )

    def __rich__(self) -> Group:
        """Render as a table, weights that differ in their layer's number only in one line."""
        return plan_table(self)

    def __str__(self) -> str:
        """Return the table as text."""
        return as_text(plan_table(self))

    def diff(self, other: Plan) -> PlanDiff:
        """Compare with another plan: what each does, weight by weight."""
        return diff_plans(self, other)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            PlanError: the path is a folder's.
        """
        if Path(path).is_dir():
            raise PlanError(str(path), expected="a file's path", got="a folder", advice="Name a file in it.")
        atomic_write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            PlanError: the file holds no plan, or one of another version.
            NoPlanFileError: there is no such file.
        """
        if not Path(path).is_file():
            raise NoPlanFileError(
                str(path),
                expected="a file that Plan.save wrote",
                got="no such file",
                advice="Check the path.",
            )
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def to_json(self) -> str:
        """Return the plan as JSON text; ``Plan.from_json`` reads it back equal."""
        data = {
            "plan_version": PLAN_VERSION,
            "model": self.model,
            "examples": self.examples,
            "buffers": list(self.buffers),
            "norm_stats": self.norm_stats,
            "notes": list(self.notes),
            "base_parameters": self.base_parameters,
            "extras": [{**vars(e), "shape": list(e.shape)} for e in self.extras],
            "decisions": [d.to_json() for d in self.decisions],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: the text is not a plan, or of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise _unreadable(str(error)) from error
        if not isinstance(data, dict) or "plan_version" not in data:
            if isinstance(data, dict) and "rules" in data:
                raise _unreadable("a policy, which Policy.from_json reads")
            raise _unreadable("no plan_version in it")
        version = data["plan_version"]
        if version != PLAN_VERSION:
            raise PlanError(
                "the plan",
                expected=f"plan_version {PLAN_VERSION}",
                got=f"{version}",
                advice="Make the plan again with this version of lora_fx.",
            )
        try:
            return cls(
                decisions=tuple(Decision.from_json(d) for d in data["decisions"]),
                model=data["model"],
                examples=data["examples"],
                extras=tuple(_extra_from_json(e) for e in data["extras"]),
                buffers=tuple(data["buffers"]),
                norm_stats=data["norm_stats"],
                notes=tuple(data["notes"]),
                base_parameters=data["base_parameters"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(f"{type(error).__name__}: {error}") from error


def _extra_from_json(data: Mapping[str, Any]) -> Extra:
    fields = dict(data)
    fields["shape"] = tuple(data["shape"])
    return Extra(**fields)


def _unreadable(got: str) -> PlanError:
    return PlanError(
        "the plan",
        expected="JSON written by Plan.to_json",
        got=got,
        advice="Pass the text of a saved plan.",
    )


def numel(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor of this shape."""
    return math.prod(shape)


def itemsize(dtype: str) -> int:
    """The bytes of one element of a dtype by name: ``float32``, ``bfloat16``, ``float8_e4m3fn``."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits[0]) // 8)


def adapter_itemsize(dtype: str) -> int:
    """The bytes of one number of A or B beside a weight of this dtype: float32, or wider as it is."""
    return max(4, itemsize(dtype))
