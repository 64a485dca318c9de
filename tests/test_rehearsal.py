"""The three tables with `-p preset paper -p weights tiny`: the paper's path with random weights, end to end.

The working folder is neither the repository nor the folder of the weights, and the weights go by the published names."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, environment, papermill

MAPPERS = ['Separated mapper', 'Cross mapper', 'EGMI mapper', 'Separated mapper, matched', 'Cross mapper, matched']
ANCHORS = ['text encoder (upper bound)', 'shuffled captions (floor)']
NOTE = 'random weights: a rehearsal'


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def rehearse(folder, cache, **parameters):
    "Run a notebook with tiny random weights; returns the folder of its results."
    process = papermill(folder, cache, preset='paper', weights='tiny', **parameters)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


@pytest.fixture(scope='module')
def finished(tmp_path_factory, cache):
    return rehearse(tmp_path_factory.mktemp('table3'), cache, matched=True, seeds=[0, 1])


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


# What was written, and what was read

def test_weights_lie_where_egmi_weights_says(finished, cache):
    root, = cache.glob('rehearsal/*/tiny')
    names = {p.relative_to(root).as_posix() for p in [*root.glob('weights/*'), *root.glob('hub/*')]}
    repositories = ('openllmplayground/pandagpt_7b_max_len_1024', 'stable-diffusion-v1-5/stable-diffusion-v1-5',
                    'cvssp/audioldm-l-full', 'openai/clip-vit-large-patch14', 'laion/clap-htsat-unfused')
    files = ('vicuna-7b-v0', 'imagebind_huge.pth', 'Cnn14_16k_mAP=0.438.pth', 'vggish-10086976.pth')
    assert names == {f'weights/{name}' for name in files} | {f'hub/models--{name.replace("/", "--")}' for name in repositories}
    assert all((root/'weights'/name).is_file() for name in files[1:])
    process = subprocess.run([sys.executable, '-m', 'egmi.frozen.weights', 'paper'], cwd=cache, capture_output=True, text=True,
                             env=environment(cache, EGMI_WEIGHTS=f'{root}/weights', HF_HUB_CACHE=f'{root}/hub'))
    rows = [line for line in process.stdout.splitlines() if str(root) in line]
    assert len([line for line in rows if line.rstrip().endswith('present')]) == 6  # the three files have other sizes than published


# Tables 1 and 2

def test_table_1_with_the_mapper_of_table_3(finished, cache, tmp_path):
    out = rehearse(tmp_path, cache, notebook=ROOT/'nbs/text_to_audio.ipynb', mapper=finished/'egmi')
    table = pd.read_csv(out/'table1.csv').set_index('system')
    ours = table[table.kind != 'published']
    assert (ours.note == NOTE).all() and (ours.corpus == 'Toybox').all() and (ours.listener == 'cnn14, vggish').all()
    assert np.isfinite(ours.loc[['EGMI', 'AudioLDM', 'ground truth'], ['FD', 'FAD', 'IS', 'KL', 'KAD', 'CLAP']]).all(axis=None)
    assert ours.params['EGMI'] == pd.read_csv(finished/'table3.csv').set_index('system').params['EGMI mapper']
    record = json.loads((out/'run.json').read_text())
    assert record['note'] == NOTE and record['training']['EGMI']['n_train'] == 16


def test_table_2_without_an_output_path(cache, tmp_path):
    "`papermill nbs/audio_editing.ipynb` prints the executed notebook where its output is no terminal, and changes nothing in nbs."
    notebook = ROOT/'nbs/audio_editing.ipynb'
    before = notebook.read_bytes()
    command = [sys.executable, '-m', 'papermill', notebook, '-p', 'preset', 'paper', '-p', 'weights', 'tiny']
    process = subprocess.run(command, cwd=tmp_path, env=environment(cache), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout)['cells'] and notebook.read_bytes() == before
    out = tmp_path/'runs/random-tiny/audio_editing'
    table, speech = pd.read_csv(out/'table2.csv'), pd.read_csv(out/'vctk.csv')
    ours = table[table.paper_mcd.isna()]
    assert (ours.note == NOTE).all() and np.isfinite(ours[['mcd', 'clap']]).all(axis=None) and 'changed' not in table
    assert np.isfinite(speech[['segment_mcd', 'utterance_mcd']]).all(axis=None)
    assert json.loads((out/'run.json').read_text())['note'] == NOTE
