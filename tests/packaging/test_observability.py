"""Dashboard, alerts and documentation name the figures that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from sft.v1 import split_training_pb2 as pb
from sft_cloud.memory import MemoryBudget
from sft_cloud.observability.prometheus import PrometheusMetrics

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DOCS / "grafana" / "alerts.yml").read_text(encoding="utf-8"))
PAGE = (DOCS / "observability.md").read_text(encoding="utf-8")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in RULES]

ON_A_GPU = "sft_cloud_device_memory_bytes"
LABELS_OF_A_SCRAPE = {"instance", "job"}


@pytest.fixture(scope="module")
def labels():
    """The labels of every series, by its name, as a scrape shows them once everything has happened."""
    metrics = PrometheusMetrics(torch.device("cpu"))
    metrics.watch_sessions(lambda: [("anna", True)], 1)
    metrics.watch_connections(lambda: 1, lambda: 0)
    metrics.watch_memory(MemoryBudget(1))
    metrics.watch_certificate(lambda: 1.0)
    metrics.opened("anna", resumed=True)
    metrics.attached("anna", again=True)
    metrics.closed("anna")
    metrics.worked("anna", 1.0, 1.0)
    metrics.uploaded("anna", 1)
    metrics.downloaded("anna", 1)
    metrics.refused("anna", "Train", "ABORTED", "GapError")
    metrics.refused("anna", "OpenSession", "RESOURCE_EXHAUSTED", "ServerFullError")
    skipped, saved = pb.CloudMessage(step_skipped=pb.StepSkipped()), pb.CloudMessage()
    saved.checkpoint_saved.total_bytes = 1
    failed = pb.CloudMessage(checkpoint_saved=pb.CheckpointSaved(error="no space left"))
    for answer in (skipped, saved, failed):
        metrics.answered("anna", pb.EdgeMessage(), answer, (1, 1))
    metrics.answered("anna", pb.EdgeMessage(), saved, (1, 1), repeated=True)
    found = {ON_A_GPU: set(), "up": set()}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found[sample.name] = set(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def series_of(expression):
    return set(re.findall(r"\b(?:sft_cloud_\w+|process_\w+|up)\b", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_series_and_labels_that_there_are(expression, labels):
    series = series_of(expression)
    assert series
    assert series <= set(labels), series - set(labels)
    known = set.union(LABELS_OF_A_SCRAPE, *(labels[name] for name in series))
    used = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", expression))
    for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        used |= {name.strip() for name in grouped.split(",")}
    assert used <= known, used - known


def test_the_page_lists_them_all(labels):
    section = PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    listed = {f"sft_cloud_{name}" for name in re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)}
    there_are = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels if name.startswith("sft_cloud_")}
    assert listed == there_are


def test_every_alert_says_what_to_do():
    named = [rule["alert"] for rule in RULES]
    assert named == re.findall(r"^\| `(SftCloud\w+)` \|", PAGE, re.MULTILINE)
    for rule in RULES:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def promtool(*arguments):
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool, which comes with Prometheus, is not on PATH")
    done = subprocess.run([found, *arguments], cwd=DOCS / "grafana", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules():
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "alerts.yml")


def test_alerts_see_the_first_event():
    promtool("test", "rules", "alerts_test.yml")


def test_what_alerts_count_is_there_before_the_first_event():
    metrics = PrometheusMetrics(torch.device("cpu"))
    metrics.watch_sessions(list, 1)
    metrics.watch_certificate(lambda: 1.0)
    metrics.watch_tenants(lambda: ["anna"])
    there_are = {(sample.name, sample.value) for family in metrics.registry.collect() for sample in family.samples}
    for rule in RULES:
        for name in series_of(rule["expr"]):
            if name.startswith("sft_cloud_") and not name.endswith(("_bucket", "_limit", "_seconds")):
                assert (name, 0) in there_are, f"{rule['alert']} would not see the first"


def test_alerts_that_look_for_a_single_event_see_it_in_a_new_series():
    for rule in RULES:
        for counted in re.findall(r"increase\((\w+\S*)\[\d+m\]\)\) > 0", rule["expr"]):
            assert f"{counted} unless {counted} offset" in rule["expr"], rule["alert"]
