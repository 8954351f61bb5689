"""Building the native library, and what only other builds of it can show."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import ModelConfig
from model.native import NativeUnavailable
from model.native import build as building
from model.native.build import Build, compile_into, default_cache, find_or_build
from model.native.library import NativeLibrary
from model.runners import RunnerOptions
from model.runners.choose import choose_runner
from model.runners.native import NativeRunner
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights

ROOT = Path(__file__).parent.parent.parent
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}


def test_a_name_follows_from_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Build().file_name
    assert Build().file_name == plain
    assert Build(defines=("X",)).file_name != plain
    assert Build(extra_flags=("-O1",)).file_name != plain
    copy = tmp_path / "src"
    shutil.copytree(building._SOURCES, copy)
    monkeypatch.setattr(building, "_SOURCES", copy)
    assert Build().file_name == plain
    (copy / "step.cpp").write_text((copy / "step.cpp").read_text() + "\n")
    assert Build().file_name != plain


def test_without_a_compiler_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    monkeypatch.setattr(building, "_BESIDE", tmp_path)
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        find_or_build(cache=tmp_path / "cache")


def test_without_a_compiler_the_torch_runner_serves_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(building, "_BESIDE", tmp_path)
    choice = choose_runner("auto", tiny_model_config(head_dim=16), RunnerOptions(device="cpu"))
    assert choice.name == "torch"
    assert choice.fallback_reason.startswith("native: no C++ compiler")


def test_the_package_ziglang_is_the_compiler_if_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a processor that every machine has: by default it takes the one it runs on."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(building, "find_spec", {"ziglang": None}.get)
    assert building.find_compiler() is None
    monkeypatch.setattr(building, "find_spec", {"ziglang": object()}.get)
    command = [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline"]
    assert building.find_compiler() == command
    (tmp_path / "clang++").touch(0o755)
    assert building.find_compiler() == [str(tmp_path / "clang++")]


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.raises(NativeUnavailable, match="unrecognized"):
        compile_into(tmp_path, Build(extra_flags=("-fno-such-thing",)))
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_there_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(building, "_BESIDE", tmp_path)
    there = tmp_path / Build().file_name
    there.touch()
    assert find_or_build(cache=tmp_path / "none") == there
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        NativeLibrary(there)


@pytest.mark.slow
def test_what_was_not_asked_for_longest_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that only writes its output. A removed library that is mapped goes on."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setattr(building, "_BESIDE", tmp_path)
    cache = tmp_path / "cache"
    builds = [Build(defines=(f"N{number}",)) for number in range(building._KEPT + 3)]
    for number, build in enumerate(builds[:-1]):
        path = find_or_build(build, cache=cache)
        os.utime(path, (number, number))  # in 1970, one second after another
    for name in ("notes.txt", "building-broken-off", "building-now"):
        (cache / name).mkdir()
    os.utime(cache / "building-broken-off", (0, 0))
    left = {path.name for path in cache.glob("*.so")}
    assert left == {build.file_name for build in builds[2:-1]}
    with (cache / builds[3].file_name).open("rb+") as file:
        file.write(b"code")
        file.flush()
        os.utime(file.fileno(), (3, 3))
        mapped = mmap.mmap(file.fileno(), 0)
    find_or_build(builds[2], cache=cache)  # found, and so it stays longer than the next
    find_or_build(builds[-1], cache=cache)
    left = {path.name for path in cache.iterdir()}
    kept = [builds[2], *builds[4:]]
    assert left == {*(build.file_name for build in kept), "notes.txt", "building-now"}
    assert mapped[:] == b"code"
    mapped.close()


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from model.native.build import *;"
        f"print(compile_into(Path({str(tmp_path)!r}), Build(extra_flags=('-O0',))))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1
    assert [str(path) for path in tmp_path.iterdir()] == list(paths)
    assert NativeLibrary(Path(paths.pop())).variants[-1] == "portable"


@pytest.fixture(scope="module")
def emulating_library(native_library: NativeLibrary) -> NativeLibrary:
    """A library whose AMX variant emulates its tiles."""
    if "avx512" not in native_library.variants:
        pytest.skip("everything but the tiles of the AMX variant is AVX-512")
    library = NativeLibrary(find_or_build(Build(defines=("QUIRE_EMULATE_TILES",))))
    assert library.variants[0] == "amx"
    return library


@pytest.mark.longer
def test_the_amx_variant_gives_the_same_products(emulating_library: NativeLibrary) -> None:
    """Every number of rows up to three tiles: full, half and ragged ones."""
    rng = np.random.default_rng(0)
    for rows in range(1, 70):
        outputs, inputs = int(rng.integers(1, 100)), int(rng.integers(1, 200))
        weight = rng.standard_normal((outputs, inputs), np.float32)
        x = rng.standard_normal((rows, inputs), np.float32)
        twin = emulating_library.product(weight, x, variant="portable")
        assert np.array_equal(emulating_library.product(weight, x, variant="amx"), twin), rows


@pytest.mark.longer
@pytest.mark.parametrize("sizes", [
    {"head_dim": 32},
    {"head_dim": 64},  # whole tiles of keys: many queries attend by tiles
    {"head_dim": 128, "sliding_window": 100, "full_attention_layers": frozenset({1})},
], ids=["32", "64", "128"])  # fmt: skip
def test_the_amx_variant_gives_the_same_steps(
    sizes: dict[str, Any],
    emulating_library: NativeLibrary,
    native_config: Callable[..., ModelConfig],
) -> None:
    config = native_config(hidden_size=96, num_heads=6, **sizes)
    weights = tiny_weights(config)
    text = list(range(97)) * 3
    found = []
    for variant, threads, chunk in (
        ("portable", 1, 291),
        ("amx", 1, 291),
        ("amx", 3, 17),
        ("amx", 2, 2),
    ):
        options = RunnerOptions(num_blocks=32, num_threads=threads)
        runner = NativeRunner(
            config, weights, options=options, digest="0" * 64, variant=variant,
            library=emulating_library,
        )  # fmt: skip
        parts = []
        for start in range(0, len(text), chunk):
            part = text[: start + chunk]
            count = len(part) - start
            piece = Piece(
                tokens=part, blocks=range(19), count=count, scores=dict.fromkeys(range(count), 5)
            )
            parts.append(runner.run(make_batch([piece])).score_logprobs_Q)
        runner.close()
        found.append(np.concatenate(parts))
    assert all(np.array_equal(one, found[0]) for one in found)


WORKOUT = """
import sys
from pathlib import Path
from model.native.library import NativeLibrary
from model.runners import RunnerOptions
from model.runners.choose import choose_runner
from model.runners.native import NativeRunner
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights

library = NativeLibrary(Path(sys.argv[1]))
config = tiny_model_config(
    hidden_size=96, head_dim=64, intermediate_size=112, qkv_bias=True, qk_norm=True,
    sliding_window=270, full_attention_layers=frozenset({1}),
)
text = [*range(97)] * 4
for variant in library.variants:
    for kv_dtype in ("bfloat16", "int8"):
        options = RunnerOptions(
            num_blocks=30, num_threads=3, kv_dtype=kv_dtype, max_batch_tokens=400
        )
        runner = NativeRunner(
            config, tiny_weights(config), options=options, digest="0" * 64,
            variant=variant, library=library,
        )
        runner.warm_up()
        for end, count in ((300, 300), (301, 1), (307, 6), (384, 77)):
            long = Piece(
                tokens=text[:end], blocks=range(24), count=count, scores={0: 5},
                sampling={"temperature": 1.0},
            )
            short = Piece(tokens=text[:33], blocks=range(24, 27), count=min(count, 33))
            runner.run(make_batch([short, long]))
            runner.run(make_batch([long]))
        runner.close()
print("finished")
"""


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.timeout(600)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    """Every kernel in every variant, with tiles emulated, under the compiler's own checks."""
    runtime = f"lib{'asan' if sanitizer == 'address' else 'tsan'}.so"
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86")
    asked = subprocess.run(
        ["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    )
    preload = Path(asked.stdout.strip())
    if not preload.is_absolute():
        pytest.skip(f"needs {runtime}")
    flags = ("-O1", "-fno-omit-frame-pointer", *SANITIZERS[sanitizer])
    library = find_or_build(
        Build(defines=("QUIRE_EMULATE_TILES",), extra_flags=flags), cache=default_cache()
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": str(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "TSAN_OPTIONS": "exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WORKOUT, str(library)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    mine = [line for line in done.stderr.splitlines() if "quire" in line or "ERROR" in line]
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "finished"
    assert mine == []
