"""What `sft-edge doctor` finds: one line each, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft.printable import printable

Verdict = Literal["ok", "warning", "failed", "skipped"]

_NAME_WIDTH = 10  # of the longest


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    """`failed` would stop a run; `warning` would not, or not yet; `skipped` could not be looked at"""

    name: str
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""


def ok(name: str, found: str) -> Finding:
    """As it should be."""
    return Finding("ok", name, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """A run would work, but somebody should look after it."""
    return Finding("warning", name, found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    """A run would stop here."""
    return Finding("failed", name, found, advice)


def skipped(name: str, found: str) -> Finding:
    """Nobody looked, and why."""
    return Finding("skipped", name, found)


def text_of(finding: Finding) -> str:
    """For people: a line, and the advice below."""
    text = f"{finding.verdict:<7}  {finding.name:<{_NAME_WIDTH}}  {printable(finding.found)}\n"
    if finding.advice:
        text += f"{'':7}  {'':{_NAME_WIDTH}}  -> {printable(finding.advice)}\n"
    return text
