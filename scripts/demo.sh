#!/usr/bin/env bash
# Trains a teacher and four students on handwritten digits and compares them, in a few minutes on two CPU cores:
# bash scripts/demo.sh [seed]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python tools/demo.py "$@"
