"""What a process with transformers alone makes of exports: every family, head, kind of run and form."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest
import torch
from support.saved import save_tiny
from support.tiny import ARCHITECTURES, tiny_config

from sft.errors import VerificationError
from sft.models import Cut, heads_of
from sft.models.split_layer import RESIDUALS
from sft_edge.commands.export.check import Answer, Question, ask_elsewhere, ask_here, largest_difference, texts_for
from sft_edge.commands.export.content import Export
from sft_edge.commands.export.export import TOLERANCES
from sft_edge.model_files import DENSE, FACTORED
from sft_edge.model_files.saved import load_model

Kind = Tuple[str, str, str, str]
"""Family, head, residual or "undecomposed", form."""

ODD = ("bert", "gpt2", "opt")
"""Families that differ in what matters here: a dropout that is a module, one that is a number, a transposed matrix."""


def kinds() -> Iterator[Kind]:
    for family in ARCHITECTURES:
        for head in heads_of(tiny_config(family))[:2]:
            yield family, head, "undecomposed", DENSE
            for residual in RESIDUALS:
                if residual != "low-rank" or family in ODD:
                    yield family, head, residual, DENSE
                if residual == "low-rank" or family in ODD:
                    yield family, head, residual, FACTORED
    for head in ("token-classification", "multiple-choice"):
        yield "bert", head, "undecomposed", DENSE
        yield "bert", head, "none", FACTORED


KINDS = list(kinds())
QUICK = [
    ("bert", "sequence-classification", residual, form)
    for residual, form in (("undecomposed", DENSE), ("none", FACTORED), ("full", DENSE))
]
OTHERS = [kind for kind in KINDS if kind not in QUICK]


def differences_of(kinds: List[Kind], tmp_path_factory: pytest.TempPathFactory) -> Dict[Kind, Tuple[float, float]]:
    """Of each export's logits from its model's, and of its base model opened alone; all are opened in one process."""
    questions: List[Question] = []
    expected: List[Answer] = []
    for kind in kinds:
        family, head, residual, form = kind
        directory = tmp_path_factory.mktemp("-".join(kind))
        cut = None if residual == "undecomposed" else Cut("sft", 1, 4, residual)
        saved = load_model(save_tiny(directory / "model", family, head, cut, layers=2, initializer_range=0.1))
        exported, to = Export(saved, form), directory / "export"
        to.mkdir()
        exported.write(to)
        texts = texts_for(saved.description)
        questions.append(Question(to, exported.auto_class, exported.has_code, texts))
        expected.append(ask_here(saved, texts))
    answers = ask_elsewhere(questions)
    return {
        kind: (largest_difference(one, other), other.base_difference)
        for kind, one, other in zip(kinds, expected, answers)
    }


@pytest.fixture(scope="module")
def of_bert(tmp_path_factory: pytest.TempPathFactory) -> Dict[Kind, Tuple[float, float]]:
    return differences_of(QUICK, tmp_path_factory)


@pytest.fixture(scope="module")
def of_others(tmp_path_factory: pytest.TempPathFactory) -> Dict[Kind, Tuple[float, float]]:
    return differences_of(OTHERS, tmp_path_factory)


@pytest.mark.parametrize("kind", QUICK, ids="-".join)
def test_it_says_what_the_trained_model_says(of_bert: Dict[Kind, Tuple[float, float]], kind: Kind) -> None:
    assert max(of_bert[kind]) <= TOLERANCES[kind[3]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS, ids="-".join)
def test_so_does_every_other_family_and_head(of_others: Dict[Kind, Tuple[float, float]], kind: Kind) -> None:
    assert max(of_others[kind]) <= TOLERANCES[kind[3]]


def question(directory: Path, **other: object) -> Question:
    known = Question(directory, "AutoModelForSequenceClassification", True, [["a good film", "a plot"]])
    return known._replace(**other)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A model with code."""
    to = tmp_path / "export"
    to.mkdir()
    Export(load_model(save_tiny(tmp_path / "model", cut=Cut("sft", 2, 4))), DENSE).write(to)
    return to


TRIES_TO_IMPORT = """
missing = []
for name in ("sft", "sft_edge", "sft_cloud"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
raise ImportError(f"not there: {missing}")
"""


@pytest.mark.slow
def test_this_package_cannot_be_imported_there(exported: Path) -> None:
    code = exported / "modeling_sft.py"
    code.write_text(code.read_text() + TRIES_TO_IMPORT)
    with pytest.raises(VerificationError, match="cannot open the exported model: ") as caught:
        ask_elsewhere([question(exported)])
    assert "not there: ['sft', 'sft_edge', 'sft_cloud']" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_base_model_that_is_another_is_noticed(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(str(exported), str(other))
    code = other / "modeling_sft.py"
    text = code.read_text()
    end = text.index("class BertForSequenceClassification")
    code.write_text(text[:end].rstrip() + "\n        self.embeddings.LayerNorm.eps = 1.0\n\n\n" + text[end:])
    answer, wrong = ask_elsewhere([question(exported), question(other)])
    assert answer.base_difference == pytest.approx(0, abs=1e-6)
    assert wrong.base_difference > 1e-3


@pytest.mark.slow
def test_code_that_may_not_run(exported: Path) -> None:
    """Nobody gets the library's own model with weights that are not its."""
    with pytest.raises(VerificationError, match=r"contains custom code|requires you to execute"):
        ask_elsewhere([question(exported, trust_remote_code=False)])


@pytest.mark.slow
def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="transformers cannot open the exported model: "):
        ask_elsewhere([question(tmp_path)])


@pytest.mark.slow
def test_a_process_that_dies(exported: Path) -> None:
    code = exported / "modeling_sft.py"
    code.write_text(f"{code.read_text()}\nimport os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(VerificationError, match="its process ended with -9"):
        ask_elsewhere([question(exported)])


def test_the_largest_difference() -> None:
    one = Answer([[1, 2], [3]], [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])])
    assert largest_difference(one, one) == 0
    assert largest_difference(one, one._replace(logits=[one.logits[0], one.logits[1] - 0.5])) == 0.5
    not_finite = one._replace(logits=[one.logits[0], torch.tensor([float("nan"), 0.0])])
    assert not largest_difference(one, not_finite) <= sys.float_info.max
    with pytest.raises(VerificationError, match="makes other tokens"):
        largest_difference(one, one._replace(tokens=[[1, 2], [4]]))
