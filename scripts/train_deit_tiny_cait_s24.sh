#!/usr/bin/env bash
# Trains with the recipe of the 2022 release: teacher CaiT-S24, student DeiT-Tiny, ImageNet-1k, 300 epochs, 64 images on
# each of 8 GPUs.
#   bash scripts/train_deit_tiny_cait_s24.sh IMAGENET_FOLDER TEACHER_FILE OUTPUT_FOLDER [further flags]
# The variable GPUS sets the number of GPUs (8).
set -euo pipefail
main=$(dirname "$0")/../main.py usage='IMAGENET_FOLDER TEACHER_FILE OUTPUT_FOLDER [further flags]'
data=${1:?$usage} teacher=${2:?$usage} output=${3:?$usage}

python -m torch.distributed.launch --nproc_per_node="${GPUS:-8}" "$main" \
    --distributed \
    --output_dir "$output" \
    --data-path "$data" \
    --teacher-path "$teacher" \
    --model deit_tiny_patch16_224 \
    --teacher-model cait_s24_224 \
    --distillation-type soft \
    --distillation-alpha 1 \
    --distillation-beta 1 \
    --w-sample 0.1 \
    --w-patch 4 \
    --w-rand 0.2 \
    --K 192 \
    --s-id 0 1 2 3 8 9 10 11 \
    --t-id 0 1 2 3 20 21 22 23 \
    --drop-path 0 \
    "${@:4}"
