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
status=0
cargo test --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?

# The Worker's, in workerd. Each reset of the object that they make is an exception to workerd, told with its native stack.
(cd worker && PATH="$gateway/bin:$PATH" CI=1 NO_COLOR=1 WRANGLER_SEND_METRICS=false node_modules/.bin/vitest run) 2>&1 |
    sed '/Application called abortAllDurableObjects/,/^stack:/d' | tee -a "$log" || status=$?

tests/totals.sh "$log"
exit "$status"
