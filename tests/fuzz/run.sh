#!/bin/bash
# Runs every fuzz target for FUZZ_SECONDS (60), all at once, from the seeds and what earlier runs have found: `make fuzz`.
# A crash ends it with the input's place; `cargo fuzz run --fuzz-dir tests/fuzz TARGET INPUT` runs that alone.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${FUZZ_SECONDS:-60}
fuzz=tests/fuzz
built=${CARGO_TARGET_DIR:-target}/fuzz
# The pinned compiler is a stable one: this lets it take the flags for coverage and sanitizer.
export RUSTC_BOOTSTRAP=1
cargo fuzz build --fuzz-dir $fuzz --target-dir "$built"

one() {
    local target=$1 log=$built/$1.log
    mkdir -p "$built/corpus/$target" "$built/artifacts/$target"
    if cargo fuzz run --fuzz-dir $fuzz --target-dir "$built" "$target" "$built/corpus/$target" "$fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=16384 -print_final_stats=1 \
        -artifact_prefix="$built/artifacts/$target/" >"$log" 2>&1; then
        awk -v target="$target" '/^stat::number_of_executed_units/ { printf "fuzz %-20s %9d inputs, nothing found\n", target, $2 }' "$log"
    else
        tail -n 40 "$log"
        echo "fuzz $target: FAILED, see $log" >&2
        return 1
    fi
}
export -f one
export fuzz built seconds

for source in "$fuzz"/fuzz_targets/*.rs; do
    basename "$source" .rs
done | xargs -P 0 -I {} bash -c 'set -euo pipefail; one {}'
