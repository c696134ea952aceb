"""Synthetic sites and plans: what matching would have written, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fx.matrix import Rows, columns_form, rows_form
from lora_fx.planning import make_plan
from lora_fx.plans import Plan
from lora_fx.policy import Policy
from lora_fx.sites import Site, Use

BRANCH = Use("linear", "home", "linear", branch=True)
WEIGHT = Use("linear", "home", "linear", branch=False, why="read outside its module")


def site(
    name: str,
    shape: tuple[int, ...] = (8, 8),
    *,
    roles: Mapping[str, Rows | None] | None = None,
    uses: Sequence[Use] = (BRANCH,),
    kind: str = "linear",
    module_class: str = "Linear",
    dtype: str = "float32",
    **more: Any,
) -> Site:
    form = columns_form(shape) if kind == "embedding" else rows_form(shape)
    return Site(
        name,
        kind,
        shape,
        dtype,
        more.pop("form", form),
        roles=roles or {},
        uses=tuple(uses),
        module=name.rpartition(".")[0],
        module_class=module_class,
        **more,
    )


def attention(prefix: str, width: int, *, block: tuple[int, int] = (0, 1)) -> list[Site]:
    """Four square matrices, as in the paper."""
    return [
        site(f"{prefix}.{attribute}.weight", (width, width), roles={role: None}, block=block, depth=0.5)
        for role, attribute in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    ]


def transformer(layers: int, width: int) -> list[Site]:
    return [s for i in range(layers) for s in attention(f"layers.{i}.attention", width, block=(i, layers))]


def fused(name: str = "attn.qkv.weight", width: int = 8, **more: Any) -> Site:
    roles: dict[str, Rows | None] = {
        "q": ((0, width),),
        "k": ((width, 2 * width),),
        "v": ((2 * width, 3 * width),),
    }
    return site(name, (3 * width, width), roles=roles, **more)


def plan(
    sites: Sequence[Site],
    policy: Policy,
    *,
    traced: bool = True,
    parameters: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    **more: Any,
) -> Plan:
    found = {s.name: (s.shape, s.dtype) for s in sites} | dict(parameters or {})
    return make_plan(
        sites,
        policy,
        traced=traced,
        model=more.pop("model", "Model"),
        examples="given" if traced else None,
        parameters=found,
        base_parameters=more.pop("base_parameters", 100_000),
        **more,
    )
