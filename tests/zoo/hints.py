"""What single model types need beside the general rules: a plain table.

``config``: fields (``part.field`` for those of a part); ``head``: the class to take; the other keys are
read by ``inputs.dummy_inputs``. A type with ``skip`` cannot be built here, and the text says why.
"""

from __future__ import annotations

from typing import Any

import torch

HINTS: dict[str, dict[str, Any]] = {
    "swin": {"config": {"window_size": 2, "image_size": 64}},
    "swinv2": {"config": {"window_size": 2}},
    "donut-swin": {"config": {"window_size": 2}},
    "codegen": {"config": {"n_head": 4, "rotary_dim": 4}},
    "gptj": {"config": {"rotary_dim": 8}},
    "audio-spectrogram-transformer": {
        "config": {"max_length": 64, "num_mel_bins": 32},
        "main": "input_values",
        "inputs": lambda _: {"input_values": torch.randn(2, 64, 32)},
    },
}
