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

awk '/^test result: / { passed += $4; failed += $6 }
    $1 == "Tests" { for (i = 2; i < NF; i++) { if ($(i + 1) ~ /^passed/) passed += $i; if ($(i + 1) ~ /^failed/) failed += $i } }
    END { printf "%d passed, %d failed\n", passed, failed }' "$log"
exit "$status"
