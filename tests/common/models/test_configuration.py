"""What of a configuration is about the model."""

import json

from transformers import BertConfig

from sft.models.configuration import config_text, settings_of


def test_where_a_model_was_found_says_nothing_about_it() -> None:
    config, found = BertConfig(hidden_size=24), BertConfig(hidden_size=24, name_or_path="a/b")
    assert json.loads(config_text(found)) != json.loads(config_text(config))
    assert settings_of(json.loads(config_text(found))) == settings_of(json.loads(config_text(config)))
    assert settings_of({"transformers_version": "4.46.3", "_name_or_path": "x", "hidden_size": 24}) == {
        "hidden_size": 24
    }


def test_a_default_is_written_down() -> None:
    assert json.loads(config_text(BertConfig()))["hidden_size"] == 768
