"""`papermill nbs/text_to_audio.ipynb` writes Table 1, and continues after a crash."""
import json

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, check_cells, check_run, run_experiment

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT/'nbs/text_to_audio.ipynb'
TINY = dict(steps=2, batch_size=2, n_train=4, n_eval=6, sampling_steps=1)
SYSTEMS = ['EGMI', 'NExT-GPT-style mapper', 'GILL-style mapper', 'AudioLDM']
FLOOR = 'shuffled captions (floor)'
ANCHORS = ['ground truth', 'other recordings', 'vocoder round trip', FLOOR, 'silence', 'noise']
HALVES = 'ground truth, halves'
METRICS = ['fd_audio', 'is_audio', 'kl_audio', 'kad_audio', 'clap_text_audio']
OF_CLIPS = ['kl_audio', 'clap_text_audio']
OF_SETS = ['fd_audio', 'kad_audio']


@pytest.fixture(scope='module')
def cache(new_cache):
    return new_cache()


@pytest.fixture(scope='module')
def finished(tmp_path_factory, cache):
    "Folder, table and record of one uninterrupted run."
    out = run_experiment(tmp_path_factory.mktemp('finished'), cache, 'text_to_audio', **TINY)
    n_sounds = 2 * (len(SYSTEMS) + 1)  # two captions, the recordings too
    return out, *check_run(out, 'table1', [], n_sounds, 'EGMI', TINY)


@pytest.fixture(scope='module')
def table(finished):
    return finished[1]


@pytest.fixture(scope='module')
def measured(table):
    return table[table.kind != 'published'].drop(HALVES)


def test_table_has_every_row(table):
    assert table.index[table.kind == 'measured'].tolist() == SYSTEMS
    assert table.index[table.kind == 'anchor'].tolist() == [*ANCHORS, HALVES]
    published = table[table.kind == 'published']
    printed = published.published_printed.dropna().tolist()
    assert len(published) == 14 and printed == [47.68, 49.48, 23.31, 22.90, 23.58, 26.51]
    assert published.published_fd_audio['AudioLDM-S'] == 29.48 and published.source.notna().all()


def test_measured_and_published_numbers_share_no_column(table, measured):
    columns = [c for c in table if c.startswith('published_')]
    published = table.kind == 'published'
    assert len(columns) == 5 and measured[columns].isna().all(axis=None)
    assert table.loc[published, METRICS].isna().all(axis=None)
    assert set(measured.corpus) == {'Toybox'} and set(table.corpus[published]) == {'AudioCaps'}


def test_measured_numbers_are_finite_and_have_intervals(measured):
    assert np.isfinite(measured[METRICS].to_numpy(dtype=float)).all()
    ends = [f'{column}{end}' for column in OF_CLIPS for end in ('_low', '_high')]
    assert measured[ends].notna().all(axis=None)
    for column in OF_SETS:
        assert measured.loc[SYSTEMS, f'{column}_low'].lt(measured.loc[SYSTEMS, f'{column}_high']).all()
    differences = measured.filter(like='_diff')
    assert differences.shape[1] == 8 and differences.drop('EGMI').notna().all(axis=None)


def test_halves_of_the_recordings_are_a_floor_of_their_own(table):
    halves = table.loc[HALVES]
    assert halves.n == 3 and halves.classifier == 'judge'
    assert halves[['is_audio', *OF_CLIPS, 'is_audio_splits']].isna().all()
    assert table.fd_audio['ground truth'] < halves.fd_audio < table.fd_audio['noise']
    assert halves.kad_audio < table.kad_audio['noise']


def test_one_part_has_no_deviation(measured):
    assert measured.is_audio_splits.eq(1).all() and measured.is_audio_sd.isna().all()


def test_anchors_are_where_they_must_be(measured):
    real = measured.loc['ground truth']
    floor = measured.loc[FLOOR]
    audioldm = measured.loc['AudioLDM']
    assert (real.fd_audio, real.kl_audio) == pytest.approx((0, 0), abs=1e-3) and real.clap_text_audio > .5
    assert measured.is_audio['silence'] == pytest.approx(1, abs=1e-3)
    for column in OF_SETS:
        trip, noise = measured.loc[['vocoder round trip', 'noise'], column]
        assert real[column] < trip < noise
        assert floor[column] == pytest.approx(audioldm[column], abs=.01)  # one set
    assert floor.kl_audio != audioldm.kl_audio                            # other pairs


def test_means_are_those_of_the_clips(finished, measured):
    clips = pd.read_csv(finished[0]/'clips.csv')
    seeded = [*SYSTEMS, FLOOR]
    assert len(clips) == 6 * (len(seeded) + len(SYSTEMS) + len(ANCHORS)) and clips.id.nunique() == 6
    n_seeds = dict.fromkeys(ANCHORS, 0) | dict.fromkeys(seeded, 2)
    assert clips.groupby('system').seed.nunique().to_dict() == n_seeds
    means = clips.groupby('system')[OF_CLIPS].mean().loc[measured.index]
    np.testing.assert_allclose(means, measured[OF_CLIPS], atol=1e-4)


def test_record_says_what_ran(finished, table):
    record = finished[2]
    assert record['seeds'] == [0, 1] and record['corpus'] == 'Toybox' and 'training' in record['seconds']
    assert set(table.ids.dropna()) == {record['ids']} and record['networks'].startswith('judge ')
    assert record['flaws']['silence']['silent'] == 6
    origin = json.loads((ROOT/'egmi/weights/egmi/training.json').read_text())['conditioner']['config']
    had = {system: (of['steps'], of['n_train']) for system, of in record['training'].items()}
    assert had == {'EGMI': (origin['steps'], origin['n_train'])} | dict.fromkeys(SYSTEMS[1:3], (2, 4))


def test_a_run_that_was_cut_short_ends_with_the_same_table(finished, cache, tmp_path):
    work, = cache.glob('text_to_audio/generation/*')
    trained, = cache.glob('text_to_audio/training/*')
    lost = [
        trained/'GILL-style mapper, seed 0/config.json',
        *work.glob('GILL-style mapper-*/**/*.wav'), *work.glob('AudioLDM-1/**/*2.wav')]
    damaged = [
        trained/'seconds.json', work/'seconds.json', trained/'GILL-style mapper, seed 0/model.safetensors',
        *work.glob('AudioLDM-0/**/*3.wav')]
    used = [*trained.glob('NExT-GPT-style mapper, seed 0/*'), *work.glob('EGMI-*/**/*.wav')]
    assert (len(lost), len(damaged), len(used)) == (1 + 12 + 1, 3 + 1, 3 + 12)
    for path in lost:
        path.unlink()
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    times = {path: path.stat().st_mtime_ns for path in used}

    out = run_experiment(tmp_path, cache, 'text_to_audio', **TINY)
    assert {path: path.stat().st_mtime_ns for path in used} == times  # not made again
    for name in ('table1.csv', 'clips.csv'):
        assert (out/name).read_bytes() == (finished[0]/name).read_bytes()


@pytest.mark.parametrize('name, error, message', [
    ('data', FileNotFoundError, 'data folder {0} lacks test.csv: it needs'),
    ('pairs', ValueError, '{0} has no captioned pictures: add captions.csv'),
    ('audioldms', FileNotFoundError, '{0} lacks tokenizer, text_encoder'),
    ('mapper', ValueError, '{0} holds a Cross mapper, and wanted is: EGMI mapper')])
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, name, error, message):
    (tmp_path/'audio').mkdir()
    config = dict(preset='mini', system='Cross mapper', mapper={})
    (tmp_path/'config.json').write_text(json.dumps(config))
    (tmp_path/'model.safetensors').touch()
    value = [str(tmp_path)] if name == 'audioldms' else str(tmp_path)
    with pytest.raises(error) as raised:
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **{name: value}, **TINY)
    said = str(raised.value)
    assert said.startswith(message.format(tmp_path)) and '\n' not in said
    assert not (tmp_path/'out').exists()
