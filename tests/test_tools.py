"""Tools and scripts: what counts as a difference between two runs, and what a script leaves."""

import copy
import importlib
import subprocess
import sys

import pytest
import torch

from tools.compare_runs import ROOT, differences, digest

RUN = {
    'log': [{'epoch': 0, 'train_loss': 2.5, 'test_acc1': 10.0}, {'epoch': 1, 'train_loss': 2.25, 'test_acc1': 20.0}],
    'model': 'a',
    'optimizer': 'b',
}


def test_equal_runs_have_no_differences():
    assert differences(RUN, copy.deepcopy(RUN)) == []


@pytest.mark.parametrize(
    ('change', 'found'),
    [
        (lambda run: run['log'][1].update(train_loss=2.5), ['train_loss of epoch 1: 2.25, now 2.5']),
        (lambda run: run['log'][0].pop('test_acc1'), ['test_acc1 of epoch 0: 10.0, now None']),
        (lambda run: run['log'][0].update(loss=1), ['loss of epoch 0: None, now 1']),
        (lambda run: run['log'].pop(), ['2 rows, now 1']),
        (lambda run: run.update(optimizer='c'), ['optimizer']),
        (lambda run: run.pop('model'), ['model']),
        (lambda run: run.update(model_ema='d'), ['model_ema']),
    ],
    ids=['log value', 'missing key', 'new key', 'missing row', 'state', 'missing state', 'new state'],
)
def test_every_difference_is_named(change, found):
    now = copy.deepcopy(RUN)
    change(now)
    assert differences(RUN, now) == found


def test_digest_is_equal_for_equal_states():
    x = torch.randn(3, 4)
    one = {'model': {'a': x, 'b': x.bfloat16()}, 'steps': [1, 2.5, None]}
    other = {'steps': [1, 2.5, None], 'model': {'b': x.bfloat16(), 'a': x.T.contiguous().T}}
    assert digest(one) == digest(other)


def test_digest_sees_one_bit_dtype_shape_and_place():
    x = torch.randn(4)
    flipped = x.clone()
    flipped.view(torch.int32)[2] ^= 1
    states = [x, flipped, x.view(torch.int32), x.view(2, 2), x.flip(0), [x], {'x': x}, {'y': x}]
    states += [torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(0), 0, 0.0, '0', None]
    assert len({digest(state) for state in states}) == len(states)


def test_sourced_setup_script_leaves_the_shell_as_it_was():
    command = 'before="$- $PWD"; source scripts/setup.sh; [ "$- $PWD" = "$before" ] && echo unchanged'
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'unchanged\n'
    assert 'bash scripts/setup.sh' in done.stderr


def test_demo_shows_each_epoch_with_its_own_accuracy(tmp_path, monkeypatch, capsys):
    said = '\n'.join(f'epoch {epoch} took 0:00:01, lr 1\n* Acc@1 {10 * epoch}.000 Acc@5 50.000' for epoch in (0, 1))
    monkeypatch.syspath_prepend(ROOT / 'tools')  # the demo is a script
    demo = importlib.import_module('demo')
    monkeypatch.setattr(demo.Run, 'command', lambda run, data: [sys.executable, '-c', f'print({said!r})'])
    demo.Run('student', 2, [], tmp_path / 'run').train(tmp_path)
    lines = [line.rpartition(', ')[0] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert lines == ['student: epoch 1/2, Acc@1 0.0', 'student: epoch 2/2, Acc@1 10.0']
    assert (tmp_path / 'run' / 'output.txt').read_text() == f'{said}\n'
