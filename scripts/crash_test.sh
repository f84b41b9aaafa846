#!/usr/bin/env bash
# Breaks toy runs in every way the README promises they survive, and prints one table: about half an hour on two cores.
#   bash scripts/crash_test.sh [--short] [--only R1 R5 …] [--seed N]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
CUDA_VISIBLE_DEVICES="" python tools/crash_test.py "$@"
