"""The training step on a GPU: times between CUDA events, peaks of its allocator."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.arms import Setup
from tests.benchmarks.models import CASES
from tests.benchmarks.rows import measure, summary
from tests.benchmarks.table import Findings


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu(name: str, precision: str, findings: Findings) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    row = measure(Setup(CASES[name], precision=precision, device="cuda"), seconds=10.0)
    print("\n" + summary(row))
    findings.rows.append(row)
    assert not row.slower_than_peft(), summary(row)
    assert row.over(row.saved, "lora_fx") <= row.saved_limit, summary(row)
