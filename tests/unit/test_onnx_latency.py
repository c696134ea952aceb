"""The paired comparison: its statistics on known times, its verdict by the rule, one real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_fx.latencies import Latency, Ratio
from lora_fx.passes.compare_latency import compare_latency, ratio_of


def record(ratio: Ratio, control: Ratio) -> Latency:
    return Latency("base.onnx", "folded.onnx", ratio, control, 1e-3, 1e-3, 100, "CPUExecutionProvider", 1)


@pytest.mark.parametrize(
    ("ratio", "control", "verdict"),
    [
        pytest.param((0.99, 1.01), (0.99, 1.01), "equal", id="equal"),
        pytest.param((0.98, 1.02), (0.99, 1.02), "equal", id="on-the-bounds"),
        pytest.param((0.97, 1.01), (0.99, 1.01), "not resolved", id="too-wide-below"),
        pytest.param((0.99, 1.03), (0.99, 1.01), "not resolved", id="too-wide-above"),
        pytest.param((0.99, 1.01), (0.97, 1.03), "not resolved", id="control-too-wide"),
        pytest.param((0.99, 1.01), (1.03, 1.04), "not resolved", id="control-off"),
        pytest.param((1.05, 1.08), (0.99, 1.01), "different", id="slower"),
        pytest.param((0.90, 0.95), (0.99, 1.01), "different", id="faster"),
        pytest.param((1.05, 1.08), (1.04, 1.07), "not resolved", id="control-as-far-off"),
    ],
)
def test_verdict(ratio: tuple[float, float], control: tuple[float, float], verdict: str) -> None:
    made = record(Ratio(sum(ratio) / 2, *ratio), Ratio(sum(control) / 2, *control))
    assert made.verdict == verdict
    assert json.loads(made.to_json())["verdict"] == verdict
    assert verdict in str(made)


@pytest.mark.parametrize("true", [1.0, 1.05])
def test_interval_covers_the_true_ratio(true: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        drift = np.cumsum(random.normal(0, 0.01, 400))
        ratios = true * np.exp(random.normal(0, 0.03, 400) + 0.2 * np.diff(drift, prepend=0))
        interval = ratio_of(ratios)
        covered += interval.low <= true <= interval.high
        assert interval.half_width < 0.02
    assert covered >= 34


def test_real_files(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    main (float[B,64] x) => (float[B,64] y) { y = Softmax (x) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    found = compare_latency(tmp_path / "a.onnx", tmp_path / "a.onnx", seconds=0.2, providers="cpu")
    assert found.rounds >= 64
    assert 0.5 < found.ratio.value < 2
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.verdict in ("equal", "not resolved", "different")
