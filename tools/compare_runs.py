"""Toy runs of another commit and of this tree side by side: are log rows and final weights equal to the bit?

    python -m tools.compare_runs 815cb73              all runs, about four minutes on two cores
    python -m tools.compare_runs main --only soft tar  some of them

Each run is a process of its own on images and weights made on the spot, with two threads at most in all. What a commit
gives is kept in `runs/recorded/<commit>.json`, so a second comparison with it takes half the time. The exit status is 1
if a run differs.
"""

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / 'runs' / 'recorded'
STATES = ('model', 'model_ema', 'optimizer', 'scaler')

CAIT = {'patch_size': 8, 'embed_dim': 48, 'depth': 6, 'num_heads': 4}
SWIN = {'patch_size': 4, 'embed_dim': 24, 'depths': (2, 2), 'num_heads': (2, 2), 'window_size': 4}
CLASSES, SIZE, IMAGES = 4, 32, {'train': 48, 'val': 10}


def words(kwargs: dict) -> str:
    return ' '.join(f'{key}={value}'.replace(' ', '') for key, value in kwargs.items())


COMMON = f"""--input-size {SIZE} --device cpu --num_workers 0 --epochs 2 --batch-size 8 --lr 0.2 --warmup-epochs 0
    --model-ema-decay 0.9 --model deit_tiny_patch16_224 --print-freq 100
    --model-kwargs patch_size=8 embed_dim=32 depth=4 num_heads=2"""
FOLDER = '--data-set FOLDER --data-path {data}/images'
TAUGHT = f"""{FOLDER} --teacher-model cait_s24_224 --teacher-kwargs {words(CAIT)} --teacher-path {{data}}/cait.pth
    --s-id 0 1 -1 --t-id 0 1 -1 --K 20"""
SOFT = f'{TAUGHT} --distillation-type soft'
LONG = f'{SOFT} --drop-path 0.2 --save-interval-steps 2 --keep 20 --eval-ema'

# Name: ranks and flags. `{out}` is the folder of all runs of a commit.
RUNS: dict[str, tuple[int, str]] = {
    'soft': (1, f'{SOFT} --drop-path 0.2'),
    'hard': (1, f'{TAUGHT} --distillation-type hard --distillation-alpha 0.7'),
    'none': (1, f'{FOLDER} --mixup 0 --cutmix 0'),
    'two heads': (1, f'{SOFT} --model deit_tiny_distilled_patch16_224'),
    'ema': (1, f'{SOFT} --eval-ema --model-ema-decay 0.5'),
    'accumulation': (1, f'{SOFT} --batch-size 4 --accum-steps 3 --clip-grad 1'),
    'float16': (1, f'{SOFT} --amp-dtype float16'),
    'augmentation': (1, f'{SOFT} --reprob 0.9 --recount 2 --mixup 0.8 --cutmix 1 --aa rand-m9-mstd0.5-inc1'),
    'augmentation on the device': (1, f'{SOFT} --reprob 0.9 --device-augment'),
    'no augmentation': (1, f'{SOFT} --no-aug --mixup 0 --cutmix 0 --opt sgd --sched step'),
    'full term, two ranks': (2, f'{SOFT} --batch-size 4 --w-full 2'),
    'global relations, two ranks': (2, f'{SOFT} --batch-size 4 --w-full 2 --relations global'),
    'whole': (1, LONG),
    'resumed in mid-epoch': (1, f'{LONG} --resume {{out}}/whole/checkpoint-00000004.pth'),
    'tar': (1, SOFT.replace(FOLDER, '--data-set TAR --data-path {data}/tars')),
    'cifar10': (1, '--data-set CIFAR10 --data-path {data}'),
    'swin, pooled': (1, f'{SOFT} --teacher-model swin_tiny_patch4_window7_224 --teacher-kwargs {words(SWIN)} '
                        '--teacher-path {data}/swin.pth --s-id 0 1 --t-id 1 3 --token-align pool'),
}  # fmt: skip


def make_data(folder: Path) -> None:
    """Images as a tree, as tars and as CIFAR-10's files, and weights of the teachers; the same at every call."""
    random = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for number in range(count):
            name = folder / 'images' / split / f'c{number % CLASSES}' / f'{number}.png'
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(name)
        (folder / 'tars').mkdir(exist_ok=True)
        with tarfile.open(folder / 'tars' / f'{split}.tar', 'w') as tar:
            tar.add(folder / 'images' / split, '.')
    batches = folder / 'cifar-10-batches-py'
    batches.mkdir()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
        data = {'data': random.integers(256, size=(8, 3072), dtype=np.uint8), 'labels': random.integers(10, size=8)}
        (batches / name).write_bytes(pickle.dumps(data))
    (batches / 'batches.meta').write_bytes(pickle.dumps({'label_names': [str(i) for i in range(10)]}))
    torch.manual_seed(7)
    for name, model, kwargs in (('cait', 'cait_s24_224', CAIT), ('swin', 'swin_tiny_patch4_window7_224', SWIN)):
        teacher = timm.create_model(model, num_classes=CLASSES, img_size=SIZE, **kwargs)
        for key, parameter in teacher.named_parameters():
            if 'gamma' in key:  # CaiT begins with layer scales of 1e-5, at which all its blocks put out the same
                torch.nn.init.constant_(parameter, 0.5)
        torch.save(teacher.state_dict(), folder / f'{name}.pth')


def without_checks(folder: Path) -> list[str]:
    """torchvision compares CIFAR's files with the sums of the real ones; these are none."""
    (folder / 'run.py').write_text(
        'import sys\nsys.path.insert(0, sys.argv.pop(1))\nfrom torchvision.datasets import CIFAR10\n'
        'CIFAR10._check_integrity = lambda self: True\n'
        'import torchvision.datasets.cifar as cifar\ncifar.check_integrity = lambda *_: True\n'
        'import main\nmain.main()\n'
    )
    return [str(folder / 'run.py')]


def digest(value: object) -> str:
    """A checksum over the dtype, shape and bits of all tensors of a nested state, and its other values."""
    if isinstance(value, torch.Tensor):
        kind = f'{value.dtype} {tuple(value.shape)} '.encode()
        return hashlib.sha256(kind + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        value = sorted((str(key), digest(item)) for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = [digest(item) for item in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def run(name: str, tree: Path, data: Path, out: Path) -> dict:
    """Trains; the rows of the log, and a sum of each part of the last state."""
    ranks, flags = RUNS[name]
    folder = out / name.replace(' ', '_').replace(',', '')
    argv = f'{COMMON} {flags}'.format(data=data, out=out).split()
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    command = [sys.executable, *launcher, *without_checks(data), str(tree), *argv, '--output_dir', str(folder)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'XDG_CACHE_HOME': str(out)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f'{name} in {tree}: exit status {done.returncode}\n{done.stderr[-3000:]}')
    state = torch.load(folder / 'checkpoint.pth', weights_only=True)
    rows = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    return {'log': rows, **{key: digest(state[key]) for key in STATES if key in state}}


def record(tree: Path, names: list[str]) -> dict[str, dict]:
    """What each run gives with the program in a folder; the run that is resumed comes after the one it resumes."""
    with tempfile.TemporaryDirectory() as temporary:
        data, out = Path(temporary) / 'data', Path(temporary) / 'out'
        data.mkdir()
        make_data(data)
        found = {}
        for late in (False, True):
            batch = [name for name in names if name.startswith('resumed') == late]
            with ThreadPoolExecutor(2) as pool:
                jobs = {name: pool.submit(run, name, tree, data, out) for name in batch}
            found |= {name: job.result() for name, job in jobs.items()}
    return found


def record_commit(commit: str, names: list[str]) -> dict[str, dict]:
    """The same of a commit, from its file where it was run before."""
    sha = subprocess.run(['git', 'rev-parse', '--short=12', commit], cwd=ROOT, capture_output=True, text=True)
    if sha.returncode:
        sys.exit(f'{commit}: no commit of this repository')
    path = KEPT / f'{sha.stdout.strip()}.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in names if name not in known]
    if missing:
        with tempfile.TemporaryDirectory() as tree:
            archive = subprocess.run(['git', 'archive', commit], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(['tar', 'x', '-C', tree], input=archive, check=True)
            known |= record(Path(tree), missing)
        KEPT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    return {name: known[name] for name in names}


def differences(was: dict, now: dict) -> list[str]:
    """What is not equal, in words: keys of the log by name, parts of the state."""
    found = [key for key in STATES if was.get(key) != now.get(key)]
    if len(was['log']) != len(now['log']):
        return [*found, f'{len(was["log"])} rows, now {len(now["log"])}']
    for before, after in zip(was['log'], now['log'], strict=True):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        found += [f'{key} of epoch {before["epoch"]}: {before.get(key)}, now {after.get(key)}' for key in keys]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit', help='what this tree is compared with')
    parser.add_argument('--only', nargs='+', default=[''], metavar='WORD', help='runs whose names contain a word')
    args = parser.parse_args()
    names = [name for name in RUNS if any(word in name for word in args.only)]
    if any(name.startswith('resumed') for name in names) and 'whole' not in names:
        names.append('whole')
    was, now = record_commit(args.commit, names), record(ROOT, names)
    wrong = {name: differences(was[name], now[name]) for name in names}
    for name, found in wrong.items():
        print(f'{name:30}{"equal to the bit" if not found else "DIFFERS: " + "; ".join(found)}')
    return 1 if any(wrong.values()) else 0


if __name__ == '__main__':
    sys.exit(main())
