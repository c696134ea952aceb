"""Adapters over two processes: DDP, FSDP2, distributed checkpoints, models that start on the meta device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_fx
from tests.integration import work
from tests.integration.processes import in_two_processes
from tests.integration.small import adapted, base, gap, train

pytestmark = pytest.mark.slow

VARIANTS = [
    (False, False, {}),
    (True, False, {}),  # one weight, embedding and head
    (False, True, {"dora": True}),  # a weight read functionally, and magnitudes
]


def test_ddp_trains_as_one_process_does(tmp_path: Path) -> None:
    in_two_processes(tmp_path, *((work.ddp, variant) for variant in VARIANTS))
    _one_machine_reads_them(tmp_path)


def test_fsdp2_trains_saves_folds_and_loads_as_one_process_does(tmp_path: Path) -> None:
    in_two_processes(tmp_path, *((work.fsdp2, variant) for variant in VARIANTS))
    _one_machine_reads_them(tmp_path)


def test_fsdp2_in_mixed_precision_checkpoints_and_meta(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        (work.mixed_precision, ()),
        (work.distributed_checkpoint, ()),
        (work.from_meta, (False,)),
        (work.from_meta, (True,)),
    )


def test_tensor_parallelism_is_refused_on_either_side_of_inject(tmp_path: Path) -> None:
    in_two_processes(tmp_path, (work.wrappers, ()), (work.tensor_parallel, ()))


def test_torchrun_runs_the_example(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "sharded.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("folded on one process, against sharded:")
    assert float(last.split()[-1]) < work.ROUNDING


def _one_machine_reads_them(folder: Path) -> None:
    for number, (tied, odd, options) in enumerate(VARIANTS):
        path = folder / str(number) / "adapter.safetensors"
        loaded = lora_fx.load_adapter(base(tied=tied, odd=odd), path)
        alone = adapted(tied=tied, odd=odd, **options)
        assert gap(loaded, alone) > 1e-2
        train(alone)
        assert gap(loaded, alone) < work.ROUNDING
        with torch.no_grad():
            assert gap(lora_fx.fold(loaded), alone) < work.ROUNDING
