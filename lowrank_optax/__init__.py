"""LoRA-aware optimizers for JAX: optax gradient transformations over (a, b) factor pairs."""

from lowrank_optax import (
    adapters,
    checkpoints,
    diagnostics,
    engine,
    integrations,
    nn,
    plots,
    sharding,
    specs,
)
from lowrank_optax._core.frames import FramedPair, frame
from lowrank_optax._core.gradient_scaling import clip_by_global_norm, scale_gradients
from lowrank_optax._core.layouts import DEFAULT_SPECS, Member, PairSpec, Unpaired
from lowrank_optax._core.lorsum import lorsum
from lowrank_optax._core.nodes import LoRAPair, register_node
from lowrank_optax._core.notices import notices
from lowrank_optax._core.pairing import Pairing, find_pairs
from lowrank_optax._core.scales import Scales, scales_from
from lowrank_optax._core.shadows import Metric, ShadowedPair, shadow
from lowrank_optax._core.states import skipped
from lowrank_optax.methods.altlora import AltLoRAPlusState, AltLoRAState, altlora, altlora_plus
from lowrank_optax.methods.inverse_sqrt_gram import scale_by_inverse_sqrt_gram
from lowrank_optax.methods.lora_fa import LoRAFAState, lora_fa
from lowrank_optax.methods.lora_muon import LoRAMuonState, lora_muon
from lowrank_optax.methods.lora_plus import LoRAPlusState, lora_plus
from lowrank_optax.methods.lora_pro import (
    LoRAProEfficientState,
    LoRAProState,
    lora_pro,
    lora_pro_efficient,
)
from lowrank_optax.methods.lora_rite import LoRARITEState, lora_rite
from lowrank_optax.methods.lora_soap import LoRASOAPState, lora_soap
from lowrank_optax.methods.oplora import oplora
from lowrank_optax.methods.oplora_proj import OPLoRAProjState, oplora_proj
from lowrank_optax.methods.polora import PoLoRAState, polora
from lowrank_optax.methods.reflora import RefLoRAState, reflora
from lowrank_optax.methods.scaled_adamw import ScaledAdamWState, scaled_adamw
from lowrank_optax.methods.scaled_oplora import scaled_oplora
from lowrank_optax.methods.sds_lora import SDSLoRAState, sds_lora
from lowrank_optax.methods.svd_lora import SVDLoRAState, pair_of_delta, svd_lora
from lowrank_optax.nn.summary import describe

__version__ = "0.2.0"

__all__ = [
    "DEFAULT_SPECS",
    "AltLoRAPlusState",
    "AltLoRAState",
    "FramedPair",
    "LoRAFAState",
    "LoRAMuonState",
    "LoRAPair",
    "LoRAPlusState",
    "LoRAProEfficientState",
    "LoRAProState",
    "LoRARITEState",
    "LoRASOAPState",
    "Member",
    "Metric",
    "OPLoRAProjState",
    "PairSpec",
    "Pairing",
    "PoLoRAState",
    "RefLoRAState",
    "SDSLoRAState",
    "SVDLoRAState",
    "ScaledAdamWState",
    "Scales",
    "ShadowedPair",
    "Unpaired",
    "adapters",
    "altlora",
    "altlora_plus",
    "checkpoints",
    "clip_by_global_norm",
    "describe",
    "diagnostics",
    "engine",
    "find_pairs",
    "frame",
    "integrations",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pro",
    "lora_pro_efficient",
    "lora_rite",
    "lora_soap",
    "lorsum",
    "nn",
    "notices",
    "oplora",
    "oplora_proj",
    "pair_of_delta",
    "plots",
    "polora",
    "reflora",
    "register_node",
    "scale_by_inverse_sqrt_gram",
    "scale_gradients",
    "scaled_adamw",
    "scaled_oplora",
    "scales_from",
    "sds_lora",
    "shadow",
    "sharding",
    "skipped",
    "specs",
    "svd_lora",
]
