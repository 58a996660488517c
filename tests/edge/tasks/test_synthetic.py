from __future__ import annotations

import hashlib
from pathlib import Path
from typing import List, Tuple

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from sft.errors import StorageError
from sft_edge.tasks import make_task
from sft_edge.tasks.synthetic import TRAIN_ROWS, VALIDATION_ROWS, examples, write_synthetic

Split = Tuple[List[str], List[int]]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Split, Split]:
    """Sentences and labels of train and validation, as the task reads them."""
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder)
    task = make_task("sst2", folder)
    splits = []
    for split in ("train", "validation"):
        rows = task.read(split)
        splits.append(([row.texts[0] for row in rows], [int(str(row.label)) for row in rows]))
    return splits[0], splits[1]


def test_sizes_and_balance(splits: Tuple[Split, Split]) -> None:
    assert [len(labels) for _, labels in splits] == [TRAIN_ROWS, VALIDATION_ROWS]
    for _, labels in splits:
        assert 0.45 <= sum(labels) / len(labels) <= 0.55


def test_no_sentence_comes_twice(splits: Tuple[Split, Split]) -> None:
    (train, _), (validation, _) = splits
    assert len(set(train + validation)) == TRAIN_ROWS + VALIDATION_ROWS


def test_a_bag_of_words_does_not_solve_it(
    splits: Tuple[Split, Split],
) -> None:
    (train, train_labels), (validation, validation_labels) = splits
    bag = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(bag.fit_transform(train), train_labels)
    assert model.score(bag.transform(validation), validation_labels) < 0.7


def test_every_python_writes_the_same_bytes(tmp_path: Path) -> None:
    write_synthetic(tmp_path, seed=0)
    contents = b"".join((tmp_path / "SST-2" / name).read_bytes() for name in ("train.tsv", "dev.tsv"))
    assert hashlib.sha256(contents).hexdigest() == "f0e7e7531d2b3dba6b62765f791e45178d2154df1641d047730604e2dadbeaf8"
    assert examples(50, seed=1) != examples(50, seed=0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "SST-2").write_text("in the way")
    with pytest.raises(StorageError, match="SST-2: cannot be written: File exists"):
        write_synthetic(tmp_path)


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "real.tsv").write_text("theirs")
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").symlink_to(tmp_path / "real.tsv")
    write_synthetic(tmp_path)
    assert (tmp_path / "real.tsv").read_text() == "theirs"
    assert (tmp_path / "SST-2" / "train.tsv").read_text().startswith("sentence\tlabel\n")
