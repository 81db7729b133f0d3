"""Adapters outside training: as ordinary pairs, and as files that Hugging Face PEFT reads."""

from lowrank_optax.adapters import name_maps
from lowrank_optax.adapters.pairs import combine, compress, plain_pair
from lowrank_optax.adapters.peft import load_peft, save_peft
from lowrank_optax.adapters.peft_config import PeftConfig
from lowrank_optax.adapters.peft_file import PeftAdapter, open_peft, read_peft, write_peft
from lowrank_optax.adapters.spectra import Spectrum, principal_angles, spectrum

__all__ = [
    "PeftAdapter",
    "PeftConfig",
    "Spectrum",
    "combine",
    "compress",
    "load_peft",
    "name_maps",
    "open_peft",
    "plain_pair",
    "principal_angles",
    "read_peft",
    "save_peft",
    "spectrum",
    "write_peft",
]
