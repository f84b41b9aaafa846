"""The pages and the files about the project, against the program."""

import re
from pathlib import Path

import pytest

import main

ROOT = Path(main.__file__).parent


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
