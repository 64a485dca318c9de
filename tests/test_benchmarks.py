"""`papermill nbs/benchmarks.ipynb` at scale tiny, and `make gpu-check` where there is no GPU."""
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT, papermill

NOTEBOOK = ROOT/'nbs/benchmarks.ipynb'
TRAINING = ['prefix in each step', 'kept prefixes', 'full sequence', "peers' loop, mapper as ours"]
WAYS = {
    'matmul': ['256 rows'],
    'extraction': ['one process, float32', 'workers, as the preset has it'],
    'pictures': ['diffusers, one by one', 'egmi, 2 at once', 'egmi, 2 at once, channels last'],
    'sounds': ['diffusers, one by one', 'egmi, 2 at once', 'egmi, 2 at once, channels last'],
    'Fréchet distance': ['torchmetrics', 'scipy sqrtm', 'egmi'],
    'mel cepstral distortion': ['our cepstra, dtw-python', 'MFCC, dtw-python', 'egmi'],
    'Cnn14': ['batches of 1', 'batches of 8']}


def run(folder, **parameters):
    "The finished process of a tiny run on the CPU."
    settings = dict(device='cpu', scale='tiny', limit_s=3000) | parameters
    return papermill(folder, folder/'cache', timeout=900, notebook=NOTEBOOK, **settings)


def cells_until(words, **parameters):
    "The names that a notebook's cells define, up to the first cell with these words."
    cells = json.loads(NOTEBOOK.read_text())['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    namespace = {}
    exec(sources[0], namespace)
    namespace |= parameters
    for source in sources[1:]:
        exec(source, namespace)
        if words in source:
            return namespace


def write_table2(folder, value):
    path = folder/'audio_editing/table2.csv'
    path.parent.mkdir(parents=True)
    path.write_text(f'system,mcd_audio,mcd_audio_low,n\nEGMI,{value},1.0,96\n')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Folder of the results of a run that finds tables of two devices."
    folder = tmp_path_factory.mktemp('benchmarks')
    write_table2(folder/'cpu', 8.)
    write_table2(folder/'out', 8.2)
    process = run(folder, cpu_tables=folder/'cpu')
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


@pytest.fixture(scope='module')
def table(finished):
    return pd.read_csv(finished/'benchmarks.csv')


@pytest.mark.slow
def test_every_measurement_has_its_row(table):
    found = {what: list(rows.way) for what, rows in table.groupby('what')}
    training = table[table.what == 'training'].groupby('batch').way
    assert {what: found[what] for what in WAYS} == WAYS
    assert set(found) == {*WAYS, 'training'}
    assert list(training.groups) == [2, 4, 6]
    assert all(sorted(set(ways)) == sorted(["peers' loop", *TRAINING]) for _, ways in training)
    assert table.error.isna().all()


@pytest.mark.slow
def test_numbers_are_finite_and_positive(table):
    for column in ('value', 'times_peers', 'ms', 'host_gib'):
        assert np.isfinite(table[column]).all() and (table[column] > 0).all(), column
    training = table[table.what == 'training']
    for column in ('pairs_s', 'mfu', 'loss'):
        assert np.isfinite(training[column]).all() and (training[column] > 0).all(), column
    np.testing.assert_allclose(training.value, training.pairs_s * training.systems, rtol=1e-3)
    np.testing.assert_allclose(training.pairs_s, 1e3 * training.batch / training.ms, rtol=1e-3)
    rates = table.set_index(['what', 'way']).value
    gain = rates['Cnn14', 'batches of 8'] / rates['Cnn14', 'batches of 1']
    batched = table[(table.what == 'Cnn14') & (table.way == 'batches of 8')]
    np.testing.assert_allclose(batched.times_peers, gain, rtol=1e-3)


@pytest.mark.slow
def test_all_ways_begin_with_the_same_loss(table):
    training = table[table.what == 'training']
    assert 3 in set(training.systems)
    for _, rows in training.groupby('batch'):
        assert len(rows) >= 5 and np.ptp(rows.loss) < 1e-4
    assert training.groupby('batch').loss.mean().nunique() == 3


@pytest.mark.slow
def test_metrics_agree_with_the_libraries(table):
    rows = table.set_index(['what', 'way']).difference
    assert rows['Fréchet distance', 'egmi'] < 1e-6
    assert rows['mel cepstral distortion', 'egmi'] < 1e-9
    assert rows['Cnn14', 'batches of 8'] < 1e-4


@pytest.mark.slow
def test_tables_of_two_devices_stand_side_by_side(finished):
    row, = pd.read_csv(finished/'tables.csv').to_dict('records')
    assert row == dict(
        table='table2', system='EGMI', column='mcd_audio', first=8., second=8.2, per_cent=2.5)


@pytest.mark.slow
def test_record(finished, table):
    record = json.loads((finished/'run.json').read_text(), parse_constant=pytest.fail)
    assert record['config']['scale'] == 'tiny' and record['hardware']['cores'] == os.cpu_count()
    assert len(record['table']) == len(table)
    assert {'training', 'pictures', 'extraction'} <= set(record['seconds'])


@pytest.mark.slow
def test_a_measurement_that_fails_stops_no_other(tmp_path):
    names = cells_until('def measure(', scale='tiny', device='cpu', out_dir=str(tmp_path))
    measure = names['measure']
    measure('sum', 'peer', lambda: dict(value=2.))
    measure('sum', 'too large', lambda: torch.empty(2**60))
    measure('sum', 'ours', lambda: dict(value=3.))
    names['limit_s'] = 0
    measure('sum', 'too late', lambda: dict(value=4.))
    rows = pd.read_csv(tmp_path/'benchmarks.csv').set_index('way')
    assert rows.times_peers[['peer', 'ours']].tolist() == [1, 1.5]
    assert rows.error['too large'].startswith('RuntimeError:')
    assert rows.error['too late'] == 'skipped after 0 s'
    assert rows.value.isna().tolist() == [False, True, False, True]


@pytest.mark.slow
def test_wrong_scale_is_one_line():
    with pytest.raises(ValueError) as raised:
        cells_until('scale not in', scale='huge')
    assert str(raised.value) == "scale must be full, mini or tiny, not 'huge'"


def test_gpu_check_without_a_gpu(tmp_path):
    "Nothing is installed, imported or written: the only programs on the path are the shell's."
    driver = tmp_path/'nvidia-smi'
    driver.write_text('#!/bin/sh\necho No devices were found\nexit 6\n')
    driver.chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    variables = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
    process = subprocess.run(
        ['make', 'gpu-check', f'OUT={tmp_path}/out', f'STAMP={tmp_path}/stamp'], cwd=ROOT,
        env=variables | dict(PATH=path), capture_output=True, text=True)
    said = process.stderr.splitlines()
    assert process.returncode != 0 and process.stdout == ''
    assert said[0] == 'make gpu-check needs an NVIDIA GPU, and nvidia-smi finds none here'
    assert said[1].endswith('Error 1') and len(said) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['nvidia-smi']
