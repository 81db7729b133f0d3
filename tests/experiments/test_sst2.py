import datasets
import numpy as np
import pytest

from experiments.errors import ExperimentError
from experiments.schema import Plan
from experiments.task import ignore_steps
from experiments.tasks import load_task, sentences
from experiments.tasks.sst2 import SST2, read_hub, read_tsv_folder
from experiments.trainer import Trainer

ROWS = [("a 'fine' film", 1), ('it "drags', 0), ("dull ,  dull", 0), ("great", 1)]


def write(path, rows=ROWS, header="sentence\tlabel"):
    path.write_text("\n".join([header, *(f"{s}\t{label}" for s, label in rows)]) + "\n")


@pytest.fixture
def folder(tmp_path):
    for name in ("train.tsv", "dev.tsv", "test_labeled.tsv"):
        write(tmp_path / name)
    return tmp_path


def test_tsv_is_read_verbatim(folder):
    splits = read_tsv_folder(folder)
    assert set(splits) == {"train", "validation", "test"}
    texts, labels = splits["train"]
    assert texts == [sentence for sentence, _ in ROWS]
    np.testing.assert_array_equal(labels, [1, 0, 0, 1])


def test_the_labelled_test_set_is_optional(folder):
    (folder / "test_labeled.tsv").unlink()
    assert set(read_tsv_folder(folder)) == {"train", "validation"}


@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
def test_a_missing_file_says_what_to_fetch(folder, name):
    (folder / name).unlink()
    with pytest.raises(ExperimentError, match=rf"{name} does not exist.*SST-2\.zip.*hub"):
        read_tsv_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\tlabel\ngood\t1\nbad\n", r"line 3: \['bad'\]"),
        ("sentence\tlabel\ngood\tpositive\n", "line 2"),
        ("good\t1\n", "the header is"),
        ("", "the header is None"),
        ("sentence\tlabel\n", "holds no sentences"),
    ],
)
def test_a_malformed_file_is_an_error(folder, text, message):
    (folder / "dev.tsv").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        read_tsv_folder(folder)


def test_a_binary_file_is_an_error(folder):
    (folder / "train.tsv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ExperimentError, match=r"train\.tsv.*UTF-8"):
        read_tsv_folder(folder)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), datasets.exceptions.DatasetNotFoundError("?")]
)
def test_an_unreachable_hub_says_what_to_do(error, monkeypatch):
    def unreachable(name):
        assert name == "stanfordnlp/sst2"
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ExperimentError, match=r"cannot load stanfordnlp/sst2.*--data-dir"):
        read_hub()


def test_the_hub_gives_train_and_validation(monkeypatch):
    split = datasets.Dataset.from_list([{"idx": 0, "sentence": "good", "label": 1}])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: {"train": split, "validation": split}
    )
    splits = read_hub()
    assert splits["train"][0] == ["good"]
    np.testing.assert_array_equal(splits["validation"][1], [1])


def test_minilm_trains_on_a_tiny_tsv(folder):
    options = {"batch_size": 4, "max_length": 8, "rank": 2}
    task = load_task("sst2", options, folder, ignore_steps)
    assert isinstance(task, SST2)
    plan = Plan(steps=8, eval_every=8, head_learning_rate=1e-2)
    result = Trainer(task, "adamw", plan).run(1e-2, seed=0).result
    assert result.config.data["train"].startswith("4 sentences, sha256 ")
    assert str(folder) not in result.model_dump_json()
    assert result.trainable_parameters == 6 * 2 * 2 * (384 + 384) + 2 * 384 + 2
    assert result.train_losses[-1] < 0.5 * result.train_losses[0]
    assert result.final["test"].accuracy == 1.0


def test_a_run_of_several_widths_is_the_run_of_one(folder, monkeypatch):
    long = [(" and ".join([sentence] * 3), label) for sentence, label in ROWS]
    write(folder / "train.tsv", ROWS * 2 + long * 2)
    write(folder / "dev.tsv", ROWS + long)
    task = load_task("sst2", {"batch_size": 4, "max_length": 24, "rank": 2}, folder, ignore_steps)

    def losses():
        batches = task.train_batches(0)
        widths = {next(batches)["tokens"].shape[1] for _ in range(4)}
        plan = Plan(steps=4, eval_every=4, head_learning_rate=1e-2)
        result = Trainer(task, "adamw", plan).run(1e-2, seed=0).result
        evaluated = [result.final[split].loss for split in ("validation", "test")]
        return widths, np.array([*result.train_losses, *evaluated])

    widths, cut = losses()
    monkeypatch.setattr(sentences, "_cut", lambda batch: batch)
    full_widths, full = losses()
    assert len(widths) > 1
    assert full_widths == {24}
    np.testing.assert_allclose(cut, full, rtol=1e-4)
