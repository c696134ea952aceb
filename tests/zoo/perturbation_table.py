"""Write PERTURBATION.md from rows of ``run --roles``: ``python -m tests.zoo.perturbation_table FILE...``.

Every failure is listed, and whatever looks like an attention but was left without names, with the reason;
what has no reason written here is said to have none.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.zoo.measure import Row
from tests.zoo.run import rows

LINEAR = "attention without a softmax (linear, delta rule, kernel features): left unnamed, never guessed"
DEFORMABLE = "deformable attention: what weighs the sampled values is a linear layer's result, no product's"
REASONS = {
    r"autoformer": "autocorrelation by Fourier transforms, a softmax over a few delays",
    r"LinearAttention|DeltaAttention|Lightning|Rwkv|EfficientAdditive|YosoAttention|swiftformer": LINEAR,
    r"Deformable|encoder_attn$|deformable_layer|pixel_level_module|deformable_detr": DEFORMABLE,
    r"MraAttention": "approximates its softmax block by block with sparse kernels of its own",
    r"coat_tiny": "factorised attention, a softmax of the keys alone (linear attention)",
    r"CvtSelfAttentionProjection": "a depthwise convolution on q, k or v: the weight behind it has the role",
    r"ConvAttention": "a grouped convolution named after attention",
    r"SplitAttn|rsoftmax|SelectiveKernel|conv\*\.attn|GatedAttention|gating_block": (
        "a gate of channels or branches: a softmax of a weight's own result"
    ),
    r"volo": "outlook attention: what weighs the neighbours is a linear layer's result, no product's",
    r"router$|mlp\.gate$": "a router's softmax",
    r"_hc$": "hyper-connections: a softmax mixes residual streams",
    r"convbert": "dynamic convolution: a softmax of the kernels that a linear layer makes",
    r"convit.*blocks\.\*\.attn": "the positional half of a gated attention; the content's half is named",
    r"aimv2.*: q in": "the query is a learned parameter",
    r"inkling2.*(mlp|attention|final)_input": "the query is learned, keys and values are the stream itself",
    r"pegasus_x: q": "the last layer's global tokens reach no output: what asks for them has no effect",
    r"gcvit": "the global query is a stage's own stream, pooled: no weight of the attention makes it",
    r"zaya": "query and key are sums of both projections and of a convolution of them: none makes one alone",
    r"compressor": "a compressor that the run's few tokens do not fill: it makes no key or value here",
    r"post_mlp_convolution": "the stream itself, weighed by a learned query",
    r"downsample\.assign": "groups are assigned by a hard softmax: its second, the attention's is named",
    r"efficientvim|mgp-str|ovis2|integral|lqe_layers|vits": "no product of two activations makes its logits",
}
"""What is left unnamed, by a pattern of ``model: what``, and why."""


def page(found: Sequence[Row]) -> str:
    """Return the whole page."""
    built = sorted((r for r in found if "build" not in r["failed"]), key=lambda r: r["name"])
    attending = [r for r in built if r["roles"].get("attentions")]
    parts = [
        _head(built, attending),
        _listed("Failures", (f"{r['name']}: {w}" for r in built for w in _failures(r))),
        _listed("Operands of attentions that no weight is named for", _reasons(built, "bare")),
        _listed("Weights beside those named, without a remark", _reasons(built, "beside")),
        _listed(
            "Modules called attentions without a query, key, value or output", _reasons(built, "classes")
        ),
        _listed("Softmaxes that are no attention's", _reasons(built, "softmaxes")),
        _unreached(built),
        _models(attending),
    ]
    return "\n\n".join(parts) + "\n"


def _head(built: Sequence[Row], attending: Sequence[Row]) -> str:
    def total(what: str) -> int:
        return sum(r["roles"].get(what, 0) for r in built)

    days = ", ".join(f"{day} ({n})" for day, n in sorted(Counter(r["date"] for r in built).items()))
    roles: Counter[str] = Counter()
    for row in built:
        roles.update(row["roles"].get("found", {}))
    unstable = [name for r in built for name in r["roles"].get("unstable", ())]
    slow = [r["seconds"]["roles"] / r["seconds"]["trace"] for r in built if r["seconds"].get("trace")]
    facts = {
        "models (with attentions)": f"{len(built)} ({len(attending)})",
        "attentions checked": total("attentions"),
        "perturbations": total("perturbations"),
        "models with a failure": sum(bool(list(_failures(r))) for r in built),
        "weights, of these named": f"{total('sites')}, {total('named')}",
        "weights by role": ", ".join(f"{role} {n}" for role, n in roles.most_common()),
        "weights whose rows differ between two draws": len(unstable),
        "matching and roles, in recordings (median)": f"{sorted(slow)[len(slow) // 2]:.2f}",
    }
    text = f"""Measured {days} by `python -m tests.zoo.run --roles`; `make zoo` measures again. Around every
attention of every model of the zoo that builds, rows named q are changed alone, all of them and each end of
their ranges by itself: the query changes and neither key nor value does; likewise k and v; and rows of the
same weights that are named none of these change none. `multi_head_attention_forward` is looked into.
Rows of one page may come from successive commits."""
    lines = ["# Roles under perturbation, over the whole zoo", "", text, "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} |" for what, figure in facts.items())])


def _failures(row: Row) -> Iterator[str]:
    yield from row["roles"].get("failures", ())
    if not row["roles"].get("failures"):
        yield from (f"{stage}: {why[:200]}" for stage, why in row["failed"].items())


def _reasons(built: Sequence[Row], what: str) -> Iterator[str]:
    """Yield what was left unnamed with its reason and its models."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in built:
        for text in row["roles"].get(what, {}):
            found.setdefault((_reason(f"{row['name']}: {text}"), text), []).append(row["name"])
    by_reason: dict[str, list[str]] = {}
    for (why, text), models in found.items():
        shown = ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
        by_reason.setdefault(why, []).append(f"{shown}: `{text[:110] or '(root)'}`")
    for why, texts in sorted(by_reason.items()):
        yield f"{why}:\n" + "\n".join(f"  - {text}" for text in texts)


def _reason(whole: str) -> str:
    return next(
        (why for pattern, why in REASONS.items() if re.search(pattern, whole)),
        "**no reason known**",
    )


def _unreached(built: Sequence[Row]) -> str:
    kinds: Counter[str] = Counter()
    for row in built:
        kinds.update(row["roles"].get("unreached", {}))
    models = sum(bool(row["roles"].get("unreached")) for row in built)
    text = f"""{sum(kinds.values())} modules called attentions in {models} models change no output on the
zoo's inputs (a picture that is not given, an encoder beside a decoder run alone), so there is no dataflow to
read: {", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())) or "none"}."""
    return f"## Not reached by the run\n\n{text}"


def _listed(title: str, items: Iterator[str]) -> str:
    return "\n".join([f"## {title}", "", *([f"- {item}" for item in items] or ["None."])])


def _models(attending: Sequence[Row]) -> str:
    lines = ["## Every model with an attention", ""]
    lines += [
        "| model | weights | named | attentions | perturbations | failed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in attending:
        found = row["roles"]
        cells = (found["sites"], found["named"], found["attentions"], found["perturbations"])
        lines.append(
            f"| {row['name']} | " + " | ".join(map(str, cells)) + f" | {len(found['failures']) or ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    read = {row["name"]: row for path in sys.argv[1:] for row in rows(Path(path))}
    sys.stdout.write(page(list(read.values())))
