"""Measures are defined as in the official code, and memory does not grow with pairs.

Each definition is written out here once more, from the official source. Weights are random."""
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from egmi.base.audio import SAMPLE_RATE
from egmi.evaluation.folders import Sound, clip_table
from egmi.evaluation.metrics import DECIBELS, mel_cepstra, mel_cepstral_distortion, warped_mean
from egmi.evaluation.networks import EXAMPLE_LENGTH, Cnn14, VGGish, batch_by_length
from egmi.toybox.scenes import toybox

SCENES = [scene.audio for scene in toybox('test', 8)]
SECONDS = np.arange(len(SCENES[0])) / SAMPLE_RATE


@contextmanager
def at_most(megabytes):
    "An error if more than that is allocated at once."
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < megabytes, f'{peak:.0f} MB'


# Networks for sounds

def test_kl_of_a_folder_is_that_of_audioldm_eval():
    "Sure of the wrong class costs -ln 1e-6, not what the logits say."
    sounds = [Sound(name, Path(name), name, SAMPLE_RATE, SAMPLE_RATE, 1, .5, .1, 0., False) for name in 'ab']
    logits = 99 * np.eye(12, dtype=np.float16)
    table = clip_table(sounds, sounds, dict(logits=logits[:2]), dict(logits=logits[1:3]))
    np.testing.assert_allclose(table.kl_audio, -np.log(1e-6), rtol=1e-6)


def without_weights(model_class, forward):
    "The network with another function in the place of its layers."
    with torch.device('meta'):
        model = model_class()
    model = model.to_empty(device='cpu')
    model.forward = forward
    return model


@pytest.fixture
def vggish():
    return without_weights(VGGish, lambda mel_BTM: mel_BTM.flatten(1)[:, ::48])


@pytest.mark.parametrize('n_samples', [1, 9_000, EXAMPLE_LENGTH, 31_999])
def test_vggish_fills_a_short_sound_up_to_two_seconds(vggish, n_samples):
    "Silence follows what is left without the mean; two examples of 0.96 s each."
    wave = SCENES[0][8_000:8_000 + n_samples]
    padded = np.pad(wave - wave.mean(), (0, 32_000 - n_samples))
    whole = vggish.embed([padded - padded.mean()], SAMPLE_RATE)
    assert whole.shape == (2, 128)
    np.testing.assert_allclose(vggish.embed([wave], SAMPLE_RATE), whole, atol=1e-4)


def test_vggish_needs_little_for_ten_minutes(vggish):
    "624 examples, in batches as asked for."
    sizes = []
    forward = vggish.forward

    def counting(mel_BTM):
        sizes.append(len(mel_BTM))
        return forward(mel_BTM)

    vggish.forward = counting
    wave = np.tile(SCENES[0], 235)[:600 * SAMPLE_RATE]
    with at_most(300):
        assert vggish.embed([wave], SAMPLE_RATE).shape == (624, 128)
    assert sizes == [64] * 9 + [48]


def test_cnn14_takes_long_sounds_in_small_batches():
    "A batch lasts no longer than as many sounds of ten seconds."
    batches = []

    def counting(wave_BT):
        batches.append((len(wave_BT), wave_BT.shape[1] // SAMPLE_RATE))
        return wave_BT[:, :4], wave_BT[:, 4:6]

    cnn14 = without_weights(Cnn14, counting)
    waves = [np.sin(np.arange(seconds * SAMPLE_RATE)) for seconds in [10] * 5 + [25] * 4 + [41]]
    features_ND, logits_NC = cnn14.classify(waves, SAMPLE_RATE, batch_size=4)
    assert batches == [(4, 10), (1, 10), (1, 25), (1, 25), (1, 25), (1, 25), (1, 41)]
    assert features_ND.shape == (10, 4)
    assert logits_NC.shape == (10, 2)


def test_batches_hold_every_sound_once():
    "Of files, which are equal where rate and length are."
    rng = np.random.default_rng(0)
    rates = rng.choice([16_000, 48_000], 60)
    seconds = rng.choice([2, 10, 31, 300], 60)
    files = list(zip(rates, rates * seconds))
    batches = batch_by_length(files, 8, tuple, lambda file: file[1] / file[0])
    assert sorted(sum(batches, [])) == list(range(60))
    for batch in batches:
        assert len({files[i] for i in batch}) == 1
        rate, frames = files[batch[0]]
        assert len(batch) == 1 or len(batch) <= 8 and len(batch) * frames / rate <= 80


# Mel cepstral distortion

@pytest.mark.parametrize('unheard_T', [
    .005 + 0 * SECONDS, .3 + 0 * SECONDS,
    .01 * SECONDS, -.2 * SECONDS,
    .005 * np.sin(2 * np.pi * SECONDS), .3 * np.sin(2 * np.pi * SECONDS + 1),
    .005 * np.sin(10 * np.pi * SECONDS),
], ids=['offset', 'large offset', 'drift', 'large drift', '1 Hz', 'loud 1 Hz', '5 Hz'])
def test_what_nobody_hears_costs_nothing(unheard_T):
    "On eight scenes of Toybox, the mean."
    costs = [mel_cepstral_distortion(wave_T, wave_T + unheard_T, SAMPLE_RATE) for wave_T in SCENES]
    assert np.mean(costs) < .02


def test_a_step_costs_little():
    "It is a click and may be heard a little."
    step_T = .005 * (SECONDS > 1.2)
    costs = [mel_cepstral_distortion(wave_T, wave_T + step_T, SAMPLE_RATE) for wave_T in SCENES]
    assert np.mean(costs) < .06


def test_what_is_heard_costs_what_it_did():
    for wave_T, other_T in zip(SCENES, SCENES[1:]):
        cost_TU = cdist(*[mel_cepstra(x_T, SAMPLE_RATE, highpass=0.) for x_T in (wave_T, other_T)])
        unfiltered = DECIBELS * warped_mean(cost_TU)
        assert abs(mel_cepstral_distortion(wave_T, other_T, SAMPLE_RATE) / unfiltered - 1) < .03


def test_distortion_of_half_a_minute_needs_no_matrix():
    "3,747 frames each; one matrix of their distances would be 107 MB."
    rng = np.random.default_rng(0)
    n = 30 * SAMPLE_RATE
    waves = [np.tile(wave_T, 12)[:n] + .01 * rng.normal(size=n) for wave_T in SCENES[:2]]
    with at_most(60):
        found = mel_cepstral_distortion(*waves, SAMPLE_RATE)
    assert 1 < found < 40


def test_distortion_by_rows_is_that_of_the_matrix():
    for wave_T, other_T in zip(SCENES, SCENES[1:]):
        shorter_T = other_T[:30_000]
        cepstra = [mel_cepstra(x_T, SAMPLE_RATE) for x_T in (wave_T, shorter_T)]
        expected = DECIBELS * warped_mean(cdist(*cepstra))
        found = mel_cepstral_distortion(wave_T, shorter_T, SAMPLE_RATE)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
