"""From the paths of pairs in Flax models to module names of Hugging Face's.

Each table is a mapping from a path to a name, in which a wildcard stands for the number of a layer.
A path may be that of a pair, as `layers/0/mlp/up_proj/kernel` of qwix, or of the module that holds
it, as `layers/0/mlp/up_proj` of `nn.add_lora`. Several names stand for modules whose kernels lie
side by side in one: they share a, and each has its part of b.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.names import matched
from lowrank_optax._core.nodes import LoRAPair

Name = str | tuple[str, ...]

Names = Mapping[str, Name] | Callable[[str], Name] | None
"""PEFT's module name of a pair's path; for stacked layers with `{}` for the index of each."""

_MLP: Mapping[str, Name] = {
    "layers/*/mlp/gate_proj": "model.layers.*.mlp.gate_proj",
    "layers/*/mlp/up_proj": "model.layers.*.mlp.up_proj",
    "layers/*/mlp/down_proj": "model.layers.*.mlp.down_proj",
}

TUNIX_LLAMA3: Mapping[str, Name] = {
    "layers/*/attn/q_proj": "model.layers.*.self_attn.q_proj",
    "layers/*/attn/k_proj": "model.layers.*.self_attn.k_proj",
    "layers/*/attn/v_proj": "model.layers.*.self_attn.v_proj",
    "layers/*/attn/o_proj": "model.layers.*.self_attn.o_proj",
    **_MLP,
}
"""tunix's Llama 3 to `LlamaForCausalLM`."""

TUNIX_QWEN2 = TUNIX_QWEN3 = TUNIX_LLAMA3
"""tunix's Qwen 2 and Qwen 3, but for layers of experts, to `Qwen2ForCausalLM` and Qwen 3's."""

TUNIX_GEMMA: Mapping[str, Name] = {
    "layers/*/attn/q_einsum": "model.layers.*.self_attn.q_proj",
    "layers/*/attn/kv_einsum": (
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "layers/*/attn/qkv_einsum": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "layers/*/attn/attn_vec_einsum": "model.layers.*.self_attn.o_proj",
    **_MLP,
}
"""tunix's Gemma 1 and 2 to `GemmaForCausalLM` and `Gemma2ForCausalLM`."""

TUNIX_GEMMA3 = TUNIX_GEMMA
"""tunix's Gemma 3 to `Gemma3ForCausalLM`."""


GEMMA: Mapping[str, Name] = {
    "layer_*/attn/q_einsum": "model.layers.*.self_attn.q_proj",
    "layer_*/attn/kv_einsum": (
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "layer_*/attn/qkv_einsum": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "layer_*/attn/attn_vec_einsum": "model.layers.*.self_attn.o_proj",
    "layer_*/mlp/_LoRAEinsum_gating_einsum": (
        "model.layers.*.mlp.gate_proj",
        "model.layers.*.mlp.up_proj",
    ),
    "layer_*/mlp/_LoRAEinsum_linear": "model.layers.*.mlp.down_proj",
}
"""gemma's Gemma 2 and 3 by `gm.nn.LoRA`, at the scale 1, to Hugging Face's for text."""


def mapped(names: Mapping[str, Name], path: str) -> Name:
    """Returns the name that a mapping has for a path.

    Args:
        names: names by path; a key may hold wildcards `*`, which stand in the name in this order.
        path: the path of a pair, or one level below that of its module.

    Returns:
        The name, or the names of modules whose kernels lie side by side.

    Raises:
        ValueError: no key fits the path; a key and its name with other numbers of wildcards.

    Example:
        >>> mapped(TUNIX_LLAMA3, "layers/3/mlp/up_proj/kernel")
        'model.layers.3.mlp.up_proj'
    """
    for at in (path, path.rpartition("/")[0]):
        if at in names:
            return _filled(at, names[at], [])
        for pattern, name in names.items():
            found = matched(pattern, at) if "*" in pattern else None
            if found is not None and not found[0]:
                return _filled(pattern, name, found[1:])
    raise ValueError(f"`names` has no name for {path!r}; it names {', '.join(names)}")


def _filled(key: str, name: Name, captures: list[str]) -> Name:
    if not isinstance(name, str):
        return tuple(str(_filled(key, each, captures)) for each in name)
    pieces = name.split("*")
    if len(pieces) != len(captures) + 1:
        raise ValueError(
            f"`names` has {name!r} for {key!r}; a name needs as many wildcards `*` as its key"
        )
    filled = zip(pieces, [*captures, ""], strict=True)
    return "".join(piece + capture for piece, capture in filled)


class Module(NamedTuple):
    """A module of the base model, as a part of one of our pairs.

    Args:
        name: PEFT's name of it.
        at: where it is in the pair's stack; empty for a pair of one layer.
        part: which of the parts of b it has.
        parts: how many there are.
    """

    name: str
    at: tuple[int, ...]
    part: int
    parts: int

    def of(self, pair: LoRAPair) -> LoRAPair:
        """Takes the module's factors out of the pair's."""
        return LoRAPair(pair.a[self.at], self.of_outputs(pair.b))

    def of_outputs(self, x: Any) -> Any:
        """Takes the module's part out of what has the pair's outputs as its last axis."""
        width = x.shape[-1] // self.parts
        return x[self.at][..., self.part * width : (self.part + 1) * width]


def modules_of(path: str, pair: LoRAPair, names: Names) -> list[Module]:
    """Lists the modules of the base model that a pair belongs to.

    Args:
        path: the pair's.
        pair: its factors, or their shapes.
        names: as in `save_peft`.

    Returns:
        The modules, in the order of the stack and of the columns of b.

    Raises:
        ValueError: no name; a name with other than one `{}` for each batch axis, or other braces;
            columns of b that have no such number of equal parts.

    Example:
        >>> pair = LoRAPair(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 6)))
        >>> [module.name for module in modules_of("kv", pair, {"kv": ("{}.k", "{}.v")})]
        ['0.k', '0.v', '1.k', '1.v']
    """
    if isinstance(names, Mapping):
        found = mapped(names, path)
    else:
        found = path.replace("/", ".") if names is None else names(path)
    each = (found,) if isinstance(found, str) else tuple(found)
    batch, width = pair.a.shape[:-2], pair.b.shape[-1]
    for name in each:
        if "{" in name.replace("{}", "") or "}" in name.replace("{}", ""):
            raise ValueError(
                f"{path}: the name {name!r} has braces other than `{{}}`, which stands for an"
                " index; give `names`"
            )
        if name.count("{}") != len(batch):
            raise ValueError(
                f"{path}: has {len(batch)} batch axes {batch}, so its name needs as many `{{}}`,"
                f" got {name!r}; give `names`"
            )
    if width % len(each):
        raise ValueError(
            f"{path}: its {width} outputs have no {len(each)} equal parts, for {', '.join(each)}"
        )
    indices = [()] if not batch else list(np.ndindex(*batch))
    return [
        Module(name.format(*index), tuple(index), part, len(each))
        for index in indices
        for part, name in enumerate(each)
    ]


def joined(path: str, pairs: list[LoRAPair], batch: tuple[int, ...], parts: int) -> LoRAPair:
    """Puts the factors of a pair's modules together again; undoes `Module.of`.

    Args:
        path: the pair's.
        pairs: in the order of `modules_of`.
        batch: the pair's batch axes.
        parts: of how many modules each entry of the stack is.

    Returns:
        The pair.

    Raises:
        ValueError: modules side by side whose a differ, which one pair cannot hold.

    Example:
        >>> one = LoRAPair(jnp.ones((4, 1)), jnp.ones((1, 3)))
        >>> joined("kv", [one, one], (), 2).b.shape
        (1, 6)
    """
    entries = []
    for start in range(0, len(pairs), parts):
        group = pairs[start : start + parts]
        if not all(jnp.array_equal(group[0].a, pair.a) for pair in group):
            raise ValueError(
                f"{path}: its modules share one factor a here, but not in the file; adapt them by"
                " layers of their own, or combine them (`adapters.combine`) at a higher rank"
            )
        b = jnp.concatenate([pair.b for pair in group], axis=-1)
        entries.append(LoRAPair(group[0].a, b))
    return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*batch, *xs[0].shape), *entries)
