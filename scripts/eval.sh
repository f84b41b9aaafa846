#!/usr/bin/env bash
# Evaluates a checkpoint of this program or of the 2022 release, which say what their model and data set are.
#   bash scripts/eval.sh DATA_FOLDER CHECKPOINT [further flags, for example --eval-ema]
# Bare weights, such as DeiT's, need `--model deit_tiny_patch16_224` too.
set -euo pipefail
main=$(dirname "$0")/../main.py usage='DATA_FOLDER CHECKPOINT [further flags]'
data=${1:?$usage} checkpoint=${2:?$usage}

python "$main" \
    --eval \
    --resume "$checkpoint" \
    --data-path "$data" \
    "${@:3}"
