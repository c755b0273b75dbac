"""The wheel holds what a user needs, and importing the library costs only what it needs."""

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyro_nf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation the build uses the pinned hatchling of this environment and no network.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("pyro_nf/**/*.py")}
    assert packed == sources | {"pyro_nf/py.typed"}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"pyro_nf-{pyro_nf.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Version"] == pyro_nf.__version__
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra")) == {"fast", "plots", "dev", "docs"}
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()


def test_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(pyro_nf.__version__)}\b", changelog, re.MULTILINE)


def test_every_requirement_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in pins:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_import_leaves_the_heavy_libraries_alone() -> None:
    """They are imported by the functions that need them."""
    code = "import sys, pyro_nf; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    heavy = {"matplotlib", "arviz", "arviz_base", "pandas", "xarray", "sklearn", "numba"}
    assert not heavy & set(done.stdout.split())
