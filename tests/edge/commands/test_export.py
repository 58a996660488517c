"""`sft-edge export`: the directory that it makes, and that it makes none."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.jobs import error_line, flags, read_json
from support.saved import save_tiny
from support.tiny import make_tiny_model, tiny_tokenizer

from sft.models import Cut
from sft_edge.cli import main
from sft_edge.commands.export import export as export_module
from sft_edge.commands.export.card import export_card
from sft_edge.commands.export.check import Answer
from sft_edge.commands.export.content import DENSE, FACTORED, Export
from sft_edge.model_files.saved import load_model

CUT = Cut("sft", 2, 4)
W = "bert.encoder.layer.1.output.dense"

Run = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives exit code, standard output and the line of the error."""

    def run(**options: object) -> Tuple[int, str, str]:
        capsys.readouterr()
        code = main(["export", *flags(**{"model": tmp_path / "model", "to": tmp_path / "to", **options})])
        told = capsys.readouterr()
        return code, told.out, error_line(told.err) if code else ""

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Exports without the check, which has a file of its own."""

    def run(form: str = DENSE, **values: Any) -> Path:
        saved = load_model(save_tiny(tmp_path / "model", **values))
        to = tmp_path / f"export-{form}"
        to.mkdir()
        Export(saved, form).write(to)
        return to

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exports can be opened in this process, and leave nothing in the user's cache."""
    for module in (transformers.dynamic_module_utils, transformers.utils, transformers.utils.hub):
        if hasattr(module, "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = list(sys.path)
    yield
    sys.path[:] = path


# The command.


def test_the_command(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    code, told, _ = export(to=tmp_path / "deep" / "to")
    assert code == 0
    assert "BertForSequenceClassification, dense, " in told
    assert "largest difference of 32 logits from the trained model's" in told
    assert f"AutoModelForSequenceClassification.from_pretrained('{tmp_path}/deep/to', trust_remote_code=True)" in told
    to = tmp_path / "deep" / "to"
    names = {"README.md", "config.json", "model.safetensors", "modeling_sft.py", "tokenizer.json"}
    assert names <= set(os.listdir(str(to)))
    assert not [name for name in os.listdir(str(to)) if name.startswith(".")]
    assert str(tmp_path) not in "".join(path.read_text() for path in to.iterdir() if path.suffix != ".safetensors")
    assert "trust_remote_code=True" in (to / "README.md").read_text()


def test_the_report_as_json(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    (tmp_path / "to").mkdir()
    code, told, _ = export(factored=True, json=True)
    report = json.loads(told)
    assert code == 0
    assert report == {
        "directory": str(tmp_path / "to"),
        "architecture": "BertForSequenceClassification",
        "opened_with": "AutoModelForSequenceClassification",
        "form": "factored",
        "trust_remote_code": True,
        "weight_bytes": (tmp_path / "to" / "model.safetensors").stat().st_size,
        "logits_compared": 32,
        "max_logit_difference": pytest.approx(0, abs=1e-5),
        "tolerance": 1e-5,
    }


# What is in the directory.


@pytest.mark.parametrize("residual", ["none", "low-rank", "full"])
def test_dense_is_the_product_and_factored_is_smaller(write: Callable[..., Path], residual: str) -> None:
    cut = Cut("sft", 2, 4, residual)
    factors = load_file(str(write(FACTORED, cut=cut) / "model.safetensors"))
    dense = load_file(str(write(DENSE, cut=cut) / "model.safetensors"))
    u, s, v = (factors[f"{W}.ffn{number}.weight"] for number in (1, 2, 3))
    place = W if residual == "full" else f"{W}.dense"
    assert dense[f"{place}.weight"].shape == (32, 64 + 32 if residual == "low-rank" else 64)
    torch.testing.assert_close(dense[f"{place}.weight"], v @ s @ u)
    assert dense[f"{place}.bias"].equal(factors[f"{W}.ffn3.bias"])
    assert sum(x.numel() for x in factors.values()) < sum(x.numel() for x in dense.values())


@pytest.mark.parametrize(
    ("cut", "form", "has_code"),
    [
        (None, DENSE, False),
        (Cut("sft", 2, 4, "full"), DENSE, False),
        (Cut("sft", 2, 4, "full"), FACTORED, True),
        (Cut("sft", 2, 4, "low-rank"), DENSE, True),
        (CUT, DENSE, True),
    ],
)
def test_code_travels_only_where_the_library_has_none(
    write: Callable[..., Path], cut: Optional[Cut], form: str, has_code: bool
) -> None:
    to = write(form, cut=cut)
    config = read_json(to / "config.json")
    assert (to / "modeling_sft.py").exists() == has_code
    assert ("auto_map" in config) == ("sft" in config) == has_code
    assert config["model_type"] == ("sft-bert" if has_code else "bert")
    if not has_code:
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(to), output_loading_info=True
        )
        assert type(model) is transformers.BertForSequenceClassification
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_matrices_of_gpt2_stay_as_it_holds_them(write: Callable[..., Path]) -> None:
    tensors = load_file(str(write(family="gpt2", cut=Cut("sft", 2, 4, "full")) / "model.safetensors"))
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (64, 32)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("form", [DENSE, FACTORED])
def test_the_code_names_all_that_it_uses(write: Callable[..., Path], family: str, form: str) -> None:
    text = (write(form, family=family, cut=CUT) / "modeling_sft.py").read_text()
    tree = ast.parse(text)
    imported: List[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(str(node.module))
    assert set(imported) == {"__future__", "typing", "torch", "transformers"}
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used - bound == set()
    assert "noqa" not in text
    assert "mypy" not in text


def test_labels_and_the_kind_of_problem(write: Callable[..., Path]) -> None:
    names = ["bad", "so-so", "good"]
    values = {"problem_type": "multi_label_classification", "label_names": names}
    config = read_json(write(cut=CUT, num_labels=3, description=values) / "config.json")
    assert config["id2label"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert config["label2id"] == {"bad": 0, "so-so": 1, "good": 2}
    assert config["problem_type"] == "multi_label_classification"


def test_the_tokenizer_does_what_the_task_did(write: Callable[..., Path]) -> None:
    """As much is cut off as in training, and no token types are made for a model that has none."""
    bert = tiny_tokenizer("bert")
    to = write(family="roberta", type_vocab_size=1, tokenizer=bert, description={"max_seq_length": 6})
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(to))
    encoding = tokenizer("a good film and the worst plot of them", "it", truncation=True)
    assert len(encoding["input_ids"]) == 6
    assert set(encoding) == {"input_ids", "attention_mask"}


def test_a_decoder_knows_its_padding(write: Callable[..., Path]) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = None, "[SEP]", "left"
    to = write(family="gpt2", tokenizer=tokenizer, pad_token_id=None)
    assert read_json(to / "config.json")["pad_token_id"] == tokenizer.eos_token_id
    opened = transformers.AutoTokenizer.from_pretrained(str(to))
    assert (opened.pad_token, opened.padding_side) == ("[SEP]", "right")


def test_half_precision_in_the_configuration_says_nothing(write: Callable[..., Path]) -> None:
    """Newer releases would open float32 weights in it."""
    to = write(torch_dtype="float16")
    assert transformers.AutoModelForSequenceClassification.from_pretrained(str(to)).dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "auto_class"),
    [
        ("sequence-classification", "AutoModelForSequenceClassification"),
        ("question-answering", "AutoModelForQuestionAnswering"),
    ],
)
@pytest.mark.parametrize("cut", [None, CUT])
def test_the_card(tmp_path: Path, head: str, auto_class: str, cut: Optional[Cut]) -> None:
    card = export_card(Export(load_model(save_tiny(tmp_path, head=head, cut=cut)), DENSE))
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: ")
    assert "base_model: tiny\n---\n\n# tiny, fine-tuned on sst2\n" in card
    assert ("trust_remote_code=True" in card) == ("modeling_sft.py" in card) == (cut is not None)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    imported = {alias.name for alias in ast.parse(code).body[0].names}  # type: ignore[attr-defined]
    assert auto_class in imported
    assert all(hasattr(transformers, name) for name in imported)


# What the library makes of it.


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("family", "form"), [("bert", DENSE), ("distilbert", FACTORED), ("gpt2", FACTORED)])
def test_a_pipeline_and_saving_again(write: Callable[..., Path], tmp_path: Path, family: str, form: str) -> None:
    trust = {"trust_remote_code": True}
    # Under names of their own: older releases know code by its directory's name, and this process stays.
    to, second = tmp_path / f"first-{family}", tmp_path / f"second-{family}"
    write(form, family=family, cut=CUT).rename(to)
    first = transformers.pipeline("text-classification", str(to), device="cpu", **trust)
    texts = ["a good film", "the worst plot of all in it"]
    told = first(texts, batch_size=2, truncation=True)
    assert {one["label"] for one in told} <= {"negative", "positive"}
    first.save_pretrained(str(second))
    assert (second / "modeling_sft.py").exists()
    again = transformers.pipeline("text-classification", str(second), device="cpu", **trust)
    assert again(texts, batch_size=2, truncation=True) == told


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", [DENSE, FACTORED])
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_the_base_model_alone(write: Callable[..., Path], tmp_path: Path, family: str, form: str) -> None:
    """Its layer is the trained one, and not a new one of random numbers; also after it was saved again."""
    trust = {"trust_remote_code": True}
    to, second = tmp_path / f"base-{family}-{form}", tmp_path / f"again-{family}-{form}"
    write(form, family=family, cut=CUT).rename(to)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), **trust).eval()
    base, report = transformers.AutoModel.from_pretrained(str(to), output_loading_info=True, **trust)
    assert not report["missing_keys"]
    base.save_pretrained(str(second))
    again = transformers.AutoModel.from_pretrained(str(second), **trust)
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inside, *alone = (model.eval()(input_ids=ids) for model in (whole.base_model, base, again))
    assert all(one.last_hidden_state.equal(inside.last_hidden_state) for one in alone)


@pytest.mark.usefixtures("here")
def test_a_pipeline_of_features(write: Callable[..., Path], tmp_path: Path) -> None:
    to = write(FACTORED, cut=CUT).rename(tmp_path / "features")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), trust_remote_code=True).eval()
    pipe = transformers.pipeline("feature-extraction", str(to), device="cpu", trust_remote_code=True)
    with torch.no_grad():
        inside = whole.base_model(**pipe.tokenizer("a good film", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe("a good film")), inside)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "opt", "llama"])
@pytest.mark.parametrize("residual", ["none", "low-rank"])
def test_it_can_be_trained_further(write: Callable[..., Path], family: str, residual: str) -> None:
    to = write(FACTORED, family=family, cut=Cut("sft", 2, 4, residual))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(to), trust_remote_code=True).train()
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".ffn2." in name]
    assert len(factors) == 1
    assert factors[0].grad is not None
    assert factors[0].grad.abs().max() > 0


# What is refused, and leaves nothing.


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"dense": True, "factored": True}, 2, "only one of --dense and --factored may be given"),
        ({"factored": True}, 2, "--factored: no layer of this model was decomposed; leave it out"),
        ({"to": "full"}, 2, "--to full is not empty; name another"),
        ({"to": "full/file"}, 2, "--to full/file is not a directory"),
        (
            {"to": "full/file/to"},
            7,
            "cannot write full/file/to: Not a directory; free some space or choose another --to",
        ),
        ({"model": "plain"}, 4, "plain: not a directory that sft-edge train wrote; it holds no sft.json"),
        ({"model": None}, 2, "--model must be given"),
    ],
    ids=str,
)
def test_what_makes_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run, options: dict, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    make_tiny_model(tmp_path / "plain", layers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert export(**{"to": "to", **options}) == (code, "", says)
    assert not (tmp_path / "to").exists()
    assert os.listdir(str(tmp_path / "full")) == ["file"]


@pytest.mark.parametrize(("difference", "there"), [(1e-3, True), (float("nan"), False)])
def test_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run, difference: float, there: bool
) -> None:
    save_tiny(tmp_path / "model", cut=CUT)
    if there:
        (tmp_path / "to").mkdir()

    def wrong(*arguments: Any, ask: Any = export_module.ask_here) -> Answer:
        answer: Answer = ask(*arguments)
        return answer._replace(logits=[x + difference for x in answer.logits])

    monkeypatch.setattr(export_module, "ask_here", wrong)
    code, told, said = export()
    assert (code, told) == (8, "")
    if there:
        assert said.startswith("nothing was exported: a logit differs from the trained model's by ")
        assert said.endswith("over 0.0001; --factored rounds nothing")
    else:
        assert said.startswith("nothing was exported: logits are not finite, so they cannot be compared; the weights ")
        assert "--factored" not in said
    assert (tmp_path / "to").exists() == there
    assert not there or os.listdir(str(tmp_path / "to")) == []


def test_a_base_model_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run) -> None:
    save_tiny(tmp_path / "model", cut=CUT)

    def wrong(*arguments: Any, ask: Any = export_module.ask_elsewhere) -> List[Answer]:
        return [answer._replace(base_difference=float("nan")) for answer in ask(*arguments)]

    monkeypatch.setattr(export_module, "ask_elsewhere", wrong)
    code, told, said = export()
    assert (code, told) == (8, "")
    assert said.startswith("nothing was exported: a hidden state of the base model, as AutoModel opens it, differs ")
    assert not (tmp_path / "to").exists()


def test_a_link_to_nothing(tmp_path: Path, export: Run) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "to").symlink_to(tmp_path / "nowhere")
    assert export() == (2, "", f"--to {tmp_path / 'to'} is not a directory")
    assert (tmp_path / "to").is_symlink()


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Run) -> None:
    save_tiny(tmp_path / "model")
    usage = shutil.disk_usage(str(tmp_path))._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, said = export()
    assert code == 7
    assert said.startswith(f"--to {tmp_path / 'to'}: the model needs ")
    assert said.endswith(" bytes, the disk has 1,000 free")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("most_bytes_in_a_file", [100_000, 3000, 300])
def test_a_disk_that_fills_up(tmp_path: Path, export: Run, most_bytes_in_a_file: int) -> None:
    save_tiny(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes_in_a_file, hard))
    try:
        code, _, said = export(to=tmp_path / "deep" / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 7
    assert said.startswith(f"cannot write {tmp_path}/deep/to")
    assert said.endswith("File too large; free some space or choose another --to")
    assert not (tmp_path / "deep").exists()


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    save_tiny(tmp_path / "model")
    monkeypatch.setattr(export_module, "ask_elsewhere", interrupt)
    assert main(["export", *flags(model=tmp_path / "model", to=tmp_path / "to")]) == 130
    assert not (tmp_path / "to").exists()
