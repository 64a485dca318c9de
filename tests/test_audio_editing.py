"""`papermill nbs/audio_editing.ipynb` writes Table 2 from a trained mapper, and refuses bad parameters before it computes."""
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import soundfile

from conftest import ROOT, check_cells, papermill

NOTEBOOK = ROOT/'nbs/audio_editing.ipynb'
TINY = dict(n_eval=6, n_strength=2, n_data=2, sampling_steps=2, strengths=[.5], device='cpu')
EDITS = ['EGMI', 'EGMI, source only', 'EGMI, instruction only', 'EGMI, target caption', 'AudioLDM, target caption']
SOURCE, SOURCE_TRIP, TARGET_TRIP = 'source, unchanged', 'source, round trip', 'target, round trip (ceiling)'
PUBLISHED = ['CampNet, printed', 'MakeAudio, printed', 'AudioLDM-L, printed', 'NExT-GPT, printed', 'EGMI, printed']
MEASURED = ['mcd', 'clap', 'changed', 'kept']


@pytest.fixture(scope='module')
def finished(tmp_path_factory, new_cache):
    "Results of one run, with a folder in VCTK's layout in which Toybox scenes stand for utterances."
    from egmi.toybox.scenes import toybox
    from egmi.small.rehearsal import write_vctk
    folder = tmp_path_factory.mktemp('finished')
    write_vctk(folder/'vctk', toybox('test', 3))
    process = papermill(folder, new_cache(), timeout=600, notebook=NOTEBOOK, data=folder/'vctk', **TINY)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder/'out'


@pytest.fixture(scope='module')
def table(finished):
    return pd.read_csv(finished/'table2.csv').set_index('system')


def test_table_has_every_row_and_column(table):
    assert list(table.index) == [*EDITS, SOURCE, SOURCE_TRIP, TARGET_TRIP, *PUBLISHED]
    assert {c + end for c in MEASURED for end in ('', '_low', '_high')} | {'n', 'seeds', 'ids', 'mcd_unscaled', 'paper_mcd', 'paper_source', 'paper_note'} == set(table.columns)


def test_published_values_stay_in_their_own_columns(table):
    paper = [c for c in table if c.startswith('paper_')]
    assert table.loc[PUBLISHED, 'paper_mcd'].tolist() == [.380, .375, .349, .300, .361]
    assert table.loc[PUBLISHED, 'paper_note'].str.contains('not comparable').all()
    assert table.loc[PUBLISHED].drop(columns=paper).isna().all(axis=None)
    assert table.drop(index=PUBLISHED)[paper].isna().all(axis=None) and table.drop(index=PUBLISHED).drop(columns=paper).notna().all(axis=None)


def test_measured_numbers_keep_their_relations(table):
    ours = table.drop(index=PUBLISHED)
    for c in MEASURED: assert (ours[f'{c}_low'] <= ours[c] + 1e-4).all() and (ours[c] <= ours[f'{c}_high'] + 1e-4).all()
    assert ours[['changed', 'kept']].ge(0).all(axis=None) and ours[['changed', 'kept']].le(1).all(axis=None)
    assert np.allclose(ours.mcd / ours.mcd_unscaled, 6.1418515, rtol=1e-3)
    assert ours.mcd[TARGET_TRIP] < ours.mcd[SOURCE] and ours.mcd[TARGET_TRIP] < ours.mcd[SOURCE_TRIP]
    assert ours.changed[SOURCE] < .2 and ours.kept[SOURCE] > .8 and ours.changed[TARGET_TRIP] > .5
    assert ours.clap[TARGET_TRIP] == ours.clap.max()


def test_comparisons_are_differences_of_the_table(finished, table):
    tests = pd.read_csv(finished/'comparisons.csv')
    assert len(tests) == len(MEASURED) * (len(EDITS) + 2)
    for t in tests.itertuples():
        assert abs(t.difference - (table.loc['EGMI', t.measure] - table.loc[t.against, t.measure])) < 2e-4
        assert t.low <= t.difference <= t.high and 0 < t.p <= t.p_holm <= 1


def test_curve_has_both_systems(finished):
    curve = pd.read_csv(finished/'strength.csv')
    assert list(zip(curve.system, curve.strength)) == [('EGMI', .5), ('AudioLDM, target caption', .5)]
    assert np.isfinite(curve[MEASURED]).all(axis=None)


def test_speech_protocol_measures_span_and_utterance(finished):
    speech = pd.read_csv(finished/'vctk.csv').set_index('system')
    assert list(speech.index) == ['EGMI', 'AudioLDM, transcript', 'round trip']
    for c in ('segment_mcd', 'utterance_mcd'):  # two utterances are too few to say which system is nearer
        assert (speech[f'{c}_low'] <= speech[c] + 1e-4).all() and (speech[c] <= speech[f'{c}_high'] + 1e-4).all()
        assert speech[c].nunique() == 3 and speech[c].between(.1, 30).all()


def test_files_can_be_read(finished):
    for name in ('table2.png', 'strength.png', 'samples.png'):
        pixels = plt.imread(finished/name)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > .01, name
    sounds = sorted(finished.glob('*.wav'))
    assert len(sounds) == 12  # source, EGMI, AudioLDM and target of three pairs
    for path in sounds:
        wave, rate = soundfile.read(path)
        assert (rate, wave.shape) == (16000, (40960,)) and np.isfinite(wave).all()
    assert not [p.name for p in finished.rglob('*') if p.name.startswith('.')]


def test_record_says_what_ran(finished, table):
    record = json.loads((finished/'run.json').read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert TINY.items() <= record['config'].items() and record['seeds'] == [0]
    assert record['n'] == dict(test=6, validation=2, vctk=2) and set(record['ids']) == {'test', 'validation', 'vctk'}
    assert {'load', 'conditions', 'generation', 'scoring', 'speech'} <= set(record['seconds'])
    assert len(record['mapper']) == 64 and record['resampler'] == 'soxr'
    mcd = {row['system']: row['mcd'] for row in record['table']}
    assert mcd['EGMI'] == table.mcd['EGMI'] and mcd['EGMI, printed'] is None


@pytest.mark.parametrize('parameters, error, message', [
    (dict(strenght=.5), ValueError, "unknown parameter 'strenght': did you mean 'strength'?"),
    (dict(n_eval=0), ValueError, 'n_eval must be a whole number of 1 or more, not 0'),
    (dict(n_eval=1), ValueError, 'intervals need two clips'),
    (dict(seeds=[]), ValueError, 'give a seed'),
    (dict(strength=1.2), ValueError, 'strength must lie between 0 and 1, not 1.2'),
    (dict(strengths=[.5, -1]), ValueError, 'strength must lie between 0 and 1, not -1'),
    (dict(preset='maxi'), ValueError, "unknown preset 'maxi'"),
    (dict(mapper='nowhere'), FileNotFoundError, 'nowhere holds no config.json'),
    (dict(data='nowhere'), FileNotFoundError, 'data folder nowhere lacks txt, wav48_silence_trimmed: it needs'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_bad_parameters_are_named_first(parameters, error, message, tmp_path):
    with pytest.raises(error) as raised: check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **parameters)
    assert message in str(raised.value)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('config, message', [
    (dict(preset='paper', system='EGMI mapper'), "was trained with preset 'paper', not 'mini': choose -p preset paper$"),
    (dict(preset='mini', system='Cross mapper'), 'holds a Cross mapper, and wanted is: EGMI mapper: give another folder$'),
], ids=['preset', 'system'])
def test_mapper_that_does_not_fit_is_refused(config, message, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(config | dict(mapper={})))
    (tmp_path/'model.safetensors').touch()
    with pytest.raises(ValueError, match=message): check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), mapper=str(tmp_path))


@pytest.fixture
def speech(tmp_path):
    "A folder in VCTK's layout with two utterances."
    from egmi.toybox.scenes import toybox
    from egmi.small.rehearsal import write_vctk
    write_vctk(tmp_path/'vctk', toybox('test', 2))
    return tmp_path/'vctk'


def test_more_utterances_than_there_are(speech, tmp_path):
    with pytest.raises(ValueError, match='vctk has 2 utterances, and n_data asks for 3: ask for fewer$'): check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), data=str(speech), n_data=3)


def test_silent_utterance_is_named_first(speech, tmp_path):
    sound = next(speech.rglob('*.flac'))
    soundfile.write(sound, np.zeros(48000), 48000)
    with pytest.raises(ValueError, match=f'{sound.name} is silent and holds no words: replace it or leave it out$'): check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), data=str(speech), n_data=2)
    assert not (tmp_path/'out').exists()


def test_good_parameters_pass(tmp_path):
    check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'))
    assert os.listdir(tmp_path/'out') == []
