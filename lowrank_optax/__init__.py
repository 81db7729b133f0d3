"""LoRA-aware optimizers for JAX: optax gradient transformations over (a, b) factor pairs."""

from lowrank_optax import factors, linalg, nn, pairwise, shadows
from lowrank_optax.factors import (
    DEFAULT_SPECS,
    LoRAPair,
    Member,
    PairSpec,
    ShadowedPair,
    find_pairs,
)
from lowrank_optax.lorsum import lorsum
from lowrank_optax.methods.altlora import (
    AltLoRAPlusState,
    AltLoRAState,
    altlora,
    altlora_plus,
    scale_by_altlora,
    scale_by_altlora_plus,
)
from lowrank_optax.methods.oplora import OPLoRAProjState, OPLoRAState, oplora, oplora_proj
from lowrank_optax.pairwise import PairwiseState
from lowrank_optax.shadows import shadow

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SPECS",
    "AltLoRAPlusState",
    "AltLoRAState",
    "LoRAPair",
    "Member",
    "OPLoRAProjState",
    "OPLoRAState",
    "PairSpec",
    "PairwiseState",
    "ShadowedPair",
    "altlora",
    "altlora_plus",
    "factors",
    "find_pairs",
    "linalg",
    "lorsum",
    "nn",
    "oplora",
    "oplora_proj",
    "pairwise",
    "scale_by_altlora",
    "scale_by_altlora_plus",
    "shadow",
    "shadows",
]
