#!/usr/bin/env bash
# Tests and measures this program on one NVIDIA GPU, in 8 minutes. The last lines are a table.
#   bash benchmarks/gpu.sh [--minutes N] [--data FOLDER_OF_JPEGS] [--rows WORDS …]
# The table and the report of the tests are also written to the folder OUT (runs/gpu). Tests take half of the time at
# most. The variable PYTHON sets the interpreter; without it that of .venv is used, then python3. Nothing is installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT=${OUT:-$root/runs/gpu}
[[ $OUT = /* ]] || OUT=$PWD/$OUT
minutes=8 rest=()
while (($#)); do
    case $1 in
        --minutes) minutes=${2:?--minutes N} && shift ;;
        --data) rest+=(--data "$(cd "${2:?--data FOLDER}" && pwd)") && shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
cd "$root"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
"$PYTHON" - <<'END'
import sys

# Names to import, and to install if they differ.
names, missing = {'PIL': 'Pillow', 'yaml': 'PyYAML'}, {}
for name in 'torch torchvision timm numpy PIL safetensors tqdm yaml pytest'.split():
    try:
        __import__(name)
    except ImportError as error:
        what = (error.name or name).split('.')[0]
        missing[names.get(what, what)] = None
if missing:
    print(f'gpu.sh: error: {sys.executable} lacks {" ".join(missing)}; install them, or set PYTHON', file=sys.stderr)
    sys.exit(2)
END
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
SECONDS=0 status=0
# While the tests run, the compiler's cache is filled: the figures of this run do not count.
OUT=$OUT/warm-up "$PYTHON" -m benchmarks.gpu --minutes "$minutes" --rows step teacher criterion 'full term' erasing replay \
    ${rest[@]+"${rest[@]}"} >"$OUT/warm-up.txt" 2>&1 &
warm_up=$!
trap 'kill $warm_up 2>/dev/null || true' EXIT
timeout -s INT -k 20 $((minutes * 30)) "$PYTHON" -m pytest -vv -W default -p no:cacheprovider --tb=short \
    tests/test_cuda.py >"$OUT/tests.txt" 2>&1 || status=$?
kill $warm_up 2>/dev/null || true
wait $warm_up || true
grep -E '^(FAILED|ERROR) |^!!+ |^=+ .* in [0-9]' "$OUT/tests.txt" || tail -n 3 "$OUT/tests.txt"
echo "tests: exit code $status after $SECONDS s; all lines are in $OUT/tests.txt"
left=$((minutes * 60 - SECONDS))
"$PYTHON" -m benchmarks.gpu --minutes $((left / 60)).$((left % 60 * 10 / 60)) ${rest[@]+"${rest[@]}"}
exit $status
