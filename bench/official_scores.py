"""What the official scripts print of stored predictions: makes the record that a test holds our metrics against.

    python -m venv official && official/bin/pip install evaluate datasets scikit-learn scipy
    git clone https://github.com/huggingface/evaluate
    official/bin/python bench/official_scores.py --evaluate evaluate --data-dir DATA

SQuAD's is `metrics/squad/compute_score.py` of that checkout, which is its evaluate-v1.1.py, run as the program it is;
`--squad-script` names another copy. GLUE's is `metrics/glue`, what transformers' run_glue asks; as that makes float32
of STS-B's numbers, scipy's two functions are asked for them as float64, too. Rows are made up here. Of DATA/SQuAD the
record has positions only: where answers begin and end, for the first questions of the validation file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "tests" / "edge" / "tasks" / "official_scores.json"
ROWS, QUESTIONS, QUESTIONS_OF_FILE = 100, 200, 1000

# Predictions, each with the answers that are accepted.
GROUPS: dict[str, list[tuple[str, list[str]]]] = {
    "articles": [
        ("The Long Bridge", ["Long Bridge"]),
        ("an apple a day", ["apple day", "the apple"]),
        ("theatre", ["the theatre"]),
        ("the", ["a"]),
        ("a the an", ["an"]),
        ("A-team", ["ateam", "team"]),
        ("THE end", ["The End."]),
        ("the_end", ["end"]),
        ("a.m.", ["am"]),
        ("another thing there", ["other thing there"]),
    ],
    "punctuation": [
        ("U.S.", ["US"]),
        ("$1,000", ["1000", "1000 dollars"]),
        ("it's", ["it s", "it is"]),
        ("(yes)!", ["yes"]),
        ("...", ["cat"]),
        ("\\", ["/"]),
        ("rock 'n' roll", ["rock & roll", "rock n roll"]),
        ("either/or", ["either or"]),
        ("3.5%", ["35", "3.5 percent"]),
        ("~x^2|{y}`", ["x2y"]),
    ],
    "unicode": [
        ("caf\u00e9", ["cafe"]),
        ("caf\u00e9", ["cafe\u0301"]),
        ("\u201cyes\u201d", ["yes"]),
        ("1939\u20131945", ["1939-1945"]),
        ("10\u00a0km", ["10 km"]),
        ("\u6771\u4eac\u3000\u90fd", ["\u6771\u4eac \u90fd"]),
        ("\u0130ZM\u0130R", ["izmir", "\u0130zmir"]),
        ("STRASSE", ["stra\u00dfe", "Strasse"]),
        ("\u039f\u0394\u039f\u03a3", ["\u03bf\u03b4\u03bf\u03c2"]),
        ("\uff34\uff28\uff25 end", ["end"]),
        ("zero\u200bwidth", ["zerowidth"]),
        ("the\u0301 end", ["end"]),
        ("line\x1cbreak\tand\nmore", ["line break and more"]),
        ("\U0001f600 smile", ["smile"]),
    ],
    "nothing": [
        ("", ["cat"]),
        (" ", ["cat", "dog"]),
        ("", ["the"]),
        ("", ["..."]),
        ("cat", ["the"]),
        ("cat", ["cat"]),
    ],
    "several answers": [
        ("red cat", ["dog", "the red cat", "cat"]),
        ("cat cat cat", ["cat", "cat cat"]),
        ("one two three", ["three two one"]),
        ("in 1066", ["1066", "the year 1066", "in the year 1066"]),
        ("big red cat of mine", ["red cat", "cat", "red cat"]),
    ],
    # F1 ends in another digit where it is computed in another order.
    "one word of five": [("cat", ["cat of many old colours"])],
}
WORDS = "the a an The of in River north Tower's 1,905 blue- (stone) caf\u00e9 it an-other U.N. \u2014 old new seven"

Case = dict[str, Any]


def main() -> int:
    """Writes the record anew; `git diff` says what changed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--evaluate", type=Path, required=True, help="checkout of huggingface/evaluate")
    parser.add_argument("--squad-script", type=Path, help="another copy of evaluate-v1.1.py (default: the checkout's)")
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    script = options.squad_script or options.evaluate / "metrics" / "squad" / "compute_score.py"
    record = {
        "made_with": made_with(options.evaluate, script),
        "squad": [
            {
                "name": name,
                "questions": pairs,
                "printed": printed_by(script, [answers for _, answers in pairs], [text for text, _ in pairs]),
            }
            for name, pairs in {**GROUPS, "drawn": drawn_questions(random.Random(0))}.items()
        ],
        "squad_file": of_file(options.data_dir / "SQuAD" / "dev-v1.1.json", script, random.Random(1)),
        "glue": [scored(case, options.evaluate) for case in glue_cases(random.Random(2))],
    }
    RECORD.write_text(json_of(record), encoding="ascii")
    print(f"{RECORD}: {RECORD.stat().st_size} bytes")
    return 0


def made_with(checkout: Path, script: Path) -> dict[str, str]:
    """What gave the official values."""
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    packages = ("datasets", "evaluate", "numpy", "scikit-learn", "scipy")
    return {
        "command": "python bench/official_scores.py --evaluate evaluate --data-dir DATA",
        "huggingface/evaluate": commit.stdout.strip(),
        "SQuAD's script": str(script.relative_to(checkout) if script.is_relative_to(checkout) else script.name),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def printed_by(script: Path, answers: list[list[str]], predictions: list[str]) -> str:
    """The line that SQuAD's script prints."""
    questions = [{"id": str(i), "answers": [{"text": text} for text in texts]} for i, texts in enumerate(answers)]
    dataset = {"version": "1.1", "data": [{"paragraphs": [{"qas": questions}]}]}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "dataset.json"), Path(folder, "predictions.json")]
        files[0].write_text(json.dumps(dataset))
        files[1].write_text(json.dumps({str(i): text for i, text in enumerate(predictions)}))
        ran = subprocess.run([sys.executable, script, *files], check=True, stdout=subprocess.PIPE, text=True)
    return ran.stdout.strip()


def drawn_questions(rng: random.Random) -> list[tuple[str, list[str]]]:
    """Answers of few words, and predictions that have some of these."""
    known, questions = WORDS.split(), []
    for _ in range(QUESTIONS):
        answers = [" ".join(rng.choices(known, k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
        words = [word for word in rng.choice(answers).split() if rng.random() < 0.8]
        words += rng.choices(known, k=rng.choice((0, 0, 1, 2, 5)))
        questions.append((" ".join(words), answers))
    return questions


def of_file(path: Path, script: Path, rng: random.Random) -> Case:
    """Spans at and about the first answers of real questions."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    questions = [(qa, one["context"]) for one in paragraphs for qa in one["qas"]][:QUESTIONS_OF_FILE]
    spans = [drawn_span(qa["answers"][0], len(context), rng) for qa, context in questions]
    predictions = [context[start:end] for (_, context), (start, end) in zip(questions, spans, strict=True)]
    answers = [[answer["text"] for answer in qa["answers"]] for qa, _ in questions]
    return {
        "crc32_of_ids": zlib.crc32(" ".join(qa["id"] for qa, _ in questions).encode()),
        "spans": spans,
        "printed": printed_by(script, answers, predictions),
    }


def drawn_span(answer: dict[str, Any], length: int, rng: random.Random) -> tuple[int, int]:
    """The answer itself, something about it, or a piece of the context from anywhere."""
    start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    how = rng.random()
    if how < 0.5:
        start, end = start - rng.choice((0, 0, 4, 9, 20)), end + rng.choice((-3, 0, 1, 8, 25))
    elif how < 0.65:
        start = rng.randrange(length)
        end = start + rng.randrange(40)
    start = max(start, 0)
    return start, min(max(end, start), length)


def glue_cases(rng: random.Random) -> list[Case]:
    """Logits and labels, by class id in GLUE's order; of STS-B a number each."""

    def case(task: str, name: str, logits: Callable[[], list[float]], label: Callable[[list[float]], Any]) -> None:
        rows = [logits() for _ in range(ROWS)]
        cases.append({"task": task, "name": name, "logits": rows, "labels": [label(row) for row in rows]})

    def classes(task: str, count: int) -> None:
        def mostly_right(row: list[float]) -> int:
            return row.index(max(row)) if rng.random() < 0.7 else rng.randrange(count)

        case(task, "usual", lambda: [n / 10 for n in rng.sample(range(-50, 50), count)], mostly_right)
        case(task, "ties", lambda: [float(rng.randint(-1, 1)) for _ in range(count)], mostly_right)

    cases: list[Case] = []
    for task in ("sst2", "cola", "mrpc", "rte", "qnli", "qqp"):
        classes(task, 2)
    classes("mnli", 3)
    for task in ("cola", "mrpc"):
        case(task, "one class predicted", lambda: [1.0, 0.5], lambda _: rng.randrange(2))
        case(task, "the other class predicted", lambda: [0.5, 1.0], lambda _: rng.randrange(2))
        case(task, "one class labelled", lambda: [round(rng.gauss(0, 2), 1), 0.05], lambda _: 0)
        case(task, "one class, both", lambda: [1.0, 0.5], lambda _: 0)
        case(task, "all wrong", lambda: [round(rng.gauss(0, 2), 1), 0.05], lambda row: int(row[0] > row[1]))

    def near(row: list[float]) -> float:
        return round(min(max(row[0] + rng.gauss(0, 1), 0.0), 5.0), rng.choice((1, 1, 3)))

    case("stsb", "usual", lambda: [round(rng.uniform(-0.5, 5.5) * 4096) / 4096], near)
    case("stsb", "ties", lambda: [rng.randint(0, 20) / 4], lambda row: round(2 * near(row)) / 2)
    case("stsb", "nearly constant", lambda: [3 + rng.randint(0, 3) / 4096], lambda row: near([4096 * (row[0] - 3)]))
    case("stsb", "opposite", lambda: [rng.randint(0, 20) / 4], lambda row: 5 - row[0])
    case("stsb", "constant predictions", lambda: [2.5], near)
    case("stsb", "constant labels", lambda: [rng.randint(0, 20) / 4], lambda _: 3.2)
    return cases


def scored(case: Case, checkout: Path) -> Case:
    """With every digit of the official scores, which are fractions of 1; in `float64` those of STS-B by scipy alone."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import evaluate
    import numpy as np
    from scipy import stats

    logits, labels = np.asarray(case["logits"], dtype=np.float32), case["labels"]
    number = case["task"] == "stsb"
    predictions = logits[:, 0] if number else logits.argmax(axis=1)
    metric = evaluate.load(str(checkout / "metrics" / "glue"), case["task"])
    scores = metric.compute(predictions=predictions, references=labels)
    found = {"official": {name: repr(float(value)) for name, value in scores.items()}}
    if number:
        functions = {"pearson": stats.pearsonr, "spearmanr": stats.spearmanr}
        exact = {name: function(predictions.astype(np.float64), labels)[0] for name, function in functions.items()}
        found["float64"] = {name: repr(float(value)) for name, value in exact.items()}
    return {**case, **found}


def json_of(record: dict[str, Any]) -> str:
    """A line an entry."""
    lines = []
    for name, value in record.items():
        several = [f"\n{json.dumps(one)}" for one in value] if isinstance(value, list) else []
        lines.append(f"{json.dumps(name)}: " + (f"[{','.join(several)}\n]" if several else json.dumps(value)))
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
