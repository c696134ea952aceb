"""What an injected model carries: which adapters there are, which is active, and how to read them.

Nothing here holds a tensor or a module: adapters are ordinary Parameters registered on the modules
that own the adapted weights, and are looked up by name at each use, so that ``.to``, ``deepcopy``,
``functional_call``, sharding and checkpoints see them as they see any other parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_fx.errors import WeightWriteError, WrappedModelError
from lora_fx.kinds.base import LivePart, LiveParts, since_start
from lora_fx.kinds.effective import effective_weight
from lora_fx.matrix import MatrixForm, Rows
from lora_fx.passes.kept import kept
from lora_fx.passes.registers import own_buffers, own_parameters
from lora_fx.passes.sharded import PLACING, is_read_by, laid_out_like, whole
from lora_fx.passes.stock_forward import Branched

if TYPE_CHECKING:
    import torch
    from torch import fx

    from lora_fx.fingerprints import Fingerprint
    from lora_fx.plans import Plan
    from lora_fx.rules import Compute

BINDING = "_lora_fx_binding"
"""The ``__dict__`` key under which an adapted module keeps its Binding."""
INJECTED = "_lora_fx"
"""The ``__dict__`` key under which an injected model keeps its Injected record."""


@dataclass
class AdapterState:
    """The switch that every adapted module of one model shares.

    ``dropout`` is False while the adapters' own dropout is held off (probing, verifying).
    """

    active: str | None = None
    enabled: bool = True
    dropout: bool = True


@dataclass(frozen=True)
class PartSpec:
    """One part of one adapter on one weight: the names of its Parameters on the owner.

    ``start_a`` and ``start_b`` name the frozen start where the initialisation needs one.
    """

    a: str
    b: str
    rows: Rows | None = None
    start_a: str | None = None
    start_b: str | None = None


@dataclass(frozen=True)
class SiteSpec:
    """How one adapter changes one weight; all names are of Parameters on the owner.

    ``full`` names the copy that stands in for the weight, ``magnitude`` DoRA's row norms. ``buffer``
    says that it is a buffer that moves (running statistics), and no parameter. ``compute`` is what the
    plan asks: ``"weight"`` for no branch, ``"branch"`` for thin products whatever the sizes. ``by_branch``
    says whether branches may compute the change: where it is low-rank, and not asked to be read as W.
    """

    form: MatrixForm | None
    parts: tuple[PartSpec, ...] = ()
    scale: float = 1.0
    dropout: float = 0.0
    full: str | None = None
    magnitude: str | None = None
    buffer: bool = False
    compute: Compute = "auto"
    by_branch: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Work out once what every call asks."""
        object.__setattr__(self, "by_branch", self.low_rank and self.compute != "weight")

    @property
    def names(self) -> tuple[str, ...]:
        """Every Parameter of this adapter on the owner."""
        names = [n for p in self.parts for n in (p.a, p.b, p.start_a, p.start_b)]
        return tuple(n for n in (*names, self.full, self.magnitude) if n is not None)

    @property
    def low_rank(self) -> bool:
        """Whether the change is a plain sum of low-rank parts."""
        return self.full is None and self.magnitude is None


@dataclass
class Binding:
    """What an adapted module keeps: its own class, its weights' adapters, what was replaced.

    ``root`` says that it is the injected model itself. ``assigned`` notes Parameters that are being
    replaced by a state dict's, with the identity of the old ones. ``shared`` are the adapted weights that
    other modules held too at ``inject``.
    """

    state: AdapterState
    base_class: type[nn.Module]
    sites: dict[str, dict[str, SiteSpec]] = field(default_factory=dict[str, "dict[str, SiteSpec]"])
    branched: dict[str, Branched] = field(default_factory=dict[str, Branched])
    frozen_norm: bool = False
    rebound: dict[str, Any] = field(default_factory=dict[str, Any])
    root: bool = False
    assigned: dict[str, int] = field(default_factory=dict[str, int])
    shared: set[str] = field(default_factory=set[str])

    def active(self, name: str) -> SiteSpec | None:
        """Return the active adapter's spec for one of the module's weights, if there is one."""
        state = self.state
        if not state.enabled or state.active is None:
            return None
        specs = self.sites.get(name)
        return None if specs is None else specs.get(state.active)


@dataclass
class Injected:
    """What an injected model keeps at its root.

    ``ties`` holds, for each adapter, the qualified names of every weight that has several; ``buffers``
    tell whether the base's moved since the first inject. ``halves`` are, for each adapter, the half
    precisions that a recorded run showed after its weights.
    """

    state: AdapterState
    plans: dict[str, Plan] = field(default_factory=dict[str, "Plan"])
    ties: dict[str, tuple[tuple[str, ...], ...]] = field(
        default_factory=dict[str, "tuple[tuple[str, ...], ...]"]
    )
    trainable: dict[str, bool] = field(default_factory=dict[str, bool])
    flags: dict[str, bool] = field(default_factory=dict[str, bool])
    fingerprints: dict[str, tuple[Any, Fingerprint]] = field(
        default_factory=dict[str, "tuple[Any, Fingerprint]"]
    )
    buffers: dict[str, Fingerprint] = field(default_factory=dict[str, "Fingerprint"])
    halves: dict[str, frozenset[torch.dtype]] = field(default_factory=dict[str, "frozenset[torch.dtype]"])
    graph: fx.Graph | None = None
    probe: str = "not probed"


def injected(model: nn.Module) -> Injected | None:
    """Return the record of an injected model, or None for a plain one."""
    return model.__dict__.get(INJECTED)


def binding(module: nn.Module) -> Binding | None:
    """Return what an adapted module keeps, or None for a plain one."""
    return module.__dict__.get(BINDING)


def branchable(held: Binding) -> dict[str, Branched]:
    """Return the module's weights that branches may compute, with the one form they are adapted in.

    Adapters of one weight in different forms, or with rows in a form that a use sees transposed, are
    left to the property, which serves every form.
    """
    found: dict[str, Branched] = {}
    for name, specs in held.sites.items():
        forms = {spec.form for spec in specs.values() if spec.by_branch and spec.form is not None}
        if len(forms) == 1:
            rows = any(part.rows is not None for spec in specs.values() for part in spec.parts)
            found[name] = Branched(forms.pop(), rows)
    return found


def raw(module: nn.Module, name: str) -> Tensor:
    """Return ``W0``, or another Parameter or buffer of the module, past every property.

    Raises:
        WeightWriteError: it is not there any more.
    """
    tensor: Tensor | None = own_parameters(module).get(name)
    if tensor is None:
        tensor = own_buffers(module).get(name)
    if tensor is None:
        raise WeightWriteError(
            f"{name!r} of {type(module).__name__}",
            expected="a Parameter, as inject left it there",
            got="none: it was deleted, or a parametrization (weight_norm, pruning) took it away",
            advice="Put it back (register_parameter), and call lora_fx.unload before such a change.",
        )
    return tensor


def effective(module: nn.Module, name: str, spec: SiteSpec, base: Tensor | None = None) -> Tensor:
    """Return ``W`` of one adapter: the trained copy, or ``W0`` with its low-rank change.

    ``base`` stands in for ``W0`` where another precision is wanted. A sharded ``W0`` is gathered, and
    its ``W`` laid out as it was.
    """
    base = _fitting(module, name, spec) if base is None else base
    if spec.full is not None:
        return laid_out_like(whole(raw(module, spec.full)), base).to(base.dtype)
    if spec.form is None:
        raise RuntimeError(f"the adapter of {name!r} has neither a form nor a trained copy")
    magnitude = None if spec.magnitude is None else whole(raw(module, spec.magnitude))
    parts = _parts(module, spec, 0.0, whole)
    return laid_out_like(effective_weight(whole(base), spec.form, parts, magnitude), base)


def current_weight(module: nn.Module, name: str, reader: FrameType | None = None) -> Tensor | None:
    """Return what reading the weight yields: ``W`` of the active adapter, or ``W0``.

    torch.distributed and accelerate are given ``W0``: they keep what they read as the base.
    """
    held = binding(module)
    spec = None if held is None else held.active(name)
    if spec is None:
        return own_parameters(module).get(name, own_buffers(module).get(name))
    if is_read_by(reader, PLACING):
        return raw(module, name)
    return _kept_effective(module, name, spec)


def _kept_effective(module: nn.Module, name: str, spec: SiteSpec) -> Tensor:
    small = tuple(raw(module, other) for other in spec.names)
    compute = partial(effective, module, name, spec)
    return kept(module, name, raw(module, name), small, spec.scale, compute)


def is_own(module: nn.Module, tensor: Tensor) -> bool:
    """Say whether a tensor is the module's own Parameter or buffer, so that writing to it is kept."""
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    return any(tensor is own for own in held)


def branch_base(module: nn.Module, name: str) -> Tensor:
    """Return the weight that a branch starts from: ``W0``, or ``W`` where it is not to be a branch."""
    held = binding(module)
    spec = None if held is None else held.active(name)
    if spec is None:
        return raw(module, name)
    return _fitting(module, name, spec) if spec.by_branch else _kept_effective(module, name, spec)


def _fitting(module: nn.Module, name: str, spec: SiteSpec) -> Tensor:
    """Return ``W0``, of the shape that its adapter has.

    Raises:
        WrappedModelError: it is another's: this process's share alone, say.
    """
    weight = raw(module, name)
    if spec.form is not None and weight.shape != spec.form.shape:
        raise WrappedModelError(
            f"{name!r} of {type(module).__name__}",
            expected=f"the weight of shape {spec.form.shape} that was adapted",
            got=f"one of shape {tuple(weight.shape)}, put there past the module, as this process's share is",
            advice="Tensor parallelism after inject is torch's parallelize_module; what transformers splits "
            "(apply_tensor_parallelism, tp_plan) takes no adapters along.",
        )
    return weight


def live_parts(module: nn.Module, name: str) -> LiveParts:
    """Return what the branch at this weight computes with now; empty where nothing is active."""
    held = binding(module)
    spec = None if held is None else held.active(name)
    if held is None or spec is None or not spec.by_branch:
        return ()
    dropout = spec.dropout and (spec.dropout if module.training and held.state.dropout else 0.0)
    return _parts(module, spec, dropout)


def _parts(
    module: nn.Module, spec: SiteSpec, dropout: float, read: Callable[[Tensor], Tensor] | None = None
) -> LiveParts:
    live: list[LivePart] = []
    for part in spec.parts:
        a, b = raw(module, part.a), raw(module, part.b)
        if read is not None:
            a, b = read(a), read(b)
        whole_part = LivePart(a, b, spec.scale, part.rows, dropout, added=spec.compute == "branch")
        if part.start_a is None or part.start_b is None:
            live.append(whole_part)
            continue
        start = raw(module, part.start_a), raw(module, part.start_b)
        live += since_start(whole_part, start if read is None else (read(start[0]), read(start[1])))
    return tuple(live)
