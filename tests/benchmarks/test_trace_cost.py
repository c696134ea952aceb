"""Recording costs at most three forwards, on models of the size of a ResNet-50 and a BERT-base."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.passes.match import match
from lora_fx.passes.trace import trace

LIMIT = 3.0


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
def test_recording_costs_at_most_three_forwards(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, (args, kwargs) = make()
    model.eval()
    with torch.no_grad():
        forward = fastest(lambda: model(*args, **kwargs))
    recording = fastest(lambda: trace(model, (args, kwargs)))
    traced = trace(model, (args, kwargs))
    matching = fastest(lambda: match(traced))
    ratio = recording / forward
    print(f"\n{make.__name__}: forward {forward:.3f} s, trace {ratio:.2f}x, match {matching:.3f} s")
    assert ratio <= LIMIT
