#!/usr/bin/env bash
# Trains all rows of a plan with several seeds and compares them with soft KD alone. Run it again to continue.
#   bash scripts/experiment.sh PLAN [--data PATH] [--out FOLDER] [--jobs N] [--only ROW …] [--seeds N …] [--report]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh" dev
PYTHONPATH="$root" "$root/.venv/bin/python" -m tools.experiment "$@"
