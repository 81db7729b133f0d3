"""LoRA for Flax: NNX layers and surgery, Linen modules and an interceptor.

All of them take a `LoRAConfig`. With `extra=Shadows()` it makes layers that `oplora` can train,
with `extra=Frames()` layers for `sds_lora`.
"""

from lowrank_optax.nn.config import Extra, Frames, Initializer, LoRAConfig, Shadows
from lowrank_optax.nn.contraction import Contraction
from lowrank_optax.nn.diagnosis import check_training_setup
from lowrank_optax.nn.flax_linen import (
    LinenAdapter,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsumDense,
)
from lowrank_optax.nn.flax_nnx import LoRAEinsum, LoRALayer, LoRALinear, LoRALinearGeneral
from lowrank_optax.nn.functional import lora_apply, lora_delta
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.nn.linen_surgery import (
    lora_adapters,
    lora_interceptor,
    merge_lora_variables,
    unmerge_lora_variables,
)
from lowrank_optax.nn.nnx_merging import merge_lora, unload_lora, unmerge_lora
from lowrank_optax.nn.nnx_surgery import (
    add_lora,
    lora_scales,
    remove_lora,
    replace_lora,
)
from lowrank_optax.nn.starts import gradient_start, gradient_triplets, start_pair
from lowrank_optax.nn.summary import AdapterSummary, LoRASummary, lora_summary
from lowrank_optax.nn.weight_starts import split_kernel, weight_start

__all__ = [
    "AdapterSummary",
    "Contraction",
    "Extra",
    "Frames",
    "Initializer",
    "KernelAxes",
    "LinenAdapter",
    "LoRAConfig",
    "LoRADense",
    "LoRADenseGeneral",
    "LoRAEinsum",
    "LoRAEinsumDense",
    "LoRALayer",
    "LoRALinear",
    "LoRALinearGeneral",
    "LoRASummary",
    "Shadows",
    "add_lora",
    "check_training_setup",
    "gradient_start",
    "gradient_triplets",
    "lora_adapters",
    "lora_apply",
    "lora_delta",
    "lora_interceptor",
    "lora_scales",
    "lora_summary",
    "merge_lora",
    "merge_lora_variables",
    "remove_lora",
    "replace_lora",
    "split_kernel",
    "start_pair",
    "unload_lora",
    "unmerge_lora",
    "unmerge_lora_variables",
    "weight_start",
]
