# Targets: `cpu` (the default) and `cuda`.
#
#   docker build --target cpu  -t quire:cpu  .
#   docker build --target cuda -t quire:cuda .
#   docker build --build-arg MODEL= ...        no model inside: mount one, or let `quire pull` fetch it
#
# builder      the project's wheel, native library inside; the only stage with a C++ compiler
# packages-*   a virtual environment each, from that one wheel
# model        the weights that are baked in
# runtime      user, environment, probe; cpu and cuda add the packages and the model
#
# What is replaced from outside is a build argument; a stage sees those that it names again. Versions
# are those of deploy/constraints.txt, and Debian's current ones. With these options no time of a build
# is in the image (BuildKit 0.13 and newer):
#
#   docker build --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) \
#     --output type=image,name=quire:cpu,rewrite-timestamp=true .
#
# With buildah, or podman: --timestamp SECONDS in place of --output, and --format docker, which keeps
# the health check.

ARG BASE_IMAGE=docker.io/library/python:3.12.14-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
ARG TORCH_VERSION=2.13.0
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG MODEL=smollm2-135m-instruct
# Seconds since 1970: the time of every file of the wheel. Byte code is then checked by hash.
ARG SOURCE_DATE_EPOCH=0

# --- builder ------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS builder
ARG SOURCE_DATE_EPOCH
# Versions are the base image's distribution's: pinning them here would pin that too.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE deploy/constraints.txt ./
COPY model ./model
COPY service ./service
# One library for all x86-64 machines: it looks at the processor when it is loaded.
# Without isolation, because pip's environments for builds know no constraints.
RUN python3 -m model.native.build \
 && python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --constraint constraints.txt setuptools \
 && SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH}" \
    /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# --- packages -----------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS packages
ARG SOURCE_DATE_EPOCH
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/quire
COPY --from=builder /wheels /wheels
COPY deploy/constraints.txt /wheels/

FROM packages AS packages-cpu
ARG TORCH_VERSION
ARG TORCH_CPU_INDEX
# PyPI's torch for Linux brings CUDA's libraries, gigabytes that a CPU machine has no use for. What
# is removed serves those who compile against torch or test it. Byte code comes last and in one go: pip's
# own differs between builds. What is for a newer Python does not compile.
RUN /opt/quire/bin/pip install --no-compile --index-url "${TORCH_CPU_INDEX}" "torch==${TORCH_VERSION}" \
 && /opt/quire/bin/pip install --no-compile --constraint /wheels/constraints.txt "$(echo /wheels/*.whl)[otel]" \
 && find /opt/quire/lib/python3*/site-packages/torch -maxdepth 1 \
      \( -name include -o -name test \) -exec rm -rf {} + \
 && find /opt/quire/lib/python3*/site-packages/torch/bin -type f \
      ! -name torch_shm_manager -delete \
 && { /opt/quire/bin/python3 -m compileall -qq -f /opt/quire/lib || true; }

FROM packages AS packages-cuda
ARG TORCH_VERSION
RUN /opt/quire/bin/pip install --no-compile --constraint /wheels/constraints.txt "torch==${TORCH_VERSION}" \
 && /opt/quire/bin/pip install --no-compile --constraint /wheels/constraints.txt "$(echo /wheels/*.whl)[otel]" \
 && find /opt/quire/lib/python3*/site-packages/torch -maxdepth 1 \
      \( -name include -o -name test \) -exec rm -rf {} + \
 && { /opt/quire/bin/python3 -m compileall -qq -f /opt/quire/lib || true; }

# --- model --------------------------------------------------------------------------------------
FROM packages-cpu AS model
ARG MODEL
RUN mkdir -p /var/lib/quire \
 && if [ -n "${MODEL}" ]; then \
      /opt/quire/bin/quire pull --model "${MODEL}" --cache-dir /var/lib/quire; \
    fi

# --- runtime ------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
ARG SOURCE_DATE_EPOCH
ARG MODEL
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Quire" \
      org.opencontainers.image.description="An LLM server whose answers survive anything" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 quire \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin quire
# The root may be read-only: the only things written are caches below HOME, and a model that is
# fetched, below QUIRE_CACHE_DIR.
ENV PATH=/opt/quire/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    QUIRE_MODEL=${MODEL} \
    QUIRE_CACHE_DIR=/var/lib/quire \
    QUIRE_HOST=0.0.0.0 \
    QUIRE_LOG_FORMAT=json
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
# Asks whether the process makes progress, not whether it is loaded: a full server is healthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health/live' % os.environ.get('QUIRE_ADMIN_PORT', '8001'), timeout=4)"]
ENTRYPOINT ["quire"]
CMD ["serve"]

FROM runtime AS cuda
# Triton makes its link to the driver with the C compiler it finds when the first kernel is launched,
# so this target, unlike `cpu`, has one.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache \
 && install -d -o 10001 -g 10001 /var/lib/triton
# Compiled kernels: a volume, because the root may be read-only; a restarted container compiles none again.
ENV TRITON_CACHE_DIR=/var/lib/triton
VOLUME /var/lib/triton
# What the container runtime of NVIDIA asks for, to bring the driver's libraries in.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/quire /opt/quire
COPY --from=model --chown=10001:10001 /var/lib/quire /var/lib/quire
USER 10001:10001

# The last one is what is built where no target is named.
FROM runtime AS cpu
COPY --from=packages-cpu /opt/quire /opt/quire
COPY --from=model --chown=10001:10001 /var/lib/quire /var/lib/quire
USER 10001:10001
