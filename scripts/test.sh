#!/usr/bin/env bash
# The test suite, on the CPU: bash scripts/test.sh [pytest arguments], e.g. -m slow for the longer proofs.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m pytest "$@"
