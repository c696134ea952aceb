"""When the fused operations may run: plain tensors in plain eager mode, and nothing that looks inside.

Everything else (torch.compile and torch.export, function transforms, forward-mode derivatives, tensor
subclasses, modes that record calls) gets the plain composition, which any of them can see through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_torch: Any = vars(torch)["_C"]
_jit: Any = torch.jit
_forward_ad: Any = forward_ad
_overrides: Any = torch.overrides
_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer, type(None)})


def plain_eager(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether a call on ``x`` and weights runs in plain eager mode and is seen by nobody."""
    # is_compiling comes first: compilers take the answer for a constant and read no further.
    if torch.compiler.is_compiling() or _torch._are_functorch_transforms_active():
        return False
    if _jit.is_tracing() or _forward_ad._current_level >= 0:
        return False
    if _torch._len_torch_function_stack() and _recorded():
        return False
    if type(x) not in _PLAIN or not _PLAIN.issuperset(map(type, others)):
        return False
    return x.layout is torch.strided and not x.is_nested


def _recorded() -> bool:
    """Say whether a mode other than ``with torch.device(...)`` sees every call."""
    modes = _overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, DeviceContext) for mode in modes)


_HALF = frozenset({torch.float16, torch.bfloat16})


def widens(x: Tensor, a: Tensor) -> bool:
    """Say whether products of ``x`` with ``a`` are to be in float32, of which ``x`` is half.

    Under autocast they are in its dtype, as everything else there.
    """
    return x.dtype in _HALF and a.dtype is torch.float32 and autocast_dtype(x) is None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast would compute a product of ``x`` in, or None outside autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(kind)
