#!/usr/bin/env bash
# Train at several strengths, then put the traces of all checkpoints into one JSON file.
set -euo pipefail
for strength in 0.001 0.003 0.01; do
    hesstrace train --reg "trace=$strength" --out "runs/sweep/$strength"
done
hesstrace estimate-trace runs/sweep/*/last.pt --json runs/sweep/traces.json
