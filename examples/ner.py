"""Named entities: a class for each token, with transformers' `Trainer`, across edge and cloud.

    sft-cloud serve --port 50051
    python examples/ner.py --model_name_or_path MODEL --data_dir CONLL --server localhost:50051 --split_layer 11 \
        --output_dir out --num_train_epochs 3 --eval_strategy epoch

`train.txt` and `dev.txt` are in CoNLL's form: a word and, last in its line, its tag; an empty line ends a sentence.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Tuple

from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sft import SFTOptimizer

Sentence = List[Tuple[str, str]]


@dataclass
class Arguments:
    """What `TrainingArguments` has not."""

    model_name_or_path: str
    data_dir: Path
    server: str = field(metadata={"help": "HOST:PORT of a running `sft-cloud serve`"})
    split_layer: int
    split_rank: int = 8


def read_sentences(path: Path) -> List[Sentence]:
    """Words with their tags."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    sentences = [[line.split() for line in block.splitlines() if line.split()] for block in blocks]
    return [[(fields[0], fields[-1]) for fields in sentence] for sentence in sentences if sentence]


def encode(sentences: List[Sentence], tokenizer: Any, tags: List[str]) -> List[Dict[str, Any]]:
    """The first token of a word has its tag; the others are not learned."""
    rows = []
    for sentence in sentences:
        row = tokenizer([word for word, _ in sentence], is_split_into_words=True, truncation=True, max_length=128)
        words = row.word_ids()
        firsts = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        labels = [tags.index(sentence[word][1]) if first else -100 for word, first in zip(words, firsts)]
        rows.append({**row, "labels": labels})
    return rows


def accuracy(prediction: Any) -> Dict[str, float]:
    """Percent of the words whose tag is right."""
    learned = prediction.label_ids != -100
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": 100 * float(right[learned].mean())}


def main() -> None:
    """Trains, evaluates, prints."""
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    sentences = {name: read_sentences(arguments.data_dir / f"{name}.txt") for name in ("train", "dev")}
    tags = sorted({tag for sentence in sentences["train"] for _, tag in sentence})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, trust_remote_code=False)
    model = AutoModelForTokenClassification.from_pretrained(
        arguments.model_name_or_path, id2label=dict(enumerate(tags)), trust_remote_code=False
    )
    rows = {name: encode(some, tokenizer, tags) for name, some in sentences.items()}
    trainer = Trainer(
        model=model,
        args=training,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows["dev"],
        compute_metrics=accuracy,
    )
    trainer.create_optimizer()
    trainer.optimizer = optimizer = SFTOptimizer(
        trainer.optimizer,
        role="edge",
        model=model,
        server=arguments.server,
        split_layer=arguments.split_layer,
        split_rank=arguments.split_rank,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    print(f"accuracy on dev: {trainer.evaluate()['eval_accuracy']:.1f}")
    trainer.save_model()
    optimizer.close()


if __name__ == "__main__":
    main()
