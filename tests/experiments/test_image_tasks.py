import numpy as np
import pytest
from flax import nnx

from experiments.adapters import Dense, LowRank, WholeModel
from experiments.errors import ExperimentError
from experiments.task import ignore_steps
from experiments.tasks import load_task
from experiments.tasks.cifar import Cifar, CifarOptions, read_cifar
from experiments.tasks.cola import CoLA
from experiments.tasks.mnist import MNIST, MNISTOptions
from experiments.tasks.pretraining import pretrain
from experiments.tasks.sentences import SentenceOptions
from lowrank_optax import nn
from tests.experiments.tiny_data import write_all


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def test_splits_do_not_overlap_and_are_fixed(data):
    first, again = (MNIST(MNISTOptions(validation_size=7), data) for _ in range(2))
    assert first.data == again.data
    sizes = {name: len(split["label"]) for name, split in first.examples.items()}
    assert sizes == {"train": 53, "validation": 7, "test": 60}
    for split in first.examples.values():
        np.testing.assert_array_equal(split["image"][:, 0, 0] // 25, split["label"])


def test_a_folder_of_data_sets_or_the_data_set_itself(data):
    options = {"validation_size": 7}
    both = [load_task("mnist", options, path, ignore_steps) for path in (data, data / "mnist")]
    assert both[0].data == both[1].data


def test_the_head_is_all_but_the_linear_kernels(data):
    task = MNIST(MNISTOptions(), data)
    model = task.build_model(0, LowRank())
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, task.head))}
    assert {"conv/0/kernel", "conv/1/bias", "linear/2/base/bias"} <= paths
    assert not any("linear" in path and "bias" not in path for path in paths)


def test_every_kind_of_adapters_has_the_same_start(data):
    task = MNIST(MNISTOptions(batch_size=4), data)
    images = next(task.train_batches(0))["image"]
    wanted = task.build_model(3, WholeModel())(images)
    for adapters in (LowRank(), Dense()):
        model = task.build_model(3, adapters)
        np.testing.assert_allclose(model(images), wanted, atol=1e-6)
        assert nnx.state(model, adapters.trained)


def test_a_dense_change_needs_a_linear_layer():
    model = nnx.Sequential(nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(ExperimentError, match=r"layers/0 is no nnx\.Linear"):
        Dense().add_to(model, "layers/0", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))


def test_cifar_decodes_the_chosen_classes(data):
    splits = read_cifar(data, range(5, 10), {"train": 11, "test": None})
    assert splits["train"]["image"].shape == (11, 32, 32, 3)
    assert len(splits["test"]["label"]) == 40
    brightness = splits["test"]["image"].mean((1, 2, 3)) / 25
    np.testing.assert_allclose(brightness, splits["test"]["label"] + 5, atol=0.1)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("mnist", "mnist/mnist.npz"),
        ("cifar", "cifar10_jpeg/cifar10_jpeg.npz"),
        ("cola", "cola/in_domain_dev.tsv"),
    ],
)
def test_missing_and_damaged_files_say_what_to_fetch(task, file, data, tmp_path):
    with pytest.raises(ExperimentError, match=r"--data-dir must name a folder.*https?://"):
        load_task(task, {}, None, ignore_steps)
    with pytest.raises(ExperimentError, match=r"does not exist; --data-dir must name"):
        load_task(task, {}, tmp_path, ignore_steps)
    content = (data / file).read_bytes()
    copy = tmp_path / file
    copy.parent.mkdir()
    for other in (data / file).parent.iterdir():
        (copy.parent / other.name).write_bytes(other.read_bytes())
    copy.write_bytes(content[: len(content) // 2] if task != "cola" else b"x01\t2\t\tWhat?\n")
    with pytest.raises(ExperimentError, match=r"damaged|line 1: .*What"):
        load_task(task, {}, tmp_path, ignore_steps)


def test_a_damaged_image_is_an_error(data, tmp_path):
    with np.load(data / "cifar10_jpeg" / "cifar10_jpeg.npz") as archive:
        arrays = dict(archive)
    arrays["train_jpeg"] = np.zeros_like(arrays["train_jpeg"])
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    with pytest.raises(ExperimentError, match=r"damaged.*fetch it again"):
        Cifar(CifarOptions(), tmp_path)


def test_cola_is_read_and_scored_by_matthews_correlation(data):
    task = CoLA(SentenceOptions(max_length=8, batch_size=4), data)
    assert task.splits == ("validation", "test")
    assert task.data["train"].startswith("16 sentences")
    model = task.build_model(0, LowRank())
    (batch,) = task.eval_batches("test")
    totals = task.totals(model, batch)
    assert totals.confusion.sum() == totals.weight == 16
    assert totals.confusion.trace() == totals.correct


def test_batches_of_sentences_are_cut_to_their_longest(data):
    task = CoLA(SentenceOptions(max_length=48, batch_size=4), data)
    whole = task._examples["validation"]
    batches = [next(task.train_batches(0)), *task.eval_batches("validation")]
    for batch in batches:
        longest = batch["mask"].sum(axis=1).max()
        assert longest <= batch["tokens"].shape[1] < longest + 8
        assert batch["tokens"].shape == batch["mask"].shape == batch["segments"].shape
    seen = sorted(int(t.sum()) for b in batches[1:] for t in b["tokens"][b["weight"] > 0])
    assert seen == sorted(int(tokens.sum()) for tokens in whole["tokens"])


def test_a_pretraining_that_diverges_is_an_error(tiny_digits):
    options = {"steps": 5, "learning_rate": 1e12, "seed": 0, "on_step": ignore_steps}
    with pytest.raises(ExperimentError, match="the pretraining, task 'digits', diverged"):
        pretrain(tiny_digits, **options)
