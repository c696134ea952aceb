"""State that a forward moves by itself: a momentum encoder, a codebook, spectral norm's vectors.

What a run writes beside outputs cannot be told beforehand, and a copy of every parameter would be too
dear: a recorded run says which tensors are written, and of those alone copies are taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, fx, nn

from lora_fx.passes.attributes import named_attributes
from lora_fx.passes.registers import plain

_written: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def written_in(graph: fx.Graph) -> frozenset[str]:
    """Return the names of the parameters, buffers and plain attributes that a recorded run wrote into.

    Also of those that it wrote into through a view.
    """
    memories = {w.meta.get("memory") for node in graph.nodes for w in node.meta.get("writes", ())} - {None}
    read = (node for node in graph.nodes if node.op == "get_attr")
    moved = (node for node in read if node.meta.get("memory") in memories)
    return frozenset(plain(node.meta.get("attribute", str(node.target))) for node in moved)


def note_written(model: nn.Module, names: Iterable[str]) -> None:
    """Remember that the model's own forward writes into these."""
    _written[model] = _written.get(model, frozenset()) | frozenset(names)


def written_tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters and plain attributes that the model's own forward is known to write into."""
    names = _written.get(model)
    if not names:
        return []
    found = [p for name, p in model.named_parameters() if plain(name) in names]
    return found + [t for name, t in named_attributes(dict(model.named_modules())) if plain(name) in names]
