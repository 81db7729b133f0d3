"""LoRA-aware optimizers for JAX: optax gradient transformations over (a, b) factor pairs."""

from lowrank_optax import (
    adapters,
    collectives,
    diagnostics,
    factors,
    frames,
    linalg,
    nn,
    pairwise,
    shadows,
    sharding,
)
from lowrank_optax.factors import (
    DEFAULT_SPECS,
    FramedPair,
    LoRAPair,
    Member,
    PairSpec,
    ShadowedPair,
    find_pairs,
)
from lowrank_optax.frames import frame
from lowrank_optax.lorsum import lorsum
from lowrank_optax.methods.altlora import (
    AltLoRAPlusState,
    AltLoRAState,
    altlora,
    altlora_plus,
    scale_by_altlora,
    scale_by_altlora_plus,
)
from lowrank_optax.methods.oplora import (
    OPLoRAProjState,
    OPLoRAState,
    oplora,
    oplora_proj,
    scaled_oplora,
)
from lowrank_optax.methods.sds_lora import SDSLoRAState, scale_by_inverse_sqrt_gram, sds_lora
from lowrank_optax.methods.svd_lora import SVDLoRAState, pair_of_delta, svd_lora
from lowrank_optax.pairwise import PairwiseState
from lowrank_optax.shadows import shadow

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SPECS",
    "AltLoRAPlusState",
    "AltLoRAState",
    "FramedPair",
    "LoRAPair",
    "Member",
    "OPLoRAProjState",
    "OPLoRAState",
    "PairSpec",
    "PairwiseState",
    "SDSLoRAState",
    "SVDLoRAState",
    "ShadowedPair",
    "adapters",
    "altlora",
    "altlora_plus",
    "collectives",
    "diagnostics",
    "factors",
    "find_pairs",
    "frame",
    "frames",
    "linalg",
    "lorsum",
    "nn",
    "oplora",
    "oplora_proj",
    "pair_of_delta",
    "pairwise",
    "scale_by_altlora",
    "scale_by_altlora_plus",
    "scale_by_inverse_sqrt_gram",
    "scaled_oplora",
    "sds_lora",
    "shadow",
    "shadows",
    "sharding",
    "svd_lora",
]
