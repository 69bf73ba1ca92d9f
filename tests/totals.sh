#!/bin/sh
# Adds up what test runners said in a log: `N passed, N failed`. Usage: tests/totals.sh LOG
set -eu
awk '/^test result: / { passed += $4; failed += $6 }
    $1 == "Tests" { for (i = 2; i < NF; i++) { if ($(i + 1) ~ /^passed/) passed += $i; if ($(i + 1) ~ /^failed/) failed += $i } }
    END { printf "%d passed, %d failed\n", passed, failed }' "$1"
