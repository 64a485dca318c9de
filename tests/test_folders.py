"""Folders of sounds: the command line, bad input, a killed run, and numbers against direct computation."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import soxr
import torch
from conftest import ROOT

from egmi.base.config import component_path, get_preset
from egmi.data.examples import ids_hash
from egmi.evaluation import folders as folders_module, outputs
from egmi.evaluation.encoders import load_clap
from egmi.evaluation.folders import evaluate_folders, read_captions, read_pairs, score_sounds, write_sounds
from egmi.evaluation.judge import Judge, features_and_logits, sound_tensor
from egmi.evaluation.metrics import (
    KL_EPSILON, cosine_similarity, frechet_distance, inception_score, kernel_distance, kl_divergence)
from egmi.evaluation.networks import Cnn14, VGGish
from egmi.evaluation.outputs import NETWORKS, load_network, run_on_files
from egmi.small.random_weights import TINY, write_clap
from egmi.toybox.scenes import toybox

RATE = 16_000
SCENES = sorted(toybox('test', 8), key=lambda s: s.id)
IDS = [s.id for s in SCENES]
AUDIO = np.stack([s.audio for s in SCENES])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv('EGMI_CACHE', str(tmp_path/'cache'))


@pytest.fixture
def folders(tmp_path):
    "Recorded sounds, and what a system made of their captions: the next scene at half the level."
    real = write_sounds(tmp_path/'real', IDS, AUDIO, RATE)
    made = write_sounds(tmp_path/'made', IDS, np.roll(AUDIO, 1, 0) / 2, RATE)
    return real, made


@pytest.fixture
def given(monkeypatch):
    "Counts the sounds that each network is given."
    counts = {}

    def counted(name, run):
        def run_and_count(model, waves):
            counts[name] = counts.get(name, 0) + len(waves)
            return run(model, waves)
        return run_and_count

    for name, network in list(NETWORKS.items()):
        monkeypatch.setitem(NETWORKS, name, replace(network, run=counted(name, network.run)))
    return counts


def score(folders, **options):
    return score_sounds('mini', *folders, device='cpu', progress=False, **options)


# The command line

@pytest.mark.slow
def test_command_writes_and_prints_the_scores(folders, tmp_path):
    captions = {s.id: s.caption for s in SCENES}
    pd.DataFrame(captions.items(), columns=['id', 'caption']).to_csv(tmp_path/'captions.csv', index=False)
    out = tmp_path/'out'
    command = [sys.executable, '-m', 'egmi', 'evaluate', *folders]
    command += ['--captions', tmp_path/'captions.csv', '--out', out, '--device', 'cpu', '--mcd']
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-2000:]
    assert sorted(os.listdir(out)) == ['clips.csv', 'run.json', 'scores.csv']
    row = pd.read_csv(out/'scores.csv').iloc[0]
    clips = pd.read_csv(out/'clips.csv')
    expected, expected_clips = score(folders, captions=captions, mcd=True)
    assert list(row.index) == list(expected)
    assert (row.preset, row.resampler, row.classifier) == ('mini', 'soxr', 'judge')
    numbers = ['fd_audio', 'is_audio', 'kl_audio', 'kad_audio', 'clap_text_audio', 'mcd_audio']
    np.testing.assert_allclose(row[numbers].astype(float), [expected[c] for c in numbers], rtol=1e-6)
    pd.testing.assert_frame_equal(clips, expected_clips, check_dtype=False)
    assert 'fad_audio' not in row
    printed = [line.split() for line in process.stdout.splitlines()]
    assert printed[0] == ['n', '8'] and ['fd_audio', f'{row.fd_audio:.4f}'] in printed
    run = json.loads((out/'run.json').read_text())
    assert run['config']['preset'] == 'mini' and run['scores']['ids'] == ids_hash(SCENES)
    assert run['seconds']['score'] > 0


def test_record_of_a_score_that_is_undefined_is_json(folders, tmp_path):
    write_sounds(folders[1], IDS[:1], AUDIO[:1] * 0, RATE)
    evaluate_folders(*map(str, folders), out=str(tmp_path/'out'), device='cpu', mcd=True)
    scores = json.loads((tmp_path/'out/run.json').read_text(), parse_constant=pytest.fail)['scores']
    assert scores['mcd_audio'] is None and scores['silent'] == 1


def test_command_helps(command):
    text = ' '.join(command('evaluate', '--help')[1].split())
    options = ('reference', 'generated', '--captions', '--preset', '--out', '--resampler', '--mcd')
    assert all(part in text for part in (*options, 'write_sounds', 'columns id and caption'))


def test_command_ends_in_one_line_and_writes_nothing(folders, tmp_path, command):
    for id in IDS[:4]:
        (folders[1]/f'{id}.wav').unlink()
    status, _, (line,) = command('evaluate', *folders, '--out', tmp_path/'out')
    assert status == 2
    assert line == (
        'egmi: outputs are missing for 4 of 8 references: generate them, or take the references out '
        f'(first: {", ".join(IDS[:3])})')
    assert os.listdir(tmp_path/'out') == []
    assert command('evaluate', *folders, '--captions', tmp_path/'none.csv') == (
        2, '', [f'egmi: there is no file {tmp_path}/none.csv: give a CSV with columns id and caption'])
    status, _, (line,) = command('evaluate', *folders, '--preset', 'maxi')
    assert status == 2 and line == "egmi: unknown preset 'maxi': choose one of mini, paper"


# Bad input, each before any network is loaded

BAD_WAVES = dict(
    empty=np.zeros(0), nan=np.full(RATE, np.nan), inf=np.full(RATE, np.inf), short=np.ones(99),
    silent=np.zeros(RATE))


def damage(kind, folder):
    path = folder/f'{IDS[2]}.wav'
    if kind == 'text':
        path.write_text('this is not a sound')
    else:
        soundfile.write(path, BAD_WAVES[kind], RATE, subtype='FLOAT')


@pytest.mark.parametrize('side', [0, 1], ids=['reference', 'generated'])
@pytest.mark.parametrize('kind, message', [
    ('text', 'cannot be read'),
    ('empty', 'has zero length'),
    ('nan', 'holds NaN or infinite samples'),
    ('inf', 'holds NaN or infinite samples'),
    ('short', r'lasts 0\.006 s, less than the 0\.032 s that the networks need')])
def test_bad_file(folders, given, side, kind, message):
    damage(kind, folders[side])
    expected = rf'^sound .*{IDS[2]}\.wav {message}: replace it or leave it out$'
    with pytest.raises(ValueError, match=expected):
        score(folders)
    assert given == {}


def test_silence_is_an_error_in_a_reference_and_counted_in_an_output(folders, given):
    damage('silent', folders[1])
    row, clips = score(folders, mcd=True)
    assert row['silent'] == 1 and np.isnan(row['mcd_audio']) and clips.mcd_audio.isna().sum() == 1
    assert all(np.isfinite(row[c]) for c in ('fd_audio', 'kl_audio', 'kad_audio', 'is_audio'))
    given.clear()
    damage('silent', folders[0])
    expected = rf'^reference .*{IDS[2]}\.wav is silent: replace it or leave it out$'
    with pytest.raises(ValueError, match=expected):
        score(folders)
    assert given == {}


def with_extra(folders):
    write_sounds(folders[1], ['extra'], AUDIO[:1], RATE)


def with_twin(folders):
    soundfile.write(folders[0]/f'{IDS[0]}.flac', AUDIO[0], RATE)


def emptied(folders):
    for path in folders[1].rglob('*.wav'):
        path.unlink()


def single(folders):
    for folder in folders:
        for id in IDS[1:]:
            (folder/f'{id}.wav').unlink()


WITHOUT_FIRST = {id: 'a bell' for id in IDS[1:]}


@pytest.mark.parametrize('change, options, message', [
    (with_extra, {}, r'^1 of 9 generated sounds have no reference: take them out \(first: extra\)$'),
    (with_twin, {}, r'\.flac and .*\.wav have one name: keep one of them$'),
    (emptied, {}, r'made holds no sounds: files must end in \.wav'),
    (single, {}, r'^there is only the sound .*: a distribution needs at least 2$'),
    (None, dict(captions=WITHOUT_FIRST), rf'^1 of 8 sounds have no caption: add them \(first: {IDS[0]}\)$'),
    (None, dict(resampler='sinc'), r"^unknown resampler 'sinc': choose one of soxr, torchaudio$"),
])
def test_bad_pairs_and_options(folders, given, change, options, message):
    if change:
        change(folders)
    with pytest.raises(ValueError, match=message):
        score(folders, **options)
    assert given == {}


def test_folder_that_is_not_there(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'^there is no folder .*/nowhere$'):
        score((folders[0], tmp_path/'nowhere'))


def test_paper_preset_lists_only_the_weights_it_needs(folders):
    with pytest.raises(FileNotFoundError) as error:
        score_sounds('paper', *folders, device='cpu')
    listed = ('Cnn14_16k_mAP=0.438.pth', 'vggish-10086976.pth', '`egmi weights paper`')
    assert all(name in str(error.value) for name in listed)
    assert 'vicuna' not in str(error.value) and 'clap' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('id,text\na,b\n', r'has no column caption: columns are id, text$'),
    ('id,caption\na,b\na,c\n', r'has several captions for a: keep one$'),
    ('', r'is empty$')])
def test_bad_captions(text, message, tmp_path):
    (tmp_path/'captions.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path/'captions.csv')


# Killed, and again

def test_a_killed_run_goes_on(folders, given, monkeypatch):
    run_batch = outputs.run_batch
    batches = []

    def killed(*arguments):
        if batches:
            raise KeyboardInterrupt
        batches.append(run_batch(*arguments))

    options = dict(sources=get_preset('mini').classifiers, batch_size=5, progress=False)
    references, generated = read_pairs(*folders, progress=False)
    monkeypatch.setattr(outputs, 'run_batch', killed)
    with pytest.raises(KeyboardInterrupt):
        run_on_files(references, **options)
    monkeypatch.setattr(outputs, 'run_batch', run_batch)
    assert given == dict(judge=5)
    run_on_files(references, **options)
    assert given == dict(judge=8)
    row, _ = score(folders)
    assert given == dict(judge=16)
    assert score(folders)[0] == row and given == dict(judge=16)
    score(folders, resampler='torchaudio')
    assert given == dict(judge=32)


def test_a_copy_is_embedded_once_and_counted(folders, given, tmp_path):
    copies = write_sounds(tmp_path/'copies', IDS, AUDIO[[0] * 7 + [1]], RATE)
    assert score((folders[0], copies))[0]['duplicates'] == 6 and given == dict(judge=8)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(wave, rate):
        if wave[0]:
            raise OSError('disk full')
        return b'whole'

    monkeypatch.setattr(folders_module, 'wav_bytes', full_disk)
    with pytest.raises(OSError):
        write_sounds(tmp_path/'made', ['a', 'b'], np.array([[0.], [1.]]), RATE)
    assert os.listdir(tmp_path/'made') == ['a.wav']


# Numbers

def test_row_equals_direct_computation(folders):
    judge = Judge.from_pretrained(component_path('judge/sound')).float().eval()
    clap = load_clap(component_path('clap'))
    captions = {s.id: s.caption for s in SCENES}
    made = np.roll(AUDIO, 1, 0) / 2
    x, x_logits = features_and_logits(judge, sound_tensor(AUDIO))
    y, y_logits = features_and_logits(judge, sound_tensor(made))
    cosines = cosine_similarity(clap.embed_sounds(made, RATE), clap.embed_texts(list(captions.values())))
    row, clips = score(folders, captions=captions)
    expected = dict(
        fd_audio=frechet_distance(x, y), kad_audio=kernel_distance(x, y),
        is_audio=inception_score(y_logits['object'], splits=1)[0],
        kl_audio=kl_divergence(x_logits['object'], y_logits['object'], KL_EPSILON),
        clap_text_audio=cosines.mean())
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (row['n'], row['ids']) == (8, ids_hash(SCENES))
    assert list(clips.id) == IDS and clips.kl_audio.mean() == pytest.approx(row['kl_audio'])
    levels = np.stack([abs(made).max(1), np.sqrt((made**2).mean(1))], 1)
    np.testing.assert_allclose(clips[['peak', 'rms']], levels, rtol=1e-5)


def test_mixed_files_sound_as_mono_at_16_khz(folders, tmp_path):
    "Stereo, other rates and flac among mono wavs: counted, and nearly the same scores."
    noise = .1 * np.random.default_rng(0).normal(size=AUDIO.shape)
    noise_row, _ = score((folders[0], write_sounds(tmp_path/'noise', IDS, noise, RATE)))
    plain_row, _ = score((folders[0], folders[0]))
    for n, id in enumerate(IDS[:6]):
        (folders[1]/f'{id}.wav').unlink()
        rate = (44_100, 48_000, RATE)[n % 3]
        wave = soxr.resample(AUDIO[n], RATE, rate)
        if n < 3:
            wave = np.stack([1.2 * wave, .8 * wave], 1)
        soundfile.write(folders[1]/f'{id}.{("wav", "flac")[n % 2]}', wave, rate)
    write_sounds(folders[1], IDS[6:], AUDIO[6:], RATE)
    for resampler in ('soxr', 'torchaudio'):
        row, _ = score(folders, resampler=resampler)
        assert (row['mixed_down'], row['resampled'], row['resampler']) == (3, 4, resampler)
        assert row['kl_audio'] < .1 and row['is_audio'] == pytest.approx(plain_row['is_audio'], rel=.05)
        assert 0 < row['fd_audio'] < .05 * noise_row['fd_audio']


def write_random(path, make, wrap):
    "A file in the published layout, with random weights of full size under which a sound still matters."
    torch.manual_seed(0)
    model = make()
    for name, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        if t.ndim > 1:
            t.normal_(std=(2 * t.shape[0] / t.numel())**.5)
        elif 'var' in name or 'bn' in name:
            t.uniform_(.5, 1.5)
        else:
            t.zero_()
        if name == 'fc_audioset.weight':
            t *= .01  # doubtful enough to differ by a finite KL
    torch.save(wrap(model.state_dict()), path)


@pytest.mark.slow
def test_paper_networks_at_full_size(folders, given, tmp_path):
    "Cnn14 and VGGish with random weights, a tiny CLAP in its published layout."
    paths = {name: tmp_path/f'{name}.pth' for name in ('cnn14', 'vggish')}
    write_random(paths['cnn14'], Cnn14, lambda state: dict(iteration=0, model=state))
    write_random(paths['vggish'], VGGish, lambda state: state)
    write_clap(TINY, tmp_path/'clap')
    sources = {name: str(path) for name, path in paths.items()}
    preset = replace(get_preset('paper'), classifiers=sources, clap=str(tmp_path/'clap'))
    real = AUDIO[:3]
    made = AUDIO[2::-1] / 2
    waves = dict(real3=real, made3=made)
    some = [write_sounds(tmp_path/name, IDS[:3], audio, RATE) for name, audio in waves.items()]
    captions = {s.id: s.caption for s in SCENES}
    row, _ = score_sounds(preset, *some, captions, device='cpu', progress=False)
    assert given == dict(cnn14=6, vggish=6, clap=3)
    assert row['classifier'] == 'cnn14, vggish' and row['preset'] == 'paper'
    cnn14, vggish = (load_network(name, path, torch.device('cpu')) for name, path in paths.items())
    x, x_logits = cnn14.classify(real, RATE)
    y, y_logits = cnn14.classify(made, RATE)
    x_frames = vggish.embed(real, RATE)
    y_frames = vggish.embed(made, RATE)
    assert x.shape == (3, 2048) and x_frames.shape == (6, 128)
    expected = dict(
        fd_audio=frechet_distance(x, y), fad_audio=frechet_distance(x_frames, y_frames),
        kl_audio=kl_divergence(x_logits, y_logits, KL_EPSILON), kad_audio=kernel_distance(x, y))
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    again, _ = score_sounds(preset, *some, captions, device='cpu', progress=False)
    assert again == row and given == dict(cnn14=6, vggish=6, clap=3)
