"""Execution providers of ONNX Runtime: which are there, which to use, and no silent fall back."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fx.errors import ProviderError

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

SHORT_NAMES: Mapping[str, str] = {
    "cpu": CPU,
    "cuda": CUDA,
    "gpu": CUDA,
    "tensorrt": TENSORRT,
    "trt": TENSORRT,
}
"""What may be written for a provider's full name."""

CUDA_OPTIONS: Mapping[str, str] = {
    # TF32 rounds float32 matrix products to 10 bits: parity with torch needs it off.
    "use_tf32": "0",
    # An exhaustive search re-times kernels in every session, so that two sessions may pick two.
    "cudnn_conv_algo_search": "HEURISTIC",
}
"""Options for CUDA sessions, so that the same file gives the same kernels and the same numbers."""

DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""What a machine with an NVIDIA device has, natively or under WSL."""

Providers = str | Sequence[str | tuple[str, Mapping[str, Any]]]
"""``"auto"``, one name, or several in order of preference, each with options if need be."""


@dataclass(frozen=True)
class Runtime:
    """The providers that a session asks for, in order, with their options."""

    providers: tuple[tuple[str, Mapping[str, str]], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def first(self) -> str:
        """The provider that runs whatever it can."""
        return self.providers[0][0]


def onnxruntime() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        ProviderError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ProviderError(
            "onnxruntime",
            expected="onnxruntime to be installed",
            got=str(error),
            advice="pip install 'lora_fx[cpu]', or 'lora_fx[gpu]' on a machine with an NVIDIA GPU "
            "(never both in one environment).",
        ) from error


def choose(providers: Providers = "auto") -> Runtime:
    """Return the providers to ask for.

    ``"auto"`` takes CUDA where a device and its libraries are there, and the CPU otherwise.
    TensorRT is used when it is asked for by name. After CUDA or TensorRT comes the CPU, for the nodes
    that they do not take.

    Raises:
        ProviderError: a provider that was asked for is unknown to the installed onnxruntime, or its
            libraries or device are missing.
    """
    if providers == "auto":
        present = [name for name in (CUDA,) if why_missing(name) is None]
        return Runtime(tuple((name, _options(name, {})) for name in (*present, CPU)))
    asked = [providers] if isinstance(providers, str) else list(providers)
    if not asked:
        raise ProviderError("providers", expected="at least one provider", got="none", advice='Pass "auto".')
    chosen: list[tuple[str, Mapping[str, str]]] = []
    for item in asked:
        name, options = (item, {}) if isinstance(item, str) else (item[0], item[1])
        name = SHORT_NAMES.get(name.lower(), name)
        missing = why_missing(name)
        if missing is not None:
            raise _missing(name, missing)
        chosen.append((name, _options(name, options)))
    if chosen[-1][0] != CPU:
        chosen.append((CPU, {}))
    return Runtime(tuple(chosen))


def why_missing(name: str) -> str | None:
    """Say why a provider cannot be used here, or return None where it seems it can."""
    runtime = onnxruntime()
    available = list(runtime.get_available_providers())
    if name not in available:
        return f"this onnxruntime was built with {', '.join(available)}"
    if name in (CUDA, TENSORRT):
        return _why_no_cuda(runtime)
    return None


def _why_no_cuda(runtime: Any) -> str | None:
    """The wheel lists CUDA on machines without it; ask the devices."""
    _preload(runtime)
    if os.name == "posix" and not any(Path(path).exists() for path in DEVICE_FILES):
        return "there is no NVIDIA device on this machine"
    return None


def _preload(runtime: Any) -> None:
    """Load the CUDA libraries that torch's CUDA wheels bring, where they were brought.

    ``preload_dlls`` prints what it does not find instead of raising, so it is asked only where there
    is something to find.
    """
    if hasattr(runtime, "preload_dlls") and importlib.util.find_spec("nvidia") is not None:
        runtime.preload_dlls()


def require(session: Any, runtime: Runtime) -> None:
    """Check that a session runs on what was asked for: the runtime falls back without a word.

    Raises:
        ProviderError: the first provider is not among the session's.
    """
    got = list(session.get_providers())
    if runtime.first not in got:
        raise _missing(runtime.first, f"onnxruntime fell back to {', '.join(got)}; its log above says why")


def _options(name: str, options: Mapping[str, Any]) -> Mapping[str, str]:
    defaults = CUDA_OPTIONS if name == CUDA else {}
    return {**defaults, **{key: str(value) for key, value in options.items()}}


def _missing(name: str, why: str) -> ProviderError:
    advice = 'Pass providers="auto" to take what is there.'
    if name in (CUDA, TENSORRT):
        advice += (
            " For CUDA: pip install 'lora_fx[gpu]', a driver, and the CUDA and cuDNN libraries "
            "(torch's CUDA wheels bring them)."
        )
    return ProviderError(f"provider {name!r}", expected="it to be usable here", got=why, advice=advice)
