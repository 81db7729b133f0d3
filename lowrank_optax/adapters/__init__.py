"""Adapters outside training: as ordinary pairs, and as files that Hugging Face PEFT reads."""

from lowrank_optax.adapters.pairs import compress, plain_pair
from lowrank_optax.adapters.peft import load_peft, save_peft
from lowrank_optax.adapters.peft_config import PeftConfig
from lowrank_optax.adapters.peft_file import PeftAdapter, read_peft

__all__ = [
    "PeftAdapter",
    "PeftConfig",
    "compress",
    "load_peft",
    "plain_pair",
    "read_peft",
    "save_peft",
]
