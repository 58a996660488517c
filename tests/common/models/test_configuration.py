"""What of a configuration is about the model, and what of it leaves."""

import json

import pytest
from transformers import CONFIG_MAPPING, BertConfig, ElectraConfig, GPT2Config, LlamaConfig

from sft.errors import UnsupportedModelError
from sft.models.configuration import config_text, settings_of, told_settings
from sft.models.families.catalogue import _FAMILIES


def test_where_a_model_was_found_says_nothing_about_it() -> None:
    found = BertConfig(hidden_size=24, name_or_path="a/b").to_dict()
    assert settings_of(found) == settings_of(BertConfig(hidden_size=24).to_dict())
    assert settings_of({"transformers_version": "4.46.3", "_name_or_path": "x", "hidden_size": 24}) == {
        "hidden_size": 24
    }


def test_a_default_is_written_down() -> None:
    assert json.loads(config_text(BertConfig()))["hidden_size"] == 768


@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING.keys() & _FAMILIES.keys()))  # old releases know fewer
def test_nothing_that_is_for_people_leaves_and_the_model_is_the_same(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](
        id2label={0: "secret-1", 1: "secret-2", 2: "secret-3"},
        name_or_path="/home/secret/model",
        architectures=["Secret"],
        finetuning_task="secret",
        task_specific_params={"secret": {"secret": 1}},
        annotator="Dr. Secret",
        secret=3,
        prefix="secret",
        tokenizer_class="Secret",
        custom_secret={"rope_type": "secret"},
        num_hidden_layers=3,
    )
    text = config_text(config)
    assert "secret" not in text.lower()
    again = CONFIG_MAPPING[model_type].from_dict(json.loads(text))
    assert (again.num_labels, again.num_hidden_layers) == (3, 3)
    assert config_text(again) == text
    assert told_settings(json.loads(text)) == json.loads(text)


def test_classes_that_were_told_by_name_are_compared_by_number() -> None:
    """As in checkpoints of before."""
    before = json.loads(BertConfig(id2label={0: "no", 1: "yes", 2: "both"}).to_json_string(use_diff=False))
    assert told_settings(before) == json.loads(config_text(BertConfig(num_labels=3)))
    assert told_settings(before) != json.loads(config_text(BertConfig(num_labels=2)))


def test_a_word_of_its_own_does_not_go_and_is_not_passed_over() -> None:
    with pytest.raises(UnsupportedModelError, match=r"configuration's hidden_act is 'Dr. X': only numbers, flags and"):
        config_text(BertConfig(hidden_act="Dr. X"))
    told_settings(GPT2Config(summary_type="Dr. X").to_dict())  # which no head here reads
    assert told_settings(ElectraConfig(summary_type="last").to_dict())["summary_type"] == "last"
    with pytest.raises(UnsupportedModelError, match=r"summary_type is 'Dr. X'"):
        config_text(ElectraConfig(summary_type="Dr. X"))
    rotary = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "Dr. X": 1}
    kept = told_settings({**LlamaConfig().to_dict(), "rope_parameters": rotary, "rope_scaling": rotary})
    assert "Dr. X" not in json.dumps(kept)
