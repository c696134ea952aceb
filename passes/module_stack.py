"""Which module's forward is running: a stack kept by global module hooks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks


class ModuleStack:
    """Follows the calls of one model's modules in the thread that made it.

    A module that is not of the model counts as part of its caller, and so does a child whose
    ``forward`` is called past its hooks.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._paths = {id(module): name for name, module in modules.items()}
        self._stack = [""]
        self._thread = threading.get_ident()
        self._raised: tuple[BaseException | None, str] = (sys.exc_info()[1], "")

    @property
    def path(self) -> str:
        """The path of the innermost module whose forward is running."""
        return self._stack[-1]

    @contextmanager
    def following(self) -> Generator[None]:
        """Inside, follow every call, also when a module raises."""
        before = module_hooks.register_module_forward_pre_hook(self._push)
        behind = module_hooks.register_module_forward_hook(self._pop, always_call=True)
        try:
            yield
        finally:
            before.remove()
            behind.remove()

    def raised_in(self, error: BaseException) -> str:
        """Return the path of the innermost module that an error left."""
        return self._raised[1] if self._raised[0] is error else ""

    def _push(self, module: nn.Module, args: Any) -> None:
        del args
        if threading.get_ident() == self._thread:
            self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if threading.get_ident() == self._thread and len(self._stack) > 1:
            path, error = self._stack.pop(), sys.exc_info()[1]
            if error is not None and error is not self._raised[0]:
                self._raised = (error, path)
