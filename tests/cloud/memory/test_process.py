"""What there is for this process, in whatever control group it is."""

import platform

import pytest

from sft_cloud.memory import MemoryBudget, machine_bytes, process


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files as Linux has them; returns what there is for a process then."""
    monkeypatch.setattr(process, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(process, "_CGROUPS", tmp_path / "cgroup")

    def measured(groups, files):
        for name, text in {"proc/cgroup": groups, **{f"cgroup/{name}": text for name, text in files.items()}}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return machine_bytes()

    return measured


V1 = "9:name=systemd:/\n4:cpu,memory:/jobs/one\n3:cpuset:/elsewhere\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", {"memory.max": "1048576\n"}),
        ("0::/jobs/one\n", {"jobs/one/memory.max": "1048576\n", "jobs/memory.max": "max\n"}),
        ("0::/jobs/one\n", {"jobs/one/memory.max": "max\n", "jobs/memory.max": "1048576\n"}),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": "1048576\n", "memory/memory.limit_in_bytes": f"{1 << 62}\n"}),
        (V1, {"memory/jobs/memory.limit_in_bytes": "1048576\n"}),
        (V1, {"memory/memory.limit_in_bytes": "1048576\n"}),  # a container, which sees its own group at the root
        ("", {"memory.max": "1048576\n"}),
    ],
)
def test_the_limit_of_every_group_counts(system, groups, files):
    assert system(groups, files) == 1 << 20


def test_without_a_limit_there_is_the_machine(system):
    there = system("0::/jobs\n", {"jobs/memory.max": "max\n", "elsewhere/memory.max": "1048576\n"})
    assert there > 1 << 28


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators cannot be told to")
def test_what_the_allocator_keeps_goes_back():
    before = process.process_bytes()
    budget = MemoryBudget(1 << 30, before, process.process_bytes)
    pieces = [bytes(8000) for _ in range(25_000)]
    del pieces[:-1]  # the last one keeps all below it in the heap
    assert process.process_bytes() > before + (150 << 20)
    budget.tidy()
    assert process.process_bytes() < before + (64 << 20)
