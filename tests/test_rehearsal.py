"""The three tables with `-p preset paper -p weights tiny`: the paper's path with random weights, end to end.

The working folder is neither the repository nor that of the weights, which have the published names."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, environment, papermill, run_experiment

pytestmark = pytest.mark.slow

RIVALS = ['Separated mapper', 'Cross mapper', 'Separated mapper, matched', 'Cross mapper, matched']
MAPPERS = ['EGMI mapper', *RIVALS]
ANCHORS = ['text encoder (upper bound)', 'shuffled captions (floor)']
NOTE = 'random weights: a rehearsal'


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def finished(tmp_path_factory, cache):
    "Folder of the results of the ablation."
    folder = tmp_path_factory.mktemp('table3')
    return run_experiment(
        folder, cache, 'ablation', preset='paper', weights='tiny', matched=True, seeds=[0, 1])


@pytest.fixture(scope='module')
def record(finished):
    return json.loads((finished/'run.json').read_text())


@pytest.fixture(scope='module')
def table(finished):
    return pd.read_csv(finished/'table3.csv').set_index('system')


def test_table_of_a_corpus_without_factors(table):
    assert sorted(table.index) == sorted(MAPPERS + ANCHORS)
    assert list(table.columns[:4]) == [
        'params', 'clip_text_image', 'clap_text_audio', 'clap_text_audio_audiocaps']
    assert list(table.columns[-2:]) == ['paper_clip', 'paper_clap']
    assert {'clip_image_image', 'clip_condition', 'clap_condition'} <= set(table)
    assert list(table.filter(regex='object|vocab|fd_')) == []
    assert (table.n == 4).all()
    assert (table.n_audiocaps == 4).all()
    assert (table.seeds == '0 1').all()


def test_matched_mappers_are_as_large_as_egmi(table):
    params = table.params
    for system in ('Separated mapper', 'Cross mapper'):
        assert params['EGMI mapper'] <= params[f'{system}, matched'] < params[system]


def test_seeds_are_averaged(finished, table):
    columns = ['clip_condition', 'clip_text_image']
    clips = pd.read_csv(finished/'clips.csv')
    by_seed = clips.groupby(['system', 'seed'], dropna=False)[columns].mean()
    for system in MAPPERS:
        seeds = by_seed.loc[system]
        means = table.loc[system, columns].astype(float)
        deviations = table.loc[system, [f'{column}_sd' for column in columns]].astype(float)
        assert len(seeds) == 2 and seeds.clip_condition.nunique() == 2
        np.testing.assert_allclose(seeds.mean(), means, atol=2e-4)
        np.testing.assert_allclose(seeds.std(ddof=1), deviations, atol=2e-4)


def test_every_rival_is_compared_with_egmi(table):
    compared = table.filter(like='_diff')
    assert len(compared.columns) == 12
    assert compared.loc[RIVALS].notna().all(axis=None)
    assert compared.drop(RIVALS).isna().all(axis=None)


def test_sounds_of_audiocaps_are_compared_with_their_own_captions(finished, table, cache, monkeypatch):
    from egmi.evaluation.outputs import load_network, run_on_arrays, weights_path
    from egmi.small.random_weights import TINY, random_preset, weight_variables
    from egmi.toybox.scenes import toybox
    root, = cache.glob('rehearsal/*/tiny')
    for name, value in weight_variables(root).items():
        monkeypatch.setenv(name, value)
    clap = load_network('clap', weights_path(random_preset(TINY).clap), 'cpu')
    text_ND = clap.embed_texts([scene.caption for scene in toybox('validation', 4)])
    clips = pd.read_csv(finished/'clips.csv').query('split == "audiocaps"')
    ceiling, floor = ANCHORS
    sources = [('EGMI mapper', 'EGMI mapper-0', 0), (ceiling, ceiling, 0), (floor, ceiling, 1)]
    for system, files, shift in sources:
        path, = cache.glob(f'ablation/generation/*/*/{files}-audiocaps-0-4-audio.npy')
        audio_ND = run_on_arrays('clap', clap, np.load(path), 16_000)['embedding']
        described_ND = np.roll(text_ND, -shift, axis=0)
        norms_N = np.linalg.norm(audio_ND, axis=1) * np.linalg.norm(described_ND, axis=1)
        found_N = clips.clap_text_audio[clips.system == system][:4]
        np.testing.assert_allclose(found_N, (audio_ND * described_ND).sum(1) / norms_N, atol=2e-4)
    means = clips.groupby('system').clap_text_audio.mean()
    np.testing.assert_allclose(means[table.index], table.clap_text_audio_audiocaps, atol=2e-4)
    assert not list(cache.glob('ablation/generation/*/*/*-audiocaps-*-images.npy'))


def test_random_weights_never_look_like_results(finished, table, record):
    assert (table.note == NOTE).all()
    assert table[['paper_clip', 'paper_clap']].isna().all(axis=None)
    assert record['note'] == NOTE
    assert record['config']['weights'] == 'tiny'
    assert record['n'] == dict(train=16, test=4, audiocaps=4)
    assert f'preset random-tiny, {NOTE}' in (finished.parent/'executed.ipynb').read_text()
    assert json.loads((finished/'egmi/config.json').read_text())['preset'] == 'random-tiny'


def test_report_says_it_of_the_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path/'runs/ablation')
    options = dict(runs=tmp_path/'runs', out_dir=None)
    done = papermill(tmp_path, tmp_path/'cache', notebook=ROOT/'nbs/report.ipynb', **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'paper, {NOTE}' in (tmp_path/'executed.ipynb').read_text()


def test_every_stage_was_run_and_timed(record):
    stages = {'writing random weights', 'load', 'features', 'prefixes', 'targets', 'training',
              'generation', 'scoring'}
    assert stages <= {stage for stage, seconds in record['seconds'].items() if seconds > 0}


# What was written, and what was read

FILES = ['vicuna-7b-v0', 'imagebind_huge.pth', 'Cnn14_16k_mAP=0.438.pth', 'vggish-10086976.pth']
REPOSITORIES = [
    'openllmplayground/pandagpt_7b_max_len_1024', 'stable-diffusion-v1-5/stable-diffusion-v1-5',
    'cvssp/audioldm-l-full', 'openai/clip-vit-large-patch14', 'laion/clap-htsat-unfused']


def test_weights_lie_where_egmi_weights_says(finished, cache):
    root, = cache.glob('rehearsal/*/tiny')
    names = {p.relative_to(root).as_posix() for p in [*root.glob('weights/*'), *root.glob('hub/*')]}
    expected = {f'weights/{name}' for name in FILES}
    expected |= {f'hub/models--{name.replace("/", "--")}' for name in REPOSITORIES}
    assert names == expected
    assert all((root/'weights'/name).is_file() for name in FILES[1:])
    variables = environment(cache, EGMI_WEIGHTS=f'{root}/weights', HF_HUB_CACHE=f'{root}/hub')
    command = [sys.executable, '-m', 'egmi', 'weights', 'paper']
    process = subprocess.run(command, cwd=cache, capture_output=True, text=True, env=variables)
    rows = [line.rstrip() for line in process.stdout.splitlines() if str(root) in line]
    present = [row for row in rows if row.endswith('present')]
    assert len(present) == 6  # the three files have other sizes than published


# Tables 1 and 2

def test_table_1_with_the_mapper_of_table_3(finished, table, cache, tmp_path):
    options = dict(preset='paper', weights='tiny', mapper=finished/'egmi')
    out = run_experiment(tmp_path, cache, 'text_to_audio', **options)
    table1 = pd.read_csv(out/'table1.csv').set_index('system')
    ours = table1[table1.kind != 'published']
    assert (ours.note == NOTE).all()
    assert (ours.corpus == 'Toybox').all()
    assert (ours.classifier == 'cnn14, vggish').all()
    measures = ['fd_audio', 'fad_audio', 'is_audio', 'kl_audio', 'kad_audio', 'clap_text_audio']
    assert np.isfinite(ours.loc[['EGMI', 'AudioLDM', 'ground truth'], measures]).all(axis=None)
    assert ours.params['EGMI'] == table.params['EGMI mapper']
    record = json.loads((out/'run.json').read_text())
    assert record['note'] == NOTE
    assert record['training']['EGMI']['n_train'] == 16


def test_table_2_without_an_output_path(cache, tmp_path):
    "`papermill nbs/audio_editing.ipynb` prints the executed notebook where its output is no terminal."
    notebook = ROOT/'nbs/audio_editing.ipynb'
    before = notebook.read_bytes()
    command = [sys.executable, '-m', 'papermill', notebook, '-p', 'preset', 'paper', '-p', 'weights', 'tiny']
    process = subprocess.run(
        command, cwd=tmp_path, env=environment(cache), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout)['cells']
    assert notebook.read_bytes() == before
    out = tmp_path/'runs/random-tiny/audio_editing'
    table2 = pd.read_csv(out/'table2.csv')
    speech = pd.read_csv(out/'vctk.csv')
    ours = table2[table2.published_mcd_audio.isna()]
    assert (ours.note == NOTE).all()
    assert np.isfinite(ours[['mcd_audio', 'clap_text_audio']]).all(axis=None)
    assert 'changed_audio' not in table2
    assert np.isfinite(speech[['mcd_audio_segment', 'mcd_audio_utterance']]).all(axis=None)
    assert json.loads((out/'run.json').read_text())['note'] == NOTE
