"""The seam between the torch side and ONNX: what the passes about ONNX need to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_fx.passes.changes import Change, changes
from lora_fx.passes.fold import base_only, folded
from lora_fx.passes.runtime import injected

State = Callable[[], AbstractContextManager[nn.Module]]
"""Gives a model in some state for the length of a ``with`` block: plain forwards, given weights."""

Effective = Callable[[str, Tensor], Tensor]
"""The effective weight ``W`` of a parameter, from its qualified base name and ``W0``."""


Band = Callable[[str, Tensor, int], Tensor | None]
"""Some entries of ``W`` along axis 0, from those of ``W0`` and the first one's number; None: needs more."""


@dataclass(frozen=True)
class Weights:
    """Which base weights an adapter changes, by qualified name, and what it makes of each.

    ``band`` makes a part of a weight from the same part of ``W0``, for weights that are large.
    """

    names: tuple[str, ...]
    effective: Effective
    plan: str | None = None
    band: Band | None = None


@dataclass(frozen=True)
class Subject:
    """A model as it is exported: its base, and what its adapter makes of it.

    ``base_state`` and ``folded_state`` give the model with its original classes and forwards, holding
    ``W0`` and ``W``; ``injected`` the model as it is trained, which the runtime is compared against.
    ``changes`` maps qualified base names to ``W0`` and ``W``; ``plan`` is the plan's JSON.
    """

    base_state: State
    folded_state: State
    injected: State
    changes: Mapping[str, Change] = field(default_factory=dict[str, Change], hash=False)
    plan: str | None = None

    @property
    def adapted(self) -> bool:
        """Whether there is anything to fold."""
        return bool(self.changes)

    @property
    def weights(self) -> Weights:
        """The folded values, whatever the base file holds."""
        return Weights(tuple(self.changes), lambda name, _: self.changes[name].after, self.plan)


def subject_of(model: nn.Module) -> Subject:
    """Return a model as a subject: with its active adapter, or plain where it has none."""

    @contextmanager
    def as_it_is() -> Generator[nn.Module]:
        yield model

    record = injected(model)
    if record is None or record.state.active is None or not record.state.enabled:
        return Subject(lambda: base_only(model), lambda: base_only(model), as_it_is)
    plan = record.plans.get(record.state.active)
    return Subject(
        base_state=lambda: base_only(model),
        folded_state=lambda: folded(model),
        injected=as_it_is,
        changes=changes(model),
        plan=None if plan is None else plan.to_json(),
    )


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Example inputs as positional and keyword arguments."""
