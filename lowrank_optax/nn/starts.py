r"""Starts from the gradient: factors along the leading singular vectors of the full gradient.

The full gradient G of an adapted kernel is never formed (`_core/sketch.py`): the backward pass of
the adapter gives its products with narrow matrices, and block power iteration gives its leading
singular triplets $G \approx U \Sigma V^\top$. Of these the methods make

- `"lora_one"` (arXiv 2502.01235): $a = U \sqrt{\Sigma / (\sigma_1 \gamma)}$ and
  $b = -\sqrt{\Sigma / (\sigma_1 \gamma)}\, V^\top$, a step of descent;
- `"lora_ga"` (arXiv 2407.05000): a along the first r left vectors, b along the right vectors
  r + 1 to 2r, both times $n_{out}^{1/4} / \sqrt\gamma$;
- `"frames"`: SDS-LoRA's frames are U and $V^\top$, the factors are zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import Progress

from lowrank_optax._core.arguments import check_choice, check_integer, check_positive
from lowrank_optax._core.frames import FramedPair
from lowrank_optax._core.layouts import variables_of
from lowrank_optax._core.linalg import widened
from lowrank_optax._core.names import in_words
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.pairing import find_pairs
from lowrank_optax._core.scales import scales
from lowrank_optax._core.sketch import ROUNDING, Triplets, leading_triplets
from lowrank_optax.nn.config import Frames, LoRAConfig
from lowrank_optax.nn.dora import initial_magnitudes
from lowrank_optax.nn.flax_nnx import LoRALayer
from lowrank_optax.nn.functional import merge_kernel, why_not_mergeable
from lowrank_optax.nn.nnx_merging import refuse_shared_kernels
from lowrank_optax.nn.nnx_surgery import lora_layers, replace_lora

_BLOCKS = {"lora_one": 1, "lora_ga": 2, "frames": 1}
_GAMMA = {"lora_one": 128.0, "lora_ga": 16.0, "frames": 1.0}
_KEEPS_FUNCTION = {"lora_one": False, "lora_ga": True, "frames": False}
_ROUNDING_BY_DEFAULT = {"gpu": 2.0**-10, "tpu": 2.0**-7}
"""Of float32 products, which accelerators compute in TF32 and bfloat16 unless told otherwise."""


def gradient_start(
    model: nnx.Module,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Sequence[Any],
    method: str = "lora_one",
    *,
    gamma: float | None = None,
    keep_function: bool | None = None,
    iterations: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, jax.Array]:
    r"""Starts the adapters of a model from the gradient of a few batches, in place.

    Args:
        model: an NNX model with LoRA layers. What its adapters hold is overwritten.
        loss_fn: `loss_fn(model, batch)`, a scalar; the gradient is the mean over the batches.
        batches: a few batches, gone through 2 + 2 `iterations` times (twice that for `"lora_ga"`).
            The studies take one.
        method: `"lora_one"`, `"lora_ga"`, or `"frames"` for adapters with
            `Frames(warmup=False)`.
        gamma: $\gamma$, positive: the larger, the smaller the start. By default 128 for
            `"lora_one"` and 16 for `"lora_ga"`, the released values; with `polora`, which needs
            only a small start, 1e6.
        keep_function: whether to subtract $s\,a\,b$ from the kernels, so that the model computes
            what it did. By default as the method's release: not for `"lora_one"`, for `"lora_ga"`.
        iterations: rounds of power iteration. 0 did as well as 2 in the studies, by two
            gradients a batch; singular vectors as the papers define them need some.
        seed: of the random start of the power iteration.
        progress: whether to show a progress bar.

    Returns:
        The singular values that were found, by path of the layer.

    Raises:
        TypeError: batches that are no list, such as one array.
        ValueError: no LoRA layer, a merged one, an argument out of range, no batches; a layer whose
            gradient is zero, not finite, or of a lower rank than its adapter beyond rounding (on
            a GPU or TPU under `jax.default_matmul_precision("highest")` there is less of it); a
            kernel that is not floating or shared, and would have to be corrected, or was by an
            earlier start; frames for adapters without, or another method for adapters with
            `Frames(warmup=False)`; a zero column of a kernel under DoRA. Nothing is changed then.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> loss = lambda model, x: jnp.mean((model(x) - 1) ** 2 * jnp.arange(8.0))
        >>> values = nn.gradient_start(model, loss, [jnp.eye(4)], progress=False)
        >>> values['layers/0'].shape, bool(jnp.any(model.layers[0].lora_b[...]))
        ((2,), True)

    Source: LoRA-One, arXiv 2502.01235; LoRA-GA, arXiv 2407.05000.
    """
    gamma, keep_function = _checked(method, gamma, keep_function, iterations, batches)
    layers = lora_layers(model)
    for path, layer in layers.items():
        _require_startable(in_words(path, "the layer"), layer, method, keep_function)
    if keep_function:
        refuse_shared_kernels(model, layers)
    replace_lora(model, lambda path, layer: _plain(layer))
    try:
        graph, factors, *rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(factors: Any, rest: Any, batch: Any) -> jax.Array:
            return loss_fn(nnx.merge(graph, factors, *rest), batch)

        triplets = gradient_triplets(
            loss,
            factors,
            batches,
            rest,
            blocks=_BLOCKS[method],
            iterations=iterations,
            seed=seed,
            progress=progress,
        )
    finally:
        replace_lora(model, lambda path, layer: layers[path])
    for path, layer in layers.items():
        noise = max(ROUNDING, _rounding(layer) / 64)
        where = f"{in_words(path, 'the layer')}: "
        _require_rank(where, triplets[path], layer.lora.rank * _BLOCKS[method], noise)
    norms = {
        path: initial_magnitudes(layer.kernel[...], layer.axes, path)
        for path, layer in layers.items()
        if layer.lora.dora
    }
    for index, (path, layer) in enumerate(layers.items(), start=1):  # from here on nothing raises
        key = jax.random.fold_in(jax.random.key(seed), index)  # key(seed) began the iteration
        node = start_pair(triplets[path], layer.lora.rank, method, gamma)
        if method != "frames" and layer.lora.extra is not None:
            node = layer.lora.extra.add_to(node, key)
        _write(layer, node, norms.get(path), keep_function)
    return {path: found.values for path, found in triplets.items()}


def gradient_triplets(
    loss: Callable[..., jax.Array],
    params: Any,
    batches: Sequence[Any],
    *frozen: Any,
    scale: Any = 1.0,
    blocks: int = 1,
    iterations: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Triplets]:
    r"""Computes leading singular triplets of the full gradients behind the pairs of a tree.

    For Linen and plain trees; `start_pair` makes factors of them.

    Args:
        loss: `loss(params, *frozen, batch)`, a scalar.
        params: a tree with plain pairs of rank r, whose values do not matter; its other leaves
            stay as they are.
        batches: a few batches; the gradient is the mean over them.
        frozen: further arguments of the loss, such as frozen parameters.
        scale: the forward scale s: a number, a callable from a path, or a tree.
        blocks: how many blocks of r triplets.
        iterations: rounds of power iteration.
        seed: of its random start.
        progress: whether to show a progress bar.

    Returns:
        The triplets by path of the pair.

    Raises:
        TypeError: batches that are no list, such as one array; blocks or iterations that are no
            integers.
        ValueError: no batches, no pairs, blocks or iterations out of range, or a gradient that is
            not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, nn
        >>> params = {"q": LoRAPair(jnp.zeros((4, 2)), jnp.zeros((2, 3)))}
        >>> loss = lambda params, x: jnp.sum(nn.lora_apply(x, params["q"]) * jnp.arange(3.0))
        >>> found = gradient_triplets(loss, params, [jnp.eye(4)], progress=False)
        >>> f"{found['q'].values[0]:.3f}"
        '4.472'

    Source: subspace iteration, arXiv 0909.4061.
    """
    pairing = find_pairs(params)
    if not pairing.pairs:
        raise ValueError("the parameters hold no LoRA pairs: there is no gradient to start from")
    _require_batches(batches)
    check_integer("blocks", blocks, least=1)
    check_integer("iterations", iterations, least=0)
    pairs = pairing.take(params, LoRAPair)
    factors = scales(pairing, scale)
    others = pairing.rest(params)

    @jax.jit
    def gradient(pairs: Any, batch: Any, *frozen: Any) -> Any:
        of_pairs = lambda pairs: loss(
            pairing.merge(pairing.put(pairs, params), others), *frozen, batch
        )
        return jax.grad(of_pairs)(pairs)

    passes = blocks * (2 + 2 * iterations)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("gradient start", total=passes * len(batches))

        def gradients(pairs: list[LoRAPair]) -> list[LoRAPair]:
            total = None
            for batch in batches:
                part = jax.tree.map(widened, gradient(pairs, batch, *frozen))
                total = part if total is None else jax.tree.map(jnp.add, total, part)
                bar.advance(task)
            mean = lambda g, s: jax.tree.map(lambda x: x / (s * len(batches)), g)
            means = [mean(g, s) for g, s in zip(total or [], factors, strict=True)]
            for at, pair in zip(pairing.pairs, means, strict=True):
                if not all(jnp.all(jnp.isfinite(x)) for x in pair):
                    raise ValueError(
                        f"{in_words(at.path)}: the gradient is not finite; check the loss and the"
                        " batches"
                    )
            return means

        found = leading_triplets(
            gradients, pairs, jax.random.key(seed), blocks=blocks, iterations=iterations
        )
    return {at.path: triplets for at, triplets in zip(pairing.pairs, found, strict=True)}


def start_pair(triplets: Triplets, rank: int, method: str, gamma: float) -> Any:
    """Makes the factors of a start from the triplets of a gradient.

    Args:
        triplets: r of them for `"lora_one"` and `"frames"`, 2r for `"lora_ga"`.
        rank: r.
        method: as in `gradient_start`.
        gamma: as in `gradient_start`.

    Returns:
        A `LoRAPair`, for `"frames"` a `FramedPair`, in the dtype of the triplets.

    Raises:
        TypeError: a rank that is no integer.
        ValueError: an unknown method, an argument out of range, fewer triplets than the method
            needs, or a gradient that is zero or of a lower rank.

    Example:
        >>> import jax.numpy as jnp
        >>> found = Triplets(jnp.eye(3, 1), jnp.array([5.0]), jnp.eye(1, 3))
        >>> start_pair(found, 1, "lora_one", gamma=4.0).b.tolist()
        [[-0.5, -0.0, -0.0]]
    """
    check_choice("method", method, tuple(_BLOCKS))
    check_integer("rank", rank, least=1)
    check_positive("gamma", gamma)
    needed, there = _BLOCKS[method] * rank, triplets.values.shape[-1]
    if there < needed:
        raise ValueError(
            f"a start by {method!r} at rank {rank} needs {needed} triplets, got {there}; give"
            " `gradient_triplets` pairs of this rank, and blocks=2 for 'lora_ga'"
        )
    if not isinstance(triplets.values, jax.core.Tracer):
        _require_rank("", triplets, needed, ROUNDING)
    left, right = triplets.left[..., :rank], triplets.right[..., :rank, :]
    if method == "frames":
        return FramedPair(jnp.zeros_like(left), jnp.zeros_like(right), left, right)
    if method == "lora_ga":
        size = right.shape[-1] ** 0.25 / gamma**0.5
        return LoRAPair(size * left, size * triplets.right[..., rank : 2 * rank, :])
    size = jnp.sqrt(triplets.values[..., :rank] / (triplets.values[..., :1] * gamma))
    return LoRAPair(left * size[..., None, :], -size[..., None] * right)


def write_node(layer: LoRALayer, node: Any) -> None:
    """Writes a node into the variables of a layer, in their dtypes and shardings.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = LoRALayer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), LoRAConfig(1), rngs=nnx.Rngs(1))
        >>> write_node(layer, LoRAPair(jnp.ones((3, 1)), jnp.ones((1, 2))))
        >>> layer.pair.b.tolist()
        [[1.0, 1.0]]
    """
    for name, value in variables_of(node).items():
        variable = getattr(layer, name)
        variable[...] = value.astype(variable[...].dtype)


def _checked(
    method: str, gamma: Any, keep_function: Any, iterations: Any, batches: Any
) -> tuple[float, bool]:
    if method in ("pissa", "pissa_fast", "olora"):
        raise ValueError(
            f"{method!r} starts from the weights: call weight_start(model, {method!r})"
        )
    check_choice("method", method, tuple(_BLOCKS))
    check_integer("iterations", iterations, least=0)
    gamma = _GAMMA[method] if gamma is None else gamma
    check_positive("gamma", gamma)
    _require_batches(batches)
    return gamma, _KEEPS_FUNCTION[method] if keep_function is None else keep_function


def _require_batches(batches: Any) -> None:
    if hasattr(batches, "shape") or not hasattr(batches, "__len__"):
        raise TypeError(
            f"batches must be a list of what the loss takes, got a {type(batches).__name__}; write"
            " [batch] for one batch"
        )
    if not batches:
        raise ValueError("a gradient start needs at least one batch")


def _require_startable(path: str, layer: LoRALayer, method: str, keep_function: bool) -> None:
    if layer.merged:
        raise ValueError(f"{path}: is merged; call unmerge_lora first")
    if layer.corrected:
        raise ValueError(
            f"{path}: a start has changed its kernel already; start a model that has its own"
            " kernels, or call weight_start, which counts the adapter to the kernel"
        )
    kernel = layer.kernel[...]
    if keep_function and why_not_mergeable(kernel.dtype):
        raise ValueError(
            f"{path}: its kernel of {kernel.dtype} cannot be corrected for the start; give"
            " keep_function=False"
        )
    keeps_product = layer.lora.extra is None or layer.lora.extra.keeps_product
    starts_from_frames = isinstance(layer.lora.extra, Frames) and not keeps_product
    if method == "frames" and not starts_from_frames:
        raise ValueError(
            f"{path}: a start of frames needs adapters with LoRAConfig(extra=Frames(warmup=False))"
        )
    if method != "frames" and not keeps_product:
        raise ValueError(
            f"{path}: an adapter with {layer.lora.extra} starts with factors of its own; give"
            ' method="frames", which is for Frames(warmup=False)'
        )


def _plain(layer: LoRALayer) -> LoRALayer:
    """A layer on the same base whose adapter is a plain pair with the scale 1."""
    rank = layer.lora.rank
    config = LoRAConfig(rank, alpha=float(rank), dtype=layer.lora.dtype)
    return LoRALayer(layer.base, config, rngs=nnx.Rngs(0))


def _rounding(layer: LoRALayer) -> float:
    """The relative rounding of the products behind an adapter's gradient."""
    dtypes = (layer.pair.a.dtype, layer.lora.dtype or layer.pair.a.dtype)
    rounding = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if jnp.float64 in dtypes or precision in ("float32", "highest"):
        return rounding
    (platform,) = {device.platform for device in layer.pair.a.devices()}
    return max(rounding, _ROUNDING_BY_DEFAULT.get(platform, 0.0))


def _require_rank(where: str, triplets: Triplets, rank: int, noise: float) -> None:
    values = triplets.values
    if not jnp.all(values[..., 0] > 0):
        raise ValueError(
            f"{where}the gradient is zero and gives no start; leave the layer out of the targets"
        )
    seen = jnp.min(jnp.sum(values[..., :rank] > noise * values[..., :1], axis=-1))
    if seen < rank:
        raise ValueError(
            f"{where}the gradient has rank {int(seen)}, but the start needs {rank}: give more"
            " batches or tokens, or a lower rank"
        )


def _write(layer: LoRALayer, node: Any, norms: jax.Array | None, keep_function: bool) -> None:
    """Writes a start into a layer, with the norms from which DoRA starts."""
    write_node(layer, node)
    if norms is not None:
        layer.lora_magnitude[...] = norms
    if keep_function:
        kernel, layer.corrected = layer.kernel, True
        kernel[...] = merge_kernel(kernel[...], layer.pair, -layer.scale, layer.axes)
