"""Builds the native library, or finds it in the package or in the cache.

A library's file name holds a hash of its sources and flags, so a stale one is never loaded. It is
compiled in a scratch folder and renamed, so an unfinished one is never seen; two processes may
build at once and make the same file. Each build removes the least recently used libraries; a
process that runs one keeps it, because a mapped file survives its removal.
`python -m model.native.build` builds into the package, as pip does (setup.py).
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from model.native import NativeUnavailable

_SOURCES = Path(__file__).parent / "src"
_BESIDE = Path(__file__).parent / "lib"
_COMPILERS = ("g++", "clang++", "c++")
_ZIG = ("-m", "ziglang", "c++", "-mcpu=baseline")  # by default it compiles for this processor only
_KEPT = 8  # libraries in a folder: one or two versions of the sources, with the builds of the tests
_ABANDONED = 3600.0  # seconds after which a scratch folder is left over from a broken build

# No -ffast-math, and no fused product and sum except for `fma` in the sources: the bits of a
# result must not depend on the compiler. Objects other than the variants run on any machine.
_FLAGS = (
    "-std=c++17", "-O3", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden",
    "-ffp-contract=off", "-fno-strict-aliasing",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_VARIANTS: dict[str, tuple[str, ...]] = {  # each a compilation of the sources of variants
    "portable": (),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What to compile: the plain library by default; tests add emulated tiles or sanitizers."""

    defines: tuple[str, ...] = ()
    extra_flags: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Names the library by everything it is made from."""
        digest = hashlib.sha256()
        for path in sorted(_SOURCES.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        digest.update(repr((self, _FLAGS, sorted(_VARIANTS.items()), platform.machine())).encode())
        return f"libquire-{digest.hexdigest()[:16]}.so"


def default_cache() -> Path:
    """The folder of libraries that were compiled at first use."""
    return Path.home() / ".cache" / "quire" / "native"


def find_or_build(build: Build | None = None, *, cache: Path | None = None) -> Path:
    """The library's path. Raises NativeUnavailable with the reason if it cannot be built."""
    build = build or Build()
    cache = cache or default_cache()
    name = build.file_name
    if (_BESIDE / name).is_file():
        return _BESIDE / name
    if (cache / name).is_file():
        with suppress(OSError):  # of another user
            (cache / name).touch()  # removal goes by this time
        return cache / name
    return compile_into(cache, build)


def compile_into(folder: Path, build: Build) -> Path:
    """Compiles the library into a folder. Raises NativeUnavailable."""
    if sys.platform != "linux":
        raise NativeUnavailable(f"the native step needs Linux, and this is {sys.platform}")
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailable(
            "no C++ compiler found; install g++ or clang++, or: pip install ziglang"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
            built = _compile(compiler, build, Path(scratch))
            made = built.replace(folder / build.file_name)
    except OSError as error:
        raise NativeUnavailable(f"cannot build in {folder}: {error.strerror}") from error
    remove_stale(folder, "libquire-*.so", kept=_KEPT)
    return made


def find_compiler() -> list[str] | None:
    """The command of a compiler in PATH, or of the package `ziglang` (clang with its libraries)."""
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is not None:
        return [found]
    return None if find_spec("ziglang") is None else [sys.executable, *_ZIG]


def remove_stale(folder: Path, pattern: str, *, kept: int) -> None:
    """Removes all files of a pattern but the most recently used, and abandoned scratch folders.

    Another process may do the same, so any of them may be gone already.
    """
    with suppress(OSError):
        files = sorted(folder.glob(pattern), key=_last_touched, reverse=True)
        for file in files[kept:]:
            file.unlink(missing_ok=True)
        for scratch in folder.glob("building-*"):
            if _last_touched(scratch) < time.time() - _ABANDONED:
                shutil.rmtree(scratch, ignore_errors=True)


def _last_touched(path: Path) -> float:
    return path.stat().st_mtime


def _compile(compiler: Sequence[str], build: Build, scratch: Path) -> Path:
    """Compiles the objects, as many at once as there are processors, and links them."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    of_variants = sorted(_SOURCES.glob("*variant.cpp"))
    sources = sorted(set(_SOURCES.glob("*.cpp")) - set(of_variants))
    units: list[tuple[str, Path, tuple[str, ...]]] = [(path.stem, path, ()) for path in sources]
    for name, flags in _VARIANTS.items():
        if is_x86 or name == "portable":
            defined = (f"-DQUIRE_VARIANT={name}", *flags)
            units += [(f"{name}_{path.stem}", path, defined) for path in of_variants]
    common = (*_FLAGS, *build.extra_flags, *(f"-D{name}" for name in build.defines))

    def compile_one(unit: tuple[str, Path, tuple[str, ...]]) -> Path:
        name, source, flags = unit
        target = scratch / f"{name}.o"
        _call([*compiler, *common, *flags, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, units))
    library = scratch / "libquire.so"
    _call([*compiler, *common, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (no shell)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        first = lines[0] if lines else f"exit status {done.returncode}"
        name = "ziglang" if "ziglang" in command else Path(command[0]).name
        raise NativeUnavailable(f"{name} failed: {first}")


def build_into_package() -> Path:
    """The library's path in the package, where it is compiled unless it is there. Raises
    NativeUnavailable.
    """
    made = _BESIDE / Build().file_name
    return made if made.is_file() else compile_into(_BESIDE, Build())


def main() -> None:
    """Builds into the package if necessary; prints the path, or exits with the reason."""
    try:
        sys.stdout.write(f"{build_into_package()}\n")
    except NativeUnavailable as reason:
        sys.exit(f"native library: {reason}")


if __name__ == "__main__":
    main()
