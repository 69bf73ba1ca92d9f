#!/bin/bash
# Runs every test and closes with the totals: `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."

gateway=$(gateway/install.sh)
E2E_MOTO_SERVER=$(tests/install-s3.sh)
export E2E_MOTO_SERVER

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# `cargo test` builds no binary that only another package's tests want.
cargo build --locked --workspace --bins
cargo test --locked --workspace --no-run
tests/install-rclone.sh >/dev/null
status=0
# No test may depend on the variables of whoever runs it: all of these would lead the programs elsewhere.
RUNTIME_STORE=s3://elsewhere/x RUNTIME_ROOT=/none RUNTIME_LOG=none RUNTIME_SERVICE_TOKEN=none RUNTIME_GATEWAY_USER=nobody \
    AWS_ACCESS_KEY_ID=none AWS_ENDPOINT_URL=http://127.0.0.1:9 HTTP_PROXY=http://127.0.0.1:9 HTTPS_PROXY=http://127.0.0.1:9 \
    SSL_CERT_FILE=/none \
    cargo test --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?

# The Worker's, in workerd. Each reset of the object that they make is an exception to workerd, told with its native stack.
(cd worker && PATH="$gateway/bin:$PATH" CI=1 NO_COLOR=1 WRANGLER_SEND_METRICS=false node_modules/.bin/vitest run) 2>&1 |
    sed '/Application called abortAllDurableObjects/,/^stack:/d' | tee -a "$log" || status=$?

tests/totals.sh "$log"
exit "$status"
