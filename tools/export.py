"""A trained student as files for other programs, each checked against the checkpoint.

    python -m tools.export OUT --to STUDENT                      for timm, and a program for torch
    python -m tools.export OUT --to STUDENT --formats timm,onnx  for timm and ONNX Runtime
    python -m tools.export OUT --to STUDENT --push OWNER/NAME    and to the Hugging Face Hub

RUN is the folder of a run, of which the newest checkpoint is read, or a checkpoint, also of the 2022 release. The model
is that of the run's flags. The formats are

    timm    model.safetensors, config.json and a model card, README.md, for timm.create_model('local-dir:STUDENT')
    torch   model.pt2, for torch.export.load
    onnx    model.onnx, for ONNX Runtime

The last two take normalised images, (batch, 3, height, width), and return logits, the mean of both heads of a distilled
model. Each file is read again and run on the same images as the checkpoint. The difference is the largest one between
two logits, divided by the largest logit if that is above 1. The exit status is 1 if it is above --tolerance.
"""

import argparse
import importlib.util
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme  # timm has no public name for it
from torch import Tensor, nn

import checkpoints
import models
from flags import POSITIVE, Parser
from losses import RELATION_TERMS
from tools.common import FinishedRun, add_model_flags, one_line_errors, read_run, typed_flags
from transforms import SMALL_SIZE
from utils import UsageError, usage_error_context
from weights_files import recorded_stats

PROGRAM = 'tools.export'
FLAGS = ('model', 'model_kwargs', 'input_size')
WEIGHTS, CONFIG, CARD, TORCH, ONNX = 'model.safetensors', 'config.json', 'README.md', 'model.pt2', 'model.onnx'
PACKAGES = {'onnx': ('onnx', 'onnxruntime', 'onnxscript')}
FOREIGN = ('tag', 'license', 'notes', 'paper_ids', 'paper_name', 'origin_url', 'label_names', 'label_descriptions')
CHECKED, REPEATS = 3, 3  # images that are compared; runs of which the fastest counts
CITATION = """@inproceedings{hao2022manifold,
  title     = {Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation},
  author    = {Hao, Zhiwei and Guo, Jianyuan and Jia, Ding and Han, Kai and Tang, Yehui and Zhang, Chao and Hu, Han and
               Wang, Yunhe},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022}
}"""

Call = Callable[[Tensor], Tensor]  # images (B, 3, H, W) → logits (B, C)


@dataclass
class Student:
    """A student with its weights, in eval mode, and what a user of it must know."""

    run: FinishedRun
    model: nn.Module
    stats: tuple[tuple, tuple]  # mean and standard deviation that its images are normalised by
    names: list[str]  # of its classes, [] if they are not known
    ema: bool

    @property
    def size(self) -> int:
        return self.run.config.input_size

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The traced model, for batches of any size. Raises RuntimeError or ValueError if it cannot be traced."""
        batch = torch.export.Dim('batch')
        return torch.export.export(self.model, (self.images(2),), dynamic_shapes=({0: batch},))

    def images(self, count: int) -> Tensor:
        """Normalised noise (count, 3, H, W), the same at each call."""
        noise = torch.rand(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        mean, std = torch.tensor(self.stats).view(2, 3, 1, 1)
        return (noise - mean) / std


def load_student(run: FinishedRun, ema: bool) -> Student:
    """Builds the student of a run and loads its weights, or their moving average.

    Raises:
        UsageError: the weights do not fit the model, or there is no moving average.
    """
    config, kept = run.config, run.checkpoint.get('student')
    with usage_error_context('--model', f'{config.model} with --input-size {config.input_size}'):
        model = models.build(config.model, run.num_classes, config.input_size, kwargs=config.model_kwargs)
    with usage_error_context('RUN', run.source):
        state, changes = models.adapt(model, run.weights(ema), replace_heads=False)
        models.load_weights(model, state)
        stats = recorded_stats(run.checkpoint) or models.normalisation(model, config.model)
    for change in changes:
        print(f'weights     {change}')
    names = list(map(str, kept.get('classes') or ())) if isinstance(kept, dict) else []
    return Student(run, model.eval().requires_grad_(False), stats, names if len(names) == run.num_classes else [], ema)


# The formats ----------------------------------------------------------------------------------------------------------


def write_timm(student: Student, folder: Path) -> None:
    save_for_hf(student.model, str(folder), safe_serialization=True, **hub_options(student))
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read its files
    (folder / CARD).write_text(generate_readme(model_card(student), folder.resolve().name), encoding='utf-8')


def load_timm(folder: Path) -> Call:
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def write_torch(student: Student, folder: Path) -> None:
    torch.export.save(student.program, folder / TORCH)


def load_torch(folder: Path) -> Call:
    return torch.export.load(folder / TORCH).module()


def write_onnx(student: Student, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of onnxscript, about itself
        torch.onnx.export(
            student.program, (student.images(2),), str(folder / ONNX), dynamo=True, external_data=False, verbose=False,
            input_names=['images'], output_names=['logits'], dynamic_shapes=({0: 'batch'},),
        )  # fmt: skip


def load_onnx(folder: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as eager has
    session = onnxruntime.InferenceSession(folder / ONNX, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


FORMATS: dict[str, tuple[Callable[[Student, Path], None], Callable[[Path], Call]]] = {
    'timm': (write_timm, load_timm),
    'torch': (write_torch, load_torch),
    'onnx': (write_onnx, load_onnx),
}


# What describes the student -------------------------------------------------------------------------------------------


def hub_options(student: Student) -> dict[str, Any]:
    """What timm writes to config.json beside the model's own arguments: the preprocessing of this program's evaluation,
    and the names of the classes."""
    mean, std = student.stats
    # Small sizes are not cropped from larger ones, see `transforms.build_eval_transform`.
    crop = {'crop_pct': 1.0 if student.size <= SMALL_SIZE else 224 / 256, 'crop_mode': 'center'}
    size = {'input_size': (3, student.size, student.size)}
    data = {**size, 'interpolation': 'bicubic', 'mean': mean, 'std': std, **crop}
    # timm would keep what it knows of its own weights of this model.
    config: Any = student.model.pretrained_cfg
    model = {'pretrained_cfg': {key: None for key in FOREIGN if config.get(key) is not None}}
    return {'data_config': data, 'model_config': model | ({'label_names': student.names} if student.names else {})}


def model_card(student: Student) -> dict[str, Any]:
    """What timm makes a README.md of. Only what the checkpoint says; the licence of weights is not known."""
    run, flags = student.run, checkpoints.flags_of(student.run.checkpoint)
    mean, std = (', '.join(f'{value:g}' for value in values) for values in student.stats)
    details = {
        'Model': run.config.model,
        'Arguments': ', '.join(f'{key}={value}' for key, value in run.config.model_kwargs.items()),
        'Parameters': f'{sum(p.numel() for p in student.model.parameters()):,}',
        'Images': f'{student.size}×{student.size}, mean {mean}, std {std}',
        'Classes': run.num_classes,
        'Weights': 'moving average of the training' if student.ema else 'of the last step',
        'Acc@1': accuracy(student),
    }
    taught = flags.get('distillation_type', 'none') != 'none'
    if taught:
        weights = {name: flags.get(f'w_{name}', 0) for name in RELATION_TERMS} if run.config.s_id else {}
        details |= {
            'Teacher': run.config.teacher_model,
            'Logit distillation': f'{flags["distillation_type"]}, α = {flags.get("distillation_alpha")}',
            'Relation terms': ', '.join(f'{name} {weight}' for name, weight in weights.items() if weight) or 'none',
        }
    usage = (
        '```python\nimport timm\n\n'
        "model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # or hf-hub:OWNER/NAME\n"
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n'
        'logits = model(transform(image)[None])\n```\n'
    )
    how = 'distilled from a larger model' if taught else 'trained without a teacher'
    return {
        'tags': ['image-classification', 'timm'],
        'license': 'unknown',
        'description': f'A vision model for images of {run.num_classes} classes, {how}.',
        'details': {key: value for key, value in details.items() if value not in ('', None)},
        'usage': usage,
        'citation': CITATION,
    }


def accuracy(student: Student) -> str:
    """Acc@1 of exactly these weights from the log beside the checkpoint, '' if it is not there."""
    checkpoint, log = student.run.checkpoint, Path(student.run.path).parent / checkpoints.LOG
    key = 'test_ema_acc1' if student.ema else 'test_acc1'
    try:
        rows = {row['epoch']: row for row in checkpoints.read_log(log)}
    except (OSError, ValueError):
        return ''
    found = rows.get(checkpoint.get('epoch', -1), {}).get(key)
    if found is None or checkpoint.get('position', 0):  # weights in the middle of an epoch were not evaluated
        return ''
    return f"{found:.2f} % on the run's validation images, after {checkpoint['epoch'] + 1} epochs"


# Checking -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def timed(call: Call, images: Tensor) -> tuple[Tensor, float]:
    """The logits, and milliseconds per image of the fastest of some runs."""
    logits, seconds = call(images), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call(images)
        seconds.append(time.perf_counter() - start)
    return logits, 1e3 * min(seconds) / len(images)


def difference(logits: Tensor, reference: Tensor) -> float:
    """Largest difference of two logits, (B, C) both, relative to the largest one if that is above 1."""
    if logits.shape != reference.shape:
        return float('inf')
    return ((logits - reference).abs().max() / reference.abs().max().clamp(min=1)).item()


@contextmanager
def failures_in_one_line(name: str, errors: list[str]) -> Any:
    """Notes an error of torch, timm or ONNX, which raise many types, as one line."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__:  # ONNX's own message is a list of suggestions
            first = first.__cause__
        errors.append(f'{name}: cannot be exported: {(str(first).strip() or type(first).__name__).splitlines()[0]}')


def export(student: Student, folder: Path, formats: list[str], tolerance: float) -> list[str]:
    """Writes, reads and compares each format, and prints a line for each. Returns an error message for each failure."""
    images, errors = student.images(CHECKED), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    reference, milliseconds = timed(student.model, images)
    print(f'{"":12}{"difference":>12}{"ms/image":>10}\n{"eager":12}{"":12}{milliseconds:10.2f}')
    for name in formats:
        write, load = FORMATS[name]
        with failures_in_one_line(name, errors):
            write(student, folder)
            logits, milliseconds = timed(load(folder), images)
            found = difference(logits, reference)
            print(f'{name:12}{found:12.1e}{milliseconds:10.2f}', flush=True)
            if not found <= tolerance:
                errors.append(f'{name}: the logits differ from those of the checkpoint by {found:.1e}, '
                              f'more than --tolerance {tolerance:g}')  # fmt: skip
    return errors


# The command ----------------------------------------------------------------------------------------------------------


def format_names(text: str) -> list[str]:
    """An argparse type: names of formats separated by commas, each once."""
    names = list(dict.fromkeys(text.split(',')))
    if not set(names) <= FORMATS.keys():
        raise argparse.ArgumentTypeError(f'{text}: must be some of {", ".join(FORMATS)}, separated by commas')
    return names


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError, before any work, for a folder with other files, a missing package, or a bad name."""
    folder = Path(args.to)
    if folder.exists():
        with usage_error_context('--to', args.to):
            others = sorted({path.name for path in folder.iterdir()} - {WEIGHTS, CONFIG, CARD, TORCH, ONNX})
        if others:
            raise UsageError(f'--to {args.to}: contains {others[0]}; pass a new folder, or that of an earlier export')
    for name in args.formats:
        missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise UsageError(f'--formats {name}: missing packages; pip install {" ".join(missing)}')
    if args.push and not re.fullmatch(r'[\w.-]+/[\w.-]+', args.push):
        raise UsageError(f'--push {args.push}: must have the form OWNER/NAME')


def push(student: Student, name: str) -> None:
    """Uploads what the format timm writes. Raises UsageError with the reason of the Hub's client if it fails."""
    try:
        push_to_hf_hub(student.model, name, model_card=model_card(student), safe_serialization=True,
                       **hub_options(student))  # fmt: skip
    except Exception as error:  # the client raises many types
        raise UsageError(f'--push {name}: {" ".join(str(error).split())}') from error
    print(f'pushed      hf-hub:{name}')


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(PROGRAM, description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument('run', metavar='RUN', help='folder of a run, or a checkpoint: a file, URL, hf-hub:OWNER/NAME')
    parser.add_argument('--to', required=True, metavar='FOLDER', help='folder for the files')
    parser.add_argument('--ema', action='store_true', help='export the EMA weights')
    parser.add_argument('--formats', type=format_names, default=['timm', 'torch'], metavar='NAME,NAME',
                        help=f'some of {", ".join(FORMATS)}, separated by commas (timm,torch)')  # fmt: skip
    parser.add_argument('--tolerance', type=POSITIVE, default=1e-5, help='largest difference that is allowed (1e-5)')
    parser.add_argument('--push', default='', metavar='OWNER/NAME', help='upload to this model of the Hugging Face Hub')
    add_model_flags(parser, FLAGS)
    with one_line_errors(PROGRAM):
        args = parser.parse_args(argv)
        check_arguments(args)
        run = read_run(args.run, typed_flags(args, FLAGS))
        student = load_student(run, args.ema)
        mean, std = student.stats
        print(f'student     {run.config.model}, {run.num_classes} classes, from {run.path}')
        print(f'images      {student.size}×{student.size} pixels, values in 0 … 1, mean {mean}, std {std}')
        errors = export(student, Path(args.to), args.formats, args.tolerance)
        if args.push and not errors:
            push(student, args.push)
    for error in errors:
        print(f'{PROGRAM}: error: {error}', file=sys.stderr)
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
