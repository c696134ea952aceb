"""The command line, called as a function: what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.cli import main
from lora_fx.policy import Policy, Rule
from tests.unit.peft_cases import MODELS, by_peft, randomise

EXAMPLE = torch.ones(2, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the base with the adapter folded in."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Net().eval()
    lora_fx.export_onnx(model, folder / "base.onnx", EXAMPLE)
    lora_fx.inject(model, Policy(Rule(name="first.*", rank=2)), EXAMPLE)
    randomise(model)
    lora_fx.save_adapter(model, folder / "task.safetensors")
    assert main(["fold", *paths(folder, "base.onnx", "task.safetensors", "folded.onnx")]) == 0
    return folder


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def test_it_is_installed_under_its_name():
    data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert data["project"]["scripts"] == {"lora-fx": "lora_fx.cli:main"}


@pytest.mark.parametrize("name", ["task.safetensors", "folded.onnx"])
def test_audit_prints_a_table_or_json(files, name, capsys):
    assert main(["audit", *paths(files, name)]) == 0
    assert "first.weight" in capsys.readouterr().out
    assert main(["audit", "--json", *paths(files, name)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    [adapted] = [row for row in rows if row["action"] == "adapt"]
    assert adapted["name"] == "first.weight"
    assert adapted["delta"] > 0


@pytest.mark.parametrize("name", ["none.onnx", "none.safetensors"])
def test_audit_of_no_file_says_so(name, tmp_path, capsys):
    assert main(["audit", str(tmp_path / name)]) == 2
    assert f"{name}: expected" in (said := capsys.readouterr().err)
    assert "got no such file" in said
    assert "Errno" not in said


@pytest.mark.parametrize(
    ("name", "config", "kinds"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, {"linear"}),
        (
            "lookup",
            {"target_modules": ["embed", "fc"], "bias": "lora_only"},
            {"linear", "embedding", "parameter"},
        ),
        (
            "convs",
            {"target_modules": ["two", "head"], "modules_to_save": ["norm"]},
            {"linear", "conv", "parameter"},
        ),
        ("attention", {"target_modules": ["mha"]}, {"attention"}),
    ],
)
def test_audit_of_a_peft_folder(name, config, kinds, tmp_path, capsys):
    pytest.importorskip("peft", exc_type=ImportError)
    by_peft(MODELS[name]()[0], tmp_path, r=3, **config)
    assert main(["audit", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in found["rows"]} == kinds
    assert {row["ranks"][""] for row in found["rows"] if row["action"] == "adapt"} == {3}
    assert any("no fingerprint" in note for note in found["notes"])


def test_a_peft_folder_of_parameters_needs_its_model(tmp_path, capsys):
    pytest.importorskip("peft", exc_type=ImportError)
    by_peft(MODELS["mixture"]()[0], tmp_path, target_modules=["fc"], target_parameters=["experts.up"])
    assert main(["audit", str(tmp_path)]) == 2
    assert "target_parameters" in capsys.readouterr().err


def test_fold_overlay_standalone_and_certificate(files, tmp_path, capsys):
    out = files / "standalone.onnx"
    asked = [*paths(files, "base.onnx", "task.safetensors"), str(out), "--standalone", "--json"]
    assert main(["fold", *asked]) == 0
    assert all(check["ok"] for check in json.loads(capsys.readouterr().out)["checks"])
    assert main(["certify", *paths(files, "base.onnx"), str(out)]) == 0
    assert "structure" in capsys.readouterr().out


def test_a_failing_certificate_is_status_1(files, capsys):
    # The base against itself: nothing was changed, so it is not the adapter's folded file.
    asked = paths(files, "base.onnx", "base.onnx")
    assert main(["certify", *asked, "--adapter", *paths(files, "task.safetensors")]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["certify", "--json", *asked, "--adapter", *paths(files, "task.safetensors")]) == 1
    assert not all(check["ok"] for check in json.loads(capsys.readouterr().out)["checks"])


def test_compare_latency(files, capsys):
    asked = [*paths(files, "base.onnx", "folded.onnx"), "--seconds", "0.2", "--providers", "cpu", "--json"]
    status = main(["compare-latency", *asked])
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] in {"equal", "not resolved", "different"}
    assert status == (1 if found["verdict"] == "different" else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "{}/none.safetensors"], "no such file"),
        (["audit", "{}/none.onnx"], "none.onnx"),
        (["audit", "{}/base.onnx"], "without a plan"),
        (["audit", "{}"], "adapter_config.json"),
        (["certify", "{}/base.onnx", "{}/none.onnx"], "none.onnx"),
        (["certify", "{}/task.safetensors", "{}/base.onnx"], "task.safetensors"),
        (["fold", "{}/base.onnx", "{}/base.onnx", "{}/x.onnx"], "base.onnx"),
        (["compare-latency", "{}/none.onnx", "{}/base.onnx", "--seconds", "0.1"], "none.onnx"),
        (["compare-latency", "{}/base.onnx", "{}/base.onnx", "--providers", "abacus"], "abacus"),
    ],
)
def test_errors_are_one_line_and_status_2(files, arguments, message, capsys):
    assert main([argument.format(files) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("lora-fx: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_fold_of_a_peft_folder_says_what_to_do(files, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["fold", *paths(files, "base.onnx"), str(tmp_path), str(tmp_path / "x.onnx")]) == 2
    assert "save_adapter" in capsys.readouterr().err


def test_fold_of_a_checkpoint(files, tmp_path, capsys):
    torch.manual_seed(0)
    model = Net().eval()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = str(files / "task.safetensors")
    asked = ["fold", str(tmp_path / "base"), adapter, str(tmp_path / "out")]
    assert main([*asked, "--json"]) == 0
    [row] = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["action"] == "adapt"]
    assert row["delta"] > 0
    lora_fx.fold(lora_fx.load_adapter(model, adapter))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["first.weight"], model.first.weight)
    single = str(tmp_path / "base" / "model.safetensors")
    assert main(["fold", single, adapter, str(tmp_path / "out.safetensors")]) == 0
    assert "first.weight" in capsys.readouterr().out
    for more, message in (([], "empty"), (["--standalone"], "standalone")):
        assert main([*asked, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fold"],
        ["no-such-command"],
        ["compare-latency", "a.onnx", "b.onnx", "--threads", "0"],
        ["compare-latency", "a.onnx", "b.onnx", "--threads", "two"],
        ["compare-latency", "a.onnx", "b.onnx", "--seconds", "nan"],
    ],
)
def test_bad_arguments_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lora_fx", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"lora_fx {lora_fx.__version__}"
