#!/usr/bin/env bash
# Runs the tests on the CPU: bash scripts/test.sh [pytest arguments]
#   -m crash   the short form of scripts/crash_test.sh (about a minute)
#   -m slow    the longer proofs
#   -n 0       one process instead of two
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m pytest -n 2 --dist loadfile "$@"
