"""What the paper says: Table I, its words on Fig. 2 and 3, and what eq. 5 to 12 are computed from."""

from __future__ import annotations

from typing import Dict, Mapping, Optional, Tuple

MODEL = "BERT-base, 12 blocks"

SEEDS = 3
"""Of Table I: "three independent experiments", of which it has the mean."""

ROWS: Mapping[str, str] = {
    "sst2": "67k",
    "qnli": "105k",
    "mnli": "364k",
    "qqp": "91.2k",
    "cola": "8.5k",
    "rte": "2.5k",
    "stsb": "7k",
    "mrpc": "3.7k",
    "squad": "88k",
}
"""Training rows by task, as Table I has them."""

LAYER = 11
"""The cut of Table I."""

RANKS = (8, 16, 32)

_TABLE_1: Mapping[Optional[int], Tuple[float, ...]] = {
    None: (92.54, 91.24, 84.56, 90.73, 55.3, 66.06, 88.38, 85.33, 88.25),
    8: (92.43, 90.98, 83.98, 90.93, 57.13, 64.25, 86.46, 84.81, 88.33),
    16: (92.31, 91.22, 84.33, 90.75, 57.35, 62.09, 86.78, 83.47, 88.75),
    32: (92.77, 91.04, 84.27, 90.99, 57.87, 62.81, 87.46, 84.23, 88.56),
}

TABLE_1: Mapping[Optional[int], Dict[str, float]] = {rank: dict(zip(ROWS, scores)) for rank, scores in _TABLE_1.items()}
"""Score by task, by rank; None is the baseline. What the score of a task is the paper does not say."""

WORDS: Mapping[str, Tuple[str, ...]] = {
    "table1": (
        "different ranks have little differences and a higher rank does not guarantee a higher accuracy",
        "SFT(l=11,R=8) achieves much lower accuracy than the baseline [on RTE]",
    ),
    "fig2": (
        "the weight matrix in the split layer can be decomposed as a rank-1 matrix without sacrificing the model "
        "accuracy",
        "decomposing at layers 2 or 3 (11 or 12) is much better than the baseline in SST-2 (QNLI)",
    ),
    "fig3": (
        "the model accuracy tends to decrease when the split layer is chosen at lower layers",
        "it can still preserve the model accuracy when splitting at higher layers",
    ),
}
"""Figures have no numbers in the paper's text."""

BATCH, SEQUENCE = 32, 66
WIDTH, FFN_WIDTH, RANK = 768, 3072, 8
PRINTED_ROWS = 3076
"""What the traffic is multiplied by in the paper: a misprint of the FFN's inner width, in the place of SEQUENCE."""

BLOCKS, EDGE_BLOCKS = 12, 10
CLOUD_MS = 124.0
"""Eq. 5: an iteration of the whole model on the cloud's GPU."""

SLOWER = 6
"""So many times as long takes the edge."""

MEGABITS_PER_SECOND = 1000.0
ELEMENT_BYTES = 4

PRINTED: Mapping[str, float] = {
    "t(V100, 1)": 10.3,
    "t(XAVIER, 1)": 60.3,
    "SL traffic": 288.0,
    "SFT traffic": 36.0,
    "SL t_comm": 2300.0,
    "SFT t_comm": 24.0,
    "t_naive": 744.0,
    "t_sl": 2923.6,
    "t_sft": 647.6,
    "saved": 14.0,
}
"""Milliseconds; of traffic megabytes; of what is saved per cent of t_naive."""
