"""What is installed: one package, typed, with the passes inside it and nothing beside it."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_fx
import lora_fx.passes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, so that nothing is left in the tree or taken from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_fx", "passes"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(source)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys, pathlib; sys.path.insert(0, '.')\n"
        "import lora_fx, lora_fx.passes\n"
        "assert pathlib.Path(lora_fx.__file__).resolve().is_relative_to(pathlib.Path.cwd())\n"
        "assert 'onnxruntime' not in sys.modules, 'training must do without a runtime'\n"
        "assert all(callable(getattr(lora_fx, name)) for name in lora_fx.__all__)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)


def test_wheel_holds_one_typed_package(wheel_names: set[str]) -> None:
    assert {"lora_fx/__init__.py", "lora_fx/py.typed", "lora_fx/passes/__init__.py"} <= wheel_names
    top_level = {name.partition("/")[0] for name in wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"lora_fx"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_wheel_holds_every_module_of_the_tree(wheel_names: set[str]) -> None:
    """A subpackage that was not listed by hand in pyproject.toml would be left out silently."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_fx").rglob("*.py")}
    sources |= {f"lora_fx/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    assert sources == {name for name in wheel_names if name.endswith(".py")}


def test_passes_are_one_package_under_one_name() -> None:
    with pytest.raises(ImportError, match=r"import lora_fx\.passes"):
        importlib.import_module("passes")
    assert "passes" not in sys.modules
    assert importlib.import_module("lora_fx.passes") is lora_fx.passes


def test_passes_link_is_relative_and_committed_as_a_link() -> None:
    link = ROOT / "lora_fx" / "passes"
    assert link.is_symlink(), "a symlink is needed: git config core.symlinks true, then check out again"
    assert link.readlink() == Path("../passes")


def test_version_is_the_installed_one() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{lora_fx.__version__}"\n' in declared
