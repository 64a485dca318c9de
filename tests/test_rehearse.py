"""tools/rehearse.py: tables within a time limit, and a record of each."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT, environment


def rehearse(folder, *options, timeout=120):
    command = [sys.executable, ROOT/'tools/rehearse.py', '--weights', 'tiny', '--out', folder/'out', *options]
    return subprocess.run(
        command, cwd=folder, env=environment(folder/'cache'), capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_what_does_not_fit_is_stopped_and_recorded(tmp_path):
    done = rehearse(tmp_path, '--tables', '2 1', '--limit', '4')
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == 'table 1: 0 s, skipped: no time was left'
    records = [json.loads((tmp_path/f'out/rehearsal-table{table}.json').read_text()) for table in (2, 1)]
    assert [record['finished'] for record in records] == [False, False]
    assert records[0]['error'] == 'stopped after 4 s'
    assert records[0]['total_seconds'] < 60
    assert not list(tmp_path.glob('runs'))


@pytest.mark.slow
def test_an_error_of_the_notebook_is_the_record_s(tmp_path):
    done = rehearse(tmp_path, '--tables', '2', 'n_evil=3')
    assert done.returncode == 1
    record = json.loads((tmp_path/'out/rehearsal-table2.json').read_text())
    assert record['error'] == "ValueError: unknown parameter 'n_evil': did you mean 'n_eval'?"


@pytest.mark.parametrize(('options', 'line'), [
    (['--tables', '3 4'], '--tables takes some of 1, 2 and 3, not 4'),
    (['--tables', ''], '--tables takes some of 1, 2 and 3, not nothing'),
    (['--limit', '0'], '--limit must be positive, not 0')])
def test_bad_options(tmp_path, options, line):
    done = rehearse(tmp_path, *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(line)
    assert not (tmp_path/'out').exists()
