"""The second net: operations that no torch function covers, seen one level below.

Compiled TorchScript, traced submodules and calls from C++ are invisible to a TorchFunctionMode; a
TorchDispatchMode sees the operators that they run. It writes down those outside any recorded call.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.passes.recorder import Recorder


class SecondNet(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes every operator to a recorder, which writes down what it has not seen itself."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        del types
        return self._recorder.lower(func, args, kwargs or {})
