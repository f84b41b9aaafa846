"""The tools for finished runs: learning curves, relation maps, export; and the commands of docs/use.md."""

import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import toys
from PIL import Image

import datasets
import losses
import main
import models
import tools.export
import tools.plot
import tools.relations
import tools.report
import transforms

pytestmark = pytest.mark.more

TOOLS = {'export': tools.export, 'plot': tools.plot, 'relations': tools.relations, 'report': tools.report}
SIZE = 32
ONNX = tools.export.PACKAGES['onnx']


@pytest.fixture(scope='module')
def folder(files, tmp_path_factory):
    """A finished toy run of two epochs, whose moving average differs from its weights; two images beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, 'FAKE_TRAIN', toys.TRAIN_IMAGES)
        patch.setattr(datasets, 'FAKE_VAL', toys.VAL_IMAGES)
        root = tmp_path_factory.mktemp('finished')
        changes = {'epochs': 2, 'lr': 1, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'eval_ema': True}
        main.main(toys.flags(**changes, output_dir=root / 'run', teacher_path=files / 'teacher.pth'))
    rows = toys.log_rows(root / 'run')
    for row in rows:  # of eight images, both may classify equally many
        row['test_ema_acc1'] += 0.5
    (root / 'run' / 'log.txt').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for i, name in enumerate(('a.png', 'b.png')):
        toys.noise(SIZE, SIZE, i).save(root / name)
    return root


@pytest.fixture
def images(folder):
    return ['--images', str(folder / 'a.png'), str(folder / 'b.png')]


def error_of(capsys, tool: str, *argv: object) -> str:
    """The line on stderr of a command that is refused with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        TOOLS[tool].main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count('\n') == 1
    return error


# Learning curves ------------------------------------------------------------------------------------------------------


def write_log(path: Path, epochs: int = 3, **more: float) -> Path:
    """A log with the keys of the 2022 release, and more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict.fromkeys(sorted(toys.RELEASE_KEYS), 0.5) | {'epoch': i, 'test_acc1': 10.0 * i} for i in range(epochs)]
    path.write_text(''.join(json.dumps(row | more) + '\n' for row in rows))
    return path


def lines(panel) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}


def title(panel) -> str:
    return panel.get_title().split(':')[0]


def test_curves_of_a_run_are_those_of_its_log(folder):
    rows = toys.log_rows(folder / 'run')
    figure = tools.plot.draw(tools.plot.read_curves([str(folder / 'run')]), teacher=83.5)
    accuracy, rate, _, loss = figure.axes  # the third is the throughput
    found = lines(accuracy)
    assert found['run'] == ([1, 2], [row['test_acc1'] for row in rows])
    assert found['run, EMA'] == ([1, 2], [row['test_ema_acc1'] for row in rows])
    assert set(found['teacher (83.5)'][1]) == {83.5}
    assert accuracy.get_ylim()[1] > 83.5
    assert list(lines(rate).values()) == [([1, 2], [row['train_lr'] for row in rows])]
    names = {'sum': 'train_loss', 'CE': 'train_loss_base', 'KD': 'train_loss_dist', 'sample': 'train_loss_mf_sample',
             'patch': 'train_loss_mf_patch', 'random': 'train_loss_mf_rand', 'full': 'train_loss_mf_full'}  # fmt: skip
    assert lines(loss) == {name: ([1, 2], [row[key] for row in rows]) for name, key in names.items()}


def test_log_of_the_release_has_no_ema_no_full_term_and_no_throughput(tmp_path):
    figure = tools.plot.draw(tools.plot.read_curves([str(write_log(tmp_path / 'release' / 'log.txt'))]))
    assert [title(panel) for panel in figure.axes] == ['accuracy', 'learning rate', 'loss']
    assert lines(figure.axes[0]) == {'release': ([1, 2, 3], [0.0, 10.0, 20.0])}
    assert list(lines(figure.axes[2])) == ['sum', 'CE', 'KD', 'sample', 'patch', 'random']


def test_throughput_is_the_median_of_the_metrics_of_each_epoch(tmp_path):
    path = write_log(tmp_path / 'run' / 'log.txt', 2)
    rows = [{'step': i, 'epoch': i // 3, 'images_per_second': 10.0 * i, 'data_share': 0.1} for i in range(6)]
    (path.parent / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    figure = tools.plot.draw(tools.plot.read_curves([str(path.parent)]))
    (panel,) = [panel for panel in figure.axes if 'throughput' in panel.get_title()]
    assert panel.lines[0].get_ydata().tolist() == [10.0, 40.0]


def test_terms_that_are_0_are_not_drawn_and_unknown_terms_are(tmp_path):
    path = write_log(tmp_path / 'log.txt', train_loss_mf_patch=0, train_loss_mf_new=0.25)
    figure = tools.plot.draw(tools.plot.read_curves([str(path)]))
    assert list(lines(figure.axes[2])) == ['sum', 'CE', 'KD', 'sample', 'random', 'mf_new']


def test_several_runs_share_panels_and_have_a_loss_panel_each(tmp_path):
    paths = [write_log(tmp_path / name / 'run' / 'log.txt', n, images_per_s=9.0) for name, n in (('a', 3), ('b', 1))]
    figure = tools.plot.draw(tools.plot.read_curves([str(path.parent) for path in paths]))
    accuracy, rate, throughput, *losses_ = figure.axes
    assert list(lines(accuracy)) == ['a/run', 'b/run']  # as much of the path as tells them apart
    assert accuracy.lines[1].get_marker() == 'o'  # a line with one point would be invisible
    assert len(rate.lines) == 2
    assert [line.get_ydata()[0] for line in throughput.lines] == [9.0, 9.0]
    assert [panel.get_title() for panel in losses_] == ['loss: a/run', 'loss: b/run']
    assert losses_[0].get_ylim() == losses_[1].get_ylim()


def test_texts_of_a_figure_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ['short', 'a_rather_long_name_of_a_folder_with_many_words_in_it', 'c', 'd', 'e']
    sources = [str(write_log(tmp_path / name / 'log.txt', 300, test_ema_acc1=3.0)) for name in names]
    figure = tools.plot.draw(tools.plot.read_curves(sources), teacher=80.0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [panel.get_tightbbox(renderer) for panel in figure.axes]  # with titles and labels
    assert len(boxes) == 2 + 2 + len(names)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    page = figure.bbox
    assert all(page.x0 <= a.x0 and a.x1 <= page.x1 and page.y0 <= a.y0 and a.y1 <= page.y1 for a in boxes)


@pytest.mark.parametrize('ending', ['png', 'svg', 'pdf'])
def test_plot_writes_a_figure(folder, tmp_path, ending):
    out = tmp_path / f'curves.{ending}'
    assert tools.plot.main([str(folder / 'run'), '--out', str(out)]) == 0
    assert {'png': b'\x89PNG', 'svg': b'<?xml', 'pdf': b'%PDF'}[ending] == out.read_bytes()[: 5 - (ending != 'svg')]


def test_bad_input_of_plot(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'log.txt').write_text('')
    run, out = folder / 'run', ['--out', tmp_path / 'a.png']
    error = error_of(capsys, 'plot', tmp_path / 'empty', *out)
    assert f'RUN {tmp_path / "empty"}: {tmp_path / "empty" / "log.txt"}: No such file' in error
    assert 'log.txt has no rows' in error_of(capsys, 'plot', tmp_path, *out)
    assert f'RUN {folder / "a.png"}:' in error_of(capsys, 'plot', folder / 'a.png', *out)
    assert '--out a.gif' in error_of(capsys, 'plot', run, '--out', 'a.gif')
    assert '--out /nowhere/a.png' in error_of(capsys, 'plot', run, '--out', '/nowhere/a.png')
    assert '--teacher: 835: must be a percentage' in error_of(capsys, 'plot', run, '--teacher', '835')
    assert '--colour' in error_of(capsys, 'plot', run, '--colour')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert 'package matplotlib' in error_of(capsys, 'plot', run, *out)


# Relation maps --------------------------------------------------------------------------------------------------------


def patch_term(student: torch.nn.Module, teacher: torch.nn.Module, image: torch.Tensor, block: int) -> float:
    """The patch term by its definition, from models with own hooks."""
    tokens = []
    for model in (student.eval(), teacher.eval()):
        with torch.no_grad():
            tokens.append(models.tap(model, [block], SIZE)(image[None]).tokens[0])
    return losses.plain_map_distance(*tokens).item()


def test_distances_are_the_patch_terms_of_the_checkpoint(folder, files, images, tmp_path, capsys):
    """Equal to those of the models built by hand: the student at the seed of the run and after it."""
    argv = [str(folder / 'run'), *images, '--pairs', '2', '0', '--out', str(tmp_path / 'a.png')]
    assert tools.relations.main(argv) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines() if '.png ' in line]
    torch.manual_seed(0)
    before, after, teacher = toys.student(), toys.student(), toys.teacher()
    after.load_state_dict(toys.load(folder / 'run' / 'checkpoint.pth')['model'])
    pixels = [toys.as_bytes(toys.noise(SIZE, SIZE, i)) for i in (0, 1)]
    inputs = transforms.DevicePreprocess(*models.normalisation(after))(torch.stack(pixels))
    expected = []
    for name, image in zip(('a.png', 'b.png'), inputs, strict=True):
        for block, other in ((-1, '5'), (0, '0')):
            values = (patch_term(model, teacher, image, block) for model in (before, after))
            expected.append([name, str(block % 4), other, *(f'{value:.5f}' for value in values)])
    assert found == expected
    assert found[0][3] != found[0][4]
    with Image.open(tmp_path / 'a.png') as figure:
        assert figure.width > 1000


def test_student_before_is_that_of_the_run(run, epochs, few_generated_images, tmp_path, images, capsys):
    """With training replaced by nothing, the student after the run is the student before it."""
    run(seed=5)
    assert len(epochs) == 1
    assert tools.relations.main([str(tmp_path), *images, '--out', str(tmp_path / 'a.png')]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if '.png ' in line]
    assert [row[1:3] for row in rows] == [['0', '0'], ['1', '1'], ['3', '5']] * 2
    assert all(row[3] == row[4] != '0.00000' for row in rows)


def test_before_and_ema_choose_the_weights(folder, images, tmp_path, capsys):
    ema = toys.save(tmp_path / 'ema.pth', {'model': toys.load(folder / 'run' / 'checkpoint.pth')['model_ema']})
    argv = [str(folder / 'run'), *images, '--before', ema, '--ema', '--out', str(tmp_path / 'a.png')]
    assert tools.relations.main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if '.png ' in line]
    assert all(row[3] == row[4] for row in rows)


def test_a_run_without_teacher_takes_one_from_the_flags(folder, files, images, tmp_path, capsys):
    """Control runs can be compared with a teacher that they did not have."""
    state = {'model': toys.student().state_dict(), 'args': toys.config(**toys.ALONE).flags()}
    alone, out = toys.save(tmp_path / 'alone.pth', state), ['--out', tmp_path / 'a.png']
    assert "--teacher-path ''" in error_of(capsys, 'relations', alone, *images, *out)
    argv = [alone, *images, *map(str, out), '--teacher-path', str(files / 'teacher.pth')]
    assert tools.relations.main(argv) == 0
    # --s-id auto is 0 1 2 3, --t-id auto is 0 1 4 5; the first pair, the middle one and the last are shown.
    blocks = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if 'a.png  ' in line]
    assert blocks == [['0', '0'], ['2', '4'], ['3', '5']]


def test_checkpoint_of_the_release_has_its_pairs_and_teacher_in_a_namespace(files, images, tmp_path, capsys):
    args = argparse.Namespace(
        model='deit_tiny_patch16_224', input_size=SIZE, s_id=[1], t_id=[4], seed=3, finetune='', drop_path=0.1,
        teacher_model='cait_s24_224', teacher_path=str(files / 'teacher.pth'), distillation_type='soft', gpu=0,
    )  # fmt: skip
    path = toys.save(tmp_path / 'release.pth', toys.as_release(toys.student().state_dict()) | {'args': args})
    shapes = ['--model-kwargs', *toys.RUN['model_kwargs'].split()]
    shapes += ['--teacher-kwargs', *toys.RUN['teacher_kwargs'].split()]
    argv = [path, *images, '--out', str(tmp_path / 'a.png'), *shapes]
    assert tools.relations.main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if '.png  ' in line]
    assert [row[:3] for row in rows] == [['a.png', '1', '4'], ['b.png', '1', '4']]


def test_figure_of_relation_maps():
    maps = [torch.full((4, 4), value) for value in (0.5, 0.25, 0.4)]
    row = tools.relations.Row(0, (3, 5), *maps)
    assert row.distances == pytest.approx((0.0625, 0.01))
    panels = tools.relations.draw([row, row], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).axes
    shown = [float(panel.images[0].get_array().mean()) for panel in panels[1:6]]
    assert shown == pytest.approx([0.5, 0.25, 0.4, 0.25, 0.1])
    assert [panel.get_xlabel() for panel in panels[4:6]] == ['mean square 0.062', 'mean square 0.01']
    assert panels[1].get_ylabel() == 'student block 3\nteacher block 5'
    assert not panels[6].axison  # an image is shown once


def test_bad_input_of_relations(folder, files, images, tmp_path, capsys):
    run, out = folder / 'run', ['--out', tmp_path / 'a.png']
    assert '--images' in error_of(capsys, 'relations', run, *out)
    assert f'--images {tmp_path}/no.png' in error_of(capsys, 'relations', run, '--images', tmp_path / 'no.png', *out)
    assert '--pairs 3: the run has 3 pairs' in error_of(capsys, 'relations', run, *images, '--pairs', 3, *out)
    assert '--teacher-path gone.pth' in error_of(capsys, 'relations', run, *images, '--teacher-path', 'gone.pth', *out)
    assert '--s-id 9' in error_of(capsys, 'relations', run, *images, '--s-id', 9, '--t-id', 1, *out)
    assert f'RUN {tmp_path}:' in error_of(capsys, 'relations', tmp_path, *images, *out)
    assert '--model' in error_of(capsys, 'relations', files / 'student.pth', *images, *out)
    before = files / 'words.pth'
    assert f'--before {before}' in error_of(capsys, 'relations', run, *images, '--before', before, *out)
    assert not (tmp_path / 'a.png').exists()


# Export ---------------------------------------------------------------------------------------------------------------


def checkpoint_logits(model: torch.nn.Module, state: dict, images: torch.Tensor) -> torch.Tensor:
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(images)


@torch.no_grad()
def exported_logits(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the files that are in a folder, read without this program."""
    found = {'timm': timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)}
    if (folder / 'model.pt2').exists():
        found['torch'] = torch.export.load(folder / 'model.pt2').module()(images)
    if (folder / 'model.onnx').exists():
        session = pytest.importorskip('onnxruntime').InferenceSession(folder / 'model.onnx')
        found['onnx'] = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    return found


@pytest.mark.parametrize('ema', [False, True], ids=['raw', 'ema'])
def test_exported_files_give_the_logits_of_the_checkpoint(folder, tmp_path, capsys, ema):
    argv = [str(folder / 'run'), '--to', str(tmp_path / 'out'), *(['--ema'] if ema else [])]
    assert tools.export.main(argv) == 0
    checkpoint, images = toys.load(folder / 'run' / 'checkpoint.pth'), torch.randn(5, 3, SIZE, SIZE)
    keys = ('model_ema', 'model') if ema else ('model', 'model_ema')
    expected, other = (checkpoint_logits(toys.student(), checkpoint[key], images) for key in keys)
    found = exported_logits(tmp_path / 'out', images)
    assert found.keys() == {'timm', 'torch'}
    for logits in found.values():
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert (logits - other).abs().max() > 1e-3
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(('timm ', 'torch '))]
    assert all(float(row[1]) <= 1e-5 and float(row[2]) > 0 for row in table)
    row = toys.log_rows(folder / 'run')[-1]
    accuracy = row['test_ema_acc1' if ema else 'test_acc1']
    assert f'**Acc@1:** {accuracy:.2f} %' in (tmp_path / 'out' / 'README.md').read_text()


def test_export_to_onnx(folder, tmp_path):
    for package in ONNX:
        pytest.importorskip(package)
    assert tools.export.main([str(folder / 'run'), '--to', str(tmp_path / 'out'), '--formats', 'timm,onnx']) == 0
    images = torch.randn(5, 3, SIZE, SIZE)
    state = toys.load(folder / 'run' / 'checkpoint.pth')['model']
    logits = exported_logits(tmp_path / 'out', images)['onnx']
    torch.testing.assert_close(logits, checkpoint_logits(toys.student(), state, images), atol=1e-5, rtol=0)


def test_export_of_two_heads_returns_their_mean(tmp_path):
    """Of a checkpoint of the release, whose flags are a Namespace."""
    kwargs = {**toys.STUDENT, 'num_classes': 7, 'img_size': SIZE}
    model = timm.create_model('deit_tiny_distilled_patch16_224', **kwargs)
    args = argparse.Namespace(model='deit_tiny_distilled_patch16_224', input_size=SIZE, gpu=0, dist_backend='nccl')
    path = toys.save(tmp_path / 'release.pth', toys.as_release(model.state_dict()) | {'args': args})
    words = toys.RUN['model_kwargs'].split()
    assert tools.export.main([path, '--to', str(tmp_path / 'out'), '--model-kwargs', *words]) == 0
    images = torch.randn(2, 3, SIZE, SIZE)
    model.set_distilled_training(True)
    with torch.no_grad():
        heads = model.train()(images)
    expected = (heads[0] + heads[1]) / 2
    for logits in exported_logits(tmp_path / 'out', images).values():
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_export_of_bare_weights_needs_the_model(files, tmp_path, capsys):
    source, out = files / 'student.pth', ['--to', tmp_path / 'out']
    assert '--model' in error_of(capsys, 'export', source, *out)
    words = toys.RUN['model_kwargs'].split()
    argv = [str(source), *map(str, out), '--model', 'deit_tiny_patch16_224', '--input-size', str(SIZE), '--formats']
    assert tools.export.main([*argv, 'timm', '--model-kwargs', *words]) == 0
    assert 'Acc@1' not in (tmp_path / 'out' / 'README.md').read_text()


def test_what_the_checkpoint_says_of_its_student_is_in_the_config(tmp_path):
    kept = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'num_classes': 3, 'classes': ['cat', 'dog', 'owl']}
    state = {'model': toys.student(num_classes=3).state_dict(), 'args': toys.config(**toys.ALONE).flags()}
    path = toys.save(tmp_path / 'a.pth', {**state, 'student': kept})
    assert tools.export.main([path, '--to', str(tmp_path / 'out'), '--formats', 'timm']) == 0
    config = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).pretrained_cfg
    assert [tuple(config[key]) for key in ('mean', 'std')] == [kept['mean'], kept['std']]
    assert config['num_classes'] == 3
    assert list(config['label_names']) == kept['classes']
    assert config['input_size'] == (3, SIZE, SIZE)
    assert 'license' not in config  # that of timm's own weights does not hold for these


@pytest.mark.parametrize(('size', 'image'), [(32, (32, 32)), (48, (100, 70))])
def test_preprocessing_in_the_config_is_that_of_evaluation(tmp_path, size, image):
    """timm's transform, made from the exported config, gives the pixels of this program's evaluation."""
    flags = toys.config(**toys.ALONE, input_size=size).flags()
    path = toys.save(tmp_path / 'a.pth', {'model': toys.student(size=size).state_dict(), 'args': flags})
    assert tools.export.main([path, '--to', str(tmp_path / 'out'), '--formats', 'timm']) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    picture = toys.noise(*image)
    found = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)
    pixels = transforms.build_eval_transform(size)(picture)
    torch.testing.assert_close(found, transforms.DevicePreprocess(*models.normalisation(model))(pixels))


def test_exported_folder_is_evaluated_like_the_run_and_can_teach(folder, run, few_generated_images, tmp_path, capsys):
    source = f'local-dir:{tmp_path / "out"}'
    assert tools.export.main([str(folder / 'run'), '--to', str(tmp_path / 'out'), '--formats', 'timm']) == 0
    own = {'model': source, 'model_kwargs': None, 'finetune': source}
    main.main(toys.flags(**{**toys.ALONE, **own, 'eval': True}))
    last = toys.log_rows(folder / 'run')[-1]
    result = f'Acc@1 {last["test_acc1"]:.3f} Acc@5 {last["test_acc5"]:.3f} loss {last["test_loss"]:.3f}'
    assert result in capsys.readouterr().out
    rows = run(teacher_model=source, teacher_kwargs=None, teacher_path=None, output_dir=tmp_path / 'taught')
    toys.assert_sound(rows[0], absent=set())


def test_export_that_differs_ends_with_status_1(folder, tmp_path, capsys, monkeypatch):
    """If one format is wrong, the others are written and it is named."""
    write, load = tools.export.FORMATS['torch']
    monkeypatch.setitem(tools.export.FORMATS, 'torch', (write, lambda folder: lambda x: load(folder)(x) + 1e-3))
    assert tools.export.main([str(folder / 'run'), '--to', str(tmp_path / 'out'), '--formats', 'torch,timm']) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'torch: the logits differ' in error
    assert (tmp_path / 'out' / 'model.safetensors').exists()


def test_push_gives_timm_what_the_files_have(folder, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(tools.export, 'push_to_hf_hub', lambda *args, **options: calls.append((args, options)))
    argv = [str(folder / 'run'), '--to', str(tmp_path / 'out'), '--formats', 'timm', '--push', 'me/student']
    assert tools.export.main(argv) == 0
    ((model, name), options) = calls[0]
    assert name == 'me/student'
    assert options.pop('safe_serialization') is True
    assert options.pop('model_card')['details']['Teacher'] == 'cait_s24_224'
    timm.models.save_for_hf(model, str(tmp_path / 'pushed'), safe_serialization=True, **options)
    for file in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'pushed' / file).read_bytes() == (tmp_path / 'out' / file).read_bytes()

    def fail(*_, **__) -> None:
        raise RuntimeError('401: not\nlogged in')

    monkeypatch.setattr(tools.export, 'push_to_hf_hub', fail)
    assert '--push me/student: 401: not logged in' in error_of(capsys, 'export', *argv)


def test_bad_input_of_export(folder, files, tmp_path, capsys, monkeypatch):
    run, out = folder / 'run', ['--to', tmp_path / 'out']
    assert '--to' in error_of(capsys, 'export', run)
    assert f'--to {run}: contains' in error_of(capsys, 'export', run, '--to', run)
    assert '--formats: timm,tflite' in error_of(capsys, 'export', run, *out, '--formats', 'timm,tflite')
    assert '--push student' in error_of(capsys, 'export', run, *out, '--push', 'student')
    assert f'RUN {files / "text.pth"}' in error_of(capsys, 'export', files / 'text.pth', *out)
    assert '--model no_net' in error_of(capsys, 'export', run, *out, '--model', 'no_net')
    assert 'does not fit the model' in error_of(capsys, 'export', run, *out, '--model-kwargs', 'depth=3')
    state = {'model': toys.student().state_dict(), 'args': toys.config(**toys.ALONE).flags()}
    assert '--ema' in error_of(capsys, 'export', toys.save(tmp_path / 'a.pth', state), *out, '--ema')
    monkeypatch.setattr(tools.export.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install onnx onnxruntime onnxscript' in error_of(capsys, 'export', run, *out, '--formats', 'onnx')
    assert not (tmp_path / 'out').exists()


# The page -------------------------------------------------------------------------------------------------------------


def blocks_of_page() -> list[tuple[str, str]]:
    return re.findall(r'```(bash|python)\n(.*?)```', (toys.ROOT / 'docs' / 'use.md').read_text(), re.DOTALL)


def run_command(line: str) -> None:
    words = shlex.split(line)
    if words[:2] == ['python', '-m']:
        assert TOOLS[words[2].removeprefix('tools.')].main(words[3:]) == 0
    else:
        assert words[:2] == ['pip', 'install']
        assert words[2:] == list(ONNX)


def test_commands_of_the_page_run_one_after_the_other(folder, tmp_path, monkeypatch):
    for name in ('OUT', 'SOFT'):
        shutil.copytree(folder / 'run', tmp_path / name)
    for name in ('a.png', 'b.png', 'image.png'):
        shutil.copy(folder / 'a.png', tmp_path / name)
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(tools.export, 'push_to_hf_hub', lambda model, name, **_: pushed.append(name))
    toy = f"'deit_tiny_patch16_224', num_classes=10, img_size={SIZE}, **{toys.STUDENT}"
    has_onnx = all(tools.export.importlib.util.find_spec(package) for package in ONNX)
    for language, text in blocks_of_page():
        if 'onnx' in text and not has_onnx:
            continue
        if language == 'bash':
            for line in text.splitlines():
                run_command(line)
        else:
            names: dict = {}
            exec(text.replace("'deit_tiny_patch16_224', num_classes=1000", toy).replace('224, 224', '32, 32'), names)
            assert 'probabilities' not in names or names['probabilities'].shape == (1, 10)
    assert pushed == ['OWNER/NAME']
    assert (tmp_path / 'relations.png').exists()
    assert (tmp_path / 'report.html').exists()
