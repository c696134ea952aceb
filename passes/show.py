"""Show what insertion made of a module's forward: before and after."""

from __future__ import annotations

import inspect
import textwrap

from torch import fx, nn

from lora_fx.passes.runtime import binding, injected


def show_forward(module: nn.Module) -> str:
    """Return the source of a module's forward before and after insertion, and its properties.

    For a GraphModule, the code of its own graph.
    """
    record, held = injected(module), binding(module)
    if isinstance(module, fx.GraphModule) and record is not None and record.graph is not None:
        before = record.graph.python_code("self").src
        return f"# before\n{before.strip()}\n\n# after\n{module.code.strip()}\n"
    if held is None:
        return f"# {type(module).__name__} is not adapted\n{_source(type(module))}\n"
    lines = [f"# before: {held.base_class.__name__}.forward", _source(held.base_class), ""]
    after = vars(type(module)).get("forward")
    generated = getattr(after, "__lora_fx_source__", None)
    if generated is not None:
        lines += ["# after", generated.strip(), ""]
    for name in held.sites:
        how = "the branch reads W0 raw" if name in held.branched else "every use reads W"
        lines.append(f"# {name} -> W = W0 + scale * B A, computed at each reading; {how}")
    if held.frozen_norm:
        lines.append("# in train mode, the running statistics are used and left alone")
    return "\n".join(lines) + "\n"


def _source(cls: type[nn.Module]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(cls.forward)).strip()
    except (OSError, TypeError):
        return "# (its source is not to be had)"
