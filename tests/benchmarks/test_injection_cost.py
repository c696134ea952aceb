"""Injection of a model of GPT-3's shape on the meta device: the rewrite alone, and the recording apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.benchmarks.table import Figure, Findings

LAYERS, WIDTH = 96, 12288
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Block(nn.Module):
    """Attention of 96 heads and a feed-forward of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            p(y).unflatten(-1, (96, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def gpt3() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(Block() for _ in range(LAYERS)))


def fastest(run: Callable[[nn.Module], Any], times: int = 3) -> float:
    """The least CPU time of a few runs, each on a model of its own."""
    found: list[float] = []
    for _ in range(times):
        model = gpt3()
        started = time.process_time()
        run(model)
        found.append(time.process_time() - started)
    return min(found)


def _peft(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS)))


@pytest.mark.bench
def test_rewriting_384_sites(findings: Findings) -> None:
    policy = lora_fx.Policy(lora_fx.Rule(module=TARGETS, rank=16))
    decided = lora_fx.plan(gpt3(), policy)
    assert len(decided.adapted) == 4 * LAYERS
    ours = fastest(lambda model: lora_fx.inject(model, decided, seed=0))
    theirs = fastest(_peft)
    findings.check(Figure("inject, 384 sites of GPT-3's shape on meta, rewrite only", ours, 2.0, " s"))
    findings.check(Figure("the same, peft's time over lora_fx's", theirs / ours, 10.0, "x", least=True))


@pytest.mark.bench
def test_recording_and_rewriting_384_sites(findings: Findings) -> None:
    policy = lora_fx.Policy(lora_fx.Rule(module=TARGETS, rank=16))
    x = torch.zeros(1, 8, WIDTH, device="meta")
    recording = fastest(lambda model: lora_fx.trace(model, x), 1)
    whole = fastest(lambda model: lora_fx.inject(model, policy, x, seed=0), 1)
    findings.check(Figure("the recording apart: trace of it", recording, unit=" s"))
    findings.check(Figure("trace, match, roles, plan and rewrite of it", whole, unit=" s"))
