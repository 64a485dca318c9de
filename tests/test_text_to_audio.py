"""`papermill nbs/text_to_audio.ipynb` writes Table 1, and continues after a crash."""
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import soundfile

from conftest import ROOT, last_line, papermill

TINY = dict(notebook=ROOT/'nbs/text_to_audio.ipynb', steps=2, batch_size=2, n_train=4, n_eval=6, sampling_steps=1)
SYSTEMS = ['EGMI', 'NExT-GPT-style mapper', 'GILL-style mapper', 'AudioLDM']
ANCHORS = ['ground truth', 'other recordings', 'vocoder round trip', 'shuffled captions (floor)', 'silence', 'noise']
HALVES = 'ground truth, halves'
METRICS = ['FD', 'IS', 'KL', 'KAD', 'CLAP']


@pytest.fixture(scope='module')
def cache(new_cache):
    return new_cache()


@pytest.fixture(scope='module')
def finished(tmp_path_factory, cache):
    "Results of one uninterrupted run."
    folder = tmp_path_factory.mktemp('finished')
    process = papermill(folder, cache, timeout=900, **TINY)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


@pytest.fixture(scope='module')
def table(finished):
    return pd.read_csv(finished/'table1.csv').set_index('system')


@pytest.fixture(scope='module')
def measured(table):
    return table[table.kind != 'published'].drop(HALVES)


def test_table_has_every_row(table):
    assert table.index[table.kind == 'measured'].tolist() == SYSTEMS
    assert table.index[table.kind == 'anchor'].tolist() == [*ANCHORS, HALVES]
    published = table[table.kind == 'published']
    assert len(published) == 14 and published.published_printed.dropna().tolist() == [47.68, 49.48, 23.31, 22.90, 23.58, 26.51]
    assert published.published_FD['AudioLDM-S'] == 29.48 and published.source.notna().all()


def test_measured_and_published_numbers_share_no_column(table, measured):
    columns = [c for c in table if c.startswith('published_')]
    assert len(columns) == 5 and measured[columns].isna().all(axis=None)
    assert table.loc[table.kind == 'published', METRICS].isna().all(axis=None)
    assert set(measured.corpus) == {'Toybox'} and set(table.corpus[table.kind == 'published']) == {'AudioCaps'}


def test_measured_numbers_are_finite_and_inside_their_intervals(measured):
    assert np.isfinite(measured[METRICS].to_numpy(dtype=float)).all()
    for metric in ('KL', 'CLAP'): assert (measured[f'{metric}_low'].le(measured[metric]) & measured[metric].le(measured[f'{metric}_high'])).all()
    for metric in ('FD', 'KAD'): assert measured.loc[SYSTEMS, f'{metric}_low'].lt(measured.loc[SYSTEMS, f'{metric}_high']).all()
    assert measured.filter(like='_p').dropna().stack().between(0, 1).all()
    assert measured.KL_vs_EGMI.isna().sum() == 1 and np.isnan(measured.KL_vs_EGMI['EGMI'])


def test_halves_of_the_recordings_are_a_floor_of_their_own(table):
    halves = table.loc[HALVES]
    assert halves.n == 3 and halves.listener == 'judge' and halves[['IS', 'KL', 'CLAP', 'IS_splits']].isna().all()
    assert table.FD['ground truth'] < halves.FD < table.FD['noise'] and halves.KAD < table.KAD['noise']


def test_one_part_has_no_deviation(measured):
    assert measured.IS_splits.eq(1).all() and measured.IS_sd.isna().all()


def test_anchors_are_where_they_must_be(measured):
    real, silence = measured.loc['ground truth'], measured.loc['silence']
    assert (real.FD, real.KL) == pytest.approx((0, 0), abs=1e-3) and real.CLAP > .5
    assert silence.IS == pytest.approx(1, abs=1e-3)
    for metric in ('FD', 'KAD'): assert real[metric] < measured.loc['vocoder round trip', metric] < measured.loc['noise', metric]
    floor, audioldm = measured.loc['shuffled captions (floor)'], measured.loc['AudioLDM']
    assert (floor.FD, floor.KAD) == pytest.approx((audioldm.FD, audioldm.KAD), abs=.01) and floor.KL != audioldm.KL  # one set, other pairs


def test_means_are_those_of_the_clips(finished, measured):
    clips = pd.read_csv(finished/'clips.csv')
    seeded = [*SYSTEMS, 'shuffled captions (floor)']
    assert len(clips) == 6 * (len(seeded) + len(SYSTEMS) + len(ANCHORS)) and clips.id.nunique() == 6
    assert clips.groupby('system').seed.nunique().to_dict() == {a: 0 for a in ANCHORS} | {s: 2 for s in seeded}
    means = clips.groupby('system')[['kl', 'clap']].mean().loc[measured.index]
    np.testing.assert_allclose(means, measured[['KL', 'CLAP']], atol=1e-4)
    egmi = measured.loc['EGMI']
    np.testing.assert_allclose(measured.CLAP_vs_EGMI.dropna(), (measured.CLAP - egmi.CLAP).drop('EGMI'), atol=2e-4)


def test_files_can_be_read(finished):
    for name in ('table1.png', 'samples.png'):
        pixels = plt.imread(finished/name)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > .01, name
    sounds = sorted(finished.glob('*.wav'))
    assert len(sounds) == 2 * (len(SYSTEMS) + 1)  # two captions, the recordings too
    for path in sounds:
        wave, rate = soundfile.read(path)
        assert (rate, wave.shape) == (16000, (40960,)) and np.isfinite(wave).all()
    assert not [p.name for p in finished.rglob('*') if p.name.startswith('.')]


def test_record_says_what_ran(finished, table):
    record = json.loads((finished/'run.json').read_text())
    assert record['config']['steps'] == 2 and record['seeds'] == [0, 1] and record['corpus'] == 'Toybox'
    assert set(table.ids.dropna()) == {record['ids']} and record['networks'].startswith('judge ')
    assert {'load', 'training', 'generation', 'scoring'} <= set(record['seconds']) and record['guards']['silence']['silent'] == 6
    assert [row['system'] for row in record['table']] == table.index.tolist()
    egmi = json.loads((ROOT/'egmi/weights/egmi/training.json').read_text())['conditioner']['config']
    had = {system: (of['steps'], of['n_train']) for system, of in record['training'].items()}
    assert had == {'EGMI': (egmi['steps'], egmi['n_train'])} | dict.fromkeys(SYSTEMS[1:3], (2, 4))


def test_a_run_that_was_cut_short_ends_with_the_same_table(finished, cache, tmp_path):
    (work,), (trained,) = cache.glob('text_to_audio/*'), cache.glob('baselines/*')
    lost = [trained/'GILL-style mapper/config.json', *work.glob('GILL-style mapper-*/**/*.wav'), *work.glob('AudioLDM-1/**/*2.wav')]
    for path in lost: path.unlink()
    damaged = [trained/'seconds.json', work/'seconds.json', trained/'GILL-style mapper/model.safetensors']
    for path in damaged + [*work.glob('AudioLDM-0/**/*3.wav')]: path.write_bytes(path.read_bytes()[:20])
    kept = {p: p.stat().st_mtime_ns for p in [*trained.glob('NExT-GPT-style mapper/*'), *work.glob('EGMI-*/**/*.wav')]}
    assert len(lost) == 1 + 12 + 1 and len(kept) == 2 + 12
    process = papermill(tmp_path, cache, timeout=900, **TINY)
    assert process.returncode == 0, process.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # reused, not made again
    for name in ('table1.csv', 'clips.csv'): assert (tmp_path/'out'/name).read_bytes() == (finished/name).read_bytes()


@pytest.mark.parametrize('wrong, line', [
    (dict(data='{0}'), 'FileNotFoundError: data folder {0} lacks test.csv: it needs'),
    (dict(pairs='{0}'), 'FileNotFoundError: pairs folder {0} lacks annotations/captions_train2017.json: it needs'),
    (dict(audioldms=['{0}']), 'FileNotFoundError: {0} lacks tokenizer, text_encoder'),
    (dict(mapper='{0}'), 'ValueError: {0} holds a Cross mapper, and wanted is: EGMI mapper')])
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, wrong, line):
    (tmp_path/'audio').mkdir()
    (tmp_path/'config.json').write_text(json.dumps(dict(preset='mini', system='Cross mapper', mapper={})))
    (tmp_path/'model.safetensors').touch()
    filled = {name: [v.format(tmp_path) for v in value] if isinstance(value, list) else value.format(tmp_path) for name, value in wrong.items()}
    process = papermill(tmp_path, tmp_path/'cache', **filled, **TINY)
    said = last_line(process)
    assert process.returncode == 1 and said.startswith(line.format(tmp_path)), said
