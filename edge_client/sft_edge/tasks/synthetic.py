"""A small synthetic set of opinions, for the demo: text that a grammar makes, labelled 0 (negative) or 1 (positive).

Which words a sentence holds says little about its label. Most sentences hold praise and blame both, or a negation, or a
comparison, and the order decides. A few labels are wrong, as in real data. It stands in for real text where none may be
shipped, and says nothing about how well a model does on that.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Callable, List, NamedTuple, Sequence, Set, TypeVar

from sft.errors import StorageError
from sft.files.whole import whole_file

TRAIN_ROWS = 2000
VALIDATION_ROWS = 400
WRONG_LABELS = 0.03
"""Fraction of the labels that are turned round."""

T = TypeVar("T")


class Example(NamedTuple):
    """One row."""

    sentence: str
    label: int


def _words(text: str) -> List[str]:
    return text.split()


GOOD = _words(
    "good great excellent wonderful lovely superb brilliant delightful pleasant impressive charming fantastic "
    "enjoyable reliable beautiful splendid perfect outstanding"
)
BAD = _words(
    "bad awful terrible horrible dreadful poor boring disappointing annoying useless ugly broken unpleasant "
    "miserable dull mediocre shabby worthless"
)
PARTS = _words(
    "food service staff room bed view coffee breakfast menu music screen battery sound camera keyboard story "
    "acting ending plot cast dialogue pool lobby waiter desk"
)
THINGS = _words("hotel restaurant phone film book laptop cafe museum play camera bar game")
ADVERBS = ("", "", "really ", "very ", "quite ", "rather ", "truly ", "simply ")
OPENINGS = (
    "",
    "",
    "",
    "honestly , ",
    "to be fair , ",
    "for the record , ",
    "in short , ",
    "my sister says that ",
    "we all agreed that ",
    "after two days i can say that ",
)
NEGATIONS = ("not {}", "never {}", "not {} at all", "hardly {}", "far from {}", "anything but {}", "not exactly {}")
OTHERS = ("last one", "old one", "other one", "one next door", "one we had before")


class _Grammar:
    """Draws sentences. Only `random()` is drawn from, whose numbers every Python gives alike for one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # nosec B311 # it draws sentences

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random.random() * len(options))]

    def shuffle(self, items: List[Example]) -> None:
        for end in range(len(items) - 1, 0, -1):
            other = int(self._random.random() * (end + 1))
            items[end], items[other] = items[other], items[end]

    def sentence(self, label: int) -> str:
        """A sentence whose opinion is `label`."""
        shapes: List[Callable[[int], str]] = [
            self._plain,
            self._plain,
            self._clause,
            self._contrast,
            self._contrast,
            self._concession,
            self._comparison,
            self._expectation,
        ]
        return f"{self.pick(OPENINGS)}{self.pick(shapes)(label)} ."

    def _opinion(self, label: int, negated: float = 0.5) -> str:
        if self.chance(negated):
            return self.pick(NEGATIONS).format(self.pick(ADVERBS[:4]) + self.pick(BAD if label else GOOD))
        return self.pick(ADVERBS) + self.pick(GOOD if label else BAD)

    def _clause(self, label: int, negated: float = 0.5) -> str:
        return f"the {self.pick(PARTS)} was {self._opinion(label, negated)}"

    def _plain(self, label: int) -> str:
        """Twice the same opinion, without any trick: what a bag of words can learn."""
        return f"{self._clause(label, negated=0.0)} and {self._clause(label, negated=0.0)}"

    def _contrast(self, label: int) -> str:
        """What comes after the "but" counts."""
        link = self.pick((", but", "but", ", yet", ", however ,"))
        return f"{self._clause(1 - label)} {link} {self._clause(label)}"

    def _concession(self, label: int) -> str:
        """The clause behind the "although" does not count, wherever it stands."""
        link = self.pick(("although", "even though", "while"))
        if self.chance(0.5):
            return f"{link} {self._clause(1 - label)} , {self._clause(label)}"
        return f"{self._clause(label)} , {link} {self._clause(1 - label)}"

    def _comparison(self, label: int) -> str:
        """The opinion is about "this" one, which is the first or the second of the two."""
        thing, other = self.pick(THINGS), self.pick(OTHERS)
        first = self.chance(0.5)
        degree = self.pick(("", "much ", "far ", "a lot "))
        word = self.pick(("better", "nicer", "more fun") if first == bool(label) else ("worse", "duller", "less fun"))
        if first:
            return f"this {thing} is {degree}{word} than the {other}"
        return f"the {other} is {degree}{word} than this {thing}"

    def _expectation(self, label: int) -> str:
        """What it turned out to be counts."""
        start = self.pick(
            ("i expected the {} to be {}", "they told us the {} would be {}", "the {} looked {} at first")
        )
        opinion = self._opinion(1 - label, negated=0.0)
        turned_out = self.pick((", and it was", "and it turned out to be", ", then i found it"))
        return f"{start.format(self.pick(PARTS), opinion)} {turned_out} {self._opinion(label)}"


def examples(count: int, seed: int) -> List[Example]:
    """`count` rows with different sentences, half of each label up to the wrong ones, shuffled; the same for a seed."""
    grammar = _Grammar(seed)
    found: List[Example] = []
    seen: Set[str] = set()
    while len(found) < count:
        label = len(found) % 2
        sentence = grammar.sentence(label)
        if sentence not in seen:
            seen.add(sentence)
            found.append(Example(sentence, 1 - label if grammar.chance(WRONG_LABELS) else label))
    grammar.shuffle(found)
    return found


def write_synthetic(data_dir: Path, seed: int = 0) -> None:
    """Write `data_dir`/SST-2/train.tsv and dev.tsv in SST-2's layout, so that `--task sst2` reads them.

    The two share no sentence. Raises StorageError.
    """
    rows = examples(TRAIN_ROWS + VALIDATION_ROWS, seed)
    folder = data_dir / "SST-2"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in (("train.tsv", rows[:TRAIN_ROWS]), ("dev.tsv", rows[TRAIN_ROWS:])):
            text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in some)
            with whole_file(folder / name) as file:  # in the place of a link, not of what is behind it
                file.write(text.encode("ascii"))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
