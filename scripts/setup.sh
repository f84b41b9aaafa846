#!/usr/bin/env bash
# Creates the virtual environment .venv and installs the packages that training needs.
#   bash scripts/setup.sh [dev]
#   dev: also install the packages that the tests and the demo need
# Then run `source .venv/bin/activate`. The variable PYTHON sets the interpreter, for example PYTHON=python3.12.
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
