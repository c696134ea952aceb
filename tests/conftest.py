"""What every test needs before it imports anything heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def _import_torchvision() -> None:
    """Import torchvision where its compiled operators do not load (a CPU torch beside a CUDA build).

    Its Python registers fake kernels for operators that are then missing, which raises; transformers,
    timm and peft import it. Nothing here calls those operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    held = torch.library.register_fake

    def lenient(op: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return held(op, *args, **kwargs)

    torch.library.register_fake = lenient  # type: ignore[assignment]
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = held


_import_torchvision()


def _hypothesis_profiles() -> None:
    """CI's draws are fixed and few; ``--hypothesis-profile=long`` draws many, other ones each time."""
    from hypothesis import HealthCheck, settings

    unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("ci", max_examples=65, derandomize=True, print_blob=True, **unhurried)  # type: ignore[arg-type]
    settings.register_profile("long", max_examples=2000, print_blob=True, **unhurried)  # type: ignore[arg-type]
    settings.load_profile("ci")


_hypothesis_profiles()
