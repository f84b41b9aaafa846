"""A training step as one CUDA graph: the host launches it as a whole, not kernel by kernel.

A graph repeats the same kernels on the same memory. So its inputs are copied to fixed places and its results are read
from fixed places. What Python decides is decided once, while the graph is captured. Numbers that change from step to
step are tensors, such as the learning rate, or come from generators that the graph knows.

On a CPU it is tested with a stand-in for `CapturedCall`. Several GPUs have not run it.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from loggers import log_rank0
from run_dir import TrainingState
from utils import UsageError, get_world_size

T = TypeVar('T')
WARM_UP = 3  # steps launched kernel by kernel first: they compile, tune, and create the optimizer's state


class CaptureError(RuntimeError):
    """A call cannot be captured, but the capture has ended well: the GPU and its memory are as before."""


class CapturedCall(Generic[T]):
    """A call whose kernels are captured and replayed, on a stream of its own.

    Args:
        generators: on the GPU, beside the default one, from which the call draws. A replay draws what the call itself
            would draw from their present states.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)

    def run(self, call: Callable[[], T]) -> T:
        """Runs the call kernel by kernel, in order with the work before and after it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def find_wait(self, call: Callable[[], T]) -> tuple[T, str]:
        """Runs the call; also returns file and line where the host first waited for the GPU, '' if nowhere."""
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter('always')
                torch.cuda.set_sync_debug_mode('warn')  # which itself warns that this is a prototype
                result = self.run(call)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        waits = [each for each in told if 'called a synchronizing CUDA operation' in str(each.message)]
        return result, f'{Path(waits[0].filename).name}:{waits[0].lineno}' if waits else ''

    def capture(self, call: Callable[[], T]) -> T:
        """Captures the call, which computes nothing yet; returns what it returns: tensors that `replay` fills.

        Raises:
            CaptureError: the call cannot be captured, for example because memory is short.
            RuntimeError: the same, but the capture has not ended well.
        """
        current, cause = torch.cuda.current_stream(), None
        torch.cuda.synchronize()  # an error of earlier work is none of the capture
        gc.collect()
        gc.disable()  # to free other memory of the GPU is not allowed during a capture
        try:
            # thread_local: the thread that pins batches may use CUDA meanwhile.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode='thread_local'):
                try:
                    return call()
                except RuntimeError as error:
                    cause = error
                    raise
        except RuntimeError as error:
            if error is cause:
                self._graph.reset()
                raise CaptureError(str(error)) from error
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its stream, and hides the cause
            raise cause or error from None
        finally:
            cause = None  # or the error would keep itself, and with it the memory of the step
            gc.enable()

    def replay(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        """Frees the graph. A process group of NCCL cannot be left before."""
        torch.cuda.synchronize()
        self._graph.reset()


def has_graphs(device: torch.device) -> bool:
    """Whether work on this device can be captured."""
    return device.type == 'cuda' and not torch.version.hip


def graph_problem(state: TrainingState, device: torch.device) -> str:
    """What keeps the training step of this run out of a graph, '' if nothing is known."""
    if not has_graphs(device):
        return 'needs an NVIDIA GPU'
    if state.scaler.is_enabled():
        return 'with float16 the host decides on the scale of the gradients'
    if not getattr(state.optimizer, '_step_supports_amp_scaling', False):
        return f'with {type(state.optimizer).__name__} the host decides whether to update; use --opt adam or adamw'
    if state.ema is not None and state.ema.device is not None:
        return '--model-ema-force-cpu makes the host wait for the GPU'
    if dist.is_initialized() and any(isinstance(module, _BatchNorm) for module in state.model.modules()):
        return 'the ranks share the statistics of BatchNorm'
    return ''


def wants_graph(flag: bool | None, state: TrainingState, device: torch.device) -> bool:
    """Whether a run launches its steps as a CUDA graph: as --cuda-graph says, or, without it, where one GPU can."""
    if flag is not None or not has_graphs(device):
        return bool(flag)
    problem = graph_problem(state, device)
    if not problem and get_world_size() > 1:
        problem = 'not tried with several GPUs; --cuda-graph tries it'
    if problem:
        log_rank0(f'cuda graph  none: {problem}')
    return not problem


class StepResult(NamedTuple):
    """What the host reads of a step, later."""

    names: tuple[str, ...]  # of the terms
    rows: tuple[Tensor, ...]  # for the meters, one per forward pass
    finite: Tensor  # for the guard


class StepGraph:
    """A training step that is captured at its fourth call, and replayed from then on.

    The first calls run it kernel by kernel. If the host waits for the GPU in the last of them, or if the capture fails,
    a warning says so, and all calls run kernel by kernel.

    Args:
        step: images (B, 3, H, W) and targets (B, …), of the same shapes in all calls → its results. It updates
            weights and moments in place.
        optimizer: of `step`. Its learning rates are float32 tensors inside `step`, so they are rounded.
        generator: from which `step` draws, beside the default one.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], StepResult], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self.step, self.optimizer = step, optimizer
        self.rates = [torch.zeros((), device=generator.device) for _ in optimizer.param_groups]
        self.captured: CapturedCall[StepResult] = CapturedCall([generator])
        self.calls, self.failed = 0, False
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.result: StepResult | None = None

    def __call__(self, images: Tensor, targets: Tensor) -> StepResult:
        """The results of the step. Those of a replay are overwritten by the next one.

        Raises:
            UsageError: the capture failed, and left the GPU in an uncertain state, or there are other ranks.
        """
        self.calls += 1
        with self._rates_as_tensors():
            if self.failed:
                return self.step(images, targets)
            call = partial(self.step, *self._keep(images, targets))
            if self.calls < WARM_UP:
                return self.captured.run(call)
            if self.calls == WARM_UP:
                result, place = self.captured.find_wait(call)
                if place:
                    self._give_up(f'the host waits for the GPU at {place}')
                return result
            if self.result is None:
                self.result = self._capture(call)
            if self.result is None:
                return self.step(images, targets)
            self.captured.replay()
            return self.result

    def _give_up(self, reason: str) -> None:
        self.failed, self.inputs = True, None
        log_rank0(f'warning: --cuda-graph: {reason}; steps are launched kernel by kernel')

    def close(self) -> None:
        """To be called at the end of training, also after an error."""
        if self.result is not None:
            self.result = None
            self.captured.close()

    def _keep(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Copies the inputs to where the graph reads them."""
        if self.inputs is None:
            self.inputs = torch.empty_like(images), torch.empty_like(targets)
        for kept, given in zip(self.inputs, (images, targets), strict=True):
            if (kept.shape, kept.dtype) != (given.shape, given.dtype):
                text = [f'{x.dtype} {tuple(x.shape)}' for x in (kept, given)]
                raise ValueError(f'the graph is made for inputs of {text[0]}, not {text[1]}')
            kept.copy_(given)
        return self.inputs

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """The schedule, checkpoints and logs see numbers; `step` sees tensors, which a replay reads anew."""
        groups = self.optimizer.param_groups
        values = [group['lr'] for group in groups]
        for group, rate, value in zip(groups, self.rates, values, strict=True):
            group['lr'] = rate.fill_(value)
        try:
            yield
        finally:
            for group, value in zip(groups, values, strict=True):
                group['lr'] = value

    def _capture(self, call: Callable[[], StepResult]) -> StepResult | None:
        start, groups = time.monotonic(), self.optimizer.param_groups
        for group in groups:
            group['capturable'] = True  # outside of a capture torch warns of it
        try:
            result = self.captured.capture(call)
        except RuntimeError as error:
            reason = f'the step cannot be captured ({str(error).strip().partition(chr(10))[0]})'
            # A rank that went on without a graph could wait for the others for ever.
            if isinstance(error, CaptureError) and get_world_size() == 1:
                self._give_up(reason)
                return None
            raise UsageError(f'--cuda-graph: {reason}; run with --no-cuda-graph') from error
        finally:
            for group in groups:
                group['capturable'] = False
        log_rank0(f'cuda graph  captured in {time.monotonic() - start:.1f} s, after {WARM_UP} steps')
        return result
