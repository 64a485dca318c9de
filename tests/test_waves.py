"""Sounds of users: forms of a waveform, cut files, silence, kinds of files, ids that pair."""
import io
import os
import struct
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import ROOT
from transformers import ClapFeatureExtractor

from egmi.base.audio import resample
from egmi.base.audio_files import audio_info, check_audio, read_audio, wav_bytes
from egmi.base.files import explain_mismatch
from egmi.evaluation.encoders import Clap
from egmi.evaluation.folders import find_sounds, read_pairs, read_sound, score_sounds, write_sounds
from egmi.evaluation.networks import at_16k

RATE = 16_000
TONE = (.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
TONE.flags.writeable = False


def encoded(wave, rate=RATE, **options):
    "The bytes of a file."
    file = io.BytesIO()
    soundfile.write(file, wave, rate, **options)
    return file.getvalue()


# Every function that takes a waveform

class Buffer:
    "Bytes that open like a file."

    def __init__(self, data):
        self.data = data

    def open(self, mode):
        return io.BytesIO(self.data)


def through_bytes(wave):
    samples, _ = read_audio(Buffer(wav_bytes(wave, RATE)))
    return samples


def through_networks(wave):
    samples, = at_16k([wave], RATE)
    return samples


def through_clap(wave):
    mels = ClapFeatureExtractor(sampling_rate=RATE, frequency_max=RATE / 2, truncation='rand_trunc')
    clap = Clap(None, None, mels)
    return clap.prepare(wave, RATE)


def through_folder(wave):
    folder = write_sounds('made', ['a'], [wave], RATE)
    samples, _ = read_audio(folder/'a.wav')
    return samples


WAYS = [through_bytes, through_networks, through_clap, through_folder]


def whole_numbers(kind):
    full = 2**(8 * np.dtype(kind).itemsize - 1)
    zero = full if kind.startswith('u') else 0
    return (np.rint(TONE.astype(float) * full) + zero).astype(kind)


FORMS = {kind: whole_numbers(kind) for kind in ('int8', 'int16', 'int32', 'uint8', 'uint16')}
FORMS |= {kind: TONE.astype(kind) for kind in ('float16', 'float32', 'float64')}
STEREO = np.stack([1.2 * TONE, .8 * TONE])
FORMS |= {
    '[2, T]': STEREO,
    '[T, 2]': STEREO.T,
    '[1, T]': TONE[None],
    '[T, 6] int32': np.repeat(whole_numbers('int32')[:, None], 6, 1),
    'list': whole_numbers('int16').tolist(),
    'int64': whole_numbers('int16').astype(int),
    'bfloat16': torch.tensor(TONE).bfloat16(),
    'tensor': torch.tensor(TONE, requires_grad=True),
    'int16 tensor': torch.tensor(whole_numbers('int16'))[None]}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('form', FORMS)
def test_every_form_is_the_same_sound(form, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = way(FORMS[form])
    assert samples.dtype == np.float32
    assert samples.shape == TONE.shape
    np.testing.assert_allclose(samples, TONE, atol=.005)


NO_SOUNDS = {
    'cast': (TONE * 2**15, ValueError, 'peak of 16,384, far outside .* as integers cast to floats'),
    'float64 cast': (whole_numbers('int32').astype(float), ValueError, 'far outside'),
    'narrow integers': (whole_numbers('int16').astype(np.int32), ValueError, 'int32 within 16 bits'),
    'wide integers': (whole_numbers('int32').astype(int), ValueError, 'holds int64 beyond 16 bits'),
    'batch': (np.stack([TONE] * 9), ValueError, r'has shape \[9, 16000\]'),
    'square': (TONE[:4].reshape(2, 2), ValueError, r'shape \[2, 2\]'),
    '3-d': (TONE.reshape(1, 2, -1), ValueError, r'shape \[1, 2, 8000\]'),
    'number': (.5, ValueError, r'shape \[\]'),
    'nan': (np.append(TONE, np.nan), ValueError, 'NaN or infinite'),
    'inf': (np.append(TONE, -np.inf), ValueError, 'NaN or infinite'),
    'empty': (TONE[:0], ValueError, 'zero length'),
    'no channels': (np.zeros((0, 9)), ValueError, 'zero length'),
    'none': (None, TypeError, 'not None'),
    'path': ('dog.wav', TypeError, "not 'dog.wav'"),
    'complex': (TONE * 1j, TypeError, 'complex64'),
    'dict': (dict(array=[.5]), TypeError, "not {'array': "),
    'ragged': ([[.5], [.5, .5]], TypeError, 'not '),
    'holes': ([.5, None], TypeError, 'list of object'),
    'truth': (TONE > 0, TypeError, 'ndarray of bool')}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', NO_SOUNDS)
def test_what_is_no_sound_is_refused(kind, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wave, error, message = NO_SOUNDS[kind]
    with pytest.raises(error, match=f'sound.*{message}'):
        way(wave)
    assert not os.listdir()


def test_floats_may_overshoot():
    for peak in (1.4, 7.9):
        assert np.abs(through_bytes(TONE * 2 * peak)).max() == pytest.approx(peak, rel=1e-3)


def test_files_of_integers_cast_to_floats_are_refused(tmp_path):
    soundfile.write(tmp_path/'a.wav', TONE * 2**15, RATE, subtype='FLOAT')
    with pytest.raises(ValueError, match=r'^sound .*a\.wav has a peak of 16,384, far outside'):
        read_audio(tmp_path/'a.wav')


# Rates

def test_resample_is_soxr():
    wave_T = np.random.default_rng(0).normal(size=50_003).astype(np.float32)
    for old, new in [(48_000, 16_000), (44_100, 16_000), (16_000, 48_000), (22_050, 16_000)]:
        np.testing.assert_array_equal(resample(wave_T, old, new), soxr.resample(wave_T, old, new))


@pytest.mark.parametrize('rate', [0, -16_000, 16, 2**31, 16_000.5, np.nan, '16000', None, True], ids=repr)
def test_bad_rates(rate, tmp_path):
    folder = tmp_path/'made'
    uses = (
        lambda: wav_bytes(TONE, rate),
        lambda: at_16k([TONE], rate),
        lambda: write_sounds(folder, ['a'], [TONE], rate))
    for use in uses:
        with pytest.raises(ValueError, match=f'10,000,000 Hz, not {rate!r}'):
            use()
    assert not folder.exists()


# Prints by how many MB the memory grows while half an hour of sound is resampled in each way.
MEMORY = '''
import resource
import numpy as np
from egmi.evaluation.folders import RESAMPLERS

def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

wave_T = np.random.default_rng(0).random(1800 * 48_000, dtype=np.float32)
before = peak_kb()
for resample in RESAMPLERS.values():
    resample(wave_T, 48_000, 16_000)
print((peak_kb() - before) // 1024)
'''


@pytest.mark.slow
def test_long_sounds_need_little_memory():
    "Thirty minutes at 48 kHz are 346 MB, and 115 MB at 16 kHz."
    process = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 500


@pytest.mark.parametrize('captions, error, message', [
    (dict(a=None, b='a bell'), ValueError, r'the caption of a is empty'),
    (dict(a=['a dog'], b='a bell'), ValueError, r"the caption of a is \['a dog'\], not text"),
    (dict(a='nan', b='a bell'), ValueError, "the caption of a is 'nan'"),
    ('captions.csv', TypeError, "captions must be a dict of id -> caption, not a str")])
def test_captions_that_are_none(captions, error, message, tmp_path):
    ids = (id for id in 'ab')
    sounds = (TONE for _ in 'ab')
    real = write_sounds(tmp_path, ids, sounds, RATE)
    with pytest.raises(error, match=message):
        score_sounds('mini', real, real, captions)


@pytest.mark.parametrize('ids, sounds', [({'a', 'b'}, [TONE] * 2), (['a'], None), (None, [TONE])],
                         ids=['set', 'no sounds', 'no ids'])
def test_what_has_no_order_is_no_list(ids, sounds, tmp_path):
    with pytest.raises(TypeError, match='must be a list, not '):
        write_sounds(tmp_path/'made', ids, sounds, RATE)
    assert not os.listdir(tmp_path)


# Cut files

KINDS = [
    ('WAV', 'PCM_16'), ('WAV', 'PCM_24'), ('WAV', 'PCM_32'), ('WAV', 'PCM_U8'), ('WAV', 'FLOAT'),
    ('WAV', 'MS_ADPCM'), ('WAVEX', 'PCM_16'), ('RF64', 'PCM_16'), ('AIFF', 'PCM_16'), ('AIFF', 'FLOAT'),
    ('AU', 'PCM_16'), ('NIST', 'PCM_16'), ('NIST', 'PCM_24'), ('CAF', 'PCM_24'),
    ('CAF', 'ALAC_16'), ('W64', 'PCM_24'), ('FLAC', 'PCM_16'), ('FLAC', 'PCM_24'),
    ('OGG', 'VORBIS'), ('OGG', 'OPUS'), ('MP3', 'MPEG_LAYER_III')]
LOOKS = [check_audio, read_audio]
REFUSAL = r'^sound .*cut (is cut off|cannot be read|has zero length)'


def noise(frames, channels=1):
    return .1 * np.random.default_rng(frames).normal(size=(frames, channels)).clip(-5, 5)


@pytest.mark.parametrize('kind, subtype', KINDS)
def test_a_cut_file_is_bad(kind, subtype, tmp_path):
    data = encoded(noise(30_011), 48_000, format=kind, subtype=subtype)
    file = tmp_path/'cut'
    for end in (len(data) - 10, len(data) - 100, len(data) // 2, len(data) // 10, 40):
        file.write_bytes(data[:end])
        for look in LOOKS:
            with pytest.raises(ValueError, match=REFUSAL):
                look(file)


@pytest.mark.parametrize('kind, subtype', KINDS)
def test_a_whole_file_is_good(kind, subtype, tmp_path):
    file = tmp_path/'whole'
    rates = [8_000, 48_000] if subtype == 'OPUS' else [8_000, 44_100, 48_000]
    for rate, frames, channels in product(rates, (1, 3, 576, 1_153, 4_097, 30_011), (1, 2)):
        data = encoded(noise(frames, channels), rate, format=kind, subtype=subtype)
        file.write_bytes(data)
        check_audio(file)
        samples, _ = read_audio(file)
        expected, _ = soundfile.read(io.BytesIO(data), always_2d=True)
        np.testing.assert_allclose(samples, expected.mean(1), atol=1e-6)


def with_data_size(wav, size):
    at = wav.index(b'data') + 4
    return wav[:at] + struct.pack('<I', size) + wav[at + 4:]


def chunk(name, data):
    return name + struct.pack('<I', len(data)) + data


def mp3_in_wav(mp3, frames):
    "As ffmpeg writes it: frames that a decoder does not give back are counted."
    form = struct.pack('<HHIIHH', 0x55, 1, RATE, 8_000, 1, 0) + struct.pack('<HHIHHH', 12, 1, 2, 576, 1, 1393)
    fact = struct.pack('<I', frames + 1_152)
    body = chunk(b'fmt ', form) + chunk(b'fact', fact) + chunk(b'data', mp3)
    return chunk(b'RIFF', b'WAVE' + body)


def odd_files():
    "Whole files that a careless check would refuse, and cut ones that it would let pass: bytes, whole?"
    wav = encoded(noise(30_001), format='WAV', subtype='PCM_16')
    mp3 = encoded(noise(30_001), format='MP3')
    remarks = chunk(b'LIST', b'INFO' + 100 * chunk(b'ICMT', b'x' * 50))
    remarked = wav[:36] + remarks + wav[36:]
    before = b'ID3\3\0\0\0\0\2\0' + bytes(256)
    after = b'TAG' + bytes(125)
    constant = encoded(noise(30_001), format='MP3', bitrate_mode='CONSTANT', compression_level=.9)
    assert b'Xing' not in constant
    assert b'Info' not in constant
    return {
        'list after data': (wav + remarks, True),
        'list after data, cut': ((wav + remarks)[:-90], True),
        'list before data': (remarked, True),
        'list before data, cut': (remarked[:-90], False),
        'no padding byte': (encoded(noise(3_001), format='WAV', subtype='PCM_24')[:-1], True),
        'stream': (with_data_size(wav, 2**32 - 1)[:-90], True),
        'stream of sox': (with_data_size(wav, 0x7FFFF000), True),
        'id3 before': (before + mp3, True),
        'id3 before, cut': ((before + mp3)[:-90], False),
        'id3 after': (mp3 + after, True),
        'mp3 without a length': (constant, True),
        'mp3 in wav': (mp3_in_wav(constant, 30_001), True),
        'mp3 in wav, cut': (mp3_in_wav(constant, 30_001)[:-90], False),
        'average rate': (encoded(noise(30_001), format='MP3', bitrate_mode='AVERAGE'), True),
        'ogg and a tag': (encoded(noise(30_001), format='OGG') + after, True)}


ODD = odd_files()


@pytest.mark.parametrize('name', ODD)
def test_odd_files(name, tmp_path):
    data, whole = ODD[name]
    file = tmp_path/'odd'
    file.write_bytes(data)
    for look in LOOKS:
        if whole:
            look(file)
        else:
            with pytest.raises(ValueError, match='is cut off'):
                look(file)


def test_checking_decodes_next_to_nothing(tmp_path, monkeypatch):
    decoded = []
    read = soundfile.SoundFile.read

    def counted(self, *arguments, **options):
        samples = read(self, *arguments, **options)
        decoded.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, 'read', counted)
    for kind, subtype in KINDS:
        (tmp_path/'sound').write_bytes(encoded(noise(30_011), 48_000, format=kind, subtype=subtype))
        check_audio(tmp_path/'sound')
    assert decoded == [1, 1] # of the two flacs


def test_damaged_sizes_end(tmp_path):
    "A chunk of w64 whose size is less than its head, and one that is larger than any file."
    data = encoded(TONE, format='W64')
    at = data.index(b'fmt ') + 16
    file = tmp_path/'a.w64'
    for size in (0, 2**64 - 1):
        file.write_bytes(data[:at] + struct.pack('<Q', size) + data[at + 8:])
        with pytest.raises(ValueError, match=r'a\.w64 cannot be read'):
            check_audio(file)


def test_a_flac_without_a_length_says_so(tmp_path):
    data = bytearray(encoded(TONE, format='FLAC'))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path/'piped.flac').write_bytes(data)
    with pytest.raises(ValueError, match='does not say how long it is: convert it'):
        read_audio(tmp_path/'piped.flac')


# Silence

DITHER = np.random.default_rng(0).uniform(-5e-5, 5e-5, RATE)
SILENT = {'zeros': np.zeros(RATE), 'constant': np.full(RATE, .25), 'dither': DITHER, 'offset': DITHER - .4}
CLICK = np.where(np.arange(RATE) == 99, .26, .25)


@pytest.mark.parametrize('kind', SILENT)
def test_silence_is_what_cannot_be_heard(kind, tmp_path):
    file = tmp_path/'a.wav'
    soundfile.write(file, SILENT[kind], RATE, subtype='FLOAT')
    check_audio(file)
    with pytest.raises(ValueError, match=r'a\.wav is silent'):
        check_audio(file, decode=True)
    assert read_sound('a', file).silent


def test_a_click_is_a_sound(tmp_path):
    for name, wave in dict(click=CLICK, faint=TONE / 3_000 + .25).items():
        file = tmp_path/f'{name}.wav'
        soundfile.write(file, wave, RATE, subtype='FLOAT')
        check_audio(file, decode=True)
        assert not read_sound(name, file).silent


def test_a_constant_reference_is_an_error(tmp_path):
    real = write_sounds(tmp_path/'real', ['a', 'b'], [TONE, SILENT['constant']], RATE)
    with pytest.raises(ValueError, match=r'^reference .*b\.wav is silent'):
        read_pairs(real, real, progress=False)


# Kinds of files

def test_every_kind_that_can_be_read_is_found(tmp_path):
    kinds = dict(
        wav='WAV', FLAC='FLAC', ogg='OGG', OGA='OGG', opus='OGG', MP3='MP3', aiff='AIFF', AIF='AIFF',
        au='AU', CAF='CAF', w64='W64')
    for n, (ending, kind) in enumerate(kinds.items()):
        subtype = 'OPUS' if ending == 'opus' else None
        data = encoded(TONE, format=kind, subtype=subtype)
        (tmp_path/f'{n:02}.{ending}').write_bytes(data)
    found = find_sounds(tmp_path)
    assert list(found) == [f'{n:02}' for n in range(len(kinds))]
    for file in found.values():
        samples, _ = read_audio(file)
        assert len(samples) == audio_info(file).frames == RATE


@pytest.mark.parametrize('name', ['b.m4a', 'b.WMA', 'b.aac', 'sub/b.webm', 'b.3gp'])
def test_other_kinds_are_named(name, tmp_path):
    write_sounds(tmp_path, ['a'], [TONE], RATE)
    file = tmp_path/name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b'\0\0\0\x1cftypM4A ')
    message = f'{name}.* is of a kind that is not read here: convert it, for instance by `ffmpeg'
    for look, given in [(find_sounds, tmp_path), (read_audio, file), (check_audio, file)]:
        with pytest.raises(ValueError, match=message):
            look(given)
    write_sounds(tmp_path, [name.rsplit('.', 1)[0]], [TONE], RATE)
    assert len(find_sounds(tmp_path)) == 2


def test_links_are_followed_and_lost_ones_are_missing(tmp_path):
    write_sounds(tmp_path/'elsewhere', ['a', 'b'], [TONE] * 2, RATE)
    (tmp_path/'here').mkdir()
    (tmp_path/'here/part').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'here/c.wav').symlink_to(tmp_path/'elsewhere/a.wav')
    assert list(find_sounds(tmp_path/'here')) == ['c', 'part/a', 'part/b']
    (tmp_path/'elsewhere/a.wav').unlink()
    assert list(find_sounds(tmp_path/'here')) == ['c', 'part/b']
    with pytest.raises(ValueError, match=r'c\.wav is missing'):
        read_pairs(tmp_path/'here', tmp_path/'here', progress=False)


def test_rates_that_no_sound_has(tmp_path):
    file = tmp_path/'a.wav'
    soundfile.write(file, TONE, 16)
    for look in LOOKS:
        with pytest.raises(ValueError, match=r'a\.wav has a sample rate of 16 Hz'):
            look(file)


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path/os.fsdecode(b'caf\xe9.wav')).write_bytes(encoded(TONE, format='WAV'))
    with pytest.raises(ValueError, match=r'caf\\udce9\.wav. is not in UTF-8: rename it'):
        find_sounds(tmp_path)


# Ids

BAD_IDS = [
    (['a', 'a'], "the ids 'a' and 'a' may be one file"),
    (['a', 'A'], "'a' and 'A' may be one file"),
    (['\u00e9', 'e\u0301'], r"'\\xe9' and 'e\\u0301' may be one file"),
    ([1, '1'], "1 and '1' may be one file"),
    (['a', '../b'], r"'\.\./b' has a part that begins with a dot"),
    (['a', '/tmp/b'], "'/tmp/b' is empty or has an empty part"),
    (['a', ''], "'' is empty"),
    (['a', 'a/'], "'a/' is empty or has an empty part"),
    (['a', '.b'], 'begins with a dot'),
    (['a', 'caf\udce9'], 'is not in UTF-8'),
    (['a', 'b\\..\\c'], 'holds a backslash'),
    (['a', 'b' * 252], 'too long'),
    (['a', None], 'the id None is no text'),
    (['a', float('nan')], 'the id nan is no text')]


@pytest.mark.parametrize('ids, message', BAD_IDS)
def test_ids_are_checked_before_anything_is_written(ids, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        write_sounds(tmp_path/'in/made', ids, [TONE] * 2, RATE)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('wanted, there, reason', [
    ('abc', 'abc.wav', 'a suffix of ids'),
    ('0012', '12', 'leading zeros'),
    ('caf\u00e9', 'cafe\u0301', 'the Unicode form'),
    ('Abc', 'abc', 'upper and lower case'),
    ('clips/abc', 'abc', 'a folder in ids'),
    ('abc', 'abc ', 'blanks around ids'),
    ('clips/Abc', 'abc', 'a folder in ids and upper and lower case')])
def test_ids_that_do_not_pair_are_explained(wanted, there, reason, tmp_path):
    real = write_sounds(tmp_path/'real', [wanted, 'b'], [TONE] * 2, RATE)
    made = write_sounds(tmp_path/'made', [there, 'b'], [TONE] * 2, RATE)
    with pytest.raises(ValueError) as error:
        read_pairs(real, made, progress=False)
    show = ascii if reason == 'the Unicode form' else repr
    explained = f'{show(wanted)} is missing but {show(there)} is there: they differ by {reason}'
    assert str(error.value).endswith(explained)


def test_ids_without_a_likeness_are_both_shown(tmp_path):
    real = write_sounds(tmp_path/'real', ['real', 'b'], [TONE] * 2, RATE)
    made = write_sounds(tmp_path/'made', ['made', 'b'], [TONE] * 2, RATE)
    with pytest.raises(ValueError, match="'real' is missing, and 'made' is there but not asked for"):
        read_pairs(real, made, progress=False)


def test_captions_that_do_not_pair_are_explained(tmp_path):
    real = write_sounds(tmp_path/'real', ['007', 'b'], [TONE] * 2, RATE)
    with pytest.raises(ValueError, match="'007' is missing but '7' is there: they differ by leading zeros"):
        read_pairs(real, real, {'7': 'a bell', 'b': 'a dog'}, progress=False)


def test_many_ids_are_explained_at_once():
    ids = [f'clip {n:06}' for n in range(50_000)]
    files = [f'{id}.wav' for id in ids]
    assert 'a suffix of ids' in explain_mismatch(ids, files)
