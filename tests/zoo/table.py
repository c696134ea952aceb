"""Write RESULTS.md from the rows of one or more runs: ``python -m tests.zoo.table FILE... > RESULTS.md``."""

from __future__ import annotations

import datetime as dt
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.measure import Row
from tests.zoo.run import rows

STAGES = ("inject", "fold", "step", "roundtrip", "verify")
TIMES = ("forward", "trace", "inject", "verify")


def table(found: Sequence[Row]) -> str:
    """Return the whole page."""
    built = [row for row in found if "build" not in row["failed"] and "harness" not in row["failed"]]
    unbuilt = [row for row in found if row not in built]
    parts = [_head(built, unbuilt), _rows(built), _reds(built), _shortfalls(built), _unbuilt(unbuilt)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(built: Sequence[Row], unbuilt: Sequence[Row]) -> str:
    shares = [row["share"] for row in built if row.get("share") is not None]
    ratios = [row["seconds"]["trace"] / row["seconds"]["forward"] for row in built if _timed(row)]
    green = [row for row in built if not row["failed"]]
    sites = sum(row.get("sites", 0) for row in built)
    verified = sum(row.get("sites", 0) for row in built if not row["failed"])
    forms: Counter[str] = Counter()
    for row in built:
        forms.update(row.get("forms", {}))
    traced = sum("trace" in row["seconds"] and "trace" not in row["failed"] for row in built)
    onnx = [row for row in built if "onnx" in row["seconds"] or "onnx" in row["failed"]]
    per = Counter(row["name"].partition("/")[0] for row in built)
    intro = (
        f"Measured {dt.datetime.now(dt.UTC):%Y-%m-%d}, on the CPU, one thread a model, on a machine",
        "shared with other work (read the seconds against each other). Random weights, tiny configurations.",
        "The policy asks for everything: `Policy(Rule(rank=2))`. `make zoo` measures again, and a row that",
        "a file already holds is kept: rows of one table may come from successive commits.",
    )
    share = f"{statistics.median(shares):.4f}, {statistics.mean(shares):.4f}"
    exported = sum("onnx" not in r["failed"] for r in onnx)
    facts = {
        "models that build here": f"{len(built)}: {', '.join(f'{n} {k}' for k, n in sorted(per.items()))}",
        "traced": f"{traced} of {len(built)}",
        "green up to fold, round trip and verify": f"{len(green)} of {len(built)}",
        "adapted sites, and those in green rows": f"{sites}, {verified}",
        "adapted share of what full fine-tuning moves: median, mean": share,
        "models with a share of at least 0.98": f"{sum(s >= 0.98 for s in shares)} of {len(shares)}",
        "sites by form": ", ".join(f"{k} {n}" for k, n in forms.most_common()),
        "recording, in forwards (median)": f"{statistics.median(ratios):.1f}",
        "ONNX exported and certified": f"{exported} of {len(onnx)} tried",
        "catalogued but not built here (see below)": str(len(unbuilt)),
    }
    lines = ["# The zoo", "", "\n".join(intro), "", "| | |", "|---|---|"]
    lines += [f"| {what} | {figure} |" for what, figure in facts.items()]
    return "\n".join(lines)


def _timed(row: Row) -> bool:
    seconds = row["seconds"]
    return bool(seconds.get("forward")) and "trace" in seconds and "trace" not in row["failed"]


def _rows(built: Sequence[Row]) -> str:
    intro = (
        "`share`: of the elements of parameters of two or more dimensions that get a gradient in full",
        "fine-tuning, those that are adapted. `branch`: sites in branch form. `64` behind verify: float32",
        "lost more than 1e-5 in this random network, and float64 held to 1e-10. Seconds: forward, trace,",
        "inject with its probe, verify. `–`: not tried.",
    )
    titles = ("model", "class", "parameters", "sites", "share", "branch", *STAGES, "ONNX", *TIMES)
    lines = [
        "## Every model",
        "",
        "\n".join(intro),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in sorted(built, key=lambda r: r["name"]):
        marks = [_mark(row, stage) for stage in (*STAGES, "onnx")]
        if row.get("float64") and marks[4] == "ok":
            marks[4] = "ok 64"
        share = row.get("share")
        forms = row.get("forms", {})
        total = sum(forms.values())
        cells = [
            row["name"],
            row.get("class", ""),
            str(row.get("parameters", "")),
            str(row.get("sites", "")),
            "" if share is None else f"{share:.3f}",
            f"{forms.get('branch', 0) / total:.0%}" if total else "",
            *marks,
            *(f"{row['seconds'][s]:.3f}" if s in row["seconds"] else "" for s in TIMES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mark(row: Row, stage: str) -> str:
    if stage in row["failed"]:
        return "**red**"
    return "ok" if stage in row["seconds"] else "–"


def _reds(built: Sequence[Row]) -> str:
    lines = ["## Red rows, and why", ""]
    for row in sorted(built, key=lambda r: r["name"]):
        lines += [f"* {row['name']}, {stage}: {_short(why)}" for stage, why in row["failed"].items()]
    return "\n".join(lines if len(lines) > 2 else [*lines, "None."])


def _short(why: str) -> str:
    return why.replace("|", "/").replace("<", "‹")[:260]


def _shortfalls(built: Sequence[Row]) -> str:
    lines = ["## Shares below 0.98, and where the rest is", ""]
    for row in sorted(built, key=lambda r: r.get("share") or 0):
        if (row.get("share") or 0) < 0.98 and row.get("shortfall"):
            why = "; ".join(
                f"{share:.3f} {_short(reason)[:140]}" for reason, share in row["shortfall"].items()
            )
            lines.append(f"* {row['name']} {row['share']:.3f}: {why}")
    return "\n".join(lines)


def _unbuilt(unbuilt: Sequence[Row]) -> str:
    if not unbuilt:
        return ""
    lines = ["## In the catalogue, but not built by the general rules", ""]
    lines.append(
        "These need a configuration or inputs of their own (`hints.py`), or a library that is not installed; "
        "nothing of lora_fx ran on them.\n"
    )
    for row in sorted(unbuilt, key=lambda r: r["name"]):
        why = row["failed"].get("build") or row["failed"].get("harness", "")
        lines.append(f"* {row['name']}: {_short(why)[:150]}")
    return "\n".join(lines)


if __name__ == "__main__":
    read = [row for path in sys.argv[1:] for row in rows(Path(path))]
    sys.stdout.write(table(list({row["name"]: row for row in read}.values())))
