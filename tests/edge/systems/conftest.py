"""What several of the files here run on."""

from __future__ import annotations

import pytest
from support.tiny import make_tiny_model

from sft_edge.model_files.source import Source, open_source
from sft_edge.options.train import ModelOptions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    overrides = {"num_labels": 2, "problem_type": "single_label_classification"}
    return open_source(ModelOptions(model=str(model)), overrides)
