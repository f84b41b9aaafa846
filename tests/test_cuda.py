"""Tests that need a GPU. They are skipped without one."""

import copy
import time

import pytest
import torch
import toys
from interpret import attention
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

import cuda_graph
import datasets
import fused_losses
import loggers
import losses
import main
import models
import transforms
import utils
from benchmarks import loss
from fused_losses import draw_tokens
from loaders import LoaderBuilder, prefetch_to_device
from models.talking_heads import fused_talking_heads_problem, use_fast_talking_heads

DEVICE = 'cuda'
STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
    pytest.mark.filterwarnings('default'),  # warnings depend on driver and device
]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A function that runs a toy with these flags and returns the rows of its log."""
    monkeypatch.setattr(datasets, 'FAKE_TRAIN', 32)
    monkeypatch.setattr(datasets, 'FAKE_VAL', 8)
    teacher = toys.save(tmp_path / 'teacher.pth', toys.teacher().state_dict())

    def run(name: str, **changes) -> list[dict]:
        flags = {
            'device': DEVICE,
            'teacher_path': teacher,
            'output_dir': tmp_path / name,
            'warmup_epochs': 0,
            'fused': 'none',
            'no_cuda_graph': True,
            **changes,
        }
        main.main(toys.flags(**flags))
        return toys.log_rows(tmp_path / name)

    return run


def test_gpu_losses_match_cpu(rows, monkeypatch):
    # Random tokens and random-erasing noise are drawn on the device, and a GPU draws other numbers than a CPU.
    # Without them both see the same.
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    options = {'amp_dtype': 'float32', 'w_rand': 0, 'remode': 'const', 'epochs': 2, 'lr': 0.05}
    for here, there in zip(rows('gpu', **options), rows('cpu', device='cpu', **options), strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', None])
def test_every_precision_resumes(rows, tmp_path, dtype):
    rows('out', amp_dtype=dtype, clip_grad=1)
    first, second = rows('out', amp_dtype=dtype, clip_grad=1, epochs=2, resume=tmp_path / 'out' / 'checkpoint.pth')
    assert (first['epoch'], second['epoch']) == (0, 1)
    terms = [value for key, value in second.items() if key.startswith('train_loss_')]
    assert sum(terms) == pytest.approx(second['train_loss'], rel=1e-3)
    assert all(value > 0 for value in terms)


def test_gpu_augmentation_matches_cpu(rows):
    options = {'amp_dtype': 'float32', 'w_rand': 0, 'remode': 'const', 'device_augment': True, 'lr': 0.05}
    assert rows('gpu', **options)[0] == pytest.approx(rows('cpu', device='cpu', **options)[0], rel=1e-2, abs=1e-3)


def test_bfloat16_teacher_and_relations_with_accumulation(rows):
    plain = rows('plain')[0]
    short = rows('short', teacher_dtype='bfloat16', relation_dtype='bfloat16', accum_steps=2, batch_size=4)[0]
    assert short['train_loss'] == pytest.approx(plain['train_loss'], rel=0.1)


def test_host_never_waits_for_the_gpu_between_log_lines(rows, monkeypatch):
    over = loggers.Progress.over

    def strict(progress, loader, first=0):
        for number, batch in enumerate(over(progress, loader, first)):
            # The first step fills caches, and the last one prints.
            torch.cuda.set_sync_debug_mode('error' if number in (1, 2) else 'default')
            yield batch

    monkeypatch.setattr(loggers.Progress, 'over', strict)
    try:
        assert rows('out', print_freq=100, device_augment=True)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_one_nccl_rank_equals_a_plain_run(rows, tmp_path, monkeypatch):
    plain = rows('plain')
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}.items():
        monkeypatch.setenv(name, value)
    launched = rows('launched', dist_url=f'file://{tmp_path / "meet"}', relations='global')
    assert launched[0] == pytest.approx(plain[0], rel=1e-3, abs=1e-4)


def test_non_finite_loss_on_gpu_names_its_first_step(rows, tmp_path, capsys):
    teacher = toys.teacher()
    with torch.no_grad():
        teacher.head.bias[0] = torch.nan
    spoilt = toys.save(tmp_path / 'spoilt.pth', teacher.state_dict())
    with pytest.raises(SystemExit) as stopped:
        rows('out', teacher_path=spoilt, print_freq=100)
    assert stopped.value.code == 1
    assert 'not finite at step 0 of epoch 0 on rank 0: loss_dist, teacher logits; images ' in capsys.readouterr().err
    assert not toys.listing(tmp_path / 'out')


# The step as a CUDA graph ---------------------------------------------------------------------------------------------

# Three epochs of four steps, with everything on that draws random numbers; the last epoch has another learning rate.
LIVELY = {'epochs': 3, 'drop': 0.1, 'drop_path': 0.1, 'lr': 0.05, 'model_ema_decay': 0.5, 'clip_grad': 1, 'K': 20}


@pytest.fixture
def graph(rows, tmp_path, monkeypatch):
    """A function that trains a toy with --cuda-graph after so many steps, and returns what came of it."""

    def run(name: str, warm_up: int = 3, **changes) -> dict:
        monkeypatch.setattr(cuda_graph, 'WARM_UP', warm_up)
        rows(name, **{**LIVELY, 'cuda_graph': True, **changes})
        return toys.outcome(tmp_path / name)

    return run


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'accum_steps': 2, 'batch_size': 4, 'amp_dtype': 'float32'},
        {'teacher_dtype': 'bfloat16', 'relation_dtype': 'bfloat16', 'log_grad_share': True, 'eval_ema': True},
        {'compile': True},
        {'model': 'deit_tiny_distilled_patch16_224', 'device_augment': True, 'opt': 'adam'},
        {'compile': 'models', 'fused': 'relations full erasing', 'teacher_dtype': 'bfloat16'},
        {'grad_checkpointing': True},
        {'batch_size': 16, 'epochs': 6, 'log_grad_share': True},  # two steps per epoch: captured after an evaluation
    ],
    ids=['recipe', 'accumulated', 'bfloat16', 'compiled', 'two heads', 'all', 'checkpoints', 'short epochs'],
)
def test_replayed_steps_equal_launched_ones_to_the_bit(graph, capsys, changes):
    replayed = graph('replayed', **changes)
    assert 'cuda graph  captured in ' in capsys.readouterr().out
    assert toys.differing(replayed, graph('launched', 1000, **changes)) == set()


def test_by_default_all_parts_are_fused_and_steps_are_a_graph(graph, capsys):
    default = graph('default', cuda_graph=None, no_cuda_graph=None, fused=None)
    lines = capsys.readouterr().out.splitlines()
    assert 'fused       relations, full, erasing' in lines  # the toy's heads are too small for the other part
    assert any(line.startswith('cuda graph  captured in ') for line in lines)
    assert toys.differing(default, graph('asked', fused='relations full erasing')) == set()


def test_graph_trains_as_without_it(graph):
    for one, other in zip(graph('graph')['log'], graph('plain', cuda_graph=None)['log'], strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)


def test_resume_in_mid_epoch_goes_on_with_a_graph(graph, monkeypatch):
    whole, saving = graph('whole'), {'save_interval_steps': 1, 'keep': 20}

    with monkeypatch.context() as patch:
        toys.after_calls(patch, main.Trainer, 'train_step', 6, toys.kill)
        with pytest.raises(toys.KilledError):
            graph('resumed', **saving)
    assert toys.differing(graph('resumed', resume='auto', **saving), whole) == set()


def test_graph_on_one_nccl_rank_equals_a_plain_run(graph, tmp_path, monkeypatch):
    plain = graph('plain')
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}.items():
        monkeypatch.setenv(name, value)
    launched = graph('launched', dist_url=f'file://{tmp_path / "meet"}', no_repeated_aug=True)
    assert toys.differing(launched, plain) == set()


def test_step_that_waits_is_launched_and_the_place_is_named(graph, monkeypatch, capsys):
    launched, forward = graph('launched', 1000), main.ManifoldDistillationLoss.forward

    def waiting(self, student_out, *others):
        student_out[0].sum().item()
        return forward(self, student_out, *others)

    monkeypatch.setattr(main.ManifoldDistillationLoss, 'forward', waiting)
    waited = graph('waiting')
    assert 'the host waits for the GPU at test_cuda.py:' in capsys.readouterr().out
    assert toys.differing(waited, launched) == set()


@pytest.mark.parametrize('cause', ['not allowed here', 'CUDA out of memory'])
def test_step_that_cannot_be_captured_is_launched_and_the_cause_is_named(graph, monkeypatch, capsys, cause):
    launched, forward = graph('launched', 1000), main.ManifoldDistillationLoss.forward

    def failing(self, *args):
        if torch.cuda.is_current_stream_capturing():
            if 'memory' in cause:
                torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
            raise RuntimeError(f'{cause}\nand more')
        return forward(self, *args)

    monkeypatch.setattr(main.ManifoldDistillationLoss, 'forward', failing)
    run = graph('run')
    assert f'warning: --cuda-graph: the step cannot be captured ({cause}' in capsys.readouterr().out
    assert toys.differing(run, launched) == set()


def test_step_that_waits_in_its_capture_only_is_one_line(graph, monkeypatch, capsys):
    forward = main.ManifoldDistillationLoss.forward

    def waiting(self, student_out, *others):
        if torch.cuda.is_current_stream_capturing():
            student_out[0].sum().item()
        return forward(self, student_out, *others)

    monkeypatch.setattr(main.ManifoldDistillationLoss, 'forward', waiting)
    with pytest.raises(SystemExit) as stopped:
        graph('run')
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert '--cuda-graph: the step cannot be captured (' in error


def test_host_never_waits_between_log_lines_with_a_graph(graph, monkeypatch):
    step = main.Trainer.train_step

    def strict(trainer, *args):
        # From the fifth step on: the graph is captured and caches are full. The last step of an epoch prints.
        torch.cuda.set_sync_debug_mode('error' if trainer.state.step in (5, 6, 9, 10) else 'default')
        try:
            step(trainer, *args)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    monkeypatch.setattr(main.Trainer, 'train_step', strict)
    assert graph('run', print_freq=100, fused='erasing')['step'] == 12


def test_step_that_is_not_finite_is_withheld_and_named_in_a_replay(graph, monkeypatch, capsys):
    prepare = main.Trainer.prepare_batch

    def spoil(trainer, batch):
        images, targets = prepare(trainer, batch)
        return (images * torch.nan if trainer.state.step == 5 else images), targets

    monkeypatch.setattr(main.Trainer, 'prepare_batch', spoil)
    with pytest.raises(SystemExit) as stopped:
        graph('spoilt', print_freq=100)
    assert stopped.value.code == 1
    assert 'not finite at step 1 of epoch 1 on rank 0: loss_base, ' in capsys.readouterr().err


# The fused talking-heads attention ------------------------------------------------------------------------------------


@pytest.fixture
def fused_attention():
    """A function that returns timm's attention in float64 and the fused one, with the same weights."""
    if problem := fused_talking_heads_problem(torch.device(DEVICE, torch.cuda.current_device())):
        pytest.skip(problem)

    def make(heads: int, dtype: torch.dtype, channels: int = 48) -> tuple[torch.nn.Module, torch.nn.Module]:
        fused = attention(heads, channels).to(DEVICE, dtype)
        exact = copy.deepcopy(fused).double()
        use_fast_talking_heads(fused, fused=True)
        return exact, fused

    return make


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(('dtype', 'limit'), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize('heads', [4, 6, 8])
def test_fused_talking_heads_match_float64(fused_attention, heads, dtype, limit):
    for channels, tokens in ((48, 50), (48, 196), (48, 577), (32, 65), (64, 100)):
        exact, fused = fused_attention(heads, dtype, channels)
        plain = copy.deepcopy(exact).to(dtype)
        use_fast_talking_heads(plain)
        x = torch.randn(3, tokens, heads * channels, device=DEVICE, dtype=dtype)
        expected = exact(x.double())
        error = relative_error(fused(x), expected)
        assert error < limit
        # In float32 the products of the kernels are a little less exact than those of the plain attention.
        assert dtype == torch.float32 or error < 1.2 * relative_error(plain(x), expected)


def test_fused_talking_heads_under_autocast(fused_attention):
    exact, fused = fused_attention(8, torch.float32)
    x = torch.randn(2, 196, 384, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = fused(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact(x.double())) < 2e-2


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_fused_talking_heads_compile_without_graph_breaks(fused_attention, dtype):
    exact, fused = fused_attention(8, dtype)
    x = torch.randn(2, 196, 384, device=DEVICE, dtype=dtype)
    compiled = torch.compile(fused, fullgraph=True, dynamic=False)
    assert relative_error(compiled(x), exact(x.double())) < 2e-2
    assert relative_error(compiled(x), fused(x).double()) < 1e-2


def test_fused_talking_heads_replay_in_a_cuda_graph(fused_attention):
    _, fused = fused_attention(8, torch.bfloat16)
    x, other = torch.randn(2, 2, 196, 384, device=DEVICE, dtype=torch.bfloat16)
    fused(x)  # compiles the kernels
    torch.cuda.synchronize()
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        out = fused(given)
    for images in (other, x):
        given.copy_(images)
        graph.replay()
        assert torch.equal(out, fused(images))


def test_run_with_fused_talking_heads(rows, tmp_path):
    teacher = {'patch_size': 8, 'embed_dim': 64, 'depth': 6, 'num_heads': 4}
    options = {'teacher_kwargs': ' '.join(f'{key}={value}' for key, value in teacher.items())}
    options['teacher_path'] = toys.save(tmp_path / 'wide.pth', toys.teacher(**teacher).state_dict())
    plain = rows('plain', **options)[0]
    for name, changes in (('fused', {}), ('compiled', {'compile': True}), ('whole', {'compile': 'models'})):
        fused = rows(name, fused='talking-heads', **options, **changes)[0]
        assert fused['train_loss'] == pytest.approx(plain['train_loss'], rel=0.1)


# Erasing a batch in one kernel ----------------------------------------------------------------------------------------


@pytest.fixture
def erasing():
    """A function that returns normalised images (B, 3, size, size), rectangles and keys, on the CPU."""
    torch._dynamo.reset()

    def make(count: int, size: int = 224, rectangles: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        transforms.seed_augmentation(count)
        policy = RandomErasing(0.8, max_count=rectangles, device='cpu')
        places = torch.stack([transforms.draw_erasures(policy, size, size) for _ in range(count)])
        keys = [utils.counter_seed(0, 'augment', 0, number) for number in range(count)]
        return torch.randn(count, 3, size, size), places, torch.tensor(keys)

    return make


def on_gpu(tensors) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_compiled_erasing_matches_cpu(erasing, mode):
    for shape in ((16, 224, 1), (5, 37, 3)):
        images, places, keys = erasing(*shape)
        expected = transforms.erase_batch(images, places, keys, mode)
        call = utils.compile_for(transforms.erase_batch, torch.device(DEVICE))
        found = call(*on_gpu((images, places, keys)), mode).cpu()
        assert torch.equal(found == images, expected == images)
        assert not torch.equal(found, images)
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if mode == 'const' else 1e-5)


def test_compiled_erasing_of_a_whole_batch_is_finite_and_normal(erasing):
    images, places, keys = on_gpu(erasing(64))
    places[:] = torch.tensor([0, 0, 224, 224])
    found = utils.compile_for(transforms.erase_batch, images.device)(images, places, keys, 'pixel').double()
    assert found.isfinite().all()
    assert abs(found.mean()) < 4 / found.numel() ** 0.5
    assert abs(found.var() - 1) < 4 * (2 / found.numel()) ** 0.5


def test_preprocess_with_fused_erasing_replays_in_a_cuda_graph(erasing):
    preprocess = transforms.DevicePreprocess(*STATS, fused_erasing=True).to(DEVICE)
    batches = []
    for count in (8, 9):
        images, places, keys = on_gpu(erasing(count))
        batches.append(((images[:8] * 50 + 128).clamp(0, 255).to(torch.uint8), places[:8], keys[:8]))
    given = [tensor.clone() for tensor in batches[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        preprocess(given[0], {'erase': given[1], 'key': given[2]})  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = preprocess(given[0], {'erase': given[1], 'key': given[2]})
    for images, places, keys in (batches[1], batches[0]):
        for static, tensor in zip(given, (images, places, keys), strict=True):
            static.copy_(tensor)
        graph.replay()
        assert torch.equal(out, preprocess(images, {'erase': places.cpu(), 'key': keys.cpu()}))


def test_run_with_fused_erasing_matches_cpu(rows, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    options = {'amp_dtype': 'float32', 'w_rand': 0, 'fused': 'erasing', 'reprob': 1, 'lr': 0.05}
    assert rows('gpu', **options)[0] == pytest.approx(rows('cpu', device='cpu', **options)[0], rel=1e-3, abs=1e-4)


# Copying batches while the step before runs ---------------------------------------------------------------------------


class Batches(list):
    """Items as a training set has them."""

    def __getitem__(self, index: int) -> tuple:
        images = torch.full((3, 224, 224), index % 256, dtype=torch.uint8)
        return images, index, index, {'key': index, 'erase': torch.full((1, 4), index), 'plan': torch.zeros(2, 3)}


def prefetched() -> tuple[DataLoader, DataLoader]:
    """The same loader twice: plain, and copied to the GPU."""
    plain = DataLoader(Batches(range(16 * 32)), 32, pin_memory=True)
    return plain, prefetch_to_device(plain, torch.device(DEVICE, torch.cuda.current_device()), ('erase', 'key'))


def test_prefetched_batches_equal_plain_ones_while_the_device_is_busy():
    plain, loader = prefetched()
    weights, sums = torch.randn(4096, 4096, device=DEVICE), []
    for batch in loader:
        for _ in range(5):
            weights = (weights @ weights).div_(100).tanh_()  # the device falls behind: the memory of batches is reused
        images, targets, indices, aug_params = batch
        assert images.is_cuda
        assert (indices.device, aug_params['plan'].device) == (torch.device('cpu'),) * 2
        found = (images.double().sum((1, 2, 3)), targets, aug_params['key'], aug_params['erase'][:, 0, 0])
        sums.append(torch.stack([x.double() for x in found]))
    expected = [torch.stack([b[0].double().sum((1, 2, 3)), *[b[1].double()] * 3]) for b in plain]
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))


def test_host_never_waits_for_a_copy():
    loader = prefetched()[1]
    batches = iter(loader)
    next(batches)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for batch, _ in zip(batches, range(5), strict=False):
            batch[0].float().sum()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_copy_ends_while_the_step_before_still_runs():
    loader = prefetched()[1]
    batches = iter(loader)
    for _ in range(4):  # fills the caches of memory
        next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second: the step
    busy = torch.cuda.Event()
    busy.record()
    next(batches)
    start = time.monotonic()
    while not loader._stream.query() and time.monotonic() - start < 5:
        time.sleep(0.001)
    assert not busy.query()


def test_run_with_prefetching_equals_a_plain_run(rows, monkeypatch):
    options = {'amp_dtype': 'float32', 'epochs': 2, 'lr': 0.05, 'fused': 'erasing', 'device_augment': True}
    plain, train = rows('plain', **options), LoaderBuilder.train
    device = torch.device(DEVICE, torch.cuda.current_device())
    monkeypatch.setattr(
        LoaderBuilder, 'train', lambda *args: prefetch_to_device(train(*args), device, ('erase', 'key'))
    )
    for one, other in zip(rows('ahead', **options), plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


# The fused relation terms ---------------------------------------------------------------------------------------------

JOINT = ('sample', 'patch', 'rand')
# Tokens of student and teacher; the limits of value and gradient where the maps differ by 1e-5.
PAIRS = {
    'float32': (torch.float32, torch.float32, 2e-6, 2e-4),
    'mixed': (torch.float32, torch.bfloat16, 1e-5, 1e-3),
    'bfloat16': (torch.bfloat16, torch.bfloat16, 1e-5, 4e-3),  # the gradient is rounded to bfloat16
    'float16': (torch.float16, torch.float16, 1e-5, 1e-3),
}


def near_tokens(student: torch.dtype, teacher: torch.dtype, difference: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of 64 images, (64, 196, 192) with gradient and (64, 196, 384), whose maps differ by about `difference`."""
    return loss.near_tokens((64, 196, 192, 384), (student, teacher), difference, torch.device(DEVICE))


def value_and_gradient(term, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = term(student, teacher)
    (gradient,) = torch.autograd.grad(1e6 * value, student)  # so that float16 does not underflow
    return value.detach().double(), gradient.double()


def joint_terms(student, teacher, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    generator = generator or torch.Generator(DEVICE).manual_seed(3)
    return losses.relate_jointly([student], [teacher], JOINT, losses.RelationOptions(192, generator))[0]


@pytest.mark.parametrize('difference', [1e-3, 1e-5])
@pytest.mark.parametrize('pair', PAIRS)
def test_fused_relations_match_float64(pair, difference):
    torch._dynamo.reset()
    *dtypes, value_limit, gradient_limit = PAIRS[pair]
    student, teacher = near_tokens(*dtypes, difference)
    (chosen,) = draw_tokens([64 * 196], 192, torch.Generator(DEVICE).manual_seed(3), student.device)
    for name in JOINT:

        def exact(s, t, name=name):
            return losses.plain_map_distance(*(fused_losses.sets_of(name, x, chosen) for x in (s, t)))

        expected, gradient = value_and_gradient(exact, student.detach().double().requires_grad_(), teacher.double())
        found, found_gradient = value_and_gradient(lambda s, t, name=name: joint_terms(s, t)[name], student, teacher)
        assert relative_error(found, expected) < value_limit, name
        assert relative_error(found_gradient, gradient) < gradient_limit, name


@pytest.mark.parametrize('pair', PAIRS)
def test_fused_full_term_matches_float64(pair):
    torch._dynamo.reset()
    for difference, value_limit, gradient_limit in ((1e-3, 1e-5, 4e-3), (1e-5, 1e-3, 4e-3)):
        student, teacher = near_tokens(*PAIRS[pair][:2], difference)
        doubles = student.detach().double().requires_grad_(), teacher.double()
        expected, gradient = value_and_gradient(losses.full_loss, *doubles)
        found, found_gradient = value_and_gradient(lambda s, t: losses.full_loss(s, t, fused=True), student, teacher)
        assert relative_error(found, expected) < value_limit
        assert relative_error(found_gradient, gradient) < gradient_limit


@pytest.mark.parametrize('pair', PAIRS)
def test_fused_terms_replay_in_a_cuda_graph(pair):
    torch._dynamo.reset()
    student, teacher = near_tokens(*PAIRS[pair][:2], 1e-3)
    generator = torch.Generator(DEVICE)

    def step() -> list[torch.Tensor]:
        values = [*joint_terms(student, teacher, generator).values(), losses.full_loss(student, teacher, fused=True)]
        return [*(x.detach() for x in values), *torch.autograd.grad(sum(values), student)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        replayed = step()
    for seed in (0, 1, 0):
        generator.manual_seed(seed)
        graph.replay()
        seen = [x.clone() for x in replayed]
        generator.manual_seed(seed)
        assert all(map(torch.equal, seen, step()))


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_run_with_fused_losses(rows, dtype):
    options = {'K': 1000, 'teacher_dtype': dtype, 'log_grad_share': True}  # all tokens, so that both draw the same
    plain, fused = (
        rows(name, fused=fused, **options)[0] for name, fused in (('plain', None), ('fused', 'relations full'))
    )
    for name, value in plain.items():
        if 'loss' in name or 'share' in name:
            assert fused[name] == pytest.approx(value, rel=0.05, abs=1e-3), name


# Whole models compiled ------------------------------------------------------------------------------------------------


def test_run_with_whole_models_compiled(rows, capsys):
    options = {'epochs': 2, 'drop_path': 0, 'w_rand': 0, 'amp_dtype': 'float32'}
    plain = rows('plain', **options)
    capsys.readouterr()
    for one, other in zip(rows('whole', compile='models', **options), plain, strict=True):
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-3)
    text = capsys.readouterr().out
    assert 'student: first forward pass took' in text
    assert 'compiled per block' not in text


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_compiled_whole_model_replays_in_a_cuda_graph(side):
    reports: list[str] = []
    model = toys.student() if side == 'student' else toys.teacher()
    tapped = models.tap(model, [0, 1, -1], 32, two_heads=side == 'student')
    tapped = (models.freeze(tapped) if side == 'teacher' else tapped).to(DEVICE)
    models.compile_model(tapped, reports.append)
    images, other = torch.randn(2, 8, 3, 32, 32, device=DEVICE)
    given, stream = images.clone(), torch.cuda.Stream()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles
                tapped(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tapped(given)
        for x in (other, images):
            given.copy_(x)
            graph.replay()
            expected = tapped(x)
            assert torch.equal(out.logits, expected.logits)
            assert all(torch.equal(a, b) for a, b in zip(out.tokens, expected.tokens, strict=True))
    assert reports == []
