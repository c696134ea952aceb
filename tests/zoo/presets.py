"""Write tests/zoo/PRESETS.md: what each preset adapts, on ten architectures side by side.

Run it from the repository's root: ``python -m tests.zoo.presets``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lora_fx
from lora_fx.errors import PolicyError
from lora_fx.passes.trace import Trace
from lora_fx.plans import Plan
from lora_fx.policy import Policy
from lora_fx.tables import name_pattern
from tests.zoo.roles_table import all_truths

ARCHITECTURES = (
    "bert",
    "gpt2 (Conv1D)",
    "llama",
    "mixtral",
    "t5",
    "xlnet",
    "whisper",
    "vit",
    "swin v2 (cosine)",
    "resnet",
)
PRESETS: dict[str, Callable[[int], Policy]] = {
    "Policy.paper": Policy.paper,
    "Policy.attention": Policy.attention,
    "Policy.convs": Policy.convs,
    "Policy.default": Policy.default,
}
PATH = Path(__file__).parent / "PRESETS.md"
RANK = 4


def traces() -> dict[str, Trace]:
    """Return one recorded run of each architecture."""
    builders = {truth.name: truth.build for _, truth in all_truths()}
    found: dict[str, Trace] = {}
    for name in ARCHITECTURES:
        model, inputs = builders[name]()
        with torch.no_grad():
            found[name] = lora_fx.trace(model, inputs)
    return found


def adapted(traced: Trace, preset: Callable[[int], Policy]) -> tuple[Plan | None, list[str]]:
    """Return the plan and the names of what it adapts, layers in one; or why there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            plan = lora_fx.plan(traced, preset(RANK))
        except PolicyError as error:
            return None, [f"refused: {error.got}"]
    groups: dict[tuple[str, str], list[str]] = {}
    for decision in plan.adapted:
        roles = "+".join(part.role for part in decision.parts if part.role)
        groups.setdefault((name_pattern([decision.name], wild=True), roles), []).append(decision.name)
    return plan, [
        f"`{name_pattern(names)}`{f' ({roles})' if roles else ''}" for (_, roles), names in groups.items()
    ]


def lines() -> Iterator[str]:
    """Yield the page."""
    runs = traces()
    yield "# What each preset adapts, on ten architectures"
    yield ""
    yield f"Tiny configurations, rank {RANK}. Layers in braces; in brackets, the roles whose rows of a fused"
    yield "weight are adapted. Written by `python -m tests.zoo.presets`."
    for title, preset in PRESETS.items():
        yield ""
        yield f"## {title}"
        yield ""
        yield "| architecture | weights | trained | adapted |"
        yield "|---|---:|---:|---|"
        for name, traced in runs.items():
            plan, names = adapted(traced, preset)
            counts = ("", "") if plan is None else (str(len(plan.adapted)), f"{plan.parameters:,}")
            yield f"| {name} | {counts[0]} | {counts[1]} | {'<br>'.join(names)} |"


def main() -> int:
    """Write the page."""
    PATH.write_text("\n".join(lines()) + "\n")
    return 0


if __name__ == "__main__":
    from tests import conftest  # noqa: F401 - what has to be done before torchvision is imported

    sys.exit(main())
