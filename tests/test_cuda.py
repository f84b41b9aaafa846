"""Tests that need a GPU. They are skipped without one."""

import copy

import pytest
import torch
import toys
from interpret import attention

import datasets
import loggers
import main
import models
from models.talking_heads import fused_talking_heads_problem, use_fast_talking_heads

DEVICE = 'cuda'
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
