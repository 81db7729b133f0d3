"""Checkpoints: what is saved comes back bit by bit, anywhere, or an error says why not.

That each method goes on from one is in the table of methods, `tests/conformance`, and, with the
processes killed, in `test_kill.py`.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, traverse_util
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    checkpoints,
    find_pairs,
    frame,
    nn,
    shadow,
    sharding,
)
from lowrank_optax.checkpoints import runs

ROOT = Path(__file__).parents[1]


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def bits(leaf):
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes()


def what(leaf):
    """Everything about a leaf but its bits and its place."""
    about = [getattr(leaf, name, None) for name in ("dtype", "shape", "weak_type")]
    return type(leaf), *about


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    for name, x, y in zip(names, jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert what(x) == what(y), name
        assert bits(x) == bits(y), name


def other(tree):
    """A tree of the same structure with other numbers."""

    def change(leaf):
        if is_key(leaf):
            return jax.random.wrap_key_data(
                jnp.zeros_like(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        if isinstance(leaf, jax.Array):
            return jnp.zeros_like(leaf)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)(0)

    return jax.tree.map(change, tree)


def pair_of(seed, n_in=8, rank=2, n_out=16):
    """A pair of random numbers that any compiler computes exactly."""
    draw = lambda key, *shape: jax.random.randint(key, shape, -512, 512) / 256
    a, b = jax.random.split(jax.random.key(seed))
    return LoRAPair(draw(a, n_in, rank), draw(b, rank, n_out))


def saved(folder, step=1, **trees):
    checkpoints.save(folder, step, **{"params": pair_of(0), "opt_state": (), **trees})
    return folder


# What is saved


def leaves_of_all_kinds():
    nans = np.array([0x7FC00001, 0xFFC12345, 0x80000000], np.uint32).view(np.float32)
    params = {
        "q": shadow(pair_of(0), jax.random.key(1), momentum_rank=0),
        "k": shadow(pair_of(1), jax.random.key(1), iterations=0),
        "listed": [frame(pair_of(2)), None, optax.MaskedNode(), optax.EmptyState()],
        "a.b/c": jnp.ones(3, jnp.bfloat16),
        "nans": jnp.asarray(nans),
        "large": jax.random.normal(jax.random.key(3), (300, 70)),
        "small": [jnp.arange(3).astype(t) for t in (jnp.int4, jnp.float8_e4m3fn, bool, complex)],
    }
    state = {
        "empty": [jnp.zeros((0, 3)), jnp.zeros((2, 0), jnp.bfloat16), np.zeros(0, np.int8)],
        "numpy": [np.arange(3.0), np.float64(0.1), np.array(-0.0)],
        "python": [0.1, 3, True, 1j],
        "weak": [jnp.asarray(0.1), jnp.full((2, 2), 7)],
    }
    assert state["weak"][0].weak_type
    impls = {impl: jax.random.key(5, impl=impl) for impl in ("rbg", "unsafe_rbg", "threefry2x32")}
    rngs = {**impls, "batch": jax.random.split(jax.random.key(6), (2, 3)), "raw": jnp.arange(2)}
    return {"params": params, "opt_state": state, "rngs": rngs}


def test_leaves_of_all_kinds_come_back(tmp_path):
    trees = leaves_of_all_kinds()
    saved(tmp_path, 4, **trees)
    found = checkpoints.restore(tmp_path, **{name: other(tree) for name, tree in trees.items()})
    assert found.step == 4
    assert_same(found._asdict(), {"step": 4, **trees})


def test_targets_may_be_abstract(tmp_path):
    params, tx = {"q": pair_of(0)}, altlora_plus(0.1)
    rngs = {"dropout": jax.random.key(3)}
    saved(tmp_path, params=params, opt_state=tx.init(params), rngs=rngs)
    abstract = jax.eval_shape(lambda: {"params": params, "opt_state": tx.init(params)})
    found = checkpoints.restore(tmp_path, **abstract, rngs=jax.eval_shape(lambda: rngs))
    assert_same(found.params, params)
    assert_same(found.opt_state, tx.init(params))
    assert_same(found.rngs, rngs)


def test_nothing_but_numbers_is_saved(tmp_path):
    for leaf in ("text", object(), jax.ShapeDtypeStruct((2,), jnp.float32)):
        with pytest.raises(TypeError, match=r"opt_state/odd is a .*Leave it out"):
            saved(tmp_path, opt_state={"odd": leaf})
    with pytest.raises(TypeError, match=r"params/a is a .*Tracer.*outside of compiled functions"):
        jax.jit(lambda pair: saved(tmp_path, params=pair))(pair_of(0))
    with pytest.raises(ValueError, match=r"`params` holds no numbers.*add_lora"):
        saved(tmp_path, params={"q": None, "empty": jnp.zeros((0, 2))})
    with pytest.raises(ValueError, match="two leaves have the path params/q/w/x"):
        saved(tmp_path, params={"q.w": {"x": 1.0}, "q": {"w/x": 2.0}})
    assert checkpoints.steps(tmp_path) == []


def test_double_precision(x64, tmp_path):
    params = {"q": jax.tree.map(lambda x: x.astype(jnp.float64), pair_of(0))}
    state = altlora(0.1).init(params)
    saved(tmp_path, params=params, opt_state=state)
    found = checkpoints.restore(tmp_path, params=other(params), opt_state=other(state))
    assert_same((found.params, found.opt_state), (params, state))


# Flax


class Model(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.value = nnx.Linear(6, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[0](self.dropout(self.value(x)))


def adapted(seed):
    model = Model(0)  # the base of both
    config = nn.LoRAConfig(rank=2, alpha=4.0, dropout=0.2)
    nn.add_lora(model, "value|layers/0", config, rngs=nnx.Rngs(seed))
    schedule = optax.linear_schedule(0.05, 0.01, 10)
    tx = optax.inject_hyperparams(altlora_plus)(learning_rate=schedule)
    return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


@nnx.jit
def train_step(model, optimizer):
    loss = lambda model: jnp.mean((model(jnp.ones((4, 6))) - 1.0) ** 2)
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


def trees_of(model, optimizer):
    return {
        "params": nnx.state(model, nnx.LoRAParam),
        "opt_state": nnx.state(optimizer),
        "rngs": nnx.state(model, nnx.RngState),
    }


@pytest.fixture
def nnx_run(tmp_path):
    """A run of four steps that was saved after two."""
    model, optimizer = adapted(1)
    for step in range(4):
        if step == 2:
            checkpoints.save(tmp_path, step, **trees_of(model, optimizer))
        loss = train_step(model, optimizer)
    return tmp_path, model, optimizer, loss


def go_on(model, optimizer):
    return [train_step(model, optimizer) for _ in range(2)][-1]


def test_an_nnx_model_goes_on_with_its_dropout(nnx_run):
    folder, model, optimizer, loss = nnx_run
    resumed, its_optimizer = adapted(7)
    train_step(resumed, its_optimizer)
    found = checkpoints.restore(folder, **trees_of(resumed, its_optimizer))
    nnx.update(resumed, found.params, found.rngs)
    nnx.update(its_optimizer, found.opt_state)
    assert go_on(resumed, its_optimizer) == loss
    assert_same(nnx.state(resumed), nnx.state(model))
    assert_same(nnx.state(its_optimizer), nnx.state(optimizer))


def test_an_nnx_model_goes_on_from_pure_dicts(nnx_run):
    folder, model, _, loss = nnx_run
    resumed, its_optimizer = adapted(7)
    found = checkpoints.read(folder)
    assert "value/lora_a" in found.params
    targets = trees_of(resumed, its_optimizer)
    for name, state in targets.items():
        pure = traverse_util.unflatten_dict(getattr(found, name), sep="/")
        nnx.replace_by_pure_dict(state, pure)
    nnx.update(resumed, targets["params"], targets["rngs"])
    nnx.update(its_optimizer, targets["opt_state"])
    assert go_on(resumed, its_optimizer) == loss
    assert_same(nnx.state(resumed, nnx.LoRAParam), nnx.state(model, nnx.LoRAParam))


def test_nnx_states_and_plain_dicts_have_the_same_paths(nnx_run):
    folder, *_ = nnx_run
    found = checkpoints.read(folder)
    plain = checkpoints.restore(
        folder, params=found.params, opt_state=found.opt_state, rngs=found.rngs
    )
    assert_same(plain.params, found.params)
    names = lambda params: [pair.path for pair in find_pairs(params).pairs]
    assert names(found.params) == names(nnx.state(adapted(1)[0], nnx.LoRAParam))


def test_a_linen_model_goes_on(tmp_path):
    model = linen.Sequential([linen.Dense(8), linen.Dense(4)])
    config, x = nn.LoRAConfig(rank=2), jnp.ones((3, 6))
    with nn.lora_interceptor("layers_.*", config):
        start = lambda seed: model.init(jax.random.key(seed), x)
        base, lora = start(0)["params"], start(0)["lora"]
        other_lora = start(1)["lora"]
    tx = altlora(0.1)

    @jax.jit
    def step(lora, state):
        def loss(lora):
            with nn.lora_interceptor("layers_.*", config):
                return jnp.mean(model.apply({"params": base, "lora": lora}, x) ** 2)

        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    lora, state = step(lora, tx.init(lora))
    saved(tmp_path, params=lora, opt_state=state)
    found = checkpoints.restore(tmp_path, params=other_lora, opt_state=tx.init(other_lora))
    assert_same(step(found.params, found.opt_state), step(lora, state))


# Devices

SIZES = (4, 2)


def mesh_of(sizes, kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(kind,) * 2, devices=devices)


RECIPES = {
    "data_parallel": sharding.data_parallel(),
    "fsdp": sharding.fsdp(min_size=0),
    "tensor_parallel": sharding.tensor_parallel(["q"], ["o"]),
}


def run_on(sizes, recipe, seed, kind=AxisType.Auto):
    """Parameters, state and keys that lie on a mesh, the first two as the kernels would."""
    mesh = mesh_of(sizes, kind)
    pairs = {"q": pair_of(seed), "o": shadow(pair_of(seed + 1), jax.random.key(seed))}
    params = sharding.shard_model(pairs, mesh, RECIPES[recipe])
    state = sharding.shard_state(altlora_plus(0.1), {"q": params["q"]})
    split = lambda: jax.random.split(jax.random.key(seed), 8)
    rngs = jax.jit(split, out_shardings=NamedSharding(mesh, jax.P("data")))()
    return {"params": params, "opt_state": state, "rngs": rngs}


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """A checkpoint from eight devices, and what it holds."""
    trees = run_on(SIZES, "fsdp", seed=0)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(trees)} == {8}
    assert not trees["params"]["q"].a.is_fully_replicated
    return saved(tmp_path_factory.mktemp("eight"), **trees), trees


def assert_like(found, trees, targets):
    """The bits of the one, the places of the other."""
    found = {name: getattr(found, name) for name in trees}
    assert_same(found, trees)
    assert shardings(found) == shardings(targets)


@pytest.mark.parametrize(
    ("sizes", "recipe", "kind"),
    [
        (SIZES, "fsdp", AxisType.Auto),
        (SIZES, "tensor_parallel", AxisType.Auto),
        ((2, 2), "tensor_parallel", AxisType.Explicit),
        ((1, 1), "data_parallel", AxisType.Auto),
    ],
)
def test_another_sharding(on_eight, sizes, recipe, kind):
    folder, trees = on_eight
    targets = run_on(sizes, recipe, seed=5, kind=kind)
    assert_like(checkpoints.restore(folder, **targets), trees, targets)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    abstract = jax.tree.map(like, targets)
    assert_like(checkpoints.restore(folder, **abstract), trees, targets)


def test_sharded_leaves_are_not_read_whole(on_eight, monkeypatch):
    """Orbax gives them in parts, each for the device that it belongs to."""
    folder, _ = on_eight
    targets, place = run_on(SIZES, "tensor_parallel", seed=5), runs.place

    def checked(value, target, sharding):
        assert is_key(value) or value.sharding == sharding
        return place(value, target, sharding)

    monkeypatch.setattr(runs, "place", checked)
    checkpoints.restore(folder, **targets)


def test_targets_on_one_device(on_eight):
    folder, trees = on_eight
    targets = jax.device_put(run_on((1, 1), "fsdp", seed=5), jax.devices()[3])
    assert_like(checkpoints.restore(folder, **targets), trees, targets)


def test_what_is_on_no_device_in_particular_stays_so(tmp_path):
    """Else a count that comes back on the first device would not go with parameters on a mesh."""
    params = sharding.shard_model({"q": pair_of(0)}, mesh_of(SIZES), RECIPES["fsdp"])
    tx = altlora(0.1)
    saved(tmp_path, params=params, opt_state=tx.init(params))
    targets = {"params": params, "opt_state": tx.init(params)}
    assert not targets["opt_state"].count.committed
    found = checkpoints.restore(tmp_path, **targets)
    assert not found.opt_state.count.committed
    jax.jit(tx.update)(params, found.opt_state, found.params)


WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from tests import test_checkpoints as t
folder, sizes = sys.argv[2], tuple(map(int, sys.argv[3].split("x")))
targets = t.run_on(sizes, sys.argv[4], seed=5)
assert jax.device_count() == int(sys.argv[1])
found = t.checkpoints.restore(folder, step=1, **targets)
trees = found._asdict()
trees.pop("step")
assert t.shardings(trees) == t.shardings(targets)
t.checkpoints.save(folder, int(sys.argv[1]) + 1, **trees)
"""


@pytest.mark.parametrize(("sizes", "recipe"), [((2, 2), "tensor_parallel"), ((1, 1), "fsdp")])
def test_another_number_of_devices(on_eight, tmp_path, sizes, recipe):
    """Eight devices save, fewer restore and save, eight restore."""
    source, trees = on_eight
    folder, count = tmp_path / "run", int(np.prod(sizes))
    shutil.copytree(source, folder)
    arguments = [str(count), str(folder), "x".join(map(str, sizes)), recipe]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", WORKER, *arguments], cwd=ROOT, env=environment, check=True
    )
    targets = run_on(SIZES, "fsdp", seed=5)
    found = checkpoints.restore(folder, **targets)
    assert found.step == count + 1
    assert_like(found, trees, targets)


PROCESS = """
import sys
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, process)
from tests import test_checkpoints as t
trees = t.run_on((2, 2), "fsdp", seed=0)
own = t.of_one_process()
trees["rngs"] = {"own": own, "global": trees["rngs"]}
t.checkpoints.save(folder, 1, **trees)
targets = t.run_on((2, 2), "tensor_parallel", seed=5)
targets["rngs"] = {"own": t.other(own), "global": targets["rngs"]}
found = t.checkpoints.restore(folder, **targets)
t.assert_same(found.rngs["own"], own)
assert t.shardings(found.params) == t.shardings(targets["params"])
try:
    t.checkpoints.save(folder, 2, params=trees["params"], opt_state={"of": {"me": process}})
except ValueError as error:
    assert str(error).startswith("opt_state/of/me: each process has another value"), error
else:
    raise AssertionError("each process has another value, and it was saved")
"""


def of_one_process():
    there = jax.device_put(jnp.ones(3), jax.local_devices()[1])
    return {"key": jax.random.key(7), "anywhere": jnp.ones(3), "there": there, "python": 0.5}


def test_many_processes(tmp_path):
    """Two of two devices each write one checkpoint, also of what each has for itself."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(i), port, str(tmp_path)], cwd=ROOT, env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert checkpoints.steps(tmp_path) == [1]
    trees, targets = run_on((2, 2), "fsdp", seed=0), run_on(SIZES, "fsdp", seed=5)
    own = of_one_process()
    trees["rngs"] = {"own": own, "global": trees["rngs"]}
    targets["rngs"] = {"own": other(own), "global": targets["rngs"]}
    found = checkpoints.restore(tmp_path, **targets)
    assert_same(found._asdict(), {"step": 1, **trees})


# Steps


def test_steps_are_kept_listed_and_never_overwritten(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    assert checkpoints.steps(folder) == []
    for step in (0, 10, 20, 30):
        assert saved(folder, step, params=jnp.full(2, step)) == folder
    assert checkpoints.steps(folder) == [0, 10, 20, 30]
    with pytest.raises(FileExistsError, match="20 exists and is not overwritten"):
        saved(folder, 20, params=jnp.full(2, -1))
    saved(folder, 25, params=jnp.full(2, 25), keep=2)  # a run that went on from 20
    assert checkpoints.steps(folder) == [20, 25, 30]
    saved(folder, 40, params=jnp.full(2, 40), keep=5)  # there are fewer
    assert checkpoints.steps(folder) == [20, 25, 30, 40]
    for step in (None, 20, np.int64(25), 30):
        target = {"params": jnp.zeros(2, int), "opt_state": ()}
        found = checkpoints.restore(folder, **target, step=step)
        assert found.step == (40 if step is None else step) == found.params[0]
        assert checkpoints.read(folder, step).params[""][0] == found.step
    saved(folder, 50, keep=1)
    assert checkpoints.steps(folder) == [50]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"step": -1}, ValueError, "`step` must be at least 0"),
        ({"step": 1.0}, TypeError, "`step` must be an integer"),
        ({"keep": 0}, ValueError, "`keep` must be at least 1"),
        ({"keep": "all"}, TypeError, r"`keep` must be an integer, got 'all'\.$"),
        ({"step": True}, TypeError, r"`step` must be an integer, got True\.$"),
        ({"keep": True}, TypeError, r"`keep` must be an integer, got True\.$"),
    ],
)
def test_arguments(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        saved(tmp_path, **arguments)


def test_older_steps_go_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    """A save that fails deletes nothing, and is not seen."""
    for step in (1, 2):
        saved(tmp_path, step)

    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", fails)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 3, keep=1)
    assert len(list(tmp_path.iterdir())) == 3
    assert checkpoints.steps(tmp_path) == [1, 2]
    assert checkpoints.read(tmp_path).step == 2
    saved(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "4"}


def test_folders_that_save_did_not_write_are_left_alone(tmp_path):
    """Neither deleted, nor listed, nor counted, nor overwritten, though their names are numbers."""
    precious = tmp_path / "0" / "data" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("of somebody else")
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.StandardSave({"q": jnp.ones(2)}))
    assert checkpoints.steps(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint that .* wrote; give"):
        checkpoints.read(tmp_path)
    for step in (10, 20, 30):
        saved(tmp_path, step, keep=2)
    assert checkpoints.steps(tmp_path) == [20, 30]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "7", "20", "30"}
    assert precious.read_text() == "of somebody else"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7; there are 20, 30"):
        checkpoints.read(tmp_path, 7)
    with pytest.raises(FileExistsError, match="7 exists and is not overwritten"):
        saved(tmp_path, 7)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    file = tmp_path / "run.ckpt"
    file.write_text("")
    for use in (saved, checkpoints.steps, checkpoints.read):
        with pytest.raises(NotADirectoryError, match=r"run\.ckpt is a file; give the folder"):
            use(file)
    with pytest.raises(NotADirectoryError, match=r"run\.ckpt is a file; give the folder"):
        checkpoints.restore(file, params=pair_of(0), opt_state=())


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("~/run", 3)
    assert (tmp_path / "run" / "3").is_dir()
    assert checkpoints.steps("~/run") == [checkpoints.read("~/run").step] == [3]


def test_a_boolean_is_no_step(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(TypeError, match=r"`step` must be an integer, got True\.$"):
        checkpoints.read(tmp_path, True)


def test_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"has no checkpoint that .* wrote; give"):
            checkpoints.read(folder)
    assert not (tmp_path / "missing").exists()
    saved(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4; there are 3"):
        checkpoints.restore(tmp_path, params=pair_of(0), opt_state=(), step=4)


# What does not fit


def test_all_that_does_not_fit_is_listed(tmp_path):
    params = {"q": pair_of(0), "k": pair_of(1), "bias": jnp.ones(3), "gone": jnp.ones(1)}
    saved(tmp_path, params=params, opt_state=(), rngs=jax.random.key(0))
    targets = {
        "q": pair_of(0, rank=4),
        "k": jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair_of(1)),
        "bias": jnp.ones(3),
        "new": jnp.ones(1),
    }
    with pytest.raises(ValueError, match="does not fit the targets") as caught:
        checkpoints.restore(tmp_path, params=targets, opt_state=())
    for part in (
        f"{tmp_path / '1'} does not",
        "only in the checkpoint: params/gone, rngs;",
        "only in the targets: params/new;",
        "params/q/a is float32[8, 2] there and float32[8, 4] in the targets",
        "params/k/b is float32[2, 16] there and bfloat16[2, 16] in the targets",
        "Nothing was restored.",
        "`checkpoints.read`",
    ):
        assert part in str(caught.value)
    assert "bias" not in str(caught.value)


def test_long_lists_are_cut(tmp_path):
    saved(tmp_path, params={f"x{i:02}": jnp.ones(1) for i in range(12)})
    with pytest.raises(ValueError, match=r"params/x00, .*params/x07 and 4 more;.*targets: params"):
        checkpoints.restore(tmp_path, params=jnp.ones(1), opt_state=())


def test_keys_of_another_kind_do_not_fit(tmp_path):
    """Both have four words."""
    saved(tmp_path, rngs=jax.random.key(0, impl="rbg"))
    target = jax.random.key(0, impl="unsafe_rbg")
    with pytest.raises(ValueError, match=r"rngs is key<rbg>\[4\] there and key<urbg>\[4\]"):
        checkpoints.restore(tmp_path, params=pair_of(0), opt_state=(), rngs=target)


def test_a_state_of_another_method_does_not_fit(tmp_path):
    params = {"q": pair_of(0)}
    saved(tmp_path, params=params, opt_state=altlora(0.1).init(params))
    with pytest.raises(ValueError, match="only in the targets: opt_state/pairs/nu/q/a"):
        checkpoints.restore(tmp_path, params=params, opt_state=altlora_plus(0.1).init(params))


# Damage


# Tasks of orbax that nobody waits for after the first error complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_an_error_or_whole(tmp_path):
    """Whichever file is missing, empty or cut; some are only for other readers of orbax."""
    params = {"large": jax.random.normal(jax.random.key(0), (300, 70)), "q": pair_of(0)}
    good = saved(tmp_path / "good", params=params)
    saved(good, 2, params=params)
    files = [path.relative_to(good) for path in (good / "2").rglob("*") if path.is_file()]
    refused = set()
    for file in files:
        for damage in ("missing", "empty", "cut"):
            bad = tmp_path / "bad"
            shutil.copytree(good, bad)
            path = bad / file
            content = path.read_bytes()
            path.unlink()
            if damage != "missing":
                path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
            try:
                found = checkpoints.restore(bad, params=other(params), opt_state=())
            except ValueError as error:
                assert f"{bad / '2'} cannot be read" in str(error)  # noqa: PT017
                assert "Other steps there: 1." in str(error)  # noqa: PT017
                refused.add(damage)
            else:
                assert_same(found.params, params)
            before = checkpoints.restore(bad, params=other(params), opt_state=(), step=1)
            assert_same(before.params, params)
            shutil.rmtree(bad)
    assert refused == {"missing", "empty", "cut"}


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        saved(tmp_path)
