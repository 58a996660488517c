"""What GitHub reads: the workflow, the forms for issues, the template for changes.

Keys are those of https://docs.github.com/actions/reference/workflows-and-actions/workflow-syntax and
https://docs.github.com/communities/using-templates-to-encourage-useful-issues-and-pull-requests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    """As text throughout: YAML 1.1 would take the key `on` for a boolean."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert isinstance(content, dict)
    return content


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_what_github_requires(path: Path) -> None:
    workflow = load(path)
    assert {"name", "on", "jobs"} <= workflow.keys()
    assert workflow["on"].keys() <= {"push", "pull_request"}
    for job in workflow["jobs"].values():
        assert re.fullmatch(r"ubuntu-\d\d\.04", job["runs-on"]), "a runner that stays what it is"
        assert 0 < int(job["timeout-minutes"]) <= 120
    for step in steps_of(workflow):
        assert ("uses" in step) is not ("run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_little_and_runs_what_was_looked_at(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())
    for step in steps_of(workflow):
        action = step.get("uses", "")
        assert not action or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action
        if action.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"
        # What others name, such as a branch, would be run as a part of the script.
        assert "${{" not in step.get("run", "")


def test_the_gate_and_the_old_stack_are_run_in_jobs_of_their_own() -> None:
    jobs = load(GITHUB / "workflows" / "ci.yml")["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    *promtool, gate = runs["gate"]
    assert gate == ".ci/run"
    assert [re.findall(r"install .* (\S+)$", one) for one in promtool] == [["prometheus"]]
    assert runs["jetpack"] == ["make test-jetpack"]
    assert runs["release"] == ['python3 .ci/check_release.py --tag "$GITHUB_REF_NAME"']
    for command in [command for commands in runs.values() for command in commands]:
        for name in re.findall(r"\S*\.ci/\w+(?:\.py)?", command):
            assert (ROOT / name).is_file()
        for target in re.findall(r"^make (\S+)", command):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_there_is_a_form_for_a_bug_a_wish_and_an_architecture() -> None:
    assert [path.name for path in FORMS] == ["architecture.yml", "bug.yml", "wish.yml"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_has_what_github_requires(path: Path) -> None:
    form = load(path)
    assert form.keys() <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    assert form["name"]
    assert form["description"]
    asked = [element for element in form["body"] if element["type"] != "markdown"]
    assert asked, "a form that asks for nothing is refused"
    for element in form["body"]:
        assert element.keys() <= {"type", "id", "attributes", "validations"}
        assert element["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
        assert element["attributes"]["value" if element["type"] == "markdown" else "label"]
        if element["type"] in ("dropdown", "checkboxes"):
            assert element["attributes"]["options"]
        assert set(element.get("validations", {})) <= {"required"}
        assert element.get("validations", {}).get("required", "true") in ("true", "false")
    for key in ("id", "label"):
        values = [element[key] if key == "id" else element["attributes"][key] for element in asked]
        assert len(set(values)) == len(values), f"{key}s must differ"
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", element["id"]) for element in asked)


def test_the_form_for_a_bug_asks_for_what_tells_most() -> None:
    asked = {element.get("id"): element for element in load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    assert "`sft-edge env`" in asked["env"]["attributes"]["label"]
    assert asked["env"]["validations"]["required"] == "true"
    assert "`sft-edge doctor --json`" in asked["doctor"]["attributes"]["label"]
    assert "Report a vulnerability" in asked[None]["attributes"]["value"]
