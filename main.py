"""Distil a small vision transformer from a large one with the fine-grained manifold loss.

    python main.py --data-set FAKE --input-size 32 …             one process
    torchrun --nproc_per_node=8 main.py --data-path …            eight GPUs (or python -m torch.distributed.launch)
    torchrun … main.py --output_dir OUT --resume auto …          start, or continue wherever the run was interrupted
    python main.py --eval --resume checkpoint.pth --data-path …  evaluate a checkpoint

`scripts/` holds complete commands, one flag per line; docs/flags.md lists all flags.
"""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback
    try:
        import timm  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        advice = 'run `bash scripts/setup.sh`, then `source .venv/bin/activate`'
        print(f'main.py: error: {error} in {sys.executable}; {advice}', file=sys.stderr)
        raise SystemExit(2) from None

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import config_files
import datasets
import locks
import loggers
import run_dir
import stopping
import summary
import utils
from cuda_graph import wants_graph
from engine import Evaluator, TrainConfig, Trainer, fit
from flags import AugmentConfig, Config, LossConfig, OptimConfig, RunConfig, parse_args
from loaders import LoaderBuilder, choose_repeated_aug, prefetch_to_device, report_bad_images
from loggers import MetricLog, log_rank0
from losses import FUSED_PARTS, ManifoldDistillationLoss
from pair import Pair, build_pair, compile_pair, log_blocks, num_classes_of
from readers import BadImageError
from run_dir import CheckpointManager, TrainingState
from stopping import RankConsensus, StoppedError, StopSignals
from transforms import DevicePreprocess
from utils import UsageError, format_values, usage_error_context
from weights_files import adopt_data, read_weights


def run(config: Config, device: torch.device, signals: StopSignals) -> None:
    """Builds the parts, in the order that finds errors before work is done, and evaluates or trains."""
    flags = config.run
    summary.log_environment(flags, device)
    if flags.output_dir and not flags.eval:
        locks.lock(flags.output_dir)  # before anything in it is read
    checkpoint, own = run_dir.read_resume(flags.resume, flags.output_dir, flags.eval)
    config, pair, loaders, evaluator = build_parts(config, checkpoint, device)
    consensus = RankConsensus(signals)
    if flags.eval_teacher:
        evaluate_teacher(pair, evaluator, consensus)
    if flags.eval:
        evaluator.measure(pair.student.model, 'EMA' if flags.eval_ema else 'network', consensus.raise_if_stopped)
        report_bad_images(device, evaluator.loader)
    else:
        signals.defer()
        train(config, pair, loaders, evaluator, consensus, checkpoint, own)


def build_parts(
    config: Config, checkpoint: dict[str, Any], device: torch.device
) -> tuple[Config, Pair, LoaderBuilder, Evaluator]:
    """Builds what evaluation and training share; returns the flags with what the weights files say of their models."""
    flags = config.run
    data = adopt_data(config, checkpoint) if flags.eval else config.data
    data.check_path()
    with usage_error_context('--data-path', data.data_path):
        num_classes = utils.main_process_first(
            lambda: datasets.count_classes(data.data_set, data.data_path, data.inat_category, data.num_classes)
        )
    summary.log_data(data, num_classes)
    if not flags.eval:
        summary.log_batch(config.optim, flags.seed)
    config, files = read_weights(config, checkpoint)
    torch.manual_seed(flags.seed)
    fused = flags.fused_parts(device)
    pair = build_pair(config, files, num_classes, fused)
    config = replace(config, model=pair.config, data=data)
    summary.log_fused(config, device, pair.teacher)
    if checkpoint:
        if not flags.eval:
            run_dir.check_same_flags(flags.resume, config.flags(), checkpoint)
        uses_ema = flags.eval and flags.eval_ema
        run_dir.load_student(pair.student.model, flags.resume, config.model.model, checkpoint, uses_ema)
    pair.to(device)

    loaders = LoaderBuilder(data, config.model.input_size, flags.seed, device)
    val_loader = loaders.val(config.optim.batch_size)
    summary.warn_of_missing_classes(val_loader, data.data_path, num_classes)
    names = datasets.class_names(val_loader.dataset.dataset, num_classes)  # type: ignore[attr-defined]
    summary.warn_of_other_classes(files.with_logits(config), names)
    del files  # the teacher's weights would be in memory twice
    fill = [min(255, round(255 * value)) for value in pair.stats[0]]  # as timm does
    preprocess = DevicePreprocess(*pair.stats, config.augment.remode, fill, 'erasing' in fused).to(device)
    copies = 1 if data.dist_eval else utils.get_world_size()
    evaluator = Evaluator(val_loader, preprocess, device, flags.autocast_dtype(device), copies, bool(flags.compile))
    return config, pair, loaders, evaluator


def evaluate_teacher(pair: Pair, evaluator: Evaluator, consensus: RankConsensus) -> None:
    """Evaluates the teacher as in training: without autocast if --teacher-dtype is set."""
    assert pair.teacher is not None
    teacher_evaluator = replace(evaluator, amp_dtype=torch.float32) if pair.config.teacher_dtype else evaluator
    teacher_evaluator.measure(
        nn.Sequential(pair.teacher.prepare, pair.teacher.model), 'teacher', consensus.raise_if_stopped
    )


def train(
    config: Config,
    pair: Pair,
    loaders: LoaderBuilder,
    evaluator: Evaluator,
    consensus: RankConsensus,
    checkpoint: dict[str, Any],
    own: Path | None,
) -> None:
    """Prepares the folder of the run, builds the trainer, and hands over to the engine."""
    flags = config.run
    last_step = run_dir.prepare_folder(flags.output_dir, flags.resume, flags.start_epoch, checkpoint, own)
    trainer, train_loader = build_trainer(config, pair, loaders, evaluator, checkpoint, own is not None)
    checkpoint.clear()  # all of it is loaded; frees its memory
    state = trainer.state
    manager = CheckpointManager(
        state,
        Path(flags.output_dir) if flags.output_dir else None,
        consensus,
        config.flags(),
        keep=flags.keep,
        interval=60 * flags.save_interval_minutes or math.inf,
        every=flags.save_interval_steps,
        last_step=last_step,
        before_save=trainer.guard.sync,
    )
    metrics = start_logs(flags, config.flags(), state.step)
    try:
        fit(trainer, train_loader, evaluator, manager, metrics)
    finally:
        metrics.close()
        if trainer.graph is not None:
            trainer.graph.close()


def build_trainer(
    config: Config,
    pair: Pair,
    loaders: LoaderBuilder,
    evaluator: Evaluator,
    checkpoint: dict[str, Any],
    own: bool,
) -> tuple[Trainer, DataLoader]:
    """Builds what training needs beside the models. `own`: the checkpoint is one of the run in --output_dir."""
    flags, optim, augment, world = config.run, config.optim, config.augment, utils.get_world_size()
    repeated_aug = choose_repeated_aug(augment.repeated_aug, flags.resume, checkpoint)
    train_loader = loaders.train(augment, optim.rank_batch_size, repeated_aug, pair.stats[0])
    fused = flags.fused_parts(evaluator.device)
    criterion = build_criterion(config.loss, augment, fused)
    summary.log_images(train_loader, evaluator.loader, repeated_aug, augment.repeated_aug)
    patches = min((h * w for h, w in pair.student.grids), default=0)
    log_rank0(f'loss        {summary.describe_loss(criterion, patches, optim.batch_size)}')
    for warning in summary.flags_without_effect(config):
        log_rank0(f'warning: {warning}')
    summary.warn_of_short_run(optim, len(train_loader))

    model, num_classes = pair.student.model, num_classes_of(pair.student.model)
    state = build_state(optim, flags.seed, model, optim.scaled_lr(world), evaluator.amp_dtype == torch.float16)
    images = train_loader.dataset.dataset  # type: ignore[attr-defined]
    state.data = datasets.fingerprint(images, num_classes)
    mean, std = map(list, pair.stats)
    state.student = {'mean': mean, 'std': std, 'classes': datasets.class_names(images, num_classes)}
    state.checksums = {'teacher_weights': pair.teacher_checksum} if config.distills else {}
    state.repeated_aug = repeated_aug
    run_dir.check_same_data(config.data.data_path, flags.resume, state, checkpoint)
    run_dir.warn_of_other_teacher(config.model.teacher_path, flags.resume, state, checkpoint)
    run_dir.restore(state, checkpoint, flags.resume, flags.start_epoch, len(train_loader), own)
    if flags.compile:
        compile_pair(pair, config.distills, whole=flags.compile == 'models')
    teacher = pair.teacher if config.distills else None
    mixup = build_mixup(augment, num_classes)
    # As in the release, fine-tuning without a teacher keeps the student in eval mode: no drop-path, mean of two heads.
    train_mode = not config.model.finetune or config.distills
    settings = build_settings(optim, flags, config.loss, evaluator, train_mode)
    settings = replace(settings, cuda_graph=wants_graph(flags.cuda_graph, state, evaluator.device))
    trainer = Trainer(pair.student, teacher, criterion, state, settings, evaluator.preprocess, mixup)
    if trainer.graph is not None:
        on_device = ('erase', 'key') if 'erasing' in fused else ()
        train_loader = prefetch_to_device(train_loader, evaluator.device, on_device)
    return trainer, train_loader


def start_logs(flags: RunConfig, values: dict[str, Any], step: int) -> MetricLog:
    """Starts what is written beside the checkpoints, on the first rank: args.yaml, console.log, metrics."""
    if not flags.output_dir or utils.get_rank() > 0:
        return MetricLog()
    folder = Path(flags.output_dir)
    with suppress(OSError):  # a full disk must not stop a run
        config_files.write_args(folder, values)
    loggers.console_file.open(folder / loggers.CONSOLE)
    return MetricLog(folder, flags.log_to, values, step)


def build_settings(
    optim: OptimConfig, flags: RunConfig, loss: LossConfig, evaluator: Evaluator, train_mode: bool
) -> TrainConfig:
    return TrainConfig(
        device=evaluator.device,
        amp_dtype=evaluator.amp_dtype,
        seed=flags.seed,
        epochs=optim.epochs,
        accum_steps=optim.accum_steps,
        clip_grad=optim.clip_grad,
        train_mode=train_mode,
        global_relations=loss.relations == 'global',
        log_grad_share=loss.log_grad_share,
        eval_ema=flags.eval_ema,
        print_freq=flags.print_freq,
    )


def build_criterion(loss: LossConfig, augment: AugmentConfig, fused: Sequence[str] = ()) -> ManifoldDistillationLoss:
    if augment.uses_mixing:
        base: nn.Module = SoftTargetCrossEntropy()  # mixing has smoothed the labels already
    else:
        base = LabelSmoothingCrossEntropy(augment.smoothing) if augment.smoothing else nn.CrossEntropyLoss()
    return ManifoldDistillationLoss(
        base,
        loss.distillation_type,
        alpha=loss.distillation_alpha,
        tau=loss.distillation_tau,
        beta=loss.distillation_beta,
        K=loss.K,
        relations=loss.relations,
        relation_dtype=loss.relation_dtype,
        fused=[part for part in fused if part in FUSED_PARTS],
        **{f'w_{name}': weight for name, weight in loss.weights.items()},
    )


def build_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    if not augment.uses_mixing:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=augment.cutmix_minmax,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


def build_state(
    optim: OptimConfig, seed: int, model: nn.Module, lr: float, scale_gradients: bool = False
) -> TrainingState:
    """Optimizer, schedule, gradient scaler and EMA of a timm model whose weights are loaded.

    Args:
        optim: the flags of the optimizer and the schedule.
        seed: of the noise of the learning rate.
        model: the student, on its device.
        lr: learning rate of the global batch.
        scale_gradients: for float16.

    Raises:
        UsageError: there is no such optimizer, or it cannot be used here.
    """
    device = next(model.parameters()).device
    betas = f' with --opt-betas {format_values(optim.opt_betas)}' if optim.opt_betas else ''
    with usage_error_context('--opt', optim.opt + betas, AssertionError, IndexError, TypeError):
        options = {**optimizer_kwargs(optim), 'lr': lr}
        optimizer = create_optimizer_v2(model, **options)
        # Fused: one kernel, which can skip an update on the device. Only Adam and AdamW: fused SGD reads momentum
        # buffers before they are written, and fused Adagrad is too new on GPUs.
        if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            optimizer = create_optimizer_v2(model, **options, fused=True)
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {optim.opt}: needs second derivatives, which this training step does not compute')
    scheduler, _ = create_scheduler_v2(optimizer, **{**scheduler_kwargs(optim), 'noise_seed': seed})
    scaler = torch.amp.GradScaler(device.type, enabled=scale_gradients)
    ema_device = torch.device('cpu') if optim.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=optim.model_ema_decay, device=ema_device) if optim.model_ema else None
    return TrainingState(model, optimizer, scheduler, scaler, ema)


Action = Callable[[Config, torch.device, StopSignals], None]


def main(argv: list[str] | None = None, action: Action = run) -> None:
    """Runs in this process; returns when all is done.

    Args:
        argv: the flags; those of the command line if None.
        action: what is done with them.

    Raises:
        SystemExit: after one line on stderr; 2 for a usage error; 1 for a loss that is not finite, an image that
            cannot be read, a state that could not be saved, a full GPU, or another rank that failed; 128 + n for
            signal n; 0 after --help.
    """
    with StopSignals() as signals:
        try:
            _start(argv, signals, action)
        except UsageError as error:
            # Usually all ranks have the same usage error: local rank 0 reports it, and the launcher ends the others
            # while they sleep. An error that only other ranks have is reported after the sleep.
            signals.restore()
            if os.environ.get('LOCAL_RANK', '0') != '0':
                time.sleep(10)
            stop(error, 2)
        except FloatingPointError as error:
            from_teacher = 'teacher' in str(error)
            advice = "check the teacher's weights" if from_teacher else 'try a smaller --lr, or --clip-grad 1'
            stop(f'{error}; {advice}' if utils.get_rank() == 0 else '', 1)  # all ranks know it
        except (BadImageError, locks.NotSavedError) as error:
            stop(error, 1)
        except StoppedError as error:
            stop(error if utils.get_rank() == 0 else '', 128 + error.signum)
        except torch.OutOfMemoryError as error:
            advice = 'a smaller --batch-size with --accum-steps, --grad-checkpointing, or --no-cuda-graph'
            stop(f'{str(error).split(". GPU")[0].rstrip(". ")}; try {advice}', 1)
        except RuntimeError as error:
            if stopping.is_peer_failure(error):  # the other rank has reported why
                stop(f'rank {utils.get_rank()} exiting: another rank failed', 1)
            if not str(error).startswith('DataLoader worker'):
                raise
            stop(f'{str(error).rstrip(". ")}; possibly out of memory: try fewer --num_workers', 1)
        except (ConnectionError, EOFError) as error:  # a worker died while it handed over a batch
            stop(f'a DataLoader worker died ({error}); possibly out of memory: try fewer --num_workers', 1)
    loggers.console_file.close()
    # Only after success: with nccl it waits for the other ranks.
    utils.destroy_distributed()


def _start(argv: list[str] | None, signals: StopSignals, action: Action) -> None:
    config = parse_args(argv, __doc__)
    if config.run.output_dir and not config.run.eval:
        loggers.console_file.start()
    if config.model.list_blocks:
        return log_blocks(config.model)
    with usage_error_context('--dist_url', config.run.dist_url, RuntimeError):
        device = utils.init_distributed(config.run.device, config.run.dist_url, config.run.dist_timeout)
    if utils.get_world_size() > 1:
        signals.defer()  # until all ranks can stop together
    try:
        action(config, device, signals)
    except BaseException:
        stopping.end_loader_processes()
        raise
    finally:
        locks.unlock()


def stop(reason: object, code: int) -> NoReturn:
    """Exits after one line on stderr, none if there is no reason."""
    if str(reason):
        # The last line is the reason; an error of a loader process has its traceback before it, and its class.
        line = re.sub(r'^[\w.]+Error: ', '', str(reason).strip().splitlines()[-1])
        with suppress(OSError):
            print(f'main.py: error: {line}', file=sys.stderr, flush=True)
        loggers.console_file.write(f'main.py: error: {line}')
    loggers.console_file.close()
    raise SystemExit(code) from None


if __name__ == '__main__':
    loggers.unbuffer_stdio()
    try:
        main()
    except SystemExit:
        stopping.ignore_signals()  # when one rank exits, the launcher signals the others; all are exiting
        raise
