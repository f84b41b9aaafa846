"""The pages and the files about the project, against the program."""

import re
import subprocess
from pathlib import Path

import pytest
from test_flags import FLAGS as RELEASE_FLAGS

import main
from tools import flags_page

ROOT = Path(main.__file__).parent
SCRIPTS = [*sorted(ROOT.glob('scripts/*.sh')), ROOT / '.ci' / 'run']


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


def test_flags_page_equals_the_parser():
    assert flags_page.PAGE.read_text() == flags_page.page(), 'run python -m tools.flags_page'


def test_flags_page_marks_the_flags_of_the_release():
    assert {f'--{flag}' for flag, _, _ in RELEASE_FLAGS} == flags_page.RELEASE


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(['bash', '-n', script], check=True)
