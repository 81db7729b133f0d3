r"""Keras: any optax transformation as an optimizer for `model.compile`, on the JAX backend.

`import lowrank_optax` does not import Keras. This module does, when it is first named.

**Learning rate.** It belongs to the transformation, as a number or a schedule. A factor on the
updates would not be a learning rate for every method: where one factor moves after the other, the
second is updated for where the first will be. Keras's callbacks, such as `ReduceLROnPlateau`, read
and set `learning_rate` where it stands in the state; elsewhere they are an error:

    tx = optax.inject_hyperparams(lambda learning_rate: polora(learning_rate, scale=2.0))
    Optax(tx(learning_rate=1e-2))

**Options of Keras's optimizers** are not taken, for optax has its own: `clip_by_global_norm` of
this library in `optax.chain`, `optax.MultiSteps(...).gradient_transformation()` to accumulate
gradients, and the methods' `weight_decay`. `keras.optimizers.LossScaleOptimizer` scales the loss
around the optimizer, as `compile` does by itself for float16. Averages of weights are not kept.

**Saving.** `model.save_weights` writes, for a layer with LoRA, its weight with the factors merged
into it, and `load_weights` makes both factors zero. That is right for use and wrong for going on,
since no gradient passes zeros. To go on, keep `weights = model.get_weights()` and the state:

    state = {}
    model.optimizer.save_own_variables(state)

Then make and compile the model as before, and call `model.set_weights(weights)`,
`model.optimizer.build(model.trainable_variables)` and `model.optimizer.load_own_variables(state)`.
Without LoRA, Keras's own files keep everything. `model.save` and `to_json` write a configuration,
and a transformation has none: compile with an optimizer of Keras before them.
"""

import collections
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        error.add_note("lowrank_optax.integrations.keras needs Keras 3: `pip install keras`.")
    raise

__all__ = ["Optax"]

_INPUT_FACTORS = ("lora_kernel_a", "lora_embeddings_a")
_GO_ON = (
    "To go on training, keep `model.get_weights()` and a dictionary filled by"
    " `model.optimizer.save_own_variables`; restore them by `model.set_weights`,"
    " `model.optimizer.build(model.trainable_variables)` and `model.optimizer.load_own_variables`."
)
_RATE = ".hyperparams['learning_rate']"
_SCHEDULED_RATE = ".hyperparams_states['learning_rate']"


class Optax(keras.optimizers.Optimizer):
    r"""An optax transformation as a Keras optimizer.

    The transformation gets one dictionary: each trainable variable's value by `variable.path`, in
    Keras's order. So the optimizers of this library find the pairs that `enable_lora` makes, call
    them by the path of their layer, and give the other trainable variables to their fallback. Its
    state is kept in Keras variables, which `fit` threads through its compiled step. The module says
    what becomes of learning rates, of other options, and of saved models.

    Args:
        transformation: optimizes the dictionary. It starts when the variables are known, in
            `build`; `fit` calls it.
        name: begins the paths of the state's variables.

    Raises:
        RuntimeError: Keras does not run on JAX.
        TypeError: `transformation` is none.
        ValueError: in `build`, variables of one path, or parameters that the transformation
            refuses.

    Example:
        >>> import keras, numpy as np
        >>> from lowrank_optax import integrations, polora
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="dense")])
        >>> model.layers[0].enable_lora(rank=2, lora_alpha=4.0)
        >>> model.compile(integrations.keras.Optax(polora(1e-2, scale=4.0 / 2)), loss="mse")
        >>> x = np.random.default_rng(0).normal(size=(32, 8))
        >>> losses = model.fit(x, x[:, :4], epochs=5, verbose=0).history["loss"]
        >>> losses[-1] < losses[0]
        True
        >>> model.optimizer.variables[3].name.replace(model.name, "MODEL")
        'pairs.mu.MODEL.dense.lora_kernel_a'
    """

    def __init__(
        self, transformation: optax.GradientTransformation, *, name: str = "optax"
    ) -> None:
        if keras.backend.backend() != "jax":
            raise RuntimeError(
                "Optax needs Keras on JAX, but its backend is"
                f" {keras.backend.backend()!r}: set the environment variable KERAS_BACKEND=jax"
                " before Keras is first imported."
            )
        if not isinstance(transformation, optax.GradientTransformation):
            raise TypeError(
                f"`transformation` must be an optax transformation, got {transformation!r}; for"
                " example Optax(polora(1e-2, scale=2.0))."
            )
        # A callable, lest Keras makes a variable of its own for the learning rate.
        super().__init__(learning_rate=lambda: self.learning_rate, name=name)
        self._transformation = transformation
        self._state: tuple[keras.Variable, ...] = ()
        self._form = _Form(None, (), ())

    def build(self, variables: list[keras.Variable]) -> None:
        """Starts the transformation's state; does nothing if it is started.

        Args:
            variables: the trainable variables. Those that Keras overwrites with their gradient, as
                the scales of float8 layers, are none of the transformation's.

        Raises:
            ValueError: see the class.

        Example:
            >>> import keras, optax
            >>> optimizer = Optax(optax.sgd(0.1, momentum=0.9))
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="w")])
            >>> [v.path for v in optimizer.variables]
            ['optax/iteration', 'optax/0.trace.w']
        """
        if self.built:
            return
        _require_own_paths(variables)
        params = _values(variables)
        state = self._transformation.init(params)
        self._form = _Form.of(state, {path: i for i, path in enumerate(params)})
        leaves = jax.tree_util.tree_leaves_with_path(state)
        self._state = tuple(self._keep(path, _numbers(leaf)) for path, leaf in leaves)
        super().build(variables)

    def _keep(self, path: Any, leaf: jax.Array) -> keras.Variable:
        """Makes the variable of a leaf of the state."""
        sharding = leaf.sharding
        return self.add_variable(
            shape=leaf.shape,
            dtype=leaf.dtype.name,
            # A copy, for `fit` donates every variable, and a leaf may be the parameter itself.
            initializer=lambda shape, dtype=None: jnp.array(leaf, leaf.dtype, copy=True),
            layout=sharding if isinstance(sharding, jax.sharding.NamedSharding) else None,
            name=jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."),
        )

    def _backend_apply_gradients(
        self, grads: list[Any], trainable_variables: list[keras.Variable]
    ) -> None:
        """Applies the transformation; Keras calls this in `apply` and `stateless_apply`."""
        params = _values(self._trainable_variables)
        given = {v.path: g for v, g in zip(trainable_variables, grads, strict=True)}
        _require_all(given, params)
        ordered = collections.OrderedDict((path, given[path]) for path in params)
        state = self._form.tree_of([v.value for v in self._state])
        updates, state = self._transformation.update(ordered, state, params)
        params = optax.apply_updates(params, updates)
        for variable in trainable_variables:
            self.assign(variable, params[variable.path])
        for variable, leaf in zip(self._state, jax.tree.leaves(state), strict=True):
            self.assign(variable, _numbers(leaf))

    @property
    def learning_rate(self) -> Any:
        """The variable that `optax.inject_hyperparams` keeps it in; an error if there is none."""
        found = [v for place, v in self._entries().items() if place.endswith(_RATE)]
        if len(found) != 1:
            raise ValueError(
                "The learning rate belongs to the optax transformation, and Keras and its callbacks"
                " cannot see it. Give the transformation a schedule instead, or, once the optimizer"
                " is built, they read and set that of `optax.inject_hyperparams(lambda"
                " learning_rate: polora(learning_rate, scale=2.0))(learning_rate=1e-2)`."
            )
        return found[0]

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if any(_SCHEDULED_RATE in place for place in self._form.places):
            raise ValueError(
                "The transformation has a schedule, which would overwrite this learning rate: give"
                " `optax.inject_hyperparams` a number, or leave out Keras's callback."
            )
        self.learning_rate.assign(value)

    def _entries(self) -> dict[str, keras.Variable]:
        state = zip(self._form.places, self._state, strict=True)
        return {"iteration": self.iterations, **dict(state)}

    def save_own_variables(self, store: Any) -> None:
        """Writes the state, by place; `model.save_weights` calls it too.

        Places number the parameters, for Keras names the same layer otherwise in the next model.

        Args:
            store: a mapping to write to.

        Example:
            >>> import keras, optax
            >>> optimizer, store = Optax(optax.sgd(0.1, momentum=0.9)), {}
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="w")])
            >>> optimizer.save_own_variables(store)
            >>> list(store)
            ['iteration', 'state[0].trace[0]']
        """
        for name, variable in self._entries().items():
            store[name] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` wrote; `model.load_weights` calls it too.

        Args:
            store: a mapping to read from.

        Raises:
            ValueError: the store holds other variables than this optimizer, or factors are zero,
                since `model.load_weights` made them so.

        Example:
            >>> import keras, optax
            >>> optimizer = Optax(optax.sgd(0.1, momentum=0.9))
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="w")])
            >>> optimizer.load_own_variables({"iteration": 7, "state[0].trace[0]": [3.0, 4.0]})
            >>> [v.numpy().tolist() for v in optimizer.variables]
            [7, [3.0, 4.0]]
        """
        entries = self._entries()
        if other := sorted(set(entries) ^ set(store.keys())):
            raise ValueError(
                f"The saved state of {self.name} is not that of this optimizer; of these, one has"
                f" what the other lacks: {', '.join(other[:5])}. Compile with the transformation it"
                " was saved with and call `optimizer.build(model.trainable_variables)` before"
                " loading. `model.load_weights(path, skip_mismatch=True)` loads the weights alone."
            )
        _require_factors(self._trainable_variables)
        for name, variable in entries.items():
            variable.assign(store[name])

    def get_config(self) -> dict[str, Any]:
        """Refuses: a transformation is made of functions, which have no configuration.

        Raises:
            ValueError: always, with the way to save.

        Example:
            >>> import optax
            >>> Optax(optax.sgd(0.1)).get_config()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: An optax transformation cannot be written as a configuration...
        """
        raise ValueError(
            "An optax transformation cannot be written as a configuration, so neither can a model"
            " that is compiled with one. To use the model, save `model.save_weights`, or compile it"
            f" with an optimizer of Keras before `model.save`. {_GO_ON}"
        )


def _values(variables: list[keras.Variable]) -> Any:
    """The transformation's parameters. They keep Keras's order, whatever the layers are called."""
    taken = (v for v in variables if not v.overwrite_with_gradient)
    return collections.OrderedDict((v.path, v.value) for v in taken)


def _require_own_paths(variables: list[keras.Variable]) -> None:
    counts = collections.Counter(v.path for v in variables)
    if twice := [path for path, count in counts.items() if count > 1]:
        raise ValueError(
            f"Several trainable variables have the path {twice[0]}: give their layers different"
            " names, or weights of one layer different names in `add_weight`."
        )


def _require_all(given: Collection[str], params: Iterable[str]) -> None:
    if missing := [path for path in params if path not in given]:
        raise ValueError(
            f"No gradient for {', '.join(missing)}: the transformation needs that of every variable"
            " that the optimizer was built with. Set `trainable = False` on the others before it is"
            " built, or give zeros."
        )


def _require_factors(variables: list[keras.Variable]) -> None:
    """Raises where factors were loaded from a file of Keras's, which has none."""
    for variable in variables:
        if variable.name in _INPUT_FACTORS and not jnp.any(variable.value):
            raise ValueError(
                f"{variable.path} is zero, and no gradient passes it: Keras saves weights with"
                f" their factors merged into them, and loads zeros for both. {_GO_ON}"
            )


class _Form(NamedTuple):
    """How a transformation's state is made of arrays.

    Args:
        structure: the tree's.
        places: where each leaf stands, with the parameters' numbers for their names.
        keys: of each leaf the kind of random key that it is, or None.
    """

    structure: Any
    places: tuple[str, ...]
    keys: tuple[Any, ...]

    @classmethod
    def of(cls, state: Any, numbers: dict[str, int]) -> "_Form":
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        keys = tuple(jax.random.key_impl(x) if _is_key(x) else None for _, x in leaves)
        return cls(structure, tuple(_place(path, numbers) for path, _ in leaves), keys)

    def tree_of(self, arrays: list[jax.Array]) -> Any:
        leaves = [
            x if key is None else jax.random.wrap_key_data(x, impl=key)
            for x, key in zip(arrays, self.keys, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def _place(path: Any, numbers: dict[str, int]) -> str:
    numbered = (
        jax.tree_util.DictKey(numbers.get(key.key, key.key)) if hasattr(key, "key") else key
        for key in path
    )
    return f"state{jax.tree_util.keystr(tuple(numbered))}".replace("/", ".")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> jax.Array:
    """A leaf as a Keras variable holds it: of a random key, its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
