"""The wheel: what `pip wheel .` makes serves from the native library, where the project is not.

pip makes an environment for the build, for which it needs an index of packages. Dependencies of the
program are those of this environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from model.native.build import Build
from tests.conftest import ROOT
from tests.support.mapped import mapped_by_server
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.longer, pytest.mark.timeout(20 * PATIENCE)]

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "model", "service")
DATA = {
    "model/native/src/step.cpp",
    "model/py.typed",
    "service/queues/redis/scripts/append.lua",
    "service/web/index.html",
}


def called(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def _index(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("index")
    command = [*PIP, "download", "--no-deps", "--dest", str(folder), "setuptools>=77"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs an index of packages")


@pytest.mark.usefixtures("_index")
def test_a_wheel_serves(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    without_one = tmp_path / "path"
    without_one.mkdir()
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    for name in PARTS:
        if (ROOT / name).is_file():
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
        else:
            ignored = shutil.ignore_patterns("__pycache__", "lib")  # compiled here
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    called(*PIP, "wheel", "--no-deps", "--wheel-dir", wheels, source)
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    library = f"model/native/lib/{Build().file_name}"
    assert [name for name in names if name.endswith(".so")] == [library]
    assert set(names) >= DATA
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "model",
        "service",
    }

    environment = tmp_path / "environment"
    called(sys.executable, "-m", "venv", "--without-pip", environment)
    (packages,) = environment.glob("lib/python3*/site-packages")
    outside = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(outside) + "\n")
    python = environment / "bin" / "python"
    called(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)

    variables = {"PATH": str(without_one), "HOME": str(tmp_path / "home")}  # no compiler, no cache
    serve: list[str | Path] = [environment / "bin" / "quire", "serve"]
    mapped = mapped_by_server(serve, tiny_model, tmp_path, cwd=Path("/"), variables=variables)
    assert str(packages / library) in mapped
    assert str(ROOT) not in {line.partition("/model/")[0] for line in mapped.splitlines()}
