"""Folders of sounds: the command line, every bad input, a killed run, and numbers against direct computation."""
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
from fastcore.script import anno_parser

import egmi.evaluation.folders
from egmi.base.config import component_path, get_preset
from egmi.data.examples import ids_hash
from egmi.toybox.scenes import toybox
from egmi.evaluation.scoring import load_clap
from egmi.evaluation.folders import NETWORKS, load_network, main, read_pairs, score_sounds, write_sounds
from egmi.evaluation.networks import Cnn14, VGGish
from egmi.evaluation.metrics import KL_EPSILON, cosine_similarity, frechet_distance, inception_score, kernel_distance, kl_divergence
from egmi.evaluation.judge import Judge, read, sound_tensor
from egmi.small.rehearsal import TINY, write_clap

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
    return write_sounds(tmp_path/'real', IDS, AUDIO, RATE), write_sounds(tmp_path/'made', IDS, np.roll(AUDIO, 1, 0) / 2, RATE)


@pytest.fixture
def heard(monkeypatch):
    "Counts the sounds that reach each network."
    counts = {}

    def counted(name, hear, network, waves):
        counts[name] = counts.get(name, 0) + len(waves)
        return hear(network, waves)

    for name, network in list(NETWORKS.items()):
        monkeypatch.setitem(NETWORKS, name, replace(network, hear=lambda n, w, name=name, hear=network.hear: counted(name, hear, n, w)))
    return counts


def score(folders, **options): return score_sounds('mini', *folders, device='cpu', progress=False, **options)


# The command line

def test_command_writes_and_prints_the_scores(folders, tmp_path):
    captions = {s.id: s.caption for s in SCENES}
    pd.DataFrame(captions.items(), columns=['id', 'caption']).to_csv(tmp_path/'captions.csv', index=False)
    command = [sys.executable, '-m', 'egmi.evaluation.folders', *folders, '--captions', tmp_path/'captions.csv', '--out', tmp_path/'out', '--device', 'cpu', '--mcd']
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-2000:]
    assert sorted(os.listdir(tmp_path/'out')) == ['clips.csv', 'run.json', 'scores.csv']
    row, clips = pd.read_csv(tmp_path/'out/scores.csv').iloc[0], pd.read_csv(tmp_path/'out/clips.csv')
    expected, expected_clips = score(folders, captions=captions, mcd=True)
    assert list(row.index) == list(expected) and (row.preset, row.resampler, row.listener) == ('mini', 'soxr', 'judge')
    numbers = ['FD', 'IS', 'KL', 'KAD', 'CLAP', 'MCD']
    np.testing.assert_allclose(row[numbers].astype(float), [expected[c] for c in numbers], rtol=1e-6)
    pd.testing.assert_frame_equal(clips, expected_clips, check_dtype=False)
    assert 'FAD' not in row and process.stdout.splitlines()[0].split() == ['n', '8'] and f'FD {row.FD:.4f}' in ' '.join(process.stdout.split())
    run = json.loads((tmp_path/'out/run.json').read_text())
    assert run['config']['preset'] == 'mini' and run['scores']['ids'] == ids_hash(SCENES) and run['seconds']['score'] > 0


def test_record_of_a_score_that_is_undefined_is_json(folders, tmp_path):
    write_sounds(folders[1], IDS[:1], AUDIO[:1] * 0, RATE)
    main(*map(str, folders), out=str(tmp_path/'out'), device='cpu', mcd=True)
    scores = json.loads((tmp_path/'out/run.json').read_text(), parse_constant=pytest.fail)['scores']
    assert scores['MCD'] is None and scores['silent'] == 1


def test_command_helps():
    text = ' '.join(anno_parser(main).format_help().split())
    assert all(part in text for part in ('reference', 'generated', '--captions', '--preset', '--out', '--resampler', '--mcd', 'write_sounds', 'columns id and caption'))


def test_command_is_installed():
    assert 'egmi-evaluate=egmi.evaluation.folders:main' in (ROOT/'settings.ini').read_text().split()


def test_command_ends_in_one_line_and_writes_nothing(folders, tmp_path):
    for id in IDS[:4]: (folders[1]/f'{id}.wav').unlink()
    with pytest.raises(SystemExit) as stop: main(*map(str, folders), out=str(tmp_path/'out'))
    assert stop.value.code == ('egmi-evaluate: outputs are missing for 4 of 8 references: generate them, or take the references out '
                               f'(first: {", ".join(IDS[:3])})')
    assert os.listdir(tmp_path/'out') == []
    with pytest.raises(SystemExit) as stop: main(*map(str, folders), preset='maxi')
    assert stop.value.code == "egmi-evaluate: unknown preset 'maxi': choose one of mini, paper"


# Bad input, each before any network is loaded

def damage(kind):
    def write(folder):
        path = folder/f'{IDS[2]}.wav'
        if kind == 'text': path.write_text('this is not a sound')
        else: soundfile.write(path, dict(empty=np.zeros(0), nan=np.full(RATE, np.nan), inf=np.full(RATE, np.inf), short=np.ones(99), silent=np.zeros(RATE))[kind], RATE, subtype='FLOAT')
    return write


@pytest.mark.parametrize('side', [0, 1], ids=['reference', 'generated'])
@pytest.mark.parametrize('kind, message', [
    ('text', 'cannot be read'), ('empty', 'has zero length'), ('nan', 'holds NaN or infinite samples'), ('inf', 'holds NaN or infinite samples'),
    ('short', r'lasts 0\.006 s, less than the 0\.032 s that are heard at once')])
def test_bad_file(folders, heard, side, kind, message):
    damage(kind)(folders[side])
    with pytest.raises(ValueError, match=rf'^sound .*{IDS[2]}\.wav {message}: replace it or leave it out$'): score(folders)
    assert heard == {}


def test_silence_is_an_error_in_a_reference_and_counted_in_an_output(folders, heard):
    damage('silent')(folders[1])
    row, clips = score(folders, mcd=True)
    assert row['silent'] == 1 and np.isnan(row['MCD']) and clips.mcd.isna().sum() == 1 and all(np.isfinite(row[c]) for c in ('FD', 'KL', 'KAD', 'IS'))
    heard.clear()
    damage('silent')(folders[0])
    with pytest.raises(ValueError, match=rf'^reference .*{IDS[2]}\.wav is silent: replace it or leave it out$'): score(folders)
    assert heard == {}


def with_extra(folders): write_sounds(folders[1], ['extra'], AUDIO[:1], RATE)
def with_twin(folders): soundfile.write(folders[0]/f'{IDS[0]}.flac', AUDIO[0], RATE)
def emptied(folders): [p.unlink() for p in folders[1].rglob('*.wav')]
def single(folders): [(f/f'{id}.wav').unlink() for f in folders for id in IDS[1:]]


@pytest.mark.parametrize('change, options, message', [
    (with_extra, {}, r'^1 of 9 generated sounds have no reference: take them out \(first: extra\)$'),
    (with_twin, {}, r'\.flac and .*\.wav have one name: keep one of them$'),
    (emptied, {}, r'made holds no sounds: files must end in \.wav'),
    (single, {}, r'^there is only the sound .*: a distribution needs at least 2$'),
    (None, dict(captions={id: 'a bell' for id in IDS[1:]}), rf'^1 of 8 sounds have no caption: add them \(first: {IDS[0]}\)$'),
    (None, dict(resampler='sinc'), r"^unknown resampler 'sinc': choose one of soxr, torchaudio$"),
])
def test_bad_pairs_and_options(folders, heard, change, options, message):
    if change: change(folders)
    with pytest.raises(ValueError, match=message): score(folders, **options)
    assert heard == {}


def test_folder_that_is_not_there(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'^there is no folder .*/nowhere$'): score((folders[0], tmp_path/'nowhere'))


def test_paper_preset_lists_only_the_weights_it_listens_with(folders):
    with pytest.raises(FileNotFoundError) as error: score_sounds('paper', *folders, device='cpu')
    assert all(name in str(error.value) for name in ('Cnn14_16k_mAP=0.438.pth', 'vggish-10086976.pth', '`egmi-weights paper`'))
    assert 'vicuna' not in str(error.value) and 'clap' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('id,text\na,b\n', r'has no column caption: columns are id, text$'),
    ('id,caption\na,b\na,c\n', r'has several captions for a: keep one$'), ('', r'is empty$')])
def test_bad_captions(text, message, tmp_path):
    (tmp_path/'captions.csv').write_text(text)
    with pytest.raises(ValueError, match=message): egmi.evaluation.folders.read_captions(tmp_path/'captions.csv')


# Killed, and again

def test_a_killed_run_goes_on(folders, heard, monkeypatch):
    kept = egmi.evaluation.folders.hear_batch
    batches = []

    def killed(*arguments):
        if batches: raise KeyboardInterrupt
        batches.append(kept(*arguments))

    options = dict(listeners=get_preset('mini').listeners, batch_size=5, progress=False)
    references, generated = read_pairs(*folders, progress=False)
    monkeypatch.setattr(egmi.evaluation.folders, 'hear_batch', killed)
    with pytest.raises(KeyboardInterrupt): egmi.evaluation.folders.embed_sounds(references, **options)
    monkeypatch.setattr(egmi.evaluation.folders, 'hear_batch', kept)
    assert heard == dict(judge=5)
    egmi.evaluation.folders.embed_sounds(references, **options)
    assert heard == dict(judge=8)
    row, _ = score(folders)
    assert heard == dict(judge=16)
    assert score(folders)[0] == row and heard == dict(judge=16)
    score(folders, resampler='torchaudio')
    assert heard == dict(judge=32)


def test_a_copy_is_heard_once_and_counted(folders, heard, tmp_path):
    copies = write_sounds(tmp_path/'copies', IDS, AUDIO[[0] * 7 + [1]], RATE)
    assert score((folders[0], copies))[0]['duplicates'] == 6 and heard == dict(judge=8)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(egmi.evaluation.folders, 'wav_bytes', lambda wave, rate: (_ for _ in ()).throw(OSError('disk full')) if wave[0] else b'whole')
    with pytest.raises(OSError): write_sounds(tmp_path/'made', ['a', 'b'], np.array([[0.], [1.]]), RATE)
    assert os.listdir(tmp_path/'made') == ['a.wav']


# Numbers

def test_row_equals_direct_computation(folders):
    judge, clap = Judge.from_pretrained(component_path('judge/sound')).float().eval(), load_clap(component_path('clap'))
    captions, made = {s.id: s.caption for s in SCENES}, np.roll(AUDIO, 1, 0) / 2
    (x, x_logits), (y, y_logits) = read(judge, sound_tensor(AUDIO)), read(judge, sound_tensor(made))
    row, clips = score(folders, captions=captions)
    expected = dict(n=8, ids=ids_hash(SCENES), FD=frechet_distance(x, y), KAD=kernel_distance(x, y), IS=inception_score(y_logits['object'], splits=1)[0],
                    KL=kl_divergence(x_logits['object'], y_logits['object'], KL_EPSILON), CLAP=cosine_similarity(clap.embed_sounds(made, RATE), clap.embed_texts(list(captions.values()))).mean())
    assert {name: row[name] for name in expected} == {name: value if isinstance(value, (int, str)) else pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert list(clips.id) == IDS and clips.kl.mean() == pytest.approx(row['KL'])
    np.testing.assert_allclose(clips[['peak', 'rms']], np.stack([abs(made).max(1), np.sqrt((made**2).mean(1))], 1), rtol=1e-5)


def test_mixed_files_sound_as_mono_at_16_khz(folders, tmp_path):
    "Stereo, other rates and flac among mono wavs: counted, and nearly the same scores."
    plain, _ = score((folders[0], folders[0]))
    noise, _ = score((folders[0], write_sounds(tmp_path/'noise', IDS, .1 * np.random.default_rng(0).normal(size=AUDIO.shape), RATE)))
    for n, id in enumerate(IDS[:6]):
        (folders[1]/f'{id}.wav').unlink()
        rate = (44_100, 48_000, RATE)[n % 3]
        wave = soxr.resample(AUDIO[n], RATE, rate)
        soundfile.write(folders[1]/f'{id}.{("wav", "flac")[n % 2]}', np.stack([1.2 * wave, .8 * wave], 1) if n < 3 else wave, rate)
    write_sounds(folders[1], IDS[6:], AUDIO[6:], RATE)
    for resampler in ('soxr', 'torchaudio'):
        row, _ = score(folders, resampler=resampler)
        assert (row['mixed_down'], row['resampled'], row['resampler']) == (3, 4, resampler)
        assert row['KL'] < .1 and row['IS'] == pytest.approx(plain['IS'], rel=.05)
        assert 0 < row['FD'] < .05 * noise['FD']


def random_listener(path, make, wrap):
    "A file in the published layout, with random weights of full size under which a sound still matters."
    torch.manual_seed(0)
    model = make()
    for name, t in model.state_dict().items():
        if t.is_floating_point(): t.normal_(std=(2 * t.shape[0] / t.numel())**.5) if t.ndim > 1 else t.uniform_(.5, 1.5) if 'var' in name or 'bn' in name else t.zero_()
        if name == 'fc_audioset.weight': t *= .01  # doubtful enough to differ by a finite KL
    torch.save(wrap(model.state_dict()), path)


def test_paper_networks_at_full_size(folders, heard, tmp_path):
    "Cnn14 and VGGish with random weights, a tiny CLAP in its published layout."
    random_listener(tmp_path/'cnn14.pth', Cnn14, lambda state: dict(iteration=0, model=state))
    random_listener(tmp_path/'vggish.pth', VGGish, lambda state: state)
    write_clap(TINY, tmp_path/'clap')
    preset = replace(get_preset('paper'), listeners=dict(cnn14=str(tmp_path/'cnn14.pth'), vggish=str(tmp_path/'vggish.pth')), clap=str(tmp_path/'clap'))
    some = [write_sounds(tmp_path/f'{name}3', IDS[:3], waves, RATE) for name, waves in dict(real=AUDIO[:3], made=AUDIO[2::-1] / 2).items()]
    row, clips = score_sounds(preset, *some, {s.id: s.caption for s in SCENES}, device='cpu', progress=False)
    assert heard == dict(cnn14=6, vggish=6, clap=3) and row['listener'] == 'cnn14, vggish' and row['preset'] == 'paper'
    cnn14, vggish = (load_network(name, tmp_path/f'{name}.pth', torch.device('cpu')) for name in ('cnn14', 'vggish'))
    (x, x_logits), (y, y_logits) = cnn14.listen(AUDIO[:3], RATE), cnn14.listen(AUDIO[2::-1] / 2, RATE)
    assert x.shape == (3, 2048) and vggish.embed(AUDIO[:3], RATE).shape == (6, 128)
    expected = dict(FD=frechet_distance(x, y), FAD=frechet_distance(vggish.embed(AUDIO[:3], RATE), vggish.embed(AUDIO[2::-1] / 2, RATE)),
                    KL=kl_divergence(x_logits, y_logits, KL_EPSILON), KAD=kernel_distance(x, y))
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert score_sounds(preset, *some, {s.id: s.caption for s in SCENES}, device='cpu', progress=False)[0] == row and heard == dict(cnn14=6, vggish=6, clap=3)
