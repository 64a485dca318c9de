"""Measures and inputs are defined as in the official code, and memory does not grow with pairs.

Each definition is written out here once more, from the official source. Weights are random."""
import os
import tracemalloc
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from egmi.toybox.scenes import toybox
from egmi.evaluation.folders import NETWORKS, Sound, clip_table
from egmi.frozen.diffusion import generators_for
from egmi.frozen.imagebind import ImageBindConfig, clip_starts, preprocess_audio
from egmi.evaluation.networks import EXAMPLE, RATE, Cnn14, VGGish, equal_lengths
from egmi.evaluation.metrics import DECIBELS, mel_cepstra, mel_cepstral_distortion, warped_mean
from egmi.model import load_generators
from egmi.small.rehearsal import TINY, places, random_preset, write_weights

SCENES = [e.audio for e in toybox('test', 8)]
SECONDS = np.arange(len(SCENES[0])) / RATE


@contextmanager
def at_most(megabytes):
    "An error if more than that is allocated at once."
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally: tracemalloc.stop()
    assert peak < megabytes, f'{peak:.0f} MB'


# ImageBind

@pytest.mark.parametrize('n_samples', [1, 20_000, 32_000, 32_001, 48_000, 96_007, 160_000, 441_000])
@pytest.mark.parametrize('n_clips', [1, 2, 3, 5])
def test_clips_are_spread_from_beginning_to_end(n_samples, n_clips):
    "In whole samples; official seconds are floats, which may lie just below one."
    config = ImageBindConfig(n_clips=n_clips)
    room = max(n_samples - 32_000, 0)
    exact = [Fraction(i * room, max(n_clips - 1, 1)) for i in range(n_clips)]
    starts = clip_starts(n_samples, config)
    assert len(starts) == n_clips and all(0 <= e - start < 2 for e, start in zip(exact, starts))


def test_what_sounds_last_is_heard():
    "A tone in the last second and a half of ten is in the third clip alone."
    wave = 1e-3 * np.random.default_rng(0).normal(size=160_000).astype(np.float32)
    wave[136_000:] += .5 * np.sin(np.arange(24_000)).astype(np.float32)
    loudest_N = preprocess_audio([wave], RATE, ImageBindConfig())[0].amax((1, 2, 3))
    assert loudest_N[2] > loudest_N[:2].max() + .5


# AudioLDM

@pytest.fixture(scope='module')
def audioldm(tmp_path_factory):
    "Tiny, with random weights."
    folder = tmp_path_factory.mktemp('random')/'weights'
    write_weights(TINY, folder)
    with mock.patch.dict(os.environ, places(folder)):
        return load_generators(random_preset(TINY))[1]


def edited(audioldm, waves, **options):
    condition = torch.nn.functional.normalize(audioldm.encode_text(['a bell', 'a drum']), dim=-1)
    return audioldm.edit(condition, waves, generator=generators_for([5, 6]), steps=4, progress=False, **options)


@pytest.mark.parametrize('options', [dict(strength=0.), dict(strength=.5), dict(strength=1.),
                                     dict(strength=.8, spans=[(.4, .8), (0., .4)])], ids=str)
def test_an_edit_is_as_loud_as_its_source(audioldm, options):
    "Each source has a gain and an offset of its own; the edit has the gain, and nothing else changes."
    plain, gains = np.stack(SCENES[:2]), np.float32([[.25], [1.5]])
    expected = gains * edited(audioldm, plain, **options)
    found = edited(audioldm, gains * plain + np.float32([[.02], [-.02]]), **options)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 5e-3).all()  # rounding, which random networks make larger in single samples


def test_a_quiet_recording_has_the_latents_that_audioldm_makes(audioldm, monkeypatch):
    "Its own code: without the mean, over (peak + 1e-8), times .5."
    quiet = np.stack([.1 * wave / abs(wave).max() + .01 for wave in SCENES[:2]]).astype(np.float32)
    centred = quiet - quiet.mean(1, keepdims=True)
    official = centred / (abs(centred).max(1, keepdims=True) + 1e-8) * .5
    heard, encode = [], type(audioldm).encode_audio

    def listening(self, wave_BT):
        heard.append(encode(self, wave_BT))
        return heard[-1]
    monkeypatch.setattr(type(audioldm), 'encode_audio', listening)
    edited(audioldm, quiet, strength=0.)
    expected = encode(audioldm, torch.from_numpy(official))
    torch.testing.assert_close(torch.cat(heard), expected, atol=1e-3, rtol=1e-3)
    assert (encode(audioldm, torch.from_numpy(quiet)) - heard[0]).abs().max() > .01


def test_a_silent_source_is_edited(audioldm):
    "A constant is silent, too: both are edited like silence, at the level of the generator."
    silent, constant = np.zeros((2, 16_000), np.float32), np.full((2, 16_000), .1, np.float32)
    made = edited(audioldm, silent, strength=.5)
    assert np.isfinite(made).all() and abs(made).max() > 0
    np.testing.assert_allclose(edited(audioldm, constant, strength=.5), made, atol=1e-6)


# Listeners

def test_kl_of_a_folder_is_that_of_audioldm_eval():
    "Sure of the wrong class costs -ln 1e-6, not what the logits say."
    sounds = [Sound(name, Path(name), name, RATE, RATE, 1, .5, .1, 0., False) for name in 'ab']
    logits = 99 * np.eye(12, dtype=np.float16)
    kl = clip_table(sounds, sounds, dict(logits=logits[:2]), dict(logits=logits[1:3])).kl
    np.testing.assert_allclose(kl, -np.log(1e-6), rtol=1e-6)


def without_weights(model_class, forward):
    "The network with another function in the place of its layers."
    with torch.device('meta'): model = model_class()
    model = model.to_empty(device='cpu')
    model.forward = forward
    return model


@pytest.fixture
def vggish(): return without_weights(VGGish, lambda mel_BTM: mel_BTM.flatten(1)[:, ::48])


def test_vggish_hears_no_offset(vggish):
    with_offset = vggish.embed([wave + .05 for wave in SCENES], RATE)
    np.testing.assert_allclose(with_offset, vggish.embed(SCENES, RATE), atol=1e-4)


@pytest.mark.parametrize('n_samples', [1, 9_000, EXAMPLE, 31_999])
def test_vggish_hears_two_seconds_of_a_short_sound(vggish, n_samples):
    "Silence follows what is left without the mean; two examples of 0.96 s each."
    wave = SCENES[0][8_000:8_000 + n_samples]
    padded = np.pad(wave - wave.mean(), (0, 32_000 - n_samples))
    whole = vggish.embed([padded - padded.mean()], RATE)
    assert whole.shape == (2, 128)
    np.testing.assert_allclose(vggish.embed([wave], RATE), whole, atol=1e-4)
    assert NETWORKS['vggish'].shortest == NETWORKS['cnn14'].shortest


def test_vggish_needs_little_for_ten_minutes(vggish):
    "625 examples, in batches as asked for."
    sizes, forward = [], vggish.forward

    def counting(mel_BTM):
        sizes.append(len(mel_BTM))
        return forward(mel_BTM)
    vggish.forward = counting
    wave = np.tile(SCENES[0], 235)[:600 * RATE]
    with at_most(300): assert vggish.embed([wave], RATE).shape == (624, 128)
    assert sizes == [64] * 9 + [48]


def test_cnn14_hears_long_sounds_in_small_batches():
    "A batch lasts no longer than as many sounds of ten seconds."
    batches = []

    def counting(wave_BT):
        batches.append((len(wave_BT), wave_BT.shape[1] // RATE))
        return wave_BT[:, :4], wave_BT[:, 4:6]
    cnn14 = without_weights(Cnn14, counting)
    waves = [np.sin(np.arange(seconds * RATE)) for seconds in [10] * 5 + [25] * 4 + [41]]
    features_ND, logits_NC = cnn14.listen(waves, RATE, batch_size=4)
    assert batches == [(4, 10), (1, 10), (1, 25), (1, 25), (1, 25), (1, 25), (1, 41)]
    assert features_ND.shape == (10, 4) and logits_NC.shape == (10, 2)


def test_batches_hold_every_sound_once():
    "Of files, which are equal where rate and length are."
    rng = np.random.default_rng(0)
    rates, seconds = rng.choice([16_000, 48_000], 60), rng.choice([2, 10, 31, 300], 60)
    files = list(zip(rates, rates * seconds))
    batches = equal_lengths(files, 8, tuple, lambda file: file[1] / file[0])
    assert sorted(sum(batches, [])) == list(range(60))
    for batch in batches:
        assert len({files[i] for i in batch}) == 1
        rate, frames = files[batch[0]]
        assert len(batch) == 1 or len(batch) <= 8 and len(batch) * frames / rate <= 80


# Mel cepstral distortion

@pytest.mark.parametrize('name, unheard', [
    ('offset', .005 + 0 * SECONDS), ('large offset', .3 + 0 * SECONDS),
    ('drift', .01 * SECONDS), ('large drift', -.2 * SECONDS),
    ('1 Hz', .005 * np.sin(2 * np.pi * SECONDS)), ('loud 1 Hz', .3 * np.sin(2 * np.pi * SECONDS + 1)),
    ('5 Hz', .005 * np.sin(10 * np.pi * SECONDS)), ('step', .005 * (SECONDS > 1.2))])
def test_what_is_not_heard_costs_nothing(name, unheard):
    "On eight scenes of Toybox, the mean. A step is a click and may be heard a little."
    cost = np.mean([mel_cepstral_distortion(wave, wave + unheard, RATE) for wave in SCENES])
    assert cost < (.06 if name == 'step' else .02)


def test_what_is_heard_costs_what_it_did():
    for wave, other in zip(SCENES, SCENES[1:]):
        plain = DECIBELS * warped_mean(cdist(*(mel_cepstra(w, RATE, highpass=0.) for w in (wave, other))))
        assert abs(mel_cepstral_distortion(wave, other, RATE) / plain - 1) < .03


@pytest.mark.parametrize('wave', [np.zeros(RATE), np.full(RATE, .25), np.full(RATE, -.1, np.float32)],
                         ids=['zeros', 'constant', 'float32'])
def test_a_constant_is_silent(wave):
    with pytest.raises(ValueError, match='gen is silent'): mel_cepstral_distortion(SCENES[0], wave, RATE)


def test_distortion_of_half_a_minute_needs_no_matrix():
    "3,747 frames each; one matrix of their distances would be 107 MB."
    rng = np.random.default_rng(0)
    waves = [np.tile(wave, 12)[:30 * RATE] + .01 * rng.normal(size=30 * RATE) for wave in SCENES[:2]]
    with at_most(60): found = mel_cepstral_distortion(*waves, RATE)
    assert 1 < found < 40


def test_distortion_by_rows_is_that_of_the_matrix():
    for wave, other in zip(SCENES, SCENES[1:]):
        shorter = other[:30_000]
        expected = DECIBELS * warped_mean(cdist(mel_cepstra(wave, RATE), mel_cepstra(shorter, RATE)))
        np.testing.assert_allclose(mel_cepstral_distortion(wave, shorter, RATE), expected, rtol=1e-10)
