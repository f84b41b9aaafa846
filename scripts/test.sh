#!/usr/bin/env bash
# The test suite, on the CPU: bash scripts/test.sh [pytest arguments], e.g. -m slow for the longer proofs, or -n 0 for
# one process instead of two.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m pytest -n 2 --dist loadfile "$@"
