"""Adapters over two processes: DDP, FSDP2, tensor parallelism, checkpoints, models from the meta device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_fx
from tests.integration import corners, fused, tensor_corners, tensors, work
from tests.integration.processes import in_processes, in_two_processes
from tests.integration.small import adapted, base, batch, gap, train

pytestmark = pytest.mark.slow

VARIANTS = [
    (False, False, {}),
    (True, False, {}),  # one weight, embedding and head
    (False, True, {"dora": True}),  # a weight read functionally, and magnitudes
]


def test_ddp_and_fsdp2_train_save_fold_and_load_as_one_process_does(tmp_path: Path) -> None:
    for work_ in (work.ddp, work.fsdp2):
        folder = tmp_path / work_.__name__
        in_two_processes(folder, *((work_, variant) for variant in VARIANTS))
        _one_machine_reads_them(folder)


def test_fsdp2_in_mixed_precision_checkpoints_and_meta(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        (work.mixed_precision, ()),
        (work.distributed_checkpoint, ()),
        (work.from_meta, (False,)),
        (work.from_meta, (True,)),
        (fused.fused_from_meta, ("rows, heads, biases",)),
        (fused.fused_from_meta, ("rows with a start",)),
        (fused.bfloat16_base, ()),
        (corners.exported, ()),
        (corners.inside_a_shard, ()),
    )


def test_fused_weights_heads_and_biases_in_every_sharding(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        (fused.fused, ("rows, heads, biases", fused.by_layers)),
        (fused.fused, ("rows with a start", fused.unsharded_afterwards)),
        (fused.fused, ("rows, heads, biases", fused.replicated_and_sharded)),
    )


def test_switching_adapters_in_distributed_training(tmp_path: Path) -> None:
    in_two_processes(tmp_path, (fused.switching_sharded, ()), (fused.switching_replicated, ()))


def test_wrappers_inside_optimisers_and_accumulation(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        (corners.wrapped_blocks, ()),
        (corners.checkpointed, ()),
        (corners.accumulated, ()),
        (corners.optimisers, ()),
        (corners.optimiser_shards_and_averages, ()),
        (corners.compiled, ()),
    )


def test_normalisations_and_spawned_workers(tmp_path: Path) -> None:
    model = adapted(tied=True)
    train(model)
    in_two_processes(
        tmp_path,
        (corners.statistics, ("freeze",)),
        (corners.statistics, ("train",)),
        (corners.received, (model, model(batch(0)).detach())),
    )


def test_trainer_and_lightning_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning.pytorch")
    from tests.integration import loops

    in_two_processes(tmp_path, (loops.trainer, ()), (loops.lightning, (False,)), (loops.lightning, (True,)))


def test_a_model_is_injected_before_it_is_wrapped_and_not_by_fsdp1(tmp_path: Path) -> None:
    in_two_processes(tmp_path, (work.wrappers, ()), (work.flat_parameters, ()))


def test_tensor_parallelism_after_inject_computes_trains_and_saves_as_one_process(tmp_path: Path) -> None:
    cases = [
        ("every weight", "heads", False, torch.float32),
        ("every weight", "sequence", False, torch.float32),
        ("every weight", "features"),
        ("rows", "heads", True),
        ("starts", "heads"),
        ("biases", "heads"),
        ("magnitudes", "heads", False, torch.float32),
        ("asked for", "heads", False, torch.float32),
        ("magnitudes", "heads"),
    ]
    fused = (tensors.adds_thin_products, ("every weight", "heads"))
    in_two_processes(tmp_path, fused, *((tensors.computes_as_one, case) for case in cases))


def test_tensor_parallelism_with_what_else_there_is(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        (tensor_corners.drops, ()),
        (tensor_corners.replicated, ()),
        (tensor_corners.switched, ()),
        (tensor_corners.seen_by_others, ()),
        (tensor_corners.from_meta, ()),
        (tensor_corners.refused, ()),
    )


def test_fully_shard_over_tensor_parallelism(tmp_path: Path) -> None:
    in_processes(
        4,
        tmp_path,
        (tensor_corners.sharded_too, ("every weight",)),
        (tensor_corners.sharded_too, ("magnitudes",)),
    )


def test_a_llama_is_split_after_inject_by_its_own_plan(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    in_two_processes(tmp_path, (tensor_corners.transformers_plan, ()))


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
