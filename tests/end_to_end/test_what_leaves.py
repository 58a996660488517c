"""docs/what-leaves.md has every field that an edge sends, and none that it does not."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import hosting_script
from support.fused_head import with_fused_head
from support.jobs import JOBS, STEADY, flags, sst2
from support.own_models import Gpt, tokens
from support.recorded_spans import RecordedSpans
from support.script import batches, tiny_model, wrap
from support.sent import Sent
from support.servers import start_server
from support.tiny import make_tiny_model
from support.tls import make_token
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from sft.models.configuration import _UNDECLARED, config_text
from sft.models.families.catalogue import _FAMILIES
from sft_edge.cli import main

TABLE = Path(__file__).parents[2] / "docs" / "what-leaves.md"

OF_TLS = {"tls.server_name", "tls.client_certificate"}
"""Which no server of gRPC shows."""

try:
    import schedulefree
except ImportError:
    schedulefree = None

RARE = {"EdgeMessage.part", "Part.data", "Part.total_bytes", "OptimizerArgument.text"}
"""Messages here are small; and only Muon has a text among its settings, which takes no biases and no norms."""

if schedulefree is None:
    RARE |= {"EdgeMessage.averaged", "LoadState.group_arguments"}

OLDER = {"position_embedding_type", "rope_theta", "rope_scaling", "pruned_heads"}
"""Settings of releases of transformers that are older than the one here."""

KEPT = {"freeze_edge": True, "activations": "keep-on-cloud", "max_train_samples": 2}

NOT_OURS = {"grpc-accept-encoding", "accept-encoding"}


def listed() -> tuple[set[str], set[str]]:
    """Fields, and keys of configurations."""
    fields: set[str] = set()
    settings: set[str] = set()
    for line in TABLE.read_text(encoding="utf-8").split("## The table")[1].split("\n## ")[0].splitlines():
        cells = line.split(" | ")
        if len(cells) != 3 or not line.startswith("| `"):
            continue
        name = re.findall(r"`([^`]+)`", cells[0])[0]
        if name == "config_json.*":
            settings |= set(re.findall(r"`([^`]+)`", cells[2]))
        elif name.startswith("config_json."):
            settings.add(name.partition(".")[2])
        else:
            fields.add(name)
    return fields, settings


def test_every_setting_of_every_family_is_in_the_table() -> None:
    sent = {key for kind in _FAMILIES for key in json.loads(config_text(CONFIG_MAPPING[kind]()))}
    # What is no setting of the class is sent where a configuration has it.
    sent |= json.loads(
        config_text(CONFIG_MAPPING["deberta-v2"](**dict.fromkeys({*_UNDECLARED} - {"layer_types"}, 1)))
    ).keys()
    assert sent | OLDER == listed()[1]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_every_field_that_an_edge_sends_is_in_the_table_and_no_other(
    sent: Sent, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(tmp_path / "state", 8)
    try:
        _commands(server.address, model, tmp_path)
        _traced(server.address, model, tmp_path, monkeypatch)
        _scripts(server.address)
    finally:
        server.stop(grace_seconds=0)
    _hosted()
    seen = sent.fields() | {f"metadata.{key}" for key in sent.metadata.keys() - NOT_OURS}
    fields, settings = listed()
    assert sorted(seen - fields) == []
    assert sorted(fields - seen - OF_TLS - RARE) == []
    assert sorted(sent.settings() - settings) == []
    assert all("/" not in name and "." not in name for message in sent.parsed() for name in _names(message))


def _names(message: Any) -> list[str]:
    return [message.model_name] if hasattr(message, "model_name") else []


def _commands(address: str, model: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(make_token(tmp_path / "tokens", "anna"))
    token.chmod(0o600)
    common = {"model": model, "server": address, "max_steps": 2}
    for name, make in JOBS.items():
        job = make(tmp_path / name)
        for labels in ("cloud", "local"):
            out = tmp_path / f"{name}-{labels}"
            assert main(["train", *job.flags(**common, labels=labels, output_dir=out, token_file=token)]) == 0
    job = sst2(tmp_path / "more")
    out = tmp_path / "resumed"
    saving = {**STEADY, **common, "output_dir": out, "save_steps": 2, "resume_from_checkpoint": True, "max_steps": 4}
    assert main(["train", *job.flags(**saving)]) == 0
    shutil.rmtree(out / "checkpoint-4")
    assert main(["train", *job.flags(**saving)]) == 0
    others = {
        "sl": {"mode": "sl"},
        "frozen": {"freeze_edge": True, "mode": "sl", "codec": "fitted"},
        "lora": {"lora_r": 2},
        "kept": KEPT,
        "sgd": {"optim": "SGD"},
    }
    for name, options in {**others, "named": {"model_name": "tiny"}}.items():
        assert main(["train", *job.flags(**common, **options, output_dir=tmp_path / name)]) == 0
    leaves = {**common, **KEPT, "per_device_train_batch_size": 2, "detach": True, "output_dir": tmp_path / "left"}
    assert main(["train", *job.flags(**leaves)]) == 0
    assert main(["attach", str(tmp_path / "left")]) == 0
    look = ["--server", address, "--model", str(model), "--split-layer", "2", "--idle", "10ms"]
    assert main(["doctor", *look]) == 0


def _traced(address: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = RecordedSpans()
    with monkeypatch.context() as patch:
        for module in ("sft_edge.link.tracing", "sft_edge.link.link", "sft_edge.link.grpc_transport"):
            patch.setattr(f"{module}.edge_tracer", lambda: spans.tracer)
        options = {"model": model, "server": address, "max_steps": 1, "output_dir": tmp_path / "traced"}
        assert main(["train", *sst2(tmp_path / "traces").flags(**options)]) == 0


def _scripts(address: str) -> None:
    for head in ("sequence-classification", "question-answering"):
        _script(tiny_model(head=head), address)
    for family, head in (("gpt2", "causal-lm"), ("electra", "multiple-choice"), ("bert", "token-classification")):
        _script(tiny_model(family, head), address)
    _scored(with_fused_head(tiny_model("llama", "causal-lm")), address)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    _script(adapted, address)
    _other_optimizers(address)


def _other_optimizers(address: str) -> None:
    with_none = partial(torch.optim.Adafactor, eps=(None, 1e-2))
    for make in [with_none] + ([schedulefree.SGDScheduleFree] if schedulefree else []):
        model = tiny_model()
        with wrap(model, make(model.parameters(), lr=0.1), server=address) as optimizer:
            optimizer.train()
            model(**batches(1, model)[0]).loss.backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())


def _scored(model: Any, address: str) -> None:
    (batch,) = batches(1, model)
    with wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), server=address) as optimizer:
        model(**batch, fused_lm_head=True).loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(**batch, fused_lm_head=True)


def _script(model: Any, address: str) -> None:
    """Everything that a script may do."""
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with wrap(model, made, server=address, wire_dtype="bfloat16", codec="int8", gradient_codec="int4") as optimizer:
        first, second = batches(2, base)
        model(**first).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        model(**second).loss.backward()
        optimizer.step()
        model(**second).loss  # noqa: B018  # nobody goes backward
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = {name: x for name, x in second.items() if name in ("input_ids", "attention_mask")}
            next(iter(model(**inputs).values())).float().square().mean().backward()
            with torch.no_grad():
                model(**inputs)
                model(**second)
        for group in optimizer.param_groups:
            group["momentum"], group["nesterov"], group["dampening"] = 0.25, True, 0
        optimizer.step()
        state = optimizer.state_dict()
        optimizer.load_state_dict({**state, "cloud_draws": {**state["cloud_draws"], "step": 7}})
        model.load_state_dict(model.state_dict())
        model(**first).loss  # noqa: B018
        link = optimizer._role._cross.link
        next(link._transport.download(link._session_id, False, 8))


def _hosted() -> None:
    model = hosting_script.make_model()
    model[4].eval()
    with hosting_script.host() as cloud, hosting_script.wrap(model, cloud) as optimizer:
        hosting_script.train(model, optimizer, 1)
    at, data = {"split_at": "body.layers.1.feed.down"}, tokens(1)
    own = Gpt()
    with hosting_script.host(Gpt(), **at) as cloud, hosting_script.wrap(own, cloud, **at) as optimizer:
        own(data["ids"][0], data["targets"][0])[1].backward()
        optimizer.step()


@pytest.mark.slow
def test_distinctive_names_paths_and_labels_are_nowhere(
    sent: Sent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in what is sent, nor in what the cloud keeps and says; with a command and with a script."""
    caplog.set_level("DEBUG", "sft_cloud")
    secret = tmp_path / "qzpath"
    model = make_tiny_model(secret / "qzmodel", layers=2)
    config = json.loads((model / "config.json").read_text())
    config.update(id2label={"0": "qzbase", "1": "qzother"}, label2id={"qzbase": 0, "qzother": 1}, annotator="Dr. Qzann")
    config.update(task_specific_params={"qztask": {"a": "qzvalue"}}, _name_or_path="qz/qz", finetuning_task="qzfine")
    config.update(architectures=["Qzarch"], custom={"qzkey": 1})
    (model / "config.json").write_text(json.dumps(config))
    data = tmp_path / "qzdata"
    data.mkdir()
    for name in ("train", "dev"):
        rows = [{"text": "the film is a story", "label": f"qzclass{index % 3}"} for index in range(8)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = start_server(tmp_path / "cloud-state", 4)
    common = {"task": "text", "data_dir": data, "server": server.address, "device": "cpu", "labels": "local"}
    common |= {"split_layer": 1, "split_rank": 4, "max_steps": 2, "save_steps": 1}
    shape = {"from_config": model / "config.json", "tokenizer_name": model}
    try:
        for index, options in enumerate(({"model": model}, shape, {"model": model, "mode": "sl", "lora_r": 2})):
            out = tmp_path / f"qzout-{index}"
            run = flags(**common, output_dir=out, **options)
            assert main(["train", *run]) == 0
            assert "qzclass1" in (out / "config.json").read_text(), "where they belong"
        theirs = AutoModelForSequenceClassification.from_pretrained(model)
        theirs.config.update({"annotator": "Dr. Qzann"})
        with wrap(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), server=server.address, split_layer=1) as optim:
            batch = batches(1, tiny_model())[0]
            logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            nn.functional.cross_entropy(logits, batch["labels"] % 2).backward()
            optim.step()
    finally:
        server.stop(grace_seconds=0)
    kept = {path: path.read_bytes() for path in (tmp_path / "cloud-state").rglob("*") if path.is_file()}
    assert any(path.name == "session.pb" for path in kept)
    said = "\n".join(str(vars(record)) for record in caplog.records if record.name.startswith("sft_cloud")).encode()
    for where, content in {"sent": sent.all_bytes(), "said": said, **kept}.items():
        found = re.search(rb"(?i)qz(path|model|data|class|base|other|ann|task|value|fine|arch|key|out)", content)
        assert found is None, (where, found)
    assert not any(message.forward.HasField("labels") for message in sent.parsed() if hasattr(message, "forward"))
