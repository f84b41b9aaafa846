"""A distillation from start to end on real handwritten digits, in minutes: one teacher, four students, one table.

    bash scripts/demo.sh           sets up the environment and runs this; everything is kept in runs/demo
    bash scripts/demo.sh SEED      the same with another seed, in runs/demo-SEED

Every figure it prints was measured in that run. One seed and a toy: it shows that the program works and what the terms
can do in short training, not what they gain on ImageNet.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from digits import write_digits

matplotlib.use('Agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
TEACHER_EPOCHS, STUDENT_EPOCHS = 90, 25

# Digits have no left and right to flip and are too small to crop: trained as they are.
RECIPE = """--data-set FOLDER --input-size 32 --no-aug --mixup 0 --cutmix 0 --no-repeated-aug --num_workers 0
    --lr 1.6e-2 --warmup-epochs 3 --no-model-ema --print-freq 1000""".split()
SHAPE = 'patch_size=8 depth=4'.split()
TEACHER = ['cait_s24_224', *SHAPE, *'embed_dim=64 num_heads=4 init_values=1.0'.split()]
STUDENT = ['deit_tiny_patch16_224', *SHAPE, *'embed_dim=32 num_heads=2'.split()]
SOFT = '--distillation-type soft --distillation-alpha 1'.split()
PAIRS = '--s-id 0 1 2 3 --t-id 0 1 2 3'.split()
MANIFOLD = [*PAIRS, *'--w-sample 0.1 --w-patch 4 --w-rand 0.2'.split()]
FULL = [*PAIRS, *'--w-sample 0 --w-patch 0 --w-rand 0 --w-full 4 --relations global'.split()]


@dataclass
class Run:
    """One training run of main.py: its title, its flags, where it keeps its files, and how long it took."""

    title: str
    epochs: int
    flags: list[str]
    folder: Path
    seconds: float = 0.0

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / 'log.txt').read_text().splitlines()]

    def command(self, data: Path) -> list[str]:
        ranks = min(2, torch.cuda.device_count()) or 2  # gloo on the CPU, or the GPUs there are
        launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
        recipe = [*RECIPE, '--batch-size', str(64 // ranks), '--epochs', str(self.epochs)]
        return [*launcher, 'main.py', *recipe, *self.flags, '--data-path', str(data), '--output_dir', str(self.folder)]

    def train(self, data: Path) -> None:
        """Runs it, shows one moving line, and keeps all it prints in output.txt."""
        self.folder.mkdir(parents=True)
        start, epoch, accuracy = time.monotonic(), 0, ''
        env = {'OMP_NUM_THREADS': '1'} | os.environ
        with (
            open(self.folder / 'output.txt', 'w') as output,
            subprocess.Popen(
                self.command(data), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process,
        ):
            show(f'{self.title}: starting')
            for line in process.stdout:
                output.write(line)
                if found := re.match(r'epoch (\d+) took', line):
                    epoch = int(found[1]) + 1
                elif found := re.match(r'\* Acc@1 (\S+)', line):
                    accuracy, elapsed = f'Acc@1 {float(found[1]):.1f}', time.monotonic() - start
                    show(f'{self.title}: epoch {epoch}/{self.epochs}, {accuracy}, {elapsed:.0f} s')
        self.seconds = time.monotonic() - start
        if process.returncode:
            sys.exit(f'\n{self.title} failed; all it said is in {self.folder / "output.txt"}')
        show(f'{self.title}: done in {self.seconds:.0f} s, {accuracy}', last=True)


def show(text: str, last: bool = False) -> None:
    """A line that moves on a terminal; in a file, lines one below the other."""
    if sys.stdout.isatty():
        print(f'\r\033[K{text}', end='\n' if last else '', flush=True)
    else:
        print(text, flush=True)


def plan(folder: Path, seed: str) -> list[Run]:
    """The teacher first; the students learn from its last weights."""
    chance = ['--seed', seed]
    weights = folder / 'teacher' / 'checkpoint.pth'
    teacher = [*chance, '--lr', '2.4e-2', '--model', TEACHER[0], '--model-kwargs', *TEACHER[1:]]
    student = [*chance, '--model', STUDENT[0], '--model-kwargs', *STUDENT[1:]]
    taught = [*student, '--teacher-model', TEACHER[0], '--teacher-kwargs', *TEACHER[1:], '--teacher-path', str(weights)]
    return [
        Run('teacher', TEACHER_EPOCHS, teacher, folder / 'teacher'),
        Run('student alone', STUDENT_EPOCHS, student, folder / 'alone'),
        Run('student + soft KD', STUDENT_EPOCHS, [*taught, *SOFT], folder / 'soft'),
        Run('student + soft KD + manifold', STUDENT_EPOCHS, [*taught, *SOFT, *MANIFOLD], folder / 'manifold'),
        Run('student + soft KD + full', STUDENT_EPOCHS, [*taught, *SOFT, *FULL], folder / 'full'),
    ]


def table(runs: list[Run]) -> str:
    """Accuracy after the last epoch, not the best one."""
    lines = [f'{"":30}{"parameters":>11}{"Acc@1 %":>9}{"epochs":>8}{"seconds":>9}  files']
    for run in runs:
        row = run.rows()[-1]
        where = os.path.relpath(run.folder)
        lines.append(
            f'{run.title:30}{row["n_parameters"]:11,}{row["test_acc1"]:9.1f}{run.epochs:8}{run.seconds:9.0f}  {where}'
        )
    return '\n'.join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Accuracy of the students by epoch, the teacher's last one as a line."""
    teacher, *students = runs
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    level = teacher.rows()[-1]['test_acc1']
    axes.axhline(level, color='0.45', linestyle='--', linewidth=1)
    axes.annotate(f'teacher {level:.1f}', (1, level), xytext=(6, 4), textcoords='offset points', color='0.35')
    for run, color in zip(students, ('#7f7f7f', '#1f5fa8', '#c2500b', '#2e8b57'), strict=True):
        rows = run.rows()
        last = rows[-1]['test_acc1']
        epochs = [row['epoch'] + 1 for row in rows]
        axes.plot(epochs, [row['test_acc1'] for row in rows], color=color, label=f'{run.title}: {last:.1f}')
    axes.set(xlabel='epoch', ylabel='Acc@1 on 360 validation images, %', ylim=(0, 102), xlim=(1, STUDENT_EPOCHS))
    axes.set_title('Handwritten digits, one run', loc='left', fontsize=11)
    axes.legend(loc='lower right', frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', alpha=0.25)
    figure.savefig(path, dpi=150)


def draw_relations(student: Path, digits: Path, path: Path) -> None:
    """Relation maps of the teacher and of a student before and after its run, for a three and an eight of `val`."""
    images = [str(min(digits.glob(f'val/{digit}/*.png'))) for digit in (3, 8)]
    shown = ['--images', *images, '--pairs', '0', '-1', '--out', str(path)]
    command = [sys.executable, '-m', 'tools.relations', str(student), *shown]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def main(seed: str) -> None:
    folder = ROOT / 'runs' / ('demo' if seed == '0' else f'demo-{seed}')
    shutil.rmtree(folder, ignore_errors=True)  # its own earlier output, nothing else
    write_digits(folder / 'digits')
    runs = plan(folder, seed)
    for run in runs:
        run.train(folder / 'digits')
    draw(runs, folder / 'curves.png')
    draw_relations(folder / 'manifold', folder / 'digits', folder / 'relations.png')
    print(f'\n{table(runs)}\ncurves: {os.path.relpath(folder / "curves.png")}')
    print(f'relation maps of teacher and student + soft KD + manifold: {os.path.relpath(folder / "relations.png")}')


if __name__ == '__main__':
    main(str(int(sys.argv[1])) if len(sys.argv) > 1 else '0')
