"""What the examples train on: SST-2 in its official files, `train.tsv` and `dev.tsv`, or anything in their form."""

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional


def read_rows(path: Path, limit: Optional[int] = None) -> List[Dict[str, str]]:
    """Rows with the columns `sentence` and `label`."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]


def encode(rows: List[Dict[str, str]], tokenizer: Any, max_length: int = 128) -> List[Dict[str, Any]]:
    """What a collator with padding takes."""
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=max_length)
    return [
        {**{name: column[index] for name, column in encoded.items()}, "labels": int(row["label"])}
        for index, row in enumerate(rows)
    ]
