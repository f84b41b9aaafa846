#!/usr/bin/env bash
# Interrupts and damages toy runs in each way that docs/fault-tolerance.md describes, and prints one table.
# It takes about 20 minutes on two cores.
#   bash scripts/crash_test.sh [--short] [--only R1 R5 …] [--seed N]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh" dev
CUDA_VISIBLE_DEVICES="" "$root/.venv/bin/python" "$root/tools/crash_test.py" "$@"
