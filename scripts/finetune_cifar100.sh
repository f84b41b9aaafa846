#!/usr/bin/env bash
# Fine-tunes a distilled DeiT-Tiny on CIFAR-100 at 224 pixels. The settings are those that DeiT's authors gave for
# CIFAR-10 (facebookresearch/deit, issue 45): SGD, global batch 768, no random erasing, no stochastic depth.
#   bash scripts/finetune_cifar100.sh CIFAR_FOLDER CHECKPOINT OUTPUT_FOLDER [further flags]
# CIFAR_FOLDER contains the folder cifar-100-python. The variable GPUS sets the number of GPUs (8).
set -euo pipefail
main=$(dirname "$0")/../main.py usage='CIFAR_FOLDER CHECKPOINT OUTPUT_FOLDER [further flags]'
data=${1:?$usage} checkpoint=${2:?$usage} output=${3:?$usage}

torchrun --standalone --nproc_per_node="${GPUS:-8}" "$main" \
    --output_dir "$output" \
    --data-set CIFAR \
    --data-path "$data" \
    --finetune "$checkpoint" \
    --model deit_tiny_patch16_224 \
    --batch-size 96 \
    --epochs 1000 \
    --opt sgd \
    --lr 0.01 \
    --weight-decay 1e-4 \
    --reprob 0 \
    --drop-path 0 \
    "${@:4}"
