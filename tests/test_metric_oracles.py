"""Metrics against the libraries that others use, and the properties that they must have whatever the data.

What agrees must agree to 1e-6 relative. Where a library defines something else, the test says what, and
checks the relation between the two.
mel-cepstral-distance and statsmodels are not needed otherwise and are skipped where they are missing."""
import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from torch_fidelity.metric_kid import kid_features_to_metric
from torchaudio.functional import create_dct, melscale_fbanks
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_mmd

import egmi.evaluation.metrics as metrics
from egmi.evaluation.metrics import (
    DECIBELS, KL_EPSILON, cosine_similarity, frechet_distance, inception_score, kernel_distance,
    kl_divergence, kl_of_pairs, mel_cepstra, mel_cepstral_distortion, warped_mean)
from egmi.evaluation.statistics import adjust_p_values, paired_bootstrap, permutation_test

with contextlib.redirect_stdout(io.StringIO()):
    from dtw import dtw

RATE = 16_000


def close(ours, theirs, relative=1e-6):
    np.testing.assert_allclose(ours, theirs, rtol=relative, atol=0)


def like_a_network(rng, n, d=96, shift=0.):
    "Features as networks make them: not negative, correlated, of falling variances, a few that never fire."
    mix = rng.normal(size=(24, d)) * np.geomspace(3, .1, 24)[:, None]
    x_ND = np.maximum(rng.normal(size=(n, 24)) @ mix + .1 * rng.normal(size=(n, d)) + shift, 0)
    x_ND[:, :5] = 0
    return x_ND


def sound(rng, seconds):
    "A voice of a kind: overtones of a gliding tone, an envelope, some breath."
    t = np.arange(round(seconds * RATE)) / RATE
    glide = np.sin(2 * np.pi * t / rng.uniform(.5, 1.5) + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(120 + 60 * glide) / RATE
    voice = sum(np.sin(k * phase) / k**rng.uniform(.7, 1.3) for k in range(1, 20))
    envelope = 1.1 + np.sin(2 * np.pi * t * rng.uniform(1, 4))
    return voice * envelope + .05 * rng.normal(size=len(t))


# Sets

def test_frechet_distance_of_biased_covariances_is_another():
    "With ddof 0, as some scripts have it, the traces shrink by (N - 1) / N and the means stay."
    rng = np.random.default_rng(1)
    x = like_a_network(rng, 200)
    y = like_a_network(rng, 200, shift=.3)
    shift = np.sum((x.mean(0) - y.mean(0))**2)
    tx = torch.tensor(x)
    ty = torch.tensor(y)
    covariances = tx.T.cov(correction=0), ty.T.cov(correction=0)
    biased = _compute_fid(tx.mean(0), covariances[0], ty.mean(0), covariances[1]).item()
    close(biased - shift, (frechet_distance(x, y) - shift) * 199 / 200)


def test_kernel_distance_against_kid():
    """KID is the same estimator with a cubic kernel, and another number.

    Given our Gaussian kernel, both libraries say what we say, but for the factor 100."""
    rng = np.random.default_rng(3)
    x = like_a_network(rng, 150)
    y = like_a_network(rng, 150, shift=.2)
    tx = torch.tensor(x)
    ty = torch.tensor(y)
    bandwidth = np.median(pdist(x))

    def fidelity(**kernel):
        options = dict(kid_subsets=1, kid_subset_size=150, rng_seed=0, verbose=False)
        return kid_features_to_metric(tx, ty, **options, **kernel)['kernel_inception_distance_mean']

    def similarity(a, b):
        return torch.exp(-torch.cdist(a, b)**2 / (2 * bandwidth**2))

    gaussian = fidelity(kid_kernel='rbf', kid_kernel_rbf_sigma=bandwidth)
    close(kernel_distance(x, y), 100 * gaussian)
    discrepancy = maximum_mean_discrepancy(similarity(tx, tx), similarity(tx, ty), similarity(ty, ty))
    close(kernel_distance(x, y), 100 * discrepancy.item())
    cubic = fidelity(kid_kernel='poly')
    close(cubic, poly_mmd(tx, ty).item())
    assert abs(gaussian / cubic - 1) > .1


def test_kl_divergence_of_audioldm_eval():
    """Written out from its source: epsilon joins the generated probabilities alone, after the softmax.

    Nothing is renormalised; classes are summed, pairs averaged."""
    rng = np.random.default_rng(4)
    for sure in (.5, 4., 40.):
        ref, gen = sure * rng.normal(size=(2, 60, 527))
        p, q = (np.exp(s - s.max(1, keepdims=True)) for s in (ref, gen))
        p = p / p.sum(1, keepdims=True)
        q = q / q.sum(1, keepdims=True)
        terms = np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / (q + 1e-6)), 0)
        expected = terms.sum(1)
        close(kl_of_pairs(ref, gen, KL_EPSILON), expected, 1e-9)
        close(kl_divergence(ref, gen, KL_EPSILON), expected.mean(), 1e-9)
        assert kl_divergence(ref, gen, KL_EPSILON) < min(kl_divergence(ref, gen), -np.log(1e-6))


# Mel cepstral distortion

def test_warping_of_ties_is_the_shortest_way():
    "Of equally cheap ways dtw-python's may be longer than ours; its total cost is the same."
    cost = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 3.]])
    close(warped_mean(cost), 3 / 3)
    rng = np.random.default_rng(7)
    for _ in range(20):
        cost = rng.integers(3, size=(12, 9)).astype(float)
        path = dtw(cost, step_pattern='symmetric1')
        steps = path.distance / warped_mean(cost) if path.distance else 0
        assert steps <= len(path.index1) + 1e-6 and abs(steps - round(steps)) < 1e-6


def test_cepstra_equal_torchaudio():
    """The same steps by torchaudio: spectrogram, mel bands, orthonormal cosines.

    Its filters are float32, hence the tolerance of the whole; ours are float64."""
    wave = sound(np.random.default_rng(8), 1.)
    frames = (len(wave) - 512) // 128 + 1
    window = torch.hann_window(512, dtype=torch.float64)
    spectrum_FT = torch.stft(torch.tensor(wave), 512, 128, window=window, center=False, return_complex=True)
    power_TF = spectrum_FT.abs().T**2
    theirs_FK = melscale_fbanks(257, 0., 8000., 40, RATE, norm=None, mel_scale='htk').double()
    ours_FK = torch.tensor(metrics.triangular_filters(40, 512, RATE))
    for tolerance, filters_FK in ((1e-4, theirs_FK), (1e-6, ours_FK)):
        power_TK = power_TF @ filters_FK
        log_TK = .5 * power_TK.clamp(min=power_TK.max() * 1e-8).log()
        theirs = (log_TK @ create_dct(40, 40, 'ortho').double() * (2 / 40)**.5).numpy()
        ours = mel_cepstra(wave, RATE, first=0, n_cepstra=40, highpass=0.)
        assert ours.shape == (frames, 40)
        assert abs(ours - theirs).max() < tolerance * abs(theirs).max()


def test_cepstra_are_those_of_a_sound_without_infrasound():
    """The gain 1 / (1 + (20 Hz / f)^4) on the whole spectrum gives the same cepstra, away from the ends.

    (The filter is digital, so its frequencies are bent: tan(pi f / rate) stands for f.)"""
    rng = np.random.default_rng(11)
    seconds = np.arange(4 * RATE) / RATE
    low = .3 + .5 * np.sin(2 * np.pi * 3 * seconds) + .2 * np.sin(2 * np.pi * 15 * seconds)
    wave = sound(rng, 4.) + low
    frequencies_F = np.fft.rfftfreq(2 * len(wave), 1 / RATE)[1:]
    ratio_F = np.tan(np.pi * 20 / RATE) / np.tan(np.pi * frequencies_F / RATE)
    gain_F = np.append(0, 1 / (1 + ratio_F**4))
    left = np.fft.irfft(np.fft.rfft(wave, 2 * len(wave)) * gain_F)[:len(wave)]
    middle = slice(200, 300)
    ours = mel_cepstra(wave, RATE)[middle]
    theirs = mel_cepstra(left, RATE, highpass=0.)[middle]
    assert abs(ours - theirs).max() < 1e-6 * abs(theirs).max()
    assert abs(ours - mel_cepstra(wave, RATE, highpass=0.)[middle]).max() > .05 * abs(theirs).max()


def test_unscaled_distortion_equals_mel_cepstral_distance(monkeypatch):
    """Kubichek's form: no decibels (scale=1), log10 of power, cosines not divided by the number of bands.

    So its cepstra are ours times K / ln 10. Its own filters start at whole FFT bins and its window is
    symmetric: both are given to both here."""
    theirs = pytest.importorskip('mel_cepstral_distance.computation')
    alignment = pytest.importorskip('mel_cepstral_distance.alignment')
    rng = np.random.default_rng(9)
    n_mels = 20
    n_cepstra = 15
    filters_KF = theirs.get_w_n_m(RATE, 512, n_mels, 0, 8000)
    monkeypatch.setattr(metrics, 'triangular_filters', lambda *_: filters_KF.T)
    waves = [sound(rng, .8), sound(rng, .9)]
    cepstra = []
    for wave in waves:
        frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::128]
        spectrum = np.fft.rfft(frames * np.hanning(513)[:-1])
        cepstra.append(theirs.get_MC_X_ik(theirs.get_X_kn(spectrum, filters_KF), n_mels))
    a, b, _ = alignment.align_MC_s_D(*cepstra, 0, n_cepstra, 'dtw', None)
    expected = theirs.get_average_MCD(theirs.get_MCD_k(a, b, 0, n_cepstra))

    def ours(scale):
        options = dict(n_mels=n_mels, n_cepstra=n_cepstra, dynamic_range=np.inf, highpass=0.)
        return mel_cepstral_distortion(*waves, RATE, **options, scale=scale)

    close(ours(1.) * n_mels / np.log(10), expected)
    close(ours(n_mels / np.log(10)), expected)
    close(ours(DECIBELS), 10 * 2**.5 / n_mels * expected)


# Statistics

def test_holm_equals_statsmodels():
    multipletests = pytest.importorskip('statsmodels.stats.multitest').multipletests
    rng = np.random.default_rng(10)
    for n in (1, 2, 17):
        p = rng.uniform(size=n)**3
        close(adjust_p_values(p), multipletests(p, method='holm')[1])


# Properties

def features(seed, n, d=6):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.geomspace(.01, 10, d)


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(4, 30)
quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(seeds, sizes, sizes)
def test_sets(seed, n, m):
    "Nothing to itself, symmetric, blind to order, and moved by what moves both only in rounding."
    x = features(seed, n)
    y = features(seed + 1, m) + 1
    rng = np.random.default_rng(seed)
    scale = np.sum(x.var(0)) + np.sum(y.var(0))
    assert abs(frechet_distance(x, rng.permutation(x))) < 1e-9 * scale
    close(frechet_distance(x, y), frechet_distance(y, x), 1e-9)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for metric in (frechet_distance, kernel_distance):
        expected = metric(x, y)
        shuffled = metric(rng.permutation(x), rng.permutation(y))
        np.testing.assert_allclose(shuffled, expected, rtol=1e-9, atol=1e-9)
        moved = metric(x @ rotation + 3, y @ rotation + 3)
        np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-6)
    close(frechet_distance(5 * x, 5 * y), 25 * frechet_distance(x, y), 1e-9)
    np.testing.assert_allclose(kernel_distance(5 * x, 5 * y), kernel_distance(x, y), rtol=1e-9, atol=1e-9)


@quick
@given(seeds, sizes)
def test_kernel_distance_of_a_set_to_itself(seed, n):
    """Unbiased, so below zero for identical sets.

    The pairs i = j are left out within the sets and counted between them. The relation is exact."""
    x = features(seed, n)
    kernel = np.exp(-cdist(x, x)**2 / (2 * np.median(pdist(x))**2))
    off = (kernel.sum() - n) / (n * (n - 1))
    np.testing.assert_allclose(kernel_distance(x, x), 200 * (off - 1) / n, rtol=1e-8, atol=1e-9)


@quick
@given(seeds, sizes)
def test_logits(seed, n):
    "A constant on all logits of a row changes nothing, nor does the order, but for scores in several parts."
    logits, other = 3 * np.random.default_rng(seed).normal(size=(2, n, 7))
    order = np.random.default_rng(seed).permutation(n)
    shift = np.arange(n)[:, None]
    score = inception_score(logits, splits=1)[0]
    assert 1 <= score <= 7
    close(inception_score(logits[order] + shift, splits=1)[0], score, 1e-9)
    assert kl_divergence(logits, logits + shift) < 1e-12 < kl_divergence(logits, other)
    close(kl_divergence(logits[order], other[order]), kl_divergence(logits, other), 1e-9)
    close(cosine_similarity(logits, 3 * logits), np.ones(n), 1e-12)
    close(cosine_similarity(logits, other), cosine_similarity(2 * other, logits), 1e-9)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seeds, st.floats(1e-4, 1e4), st.sampled_from([-1, 1]))
def test_distortion(seed, gain, sign):
    "Nothing to itself, symmetric, blind to gain and sign without c0; with c0 a gain costs its dB."
    rng = np.random.default_rng(seed)
    a = sound(rng, .3)
    b = sound(rng, .4)
    assert mel_cepstral_distortion(a, a, RATE) == 0
    assert mel_cepstral_distortion(a, sign * gain * a, RATE) < 1e-6
    between = mel_cepstral_distortion(a, b, RATE)
    close(mel_cepstral_distortion(b, sign * gain * a, RATE), between)
    close(mel_cepstral_distortion(a, b, RATE, scale=1.) * DECIBELS, between, 1e-12)
    loudness = mel_cepstral_distortion(a, gain * a, RATE, first=0, n_cepstra=40, align=False)
    np.testing.assert_allclose(loudness, abs(20 * np.log10(gain)), rtol=1e-6, atol=1e-6)


@quick
@given(seeds, st.integers(2, 30), st.integers(1, 4))
def test_comparisons(seed, clips, runs):
    "Swapping the systems turns the sign, and the order of clips is nobody's business."
    a, b = np.random.default_rng(seed).normal(size=(2, runs, clips))
    difference, low, high = paired_bootstrap(a, b, n=200)
    assert low <= high and (difference, low, high) == paired_bootstrap(a, b, n=200)
    swapped = np.negative(paired_bootstrap(b, a, n=200))
    np.testing.assert_allclose(swapped, (difference, high, low), rtol=1e-9, atol=1e-12)
    if clips <= 9:
        p = permutation_test(a, b, n=600)
        assert p == permutation_test(b, a, n=600) == permutation_test(a[:, ::-1], b[:, ::-1], n=600)
    p = np.random.default_rng(seed).uniform(size=clips)
    adjusted = adjust_p_values(p)
    assert (adjusted >= p).all() and (adjusted[::-1] == adjust_p_values(p[::-1])).all()


# Bad input

ONE = np.ones((1, 4))
FLAT = np.ones(4)
HOLED = np.full((5, 4), np.nan)
SAME = np.ones((5, 4))
GOOD = np.random.default_rng(0).normal(size=(9, 4))


@pytest.mark.parametrize('metric', [frechet_distance, kernel_distance])
@pytest.mark.parametrize('bad, why', [
    (ONE, 'has 1 row'),
    (FLAT, 'must be a matrix'),
    (HOLED, 'holds NaN or infinite'),
    (-HOLED * np.inf, 'holds NaN or infinite'),
    (SAME, 'is the same in all 5 rows'),
    (GOOD[:, :3], 'different widths'),
    (GOOD[:0], 'is empty')])
def test_bad_sets_are_named(metric, bad, why):
    for name, pair in (('x_ND', (bad, GOOD)), ('y_MD', (GOOD, bad))):
        with pytest.raises(ValueError, match=why) as error:
            metric(*pair)
        assert name in str(error.value)
