"""Recording costs at most three forwards, and roles at most twice the recording."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.passes.match import match
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import trace
from tests.benchmarks.table import Figure, Findings


def fastest(run: Callable[[], Any], times: int = 5) -> float:
    """Return the least of a few times, after one run that does not count."""
    run()
    found: list[float] = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def resnet50() -> tuple[nn.Module, Any]:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet50(), ((torch.randn(1, 3, 224, 224),), {})


def bert_base() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig())
    return model, ((), {"input_ids": torch.randint(0, 999, (1, 128))})


@pytest.mark.bench
@pytest.mark.parametrize("make", [resnet50, bert_base])
def test_recording_and_roles(make: Callable[[], tuple[nn.Module, Any]], findings: Findings) -> None:
    model, (args, kwargs) = make()
    model.eval()
    with torch.no_grad():
        forward = fastest(lambda: model(*args, **kwargs))
    recording = fastest(lambda: trace(model, (args, kwargs)))
    traced = trace(model, (args, kwargs))
    matching = fastest(lambda: match(traced))
    recordings = [trace(model, (args, kwargs)) for _ in range(6)]
    fresh = iter([(each, match(each)) for each in recordings])  # roles may keep what they find in a trace
    roles = fastest(lambda: assign_roles(*next(fresh)))
    print(f"\n{make.__name__}: forward {forward:.3f} s, recording {recording:.3f} s, match {matching:.3f} s")
    findings.check(Figure(f"recording of a {make.__name__}, in forwards", recording / forward, 3.0))
    findings.check(Figure(f"roles of a {make.__name__}, in recordings", roles / recording, 2.0))
