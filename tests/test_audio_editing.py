"""`papermill nbs/audio_editing.ipynb` writes Table 2, and refuses bad parameters before it computes."""
import json
import os

import numpy as np
import pandas as pd
import pytest
import soundfile

from conftest import ROOT, check_cells, check_run, run_experiment

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT/'nbs/audio_editing.ipynb'
TINY = dict(n_eval=6, n_strength=2, n_data=2, sampling_steps=2, strengths=[.5], device='cpu')
EDITS = [
    'EGMI', 'EGMI, source only', 'EGMI, instruction only', 'EGMI, target caption', 'AudioLDM, target caption']
SOURCE = 'source, unchanged'
SOURCE_TRIP = 'source, round trip'
TARGET_TRIP = 'target, round trip (ceiling)'
PRINTED = [f'{name}, printed' for name in ('CampNet', 'MakeAudio', 'AudioLDM-L', 'NExT-GPT', 'EGMI')]
MEASURED = ['mcd_audio', 'clap_text_audio', 'changed_audio', 'kept_audio']


def write_speech(folder, n):
    "A folder in VCTK's layout, in which Toybox scenes stand for utterances."
    from egmi.small.rehearsal import write_vctk
    from egmi.toybox.scenes import toybox
    write_vctk(folder/'vctk', toybox('test', n))
    return folder/'vctk'


@pytest.fixture(scope='module')
def finished(tmp_path_factory, new_cache):
    "Folder, table and record of one run."
    folder = tmp_path_factory.mktemp('finished')
    speech = write_speech(folder, 3)
    out = run_experiment(folder, new_cache(), 'audio_editing', data=speech, **TINY)
    return out, *check_run(out, 'table2', ['strength.png'], 12, 'EGMI', TINY)


@pytest.fixture(scope='module')
def table(finished):
    return finished[1]


def test_table_has_every_row_and_column(table):
    assert list(table.index) == [*EDITS, SOURCE, SOURCE_TRIP, TARGET_TRIP, *PRINTED]
    ends = ('', '_low', '_high', '_diff', '_diff_low', '_diff_high', '_diff_p')
    others = {'n', 'seeds', 'ids', 'mcd_audio_unscaled'}
    published = {'published_mcd_audio', 'published_source', 'published_note'}
    assert {column + end for column in MEASURED for end in ends} | others | published == set(table.columns)


def test_published_values_stay_in_their_own_columns(table):
    published = [column for column in table if column.startswith('published_')]
    differences = [column for column in table if '_diff' in column]
    ours = table.drop(index=PRINTED)
    assert table.loc[PRINTED, 'published_mcd_audio'].tolist() == [.380, .375, .349, .300, .361]
    assert table.loc[PRINTED, 'published_note'].str.contains('not comparable').all()
    assert table.loc[PRINTED].drop(columns=published).isna().all(axis=None)
    assert ours[published].isna().all(axis=None)
    assert ours.drop(columns=published + differences).notna().all(axis=None)


def test_measured_numbers_keep_their_relations(table):
    ours = table.drop(index=PRINTED)
    shares = ours[['changed_audio', 'kept_audio']]
    assert shares.ge(0).all(axis=None) and shares.le(1).all(axis=None)
    assert np.allclose(ours.mcd_audio / ours.mcd_audio_unscaled, 6.1418515, rtol=1e-3)
    assert ours.mcd_audio[TARGET_TRIP] < min(ours.mcd_audio[SOURCE], ours.mcd_audio[SOURCE_TRIP])
    assert ours.changed_audio[SOURCE] < .2 and ours.kept_audio[SOURCE] > .8
    assert ours.changed_audio[TARGET_TRIP] > .5
    assert ours.clap_text_audio[TARGET_TRIP] == ours.clap_text_audio.max()


def test_every_measured_row_is_compared_with_egmi(table):
    differences = table.drop(index=[*PRINTED, 'EGMI']).filter(like='_diff')
    assert differences.shape == (7, 16) and differences.notna().all(axis=None)


def test_curve_has_both_systems(finished):
    curve = pd.read_csv(finished[0]/'strength.csv')
    assert list(zip(curve.system, curve.strength)) == [('EGMI', .5), ('AudioLDM, target caption', .5)]
    assert np.isfinite(curve[MEASURED]).all(axis=None)


def test_speech_protocol_measures_span_and_utterance(finished):
    speech = pd.read_csv(finished[0]/'vctk.csv').set_index('system')
    assert list(speech.index) == ['EGMI', 'AudioLDM, transcript', 'round trip']
    # two utterances do not say which system is nearer
    for column in ('mcd_audio_segment', 'mcd_audio_utterance'):
        assert (speech[f'{column}_low'] <= speech[column] + 1e-4).all()
        assert (speech[column] <= speech[f'{column}_high'] + 1e-4).all()
        assert speech[column].nunique() == 3 and speech[column].between(.1, 30).all()


def test_record_says_what_ran(finished):
    record = finished[2]
    assert record['n'] == dict(test=6, validation=2, vctk=2)
    assert set(record['ids']) == {'test', 'validation', 'vctk'}
    assert {'conditions', 'speech'} <= set(record['seconds'])
    assert len(record['mapper']) == 64 and record['resampler'] == 'soxr'


@pytest.mark.parametrize('parameters, error, message', [
    (dict(strenght=.5), ValueError, "unknown parameter 'strenght': did you mean 'strength'?"),
    (dict(n_eval=0), ValueError, 'n_eval must be a whole number of 1 or more, not 0'),
    (dict(n_eval=1), ValueError, 'n_eval must be 2 or more, not 1: intervals need 2 clips'),
    (dict(sampling_batch=-1), ValueError, 'sampling_batch must be a whole number of 1 or more, not -1'),
    (dict(seeds=[]), ValueError, 'give a seed'),
    (dict(strength=1.2), ValueError, 'strength must lie between 0 and 1, not 1.2'),
    (dict(strengths=[.5, -1]), ValueError, 'strength must lie between 0 and 1, not -1'),
    (dict(preset='maxi'), ValueError, "unknown preset 'maxi'"),
    (dict(mapper='nowhere'), FileNotFoundError, 'there is no folder nowhere: give mini or'),
    (dict(data='nowhere'), FileNotFoundError,
     'data folder nowhere lacks txt, wav48_silence_trimmed: it needs'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_bad_parameters_are_named_first(parameters, error, message, tmp_path):
    with pytest.raises(error) as raised:
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **parameters)
    assert message in str(raised.value)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('config, message', [
    (dict(preset='paper', system='EGMI mapper'),
     "was trained with preset 'paper', not 'mini': choose -p preset paper$"),
    (dict(preset='mini', system='Cross mapper'),
     'holds a Cross mapper, and wanted is: EGMI mapper: give another folder$'),
], ids=['preset', 'system'])
def test_mapper_that_does_not_fit_is_refused(config, message, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(config | dict(mapper={})))
    (tmp_path/'model.safetensors').touch()
    with pytest.raises(ValueError, match=message):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), mapper=str(tmp_path))


@pytest.fixture
def speech(tmp_path):
    "A folder in VCTK's layout with two utterances."
    return write_speech(tmp_path, 2)


def test_more_utterances_than_there_are(speech, tmp_path):
    message = 'vctk has 2 utterances, and n_data asks for 3: ask for fewer$'
    with pytest.raises(ValueError, match=message):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), data=str(speech), n_data=3)


def test_silent_utterance_is_named_first(speech, tmp_path):
    sound = next(speech.rglob('*.flac'))
    soundfile.write(sound, np.zeros(48000), 48000)
    message = f'{sound.name} is silent and holds no words: replace it or leave it out$'
    with pytest.raises(ValueError, match=message):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), data=str(speech), n_data=2)
    assert not (tmp_path/'out').exists()


def test_good_parameters_pass(tmp_path):
    check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'))
    assert os.listdir(tmp_path/'out') == []
