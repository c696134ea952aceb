"""The paired comparison: its statistics on known times, its verdict by the rule, one real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_fx.cli import main
from lora_fx.errors import InputError
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
    assert found.difference == ""
    assert "the graphs are the same" in str(found).replace("\n", " ")


def test_another_graph_is_told(tmp_path: Path) -> None:
    for name, op in (("a", "Softmax"), ("b", "LogSoftmax")):
        text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[B,64] x) => (float[B,64] y) {{ y = {op} (x) }}
        """
        onnx.save(onnx.parser.parse_model(text), tmp_path / f"{name}.onnx")
    found = compare_latency(tmp_path / "a.onnx", tmp_path / "b.onnx", seconds=0.2, sets=2, providers="cpu")
    told = "the base has Softmax (node 'y' (Softmax)), this file has LogSoftmax"
    assert found.difference.endswith(told)
    shown = " ".join(str(found).split())
    assert "the graphs differ at node 'y'" in shown
    assert told in shown
    assert json.loads(found.to_json())["difference"] == found.difference


@pytest.fixture
def softmax(tmp_path: Path) -> Path:
    for name, value in (("a", "x"), ("b", "z")):
        text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[B,64] {value}) => (float[B,64] y) {{ y = Softmax ({value}) }}
        """
        onnx.save(onnx.parser.parse_model(text), tmp_path / f"{name}.onnx")
    return tmp_path


def test_files_of_other_inputs_are_named(softmax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(softmax / "a.onnx"), str(softmax / "b.onnx")]
    assert main(["compare-latency", *files, "--seconds", "0.1", "--providers", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "b.onnx: expected the inputs of a.onnx: x tensor(float)[B, 64]; got z tensor(float)[B, 64]" in said


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        pytest.param({"foo": np.zeros((2, 64), np.float32)}, "got foo", id="name"),
        pytest.param({}, "got none", id="nothing"),
        pytest.param({"x": np.zeros((2, 63), np.float32)}, "got x tensor(float)[2, 63]", id="shape"),
        pytest.param({"x": np.zeros((2, 64), np.float64)}, "got x tensor(double)[2, 64]", id="type"),
        pytest.param({"x": [1.0]}, "a numpy array", id="no-array"),
    ],
)
def test_wrong_inputs_are_named(softmax: Path, inputs: dict[str, object], got: str) -> None:
    path = softmax / "a.onnx"
    with pytest.raises(InputError, match="inputs") as caught:
        compare_latency(path, path, inputs=inputs, seconds=0.1, providers="cpu")  # type: ignore[arg-type]
    assert got in str(caught.value)
