"""What two implementations leave for each other: models, and their writer's answers.

Runs in every environment, so it needs NumPy and nothing else::

    <directory>/<case>/model/             a preset or checkpoint, as its writer saves it
    <directory>/<case>/adapter.lora.h5    LoRA to be loaded after it, if there is one
    <directory>/<case>/adapter/           the same as PEFT saves it
    <directory>/<case>/answer.npz         the writer's logits for `rows`
    <directory>/differences.json          case -> the reader's largest difference

The model of a case whose name begins with ``control`` is not the one that answered: one number of
one weight differs. A comparison that finds nothing there finds nothing anywhere.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

CONTROL = "control"
VOCABULARY_SIZE = 512
# Added to one number of the first block's query kernel.
CONTROL_CHANGE = 0.1
TOKENIZER = Path(__file__).parents[1] / "goldens/gemma1_tiny/preset/assets/tokenizer/vocabulary.spm"


def rows() -> dict[str, np.ndarray]:
    """Token ids and padding mask of three rows: full, right padded, left padded."""
    token_ids = np.random.default_rng(14).integers(11, VOCABULARY_SIZE, (3, 14), dtype=np.int32)
    token_ids[:, 0] = 2
    padding_mask = np.ones(token_ids.shape, np.int32)
    padding_mask[1, 9:] = 0
    padding_mask[2, :4] = 0
    return {"token_ids": token_ids * padding_mask, "padding_mask": padding_mask}


def write_answer(case: Path, logits: np.ndarray) -> None:
    """The writer's logits [B, T, V] beside its model."""
    assert logits.shape == (3, 14, VOCABULARY_SIZE), logits.shape
    np.savez(case / "answer.npz", logits=np.asarray(logits, np.float32))


def compare(directory: Path, logits_of: Callable[[Path], np.ndarray]) -> None:
    """Lets the reader answer every case of a directory, and writes the differences.

    Compared are positions that hold a token: what an implementation computes at a padded one is
    nobody's business, and transformers sees other keys there.
    """
    is_token = rows()["padding_mask"].astype(bool)
    differences = {}
    for case in _cases(directory):
        with np.load(case / "answer.npz") as archive:
            expected = archive["logits"]
        logits = np.asarray(logits_of(case), np.float32)
        assert logits.shape == expected.shape, f"{case.name}: {logits.shape}"
        differences[case.name] = float(np.abs(logits - expected)[is_token].max())
    (directory / "differences.json").write_text(json.dumps(differences))


def _cases(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield path
