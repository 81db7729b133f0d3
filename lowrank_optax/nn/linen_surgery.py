"""Adding LoRA to an existing Linen model, and folding it into the kernels.

Training only the adapters:

    config = nn.LoRAConfig(rank=8)
    with nn.lora_interceptor('query|value', config) as adapters:
        variables = model.init(key, x)
    params, lora = variables['params'], variables['lora']

    @jax.jit
    def step(lora, opt_state, x):
        def loss(lora):
            with nn.lora_interceptor('query|value', config):
                return loss_of(model.apply({'params': params, 'lora': lora}, x))
        updates, opt_state = tx.update(jax.grad(loss)(lora), opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

The `with` belongs inside the function that is jitted: the interceptor acts while JAX traces, and a
function traced outside of it ignores the adapters. Pretrained parameters get adapters by
`model.apply({'params': params}, x, mutable=['lora'], rngs={'lora': key})`. With DoRA there is no
other way: its magnitudes are the norms of the kernels that they are made with.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.core
import flax.linen as nn
import jax
from flax import traverse_util
from flax.linen.module import InterceptorContext

from lowrank_optax._core.layouts import node_of
from lowrank_optax._core.names import MAGNITUDE, in_words, listed
from lowrank_optax.nn.calls import read_call
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.dora import merge_directional_kernel
from lowrank_optax.nn.flax_linen import (
    COLLECTION,
    SUPPORTED,
    KernelUse,
    LinenAdapter,
    LoRAModule,
    adapted_output,
    attended_output,
    is_adaptable,
    kernel_name,
    layer_use,
)
from lowrank_optax.nn.functional import merge_kernel
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.nn.targets import TargetMatcher, Targets

_ACTIVE: ContextVar[tuple[TargetMatcher, ...]] = ContextVar(
    "interceptors that are open", default=()
)


@contextlib.contextmanager
def lora_interceptor(
    targets: Targets, config: LoRAConfig, *, deterministic: bool = False
) -> Iterator[dict[str, LinenAdapter]]:
    """Gives the targeted layers of any Linen model LoRA adapters while the context is open.

    `init` creates them in the collection `'lora'` (from the `'lora'` rng stream, or else
    `'params'`) and leaves every parameter bit for bit what it is without the interceptor;
    `apply` uses them. Works under `jit`, `grad`, `nn.remat`, and `nn.scan` or `nn.vmap`
    with `'lora': 0` in their `variable_axes`. Layers of other settings get an interceptor of their
    own: `with lora_interceptor('query', small), lora_interceptor('mlp', large):`.

    Args:
        targets: a regular expression, a sequence of them, or `(path, module) -> bool`. An
            expression matches the whole '/'-joined path or its last component (`re.fullmatch`).
        config: settings of the adapters, the same in `init` and `apply`.
        deterministic: if True, no dropout; else a positive dropout needs a `'dropout'` rng.

    Yields:
        A dictionary that is filled while models are traced: what `merge_lora_variables` needs to
        know of each adapter, by '/'-joined path.

    Raises:
        TypeError: if `config` is not a `LoRAConfig`.
        ValueError: if a target is not a `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv`,
            `nn.Embed` or a module with an `einsum_str` and one kernel, or has LoRA already; if the
            rank exceeds min(in, out); if the variables hold no adapter for a target, one of
            another rank, or one for a layer that is no target; if two interceptors have the same
            target; at the end of the context, if a
            target matched nothing while a model or its adapters were initialized in it.

    Example:
        >>> import flax.linen
        >>> import jax, jax.numpy as jnp
        >>> model = flax.linen.Sequential([flax.linen.Dense(8), flax.linen.Dense(2)])
        >>> with lora_interceptor('layers_0', LoRAConfig(rank=2)) as adapters:
        ...     variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, variables['lora'])
        {'layers_0': {'lora_a': (4, 2), 'lora_b': (2, 8)}}
        >>> adapters['layers_0'].scale
        8.0

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """
    require_config(config)
    matcher = TargetMatcher(targets)
    adapters: dict[str, LinenAdapter] = {}
    initialized: set[str] = set()
    running: list[nn.Module] = []

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        module = context.module
        attends = isinstance(module, nn.Embed) and context.method_name == "attend"
        if not (attends or context.method_name == "__call__") or module.scope is None:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        begins = module.is_initializing() or (
            module.is_mutable_collection(COLLECTION)
            and not module.has_variable(COLLECTION, "lora_a")
        )
        if begins and is_adaptable(module):
            initialized.add(path)
        # A subclass that calls its parent's method is one layer, not two.
        if any(module is outer for outer in running):
            return call(*args, **kwargs)
        is_target = matcher(path, module)
        is_others = any(other(path, module) for other in _ACTIVE.get() if other is not matcher)
        if is_target and is_others:
            raise ValueError(f"{in_words(path, 'the model')}: two interceptors adapt this layer")
        if not is_target:
            has_adapter = module.has_variable(COLLECTION, "lora_a")
            if has_adapter and not is_others and not isinstance(module, LoRAModule):
                raise ValueError(
                    f"{path}: the variables hold an adapter for this layer, but no target matches"
                    " it: give the targets that init had"
                )
            return call(*args, **kwargs)
        layer = _require_supported(module, path)
        running.append(module)
        try:
            y = call(*args, **kwargs)
        finally:
            running.pop()
        inputs, einsum_str = read_call(context.orig_method, args, kwargs)
        use = _use_of(layer, path, inputs, einsum_str)
        adapter = LinenAdapter(use.kernel_axes, config.scale, kernel_name(layer))
        _record(adapters, path, adapter)
        if attends and isinstance(layer, nn.Embed):
            return attended_output(layer, config, inputs, y)
        return adapted_output(layer, config, use, inputs, y, deterministic=deterministic)

    token = _ACTIVE.set((*_ACTIVE.get(), matcher))
    try:
        with nn.intercept_methods(intercept):
            yield adapters
    finally:
        _ACTIVE.reset(token)
    if initialized:
        matcher.require_all_used(initialized)


def lora_adapters(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, LinenAdapter]:
    """Finds the adapters of a model that is built of `LoRADense` and its like.

    The model is traced, not run.

    Args:
        model: the model.
        variables: its variables.
        *args: example arguments of `model.apply`.
        **kwargs: keyword arguments of `model.apply`, such as `rngs`.

    Returns:
        What `merge_lora_variables` needs to know of each adapter, by '/'-joined path.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax.nn.flax_linen import LoRADense
        >>> model, x = LoRADense(6, lora=LoRAConfig(rank=2)), jnp.ones((1, 4))
        >>> lora_adapters(model, model.init(jax.random.key(0), x), x)[''].axes
        KernelAxes(batch=(), contracted=(-2,), out=(-1,))
    """
    adapters: dict[str, LinenAdapter] = {}

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, LoRAModule):
            given = read_call(context.orig_method, args, kwargs)
            axes = layer_use(module, *given).kernel_axes
            _record(adapters, "/".join(module.path), LinenAdapter(axes, module.lora.scale))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda tree: model.apply(tree, *args, **kwargs), variables)
    return adapters


def merge_lora_variables(
    variables: Mapping[str, Any], adapters: Mapping[str, LinenAdapter]
) -> dict[str, Any]:
    """Folds the adapters into the kernels.

    Sums are formed in at least float32 and rounded to the kernel's dtype.

    Args:
        variables: with the collections `'params'` and `'lora'`; layers may be stacked along
            leading axes (`nn.scan` with `variable_axes={'params': 0, 'lora': 0}`).
        adapters: what `lora_interceptor` yielded or `lora_adapters` returned.

    Returns:
        Parameters for the plain model; `variables` is left as it is.

    Raises:
        TypeError: if `adapters` is something else.
        ValueError: if `variables` has no adapters, or one that `adapters` does not describe or
            that does not fit its kernel.

    Example:
        >>> import flax.linen
        >>> import jax, jax.numpy as jnp
        >>> model, x = flax.linen.Sequential([flax.linen.Dense(8)]), jnp.ones((1, 4))
        >>> config = LoRAConfig(rank=2, b_init=jax.nn.initializers.ones)
        >>> with lora_interceptor('layers_0', config) as adapters:
        ...     y, variables = model.init_with_output(jax.random.key(0), x)
        >>> merged = merge_lora_variables(variables, adapters)
        >>> bool(jnp.allclose(model.apply({'params': merged}, x), y, rtol=1e-5))
        True
    """
    return _add_deltas(variables, adapters, 1)


def unmerge_lora_variables(
    variables: Mapping[str, Any], adapters: Mapping[str, LinenAdapter]
) -> dict[str, Any]:
    """Subtracts what `merge_lora_variables` added.

    Both directions round to the kernel's dtype, so kernels come back to within that rounding, not
    bit for bit. Keep the original parameters where that matters.

    Args:
        variables: with the merged `'params'` and the unchanged `'lora'`.
        adapters: as for `merge_lora_variables`.

    Returns:
        The parameters without the adapters.

    Raises:
        ValueError: as `merge_lora_variables`.

    Example:
        >>> import flax.linen
        >>> import jax, jax.numpy as jnp
        >>> model = flax.linen.Sequential([flax.linen.Dense(8)])
        >>> with lora_interceptor('layers_0', LoRAConfig(rank=2)) as adapters:
        ...     variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> merged = merge_lora_variables(variables, adapters)
        >>> params = unmerge_lora_variables({**variables, 'params': merged}, adapters)
        >>> bool((params['layers_0']['kernel'] == variables['params']['layers_0']['kernel']).all())
        True
    """
    return _add_deltas(variables, adapters, -1)


def _require_supported(module: nn.Module, path: str) -> nn.Module:
    if isinstance(module, LoRAModule):
        raise ValueError(
            f"{in_words(path, 'the model')} already has LoRA; leave it out of the targets"
        )
    if not is_adaptable(module):
        raise ValueError(
            f"{in_words(path, 'the model')} is a {type(module).__name__}; LoRA adapts {SUPPORTED}:"
            " narrow the targets"
        )
    return module


def _use_of(layer: nn.Module, path: str, inputs: jax.Array, einsum_str: str | None) -> KernelUse:
    try:
        return layer_use(layer, inputs, einsum_str)
    except ValueError as error:
        raise ValueError(f"{in_words(path, 'the model')}: {error}") from error


def _record(adapters: dict[str, LinenAdapter], path: str, adapter: LinenAdapter) -> None:
    if adapters.setdefault(path, adapter) != adapter:
        raise ValueError(f"{path}: two calls of it give the axes of one kernel different roles")


def _add_deltas(
    variables: Mapping[str, Any], adapters: Mapping[str, LinenAdapter], sign: int
) -> dict[str, Any]:
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters must be what lora_interceptor yielded or lora_adapters returned, got"
            f" {adapters!r}"
        )
    params = traverse_util.flatten_dict(flax.core.unfreeze(variables["params"]))
    factors = traverse_util.flatten_dict(flax.core.unfreeze(variables.get(COLLECTION, {})))
    if not factors:
        raise ValueError("the variables have no 'lora' collection: there is nothing to merge")
    for scope in sorted({path[:-1] for path in factors}):
        name = "/".join(scope)
        if name not in adapters:
            raise ValueError(
                f"{in_words(name, 'the model')}: no adapter of that path is described. Trace the "
                "model: jax.eval_shape(model.apply, variables, x) inside lora_interceptor, or call "
                "lora_adapters(model, variables, x)"
            )
        leaves = {path[-1]: nn.meta.unbox(x) for path, x in factors.items() if path[:-1] == scope}
        axes, scale, kernel_key = adapters[name]
        if (*scope, kernel_key) not in params:
            there = listed(["/".join(path) for path in params], 4) or "none"
            raise ValueError(
                f"{in_words(name, 'the model')}: the parameters hold no {kernel_key!r} there; give"
                f" those of this model, under its names. There are: {there}"
            )
        boxed = params[*scope, kernel_key]
        try:
            kernel = _merged(nn.meta.unbox(boxed), leaves, sign, scale, axes)
        except ValueError as error:
            raise ValueError(f"{in_words(name, 'the model')}: {error}") from error
        params[*scope, kernel_key] = nn.meta.replace_boxed(boxed, kernel)
    return traverse_util.unflatten_dict(params)


def _merged(
    kernel: jax.Array, leaves: Mapping[str, Any], sign: int, scale: float, axes: KernelAxes
) -> jax.Array:
    """A kernel with its adapter's update added or taken out."""
    pair = node_of(leaves.get)
    if MAGNITUDE not in leaves:
        return merge_kernel(kernel, pair, sign * scale, axes)
    if sign < 0:
        raise ValueError(
            "DoRA scales the merged kernel's columns, and what they were is lost; keep the"
            " parameters that were merged"
        )
    return merge_directional_kernel(kernel, pair, leaves[MAGNITUDE], scale, axes)
