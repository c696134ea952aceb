"""Folding a BERT-base-sized model, beside peft's merge and the products alone."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.registers import own_parameters
from tests.benchmarks.models import bert
from tests.benchmarks.table import Figure, Findings

RANK, ROUNDS = 16, 7
TARGETS = r".*(query|key|value|dense)"


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _folding(base: nn.Module) -> Callable[[], object]:
    model = copy.deepcopy(base)
    rule = lora_fx.Rule(name=f"re:{TARGETS}\\.weight", rank=RANK)
    lora_fx.inject(model, lora_fx.Policy(rule), seed=0)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_(0, 0.01)
    return lambda: lora_fx.fold(model)


def _merging(base: nn.Module) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    wrapped = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.01)
    return wrapped.merge_and_unload


def _products(base: nn.Module) -> Callable[[], object]:
    """The limit: ``W += B A`` of every adapted weight, and nothing else."""
    model = copy.deepcopy(base)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("query", "key", "value", "dense"):
            weight = own_parameters(module)["weight"]
            assert weight is not None
            rows, columns = weight.shape
            pairs.append((weight.data, torch.randn(rows, RANK), torch.randn(RANK, columns)))
    assert len(pairs) == 72

    def run() -> None:
        for weight, b, a in pairs:
            weight.addmm_(b, a)

    return run


@pytest.mark.bench
def test_folding_costs_little_more_than_its_products(findings: Findings) -> None:
    base = bert(layers=12)
    seconds: dict[str, list[float]] = {"fold": [], "peft": [], "limit": []}
    for _ in range(ROUNDS):
        for name, prepare in (("fold", _folding), ("peft", _merging), ("limit", _products)):
            seconds[name].append(_seconds(prepare(base)))
    fold, peft, limit = (statistics.median(seconds[name][1:]) for name in ("fold", "peft", "limit"))
    print(f"\nfold {fold * 1e3:.1f} ms, peft's merge {peft * 1e3:.1f} ms, products {limit * 1e3:.1f} ms")
    findings.check(Figure("fold of a BERT-base, over the time of its products alone", fold / limit, 1.5, "x"))
    findings.check(Figure("peft's merge of it, over fold's time", peft / fold, 2.5, "x", least=True))
