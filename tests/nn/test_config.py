"""Settings, initialization and target matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import nn
from lowrank_optax.nn import LoRAConfig
from lowrank_optax.nn.targets import TargetMatcher


def test_scale():
    assert LoRAConfig(rank=4, alpha=8.0).scale == 2.0
    assert LoRAConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"rank": 2, "alpha": 0.0}, "`alpha` must be positive, got 0.0"),
        ({"rank": 2, "dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        ({"rank": 2, "dropout": -0.1}, r"`dropout` must lie in \[0, 1\), got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4.0}, r"`rank` must be an integer, got 4\.0; write rank=8"),
        ({"rank": "8"}, r"`rank` must be an integer, got '8'"),
        ({"rank": True}, r"`rank` must be an integer, got True"),
        ({"rank": None}, r"`rank` must be an integer, got None"),
        ({"rank": 2, "extra": True}, r"extra must be an nn\.Extra such as nn\.Shadows\(\).*True"),
        ({"rank": 2, "extra": nn.Shadows}, r"extra must be an nn\.Extra such as nn\.Shadows\(\)"),
    ],
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        nn.LoRAConfig(**settings)


def nnx_model():
    return nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))


def misuses():
    """What people write, and the error."""
    return [
        (
            lambda: nn.add_lora(nnx_model(), "layers/0", nn.LoRAConfig(rank=2), rngs=0),
            r"rngs must be nnx\.Rngs, got int; write rngs=nnx\.Rngs\(0\)",
        ),
        (
            lambda: nn.LoRALinear(4, 8, lora=nn.LoRAConfig(rank=2), rngs=0),
            r"rngs must be nnx\.Rngs, got int",
        ),
        (
            lambda: nn.add_lora(nnx_model(), "layers/0", 8, rngs=nnx.Rngs(0)),
            r"the settings of adapters are a LoRAConfig, got 8; write nn\.LoRAConfig\(rank=8",
        ),
        (
            lambda: nn.lora_interceptor("layers_0", {"rank": 8}).__enter__(),
            r"the settings of adapters are a LoRAConfig, got \{'rank': 8\}",
        ),
        (
            lambda: nn.add_lora(nnx_model(), "layers/0", rank=8, rngs=nnx.Rngs(0)),
            r"add_lora\(\) got an unexpected keyword argument 'rank'",
        ),
        (
            lambda: nn.LoRAConfig(rank=8, shadows=True),
            r"unexpected keyword argument 'shadows'",
        ),
    ]


@pytest.mark.parametrize(("use", "message"), misuses())
def test_what_is_no_config_or_rngs_is_refused(use, message):
    with pytest.raises(TypeError, match=message):
        use()


def test_variables_of_another_rank_than_the_config_are_refused():
    model, x = linen.Sequential([linen.Dense(8)]), jnp.ones((1, 4))
    with nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2)):
        variables = model.init(jax.random.key(0), x)
    with (
        pytest.raises(
            ValueError, match=r"layers_0: .* adapter of rank 2, but the config has rank 3"
        ),
        nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=3)),
    ):
        model.apply(variables, x)


def test_configs_are_values():
    assert LoRAConfig(rank=4) == LoRAConfig(rank=4)
    assert hash(LoRAConfig(rank=4)) == hash(LoRAConfig(rank=4))


def test_fan_in_is_in_for_every_batch_entry():
    plain = LoRAConfig(rank=64).init_pair(jax.random.key(0), (), 600, 64)
    stacked = LoRAConfig(rank=64).init_pair(jax.random.key(0), (3, 5), 600, 64)
    bound = np.sqrt(6 / 600)  # he_uniform
    for a in (plain.a, stacked.a):
        assert 0.98 * bound < np.abs(a).max() <= bound
    assert stacked.a.shape == (3, 5, 600, 64)
    assert stacked.b.shape == (3, 5, 64, 64)
    assert not np.allclose(stacked.a[0, 0], stacked.a[0, 1])
    assert not np.any(plain.b)


def test_param_dtype_and_initializers_are_used():
    config = LoRAConfig(rank=2, b_init=jax.nn.initializers.ones, param_dtype=jnp.bfloat16)
    pair = config.init_pair(jax.random.key(0), (), 4, 5)
    assert pair.a.dtype == pair.b.dtype == jnp.bfloat16
    assert np.all(pair.b == 1)


def test_expressions_match_the_whole_path_or_its_last_component():
    matcher = TargetMatcher(r"query|layers/\d/mlp")
    assert matcher("layers/0/attention/query", None)
    assert matcher("layers/3/mlp", None)
    assert not matcher("decoder/layers/3/mlp", None)
    assert not matcher("query/norm", None)
    assert not matcher("my_query", None)


def test_a_predicate_sees_path_and_module():
    matcher = TargetMatcher(lambda path, module: path == "a" and module == 1)
    assert matcher("a", 1)
    assert not matcher("a", 2)


def test_only_the_unused_pattern_is_named_with_available_paths():
    matcher = TargetMatcher(["query", "valeu"])
    matcher("attention/query", None)
    with pytest.raises(ValueError, match=r"no module: valeu\. .*: attention/key, attention/query"):
        matcher.require_all_used(["attention/query", "attention/key"])
    with pytest.raises(ValueError, match="and 8 more"):
        matcher.require_all_used(f"layer_{i}" for i in range(20))


def test_a_predicate_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="the predicate"):
        TargetMatcher(lambda path, module: False).require_all_used(["a"])


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match="targets is empty"):
        TargetMatcher([])


@pytest.mark.parametrize("extra", [None, nn.Frames(), nn.Shadows()], ids=lambda x: type(x).__name__)
def test_initializers_with_metadata_of_nnx_are_taken_or_refused_with_the_remedy(extra):
    init = nnx.with_partitioning(jax.nn.initializers.he_uniform(), (None, "m"))
    config = nn.LoRAConfig(rank=2, a_init=init, extra=extra)
    make = lambda batch: config.init_pair(jax.random.key(0), batch, 8, 6)
    if extra is None:
        assert isinstance(make(()).a, nnx.VariableMetadata)
    else:
        with pytest.raises(ValueError, match=r"do not go with an extra.*lowrank_optax\.sharding"):
            make(())
    with pytest.raises(ValueError, match=r"do not go with a stacked kernel.*lowrank_optax"):
        make((3,))
