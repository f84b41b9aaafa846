"""Whether flags that change arithmetic change training: the loss terms with and without them, over several seeds.

    python -m benchmarks.gate IMAGENET --flags=--device-augment --flags='--teacher-dtype bfloat16'
    python -m benchmarks.gate IMAGENET --size 224 --batch-size 64 \
        --common='--device cuda --fused none --no-cuda-graph' \
        --flags='--fused talking-heads relations full erasing --cuda-graph'

Trains DeiT-Tiny from a CaiT of random weights, whose layer scales are set so that its blocks differ, 200 steps and more
with all terms, the recipe's learning rate and augmentation, no repeats and no warm-up. The same seed stands for the
same weights, order and random numbers. `spread` is how far the plain runs lie apart, largest minus smallest, mean over
the epochs; `distance` how far a run with the flags is from the plain one of its seed, at most, over seeds and epochs.
Within: no further than spread, so no gross change; the exit code is 1 otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import timm
import torch
from torchvision.datasets import ImageFolder

import benchmarks
import utils
from flags import POSITIVE_INT, parse_args

STEPS = 200
MAIN = Path(__file__).parent.parent / 'main.py'
RECIPE = """--data-set IMNET --model deit_tiny_patch16_224 --distillation-type soft --distillation-alpha 0.5
    --w-sample 0.1 --w-patch 4 --w-rand 0.2 --w-full 1 --s-id auto --t-id auto --drop-path 0 --warmup-epochs 0
    --no-model-ema --no-repeated-aug""".split()
Curves = dict[str, list[float]]


def teacher_weights(name: str, size: int, file: Path) -> None:
    """Random ones in which every block counts: timm begins with layer scales of 1e-5."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if 'gamma' in parameter_name:
                parameter.fill_(0.3)
    torch.save(model.state_dict(), file)


def curves(argv: list[str], folder: Path) -> Curves:
    """Trains; each term's mean over each epoch, by name."""
    done = subprocess.run(
        [sys.executable, MAIN, *argv, '--output_dir', folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.stderr.decode())
    rows = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    return {key: [row[key] for row in rows] for key in rows[0] if key.startswith('train_loss_')}


def train_all(settings: list[list[str]], args: argparse.Namespace, folder: Path) -> list[list[Curves]]:
    """A run for each setting and seed, some side by side; what fails or is interrupted ends the rest."""
    seeds, pool = range(args.seeds), ThreadPoolExecutor(args.jobs)
    try:
        jobs = [
            pool.submit(curves, [*argv, '--seed', str(seed)], folder / f'run{i}-{seed}')
            for i, argv in enumerate(settings)
            for seed in seeds
        ]
        for count, job in enumerate(as_completed(jobs), start=1):
            job.result()
            print(f'{count} of {len(jobs)} runs', flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    found = iter(jobs)
    return [[next(found).result() for _ in seeds] for _ in settings]


def report(flags: str, plain: list[Curves], changed: list[Curves]) -> bool:
    """A row for each term; whether all of them are within."""
    print(f'{flags}\n{"":12}{"first":>11}{"last":>11}{"spread":>11}{"distance":>11}')
    within = []
    for name in plain[0]:
        epochs = list(zip(*(run[name] for run in plain), strict=True))
        spread = statistics.mean(max(values) - min(values) for values in epochs)
        pairs = zip(plain, changed, strict=True)
        distance = max(abs(a - b) for p, c in pairs for a, b in zip(p[name], c[name], strict=True))
        within.append(distance <= spread)
        first, last = (statistics.mean(epochs[i]) for i in (0, -1))
        print(f'{name.removeprefix("train_loss_"):12}{first:11.5f}{last:11.5f}{spread:11.6f}{distance:11.6f}', end='')
        print('  within' if within[-1] else '  NOT within')
    return all(within)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder that holds ImageNet-like train/ and val/')
    parser.add_argument('--flags', type=str.split, action='append', required=True, help='those in question, in quotes')
    parser.add_argument('--common', type=str.split, default='--device cpu --num_workers 0', help='flags of all runs')
    parser.add_argument('--size', type=POSITIVE_INT, default=128, help='pixels')
    parser.add_argument('--batch-size', type=POSITIVE_INT, default=8, help='images')
    parser.add_argument('--teacher-model', default='cait_xxs24_224', help='a CaiT of timm')
    parser.add_argument('--seeds', type=POSITIVE_INT, default=3, help='how many')
    parser.add_argument('--jobs', type=POSITIVE_INT, default=1, help='runs side by side')
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f'--seeds {args.seeds}: two at least')
    try:
        images = len(ImageFolder(Path(args.data) / 'train'))
    except FileNotFoundError as error:
        parser.error(str(error))
    epochs = -(-STEPS // max(1, images // args.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / 'teacher.pth'
        teacher_weights(args.teacher_model, args.size, weights)
        common = [*RECIPE, '--data-path', args.data, '--input-size', str(args.size), '--epochs', str(epochs),
                  '--batch-size', str(args.batch_size), '--teacher-model', args.teacher_model, '--teacher-path',
                  str(weights), '--lr', str(0.0005 * 512 / args.batch_size), *args.common]  # fmt: skip
        try:
            for flags in args.flags:  # before the plain runs are made in vain
                device = parse_args([*common, *flags]).run.device
        except utils.UsageError as error:
            parser.error(str(error))
        plain, *changed = train_all([common, *([*common, *flags] for flags in args.flags)], args, Path(folder))
    print(f'{epochs} epochs of {images // args.batch_size} steps, {args.seeds} seeds')
    within = [report(' '.join(flags), plain, found) for flags, found in zip(args.flags, changed, strict=True)]
    print(benchmarks.machine(torch.device(device if torch.cuda.is_available() else 'cpu')))
    return 0 if all(within) else 1


if __name__ == '__main__':
    sys.exit(run())
