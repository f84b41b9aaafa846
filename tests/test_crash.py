"""The short form of `scripts/crash_test.sh`: real runs are broken and resumed. Run with `-m crash`."""

import json
import os
import subprocess
import sys

import pytest
import toys

pytestmark = pytest.mark.crash

ROWS = {
    'R1': 'killed_run_resumes_exactly',
    'R2': 'every_part_of_the_state_matters',
    'R3': 'signal_to_any_rank_saves_and_stops_all',
    'R4': 'restarts_and_number_of_ranks_change_nothing',
    'R5': 'full_disk_keeps_the_previous_file_and_training_continues',
    'R6': 'damaged_file_falls_back_to_the_previous_one',
    'R9': 'evaluation_counts_each_image_once',
    'R10': 'non_finite_rank_changes_no_weights',
    'R12': 'exception_ends_all_ranks_and_prints_once',
    'R14': 'kill_leaves_no_extra_files',
}


HALVES = [['R1', 'R2'], [name for name in ROWS if name not in ('R1', 'R2', 'R14')]]  # R1 also reports R14


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """The rows of the table by name."""
    paths = [tmp_path_factory.mktemp('crash') / 'rows.json' for _ in HALVES]
    command = [sys.executable, 'tools/crash_test.py', '--short', '--json']
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    runs = [
        subprocess.Popen([*command, path, '--only', *half], cwd=toys.ROOT, env=environment)
        for path, half in zip(paths, HALVES, strict=True)
    ]
    for run in runs:
        run.wait()
    return {row['name']: row for path in paths for row in json.loads(path.read_text())}


@pytest.mark.parametrize('name', ROWS, ids=ROWS.values())
def test_promise_holds(table, name):
    row = table[name]
    assert row['problems'] == [], row['reached']
    assert row['good'], row['reached']
