"""The seam between the torch side and ONNX: what the passes about ONNX need to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_fx.passes.changes import Change, changes
from lora_fx.passes.fold import base_only, folded
from lora_fx.passes.runtime import injected
from lora_fx.passes.weights import Weights

State = Callable[[], AbstractContextManager[nn.Module]]
"""Gives a model in some state for the length of a ``with`` block: plain forwards, given weights."""


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
