#!/usr/bin/env bash
# Trains a teacher and four students on handwritten digits and compares them. It takes a few minutes on two CPU cores.
#   bash scripts/demo.sh [SEED]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh" dev
"$root/.venv/bin/python" "$root/tools/demo.py" "$@"
