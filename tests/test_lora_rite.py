"""LoRA-RITE against the released code, a dense form in NumPy, and the paper's claims."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_rite
from tests.golden.trajectories import assert_trajectory, load, run

pytestmark = pytest.mark.usefixtures("x64")

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL_GRADIENT = normal(2, N_IN, N_OUT)


def gradients(pair, full=FULL_GRADIENT):
    """What autodiff returns for the factors of K + a b when the kernel's gradient is ``full``."""
    return LoRAPair(full @ pair.b.T, pair.a.T @ full)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def trained(tx, pair, fulls, state=None):
    """The pairs and states after updates of which each sees its full gradient, and the updates."""
    state, steps = tx.init(pair) if state is None else state, []
    for full in fulls:
        updates, state = tx.update(gradients(pair, full), state, pair)
        pair = optax.apply_updates(pair, updates)
        steps.append((pair, state, updates))
    return steps


def oracle(pair, target, steps, *, rate, b1, b2, eps, clip, decay):
    """The trajectory on ½‖a b − target‖², by QR decompositions and with the frames kept."""
    x = {"a": pair.a, "b": pair.b.T}  # rows × r, as the paper's equations are
    m = {side: np.zeros_like(value) for side, value in x.items()}
    v = dict.fromkeys(x, np.zeros((RANK, RANK)))
    old = {side: np.zeros_like(value) for side, value in x.items()}
    trajectory = [pair]
    for t in range(1, steps + 1):
        full = x["a"] @ x["b"].T - target
        frames = {side: np.linalg.qr(value) for side, value in x.items()}
        inverses = {side: np.linalg.pinv(r) for side, (_, r) in frames.items()}
        g = {"a": full @ x["b"] @ inverses["b"], "b": full.T @ x["a"] @ inverses["a"]}
        norm = np.sqrt(sum(np.sum(value**2) for value in g.values()))
        h1, h2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        new = {}
        for side, other in (("a", "b"), ("b", "a")):
            clipped = g[side] * min(1.0, clip / norm)
            turn = frames[other][0].T @ old[other]
            square = clipped.T @ clipped / len(clipped)
            v[side] = h2 * turn @ v[side] @ turn.T + (1 - h2) * square
            values, vectors = np.linalg.eigh(v[side])
            root = vectors / (np.sqrt(np.maximum(values, 0)) + eps) @ vectors.T
            m[side] = h1 * m[side] @ turn.T + (1 - h1) * clipped @ root
            new[side] = x[side] - rate * (m[side] @ inverses[other].T + decay * x[side])
        old = {side: q for side, (q, _) in frames.items()}
        x = new
        trajectory.append(LoRAPair(x["a"], x["b"].T))
    return trajectory


@pytest.mark.parametrize("start", ["randB", "zeroB"])
def test_trajectory_equals_the_released_code(start):
    data, hp = load(f"lora_rite_released_{start}")
    b1, b2 = (float(b) for b in data["hp_betas"])
    clip = hp["clip_unmagnified_grad"]
    tx = lora_rite(hp["lr"], b1, b2, eps=hp["eps"], clip_unmagnified_grad=clip)
    assert_trajectory(run(tx, data, hp["scale"]), data)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [1.0, 100.0, None])
@pytest.mark.parametrize("start", [PAIR, ZERO_B], ids=["random b", "b = 0"])
def test_trajectory_equals_one_that_keeps_the_frames(start, clip, decay):
    values = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
    target, steps = normal(3, N_IN, N_OUT), 25
    tx = lora_rite(0.03, **values, clip_unmagnified_grad=clip, weight_decay=decay)
    data = {"target": target.T, "A": [start.a.T] * (steps + 1), "B": [start.b.T]}
    limit = np.inf if clip is None else clip
    expected = oracle(start, target, steps, rate=0.03, **values, clip=limit, decay=decay)
    assert_trajectory(
        run(tx, data, 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


@pytest.mark.parametrize("condition", [3.0, 1e3])
def test_products_are_invariant_under_a_change_of_basis(condition):
    """(a T, T⁻¹ b) is the same adapter, and stays so in every update, with decay and momenta."""
    left, right = (np.linalg.qr(normal(seed, RANK, RANK))[0] for seed in (3, 4))
    transform = left @ np.diag(np.geomspace(1, condition, RANK)) @ right
    skewed = LoRAPair(PAIR.a @ transform, np.linalg.solve(transform, PAIR.b))

    def products(tx, pair, updates=15):
        data = {"target": 3 * FULL_GRADIENT.T, "A": [pair.a.T] * (updates + 1), "B": [pair.b.T]}
        return [moved.a @ moved.b for moved in run(tx, data, 1.0)]

    tx = lora_rite(0.02, weight_decay=0.1)
    np.testing.assert_allclose(products(tx, skewed), products(tx, PAIR), atol=1e-8)
    assert np.abs(products(tx, PAIR)[-1] - products(tx, PAIR)[0]).max() > 0.1
    adamw = optax.adamw(0.02)
    assert np.abs(products(adamw, skewed)[-1] - products(adamw, PAIR)[-1]).max() > 0.1


def test_first_update_moves_the_product_by_the_rate():
    """Whitened in orthonormal frames: ‖Δa b‖ = η √(in r) and ‖a Δb‖ = η √(out r), for any sizes."""
    for pair in (PAIR, LoRAPair(100 * PAIR.a, PAIR.b / 300)):
        [(_, _, updates)] = trained(lora_rite(0.01), pair, [FULL_GRADIENT])
        lengths = np.linalg.norm(updates.a @ pair.b), np.linalg.norm(pair.a @ updates.b)
        expected = 0.01 * np.sqrt(N_IN * RANK), 0.01 * np.sqrt(N_OUT * RANK)
        np.testing.assert_allclose(lengths, expected, rtol=1e-4)


def test_an_indefinite_second_moment_does_not_freeze():
    """With a gradient of rank one, and a V whose other eigenvalues are negative by rounding."""
    full = np.outer(normal(3, N_IN), normal(4, N_OUT))
    tx = lora_rite(0.01)
    [(pair, state, _)] = trained(tx, PAIR, [full])

    def update(level):
        shifted = jax.tree.map(lambda v: v - level * jnp.trace(v) * jnp.eye(RANK), state.pairs.nu)
        smallest = min(np.linalg.eigvalsh(v)[0] for v in jax.tree.leaves(shifted))
        assert smallest < 0 or not level
        indefinite = state._replace(pairs=state.pairs._replace(nu=shifted))
        return trained(tx, pair, [full], indefinite)[0]

    _, after, updates = update(4e-16)
    assert int(after.skipped) == 0
    for side, u, expected in zip("ab", updates, update(0.0)[2], strict=True):
        np.testing.assert_allclose(u, expected, rtol=1e-6, atol=1e-9, err_msg=side)
        assert np.abs(u).max() > 1e-3


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_components_below_rounding_level_are_not_whitened(size):
    """In float32, with gradients of rank one: noise of 1e-7 over ε = 1e-6 would be the update."""
    full = size * np.outer(normal(3, N_IN), normal(4, N_OUT))
    tx = lora_rite(0.01, clip_unmagnified_grad=None)
    precise = trained(tx, PAIR, [full] * 4)
    rough = trained(tx, cast(PAIR, jnp.float32), [jnp.asarray(full, jnp.float32)] * 4)
    for (_, _, expected), (_, _, updates) in zip(precise, rough, strict=True):
        for x, y in zip(updates, expected, strict=True):
            assert np.linalg.norm(x - y) < 0.1 * np.linalg.norm(y)


def test_a_large_gradient_does_not_freeze():
    one, large = (
        trained(lora_rite(0.01), PAIR, [size * FULL_GRADIENT] * 3)[-1][2] for size in (1, 1e9)
    )
    for x, y in zip(large, one, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_clipping_bounds_what_an_outlier_leaves_behind():
    """Without a clip the second moment remembers it, and steps are short for long."""
    fulls = [0.05 * FULL_GRADIENT] * 5 + [1e4 * FULL_GRADIENT] + [0.05 * normal(5, N_IN, N_OUT)] * 5
    length = lambda step: np.linalg.norm(step[2].a)
    ratios = {}
    for clip in (1.0, None):
        steps = trained(lora_rite(0.001, b1=0.0, clip_unmagnified_grad=clip), PAIR, fulls)
        ratios[clip] = length(steps[-1]) / length(steps[0])
    assert ratios[1.0] > 0.2
    assert ratios[None] < 1e-3


def masses(nu):
    """The squared norms of the unmagnified gradients of a first update, from its second moment."""
    return np.array([N_IN * np.trace(nu.a), N_OUT * np.trace(nu.b)])


def test_clipping_joins_the_factors_of_a_pair_and_nothing_else():

    def second_moments(clip, grads, params):
        tx = lora_rite(0.01, clip_unmagnified_grad=clip)
        return tx.update(grads, tx.init(params), params)[1].pairs.nu

    grads = gradients(PAIR)
    [free] = second_moments(None, grads, PAIR)
    u, _ = np.linalg.qr(PAIR.b.T)
    q, _ = np.linalg.qr(PAIR.a)
    norms = [np.linalg.norm(FULL_GRADIENT @ u), np.linalg.norm(FULL_GRADIENT.T @ q)]
    np.testing.assert_allclose(masses(free), np.square(norms), rtol=1e-10)
    longest = np.hypot(*norms)
    for clip in (0.5, 1.0, max(norms), 1.01 * longest):  # the third is longer than each alone
        [nu] = second_moments(clip, grads, PAIR)
        expected = masses(free) * min(1, clip / longest) ** 2
        np.testing.assert_allclose(masses(nu), expected, rtol=1e-10)
    two = {"p": PAIR, "q": LoRAPair(PAIR.a[::-1], PAIR.b)}
    nu, other = second_moments(
        1.0, {"p": grads, "q": gradients(two["q"], 1e3 * FULL_GRADIENT)}, two
    )
    np.testing.assert_allclose([masses(nu).sum(), masses(other).sum()], 1, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_first_steps_from_zero_b_are_finite_and_move_b_first(dtype):
    steps = trained(lora_rite(0.01), cast(ZERO_B, dtype), [jnp.asarray(FULL_GRADIENT, dtype)] * 4)
    for _, state, updates in steps:
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
        assert int(state.skipped) == 0
        assert updates.b.any()
    assert [bool(updates.a.any()) for _, _, updates in steps] == [False, True, True, True]


def test_second_update_from_zero_b_moves_a_by_what_the_rate_grew():
    """The frame of b divides by b, which the first update made as long as its rate."""

    def second(rates):
        tx = lora_rite(lambda count: jnp.asarray(rates)[count])
        _, (_, _, updates) = trained(tx, ZERO_B, [FULL_GRADIENT] * 2)
        return np.linalg.norm(updates.a)

    np.testing.assert_allclose(second([1e-6, 1e-6]), second([1e-2, 1e-2]), rtol=1e-6)
    np.testing.assert_allclose(second([1e-6, 3e-6]), 3 * second([1e-2, 1e-2]), rtol=1e-6)
    assert second([1e-6, 1e-6]) > 0.1


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_frames_of_ill_conditioned_factors_are_right_in_float32(condition):
    """Through one Gram matrix alone, a condition of 1e5 would be lost: its square is above 1e7."""
    n_in, rank, n_out = 60, 4, 50
    stretched = lambda seed, *shape: (
        np.linalg.qr(normal(seed, *shape))[0]
        @ np.diag(np.geomspace(1, 1 / condition, rank))
        @ np.linalg.qr(normal(seed + 1, rank, rank))[0]
    )
    pair = LoRAPair(stretched(5, n_in, rank), stretched(7, n_out, rank).T)
    fulls = [normal(10 + i, n_in, n_out) for i in range(3)]
    changes = lambda dtype: [
        updates.a @ moved.b + moved.a @ updates.b
        for moved, _, updates in trained(
            lora_rite(1e-3), cast(pair, dtype), [jnp.asarray(full, dtype) for full in fulls]
        )
    ]
    for rough, precise in zip(changes(jnp.float32), changes(jnp.float64), strict=True):
        assert np.linalg.norm(rough - precise) < 1e-6 * condition * np.linalg.norm(precise)


def test_the_change_of_frame_is_from_the_factors_as_they_are_stored():
    """In bfloat16 the moved factor is rounded; the next frame is that of the rounded one."""
    pair, grads = (cast(tree, jnp.bfloat16) for tree in (PAIR, gradients(PAIR)))
    tx = lora_rite(0.003)
    updates, state = jax.jit(tx.update)(grads, tx.init(pair), pair)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    values, vectors = np.linalg.eigh(wide(pair).a.T @ wide(pair).a)
    [overlap], stored = state.pairs.overlap, wide(optax.apply_updates(pair, updates))
    # The frame is known up to a rotation, which the squares of the overlap do not have.
    frame = wide(pair).a @ vectors / np.sqrt(values) @ vectors.T
    squares = lambda moved: moved.T @ frame @ frame.T @ moved
    np.testing.assert_allclose(overlap.a.T @ overlap.a, squares(stored.a), rtol=2e-5, atol=2e-5)
    unrounded = wide(pair).a + wide(updates).a
    assert np.abs(squares(unrounded) - squares(stored.a)).max() > 1e-3


EMPTY = np.arange(RANK) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("pair", "full"),
    [
        (PAIR, np.zeros_like(FULL_GRADIENT)),
        (jax.tree.map(np.zeros_like, PAIR), FULL_GRADIENT),
        (LoRAPair(PAIR.a[:3], PAIR.b[:, :3]), FULL_GRADIENT[:3, :3]),
        (LoRAPair(PAIR.a[:, [0, 0, 0]], PAIR.b), FULL_GRADIENT),
        (LoRAPair(PAIR.a * EMPTY, PAIR.b * EMPTY[:, None]), FULL_GRADIENT),
        (LoRAPair(PAIR.a, 1e-8 * PAIR.b), FULL_GRADIENT),
    ],
    ids=[
        "no gradient",
        "both 0",
        "rank as large as the layer",
        "equal components",
        "padded",
        "tiny b",
    ],
)
def test_updates_are_finite(pair, full, dtype):
    moves = jax.tree.map(np.any, gradients(pair, full))
    for _, state, updates in trained(lora_rite(0.01), cast(pair, dtype), [cast(full, dtype)] * 3):
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
        assert int(state.skipped) == 0
        assert jax.tree.map(np.any, updates) == moves


def test_components_of_zeros_in_both_factors_stay_zero():
    """Ranks padded with zeros, which get no gradient."""
    padded = LoRAPair(PAIR.a * EMPTY, PAIR.b * EMPTY[:, None])
    moved = trained(lora_rite(0.01), padded, [FULL_GRADIENT] * 5)[-1][0]
    assert not moved.a[:, 1:].any()
    assert not moved.b[1:].any()
    assert np.abs(moved.a - padded.a).max() > 1e-3
