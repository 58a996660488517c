"""What lands in site-packages."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import sft

ROOT = Path(__file__).parents[2]
PACKAGES = {"sft": "common/sft", "sft_edge": "edge_client/sft_edge", "sft_cloud": "cloud_server/sft_cloud"}


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"split_fine_tuning-{sft.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        scripts = content.read(f"split_fine_tuning-{sft.__version__}.dist-info/entry_points.txt").decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    for package, source in PACKAGES.items():
        assert f"{package}/py.typed" in names
        modules = {path.relative_to(ROOT / source).as_posix() for path in (ROOT / source).rglob("*.py")}
        assert {f"{package}/{module}" for module in modules} <= names
    assert "sft-edge = sft_edge.cli:main" in scripts
    assert "sft-cloud = sft_cloud.cli:main" in scripts
