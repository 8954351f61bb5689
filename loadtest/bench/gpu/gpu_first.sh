#!/usr/bin/env bash
# The first minutes on a GPU: everything that needs neither the service nor its packages. At most 8
# minutes. Each stage is a process with a time limit and a log; rows are written as they are found.
#
#   loadtest/bench/gpu/gpu_first.sh [FOLDER]     results, logs and Triton's cache; default: results
set -uo pipefail
cd "$(dirname "$0")/../../.."
folder=${1:-results}
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/quire-triton}
stages=precompile,ceilings,sanitize,tests,exact,steps,kernels,w1,long,cost,overlap
timeout 470 python3 -m loadtest.bench.gpu --minutes "${MINUTES:-7.5}" --only "$stages" \
  --out "$folder/gpu_first.json" 2>&1 | tee "$folder/gpu_first.txt"
status=$?
# With it, a second machine of the same kind compiles nothing.
timeout 10 tar -czf "$folder/triton_cache.tar.gz" -C "$TRITON_CACHE_DIR" . || true
exit "$status"
