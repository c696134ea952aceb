"""Structural twins: a weight that the run did not reach and its like in the same container."""

from __future__ import annotations

from torch import nn

from lora_fx.sites import Site

_Key = tuple[str, str, str, tuple[int, ...]]


class Twins:
    """Finds, for a weight's name, a used site whose path differs in one member of a container."""

    def __init__(self, model: nn.Module, used: list[Site]) -> None:
        self._classes = class_names(model)
        self._containers = {
            path
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, (nn.ModuleList, nn.ModuleDict))
        }
        self._used: dict[_Key, Site] = {}
        for site in used:
            for name in site.names:
                for key in self._keys(name, site.shape):
                    self._used.setdefault(key, site)

    def of(self, name: str, shape: tuple[int, ...]) -> Site | None:
        """Return the first used site that is a twin of this weight."""
        return next((self._used[key] for key in self._keys(name, shape) if key in self._used), None)

    def _keys(self, name: str, shape: tuple[int, ...]) -> list[_Key]:
        """What twins share: all of the path but one member, the owner's class and the shape."""
        parts = name.split(".")
        owner = self._classes.get(".".join(parts[:-1]), "")
        keys: list[_Key] = []
        # The last component is the attribute itself; the nearest container is asked first.
        for place in range(len(parts) - 2, -1, -1):
            container = ".".join(parts[:place])
            if parts[place].isdigit() or container in self._containers:
                keys.append((container, ".".join(parts[place + 1 :]), owner, shape))
        return keys


def class_names(model: nn.Module) -> dict[str, str]:
    """Return every module's class by path, aliases too."""
    return {p: type(m).__qualname__ for p, m in model.named_modules(remove_duplicate=False)}
