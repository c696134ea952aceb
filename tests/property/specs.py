"""Plain descriptions of small models and policies: frozen, drawn by Hypothesis, built afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hypothesis import strategies as st

Family = Literal["linear", "conv", "transposed", "bare", "attention", "recurrent", "embedding", "normed"]
Use = Literal["plain", "residual", "concatenated", "looped", "shared", "functional", "split"]
Compute = Literal["auto", "branch", "weight"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]

FAMILIES: tuple[Family, ...] = get_args(Family)
USES: tuple[Use, ...] = get_args(Use)
LAYERS: dict[Family, tuple[str, ...]] = {
    "linear": ("linear", "mlp", "bilinear", "weight_norm", "gated"),
    "conv": ("conv1d", "conv2d", "conv3d", "grouped", "depthwise", "same", "circular", "reflect"),
    "transposed": ("transposed1d", "transposed2d", "transposed3d", "transposed_grouped"),
    "bare": (
        "right",
        "left",
        "transposed_right",
        "einsum",
        "einsum_heads",
        "addmm",
        "bmm",
        "sliced",
        "joined",
    ),
    "attention": ("mha", "mha_weights", "mha_kdim", "encoder", "fused"),
    "recurrent": ("lstm", "gru", "rnn"),
    "embedding": ("positions", "bag", "padded"),
    "normed": ("batch_norm", "batch_norm_conv", "layer_norm", "group_norm"),
}


@dataclass(frozen=True)
class Layer:
    """One layer on ``(batch, length, width)``, and how it is used."""

    kind: str
    use: Use = "plain"
    bias: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A model: what it reads, its layers in order, what ends it."""

    layers: tuple[Layer, ...]
    reads: Literal["floats", "ids"] = "floats"
    head: Literal["none", "linear", "tied"] = "none"
    width: int = 4
    length: int = 3
    seed: int = 0


@dataclass(frozen=True)
class PolicySpec:
    """A policy: what is adapted, and how."""

    rank: int = 2
    alpha: int | None = None
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    compute: Compute = "auto"
    bias: Literal["none", "all", "lora_only"] = "none"
    norm_stats: Literal["freeze", "train"] = "freeze"
    first: Literal["adapt", "skip", "train"] = "adapt"


def models(family: Family) -> st.SearchStrategy[ModelSpec]:
    """Draw models with at least one layer of a family."""
    uses = st.sampled_from(USES)
    one = st.builds(Layer, kind=st.sampled_from(LAYERS[family]), use=uses, bias=st.booleans())
    every = sorted(kind for kinds in LAYERS.values() for kind in kinds)
    other = st.builds(Layer, kind=st.sampled_from(every), use=uses, bias=st.booleans())
    return st.builds(
        ModelSpec,
        layers=st.builds(
            lambda a, b, c: (*a, b, *c), st.lists(other, max_size=1), one, st.lists(other, max_size=2)
        ),
        reads=st.sampled_from(("ids", "floats") if family == "embedding" else ("floats", "ids")),
        head=st.sampled_from(("none", "linear", "tied")),
        width=st.sampled_from((4, 6, 8)),
        length=st.integers(2, 5),
        seed=st.integers(0, 99),
    )


def policies() -> st.SearchStrategy[PolicySpec]:
    """Draw policies."""
    return st.builds(
        PolicySpec,
        rank=st.integers(1, 5),
        alpha=st.none() | st.integers(1, 16),
        rslora=st.booleans(),
        dora=st.booleans(),
        init=st.sampled_from(get_args(Init)),
        compute=st.sampled_from(get_args(Compute)),
        bias=st.sampled_from(("none", "all", "lora_only")),
        norm_stats=st.sampled_from(("freeze", "train")),
        first=st.sampled_from(("adapt", "skip", "train")),
    )
