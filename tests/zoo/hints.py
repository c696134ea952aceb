"""What single model types need beside the general rules: a plain table.

``config``: fields (``part.field`` for those of a part); ``head``: the class to take; the other keys are
read by ``inputs.dummy_inputs``. A type with ``skip`` cannot be built here, and the text says why.
"""

from __future__ import annotations

from typing import Any

HINTS: dict[str, dict[str, Any]] = {}
