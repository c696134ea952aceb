"""Paired, interleaved latency of two ONNX files, beside a control of the base against itself.

Each round runs base, folded and a second session of the base, in an order that changes from round to
round, so that drift of the machine falls on all three alike. The ratio is the median of the rounds'
ratios; its interval comes from a bootstrap over blocks of neighbouring rounds, because neighbours
share the machine's state.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_fx.latencies import Latency, Ratio
from lora_fx.passes.onnx_feeds import random_feeds
from lora_fx.passes.onnx_session import open_session
from lora_fx.providers import Providers, choose

_BLOCK = 8
_RESAMPLES = 2000

Run = Callable[[], None]


def compare_latency(
    base_onnx: str | Path,
    folded_onnx: str | Path,
    *,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    providers: Providers = "auto",
    threads: int = 1,
    seconds: float = 10.0,
    min_rounds: int = 64,
    max_rounds: int = 20_000,
) -> Latency:
    """Return how long the folded file takes, relative to its base.

    ``inputs`` are fed to both (default: random ones, every dynamic dimension small); providers,
    options and threads are equal on both sides. Rounds go on for ``seconds``.
    """
    runtime = choose(providers)
    sessions = [open_session(path, runtime, threads=threads) for path in (base_onnx, folded_onnx, base_onnx)]
    feeds = dict(inputs) if inputs is not None else random_feeds(sessions[0], seed=0)
    runs = [_bound_run(session, feeds, runtime.first) for session in sessions]
    times = _interleave(runs, seconds, min_rounds, max_rounds)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
    return Latency(
        base=Path(base_onnx).name,
        folded=Path(folded_onnx).name,
        ratio=ratio_of(times[:, 1] / times[:, 0]),
        control=ratio_of(times[:, 2] / times[:, 0]),
        base_seconds=float(np.median(times[:, 0])),
        folded_seconds=float(np.median(times[:, 1])),
        rounds=len(times),
        provider=runtime.first,
        threads=threads,
        batch=shapes,
    )


def _bound_run(session: Any, feeds: Mapping[str, NDArray[Any]], provider: str) -> Run:
    """Bind inputs once and outputs on the device, so that copies are not timed."""
    device = "cpu" if provider.startswith("CPU") else "cuda"
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def run() -> None:
        session.run_with_iobinding(binding)

    return run


def _interleave(runs: Sequence[Run], seconds: float, min_rounds: int, max_rounds: int) -> NDArray[np.float64]:
    """Time the runs in turn, (rounds, runs), each round in another order."""
    for run in itertools.chain.from_iterable(itertools.repeat(tuple(runs), 5)):
        run()
    orders = itertools.cycle(itertools.permutations(range(len(runs))))
    rows: list[list[float]] = []
    # A run far below the clock's own noise is repeated within a round.
    began = time.perf_counter()
    runs[0]()
    repeats = max(1, int(200e-6 / max(time.perf_counter() - began, 1e-9)))
    deadline = time.perf_counter() + seconds
    while len(rows) < max_rounds and (len(rows) < min_rounds or time.perf_counter() < deadline):
        row = [0.0] * len(runs)
        for which in next(orders):
            began = time.perf_counter()
            for _ in range(repeats):
                runs[which]()
            row[which] = (time.perf_counter() - began) / repeats
        rows.append(row)
    return np.asarray(rows, dtype=np.float64)


def ratio_of(ratios: NDArray[np.float64]) -> Ratio:
    """Return the median and its 95% interval from a bootstrap over blocks of neighbours."""
    count = max(1, len(ratios) // _BLOCK)
    blocks = np.array_split(ratios, count)
    width = min(len(block) for block in blocks)
    table = np.stack([block[:width] for block in blocks])
    random = np.random.default_rng(0)
    resamples = max(200, min(_RESAMPLES, 40_000_000 // table.size))
    medians = [np.median(table[random.integers(0, count, count)]) for _ in range(resamples)]
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
