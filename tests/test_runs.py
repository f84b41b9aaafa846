"""Toy runs on generated images: logs, the summary at the start, and pairs of models."""

import json

import pytest
import safetensors.torch
import timm
import torch
import toys

import engine
import main
import pair

pytestmark = pytest.mark.usefixtures('few_generated_images')


@pytest.mark.parametrize('kind', ['none', 'soft', 'hard'])
def test_every_distillation_type_logs_the_release_keys(run, tmp_path, kind):
    (row,) = run(**({**toys.ALONE, 'distillation_type': kind} if kind == 'none' else {'distillation_type': kind}))
    toys.assert_sound(row)
    assert row['n_parameters'] == sum(p.numel() for p in toys.student().parameters())
    assert (row['epoch'], row['train_lr']) == (0, 1e-6)
    absent = {term for term in toys.TERMS if row[f'train_loss_{term}'] == 0}
    assert absent == (set(toys.TERMS) - {'base'} if kind == 'none' else set())
    checkpoint = toys.load(tmp_path / 'checkpoint.pth')
    keys = {'model', 'optimizer', 'lr_scheduler', 'epoch', 'model_ema', 'scaler', 'args', 'best_acc1', 'versions'}
    keys |= {'position', 'step', 'meters', 'data', 'student', 'checksums', 'repeated_aug', 'ranks', 'format'}
    assert checkpoint.keys() == keys
    assert (checkpoint['epoch'], checkpoint['args']['distillation_type']) == (0, kind)
    toys.student().load_state_dict(checkpoint['model'], strict=True)


# Each of these failed in the release, or is easily forgotten.
@pytest.mark.parametrize(
    'changes',
    [
        {'mixup': 0},
        {'cutmix': 0},
        {'mixup': 0, 'cutmix': 0, 'batch_size': 5},
        {'mixup': 0, 'cutmix': 0, 'smoothing': 0},
        {'mixup_mode': 'elem', 'cutmix_minmax': '0.2 0.8'},
        {'aa': 'none'},
        {'aa': ''},
        {'aa': '', 'color_jitter': 0, 'reprob': 0, 'train_interpolation': 'random', 'input_size': 32},
        {'repeated_aug': True},
        {'no_model_ema': True},
        {'model_ema_force_cpu': True, 'eval_ema': True},
        {'amp_dtype': 'float16'},
        {'amp_dtype': 'bfloat16'},
        {'clip_grad': 1, 'drop': 0.1, 'drop_path': 0.1},
        {'opt': 'sgd', 'sched': 'step'},
        {'opt_betas': '0.9 0.99', 'lr_noise': '0.1 0.9'},
        {'K': 10**6},
        {'s_id': '-1 0 0', 't_id': '0 -1 3'},
        {'model': 'vit_small_patch14_reg4_dinov2'},
        {'model': 'deit_tiny_distilled_patch16_224', 'distillation_alpha': 1},
        {'teacher_model': 'deit_tiny_distilled_patch16_224', 'teacher_path': '{two_headed}'},
    ],
    ids=lambda changes: ' '.join(f'{key}={value}' for key, value in changes.items()),
)
def test_run_with_these_flags_trains(run, tmp_path, changes):
    torch.manual_seed(3)
    two_headed = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=10, img_size=32, **toys.TEACHER)
    path = toys.save(tmp_path / 'two_headed.pth', two_headed.state_dict())
    (row,) = run(**{k: path if v == '{two_headed}' else v for k, v in changes.items()})
    toys.assert_sound(row)
    assert row['train_loss_dist'] > 0
    assert row['train_loss_mf_rand'] > 0
    assert ('model_ema' in toys.load(tmp_path / 'checkpoint.pth')) is not ('no_model_ema' in changes)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'w_full': None}, '1·sample + 1·patch + 1·random of 128 tokens), means over the 8 images of a rank'),
        ({'w_full': 0.5}, '1·random of 128 tokens + 0.5·full), means over the 8 images of a rank'),
        ({'relations': 'global'}, 'means over the 8 images of 1 rank'),
    ],
)
def test_summary_describes_the_relations(run, epochs, capsys, changes, words):
    run(**changes)
    assert words in capsys.readouterr().out


def test_gradient_shares_are_logged_per_epoch_and_change_no_result(run, tmp_path, capsys):
    options = {'epochs': 2, 'drop_path': 0.2}
    silent = run(**options, output_dir=tmp_path / 'silent')
    assert 'share_' not in ' '.join(silent[0])
    shown = run(**options, output_dir=tmp_path / 'shown', log_grad_share=True)
    assert [{key: row[key] for key in silent[0]} for row in shown] == silent
    toys.assert_same(*(toys.load(tmp_path / name / 'checkpoint.pth')['model'] for name in ('silent', 'shown')))
    shares = [{key: value for key, value in row.items() if 'share_' in key} for row in shown]
    assert [list(found) for found in shares] == [[f'train_share_{term}' for term in toys.TERMS]] * 2
    assert [sum(found.values()) for found in shares] == pytest.approx([1, 1])
    assert shares[0] != shares[1]
    assert capsys.readouterr().out.count('gradient    base ') == 2


def test_gradient_shares_after_a_resume_in_mid_epoch_are_those_of_the_whole_run(run, tmp_path):
    options = {'epochs': 2, 'batch_size': 4, 'save_interval_steps': 1, 'keep': 9, 'log_grad_share': True}
    whole = run(**options, output_dir=tmp_path / 'whole')
    middle = tmp_path / 'whole' / 'checkpoint-00000006.pth'
    assert run(**options, resume=middle, output_dir=tmp_path / 'parts') == whole[1:]


def test_batch_of_the_gradient_shares_starts_each_epoch(run, monkeypatch):
    batches, trained = [], []
    first, step = engine.first_batch, engine.Trainer.train_step
    monkeypatch.setattr(engine, 'first_batch', lambda *args: batches.append(first(*args)) or batches[-1])
    monkeypatch.setattr(engine.Trainer, 'train_step', lambda *args: trained.append(args[1]) or step(*args))
    run(epochs=2, batch_size=4, log_grad_share=True)
    starts = [trained[0], trained[4]]
    assert [batch[2].tolist() for batch in batches] == [batch[2].tolist() for batch in starts]
    assert batches[0][2].tolist() != batches[1][2].tolist()
    assert torch.equal(batches[1][0], starts[1][0])


def test_summary_describes_the_run(run, capsys):
    run(batch_size=4, lr=0.01)
    screen, training = capsys.readouterr().out.split('[0/1 ', 1)
    for words in [
        f'torch {torch.__version__}',
        f'timm {timm.__version__}',
        'cpu',
        'float32',
        'FAKE',
        '10 classes',
        '1 rank × 4 images = 4 per step',
        f'{0.01 * 4 / 512:g}',
        '16 for training',
        '8 for validation',
        '4 steps',
        'shuffled',
        f'{sum(p.numel() for p in toys.student().parameters()):,} parameters, blocks 0 1 3 of 4',
        f'{sum(p.numel() for p in toys.teacher().parameters()):,} parameters, blocks 0 1 5 of 6',
    ]:
        assert words in screen
    assert all(f' {term.removeprefix("mf_")} ' in training for term in toys.TERMS)


def test_missing_gpu_falls_back_to_cpu(run, epochs, capsys):
    run(device='cuda:3')
    assert '--device cuda:3' in capsys.readouterr().out


def test_teacher_is_frozen_and_not_saved(run, files, tmp_path, monkeypatch):
    built = []
    register = pair.register_teacher_hooks
    monkeypatch.setattr(
        pair, 'register_teacher_hooks', lambda *args, **options: built.append(register(*args, **options)) or built[0]
    )
    run(epochs=2, opt='sgd', lr=10)
    original = toys.teacher()
    toys.assert_same(built[0].model.state_dict(), original.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in built[0].parameters())
    images = torch.randn(3, 3, 32, 32)
    # The fast talking heads round differently.
    torch.testing.assert_close(built[0](images).logits, original.eval()(images), rtol=1e-5, atol=1e-5)
    checkpoint = toys.load(tmp_path / 'checkpoint.pth')
    assert checkpoint['model'].keys() == checkpoint['model_ema'].keys() == toys.student().state_dict().keys()
    held = [index for group in checkpoint['optimizer']['param_groups'] for index in group['params']]
    assert len(held) == len(list(toys.student().parameters()))


def test_list_blocks_prints_index_grid_width_and_path(capsys):
    main.main(['--list-blocks', '--model', 'swin_tiny_patch4_window7_224'])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == 'swin_tiny_patch4_window7_224, 224 pixels: 12 blocks over patch tokens'
    assert rows[0].split() == ['0', '56×56', '96', 'layers.0.blocks.0']
    assert rows[11].split() == ['11', '7×7', '768', 'layers.3.blocks.1']


def test_auto_block_ids_are_resolved_and_saved(run, tmp_path, capsys):
    run(s_id='auto', t_id='auto')
    flags = toys.load(tmp_path / 'checkpoint.pth')['args']
    assert (flags['s_id'], flags['t_id']) == ([0, 1, 2, 3], [0, 1, 4, 5])  # of 4 and 6 blocks
    run(s_id='auto', t_id='auto', epochs=2, resume='auto')
    assert 'arguments changed' not in capsys.readouterr().out.split('--epochs')[0].split('resume')[0]


def test_headless_teacher_gives_relations_only(run, files, capsys):
    (row,) = run(teacher_path=files / 'headless.pth', distillation_alpha=0)
    toys.assert_sound(row, absent={'dist'})
    assert 'loss        CE, no KD + 1·(' in capsys.readouterr().out


def test_teacher_with_other_classes_gives_relations_only(run, files):
    (row,) = run(teacher_path=files / 'seven.pth', distillation_alpha=0, model='deit_tiny_distilled_patch16_224')
    toys.assert_sound(row, absent={'dist'})


@pytest.mark.parametrize('how', ['pool', 'interpolate', 'merge'])
def test_token_align_brings_both_grids_to_one(run, capsys, how):
    (row,) = run(token_align=how, teacher_input_size=64, max_patches=16)  # 8×8 teacher patches, 4×4 student patches
    toys.assert_sound(row)
    lines = capsys.readouterr().out.splitlines()
    assert 'position embeddings resampled to 8×8' in next(line for line in lines if line.startswith('teacher  '))
    assert f'align       {how}, student and teacher: 4×4 and 8×8 on 4×4' in lines


def test_convolutional_student_trains_evaluates_and_fine_tunes(run, files, tmp_path, capsys):
    options = {'model': 'test_convnext', 'model_kwargs': None}
    (row,) = run(**options, s_id='auto', t_id='auto', token_align='pool')
    toys.assert_sound(row)
    main.main(toys.flags(**options, **toys.ALONE, eval=True, resume=tmp_path / 'best_checkpoint.pth'))
    assert f'* Acc@1 {row["test_acc1"]:.3f}' in capsys.readouterr().out
    (row,) = run(**options, **toys.ALONE, data_set='FOLDER', data_path=files / 'tree',
                 finetune=tmp_path / 'best_checkpoint.pth', output_dir=tmp_path / 'tuned')  # fmt: skip
    assert toys.load(tmp_path / 'tuned' / 'checkpoint.pth')['model']['head.fc.weight'].shape[0] == 2
    assert 'head.fc replaced by a new head of 2 classes' in capsys.readouterr().out


def test_teacher_gets_images_in_its_own_normalisation(run, epochs, monkeypatch):
    run(model='test_convnext', model_kwargs=None, s_id=None, t_id=None)
    taught = epochs[0].teacher
    images = torch.rand(2, 3, 32, 32)
    ours, theirs = (timm.create_model(name).pretrained_cfg for name in ('test_convnext', 'cait_s24_224'))
    assert ours['mean'] != theirs['mean']
    raw = images * torch.tensor(ours['std']).view(3, 1, 1) + torch.tensor(ours['mean']).view(3, 1, 1)
    expected = (raw - torch.tensor(theirs['mean']).view(3, 1, 1)) / torch.tensor(theirs['std']).view(3, 1, 1)
    assert torch.allclose(taught(images).logits, taught.model(expected), atol=1e-5)


def test_local_hub_folder_gives_model_and_weights(run, files, tmp_path, capsys):
    kwargs = {'img_size': 32, 'num_classes': 10, **toys.TEACHER}
    folder = tmp_path / 'hub'
    folder.mkdir()
    config = {'architecture': 'cait_s24_224', 'num_classes': 10, 'model_args': kwargs,
              'pretrained_cfg': {'input_size': [3, 32, 32], 'num_classes': 10, 'classifier': 'head'}}  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors.torch.save_file(toys.teacher().state_dict(), folder / 'model.safetensors')
    (plain,) = run(output_dir=tmp_path / 'plain')
    hub = {'teacher_model': f'local-dir:{folder}', 'teacher_kwargs': None}
    assert run(**hub, teacher_path=None, output_dir=tmp_path / 'model') == [plain]
    assert run(teacher_path=f'local-dir:{folder}', output_dir=tmp_path / 'weights') == [plain]


def test_part_of_imagenet_keeps_1000_classes(run, tmp_path, capsys):
    for split in ('train', 'val'):
        toys.write_images(tmp_path / 'tree' / split, [4, 4], 32)
        for i, name in enumerate(['n01440764', 'n02085620']):
            (tmp_path / 'tree' / split / f'c{i}').rename(tmp_path / 'tree' / split / name)
    (row,) = run(data_set='IMNET', data_path=tmp_path / 'tree', output_dir=tmp_path / 'out', **toys.ALONE)
    toys.assert_sound(row)
    assert toys.load(tmp_path / 'out' / 'checkpoint.pth')['model']['head.weight'].shape[0] == 1000
    warning = next(line for line in capsys.readouterr().out.splitlines() if 'class folders' in line)
    assert warning.endswith("has 2 class folders of 1000; class numbers are ImageNet's")
