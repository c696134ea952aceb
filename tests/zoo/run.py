"""Run the zoo: a process per model, with a limit in seconds; every row goes into a file of JSON lines.

``python -m tests.zoo.run --out artifacts/zoo/rows.jsonl [--match timm/*] [--workers 2]``; with ``--onnx``
the ONNX files are measured instead, with ``--roles`` the roles are perturbed, each into a file of its own.
Rows that the file already holds are not measured again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fnmatch
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401 - torchvision, where its operators do not load
from tests.zoo.catalogue import names
from tests.zoo.measure import Row, measure
from tests.zoo.measure_onnx import measure_onnx
from tests.zoo.measure_roles import measure_roles

MEASURES: dict[str, Callable[..., Row]] = {
    "stages": measure,
    "onnx": measure_onnx,
    "roles": measure_roles,
}
"""What can be measured of a model; a row of other than ``stages`` holds what was found under that name."""


def rows(path: Path) -> list[Row]:
    """Return what a file of JSON lines holds, the last row of each name."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in found:
        if not row["failed"] and _cut_short(row):
            row["failed"]["forward"] = "did not end"
    return list({row["name"]: row for row in found}.values())


def _cut_short(row: Row) -> bool:
    return not MEASURES.keys() & row.keys() and "verify" not in row["seconds"]


def run(todo: list[str], out: Path, *, what: str, workers: int, limit: float) -> None:
    """Measure these models, at most ``workers`` at a time, each at most ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(todo), dict[Connection, _Worker]()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        while waiting or running:
            while waiting and len(running) < workers:
                worker = _Worker(context, waiting.pop(0), what)
                running[worker.receiver] = worker
            for receiver in wait(list(running), timeout=1.0):
                running[receiver].read()  # type: ignore[index]
            for worker in list(running.values()):
                row = worker.row_if_over(limit)
                if row is not None:
                    del running[worker.receiver]
                    file.write(json.dumps(row) + "\n")
                    file.flush()


class _Worker:
    """One forked process and the last row that it told."""

    def __init__(self, context: Any, name: str, what: str) -> None:
        self.receiver, sender = context.Pipe(duplex=False)
        self.row: Row = {"name": name, "seconds": {}, "failed": {"build": "did not start"}}
        self.started, self.ended = time.monotonic(), False
        self.process = context.Process(target=_work, args=(name, what, sender), daemon=True)
        self.process.start()
        sender.close()

    def read(self) -> None:
        try:
            self.row = self.receiver.recv()
        except EOFError:
            self.ended = True

    def row_if_over(self, limit: float) -> Row | None:
        late = time.monotonic() - self.started > limit
        if not self.ended and not late:
            return None
        if not self.ended:
            self.process.kill()
        self.process.join()
        unfinished = [stage for stage, why in self.row["failed"].items() if why == "did not end"]
        for stage in unfinished:
            self.row["failed"][stage] = (
                f"did not end in {limit:.0f} s" if late else f"died ({self.process.exitcode})"
            )
        if not self.row["failed"] and _cut_short(self.row):
            self.row["failed"]["forward"] = "did not end" if late else "died"
        self.receiver.close()
        return {
            **self.row,
            "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
            "total": round(time.monotonic() - self.started, 2),
        }


def _work(name: str, what: str, sender: Connection) -> None:
    try:
        MEASURES[what](name, tell=sender.send)
    except BaseException:  # noqa: BLE001 - told to the parent
        sender.send({"name": name, "seconds": {}, "failed": {"harness": traceback.format_exc()[-600:]}})
    finally:
        sender.close()
        os._exit(0)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--match", nargs="*", default=["*"])
    parser.add_argument("--names", type=Path, help="a file with one name a line")
    other = parser.add_mutually_exclusive_group()
    for what, words in (("onnx", "measure the ONNX files"), ("roles", "perturb the roles")):
        other.add_argument(
            f"--{what}", dest="what", action="store_const", const=what, default="stages", help=words
        )
    parser.add_argument(
        "--again", choices=("built", "all"), help="measure failed rows again: those that built, all"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=90.0)
    given = parser.parse_args()
    _preload()
    known = {row["name"] for row in rows(given.out) if not _due(row, given.again)}
    listed = names() if given.names is None else given.names.read_text(encoding="utf-8").split()
    todo = [n for n in listed if n not in known and any(fnmatch.fnmatch(n, m) for m in given.match)]
    run(todo, given.out, what=given.what, workers=given.workers, limit=given.limit)


def _due(row: Row, again: str | None) -> bool:
    return bool(row["failed"]) and (again == "all" or (again == "built" and "build" not in row["failed"]))


def _preload() -> None:
    """Import what every worker needs once, before forking."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision.models  # noqa: F401
    import transformers
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto
    import transformers.models.gpt2.modeling_gpt2

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
