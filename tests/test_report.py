"""tools.report: the page, its numbers against the files of the run, hostile and damaged folders, a real browser."""

import base64
import fcntl
import html
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import toys
import yaml

import datasets
import main
import tools.relations
import tools.report
from tools import run_files

pytestmark = pytest.mark.more

VOID = {'meta', 'img'}
ELEMENTS = {'html', 'head', 'meta', 'title', 'style', 'body', 'main', 'header', 'section', 'h1', 'h2', 'p', 'div',
            'table', 'caption', 'span', 'thead', 'tbody', 'tr', 'th', 'td', 'figure', 'img', 'ul', 'li', 'details',
            'summary', 'pre'}  # fmt: skip
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome', 'chrome-headless-shell')
CHROMIUM = os.environ.get('REPORT_BROWSER') or next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = '<img src=x onerror=alert(1)>"\'&$x^$'


class Page(HTMLParser):
    """A page, checked while it is read: tags are balanced and known, nothing outside of the file is referred to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.open, self.ids, self.headings, self.images = path.read_text(encoding='utf-8'), [], [], [], []
        self.tables: dict[str, list[list[str]]] = {}
        self.parts: list[tuple[str, str]] = []  # innermost element and text
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag in ELEMENTS
        assert not [name for name in values if name.startswith('on') or name in ('style', 'href', 'srcset')]
        assert len(values) == len(attrs)
        self.ids += [values['id']] if 'id' in values else []
        if tag == 'img':
            assert values['alt']
            kind, data = re.fullmatch(r'data:(image/[\w+]+);base64,(.+)', values['src']).groups()
            self.images.append((kind, values['alt'], base64.b64decode(data)))
        if tag in ('caption', 'th', 'td', 'h1', 'h2', 'pre', 'li'):
            self.parts.append((tag, ''))
        if tag == 'tr':
            self.tables[next(text for name, text in reversed(self.parts) if name == 'caption')].append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ('h1', 'h2'):
            self.headings.append((tag, self.parts[-1][1]))
        elif tag == 'caption':
            self.tables[self.parts[-1][1]] = []
        elif tag in ('th', 'td'):
            self.tables[next(text for name, text in reversed(self.parts) if name == 'caption')][-1].append(
                self.parts[-1][1]
            )

    def handle_data(self, data):
        inner = next((tag for tag in reversed(self.open) if tag != 'span'), '')
        if inner == 'style':
            assert 'url(' not in data
            assert '@import' not in data
        elif self.parts and inner == self.parts[-1][0]:
            self.parts[-1] = (inner, self.parts[-1][1] + data)
        else:
            self.parts.append((inner, data))

    def texts(self, tag: str) -> list[str]:
        return [text for name, text in self.parts if name == tag]

    def rows(self, caption: str) -> dict[str, list[str]]:
        """The cells of each row by its first one."""
        return {first: others for first, *others in self.tables[caption]}


@pytest.fixture(scope='module')
def folder(files, tmp_path_factory):
    """A run with relation terms, `run`, and one with soft KD alone, `soft`, of two epochs; an image beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, 'FAKE_TRAIN', toys.TRAIN_IMAGES)
        patch.setattr(datasets, 'FAKE_VAL', toys.VAL_IMAGES)
        root = tmp_path_factory.mktemp('report')
        changes = {'epochs': 2, 'lr': 1, 'warmup_epochs': 0, 'model_ema_decay': 0.5, 'eval_ema': True, 'print_freq': 1}
        changes |= {'teacher_path': files / 'teacher.pth', 'eval_teacher': True}
        main.main(toys.flags(**changes, log_grad_share=True, output_dir=root / 'run'))
        main.main(toys.flags(**changes, s_id=None, t_id=None, output_dir=root / 'soft'))
    for name, offset in (('run', 0.25), ('soft', 3.0)):  # of eight images, all may classify equally many
        rows = toys.log_rows(root / name)
        for i, row in enumerate(rows):
            row.update({'test_acc1': 40.125 - 10 * i - offset, 'test_ema_acc1': 20.375 + i - offset})
        write_rows(root / name, rows)
    toys.noise(32, 32).save(root / 'a.png')
    return root


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / 'log.txt').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def report(tmp_path: Path, *argv: object) -> Page:
    out = tmp_path / 'page.html'
    assert tools.report.main([*map(str, argv), '--out', str(out)]) == 0
    return Page(out)


# The page -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """A report with all sections."""
    argv = [folder / 'run', '--control', folder / 'soft', '--images', folder / 'a.png']
    return report(tmp_path_factory.mktemp('whole'), *argv)


def test_page_is_one_file_with_ordered_headings_and_described_pictures(whole):
    assert len(set(whole.ids)) == len(whole.ids) > 5
    assert [tag for tag, _ in whole.headings] == ['h1', *['h2'] * 9]
    assert whole.headings[0][1] == 'cait_s24_224 → deit_tiny_patch16_224'
    labels = re.findall(r'aria-labelledby="(.*?)"', whole.text)
    assert labels == whole.ids
    assert [kind for kind, _, _ in whole.images].count('image/png') == 1
    for kind, _, data in whole.images:
        if kind == 'image/svg+xml':
            tags = {element.tag.split('}')[-1] for element in ET.fromstring(data).iter()}
            assert not tags & {'script', 'image', 'foreignObject', 'a'}


def test_numbers_are_those_of_the_log(whole, folder):
    first, last = toys.log_rows(folder / 'run')
    rows = whole.rows('Accuracy on the validation images, in percent')
    for name, prefix, row, epoch in (
        ('student, last epoch', 'test', last, '2'),
        ('student, EMA, last epoch', 'test_ema', last, '2'),
        ('student, best epoch', 'test', first, '1'),
    ):
        values = [f'{row[f"{prefix}_acc1"]:.2f}', f'{row[f"{prefix}_acc5"]:.2f}', f'{row[f"{prefix}_loss"]:.4f}']
        assert rows[name] == [epoch, *values]
    console = (folder / 'run' / 'console.log').read_text()
    acc1, acc5 = re.search(r'\* Acc@1 (\S+) Acc@5 (\S+) loss \S+\nAccuracy of the teacher', console).groups()
    assert rows['teacher'] == ['–', f'{float(acc1):.2f}', f'{float(acc5):.2f}', '–']
    facts = whole.rows('The run')
    assert facts['epochs'] == ['2 of 2']
    assert facts['parameters of the student'] == [f'{last["n_parameters"]:,}']
    assert facts['duration'] == re.findall(r'Training time (\S+),', console)
    shares = whole.rows('After the last epoch, in percent')
    assert shares['patch'] == [f'{100 * last["train_share_mf_patch"]:.2f}']


def test_curves_are_described_by_their_ends(whole, folder):
    (text,) = (alt for _, alt, _ in whole.images if alt.startswith('Acc@1'))
    for name in ('run', 'soft'):
        first, last = toys.log_rows(folder / name)
        assert f'{name} from {first["test_acc1"]:.2f} to {last["test_acc1"]:.2f}' in text
        assert f'{name}, EMA from {first["test_ema_acc1"]:.2f} to {last["test_ema_acc1"]:.2f}' in text
    assert len([alt for _, alt, _ in whole.images if alt.startswith('Training loss')]) == 2


def test_control_is_compared_by_the_last_epochs(whole, folder):
    run, soft = (toys.log_rows(folder / name)[-1] for name in ('run', 'soft'))
    rows = whole.rows('Accuracy after the last epoch, in percent')
    keys = ('test_acc1', 'test_acc5', 'test_ema_acc1')
    assert rows['run'] == ['2 of 2', *(f'{run[key]:.2f}' for key in keys)]
    assert rows['soft (control)'] == ['2 of 2', *(f'{soft[key]:.2f}' for key in keys)]
    assert rows['difference'] == ['', *(f'{run[key] - soft[key]:+.2f}' for key in keys)]
    assert rows['difference'][1] == '+2.75'
    text = ' '.join(whole.texts('p'))
    assert 'shows no significance' in text
    assert 'docs/experiments.md' in text
    assert tools.report.SAME_RECIPE in text


def test_control_of_another_recipe_is_objected_to(folder, tmp_path):
    shutil.copytree(folder / 'run', tmp_path / 'other')
    path = tmp_path / 'other' / 'args.yaml'
    path.write_text(path.read_text().replace('\nseed: 0', '\nseed: 5').replace('\nepochs: 2', '\nepochs: 4'))
    path.write_text(path.read_text().replace('distillation_type: soft', 'distillation_type: hard'))
    write_rows(tmp_path / 'other', toys.log_rows(folder / 'run')[:1])
    sources = str(folder / 'run'), str(tmp_path / 'other')
    text = html.unescape(tools.report.comparison(*tools.report.read_runs(*sources)))
    assert tools.report.SAME_RECIPE not in text
    assert 'The control has relation terms too (--s-id 0 1 -1).' in text
    assert '--distillation-type hard; it is not soft KD alone' in text
    assert '--seed 0 and 5' in text
    assert '--epochs 2 and 4' in text
    assert 'different numbers of epochs: 2 of 2 and 1 of 4' in text
    path.unlink()
    (text,) = tools.report.objections(*tools.report.read_runs(*sources))
    assert 'is not known: other has no readable args.yaml' in text


def test_relation_maps_are_those_of_the_tool(whole, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tools.relations, 'save_figure', lambda *_, **__: None)
    capsys.readouterr()
    argv = [str(folder / 'run'), '--images', str(folder / 'a.png'), '--out', str(tmp_path / 'a.png')]
    assert tools.relations.main(argv) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(('a.png  ', 'mean'))]
    found = whole.tables['Mean squared difference between the maps of student and teacher'][1:]
    assert [[cell for cell in row if cell] for row in found] == lines
    (png,) = (data for kind, _, data in whole.images if kind == 'image/png')
    assert png.startswith(b'\x89PNG')


def test_speed_is_the_median_of_the_metrics(whole, folder):
    rows = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
    printed = [row for row in rows if 'images_per_second' in row]
    assert len(printed) == 4
    rates, shares = (sorted(row[key] for row in printed) for key in ('images_per_second', 'data_share'))
    middle = [(values[1] + values[2]) / 2 for values in (rates, shares)]
    found = whole.rows('Medians of the lines of metrics.jsonl, all ranks together')['run']
    assert found == [f'{middle[0]:,.0f}', f'{middle[1]:.1%}', '4']


def test_arguments_warnings_and_environment_are_those_of_the_files(whole, folder):
    args = (folder / 'run' / 'args.yaml').read_text()
    flags, defaults = yaml.safe_load(args), run_files.default_flags()
    changed, everything = whole.rows('Other values than the defaults'), whole.rows('All arguments')
    assert len(everything) == 1 + len(flags)  # and the names of the columns
    assert changed['--lr'] == ['1.0', str(defaults['lr'])]
    assert changed['--s-id'] == ['0 1 -1', '–']
    assert changed['--log-grad-share'] == ['on', 'off']
    assert '--seed' not in changed
    assert everything['--seed'] == ['0']
    warnings = re.findall(r'^warning: (.+)$', (folder / 'run' / 'console.log').read_text(), re.MULTILINE)
    assert warnings
    assert whole.texts('li') == list(dict.fromkeys(warnings))
    commit = re.search(r'^# commit (.+)$', args, re.MULTILINE)
    assert whole.rows('Versions, and what the run printed at its last start')['commit'] == [commit[1]]
    command = args.splitlines()[0].removeprefix('# ')
    assert whole.texts('pre')[0].replace('\\\n    ', '') == command


def test_sections_without_data_are_left_out(folder, tmp_path):
    page = report(tmp_path, folder / 'soft')
    titles = ['Results', 'Curves', 'Throughput and data', 'Warnings', 'Arguments', 'Environment']
    assert [text for _, text in page.headings[1:]] == titles


def test_log_of_the_release_is_enough_and_gives_the_same_page_again(tmp_path):
    keys = sorted(toys.RELEASE_KEYS)
    path = tmp_path / 'release' / 'log.txt'
    write_rows(path.parent, [dict.fromkeys(keys, 0.5) | {'epoch': i, 'test_acc1': 7.0} for i in range(3)])
    page = report(tmp_path, path, '--teacher', '83.5')
    rows = page.rows('Accuracy on the validation images, in percent')
    assert rows['student, best epoch'][:2] == ['3', '7.00']  # of equal epochs the later, as in best_checkpoint.pth
    assert rows['teacher'] == ['–', '83.50', '–', '–']
    assert page.headings[0] == ('h1', 'release')
    assert page.rows('The run')['epochs'] == ['3']
    assert report(tmp_path, path, '--teacher', '83.5').text == page.text


# Files that are not to be trusted -------------------------------------------------------------------------------------


def test_whatever_a_folder_contains_is_text(folder, tmp_path):
    """The names of folder and images, flags, log keys, console lines and the command."""
    bad = tmp_path / f'_{HOSTILE}\u202e'
    shutil.copytree(folder / 'run', bad)
    args = (bad / 'args.yaml').read_text()
    args = args.replace('\ndata_path: ', f'\n{json.dumps(HOSTILE)}: {json.dumps("</td>" + HOSTILE)}\ndata_path: ')
    args = re.sub('^# .+', lambda _: f'# </pre>{HOSTILE} --x', args, count=1)
    (bad / 'args.yaml').write_text(args)
    for name, line in (('console.log', f'versions    1\nwarning: {HOSTILE}\nloss        {HOSTILE}\n'),):
        (bad / name).write_text(line)
    rows = [row | {f'train_loss_{HOSTILE}': 1.0, f'train_share_{HOSTILE}': 0.5} for row in toys.log_rows(bad)]
    write_rows(bad, rows)
    image = shutil.copy(folder / 'a.png', tmp_path / f'{HOSTILE}.png')
    page = report(tmp_path, bad, '--control', folder / 'soft', '--images', image)  # the parser knows no such tags
    assert page.texts('li') == [HOSTILE]
    assert page.rows('All arguments')[f'--{HOSTILE}'.replace('_', '-')] == ['</td>' + HOSTILE]
    assert page.rows('The run')['loss'] == [HOSTILE]
    assert page.texts('pre')[0].startswith('</pre>')
    assert f'_{HOSTILE}\ufffd' in page.rows('Accuracy after the last epoch, in percent')
    assert any(f'{HOSTILE}.png' in alt for _, alt, _ in page.images)


def test_damaged_files_are_left_out(folder, tmp_path):
    bad = tmp_path / 'bad'
    rows = toys.log_rows(folder / 'run')
    write_rows(bad, [rows[0] | {'test_acc1': float('nan'), 'test_acc5': 'high', 'n_parameters': None, 'x': 10**400}])
    (bad / 'args.yaml').write_text('a: [1\n')
    (bad / 'console.log').write_bytes(b'\xff\xfe\x00warning: x\n')
    (bad / 'metrics.jsonl').write_text('{"step": 1, "epoch": 0, "images_per_second": "fast"}\n[1]\n{"st')
    page = report(tmp_path, bad, '--control', folder / 'soft')
    assert page.rows('Accuracy on the validation images, in percent')['student, last epoch'][1:3] == ['–', '–']
    assert 'The run has no readable args.yaml.' in page.texts('p')
    (bad / 'args.yaml').unlink()
    os.mkfifo(bad / 'args.yaml')  # reading it would wait for ever
    assert run_files.read_run_files(bad).flags == {}


def test_list_that_is_endless_as_text_is_cut(tmp_path):
    lines = ['l0: &l0 [x, x]', *(f'l{i}: &l{i} [{", ".join([f"*l{i - 1}"] * 10)}]' for i in range(1, 30))]
    (tmp_path / 'args.yaml').write_text('\n'.join([*lines, f'long: {"y" * 9999}', f'big: 0x{"f" * 9000}']))
    flags = run_files.read_run_files(tmp_path).flags
    assert run_files.format_flag(flags['l29']) == ' '.join(['[…]'] * 10)
    assert len(run_files.format_flag(flags['long'])) < 2010
    assert run_files.format_flag(flags['big']) == '…'


# The command ----------------------------------------------------------------------------------------------------------


def error_of(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        tools.report.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count('\n') == 1
    return error


def test_bad_input_is_named_in_one_line(folder, tmp_path, capsys, monkeypatch):
    run, out = folder / 'run', ['--out', tmp_path / 'a.html']
    (tmp_path / 'log.txt').write_text('')
    assert 'RUN' in error_of(capsys, *out)
    assert f'RUN {tmp_path / "no"}: No such file' in error_of(capsys, tmp_path / 'no', *out)
    assert f'RUN {tmp_path}: log.txt has no rows' in error_of(capsys, tmp_path, *out)
    assert f'--control {tmp_path}: log.txt has no rows' in error_of(capsys, run, '--control', tmp_path, *out)
    assert f'--control {folder / "a.png"}: ' in error_of(capsys, run, '--control', folder / 'a.png', *out)
    assert f'--images {tmp_path}/b.png' in error_of(capsys, run, '--images', tmp_path / 'b.png', *out)
    assert '--teacher: 835' in error_of(capsys, run, '--teacher', '835', *out)
    images = ['--images', folder / 'a.png']
    assert '--teacher-path gone.pth' in error_of(capsys, run, *images, '--teacher-path', 'gone.pth', *out)
    assert '--teacher-path x.pth: is only read' in error_of(capsys, run, '--teacher-path', 'x.pth', *out)
    assert '--out a.txt: must end in .html or .htm' in error_of(capsys, run, '--out', 'a.txt')
    assert '--out /nowhere/a.html: the folder' in error_of(capsys, run, '--out', '/nowhere/a.html')
    (tmp_path / 'b.html').mkdir()
    assert f'--out {tmp_path / "b.html"}: Is a directory' in error_of(capsys, run, '--out', tmp_path / 'b.html')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert 'package matplotlib' in error_of(capsys, run, *out)
    assert not (tmp_path / 'a.html').exists()


# A browser ------------------------------------------------------------------------------------------------------------

MEASURE = """(() => {
  const root = document.documentElement, width = root.clientWidth;
  const wide = [...document.querySelectorAll('main *')].filter(
    each => !each.parentElement.closest('.scroll') && each.getBoundingClientRect().right > width + 0.5);
  const broken = [...document.images].filter(each => !each.complete || !each.naturalWidth);
  return [innerWidth, root.scrollWidth - width, wide.length, broken.length,
    getComputedStyle(document.body).backgroundColor];
})()"""


class Browser:
    """Chromium without a window, driven through its pipe with the DevTools protocol."""

    def __init__(self, path: str, profile: Path) -> None:
        pipes = [os.pipe(), os.pipe()]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (pipes[0][0], pipes[1][1])]

        def connect() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', f'--user-data-dir={profile}']
        self._process = subprocess.Popen(
            [path, *flags], preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for end in (*ends, pipes[0][0], pipes[1][1]):
            os.close(end)
        self._to, self._from, self._count = pipes[0][1], pipes[1][0], 0
        self._rest, self._session = b'', ''

    def __call__(self, method: str, **params: object) -> dict:
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': params}
        message |= {'sessionId': self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b'\0')
        while True:
            while b'\0' not in self._rest:
                assert select.select([self._from], [], [], 60)[0], f'no answer to {method}'
                self._rest += os.read(self._from, 1 << 20) or pytest.fail('the browser has ended')
            line, _, self._rest = self._rest.partition(b'\0')
            answer = json.loads(line)
            if answer.get('id') == self._count:
                return answer['result']

    def open(self, path: Path) -> None:
        target = self('Target.createTarget', url=path.as_uri())['targetId']
        self._session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']

    def evaluate(self, code: str) -> object:
        return self('Runtime.evaluate', expression=code, returnByValue=True)['result'].get('value')

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@pytest.fixture
def browser(tmp_path):
    found = Browser(str(CHROMIUM), tmp_path / 'profile')
    yield found
    found.close()


@pytest.mark.skipif(not CHROMIUM, reason='needs Chromium or Chrome, on the PATH or named by REPORT_BROWSER')
def test_browser_shows_all_pictures_and_scrolls_no_page_sideways(folder, tmp_path, browser):
    """On a telephone and on a screen, light and dark, with names and values that are long and have no spaces."""
    bad = tmp_path / ('long_name_' * 20)
    shutil.copytree(folder / 'run', bad)
    text = (bad / 'args.yaml').read_text()
    (bad / 'args.yaml').write_text(text.replace('\nmodel: ', f'\nmodel: {"x" * 300}').replace('# ', f'# {"y" * 300}'))
    (bad / 'console.log').write_text(f'versions    1\nwarning: {"z" * 300}\nloss        {"+" * 300}\n')
    page = report(tmp_path, bad, '--control', folder / 'soft', '--images', folder / 'a.png')
    browser.open(tmp_path / 'page.html')
    deadline = time.monotonic() + 30
    while browser.evaluate('document.readyState + document.images.length') != f'complete{len(page.images)}':
        assert time.monotonic() < deadline
        time.sleep(0.05)
    papers = set()
    for width in (390, 1280):
        for scheme in ('light', 'dark'):
            browser('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
            browser('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
            *measured, paper = browser.evaluate(MEASURE)
            assert measured == [width, 0, 0, 0]
            papers.add((scheme, paper))
    assert papers == {('light', 'rgb(255, 255, 255)'), ('dark', 'rgb(20, 23, 27)')}
