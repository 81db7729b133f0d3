"""From the paths of pairs in other libraries' models to module names of Hugging Face's.

Each is a mapping from a path to a name, in which a wildcard stands for the number of a layer.
"""

from collections.abc import Mapping

from lowrank_optax._core.names import matched

TUNIX_LLAMA3: Mapping[str, str] = {
    "layers/*/attn/q_proj/w": "model.layers.*.self_attn.q_proj",
    "layers/*/attn/k_proj/w": "model.layers.*.self_attn.k_proj",
    "layers/*/attn/v_proj/w": "model.layers.*.self_attn.v_proj",
    "layers/*/attn/o_proj/w": "model.layers.*.self_attn.o_proj",
    "layers/*/mlp/gate_proj/kernel": "model.layers.*.mlp.gate_proj",
    "layers/*/mlp/up_proj/kernel": "model.layers.*.mlp.up_proj",
    "layers/*/mlp/down_proj/kernel": "model.layers.*.mlp.down_proj",
}
"""tunix's Llama 3, adapted by qwix, to `LlamaForCausalLM`."""


def mapped(names: Mapping[str, str], path: str) -> str:
    """Returns the name that a mapping has for a path.

    Args:
        names: names by path; a key may hold wildcards `*`, which stand in the name in this order.
        path: the path of a pair.

    Returns:
        The name.

    Raises:
        ValueError: no key fits the path.

    Example:
        >>> mapped(TUNIX_LLAMA3, "layers/3/mlp/up_proj/kernel")
        'model.layers.3.mlp.up_proj'
    """
    if path in names:
        return names[path]
    for pattern, name in names.items():
        found = matched(pattern, path) if "*" in pattern else None
        if found is not None and not found[0]:
            pieces = name.split("*")
            filled = zip(pieces, [*found[1:], ""], strict=False)
            return "".join(piece + capture for piece, capture in filled)
    raise ValueError(f"`names` has no name for {path!r}; it names {', '.join(names)}")
