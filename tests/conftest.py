"""What the tests of experiments share: a cache with the LLM in it, papermill, checks of a run."""
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/ablation.ipynb'


def papermill_command(folder, notebook=NOTEBOOK, **parameters):
    """The command that runs a notebook.

    The executed one goes to `folder`, results to folder/out unless `out_dir` says otherwise or is None."""
    options = []
    for name, value in (dict(out_dir=folder/'out') | parameters).items():
        if isinstance(value, list):
            options += ['-y', f'{name}: {value}']
        elif value is not None:
            options += ['-p', name, str(value)]
    command = [sys.executable, '-m', 'papermill', notebook, folder/'executed.ipynb']
    return command + options + ['--no-progress-bar']


def environment(cache, **variables):
    return os.environ | dict(EGMI_CACHE=str(cache), HF_HUB_OFFLINE='1') | variables


def papermill(folder, cache, timeout=300, variables=(), **parameters):
    "Run the ablation, or another `notebook`, in `folder`; returns the finished process."
    return subprocess.run(
        papermill_command(folder, **parameters), cwd=folder, env=environment(cache, **dict(variables)),
        capture_output=True, text=True, timeout=timeout)


def run_experiment(folder, cache, notebook, **parameters):
    "Folder of the results of a run that must succeed."
    process = papermill(folder, cache, timeout=900, notebook=ROOT/f'nbs/{notebook}.ipynb', **parameters)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


def last_line(process):
    "What a failed command said last."
    assert process.returncode != 0
    return process.stderr.strip().splitlines()[-1]


def check_cells(notebook, **parameters):
    "Run a notebook's parameters, what papermill would inject, and the cells before the run starts."
    cells = [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    sources = [''.join(c['source']) for c in cells]
    namespace = {}
    exec(sources[0], namespace)
    namespace |= parameters
    for source in sources[1:]:
        exec(source, namespace)
        if 'run.start(' in source:
            return


def check_run(out, table, figures, n_sounds, baseline, config):
    "What holds for every experiment's results; returns its table, by system, and its record."
    record = json.loads((out/'run.json').read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    rows = pd.read_csv(out/f'{table}.csv').set_index('system')
    check_record(record, config)
    check_same(record['table'], rows)
    check_columns(rows, baseline)
    for name in (*figures, f'{table}.png', 'samples.png'):
        pixels = plt.imread(out/name)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > .01, name
    sounds = sorted(out.glob('*.wav'))
    assert len(sounds) == n_sounds
    for path in sounds:
        wave, rate = soundfile.read(path)
        assert (rate, wave.shape) == (16000, (40960,)) and np.isfinite(wave).all()
    leftovers = [path.name for path in out.rglob('*') if path.name.startswith('.')]
    assert not leftovers
    return rows, record


def check_record(record, config):
    "The parameters, and what a number needs to be repeated."
    assert config.items() <= record['config'].items() and record['config']['preset'] == 'mini'
    assert record['seeds'] == record['config']['seeds'] and record['peak_memory_gib'] > 0
    assert {'version', 'commit', 'dirty'} <= set(record['code'])
    assert {'torch', 'transformers', 'diffusers'} <= set(record['libraries'])
    assert {'cpu', 'cores', 'ram_gb', 'gpu'} <= set(record['hardware'])
    assert {'load', 'generation', 'scoring'} <= set(record['seconds'])
    assert all(seconds > 0 for seconds in record['seconds'].values())


def check_same(records, rows):
    "The record holds the table."
    table = pd.DataFrame(records).set_index('system')
    assert list(table.index) == list(rows.index) and list(table.columns) == list(rows.columns)
    for column in table.select_dtypes('number'):
        written = rows[column].astype(float)
        np.testing.assert_allclose(table[column].astype(float), written, rtol=1e-6)


def check_columns(rows, baseline):
    "Intervals hold their values, and differences are those of the values: row minus baseline."
    rows = rows[rows.n.notna()]  # without what others have published
    for column in rows.filter(regex='_low$').columns.str.removesuffix('_low'):
        given = rows[[f'{column}_low', column, f'{column}_high']].dropna().astype(float)
        assert len(given) and (given.diff(axis=1).iloc[:, 1:] >= -2e-4).all(axis=None), column
    compared = rows.filter(regex='_diff$').columns.str.removesuffix('_diff')
    assert len(compared)
    for column in compared:
        given = rows[f'{column}_diff'].dropna()
        assert len(given) and baseline not in given.index
        values = rows[column].astype(float)
        np.testing.assert_allclose(given, values[given.index] - values[baseline], atol=2e-4)
        assert rows.loc[given.index, f'{column}_diff_p'].between(0, 1, inclusive='right').all()


@pytest.fixture
def command(monkeypatch, capfd):
    "Runs `egmi` in this process: exit status, what it prints, its own lines on stderr."
    from egmi.commands.command import main

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['egmi', *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as e:
            status = e.code
        printed = capfd.readouterr()
        return status, printed.out, [line for line in printed.err.splitlines() if line.startswith('egmi')]
    return run


@pytest.fixture(scope='session')
def new_cache(tmp_path_factory):
    "Makes an empty cache that borrows only the converted LLM from the usual one."
    from egmi.base.config import cache_dir
    from egmi.frozen.llm import smollm2_path
    llm = smollm2_path()
    usual = cache_dir()

    def make():
        folder = tmp_path_factory.mktemp('cache')
        if llm.parent == usual:
            (folder/llm.name).symlink_to(llm)
        return folder
    return make


@pytest.fixture
def server(monkeypatch, tmp_path):
    "The stand-in for the hub, and a client with an empty cache that knows no other."
    import datasets
    import huggingface_hub.constants as hub
    from stand_in import serving
    with serving() as server:
        address = f'http://127.0.0.1:{server.server_port}'
        monkeypatch.setattr(hub, 'ENDPOINT', address)
        template = address + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(hub, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(datasets.config, 'HF_ENDPOINT', address)
        monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'datasets')
        for config in (hub, datasets.config):
            monkeypatch.setattr(config, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(hub, 'HF_HUB_DISABLE_XET', True)  # its uploads go to another server
        monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path/'hub'))
        monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'hub'))
        yield server
