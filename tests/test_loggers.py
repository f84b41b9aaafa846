"""loggers.py: what a run prints."""

import errno
import os
import sys

import pytest
import torch

import loggers
import utils

CPU = torch.device('cpu')


def test_lines_are_plain_text_on_the_current_stdout(capsys):
    loggers.log_rank0('100 % of {} lines')
    assert capsys.readouterr() == ('100 % of {} lines\n', '')


def test_only_the_first_rank_logs(capsys, monkeypatch):
    monkeypatch.setattr(utils, 'get_rank', lambda: 1)
    loggers.log_rank0('a line')
    assert capsys.readouterr() == ('', '')


def test_lost_line_does_not_stop_the_run(capsys, monkeypatch):
    class FullDisk:
        def write(self, _) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', FullDisk())
        loggers.log_rank0('lost')
    loggers.log_rank0('printed')
    assert capsys.readouterr() == ('printed\n', '')


@pytest.mark.parametrize(
    ('steps', 'print_freq', 'printed'),
    [(7, 3, [1, 4, 7]), (6, 3, [1, 4, 6]), (1, 10, [1]), (12, 100, [1, 12]), (3, 1, [1, 2, 3])],
)
def test_progress_lines_at_first_every_and_last_step(capsys, steps, print_freq, printed):
    seen, asked = [], []

    def line() -> str:
        asked.append(len(seen))
        return 'a line'

    progress, due = loggers.Progress('Epoch: [2]', print_freq, line, CPU), []
    for batch in progress.over(range(steps)):
        seen.append(batch)
        due += [batch + 1] if progress.due else []
    lines = [text for text in capsys.readouterr().out.splitlines() if 'eta' in text]
    assert seen == list(range(steps))
    assert due == printed  # known during the step
    assert asked == printed  # never between the lines, because that waits for the device
    width = len(str(steps))
    for number, text in zip(printed, lines, strict=True):
        assert text.startswith(f'Epoch: [2] [{number:{width}}/{steps}]  eta: ')
        assert all(word in text for word in ('a line', 'time: ', 'data: ', 'mem: '))


@pytest.mark.parametrize(('first', 'printed'), [(0, [1, 4, 7, 8]), (3, [4, 7, 8]), (4, [7, 8]), (7, [8]), (8, [])])
def test_progress_of_a_resumed_epoch_keeps_its_lines(capsys, first, printed):
    assert list(loggers.Progress('Epoch: [0]', 3, str, CPU).over(range(first, 8), first)) == list(range(first, 8))
    lines = [text for text in capsys.readouterr().out.splitlines() if 'eta' in text]
    assert [text.split()[2] for text in lines] == [f'[{number}/8]' for number in printed]


def test_characters_the_terminal_does_not_have_become_question_marks(tmp_path, monkeypatch):
    path = tmp_path / 'ascii.txt'
    with open(path, 'w', encoding='ascii') as stdout, open(tmp_path / 'err', 'w', encoding='ascii') as stderr:
        monkeypatch.setattr(sys, 'stdout', stdout)
        monkeypatch.setattr(sys, 'stderr', stderr)
        loggers.unbuffer_stdio()
        loggers.log_rank0('τ 1, 2 × 8')
    assert path.read_text() == '? 1, 2 ? 8\n'
