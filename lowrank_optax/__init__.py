"""LoRA-aware optimizers for JAX: optax gradient transformations over (a, b) factor pairs."""

from lowrank_optax import factors, linalg, nn, pairwise
from lowrank_optax.factors import DEFAULT_SPECS, LoRAPair, Member, PairSpec, find_pairs
from lowrank_optax.methods.altlora import (
    AltLoRAPlusState,
    AltLoRAState,
    altlora,
    altlora_plus,
    scale_by_altlora,
    scale_by_altlora_plus,
)
from lowrank_optax.pairwise import PairwiseState

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SPECS",
    "AltLoRAPlusState",
    "AltLoRAState",
    "LoRAPair",
    "Member",
    "PairSpec",
    "PairwiseState",
    "altlora",
    "altlora_plus",
    "factors",
    "find_pairs",
    "linalg",
    "nn",
    "pairwise",
    "scale_by_altlora",
    "scale_by_altlora_plus",
]
