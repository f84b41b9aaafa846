#!/usr/bin/env bash
# Runs the tests on the CPU.
#   bash scripts/test.sh [pytest arguments]
#   -m crash   the short form of scripts/crash_test.sh (about a minute)
#   -m more    the tools, the commands on the pages and other longer tests (about a minute and a half)
#   -m slow    the slow tests
#   -n 0       one process instead of two
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh" dev
cd "$root"
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
