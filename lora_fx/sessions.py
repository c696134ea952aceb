"""Sessions: an ONNX file in ONNX Runtime, on the provider that was asked for, with or without an adapter."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_fx.adapter_file import AdapterFile
from lora_fx.errors import BaseMismatchError, ProviderError
from lora_fx.fingerprints import BaseCheck
from lora_fx.passes import onnx_files, onnx_session
from lora_fx.passes.onnx_metadata import BASE_DATA_KEY, read_data
from lora_fx.passes.onnx_serve import adapted_session
from lora_fx.providers import Providers, Runtime, choose


def session(
    path: str | Path,
    *,
    providers: Providers = "auto",
    adapter: str | Path | AdapterFile | None = None,
    threads: int | None = None,
    share_weights: bool = False,
    base_check: BaseCheck = "exact",
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of a file, or of a base with an adapter folded in.

    ``providers`` is ``"auto"`` (CUDA where there is a device, else the CPU), ``"cuda"``, ``"tensorrt"``,
    ``"cpu"``, or onnxruntime's own names and options, in order of preference. With ``adapter`` the file
    is a base: the adapter's weights are computed in memory, the others stay in the base's data file, and
    each adapter has its own session, so that switching is choosing one. ``share_weights`` has all of
    them use one copy of the base's weights, which on a CPU costs some speed.

    Raises:
        ExportError: there is no such file, or the adapter cannot be folded into it.
        BaseMismatchError: the adapter was made for another base, or an overlay lies over other data.
        ProviderError: the provider asked for is not there, the runtime fell back from it, or it lacks an
            operator in the file's precision.
    """
    file = Path(path)
    onnx_files.require_file(file)
    runtime = choose(providers)
    with _named_kernels(file, runtime):
        if adapter is not None:
            return adapted_session(
                file, adapter, runtime, threads=threads, share_weights=share_weights, base_check=base_check
            )
        _check_data(file)
        entries = {"session.disable_prepacking": "1"} if share_weights else None
        options = onnx_session.options(threads=threads, entries=entries)
        return onnx_session.open_session(file, runtime, session_options=options)


@contextmanager
def _named_kernels(file: Path, runtime: Runtime) -> Generator[None]:
    """Say in our own words that the provider lacks an operator, as the CPU's do in bfloat16."""
    try:
        yield
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        raise ProviderError(
            str(file),
            expected=f"operators that {runtime.first} computes in the file's precision",
            got=str(error).strip().splitlines()[0],
            advice="Choose another provider, or export in float32 or float16.",
        ) from error


def _check_data(file: Path) -> None:
    """Refuse an overlay whose base data is gone or of another size (``certify`` compares its hash)."""
    for data in read_data(onnx_files.load(file).metadata_props, BASE_DATA_KEY):
        path = file.parent / data.name
        if not path.is_file() or path.stat().st_size != data.size:
            raise BaseMismatchError(
                str(file),
                expected=f"its base's data {data.name} with {data.size} bytes",
                got="another size" if path.is_file() else "no such file",
                advice="Keep an overlay together with its base, or fold with standalone=True.",
            )
