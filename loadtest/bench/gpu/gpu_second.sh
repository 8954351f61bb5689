#!/usr/bin/env bash
# The stages that need the service's packages, and transformers. At most 6 minutes.
#
#   loadtest/bench/gpu/gpu_second.sh [FOLDER] [WHEELS]
#
# WHEELS (default: .wheels) holds the packages of wheels.txt, if the machine has no registry. Where
# there is one, for CPython 3.12:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#     --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#     --constraint deploy/constraints.txt --requirement loadtest/bench/gpu/wheels.txt --dest .wheels
set -uo pipefail
cd "$(dirname "$0")/../../.."
folder=${1:-results} wheels=${2:-.wheels}
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/quire-triton}
if [ -f "$folder/triton_cache.tar.gz" ] && [ ! -d "$TRITON_CACHE_DIR" ]; then
  mkdir -p "$TRITON_CACHE_DIR" && tar -xzf "$folder/triton_cache.tar.gz" -C "$TRITON_CACHE_DIR"
fi
if [ -d "$wheels" ]; then
  packages=$(mktemp -d)
  python3 -m pip install --quiet --no-index --no-deps --target "$packages" "$wheels"/*.whl
  export PYTHONPATH=$packages
fi
timeout 350 python3 -m loadtest.bench.gpu --minutes "${MINUTES:-5.5}" \
  --only engine,http,transformers --out "$folder/gpu_second.json" 2>&1 | tee "$folder/gpu_second.txt"
