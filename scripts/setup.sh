#!/usr/bin/env bash
# Makes the virtual environment .venv once and installs what training needs, or also what tests and demo need:
#   bash scripts/setup.sh [dev]
# Then `source .venv/bin/activate`. PYTHON chooses the interpreter.
if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then
    echo 'Do not source this script, run it: bash scripts/setup.sh; then: source .venv/bin/activate' >&2
    return 1
fi
set -euo pipefail
cd "$(dirname "$0")/.."
files=(requirements.txt)
[ "${1:-}" != dev ] || files+=(requirements-dev.txt)
for file in "${files[@]}"; do
    stamp=.venv/.installed-$file
    if [ ! -e "$stamp" ] || [ "$file" -nt "$stamp" ]; then
        echo "Installing $file into .venv (torch alone is several GB; a minute or more) …"
        [ -e .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
        touch "$stamp"
    fi
done
