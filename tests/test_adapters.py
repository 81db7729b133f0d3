"""Every kind of pair as an ordinary LoRA pair: exact, and nearest of a rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import LoRAPair, adapters, frame, nn, shadow

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make_nodes(batch=()):
    """Every kind of pair, in the middle of a training run."""
    pair = LoRAPair(normal(0, *batch, 9, 2), normal(1, *batch, 2, 7))
    random = frame(pair, KEY)
    return {
        "plain": pair,
        "shadowed": shadow(pair, KEY),
        "warming up": frame(pair),
        "framed": random._replace(a=pair.a, b=pair.b),
    }


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("kind", make_nodes())
def test_the_plain_pair_is_what_the_layer_computes(kind, batch):
    node = make_nodes(batch)[kind]
    eye = jnp.broadcast_to(jnp.eye(9), (*batch, 9, 9))
    pair = adapters.plain_pair(node)
    np.testing.assert_allclose(1.5 * pair.a @ pair.b, nn.lora_apply(eye, node, 1.5), atol=1e-12)
    np.testing.assert_allclose(nn.lora_delta(node, 1.5), 1.5 * pair.a @ pair.b, atol=1e-12)


def test_weights_of_a_sum_are_not_rounded_to_bfloat16():
    pair = LoRAPair(*(x.astype(jnp.bfloat16) for x in make_nodes()["plain"]))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), pair)
    sum_, error = adapters.combine([pair], [0.3], 2)
    np.testing.assert_allclose(sum_.a @ sum_.b, 0.3 * wide.a @ wide.b, rtol=1e-4, atol=1e-5)
    assert error < 1e-5


@pytest.mark.parametrize("kind", make_nodes())
def test_the_spectrum_of_any_kind_of_pair_is_that_of_what_it_adds(kind):
    node = make_nodes()[kind]
    dense = np.linalg.svd(nn.lora_delta(node, 1.5), compute_uv=False)
    found = adapters.spectrum(node, 1.5)
    np.testing.assert_allclose(found.values, dense[: len(found.values)], atol=1e-7)
    for angles in adapters.principal_angles(node, node):
        np.testing.assert_allclose(angles, 0, atol=1e-5)


def test_spectra_are_of_one_layer():
    stack = make_nodes((2,))["plain"]
    remedy = r"has two axes, and a here is \(2, 9, 2\); take one entry of the stack"
    with pytest.raises(ValueError, match=remedy):
        adapters.spectrum(stack, 1.0)
    with pytest.raises(ValueError, match=remedy):
        adapters.principal_angles(stack, stack)


def test_framed_pairs_are_the_sum_of_their_two_products():
    nodes = make_nodes()
    pair, framed = nodes["plain"], nodes["framed"]
    expected = framed.a @ framed.f_out + framed.f_in @ framed.b
    np.testing.assert_allclose(nn.lora_delta(framed), expected, atol=1e-12)
    np.testing.assert_allclose(nn.lora_delta(nodes["warming up"]), pair.a @ pair.b, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("kind", make_nodes())
def test_the_nearest_pair_is_the_truncated_svd(kind, batch):
    node = make_nodes(batch)[kind]
    delta = np.asarray(nn.lora_delta(node))
    full = adapters.plain_pair(node).a.shape[-1]
    left, values, right = np.linalg.svd(delta)
    for rank in range(1, full + 1):
        pair, error = adapters.compress(node, rank)
        nearest = left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]
        np.testing.assert_allclose(pair.a @ pair.b, nearest, atol=1e-12)
        gram_a = jnp.swapaxes(pair.a, -1, -2) @ pair.a
        np.testing.assert_allclose(gram_a, pair.b @ jnp.swapaxes(pair.b, -1, -2), atol=1e-12)
        size = np.linalg.norm(delta, axis=(-2, -1))
        measured = np.linalg.norm(nearest - delta, axis=(-2, -1)) / size
        np.testing.assert_allclose(error, measured, atol=1e-7)


def test_a_framed_pair_whose_rank_exceeds_half_of_the_kernel():
    """[a, E] is wider than tall."""
    pair = LoRAPair(normal(0, 5, 4), normal(1, 4, 7))
    node = frame(pair, KEY)._replace(a=pair.a, b=pair.b)
    exact, error = adapters.compress(node, 5)
    np.testing.assert_allclose(exact.a @ exact.b, nn.lora_delta(node), atol=1e-12)
    assert error < 1e-12


def test_no_nearest_pair_of_a_larger_rank():
    with pytest.raises(ValueError, match="from 1 to that"):
        adapters.compress(make_nodes()["plain"], 3)
    zero = LoRAPair(jnp.zeros((9, 2)), jnp.zeros((2, 7)))
    assert adapters.compress(zero, 1)[1] == 0
