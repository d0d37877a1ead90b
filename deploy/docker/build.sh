#!/usr/bin/env bash
# `make image`: builds the image with docker, podman or buildah, whichever works here. Where none
# does, says so and lints the Dockerfiles instead, if hadolint is there.
#   deploy/docker/build.sh [cpu|cuda]
# IMAGE                       name and tag, default slipstream:VERSION-KIND
# SLIPSTREAM_TORCH_INDEX_URL  index with the CPU build of torch
set -euo pipefail
cd "$(dirname "$0")/../.."

kind=${1:-cpu}
case $kind in cpu | cuda) ;; *) echo "unknown kind '$kind': cpu or cuda" >&2; exit 2 ;; esac
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n 1)
image=${IMAGE:-slipstream:$version-$kind}
file=deploy/docker/$kind.Dockerfile
arguments=()
if [ "$kind" = cpu ] && [ -n "${SLIPSTREAM_TORCH_INDEX_URL:-}" ]; then
  arguments+=(--build-arg "TORCH_INDEX_URL=$SLIPSTREAM_TORCH_INDEX_URL")
fi

# A client without its daemon is no builder.
works() { command -v "$1" >/dev/null && "$1" "${@:2}" >/dev/null 2>&1; }

if works docker info; then
  export DOCKER_BUILDKIT=1
  exec docker build -f "$file" -t "$image" "${arguments[@]}" .
elif works podman info; then
  # Podman's own format has no health checks.
  exec podman build --format docker -f "$file" -t "$image" "${arguments[@]}" .
elif works buildah info; then
  exec buildah build --format docker -f "$file" -t "$image" "${arguments[@]}" .
fi

echo "no image was built: none of docker, podman and buildah works here" >&2
hadolint=$(command -v hadolint || echo .venv/bin/hadolint) # of the development environment
if [ ! -x "$hadolint" ]; then
  echo "and hadolint is not there to check the Dockerfiles" >&2
  exit 1
fi
"$hadolint" --config deploy/docker/hadolint.yaml deploy/docker/*.Dockerfile
echo "hadolint finds nothing wrong with deploy/docker/*.Dockerfile" >&2
