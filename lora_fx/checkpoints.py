"""Checkpoints of adapters alone, for training loops, ``torch.distributed.checkpoint`` and sharded models.

One machine::

    torch.save({"adapter": adapter_state(model), "optimizer": optimizer.state_dict()}, path)
    load_adapter_state(model, torch.load(path)["adapter"])

Many (the tensors are those of the model, so that loading into them is loading)::

    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder)
    dcp.load({"adapter": adapter_state(model)}, checkpoint_id=folder)

Without memory first::

    with torch.device("meta"):
        model = build()
    lora_fx.inject(model, policy)                   # plans and rewrites; nothing to compute with yet
    fully_shard(model)
    materialise(model, "cuda")                      # to_empty, with ties kept
    ...                                             # load the base's weights
    reset_adapter(model, seed=0)                    # or load_adapter(model, path, replace=True)
"""

from lora_fx.passes.states import adapter_state, load_adapter_state, materialise, reset_adapter

__all__ = ["adapter_state", "load_adapter_state", "materialise", "reset_adapter"]
