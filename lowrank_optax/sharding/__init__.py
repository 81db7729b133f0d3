r"""Sharding: from the kernels' partition specs to those of factors, auxiliary leaves and states.

A factor is sharded like the kernel it belongs to. With a kernel (in, out) sharded as `P(i, o)`:

    a: P(i, None)      b: P(None, o)      r is never sharded

So the r×r algebra is a product on each device and a sum of r×r matrices over devices; what is
(in, r) or (r, out) does not move, but for `lora_pro`, which keeps dense matrices. Auxiliary leaves
with an in or an out axis are sharded likewise. States follow by their types: an optimizer's `init`
is traced on an abstract mesh whose axes are all explicit, so that the type of each leaf of the
state has its sharding.
"""

from lowrank_optax.sharding.placement import mesh_of
from lowrank_optax.sharding.recipes import (
    Recipe,
    as_kernels,
    data_parallel,
    fsdp,
    heads,
    stacked,
    tensor_parallel,
)
from lowrank_optax.sharding.specs import partition_specs, shard_model, shard_state, state_shardings
from lowrank_optax.sharding.train import TrainStep, train_step

__all__ = [
    "Recipe",
    "TrainStep",
    "as_kernels",
    "data_parallel",
    "fsdp",
    "heads",
    "mesh_of",
    "partition_specs",
    "shard_model",
    "shard_state",
    "stacked",
    "state_shardings",
    "tensor_parallel",
    "train_step",
]
