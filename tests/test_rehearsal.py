"""`papermill nbs/ablation.ipynb -p preset paper -p weights tiny`: the paper's path with random weights, end to end."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, papermill

MAPPERS = ['Separated mapper', 'Cross mapper', 'EGMI mapper', 'Separated mapper, matched', 'Cross mapper, matched']
ANCHORS = ['text encoder (upper bound)', 'shuffled captions (floor)']
NOTE = 'random weights: a rehearsal'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rehearsal')
    process = papermill(folder, folder/'cache', preset='paper', weights='tiny', matched=True, seeds=[0, 1])
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


@pytest.fixture(scope='module')
def table(finished): return pd.read_csv(finished/'table3.csv').set_index('system')


def test_table_of_a_corpus_without_factors(table):
    assert sorted(table.index) == sorted(MAPPERS + ANCHORS)
    assert list(table.columns[:3]) == ['params', 'clip_text_image', 'clap_text_audio'] and list(table.columns[-2:]) == ['paper_clip', 'paper_clap']
    assert {'clip_image_image', 'clip_condition', 'clap_condition'} <= set(table) and not list(table.filter(regex='object|vocab|fd_'))
    assert (table.n == 4).all() and (table.seeds == '0 1').all()


def test_matched_mappers_are_as_large_as_egmi(table):
    params = table.params
    for system in ('Separated mapper', 'Cross mapper'): assert params['EGMI mapper'] <= params[f'{system}, matched'] < params[system]


def test_seeds_are_averaged(finished, table):
    by_seed = pd.read_csv(finished/'clips.csv').groupby(['system', 'seed'], dropna=False)[['clip_condition', 'clip_text_image']].mean()
    for system in MAPPERS:
        seeds = by_seed.loc[system]
        assert len(seeds) == 2 and seeds.clip_condition.nunique() == 2
        np.testing.assert_allclose(seeds.mean(), table.loc[system, seeds.columns].astype(float), atol=2e-4)
        np.testing.assert_allclose(seeds.std(ddof=1), table.loc[system, [f'{c}_sd' for c in seeds]].astype(float), atol=2e-4)


def test_every_rival_is_compared_with_egmi(table):
    rivals = [system for system in MAPPERS if system != 'EGMI mapper']
    compared = table.filter(like='_minus_egmi')
    assert len(compared.columns) == 8 and compared.loc[rivals].notna().all(axis=None) and compared.drop(rivals).isna().all(axis=None)


def test_random_weights_never_look_like_results(finished, table):
    assert (table.note == NOTE).all() and table[['paper_clip', 'paper_clap']].isna().all(axis=None)
    record = json.loads((finished/'run.json').read_text())
    assert record['note'] == NOTE and record['config']['weights'] == 'tiny' and record['n'] == dict(train=16, test=4)
    assert f'preset random-tiny, {NOTE}' in (finished.parent/'executed.ipynb').read_text()
    assert json.loads((finished/'egmi/config.json').read_text())['preset'] == 'random-tiny'


def test_report_says_it_of_the_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path/'runs/ablation')
    done = papermill(tmp_path, tmp_path/'cache', notebook=ROOT/'nbs/report.ipynb', runs=tmp_path/'runs', out_dir=None)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'paper, {NOTE}' in (tmp_path/'executed.ipynb').read_text()


def test_every_stage_was_run_and_timed(finished):
    seconds = json.loads((finished/'run.json').read_text())['seconds']
    assert {'writing random weights', 'load', 'features and targets', 'prefixes', 'training', 'generation', 'scoring'} <= {k for k, s in seconds.items() if s > 0}
