"""Write RESULTS.md from the rows of one or more runs: ``python -m tests.zoo.table FILE... > RESULTS.md``.

Rows of ``tests.zoo.run --onnx`` are told from the others by what they hold, and joined to them by name.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.measure import ROUNDINGS, Row
from tests.zoo.run import rows

STAGES = ("inject", "fold", "step", "roundtrip", "verify")
TIMES = ("forward", "trace", "inject", "verify")
OWN_SIZE = ("timm/", "torchvision/")
"""Libraries whose models are in the zoo in a size that they are used in; of the others, tiny ones."""


def table(found: Sequence[Row]) -> str:
    """Return the whole page."""
    built = [row for row in found if "build" not in row["failed"] and "harness" not in row["failed"]]
    unbuilt = [row for row in found if row not in built]
    parts = [
        _head(built, unbuilt),
        _rows(built),
        _roundings(built),
        _reds(built),
        _onnx_reds(built),
        _shortfalls(built),
        _unbuilt(unbuilt),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def joined(found: Sequence[Row]) -> list[Row]:
    """Return one row of each name: the last of each kind, what ONNX gave under ``files``."""
    plain = {row["name"]: row for row in found if "onnx" not in row}
    files = {row["name"]: row for row in found if "onnx" in row}
    return [{**row, "files": files[name]} if name in files else row for name, row in plain.items()]


def _head(built: Sequence[Row], unbuilt: Sequence[Row]) -> str:
    shares = [row["share"] for row in built if row.get("share") is not None]
    own = [row for row in built if row["name"].startswith(OWN_SIZE)]
    tiny = [row for row in built if not row["name"].startswith(OWN_SIZE)]
    green = [row for row in built if not row["failed"]]
    sites = sum(row.get("sites", 0) for row in built)
    verified = sum(row.get("sites", 0) for row in built if not row["failed"])
    forms: Counter[str] = Counter()
    for row in built:
        forms.update(row.get("forms", {}))
    traced = sum("trace" in row["seconds"] and "trace" not in row["failed"] for row in built)
    tried = Counter(_exported(row) for row in built)
    errors = [
        row["files"]["onnx"]["error"] for row in built if "error" in row.get("files", {}).get("onnx", {})
    ]
    certified = sum(_certified(row) == "ok" for row in built)
    per = Counter(row["name"].partition("/")[0] for row in built)
    intro = (
        f"Measured {_dates(built)}; the ONNX files {_dates([r['files'] for r in built if 'files' in r])};",
        "on the CPU, one thread a model, on a machine",
        "shared with other work (read the seconds against each other). Random weights; of transformers and",
        "diffusers, tiny configurations.",
        "The policy asks for everything: `Policy(Rule(rank=2))`. `make zoo` measures again, and a row that",
        "a file already holds is kept: rows of one table may come from successive commits.",
    )
    share = f"{statistics.median(shares):.4f}, {statistics.mean(shares):.4f}"
    facts = {
        "models that build here": f"{len(built)}: {', '.join(f'{n} {k}' for k, n in sorted(per.items()))}",
        "traced": f"{traced} of {len(built)}",
        "green up to fold, round trip and verify": f"{len(green)} of {len(built)}",
        "adapted sites, and those in green rows": f"{sites}, {verified}",
        "adapted share of what full fine-tuning moves: median, mean": share,
        "models with a share of at least 0.98": f"{sum(s >= 0.98 for s in shares)} of {len(shares)}",
        "sites by form": ", ".join(f"{k} {n}" for k, n in forms.most_common()),
        "recording, in forwards (median), of models at their own size (see below)": _recording(own),
        "recording, in forwards (median), of tiny configurations (see below)": _recording(tiny),
        "ONNX: bases that are exported and run": f"{tried['ok'] + tried['**red**']}",
        "ONNX: of these exported here, folded and certified": str(certified),
        "ONNX: refused upstream, too large or too slow, not tried": ", ".join(
            str(tried[k]) for k in ("upstream", "large", "slow", "–")
        ),
        "ONNX: error of onnxruntime against the folded model: median, largest": (
            f"{statistics.median(errors):.1e}, {max(errors):.1e}" if errors else "–"
        ),
        "catalogued but not built here (see below)": str(len(unbuilt)),
    }
    lines = ["# The zoo", "", "\n".join(intro), "", "| | |", "|---|---|"]
    lines += [f"| {what} | {figure} |" for what, figure in facts.items()]
    return "\n".join([*lines, "", "\n".join(_RECORDING)])


_RECORDING = (
    "Recording: the faster of two `lora_fx.trace` calls, with nothing matched and no roles found, over the",
    "fastest of three forwards under `no_grad`, both warm. At their own size are those of timm and",
    "torchvision: the smallest member of each family in its usual width and depth, on images of 64 pixels",
    "where it takes them, so that a forward is shorter than usual. Those of transformers and diffusers are",
    "tiny configurations: their forwards do next to no arithmetic, and a recorder that writes down nodes",
    "without arguments or facts takes 1.6 to 3.7 forwards by itself. A BERT-base on 128 tokens and a",
    "ResNet-50 on an image of 224 pixels are in tests/benchmarks.",
)


def _recording(rows: Sequence[Row]) -> str:
    ratios = [row["seconds"]["trace"] / row["seconds"]["forward"] for row in rows if _timed(row)]
    return f"{statistics.median(ratios):.1f} ({len(ratios)} models)" if ratios else "–"


def _dates(rows: Sequence[Row]) -> str:
    counted = Counter(row["date"] for row in rows if "date" in row)
    return ", ".join(f"{day} ({count} rows)" for day, count in sorted(counted.items())) or "on no known day"


def _exported(row: Row) -> str:
    """Say whether the base became a file: ok, upstream's fault, ours, too large, too slow, not tried."""
    files = row.get("files")
    if files is None or "build" in files["failed"]:
        return "–"
    if "skipped" in files["onnx"]:
        return "large"
    if files["onnx"].get("exported"):
        return "ok"
    if "upstream" in files["onnx"]:
        return "upstream"
    return "slow" if any("did not end" in why for why in files["failed"].values()) else "**red**"


def _certified(row: Row) -> str:
    """Say whether the folded file's certificate holds."""
    if _exported(row) != "ok":
        return "–"
    if "onnx" not in row["files"]["failed"]:
        return "ok"
    return "slow" if "did not end" in row["files"]["failed"]["onnx"] else "**red**"


def _timed(row: Row) -> bool:
    seconds = row["seconds"]
    return bool(seconds.get("forward")) and "trace" in seconds and "trace" not in row["failed"]


def _rows(built: Sequence[Row]) -> str:
    intro = (
        "`share`: of the elements of parameters of two or more dimensions that get a gradient in full",
        "fine-tuning, those that are adapted. `branch`: sites in branch form. `64` behind verify: float32",
        "lost more than 1e-5 in this random network, and float64 held to 1e-10; `r`: it does not in float64",
        "either, see below the table. Seconds: forward, trace, inject with its probe, verify. `–`: not",
        "tried. ONNX: whether the base is exported (`upstream`:",
        "torch's exporter or onnxruntime fails on it by itself; `large`: more parameters than are exported",
        "here; `slow`: did not end in its time), whether the folded file's certificate holds, and the",
        "largest error of onnxruntime on it against the folded model in float64 (in its own dtype for an",
        "output that float64 is no reference for).",
    )
    files = ("exported", "certificate", "parity")
    titles = ("model", "class", "parameters", "sites", "share", "branch", *STAGES, *files, *TIMES)
    lines = [
        "## Every model",
        "",
        "\n".join(intro),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in sorted(built, key=lambda r: r["name"]):
        marks = [_mark(row, stage) for stage in STAGES]
        if row.get("float64") and marks[4] == "ok":
            marks[4] = "ok 64"
        for stage in row.get("rounding", {}):
            marks[STAGES.index(stage)] += " r"
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
            _exported(row),
            _certified(row),
            f"{row['files']['onnx']['error']:.0e}" if "error" in row.get("files", {}).get("onnx", {}) else "",
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


def _roundings(built: Sequence[Row]) -> str:
    """Return which rows were held to what the base's own rounding does, and to how much."""
    found = [row for row in sorted(built, key=lambda r: r["name"]) if row.get("rounding")]
    if not found:
        return ""
    intro = (
        "These random networks lose more than six of float64's sixteen digits by themselves. On the",
        "model without adapters, the changed weights written into it: every weight is moved by -1, 0 or",
        "1 units of its last place, twice over; the outputs (fold) and each gradient (verify) may differ by",
        f"{ROUNDINGS:.0f} times the largest relative change seen, and never by more than float32 may (1e-5,",
        "gradients 1e-4).",
    )
    lines = ["## Rows that no float64 holds to 1e-10", "", "\n".join(intro), ""]
    for row in found:
        figures = (
            f"{stage} differs by {d:.1e}, allowed {m:.1e}" for stage, (d, m) in row["rounding"].items()
        )
        lines.append(f"* {row['name']}: {'; '.join(figures)}")
    return "\n".join(lines)


def _onnx_reds(built: Sequence[Row]) -> str:
    tried = [row for row in built if "files" in row]
    lines = ["## ONNX: what does not get through, and why", ""]
    for row in sorted(tried, key=lambda r: r["name"]):
        exported, certified = _exported(row), _certified(row)
        if exported == "upstream":
            lines.append(f"* {row['name']}, upstream: {_short(row['files']['onnx']['upstream'])}")
        elif "**red**" in (exported, certified) or "slow" in (exported, certified):
            whys = row["files"]["failed"].items()
            lines += [f"* {row['name']}, {stage}: {_short(why)}" for stage, why in whys]
    return "\n".join(lines if len(lines) > 2 else [*lines, "None."]) if tried else ""


def _short(why: str) -> str:
    why = re.sub(r"/\S*/", "", why)  # files by their names alone
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
    sys.stdout.write(table(joined(read)))
