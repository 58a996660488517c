from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
import torch
from support.tiny import tiny_tokenizer
from torch import Tensor
from transformers import BertTokenizer

from sft.errors import DataError, UnsupportedModelError, UsageError
from sft_edge.tasks import Answer, Feature, Row, make_task

SQUAD = make_task("squad")
CONTEXT = "the plot was one of the best , but the story by her was not like it"


def question(**changes: Any) -> Dict[str, Any]:
    answers = [{"text": "the story", "answer_start": CONTEXT.index("the story")}]
    return {"id": "q1", "question": "what was not like it", "answers": answers, **changes}


def write(folder: Path, data: object, split: str = "dev") -> Path:
    (folder / "SQuAD").mkdir(exist_ok=True)
    path = folder / "SQuAD" / f"{split}-v1.1.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def squad(*questions: object, context: object = CONTEXT) -> Dict[str, object]:
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def logits_for(feature: Feature, first: int, last: int, height: float = 10.0) -> Tensor:
    logits_S2 = torch.zeros(feature.length, 2)
    logits_S2[first, 0] = height
    logits_S2[last, 1] = height
    return logits_S2


def test_questions_are_read_with_all_their_answers(tmp_path: Path) -> None:
    answers = [{"text": "plot", "answer_start": 4}, {"text": "the plot", "answer_start": 0}]
    write(tmp_path, squad(question(), question(id="q2", answers=answers)))
    rows = make_task("squad", tmp_path).read("validation")
    assert [row.id for row in rows] == ["q1", "q2"]
    assert rows[0].texts == ("what was not like it", CONTEXT)
    assert rows[1].answers == (Answer(4, "plot"), Answer(0, "the plot"))
    assert len(make_task("squad", tmp_path).read("validation", limit=1)) == 1


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ([], r"v1\.1\.json: expected a JSON object, not \[\]"),
        ({"data": 5}, r"v1\.1\.json: data must be a list, not 5"),
        ({"data": [{}]}, "paragraphs must be a list, not None"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, "qas must be a list"),
        ({"data": []}, "holds no questions"),
        (squad("q"), "expected a JSON object, not 'q'"),
        (squad(question(question="")), "question 'q1': the question is empty"),
        (squad(question(), context=None), "question 'q1': its context must be text, not None"),
        (squad(question(answers={})), "question 'q1': answers must be a list"),
        (squad(question(answers=[])), "question 'q1': no answers"),
        (
            squad(question(answers=[{"text": "plot", "answer_start": 5}])),
            "question 'q1': the context at 5 does not read",
        ),
        (squad(question(answers=[{"text": "plot", "answer_start": -64}])), "answer_start -64 is outside the context"),
        (squad(question(answers=[{"text": "plot", "answer_start": 10**9}])), "answer_start 1000000000 is outside"),
        (squad(question(answers=[{"text": "plot", "answer_start": "x"}])), "answer_start 'x' is outside the context"),
        (squad(question(answers=[{"text": "plot"}])), "answer_start None is outside the context"),
        (squad(question(answers=[{"text": "", "answer_start": 4}])), "question 'q1': an answer is empty"),
        (squad(question(answers=["plot"])), "question 'q1': expected a JSON object, not 'plot'"),
        (squad(question(id="a\nb", answers=[])), r"question 'a\\nb': no answers"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, data: object, what: str) -> None:
    write(tmp_path, data)
    with pytest.raises(DataError, match=what) as raised:
        make_task("squad", tmp_path).read("validation")
    assert "\n" not in str(raised.value)


def test_what_is_not_needed_may_be_anything(tmp_path: Path) -> None:
    """Numbers for names, no names, positions as text, and the form that the datasets library gives answers."""
    answers = {"text": ["plot", "the plot"], "answer_start": [4, 0]}
    nameless = question(answers=[{"text": "plot", "answer_start": "4"}], is_impossible=False, plausible_answers=[])
    del nameless["id"]
    data = squad(question(id=7, answers=answers), nameless, question(id=7))
    del data["data"][0]["title"]  # type: ignore[index]
    write(tmp_path, data)
    rows = make_task("squad", tmp_path).read("validation")
    assert [row.id for row in rows] == ["7", "2", "7"]
    assert rows[0].answers == (Answer(4, "plot"), Answer(0, "the plot"))
    assert rows[1].answers == (Answer(4, "plot"),)


def test_answers_that_are_not_where_they_say_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = {"text": "plot", "answer_start": 4}, {"text": "plot", "answer_start": -1}
    path = write(
        tmp_path, squad(question(), question(id="q2", answers=[wrong]), question(id="q3", answers=[wrong, right]))
    )
    rows = make_task("squad", tmp_path).read("validation")
    assert [(row.id, len(row.answers)) for row in rows] == [("q1", 1), ("q3", 1)]
    assert caplog.messages == [
        f"{path}: passed over 1 of 3 questions, and one answer or more of 1 others: question 'q2': answer_start -1 is "
        "outside the context"
    ]


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SQuAD/train-v1\.1\.json: no such file"):
        make_task("squad", tmp_path).read("train")
    write(tmp_path, {}, "train").write_text('{"data": [\n,]}')
    with pytest.raises(DataError, match=r"train-v1\.1\.json:2: not JSON"):
        make_task("squad", tmp_path).read("train")


def test_answers_are_found_among_the_tokens() -> None:
    tokenizer = tiny_tokenizer("bert")
    row = Row(("what was not like it", CONTEXT), answers=(Answer(CONTEXT.index("the story"), "the story"),))
    (feature,) = SQUAD.encode([row], tokenizer, 64)
    assert feature.span is not None
    first, last = feature.span
    assert tokenizer.decode(feature.inputs["input_ids"][first : last + 1].tolist()) == "the story"
    batch = SQUAD.collate([feature, feature])
    assert batch.labels["start_positions"].tolist() == [first, first]
    assert batch.labels["end_positions"].tolist() == [last, last]
    assert batch.labels["end_positions"].dtype == torch.int64
    (unlabelled,) = SQUAD.encode([row._replace(answers=())], tokenizer, 64)
    assert SQUAD.collate([unlabelled]).labels == {}


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("max_seq_length", [12, 24, 64])
def test_windows_cover_the_context_and_hold_the_answer(family: str, max_seq_length: int) -> None:
    context = " ".join(["the film was not good ."] * 12 + ["her best story ."] + ["one people ?"] * 7)
    answer = Answer(context.index("best story"), "best story")
    tokenizer = tiny_tokenizer(family)
    rows = [Row(("who did", CONTEXT)), Row(("what was it " * 40, context), answers=(answer,))]
    features = SQUAD.encode(rows, tokenizer, max_seq_length)
    assert max(feature.length for feature in features) <= max_seq_length
    windows = [feature for feature in features if feature.row == 1]
    covered = set()
    for feature in windows:
        assert feature.offsets is not None
        covered.update((int(begin), int(end)) for begin, end in feature.offsets)
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert covered == {tuple(pair) for pair in whole}
    holding = [feature for feature in windows if feature.span != (0, 0)]
    assert holding
    for feature in holding:
        assert feature.span is not None
        first, last = feature.span
        assert tokenizer.decode(feature.inputs["input_ids"][first : last + 1].tolist()) == "best story"
    assert features[0].span is None


def test_too_short_a_sequence_and_no_fast_tokenizer(tmp_path: Path) -> None:
    row = Row(("who", CONTEXT))
    with pytest.raises(UsageError, match="--max-seq-length 6 is too short: this task needs 7 tokens or more"):
        SQUAD.encode([row], tiny_tokenizer(), 6)
    SQUAD.encode([row], tiny_tokenizer(), 7)
    slow = SlowTokenizer(str(vocabulary(tmp_path)))
    with pytest.raises(UnsupportedModelError, match="SlowTokenizer has no fast version"):
        SQUAD.encode([row], slow, 64)


def vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\n")
    return path


class SlowTokenizer(BertTokenizer):
    """As a tokenizer written in Python says of itself."""

    is_fast = False


def test_the_best_span_of_all_windows_is_the_answer() -> None:
    context = " ".join(["the film was not good ."] * 12 + ["her best story ."] + ["one people ?"] * 7)
    answer = Answer(context.index("best story"), "best story")
    rows = [Row(("who did", CONTEXT), answers=(Answer(4, "plot"),)), Row(("what", context), answers=(answer,))]
    features = SQUAD.encode(rows, tiny_tokenizer(), 24)
    logits: List[Tensor] = []
    for feature in features:
        first, last = feature.span or (0, 0)
        # Louder at the question and at the padding behind: neither may be answered with.
        logits_S2 = torch.cat([logits_for(feature, first, last), torch.full((3, 2), 50.0)])
        logits_S2[1] = 50.0
        logits.append(logits_S2)
    predictions = SQUAD.predictions(logits, features, rows)
    assert [prediction["answer"] for prediction in predictions] == ["plot", "best story"]
    assert predictions[1]["start"] == answer.start
    assert predictions[1]["end"] == answer.start + len("best story")
    assert 0.9 < float(str(predictions[1]["score"])) <= 1.0
    assert "id" not in predictions[0]
    assert SQUAD.metrics(logits, features, rows) == {"exact_match": 100.0, "f1": 100.0}


def predicted(context: str, loud: Dict[int, List[float]], tokens: Optional[int] = None) -> str:
    """The answer when the context's tokens, counted from 0, have these start and end logits."""
    rows = [Row(("who", context), id="q")]
    (feature,) = SQUAD.encode(rows, tiny_tokenizer(), 128)
    logits_S2 = torch.zeros(feature.length, 2)
    for position, values in loud.items():
        logits_S2[feature.context_start + position] = torch.tensor(values)
    (prediction,) = SQUAD.predictions([logits_S2], [feature], rows)
    assert prediction["id"] == "q"
    return str(prediction["answer"])


def test_spans_do_not_run_backwards_nor_on_and_on() -> None:
    # The best start stands behind the best end; the best pair in order is one token.
    assert predicted("the film was good", {3: [9.0, 8.0], 1: [0.0, 9.5]}) == "good"
    words = " ".join(["film"] * 40)
    assert predicted(words, {0: [9.0, 0.0], 29: [0.0, 9.0]}) == " ".join(["film"] * 30)
    assert predicted(words, {0: [9.0, 0.0], 30: [0.0, 9.0]}) != " ".join(["film"] * 31)


def test_a_context_without_tokens_has_no_answer() -> None:
    assert predicted("\u200b", {}) == ""


def test_partly_right_answers_count_partly() -> None:
    rows = [Row(("who", CONTEXT), answers=(Answer(0, "the plot"), Answer(CONTEXT.index("one of"), "one of the best")))]
    (feature,) = SQUAD.encode(rows, tiny_tokenizer(), 128)
    begin = feature.context_start
    # "was one of the best": one word more than the second answer, whose article does not count.
    logits = [logits_for(feature, begin + 2, begin + 6)]
    scores = SQUAD.metrics(logits, [feature], rows)
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(100 * 2 * 3 / (4 + 3))}


def test_files_to_predict(tmp_path: Path) -> None:
    path = write(tmp_path, squad(question(answers=[])))
    assert make_task("squad").read_inputs(path)[0].texts == ("what was not like it", CONTEXT)
    (tmp_path / "a.csv").write_text("context,question\nhe ran,who\n")
    assert SQUAD.read_inputs(tmp_path / "a.csv")[0].texts == ("who", "he ran")
    with pytest.raises(DataError, match="must end in"):
        SQUAD.read_inputs(tmp_path / "a.txt")
