#!/usr/bin/env bash
# Makes .venv and installs what is needed, once; sourced by the other scripts. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.installed
if [ ! -e "$stamp" ] || [ requirements.txt -nt "$stamp" ] || [ requirements-dev.txt -nt "$stamp" ]; then
    echo "Setting up .venv (torch alone is several GB; a minute or more) …"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
