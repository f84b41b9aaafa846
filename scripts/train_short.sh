#!/usr/bin/env bash
# Distils a student in few epochs with the settings of configs/short_training.yaml, which docs/results.md compares with
# soft KD alone. One process, on a GPU or the CPU.
#   bash scripts/train_short.sh DATA_FOLDER TEACHER_CHECKPOINT OUTPUT_FOLDER --model STUDENT [further flags]
# DATA_FOLDER has train/<class>/ and val/<class>/. Run it again after an interruption. `--distillation-beta 0` leaves the
# relation terms out.
set -euo pipefail
root=$(dirname "$0")/.. usage='DATA_FOLDER TEACHER_CHECKPOINT OUTPUT_FOLDER --model STUDENT [further flags]'
data=${1:?$usage} teacher=${2:?$usage} output=${3:?$usage}

python "$root/main.py" \
    --config "$root/configs/short_training.yaml" \
    --data-path "$data" \
    --teacher-path "$teacher" \
    --output_dir "$output" \
    --resume auto \
    "${@:4}"
