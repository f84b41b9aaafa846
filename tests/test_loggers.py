"""loggers.py: what a run prints."""

import errno
import importlib.util
import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
import toys

import loggers
import utils


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
    seen, asked, due, logged = [], [], [], []

    def losses() -> dict[str, float]:
        asked.append(len(seen))
        return {'loss': 2.5, 'loss_base': 0.0, 'loss_dist': 2.0, 'loss_mf_patch': 0.5}

    progress = loggers.Progress('2/9', print_freq, 8, losses, logged.append, later_steps=10)
    for batch in progress.over(range(steps)):
        seen.append(batch)
        due += [batch + 1] if progress.due else []
    lines = [text for text in capsys.readouterr().out.splitlines() if 'left' in text]
    assert seen == list(range(steps))
    assert due == printed  # known during the step
    assert asked == printed  # never between the lines, because that waits for the device
    width = len(str(steps))
    for number, text in zip(printed, lines, strict=True):
        assert text.startswith(f'[2/9 {number:{width}}/{steps}] loss 2.5 dist 2 patch .5 ')
        assert all(word in text for word in (' img/s', ' left'))
    assert all(values['images_per_second'] > 0 and values['loss_base'] == 0 for values in logged)


@pytest.mark.parametrize(('first', 'printed'), [(0, [1, 4, 7, 8]), (3, [4, 7, 8]), (4, [7, 8]), (7, [8]), (8, [])])
def test_progress_of_a_resumed_epoch_keeps_its_lines(capsys, first, printed):
    assert list(loggers.Progress('0/1', 3, 8, dict).over(range(first, 8), first)) == list(range(first, 8))
    lines = [text for text in capsys.readouterr().out.splitlines() if 'left' in text]
    assert [text.split()[1] for text in lines] == [f'{number}/8]' for number in printed]


def test_longest_line_has_at_most_120_characters(capsys, monkeypatch):
    names = ('loss', 'loss_base', 'loss_dist', 'loss_mf_sample', 'loss_mf_patch', 'loss_mf_rand', 'loss_mf_full')
    clock = iter(range(0, 10**9, 40))
    monkeypatch.setattr(loggers.time, 'monotonic', lambda: next(clock))
    losses = dict.fromkeys(names, 0.0123456) | {'loss': 12.3456, 'loss_base': 1.23456, 'loss_dist': 12.3456}
    list(loggers.Progress('299/300', 1, 10**5, lambda: losses, later_steps=10**5).over(range(1250, 1251), 1250))
    (line,) = capsys.readouterr().out.splitlines()
    assert all(f' {name} ' in line for name in ('base', 'dist', 'sample', 'patch', 'rand', 'full'))
    assert 100 < len(line) <= 120


def test_waiting_for_data_is_shown_if_it_is_long(capsys):
    progress = loggers.Progress('0/1', 1, 8, lambda: {'loss': 2.5, 'loss_base': 2.5})
    for _ in progress.over(toys.Slow([1, 2], 0.05)):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith('[0/1 ') and ' loss 2.5 ' in line and ' data ' in line for line in lines)
    assert 'base' not in lines[0]


@pytest.mark.parametrize(
    ('seconds', 'text'), [(5, '0m05s'), (3600, '1h00m'), (3 * 86400 + 4 * 3600, '3d04h'), (11 * 86400, '11d')]
)
def test_time_is_short(seconds, text):
    assert loggers.format_time(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_and_whole_lines(monkeypatch, tmp_path):
    terminal = Terminal()
    loggers.console_file.start()
    loggers.console_file.open(tmp_path / 'console.log')
    monkeypatch.setattr(sys, 'stdout', terminal)
    for _ in loggers.Progress('0/1', 1, 8, lambda: {'loss': 2.5}).over(range(3)):
        loggers.log_rank0('a line')
    loggers.console_file.close()
    text = terminal.getvalue()
    assert text.count('a line\n') == 3
    assert 'epoch 0/1   0%' in text
    assert '[0/1' not in text
    assert '3/3] loss 2.5' in (tmp_path / 'console.log').read_text()


def test_console_file_has_all_lines_from_the_start(tmp_path, capsys):
    loggers.log_rank0('of another run')
    loggers.console_file.start()
    loggers.log_rank0('before the folder is known')
    loggers.console_file.open(tmp_path / 'console.log')
    loggers.log_rank0('τ after it')
    loggers.console_file.close()
    loggers.log_rank0('of another run')
    assert (tmp_path / 'console.log').read_text() == 'before the folder is known\nτ after it\n'


# Metrics --------------------------------------------------------------------------------------------------------------


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_resumed_metrics_have_each_step_once(tmp_path):
    log = loggers.MetricLog(tmp_path)
    for step in (1, 2, 3):
        log.log({'loss': step / 2}, step)
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 4, "lo')  # cut by a kill
    again = loggers.MetricLog(tmp_path, step=2)
    again.log({'loss': 9.0}, 3)
    again.close()
    assert rows(tmp_path) == [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 1.0}, {'step': 3, 'loss': 9.0}]


def test_run_logs_steps_and_epochs(run, tmp_path, few_generated_images):
    log = run(batch_size=4, print_freq=2, epochs=2)
    found = rows(tmp_path)
    assert [row['step'] for row in found] == [1, 3, 4, 4, 5, 7, 8, 8]
    assert all(row['images_per_second'] > 0 and row['loss_mf_patch'] > 0 for row in found if 'images_per_second' in row)
    assert [{**row, 'step': None} for row in found if 'test_acc1' in row] == [{**row, 'step': None} for row in log]


class Recorder:
    """Stands for a package with init, log and finish."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls, self.fails_at = [], fails_at

    def init(self, **options) -> None:
        self.calls.append(('init', options))

    def log(self, values, step) -> None:
        self.calls.append(('log', values, step))
        if step == self.fails_at:
            raise RuntimeError('no\nconnection')

    def finish(self) -> None:
        self.calls.append(('finish',))


@pytest.mark.parametrize('package', ['wandb', 'trackio'])
def test_trackers_are_continued_on_resume(tmp_path, monkeypatch, package):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, package, recorder)
    for _ in range(2):
        log = loggers.MetricLog(tmp_path, [package], {'lr': 0.1})
        log.log({'loss': 1.0}, 5)
        log.close()
    (first, second) = [call[1] for call in recorder.calls if call[0] == 'init']
    assert first == second
    assert first['config'] == {'lr': 0.1}
    assert first['resume'] == 'allow'
    assert recorder.calls[1:3] == [('log', {'loss': 1.0}, 5), ('finish',)]


def test_sink_that_fails_is_dropped_and_training_goes_on(tmp_path, monkeypatch, capsys):
    recorder = Recorder(fails_at=2)
    monkeypatch.setitem(sys.modules, 'wandb', recorder)
    log = loggers.MetricLog(tmp_path, ['wandb'])
    for step in (1, 2, 3):
        log.log({'loss': 1.0}, step)
    assert len(rows(tmp_path)) == 3
    assert [call[2] for call in recorder.calls if call[0] == 'log'] == [1, 2]
    assert 'warning: wandb: metrics are no longer sent there: no connection' in capsys.readouterr().out


def test_tensorboard_gets_scalars(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step) -> None:
            made.extend([folder, purge_step])

        def add_scalar(self, *values) -> None:
            made.append(values)

        def close(self) -> None:
            made.append('closed')

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=SummaryWriter))
    log = loggers.MetricLog(tmp_path, ['tensorboard'], step=4)
    log.log({'loss': 1.0}, 5)
    log.close()
    assert made == [str(tmp_path / 'tensorboard'), 5, ('loss', 1.0, 5), 'closed']


def test_missing_package_or_unknown_sink_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    (tmp_path / 'wandb').mkdir()  # what the package leaves behind is not the package
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    installed = importlib.util.find_spec('wandb')
    if installed is None or installed.origin is None:
        with pytest.raises(ValueError, match='the package wandb is not installed; pip install wandb'):
            loggers.parse_sinks('wandb')
    with pytest.raises(ValueError, match='neptune is not one of tensorboard, wandb, trackio'):
        loggers.parse_sinks('neptune')
    assert loggers.parse_sinks('') == []


def test_characters_the_terminal_does_not_have_become_question_marks(tmp_path, monkeypatch):
    path = tmp_path / 'ascii.txt'
    with open(path, 'w', encoding='ascii') as stdout, open(tmp_path / 'err', 'w', encoding='ascii') as stderr:
        monkeypatch.setattr(sys, 'stdout', stdout)
        monkeypatch.setattr(sys, 'stderr', stderr)
        loggers.unbuffer_stdio()
        loggers.log_rank0('τ 1, 2 × 8')
    assert path.read_text() == '? 1, 2 ? 8\n'
