#!/bin/bash
# Tests on a Docker engine: the image, then the edge with a container of it. `make e2e` builds both first.
# Usage: tests/e2e.sh [IMAGE]
set -euo pipefail
cd "$(dirname "$0")/.."

image=${1:-openclaw-runtime}
docker version >/dev/null || { echo 'tests/e2e.sh: no Docker engine answers; start one, or set DOCKER_HOST' >&2; exit 1; }
E2E_MOTO_SERVER=$(tests/install-s3.sh)
export E2E_MOTO_SERVER

status=0
tests/image.sh "$image" || status=$?

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The budget of memory is about what is released, which `make image` has built.
E2E_BIN_DIR=$PWD/dist cargo test --locked -p e2e --test soak 2>&1 | tee "$log" || status=$?
# Nothing is asked of the workspace's own binaries here: the image holds them.
E2E_IMAGE=$image cargo test --locked -p e2e --test edge 2>&1 | tee -a "$log" || status=$?
tests/totals.sh "$log"
exit "$status"
