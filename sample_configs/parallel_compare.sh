#!/usr/bin/env bash
# A comparison through GNU parallel, two runs at a time (`--jobs 2` does the same on one machine).
set -euo pipefail
out=${1:-comparisons/digits}
hesstrace compare --config sample_configs/compare_digits.yaml --out "$out" --plan |
    parallel --jobs 2 --joblog "$out.log"
hesstrace compare --config sample_configs/compare_digits.yaml --out "$out"
