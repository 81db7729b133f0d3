r"""Starts from the weights: factors that take over a part of the kernel.

A kernel K is split as $K = K' + s\,a\,b$. The layer keeps K' and computes what it did.

- `"pissa"` (arXiv 2404.02948): of the leading singular triplets $U \Sigma V^\top$ of K,
  $a = U \sqrt{\Sigma / s}$ and $b = \sqrt{\Sigma / s}\, V^\top$;
- `"pissa_fast"`: the same of triplets from a randomized power iteration, PEFT's `pissa_niter_16`;
- `"olora"` (arXiv 2406.01775): with $K^\top = Q R$, the first r rows of R transposed are a, and the
  first r columns of Q transposed are b, whatever s is.

These are the factors of PEFT, whose weight is $K^\top$ and whose B A is $b^\top a^\top$
(`tests/integration/test_torch_peft.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from rich.progress import Progress

from lowrank_optax._core import meshes
from lowrank_optax._core.arguments import check_choice, check_integer, check_positive
from lowrank_optax._core.decompositions import qr, svd
from lowrank_optax._core.linalg import product, transposed, widened
from lowrank_optax._core.names import in_words
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.sketch import ROUNDING, Triplets, leading_triplets
from lowrank_optax.nn.config import LoRAConfig
from lowrank_optax.nn.flax_nnx import LoRALayer
from lowrank_optax.nn.functional import merge_kernel, why_not_mergeable
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.nn.nnx_merging import refuse_shared_kernels
from lowrank_optax.nn.nnx_surgery import lora_layers
from lowrank_optax.nn.starts import write_node

_METHODS = ("pissa", "pissa_fast", "olora")
_DENSE = KernelAxes.in_order(0, 1, 1)


def weight_start(
    model: nnx.Module,
    method: str = "pissa",
    *,
    iterations: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    r"""Starts the adapters of a model from its kernels, in place.

    $$K + s\,a_0\,b_0 = K' + s\,a\,b$$

    What the adapters hold before, $a_0 b_0$, counts to the kernel. So the model computes what it
    did up to the rounding of K', and a second call changes no more than that rounding.

    Args:
        model: an NNX model with LoRA layers.
        method: `"pissa"`, `"pissa_fast"` or `"olora"`.
        iterations: rounds of power iteration, for `"pissa_fast"`.
        seed: of its random start, and of what adapters carry beside their factors.
        progress: whether to show a progress bar.

    Returns:
        The paths of the layers, sorted.

    Raises:
        ValueError: no LoRA layer, a merged one, an argument out of range; a kernel that is not
            floating, not finite, shared with another layer, or for PiSSA of a lower rank than its
            adapter; adapters with `Frames(warmup=False)`. Nothing is changed then.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> before = model(jnp.eye(4))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> nn.weight_start(model, progress=False)
        ['layers/0']
        >>> bool(jnp.allclose(model(jnp.eye(4)), before, atol=1e-5))
        True

    Source: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775.
    """
    _require_method(method, iterations)
    layers = lora_layers(model)
    for path, layer in layers.items():
        _require_startable(in_words(path, "the layer"), layer)
    refuse_shared_kernels(model, layers)
    pairs = []
    with Progress(disable=not progress, transient=True) as bar:
        for index, path in enumerate(bar.track(layers, description="weight start"), start=1):
            layer, key = layers[path], jax.random.fold_in(jax.random.key(seed), index)
            matrix = layer.axes.to_matrix(_adapted_kernel(layer))
            where = f"{in_words(path, 'the layer')}: "
            _require_finite(matrix, where)
            pair, rank = _split(matrix, layer.lora.rank, method, layer.scale, iterations, key)
            _require_rank(rank, layer.lora.rank, where)
            pairs.append(pair)
    keys = jax.random.split(jax.random.key(seed), len(layers))
    for layer, pair, key in zip(layers.values(), pairs, keys, strict=True):
        _write(layer, pair, key)
    return sorted(layers)


def split_kernel(
    kernel: jax.Array,
    rank: int,
    method: str = "pissa",
    *,
    scale: float = 1.0,
    axes: KernelAxes = _DENSE,
    dtype: DTypeLike = jnp.float32,
    iterations: int = 16,
    seed: int = 0,
) -> tuple[LoRAPair, jax.Array]:
    r"""Splits a kernel into a pair and the rest, for Linen and plain trees.

    $$K = K' + s\,a\,b$$

    Args:
        kernel: K, with the axes that `axes` describes last; leading ones are a stack.
        rank: r, at most min(in, out).
        method: as in `weight_start`.
        scale: the forward scale s.
        axes: the roles of the kernel's axes; (in, out) by default. `lora_interceptor` and
            `lora_adapters` tell those of Linen layers.
        dtype: of the factors.
        iterations: as in `weight_start`.
        seed: of the random start of `"pissa_fast"`.

    Returns:
        The pair, (..., in, r) and (..., r, out), and K' in the shape and dtype of the kernel. It is
        K less the pair as it was rounded to `dtype`.

    Raises:
        ValueError: an argument out of range, a kernel that is not floating, not finite, or for
            PiSSA of a lower rank.

    Example:
        >>> import jax.numpy as jnp
        >>> pair, rest = split_kernel(jnp.diag(jnp.array([4.0, 1.0])), 1, scale=4.0)
        >>> jnp.abs(pair.a[:, 0]).tolist(), rest.round(3).tolist()
        ([1.0, 0.0], [[0.0, 0.0], [0.0, 1.0]])

    Source: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775.
    """
    _require_method(method, iterations)
    check_integer("rank", rank, least=1)
    check_positive("scale", scale)
    kernel = jnp.asarray(kernel)
    _, n_in, n_out = axes.sizes(kernel.shape)
    LoRAConfig(rank).check_rank(n_in, n_out, "the kernel")
    if reason := why_not_mergeable(kernel.dtype):
        raise ValueError(reason)
    wide = meshes.whole(widened(kernel))
    matrix = axes.to_matrix(wide)
    _require_finite(matrix, "")
    pair, found = _split(matrix, rank, method, scale, iterations, jax.random.key(seed))
    _require_rank(found, rank, "")
    pair = jax.tree.map(lambda x: x.astype(dtype), pair)
    rest = merge_kernel(wide, pair, -scale, axes).astype(kernel.dtype)
    return pair, meshes.placed_like(rest, kernel)


def _require_method(method: str, iterations: int) -> None:
    check_choice("method", method, _METHODS)
    check_integer("iterations", iterations, least=0)


def _require_startable(path: str, layer: LoRALayer) -> None:
    if layer.merged:
        raise ValueError(f"{path}: is merged; call unmerge_lora first")
    if reason := why_not_mergeable(layer.kernel[...].dtype):
        raise ValueError(f"{path}: {reason}")
    if layer.lora.extra is not None and not layer.lora.extra.keeps_product:
        raise ValueError(
            f"{path}: an adapter with {layer.lora.extra} starts with factors of its own; make it"
            ' with Frames(), or start it by gradient_start with method="frames"'
        )


def _require_finite(matrix: jax.Array, prefix: str) -> None:
    if not jnp.all(jnp.isfinite(matrix)):
        raise ValueError(f"{prefix}the kernel is not finite; restore the pretrained weights first")


def _require_rank(found: int, rank: int, prefix: str) -> None:
    if found < rank:
        raise ValueError(
            f"{prefix}the kernel has rank {found}, but PiSSA needs {rank}: give a lower rank, or"
            ' method="olora"'
        )


def _adapted_kernel(layer: LoRALayer) -> jax.Array:
    """K + s a b of a layer as it is, in float32 or better, on one device or the same on all."""
    kernel, pair = jax.tree.map(meshes.whole, (layer.kernel[...], layer.pair))
    return merge_kernel(widened(kernel), pair, layer.scale, layer.axes)


def _split(
    matrix: jax.Array, rank: int, method: str, scale: float, iterations: int, key: jax.Array
) -> tuple[LoRAPair, int]:
    """The factors of matrices (..., in, out), and how many of them are more than rounding."""
    if method == "olora":
        q, r = qr(transposed(matrix))
        return LoRAPair(transposed(r[..., :rank, :]), transposed(q[..., :rank])), rank
    if method == "pissa":
        left, values, right = svd(matrix)
        found = Triplets(left[..., :rank], values[..., :rank], right[..., :rank, :])
    else:
        found = _sketched(matrix, rank, iterations, key)
    seen = (found.values > ROUNDING * found.values[..., :1]) & (found.values > 0)
    size = jnp.sqrt(found.values / scale)
    pair = LoRAPair(found.left * size[..., None, :], size[..., None] * found.right)
    return pair, int(jnp.min(jnp.sum(seen, axis=-1)))


def _sketched(matrix: jax.Array, rank: int, iterations: int, key: jax.Array) -> Triplets:
    *batch, n_in, n_out = matrix.shape
    zeros = lambda *shape: jnp.zeros((*batch, *shape), matrix.dtype)

    def products(pairs: list[LoRAPair]) -> list[LoRAPair]:
        [pair] = pairs
        of_a = product(matrix, transposed(pair.b))
        return [LoRAPair(of_a, product(transposed(pair.a), matrix))]

    pair = LoRAPair(zeros(n_in, rank), zeros(rank, n_out))
    [found] = leading_triplets(products, [pair], key, iterations=iterations)
    return found


def _write(layer: LoRALayer, pair: LoRAPair, key: jax.Array) -> None:
    """Writes a start into a layer, and into its kernel what is left."""
    adapted = _adapted_kernel(layer)
    node: Any = pair if layer.lora.extra is None else layer.lora.extra.add_to(pair, key)
    write_node(layer, node)
    written = jax.tree.map(meshes.whole, layer.pair)
    rest = merge_kernel(adapted, written, -layer.scale, layer.axes)
    layer.kernel[...] = rest.astype(layer.kernel[...].dtype)
    layer.corrected = True
