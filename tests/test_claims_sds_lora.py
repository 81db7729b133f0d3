"""What the SDS-LoRA paper claims, and what this library promises on top, one test each."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lowrank_optax import (
    LoRAPair,
    altlora,
    frame,
    nn,
    oplora,
    scale_by_inverse_sqrt_gram,
    sds_lora,
)
from lowrank_optax._core.frames import orthonormalize
from lowrank_optax._core.verbs import Verbs

N_IN, RANK, N_OUT = 9, 3, 7
SCALE = 1.5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def random_pair(seed=0):
    return LoRAPair(normal(seed, N_IN, RANK), normal(seed + 1, RANK, N_OUT))


def delta(node, scale=SCALE):
    return nn.lora_apply(jnp.eye(node.a.shape[-2], dtype=node.a.dtype), node, scale)


def gradients(node, full):
    """What autodiff returns for an adapter whose kernel has the gradient ``full``."""
    return jax.grad(lambda node: jnp.sum(full * delta(node)))(node)


@functools.partial(jax.jit, static_argnums=0)
def advance(tx, node, state, full):
    updates, state = tx.update(gradients(node, full), state, node)
    return optax.apply_updates(node, updates), state


SWITCH = sds_lora(optax.sgd(0.0), total_steps=2, warmup_steps=1, scale=SCALE)


def switched(pair):
    """The pair after the switch, no factor having moved."""
    node = frame(pair)
    return advance(SWITCH, node, SWITCH.init(node), jnp.zeros((N_IN, N_OUT)))[0]


def random_start(seed=0):
    """A framed pair without warm-up whose factors are not zero."""
    pair = random_pair(seed)
    return frame(pair, jax.random.key(seed))._replace(**pair._asdict())


# The gradients


def test_gradients_are_those_of_orthonormal_bases_of_the_factors_spaces(x64):
    """g_a g_aᵀ = s² G P Gᵀ with the projector P on the row space of b, and likewise for g_b."""
    pair, full = random_pair(), normal(5, N_IN, N_OUT)
    grads = gradients(switched(pair), full)
    rows = jnp.linalg.pinv(pair.b) @ pair.b
    columns = pair.a @ jnp.linalg.pinv(pair.a)
    expected = SCALE**2 * full @ rows @ full.T, SCALE**2 * full.T @ columns @ full
    np.testing.assert_allclose(grads.a @ grads.a.T, expected[0], atol=1e-10)
    np.testing.assert_allclose(grads.b.T @ grads.b, expected[1], atol=1e-10)


@pytest.mark.parametrize(("size", "condition"), [(1e-3, 1.0), (1e3, 1.0), (1.0, 1e5), (1e2, 1e2)])
def test_gradients_do_not_depend_on_scale_and_condition_of_the_factors(x64, size, condition):
    """Other factors of the same spaces: SDS-LoRA's gradients turn, LoRA's stretch."""
    pair, full = random_pair(), normal(5, N_IN, N_OUT)
    mixing = size * jnp.diag(jnp.geomspace(1, 1 / condition, RANK))
    turned, _ = jnp.linalg.qr(normal(6, RANK, RANK))
    other = LoRAPair(pair.a @ mixing @ turned, turned @ mixing @ pair.b)
    assert_same = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    before, after = (gradients(switched(p), full) for p in (pair, other))
    assert_same(after.a @ after.a.T, before.a @ before.a.T)
    assert_same(after.b.T @ after.b, before.b.T @ before.b)
    plain = [gradients(p, full).a for p in (pair, other)]
    assert jnp.linalg.norm(plain[1] @ plain[1].T - plain[0] @ plain[0].T) > 1


def test_gradients_between_refreshes_do_not_see_the_factors_at_all(x64):
    node, full = random_start(), normal(5, N_IN, N_OUT)
    other = node._replace(a=1e6 * node.a, b=0 * node.b)
    grads = [gradients(n, full) for n in (node, other)]
    np.testing.assert_array_equal(grads[0].a, grads[1].a)
    np.testing.assert_array_equal(grads[0].b, grads[1].b)


def test_start_without_warm_up_is_the_base_model_and_moves_both_factors(x64):
    node, full = frame(random_pair(), jax.random.key(0)), normal(5, N_IN, N_OUT)
    assert not jnp.any(delta(node))
    grads = gradients(node, full)
    assert all(jnp.linalg.norm(g) > 0.1 * jnp.linalg.norm(full) for g in (grads.a, grads.b))


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_inverse_square_root_of_the_gram_gives_the_gradients_of_frames(x64, condition):
    """(b bᵀ)^(-1/2) b is the orthonormal factor of b's polar decomposition."""
    pair, full = random_pair(), normal(5, N_IN, N_OUT)
    pair = pair._replace(b=jnp.geomspace(1, condition, RANK)[:, None] * pair.b)
    tx = scale_by_inverse_sqrt_gram(1e-14)
    updates, _ = tx.update(gradients(pair, full), tx.init(pair), pair)

    def polar(x):
        left, _, right = np.linalg.svd(x, full_matrices=False)
        return left @ right

    np.testing.assert_allclose(updates.a, SCALE * full @ polar(pair.b).T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(updates.b, SCALE * polar(pair.a).T @ full, rtol=1e-6, atol=1e-8)


def test_the_damping_is_added_to_the_gram_matrix_before_the_root(x64):
    pair, full = random_pair(), normal(5, N_IN, N_OUT)
    tx, grads = scale_by_inverse_sqrt_gram(0.5), gradients(pair, full)
    updates, _ = tx.update(grads, tx.init(pair), pair)

    def root(gram):
        values, vectors = np.linalg.eigh(gram + 0.5 * np.eye(RANK))
        return vectors / np.sqrt(values) @ vectors.T

    np.testing.assert_allclose(updates.a, grads.a @ root(pair.b @ pair.b.T), rtol=1e-10)
    np.testing.assert_allclose(updates.b, root(pair.a.T @ pair.a) @ grads.b, rtol=1e-10)


def test_inverse_square_root_of_the_gram_is_finite_at_b_zero():
    pair = jax.tree.map(lambda x: x.astype(jnp.float32), random_pair())
    pair, full = pair._replace(b=jnp.zeros_like(pair.b)), normal(5, N_IN, N_OUT)
    tx = scale_by_inverse_sqrt_gram()
    updates, _ = tx.update(gradients(pair, full), tx.init(pair), pair)
    assert not jnp.any(updates.a)
    assert jnp.all(jnp.isfinite(updates.b))
    assert jnp.any(updates.b)


# The schedule of the frames


def test_the_switch_preserves_the_adapter(x64):
    """Against ordinary LoRA trained as long, ΔK is the same after the warm-up and on its last step.

    It also takes half of ΔK on each side, so that the factors are balanced.
    """
    steps, full = 3, normal(5, N_IN, N_OUT)
    tx = sds_lora(optax.sgd(0.1), total_steps=10, warmup_steps=steps, scale=SCALE)
    plain, node = random_pair(), frame(random_pair())
    state = tx.init(node)
    for _ in range(steps):
        plain = optax.apply_updates(plain, jax.tree.map(lambda g: -0.1 * g, gradients(plain, full)))
        node, state = advance(tx, node, state, full)
    assert node.warm == 0
    np.testing.assert_allclose(delta(node), delta(plain), rtol=0, atol=1e-12)
    np.testing.assert_allclose(node.a.T @ node.a, node.b @ node.b.T, atol=1e-12)


def test_the_switch_of_an_adapter_that_is_still_zero(x64):
    """Gradients of zero leave b = 0 through the warm-up; nothing breaks and a frame remains."""
    node = switched(random_pair()._replace(b=jnp.zeros((RANK, N_OUT))))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(node))
    assert not jnp.any(delta(node))


@pytest.mark.parametrize("refresh", ["frames", "preserving"])
def test_a_preserving_refresh_keeps_the_adapter_and_the_papers_does_not(x64, refresh):
    node, full = random_start(), normal(5, N_IN, N_OUT)
    tx = sds_lora(optax.sgd(0.1), total_steps=9, warmup_steps=0, scale=SCALE, refresh=refresh)
    grads = gradients(node, full)
    kept_frames = node._replace(a=node.a - 0.1 * grads.a, b=node.b - 0.1 * grads.b)
    after, _ = advance(tx, node, tx.init(node), full)
    assert jnp.linalg.norm(after.f_in - node.f_in) > 0.1
    change = jnp.max(jnp.abs(delta(after) - delta(kept_frames)))
    assert (change < 1e-12) == (refresh == "preserving")
    np.testing.assert_allclose(after.f_in.T @ after.f_in, jnp.eye(RANK), atol=1e-12)
    spanned = after.f_in @ after.f_in.T @ kept_frames.a
    np.testing.assert_allclose(spanned, kept_frames.a, atol=1e-12)


BEYOND = 12
"""How many steps a run goes on after those it was planned for, as in its last part."""


def refreshes(warmup_steps, total_steps, phases):
    """The steps after which the main phase, cut in equal parts, refreshes: every p-th of part p."""
    length = Fraction(total_steps - warmup_steps, phases)
    steps, part = [], 1
    for main in range(1, total_steps - warmup_steps + BEYOND + 1):
        while part < phases and main - 1 >= part * length:
            part += 1
        if main % part == 0:
            steps.append(warmup_steps + main)
    return steps


@pytest.mark.parametrize(
    ("warmup_steps", "total_steps", "phases"),
    [(0, 12, 3), (3, 20, 5), (1, 8, 10), (4, 31, 4), (0, 3, 1), (2, 3, 2)],
)
def test_steps_of_refreshes(warmup_steps, total_steps, phases):
    node, full = frame(random_pair()), normal(5, N_IN, N_OUT)
    if warmup_steps == 0:
        node = frame(random_pair(), jax.random.key(0))
    tx = sds_lora(optax.sgd(0.1), total_steps=total_steps, warmup_steps=warmup_steps, phases=phases)

    @jax.jit
    def run(node):
        def step(carry, index):
            before, state = carry
            after, state = advance(tx, before, state, full * jnp.sin(index + 1.0))
            moved = jnp.any(after.f_in != before.f_in), jnp.any(after.f_out != before.f_out)
            return (after, state), moved

        return jax.lax.scan(step, (node, tx.init(node)), jnp.arange(total_steps + BEYOND))[1]

    # In the warm-up the frames follow the factors, and at its end they are made anew.
    expected = [*range(1, warmup_steps + 1), *refreshes(warmup_steps, total_steps, phases)]
    for moved in run(node):
        assert (np.flatnonzero(moved) + 1).tolist() == expected


REFRESHED = sds_lora(optax.sgd(0.0), total_steps=9, warmup_steps=0)


def refreshed(node):
    """The node after a refresh, no factor having moved."""
    return advance(REFRESHED, node, REFRESHED.init(node), jnp.zeros((N_IN, N_OUT)))[0]


def test_a_refresh_keeps_the_signs_of_the_frames(x64):
    """Factors that point against the frames: their QR decomposition would turn the frames over."""
    node = frame(random_pair(), jax.random.key(0))
    signs = jnp.array([1.0, -1.0, -2.0])
    after = refreshed(node._replace(a=node.f_in * signs, b=signs[:, None] * node.f_out))
    np.testing.assert_allclose(after.f_in, node.f_in, atol=1e-12)
    np.testing.assert_allclose(after.f_out, node.f_out, atol=1e-12)


def test_a_refresh_of_factors_that_are_still_zero_keeps_the_frames(x64):
    """Zeros span nothing; frames of zeros would stop every further gradient."""
    node = frame(random_pair(), jax.random.key(0))
    after = refreshed(node)
    np.testing.assert_allclose(after.f_in, node.f_in, atol=1e-12)
    np.testing.assert_allclose(after.f_out, node.f_out, atol=1e-12)


def test_frames_of_high_rank_are_orthonormal_in_float32():
    """The shift of Cholesky QR grows with the rank; its bias has to be taken out."""
    wide = LoRAPair(jnp.zeros((256, 128)), jnp.zeros((128, 192)))
    node = frame(wide, jax.random.key(0))
    for product in (node.f_in.T @ node.f_in, node.f_out @ node.f_out.T):
        np.testing.assert_allclose(product, jnp.eye(128), atol=1e-5)


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_frames_of_ill_conditioned_factors_are_orthonormal_in_float32(condition):
    """A refresh of factors whose condition number float32 can barely hold."""
    values = jnp.geomspace(1, 1 / condition, RANK)
    node = frame(random_pair(), jax.random.key(0))
    turned, _ = jnp.linalg.qr(normal(6, RANK, RANK))
    node = node._replace(a=node.f_in * values @ turned, b=turned @ (values[:, None] * node.f_out))
    assert node.a.dtype == jnp.float32
    after = refreshed(node)
    for product in (after.f_in.T @ after.f_in, after.f_out @ after.f_out.T):
        np.testing.assert_allclose(product, jnp.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("rank", [32, 64, 128])
def test_frames_of_factors_of_low_rank_are_orthonormal_in_float32(rank):
    """What a few tokens leave: three directions, and rounding in the others."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    factors = LoRAPair(draw(0, 512, 3) @ draw(1, 3, rank), draw(2, rank, 3) @ draw(3, 3, 256))
    [frames] = orthonormalize(Verbs([{}]), [factors])
    for product in (frames.a.T @ frames.a, frames.b @ frames.b.T):
        np.testing.assert_allclose(product, jnp.eye(rank), atol=2e-5)


@pytest.mark.parametrize("refresh", ["frames", "preserving"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_frames_stay_orthonormal_over_a_thousand_steps(refresh, warmup_steps):
    """In float32, at the shapes of the digits study; the target's singular values decay."""
    n_in, rank, n_out, steps = 64, 4, 256, 1000
    key_a, key_t, key_f = jax.random.split(jax.random.key(0), 3)
    pair = LoRAPair(jax.random.normal(key_a, (n_in, rank)) / 8, jnp.zeros((rank, n_out)))
    target = jax.random.normal(key_t, (n_in, n_out)) * jnp.geomspace(1, 1e-4, n_out)
    node = frame(pair) if warmup_steps else frame(pair, key_f)
    tx = sds_lora(optax.adamw(3e-3), total_steps=steps, warmup_steps=warmup_steps, refresh=refresh)

    @jax.jit
    def run(node):
        def step(carry, _):
            node, state = advance(tx, *carry, delta(carry[0]) - target)
            errors = [
                jnp.max(jnp.abs(product - jnp.eye(rank)))
                for product in (node.f_in.T @ node.f_in, node.f_out @ node.f_out.T)
            ]
            return (node, state), jnp.maximum(*errors)

        (node, state), errors = jax.lax.scan(step, (node, tx.init(node)), length=steps)
        return node, state.frames.skipped, errors[warmup_steps:]

    node, failures, errors = run(node)
    assert jnp.max(errors) < 1e-5
    assert failures == 0
    assert jnp.linalg.norm(delta(node) - target) < jnp.linalg.norm(target)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["warm-up", "no warm-up"])
def test_a_new_framed_pair_can_be_donated(key):
    """In the warm-up the frames are the factors in value, but a buffer is donated once only."""
    node = frame(jax.tree.map(lambda x: x.astype(jnp.float32), random_pair()), key)
    expected = jax.tree.map(lambda x: 2 * np.asarray(x), node)
    doubled = jax.jit(lambda node: jax.tree.map(lambda x: 2 * x, node), donate_argnums=0)(node)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(node))
    jax.tree.map(np.testing.assert_array_equal, doubled, expected)


# The inner optimizer


def halving(rate):
    return optax.exponential_decay(rate, transition_steps=2, decay_rate=0.5)


INNER = {
    "adamw": lambda: optax.adamw(halving(0.05)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(halving(0.05)),
    "trace": lambda: optax.chain(optax.trace(0.9), optax.scale_by_schedule(halving(-0.05))),
}


def inner_states(name, state):
    """The state with moments and the counts of schedules."""
    if name == "adamw":
        adam, _, schedule = state.inner
        return adam, schedule.count
    if name == "injected":
        adam, *_ = state.inner.inner_state
        return adam, state.inner.count
    trace, schedule = state.inner
    return trace, schedule.count


@pytest.mark.parametrize("name", INNER)
def test_moments_restart_at_the_switch_and_schedules_go_on(x64, name):
    full, warmup_steps = normal(5, N_IN, N_OUT), 3
    inner = INNER[name]()
    tx = sds_lora(inner, total_steps=10, warmup_steps=warmup_steps, scale=SCALE)
    node = frame(random_pair())
    state = tx.init(node)
    fresh = inner_states(name, state)[0]
    for step in range(1, warmup_steps + 1):
        node, state = advance(tx, node, state, full)
        moments, count = inner_states(name, state)
        is_fresh = all(
            jnp.array_equal(*x) for x in zip(*map(jax.tree.leaves, (moments, fresh)), strict=True)
        )
        assert is_fresh == (step == warmup_steps)
        assert count == step
    # The first step of the main phase is the inner optimizer's first step at the later rate.
    grads = gradients(node, full)
    after, state = advance(tx, node, state, full)
    rate = halving(0.05)(warmup_steps)
    if name == "trace":
        moved = node.a - rate * grads.a
    else:
        moved = node.a - rate * (grads.a / (jnp.abs(grads.a) + 1e-8) + 1e-4 * node.a)
    np.testing.assert_allclose(after.a, moved, rtol=1e-6)
    assert inner_states(name, state)[1] == warmup_steps + 1


# Resuming


RESUMED = {"total_steps": 14, "warmup_steps": 4, "phases": 3}


@functools.cache
def compiled_step():
    tx = sds_lora(optax.adamw(halving(0.05)), **RESUMED)
    full = normal(5, N_IN, N_OUT)

    def step(node, state):
        return advance(tx, node, state, full + delta(node))

    return tx, jax.jit(step)


def run_from(node, state, steps):
    for _ in range(steps):
        node, state = compiled_step()[1](node, state)
    return node, state


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


def restore(path, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.eval_shape(lambda: template))


# After 2: in the warm-up. After 3 and 4: before and after the switch. After 9: between refreshes.
@pytest.mark.parametrize("stop", [2, 3, 4, 9])
def test_a_resumed_run_is_bit_identical(tmp_path, stop):
    tx, _ = compiled_step()
    node = frame(random_pair())
    start = node, tx.init(node)
    save(tmp_path / "run", run_from(*start, stop))
    resumed = run_from(*restore(tmp_path / "run", start), RESUMED["total_steps"] - stop)
    whole = run_from(*start, RESUMED["total_steps"])
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


OTHER_SCHEDULES = [{"total_steps": 15}, {"phases": 4}, {"warmup_steps": 3}]


@pytest.mark.parametrize("other", OTHER_SCHEDULES, ids=str)
def test_a_state_of_another_schedule_is_refused(other):
    tx, _ = compiled_step()
    node = frame(random_pair())
    resumed = sds_lora(optax.adamw(halving(0.05)), **{**RESUMED, **other})
    with pytest.raises(ValueError, match=r"total_steps=14, phases=3, not .*is resumed with the"):
        resumed.update(node, tx.init(node), node)


@pytest.mark.parametrize("other", OTHER_SCHEDULES, ids=str)
def test_a_checkpoint_of_another_schedule_is_refused(tmp_path, other):
    tx, _ = compiled_step()
    node = frame(random_pair())
    save(tmp_path / "run", tx.init(node))
    resumed = sds_lora(optax.adamw(halving(0.05)), **{**RESUMED, **other})
    with pytest.raises(ValueError, match="total_steps=14, phases=3"):
        restore(tmp_path / "run", resumed.init(node))


# Devices


def test_a_batch_on_eight_devices_trains_as_on_one():
    assert jax.device_count() == 8
    inputs, outputs = normal(5, 32, N_IN), normal(6, 32, N_OUT)
    tx = sds_lora(optax.adamw(0.05), **RESUMED, scale=SCALE)

    @jax.jit
    def train(node, inputs, outputs):
        def loss(node):
            return jnp.mean((nn.lora_apply(inputs, node, SCALE) - outputs) ** 2)

        def step(carry, _):
            node, state = carry
            value, grads = jax.value_and_grad(loss)(node)
            updates, state = tx.update(grads, state, node)
            return (optax.apply_updates(node, updates), state), value

        (node, _), losses = jax.lax.scan(step, (node, tx.init(node)), length=14)
        return delta(node), node.f_in, losses

    mesh = jax.make_mesh((8,), ("batch",))
    over = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    node = frame(random_pair())
    alone = train(node, inputs, outputs)
    batch = jax.device_put((inputs, outputs), over("batch"))
    together = train(jax.device_put(node, over()), *batch)
    assert len(together[0].sharding.device_set) == 8
    for one, eight in zip(alone, together, strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 5, "warmup_steps": 5}, "`total_steps` must be above warmup_steps = 5"),
        ({"total_steps": 10}, "`total_steps` must be above warmup_steps = 10, got 10"),
        ({"total_steps": 0, "warmup_steps": 0}, "`total_steps` must be above"),
        ({"total_steps": 20, "phases": 0}, "`phases` must be at least 1, got 0"),
        ({"total_steps": np.int64(10)}, "`total_steps` must be above warmup_steps = 10, got 10"),
        ({"total_steps": 20, "warmup_steps": -1}, "`warmup_steps` must be at least 0, got -1"),
        ({"total_steps": 20, "refresh": "never"}, "`refresh` must be one of frames, preserving"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        sds_lora(0.1, **settings)


@pytest.mark.parametrize("name", ["total_steps", "warmup_steps", "phases"])
def test_numbers_of_the_schedule_must_be_integers(name):
    settings = {"total_steps": 20, name: 12.0}
    with pytest.raises(TypeError, match=f"`{name}` must be an integer, got 12.0"):
        sds_lora(0.1, **settings)


def test_injected_numbers_of_the_schedule():
    node = frame(random_pair())
    with pytest.raises(TypeError, match=r"`(total_steps|warmup_steps|phases)`.*`static_args`"):
        optax.inject_hyperparams(sds_lora)(0.1, total_steps=20).init(node)
    static = ("total_steps", "warmup_steps", "phases")
    injected = optax.inject_hyperparams(sds_lora, static_args=static)
    tx = injected(0.1, total_steps=20)
    updates, _ = jax.jit(tx.update)(node, tx.init(node), node)
    plain = sds_lora(0.1, total_steps=20)
    expected, _ = jax.jit(plain.update)(node, plain.init(node), node)
    np.testing.assert_allclose(updates.b, expected.b, rtol=1e-5)


def test_a_rank_without_frames_is_refused():
    with pytest.raises(ValueError, match="rank 4 has no orthonormal frames of 9 and 3 entries"):
        frame(LoRAPair(jnp.ones((9, 4)), jnp.ones((4, 3))), jax.random.key(0))


def test_pairs_of_other_optimizers_are_refused():
    pair = random_pair()
    with pytest.raises(ValueError, match="sds_lora works on FramedPair, but this is a LoRAPair"):
        sds_lora(0.1, total_steps=20).init(pair)
    for tx in (altlora(0.1), oplora(0.1), scale_by_inverse_sqrt_gram()):
        with pytest.raises(ValueError, match="Pair, but this is a FramedPair"):
            tx.init(frame(pair))


def test_an_inner_optimizer_of_pairs_is_refused():
    """It would take what flows through frames for gradients of a pair."""
    for inner in (altlora(0.1), optax.chain(scale_by_inverse_sqrt_gram(), optax.sgd(0.1))):
        with pytest.raises(ValueError, match=r"works on LoRA pairs itself.*such as `optax.adamw`"):
            sds_lora(inner, total_steps=20).init({"q": frame(random_pair())})


def test_pairs_of_the_other_start_are_refused():
    warm, cold = frame(random_pair()), frame(random_pair(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"warmup_steps=0 needs `lowrank_optax.frame\(pair, key\)"):
        sds_lora(0.1, total_steps=20, warmup_steps=0).init(warm)
    with pytest.raises(ValueError, match=r"warmup_steps=10 needs .*; give warmup_steps=0"):
        sds_lora(0.1, total_steps=20).init(cold)
