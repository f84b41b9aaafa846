"""What the flags build: learning rates, dropout, the criterion and repeated augmentation."""

import math

import numpy as np
import pytest
import timm
import torch
import toys

import checkpoints
import losses
import main
from flags import get_args_parser
from pair import build_student, build_teacher

pytestmark = pytest.mark.usefixtures('few_generated_images')


def test_learning_rate_follows_the_published_recipe():
    model = timm.create_model('deit_tiny_patch16_224')
    state = toys.state(model, epochs=None, batch_size=512, **toys.ALONE)  # the rest as in the release
    without, with_decay = sorted((len(g['params']), g['weight_decay']) for g in state.optimizer.param_groups)[::-1]
    assert (without, with_decay) == ((102, 0.0), (50, 0.05))
    rates = []
    for epoch in range(300):
        rates.append([group['lr'] for group in state.optimizer.param_groups])
        state.lr_scheduler.step(epoch)
    published = {0: 1e-6, 1: 1e-6, 2: 1.008e-4, 299: 1.0054e-5}
    assert {epoch: rates[epoch][0] for epoch in published} == pytest.approx(published, rel=1e-4)
    # Five epochs of warmup, then half a cosine over all 300. Everything comes one epoch late.
    warm = [1e-6 + t / 5 * (5e-4 - 1e-6) for t in range(5)]
    cosine = [1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * t / 300)) / 2 for t in range(5, 299)]
    expected = [1e-6, *warm, *cosine]
    np.testing.assert_allclose(rates, np.stack([expected, expected], axis=1), rtol=1e-9)


@pytest.mark.parametrize(('batch', 'scaled'), [(64, 6.25e-5), (1024, 1e-3)])
def test_batch_size_scales_only_the_peak_learning_rate(batch, scaled):
    state = toys.state(toys.student(), epochs=300, batch_size=batch, **toys.ALONE)
    rate = lambda: state.optimizer.param_groups[0]['lr']  # noqa: E731
    assert rate() == 1e-6
    state.lr_scheduler.step(5)
    assert rate() == pytest.approx(scaled, rel=1e-3)
    state.lr_scheduler.step(300)
    assert rate() == pytest.approx(1e-5)


def test_schedule_lags_one_epoch(run, epochs):
    # The peak is 64 * 5e-4 * 8/512 = 5e-4. After two epochs of warmup the cosine over four epochs is half done.
    rows = run(epochs=4, warmup_epochs=2, lr=64 * 5e-4)
    assert [row['train_lr'] for row in rows] == pytest.approx([1e-6, 1e-6, (1e-6 + 5e-4) / 2, (1e-5 + 5e-4) / 2])


def test_drop_sets_dropout_of_the_student_as_the_release_does(files):
    config = toys.config(drop=0.3, drop_path=0.2, teacher_path=files / 'teacher.pth').model
    student = build_student(config, 10)
    teacher = build_teacher(config, checkpoints.read_checkpoint(config.teacher_path))
    block = student.blocks[-1]
    on = [student.pos_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2]
    assert [module.p for module in on] == [0.3] * 4
    assert [module.p for module in (student.head_drop, block.attn.attn_drop)] == [0] * 2
    assert [path.drop_prob for path in (block.drop_path1, block.drop_path2)] == pytest.approx([0.2] * 2)
    assert {module.p for module in teacher.modules() if isinstance(module, torch.nn.Dropout)} == {0}


@pytest.mark.parametrize(('alpha', 'absent'), [(0, 'dist'), (1, 'base')])
def test_relation_terms_stay_at_alpha_0_and_1(run, alpha, absent):
    (row,) = run(distillation_alpha=alpha)
    assert {term for term in toys.TERMS if row[f'train_loss_{term}'] == 0} == {absent}


def test_criterion_gets_the_weights_of_the_flags(run, monkeypatch):
    seen = []
    build = main.build_criterion
    monkeypatch.setattr(main, 'build_criterion', lambda *args: seen.append(build(*args)) or seen[-1])
    names = ['alpha', 'tau', 'beta', 'K', 'relations']
    values, weights = [0.25, 2.0, 3.0, 7, 'global'], {'sample': 0.1, 'patch': 4.0, 'rand': 0.2, 'full': 0.5}
    options = {f'distillation_{name}' if i < 3 else name: values[i] for i, name in enumerate(names)}
    run(**options, **{f'w_{name}': weight for name, weight in weights.items()})
    assert [getattr(seen[0], name) for name in names] == values
    assert seen[0].weights == weights


def test_no_block_lists_means_no_relation_terms(run, capsys):
    (row,) = run(s_id=None, t_id=None)
    toys.assert_sound(row)
    assert {term for term in toys.TERMS if row[f'train_loss_{term}'] == 0} == set(toys.TERMS[2:])
    assert 'no relation terms' in capsys.readouterr().out


def test_full_term_is_off_by_default(run):
    (row,) = run(w_full=None)
    toys.assert_sound(row)
    assert {term for term in toys.TERMS if row[f'train_loss_{term}'] == 0} == {'mf_full'}


def test_global_relations_of_one_process_equal_rank_relations(run, tmp_path):
    one, other = (run(relations=relations, output_dir=tmp_path / relations) for relations in ('rank', 'global'))
    assert one == other


@pytest.mark.parametrize(('typed', 'said'), [(True, 'repeated augmentation: 3 distinct'), (None, 'without repeats')])
def test_one_process_repeats_images_only_on_request(run, epochs, capsys, typed, said):
    run(repeated_aug=typed)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ('decay', 'count', 'warns'), [(0.5, 2, True), (0.5, 3, False), (0.99996, 3, True), (0, 2, False)]
)
def test_ema_slower_than_the_run_gives_a_warning(run, epochs, capsys, decay, count, warns):
    run(model_ema_decay=decay, epochs=count)  # two steps an epoch
    assert ('--model-ema-decay' in capsys.readouterr().out) is warns


def test_student_is_in_train_mode_unless_fine_tuned(run, epochs):
    run(**toys.ALONE)
    assert epochs[0].train_mode is True


def test_same_seed_gives_the_same_run(run, tmp_path):
    rows = [run(seed=seed, output_dir=tmp_path / name) for seed, name in [(1, 'a'), (1, 'b'), (2, 'c')]]
    assert rows[0] == rows[1]
    assert all(rows[0][0][f'train_loss_{term}'] != rows[2][0][f'train_loss_{term}'] for term in toys.TERMS)


def test_start_epoch_works_without_a_checkpoint(run):
    rows = run(**toys.ALONE, start_epoch=2, epochs=3, warmup_epochs=4, lr=0.5)
    assert [row['epoch'] for row in rows] == [2]
    # The schedule lags one epoch, so epoch 2 is one quarter into the warmup. Its end is 0.5·8/512.
    assert rows[0]['train_lr'] == pytest.approx(1e-6 + (0.5 * 8 / 512 - 1e-6) / 4)


def test_new_relation_term_is_one_function_and_one_row(run, monkeypatch, capsys):
    def image_means(student, teacher, options) -> torch.Tensor:
        return losses.plain_map_distance(student.mean(dim=1), teacher.mean(dim=1))

    row = losses.RelationTerm(image_means, 0.0, 'weight of relations between the means of images', 'means', reads=())
    monkeypatch.setitem(losses.RELATION_TERMS, 'means', row)
    (logged,) = run(w_means=3)
    assert logged['train_loss_mf_means'] > 0
    toys.assert_sound({key: value for key, value in logged.items() if key != 'train_loss_mf_means'} | {
        'train_loss': logged['train_loss'] - logged['train_loss_mf_means']})  # fmt: skip
    assert ' + 3·means)' in capsys.readouterr().out
    assert 'weight of relations between the means of images' in get_args_parser().format_help()
    run(**toys.ALONE, w_means=3, w_full=0, resume=None, output_dir=None)
    assert 'warning: --w-means: no effect without a teacher' in capsys.readouterr().out
