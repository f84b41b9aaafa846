"""The --eval flag: layouts of weights files, EMA weights, the teacher."""

import os
import signal

import pytest
import safetensors.torch
import torch
import toys

import engine
import main

pytestmark = pytest.mark.usefixtures('few_generated_images')


def test_non_finite_logits_in_evaluation_give_a_warning(tmp_path, capsys):
    student = toys.student()
    for name, bias in (('sound', 0.0), ('spoilt', torch.nan)):
        with torch.no_grad():
            student.head.bias[0] += bias
        weights = toys.save(tmp_path / f'{name}.pth', student.state_dict())
        main.main(toys.flags(**toys.ALONE, eval=True, resume=weights))
        warned = 'warning: logits of the network are not finite; its accuracy is meaningless' in capsys.readouterr().out
        assert warned == (name == 'spoilt')


LAYOUTS = {
    'release': toys.as_release,
    'deit': lambda state: {'model': state},
    'timm': lambda state: {'state_dict': state, 'epoch': 7},
    'bare': lambda state: state,
    'ddp': lambda state: {'model': {f'module.{key}': value for key, value in state.items()}},
    'compiled': lambda state: {'model': {f'_orig_mod.{key}': value for key, value in state.items()}},
    'safetensors': None,
}

# Three of the five images are of class c0. A model that always answers c0 is right on 60 %; elsewhere its loss is 100.
C0 = ['* Acc@1 60.000 Acc@5 100.000 loss 40.000', 'Accuracy of the network on the 5 test images: 60.0%']
C1 = ['* Acc@1 40.000 Acc@5 100.000 loss 60.000', 'Accuracy of the network on the 5 test images: 40.0%']


@pytest.mark.R8
@pytest.mark.parametrize('layout', LAYOUTS)
def test_eval_reads_every_layout_of_weights(evaluation, tmp_path, layout):
    state = toys.favouring(toys.student(2), 0).state_dict()
    path = tmp_path / f'weights.{"safetensors" if layout == "safetensors" else "pth"}'
    if layout == 'safetensors':
        safetensors.torch.save_file(state, path)
    else:
        toys.save(path, LAYOUTS[layout](state))
    assert evaluation(resume=path) == C0
    assert evaluation(finetune=path) == C0


@pytest.mark.parametrize(
    ('eval_ema', 'lines'), [(True, [line.replace('network', 'EMA') for line in C1]), (None, C0)], ids=['ema', 'raw']
)
def test_eval_ema_evaluates_the_moving_average(evaluation, tmp_path, eval_ema, lines):
    states = [toys.favouring(toys.student(2), winner).state_dict() for winner in (0, 1)]
    assert evaluation(resume=toys.save(tmp_path / 'released.pth', toys.as_release(*states)), eval_ema=eval_ema) == lines


def test_eval_of_a_checkpoint_equals_its_log_row(run, tmp_path, capsys):
    (row,) = run(eval_ema=True, lr=10, warmup_epochs=0, model_ema_decay=0.5, epochs=1)
    capsys.readouterr()
    for eval_ema, name in [(None, 'test'), (True, 'test_ema')]:
        expected = '* Acc@1 {:.3f} Acc@5 {:.3f} loss {:.3f}'.format(
            *(row[f'{name}_{k}'] for k in ('acc1', 'acc5', 'loss'))
        )
        main.main(toys.flags(eval=True, resume=tmp_path / 'checkpoint.pth', eval_ema=eval_ema, **toys.ALONE))
        assert expected in capsys.readouterr().out.splitlines()
    assert row['test_loss'] != row['test_ema_loss']


def test_eval_teacher_runs_before_training(run, files, tmp_path, capsys):
    path = toys.save(tmp_path / 'c1.pth', toys.favouring(toys.teacher(2), 1).state_dict())
    run(eval_teacher=True, teacher_path=path, data_set='FOLDER', data_path=files / 'tree', output_dir=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    found = lines.index('Accuracy of the teacher on the 5 test images: 40.0%')
    assert lines[found - 1] == C1[0]
    assert not any(line.startswith('Epoch') for line in lines[:found])


@pytest.mark.R8
def test_head_of_another_size_is_not_evaluated(files, capsys):
    weights = files / 'student.pth'
    error = toys.refused(capsys, **toys.FOLDER, eval=True, data_path=files / 'no_train', finetune=weights)
    assert f'--finetune {weights} with --model deit_tiny_patch16_224: has a head of 10 classes, but 2 are' in error


def test_signal_stops_evaluation(evaluation, files, tmp_path, monkeypatch):
    path = toys.save(tmp_path / 'weights.pth', toys.student(2).state_dict())
    toys.after_calls(monkeypatch, engine, 'count_correct', 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        evaluation(resume=path)
    assert stopped.value.code == 143


def test_eval_with_auto_needs_a_checkpoint(tmp_path, capsys):
    error = toys.refused(capsys, **toys.ALONE, eval=True, resume='auto', output_dir=tmp_path)
    assert f'--resume auto: there is no checkpoint in --output_dir {tmp_path}' in error


def test_eval_ignores_seed_and_optimizer(run, tmp_path, capsys):
    run(**toys.ALONE, seed=3, opt='sgd')
    main.main(toys.flags(**toys.ALONE, eval=True, resume=tmp_path / 'checkpoint.pth'))
    assert 'Accuracy of the network' in capsys.readouterr().out


def test_eval_of_a_damaged_file_does_not_fall_back(run, tmp_path, capsys):
    run(**toys.ALONE, epochs=2)
    last = tmp_path / 'checkpoint.pth'
    last.write_bytes(last.read_bytes()[:-2000])
    assert 'is damaged' in toys.refused(capsys, **toys.ALONE, eval=True, resume=last, output_dir=tmp_path)


def test_teacher_with_its_own_dtype_is_evaluated_without_autocast(run, files, monkeypatch):
    seen = []
    count = engine.count_correct

    def recorded(model, images, targets, device, amp_dtype):
        seen.append((type(model[1]).__name__, amp_dtype))
        return count(model, images, targets, device, amp_dtype)

    monkeypatch.setattr(engine, 'count_correct', recorded)
    run(eval_teacher=True, teacher_dtype='bfloat16', amp_dtype='bfloat16')
    dtypes = {kind == 'Sequential': dtype for kind, dtype in seen}  # the teacher is its preparation and its model
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
