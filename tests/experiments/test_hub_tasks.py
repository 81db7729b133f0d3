import io
import json
import re

import datasets
import huggingface_hub
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from experiments.adapters import LowRank
from experiments.errors import ExperimentError
from experiments.schema import Plan
from experiments.tasks.cifar100 import CIFAR100, CIFAR100Options
from experiments.tasks.gsm8k import GSM8K, GSM8KOptions, final_number, pack_answers
from experiments.tasks.hub import HubData, find_model, split_off_last_tenth
from experiments.tasks.mnli import MNLI, MNLIOptions
from experiments.trainer import Trainer
from tests.experiments.tiny_models import BERT, LLAMA, ROBERTA, VIT, WIDTH, write_model

PLAN = Plan(steps=30, eval_every=30, head_learning_rate=3e-2)
MNLI_ROWS = [
    {"premise": 'it "rains', "hypothesis": "it is wet", "label": 0},
    {"premise": "it rains", "hypothesis": "dogs bark", "label": 1},
    {"premise": "it rains", "hypothesis": "it is dry", "label": 2},
]
WORDS = ["it", '"', "rains", "is", "wet", "dry", "dogs", "bark"]
WORDS += ["one", "two", "plus", "=", "3", "####"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_tokenizer(folder):
    """Writes a tokenizer that puts <s> (0) first, and </s> (2) between and after two texts."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def roberta(tmp_path):
    write_model(tmp_path / "roberta", ROBERTA)
    write_tokenizer(tmp_path / "roberta")
    return tmp_path / "roberta"


def mnli_options(model, **others):
    return MNLIOptions(model=str(model), rank=2, batch_size=3, max_length=16, **others)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "tsv"])
def test_mnli_reads_every_form(roberta, tmp_path, suffix):
    data = tmp_path / "data"
    for stem in ("train", "dev_matched", "dev_mismatched"):
        write_rows(data / "mnli" / f"{stem}.{suffix}", MNLI_ROWS)
    task = MNLI(mnli_options(roberta), data)
    batch = task.examples["train"]
    np.testing.assert_array_equal(batch["label"], [0, 1, 2])
    first = [0, 4, 5, 6, 2, 4, 7, 8, 2]
    np.testing.assert_array_equal(batch["tokens"][0], first + [1] * 7)
    np.testing.assert_array_equal(batch["mask"][0], [True] * 9 + [False] * 7)
    np.testing.assert_array_equal(batch["segments"][0], [0] * 5 + [1] * 4 + [0] * 7)
    assert re.fullmatch(r"3 rows, sha256 \w{12}", task.data["test"])


def test_mnli_reads_glues_own_files(roberta, tmp_path):
    labels = ("entailment", "neutral", "contradiction")
    rows = [
        {
            "index": i,
            "sentence1": row["premise"],
            "sentence2": row["hypothesis"],
            "gold_label": labels[row["label"]],
        }
        for i, row in enumerate(MNLI_ROWS)
    ]
    for stem in ("train", "dev_matched", "dev_mismatched"):
        write_rows(tmp_path / f"{stem}.tsv", rows)
    task = MNLI(mnli_options(roberta), tmp_path)
    np.testing.assert_array_equal(task.examples["test"]["label"], [0, 1, 2])
    assert (task.examples["test"]["tokens"][0, :4] == [0, 4, 5, 6]).all()
    write_rows(tmp_path / "train.tsv", [rows[0] | {"gold_label": "-"}])
    with pytest.raises(ExperimentError, match="split 'train', row 0: the label '-'"):
        MNLI(mnli_options(roberta), tmp_path)


@pytest.fixture
def mnli_from_hub(monkeypatch):
    """The hub's form of the data, without a hub."""

    def load(name, config, split):
        assert (name, config) == ("nyu-mll/glue", "mnli")
        assert split in ("train", "validation_matched", "validation_mismatched")
        return datasets.Dataset.from_list(MNLI_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("mnli_from_hub")
def test_roberta_learns_three_pairs(roberta):
    targets = "query|key|value|out|mlp_in|mlp_out"
    task = MNLI(mnli_options(roberta, targets=targets), None)
    result = Trainer(task, "adamw", PLAN).run(1e-2, seed=0).result
    assert result.train_losses[-1] < 0.1 * result.train_losses[0]
    assert result.final["test"].accuracy == 1.0
    pairs = 2 * 2 * (4 * 2 * WIDTH + 2 * (WIDTH + 48))
    head = WIDTH * WIDTH + WIDTH + 3 * WIDTH + 3
    assert result.trainable_parameters == pairs + head


@pytest.mark.usefixtures("mnli_from_hub")
def test_berts_head_starts_with_its_pooler(tmp_path):
    tensors = write_model(tmp_path, BERT | {"pad_token_id": 1, "type_vocab_size": 2})
    write_tokenizer(tmp_path)
    task = MNLI(mnli_options(tmp_path), None)
    model = task.build_model(0, LowRank())
    kernel = model.head.dense.kernel[...]
    np.testing.assert_array_equal(kernel, tensors["bert.pooler.dense.weight"].T)
    other = task.build_model(1, LowRank())
    assert (other.head.classifier.kernel[...] != model.head.classifier.kernel[...]).any()


def test_texts_longer_than_the_model_are_refused(roberta):
    with pytest.raises(ExperimentError, match="has positions for 38 tokens, not for 39"):
        MNLI(mnli_options(roberta).model_copy(update={"max_length": 39}), None)


GSM8K_ROWS = [{"question": "one plus two", "answer": "= 3"}, {"question": "one", "answer": "one"}]


@pytest.fixture
def llama(tmp_path):
    write_model(tmp_path / "llama", LLAMA | {"eos_token_id": [2, 3]})
    write_tokenizer(tmp_path / "llama")
    return tmp_path / "llama"


def gsm8k_options(model, **others):
    return GSM8KOptions(model=str(model), rank=2, batch_size=4, max_length=8, **others)


def test_only_answers_count(llama):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    questions, answers = ([row[key] for row in GSM8K_ROWS] for key in ("question", "answer"))
    batch = pack_answers(tokenizer, 2, questions, answers, gsm8k_options(llama))
    np.testing.assert_array_equal(
        batch["tokens"], [[0, 12, 14, 13, 15, 16, 2], [0, 12, 12, 2, 2, 2, 2]]
    )
    np.testing.assert_array_equal(
        batch["label"], [[12, 14, 13, 15, 16, 2, 2], [12, 12, 2, 2, 2, 2, 2]]
    )
    np.testing.assert_array_equal(
        batch["in_answer"], [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]
    )
    short = gsm8k_options(llama).model_copy(update={"max_length": 4})
    with pytest.raises(ExperimentError, match=r"question '.*'… has 4 tokens; 4 leave no room"):
        pack_answers(tokenizer, 2, questions, answers, short)


def test_llama_learns_two_answers(llama, tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "gsm8k" / f"{split}.jsonl", GSM8K_ROWS * 5)
    task = GSM8K(gsm8k_options(llama, dtype="float32"), tmp_path)
    assert [len(task.examples[s]["label"]) for s in ("train", "validation", "test")] == [9, 1, 10]
    result = Trainer(task, "adamw", PLAN).run(2e-2, seed=0).result
    assert result.train_losses[-1] < 0.1 * result.train_losses[0]
    assert result.final["test"].accuracy == 1.0
    bfloat16 = GSM8K(gsm8k_options(llama), tmp_path).build_model(0, LowRank())
    frozen = nnx.state(bfloat16, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### -1,000,000", "-1000000"),
        ("#### 2.50", "2.50"),
        ("#### $5", None),
        ("it is 72", None),
    ],
)
def test_the_final_number_of_an_answer(answer, number):
    assert final_number(answer) == number


def test_problems_count_as_solved_by_the_answers_that_are_generated(llama, tmp_path):
    """The prompts differ in length; what is learnt is solved, and other numbers are not."""
    rows = [
        {"question": "one plus two", "answer": "= #### 3"},
        {"question": "one", "answer": "#### 3"},
    ]
    write_rows(tmp_path / "gsm8k" / "train.jsonl", rows * 5)
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [*rows, rows[0] | {"answer": "= #### 4"}])
    task = GSM8K(gsm8k_options(llama, dtype="float32", solve_limit=3), tmp_path)
    final = Trainer(task, "adamw", PLAN).run(2e-2, seed=0).result.final
    assert final["test"].solved == pytest.approx(2 / 3)
    assert final["validation"].solved is None
    untrained = task.build_model(0, LowRank())
    assert task.solved(untrained, "test") == 0.0
    silent = GSM8K(gsm8k_options(llama, dtype="float32"), tmp_path)
    assert silent.solved(untrained, "test") is None


def encoded_images(labels, size=4):
    rows = []
    for i, label in enumerate(labels):
        pixels = np.full((size, size, 3), 40 + 60 * label, np.uint8)
        pixels[0, 0] = i
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({"img": {"bytes": file.getvalue(), "path": None}, "fine_label": label})
    return rows


@pytest.fixture
def vit(tmp_path):
    folder = tmp_path / "vit"
    write_model(folder, VIT)
    normalization = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalization))
    return folder


def test_vit_learns_three_colours(vit, tmp_path):
    rows = encoded_images([0, 1, 2] * 7)
    shards = {"train-00000-of-00002": rows[:10], "train-00001-of-00002": rows[10:]}
    for stem, part in shards.items():
        write_rows(tmp_path / "cifar100" / "data" / f"{stem}.parquet", part)
    write_rows(tmp_path / "cifar100" / "data" / "test-00000-of-00001.parquet", rows[:6])
    task = CIFAR100(CIFAR100Options(model=str(vit), rank=2, batch_size=9), tmp_path)
    sizes = {name: split["image"].shape for name, split in task.examples.items()}
    assert sizes == {"train": (19, 4, 4, 3), "validation": (2, 4, 4, 3), "test": (6, 4, 4, 3)}
    np.testing.assert_array_equal(task.examples["train"]["image"][:, 0, 0, 0], np.arange(19))
    result = Trainer(task, "adamw", PLAN).run(1e-2, seed=0).result
    assert result.final["test"].accuracy == 1.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"img": {"bytes": b"no image", "path": None}, "fine_label": 0}], "row 0 is no image"),
        (encoded_images([0]) + encoded_images([1], size=5), r"row 1: the image is of shape \(5,"),
        ([encoded_images([0])[0] | {"fine_label": 100}], "labels from 100 to 100, 0 to 99"),
    ],
)
def test_bad_images_are_errors(rows, message, vit, tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.parquet", rows)
    with pytest.raises(ExperimentError, match=message):
        CIFAR100(CIFAR100Options(model=str(vit)), tmp_path)


DATA = HubData("toy", "someone/toy", "small", {"train": ("train",)}, {"text": ("sentence",)})


@pytest.mark.parametrize("place", ["", "toy", "small", "data", "toy/small"])
def test_where_files_are_looked_for(place, tmp_path):
    write_rows(tmp_path / place / "train.jsonl", [{"sentence": "a"}, {"sentence": "b"}])
    assert DATA.load(tmp_path) == {"train": {"text": ["a", "b"]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"other": 1}\n', r"no column 'text', but: other; pass --data-dir"),
        (b"{broken\n", r"train\.jsonl cannot be read as jsonl"),
        (b"", r"train\.jsonl is empty"),
    ],
)
def test_bad_files_are_errors(content, message, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        DATA.load(tmp_path)


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    write_rows(tmp_path / "train.parquet", [{"text": "a"}] * 100)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:-20])
    with pytest.raises(ExperimentError, match=r"train\.parquet cannot be read as parquet"):
        DATA.load(tmp_path)


def test_a_missing_file_says_what_to_fetch(tmp_path):
    with pytest.raises(ExperimentError, match=r"holds no train; pass --data-dir.*someone/toy"):
        DATA.load(tmp_path)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ExperimentError, match=r"no route\)\. Without internet, pass --data-dir"):
        DATA.load(None)
    with pytest.raises(ExperimentError, match=r"'roberta-base'.*no route\)\. Without internet"):
        find_model("roberta-base")


def test_models_are_folders_or_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: f"{tmp_path}/{name}/{len(allow_patterns)}",
    )
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model("a/b") == tmp_path / "a/b/2"
    for missing in (f"{tmp_path}/none", "./none"):
        with pytest.raises(ExperimentError, match="there is no such folder"):
            find_model(missing)


@pytest.mark.parametrize(
    ("task", "options", "config"),
    [
        (MNLI, MNLIOptions, LLAMA),
        (GSM8K, GSM8KOptions, BERT),
        (CIFAR100, CIFAR100Options, BERT),
    ],
)
def test_a_model_of_another_kind_is_refused(task, options, config, tmp_path):
    write_model(tmp_path, config)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0], "image_std": [1]}')
    with pytest.raises(ExperimentError, match=f"model_type is '{config['model_type']}'"):
        task(options(model=str(tmp_path)), None)


def test_the_last_tenth_is_at_least_one():
    first, last = split_off_last_tenth({"label": np.arange(4)})
    assert (first["label"].tolist(), last["label"].tolist()) == ([0, 1, 2], [3])
