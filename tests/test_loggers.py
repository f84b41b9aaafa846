"""loggers.py: what a run prints."""

import pytest
import torch

import loggers

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    ('steps', 'print_freq', 'printed'),
    [(7, 3, [1, 4, 7]), (6, 3, [1, 4, 6]), (1, 10, [1]), (12, 100, [1, 12]), (3, 1, [1, 2, 3])],
)
def test_progress_prints_the_first_every_so_many_and_the_last_step(capsys, steps, print_freq, printed):
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
    assert due == printed  # known while the step is made
    assert asked == printed  # between the lines nobody asks, for asking waits for the device
    width = len(str(steps))
    for number, text in zip(printed, lines, strict=True):
        assert text.startswith(f'Epoch: [2] [{number:{width}}/{steps}]  eta: ')
        assert all(word in text for word in ('a line', 'time: ', 'data: ', 'mem: '))


@pytest.mark.parametrize(('first', 'printed'), [(0, [1, 4, 7, 8]), (3, [4, 7, 8]), (4, [7, 8]), (7, [8]), (8, [])])
def test_progress_of_the_rest_of_an_epoch_prints_where_that_of_the_whole_would(capsys, first, printed):
    assert list(loggers.Progress('Epoch: [0]', 3, str, CPU).over(range(first, 8), first)) == list(range(first, 8))
    lines = [text for text in capsys.readouterr().out.splitlines() if 'eta' in text]
    assert [text.split()[2] for text in lines] == [f'[{number}/8]' for number in printed]
