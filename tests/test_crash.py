"""The short form of `scripts/crash_test.sh`: real runs in processes of their own, broken and continued."""

import json
import os
import subprocess
import sys

import pytest
from test_cli import ROOT

ROWS = {
    'R1': 'a_run_killed_anywhere_ends_in_the_same_bits',
    'R2': 'whatever_is_left_out_of_the_state_is_missed',
    'R3': 'any_signal_to_any_rank_saves_and_all_leave',
    'R4': 'restarts_and_another_number_of_ranks_change_nothing',
    'R5': 'a_disk_that_is_full_leaves_the_file_before_and_training_goes_on',
    'R6': 'a_damaged_file_is_known_and_the_one_before_taken',
    'R9': 'evaluation_counts_each_image_once_on_any_number_of_ranks',
    'R10': 'what_is_not_finite_on_one_rank_reaches_the_weights_of_none',
    'R12': 'an_exception_anywhere_ends_all_ranks_and_is_printed_once',
    'R14': 'no_kill_leaves_more_files_than_promised',
}


HALVES = [['R1', 'R2'], [name for name in ROWS if name not in ('R1', 'R2', 'R14')]]  # R14 comes with R1


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """What each row came to, by its name."""
    paths = [tmp_path_factory.mktemp('crash') / 'rows.json' for _ in HALVES]
    command = [sys.executable, 'tools/crash_test.py', '--short', '--json']
    runs = [
        subprocess.Popen([*command, path, '--only', *half], cwd=ROOT, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
        for path, half in zip(paths, HALVES, strict=True)
    ]
    for run in runs:
        run.wait()
    return {row['name']: row for path in paths for row in json.loads(path.read_text())}


@pytest.mark.parametrize('name', ROWS, ids=ROWS.values())
def test_the_promise_is_kept_that(table, name):
    row = table[name]
    assert row['faults'] == [], row['reached']
    assert row['good'], row['reached']
