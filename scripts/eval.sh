#!/usr/bin/env bash
# Evaluates a checkpoint of this program, of the 2022 release or of DeiT.
#   bash scripts/eval.sh IMAGENET_FOLDER CHECKPOINT [further flags, for example --eval-ema]
set -euo pipefail
main=$(dirname "$0")/../main.py usage='IMAGENET_FOLDER CHECKPOINT [further flags]'
data=${1:?$usage} checkpoint=${2:?$usage}

python "$main" \
    --eval \
    --model deit_tiny_patch16_224 \
    --resume "$checkpoint" \
    --data-path "$data" \
    --num_workers "$(nproc)" \
    "${@:3}"
