"""How a trace prints: a header, then one line per call under the module that made it."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lora_fx.kinds.names import canonical_op

_WIDTH = 60


def describe(model: nn.Module, graph: fx.Graph, examples: str, holes: tuple[str, ...]) -> str:
    """Return the printed form of a recorded run."""
    calls = [n for n in graph.nodes if n.op in {"call_function", "call_method"}]
    mode = "train" if model.training else "eval"
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    lines = [
        f"Trace of {type(model).__name__}: {len(calls)} calls in {mode} mode, inputs: {examples}",
        *(f"  {node.name}: {_type(node)}" for node in graph.nodes if node.op == "placeholder"),
    ]
    lines.extend(f"  hole {hole}" for hole in holes)
    current: str | None = None
    for node in graph.nodes:
        if node.op in {"placeholder", "get_attr"}:
            continue
        path = node.meta.get("module", "")
        if path != current:
            lines.append(f"{path or '(root)'} ({classes.get(path, '?')})")
            current = path
        lines.append(f"    {_line(node)}")
    return "\n".join(lines)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    op = node.meta.get("op") or canonical_op(node.target)
    return f"{node.name}: {_type(node)} = {op}({', '.join(arguments)})"


def _type(node: fx.Node) -> str:
    if "dtype" not in node.meta:
        return "tuple"
    dtype = str(node.meta["dtype"]).removeprefix("torch.")
    return f"{dtype}[{', '.join(str(n) for n in node.meta['shape'])}]"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_text(v) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if v is None else _text(v) for v in (value.start, value.stop, value.step))
    text = repr(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
