"""Paired, interleaved latency of two ONNX files, beside a control of the base against itself.

Each round runs base, folded and a second session of the base, in an order that changes from round to
round, so that drift of the machine falls on all three alike. A session keeps for its life the memory
it was given, which alone makes two sessions of one file differ by some percent, so the sessions are
made anew several times. The ratio is the median of the rounds' ratios; its interval comes from a
bootstrap over the sets of sessions, and in each over blocks of neighbouring rounds.

On the CPU provider with one thread the clock is the thread's own CPU time, which other processes on
the machine do not lengthen; elsewhere it is the wall clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_fx.errors import InputError
from lora_fx.latencies import Latency, Ratio
from lora_fx.passes import onnx_files, onnx_parity
from lora_fx.passes.certify import structure_check
from lora_fx.passes.onnx_feeds import Feeds, runnable_feeds
from lora_fx.passes.onnx_session import open_session
from lora_fx.providers import Providers, choose, onnxruntime

_BLOCK = 8
_RESAMPLES = 2000
_MOST_ROUNDS = 20_000

Run = Callable[[], None]
Clock = Callable[[], float]


def compare_latency(
    base_onnx: str | Path,
    folded_onnx: str | Path,
    *,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    providers: Providers = "auto",
    threads: int = 1,
    seconds: float = 10.0,
    sets: int = 10,
    min_rounds: int = 16,
) -> Latency:
    """Return how long the folded file takes, relative to its base.

    ``inputs`` are fed to both (default: random ones, every dynamic dimension small); providers,
    options and threads are equal on both sides. ``sets`` sets of sessions share the ``seconds``. The result
    says where the graphs differ, if they do.

    Raises:
        ExportError: a file is no ONNX model.
        InputError: the files take other inputs than each other, or than ``inputs``.
        ProviderError: the provider asked for is not there.
    """
    structure = structure_check("structure", *map(onnx_files.load, (base_onnx, folded_onnx)))
    runtime = choose(providers)
    own_time = threads == 1 and runtime.first.startswith("CPU")
    clock = time.thread_time if own_time else time.perf_counter
    feeds = None if inputs is None else _given_feeds(inputs)
    times: list[NDArray[np.float64]] = []
    for index in range(sets):
        files = {0: base_onnx, 1: folded_onnx, 2: base_onnx}
        made = {
            which: open_session(files[which], runtime, threads=threads)
            for which in sorted(files, key=lambda which: (which + index) % 3)
        }
        if index == 0:
            _refuse_other_inputs(made[0], Path(base_onnx).name, made[1], Path(folded_onnx).name)
        if feeds is None:
            feeds = runnable_feeds(made[0], seed=0)
        if index == 0:
            _refuse_misfit(made, feeds)
        runs = [_bound_run(made[which], feeds, runtime.first) for which in (0, 1, 2)]
        times.append(interleave(runs, seconds / sets, min_rounds, _MOST_ROUNDS // sets, clock))
    everything = np.concatenate(times)
    shapes = ", ".join(f"{name} {list(value.shape())}" for name, value in (feeds or {}).items())
    return Latency(
        base=Path(base_onnx).name,
        folded=Path(folded_onnx).name,
        ratio=ratio_of(*(rows[:, 1] / rows[:, 0] for rows in times)),
        control=ratio_of(*(rows[:, 2] / rows[:, 0] for rows in times)),
        base_seconds=float(np.median(everything[:, 0])),
        folded_seconds=float(np.median(everything[:, 1])),
        rounds=len(everything),
        provider=runtime.first,
        threads=threads,
        batch=shapes,
        clock="CPU time of the thread" if own_time else "wall clock",
        difference="" if structure.ok else f"{structure.place}: {structure.detail}",
    )


def _given_feeds(inputs: Mapping[str, NDArray[Any]]) -> Feeds:
    """Return given arrays as the runtime's own values.

    Raises:
        InputError: one of them is no array of numbers.
    """
    feeds: dict[str, Any] = {}
    for name, value in inputs.items():
        try:
            feeds[name] = onnxruntime().OrtValue.ortvalue_from_numpy(value)
        except Exception as error:
            raise InputError(
                f"inputs[{name!r}]",
                expected="a numpy array of numbers",
                got=f"{type(value).__name__} ({error})",
                advice="Pass what session.run takes.",
            ) from error
    return feeds


def _refuse_other_inputs(base: Any, base_name: str, folded: Any, folded_name: str) -> None:
    """Refuse two files that do not take the same inputs.

    Raises:
        InputError: their names, types or shapes differ.
    """
    if _declared(base) != _declared(folded):
        raise InputError(
            folded_name,
            expected=f"the inputs of {base_name}: {_described(base)}",
            got=_described(folded),
            advice="Compare a file with the base that it was folded from.",
        )


def _refuse_misfit(sessions: Mapping[int, Any], feeds: Feeds) -> None:
    """Run every session once, and refuse inputs that it does not take.

    Raises:
        InputError: the names are not the files' own, or the runtime refuses the values.
    """
    for session in sessions.values():
        reason: Exception | None = None
        if {item.name for item in session.get_inputs()} == set(feeds):
            try:
                onnx_parity.run(session, feeds)
                continue
            except onnx_parity.RuntimeFault as error:
                reason = error
        given = (f"{name} {value.data_type()}{list(value.shape())}" for name, value in feeds.items())
        raise InputError(
            "inputs",
            expected=_described(session),
            got=", ".join(given) or "none",
            advice="Pass an array of this type and shape for each of these names.",
        ) from reason


def _declared(session: Any) -> list[tuple[str, str, list[int | None]]]:
    """Return name, type and fixed dimensions of every input."""
    return [
        (item.name, item.type, [dim if isinstance(dim, int) else None for dim in item.shape])
        for item in session.get_inputs()
    ]


def _described(session: Any) -> str:
    items = (f"{i.name} {i.type}[{', '.join(map(str, i.shape))}]" for i in session.get_inputs())
    return ", ".join(items) or "none"


def _bound_run(session: Any, feeds: Feeds, provider: str) -> Run:
    """Bind inputs once and outputs on the device, so that copies are not timed."""
    device = "cpu" if provider.startswith("CPU") else "cuda"
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def run() -> None:
        session.run_with_iobinding(binding)

    return run


def interleave(
    runs: Sequence[Run], seconds: float, min_rounds: int, max_rounds: int, clock: Clock
) -> NDArray[np.float64]:
    """Time the runs in turn, (rounds, runs), each round in another order."""
    for run in itertools.chain.from_iterable(itertools.repeat(tuple(runs), 5)):
        run()
    orders = itertools.cycle(itertools.permutations(range(len(runs))))
    rows: list[list[float]] = []
    # A run far below the clock's own noise is repeated within a round.
    began = clock()
    runs[0]()
    repeats = max(1, int(200e-6 / max(clock() - began, 1e-9)))
    deadline = time.perf_counter() + seconds
    while len(rows) < max_rounds and (len(rows) < min_rounds or time.perf_counter() < deadline):
        row = [0.0] * len(runs)
        for which in next(orders):
            began = clock()
            for _ in range(repeats):
                runs[which]()
            row[which] = (clock() - began) / repeats
        rows.append(row)
    return np.asarray(rows, dtype=np.float64)


def ratio_of(*groups: NDArray[np.float64]) -> Ratio:
    """Return the median and its 95% interval from a bootstrap over groups and blocks of neighbours."""
    tables = [_blocks(group) for group in groups]
    random = np.random.default_rng(0)
    resamples = max(200, min(_RESAMPLES, 40_000_000 // sum(table.size for table in tables)))
    medians: list[float] = []
    for _ in range(resamples):
        chosen = [tables[i] for i in random.integers(0, len(tables), len(tables))]
        drawn = [table[random.integers(0, len(table), len(table))].ravel() for table in chosen]
        medians.append(float(np.median(np.concatenate(drawn))))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(np.concatenate(groups))), float(low), float(high))


def _blocks(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cut a series into (blocks, neighbours)."""
    count = max(1, len(ratios) // _BLOCK)
    parts = np.array_split(ratios, count)
    width = min(len(part) for part in parts)
    return np.stack([part[:width] for part in parts])
