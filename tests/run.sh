#!/bin/bash
# Runs every test and closes with the totals: `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."

gateway/install.sh >/dev/null
E2E_MOTO_SERVER=$(tests/install-s3.sh)
export E2E_MOTO_SERVER

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# `cargo test` builds no binary that only another package's tests want.
cargo build --locked --workspace --bins
status=0
cargo test --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?

awk '/^test result: / { passed += $4; failed += $6 } END { printf "%d passed, %d failed\n", passed, failed }' "$log"
exit "$status"
