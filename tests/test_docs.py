"""The pages and the files about the project, against the program."""

import re
import subprocess
from pathlib import Path

import pytest
from test_flags import FLAGS as RELEASE_FLAGS

import flags
import main
from tools import flags_page, rivals

ROOT = Path(main.__file__).parent
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), ROOT / 'benchmarks' / 'README.md'])
SCRIPTS = [*sorted(ROOT.glob('scripts/*.sh')), ROOT / '.ci' / 'run']
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]

# Flags on the pages that belong to other programs.
FOREIGN_FLAGS = {
    'nproc_per_node', 'standalone', 'max-restarts', 'nnodes', 'rdzv-backend', 'rdzv-endpoint', 'rdzv-id',  # torchrun
    'open-mode', 'signal', 'nodes', 'ntasks-per-node', 'gpus-per-node', 'cpus-per-task',  # sbatch
}  # fmt: skip
# Flags and files that are gone, by the page that says so.
REMOVED_FLAGS = {'CHANGELOG.md': {'non-finite', 'relation-scale'}}
# Written by a run, or to be written by the reader.
WRITTEN_FILES = {'args.yaml', 'FILE.yaml', 'PLAN.yaml'}
REMOVED_FILES = {'CHANGELOG.md': {'augment.py', 'models/tap.py', 'models/weights.py'}}


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith('#'))


@pytest.fixture(scope='module')
def pyproject() -> dict:
    tomllib = pytest.importorskip('tomllib', reason='needs Python 3.11')
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def test_requirements_files_equal_pyproject(pyproject):
    project = pyproject['project']
    extras = project['optional-dependencies']
    assert requirements('requirements.txt') == sorted(project['dependencies'])
    assert requirements('requirements-dev.txt') == sorted(extras['dev'] + extras['demo'])


def test_version_of_citation_equals_pyproject(pyproject):
    (version,) = re.findall(r'^version: (.+)$', (ROOT / 'CITATION.cff').read_text(), re.MULTILINE)
    assert version == pyproject['project']['version']


def test_no_module_is_installed(pyproject):
    assert pyproject['tool']['setuptools'] == {'packages': [], 'py-modules': []}


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_flags_page_equals_the_parser():
    assert flags_page.PAGE.read_text() == flags_page.page(), 'run python -m tools.flags_page'


def test_flags_page_marks_the_flags_of_the_release():
    assert {f'--{flag}' for flag, _, _ in RELEASE_FLAGS} == flags_page.RELEASE


def known_flags() -> set[str]:
    """Without their dashes: the flags of main.py, tools and benchmarks, and those of other programs."""
    rival_flags = {f'w-{name}' for name in rivals.RIVALS}
    main_flags = {name.lstrip('-') for action in flags.get_args_parser()._actions for name in action.option_strings}
    sources = [path.read_text() for folder in ('tools', 'benchmarks') for path in (ROOT / folder).glob('*.py')]
    others = {name for source in sources for name in re.findall(r"add_argument\('--([\w-]+)'", source)}
    return {name.replace('_', '-') for name in main_flags | others | rival_flags | FOREIGN_FLAGS}


@pytest.mark.parametrize('page', PAGES, ids=PAGE_IDS)
def test_every_flag_on_a_page_exists(page):
    # `--w-<name>` is a pattern and not a flag.
    code = re.findall(r'```.*?```|`[^`]+`', page.read_text(), re.DOTALL)
    named = {
        name.replace('_', '-')
        for text in code
        for name in re.findall(r'(?<![\w-])--([A-Za-z](?:[\w-]*\w)?)(?![\w<-])', text)
    }
    assert named - known_flags() - REMOVED_FLAGS.get(page.name, set()) == set()


@pytest.mark.parametrize('page', PAGES, ids=PAGE_IDS)
def test_every_named_file_exists(page):
    code = '\n'.join(re.findall(r'```.*?```|`[^`]+`', page.read_text(), re.DOTALL))
    files = set(re.findall(r'(?<![\w./-])[\w./-]+\.(?:py|sh|md|toml|yaml|yml|cff)\b', code))
    modules = {name.replace('.', '/') + '.py' for name in re.findall(r'python -m ((?:tools|benchmarks)\.\w+)', code)}
    missing = {file for file in files | modules if not ((ROOT / file).exists() or (page.parent / file).exists())}
    assert missing - WRITTEN_FILES - REMOVED_FILES.get(page.name, set()) == set()


@pytest.mark.parametrize('page', PAGES, ids=PAGE_IDS)
def test_every_relative_link_leads_to_a_file(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', page.read_text())
    files = {target.split('#')[0] for target in targets if not target.startswith(('http://', 'https://', '#'))}
    assert [file for file in sorted(files) if not (page.parent / file).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    titles = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=PAGE_IDS)
def test_every_anchor_is_a_heading(page):
    for file, anchor in re.findall(r'\]\(([\w./-]*)#([^)\s]+)\)', page.read_text()):
        assert anchor in headings(page.parent / file if file else page), f'{file}#{anchor}'


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(['bash', '-n', script], check=True)
