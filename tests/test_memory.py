"""Where memory runs out the batch is halved, which is said, and nothing else changes."""
import os
from unittest import mock

import numpy as np
import pytest
import torch

import egmi.training
from egmi.evaluation.scoring import generate_samples
from egmi.frozen.prefix import run_prefix, run_tail
from egmi.model import load_generators, load_panda, mapper_config
from egmi.small.rehearsal import TINY, places, random_preset, write_weights
from egmi.training import cache_prefixes, make_conditioner, predict_conditions, text_targets

TEXTS = ['a bell', 'three big green whistles indoors', 'a drum in the rain', 'two birds', 'by a busy road there is a frog']


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "The tiny random models, in full precision."
    folder = tmp_path_factory.mktemp('random')/'all'
    write_weights(TINY, folder)
    preset = random_preset(TINY)
    with mock.patch.dict(os.environ, places(folder)): return preset, load_panda(preset), *load_generators(preset)


def holding(most, function, asked, position=0):
    "The function on a device that has memory for `most` rows of the argument at `position`."
    def limited(*args, **kwargs):
        n_rows = len(args[position])
        asked.append(n_rows)
        if n_rows > most:
            raise torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.00 MiB.')
        return function(*args, **kwargs)
    return limited


def same(found, wanted): torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_prefixes(parts, monkeypatch):
    panda = parts[1]
    asked = []
    wanted = cache_prefixes(panda, TEXTS, progress=False)
    monkeypatch.setattr(egmi.training, 'run_prefix', holding(2, run_prefix, asked, position=1))
    with pytest.warns(UserWarning, match='^prefixes: out of memory with 5 at once, going on with 2$'):
        found = cache_prefixes(panda, TEXTS, progress=False)
    assert asked == [5, 2, 2, 1]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.mask, b.mask)
        same(a.keys, b.keys)
        same(a.values, b.values)


def test_conditions(parts, monkeypatch):
    preset, panda, *generators = parts
    asked = []
    conditioner = make_conditioner('EGMI mapper', panda, mapper_config(preset, panda, *generators))
    prefixes = cache_prefixes(panda, TEXTS, progress=False)
    wanted = predict_conditions(conditioner, panda, prefixes)
    monkeypatch.setattr(egmi.training, 'run_tail', holding(3, run_tail, asked, position=1))
    with pytest.warns(UserWarning, match='going on with 2$'):
        found = predict_conditions(conditioner, panda, prefixes)
    assert asked == [5, 2, 2, 1]
    same(found.image, wanted.image)
    same(found.audio, wanted.audio)


def test_targets(parts, monkeypatch):
    *_, stable_diffusion, audioldm = parts
    wanted, asked = text_targets(stable_diffusion, audioldm, TEXTS), []
    monkeypatch.setattr(stable_diffusion, '_embed', holding(1, stable_diffusion._embed, asked))
    with pytest.warns(UserWarning) as said: found = text_targets(stable_diffusion, audioldm, TEXTS)
    assert [str(w.message) for w in said] == [f'targets: out of memory with {n} at once, going on with {n // 2}' for n in (5, 2)]
    assert asked == [5, 2, 1, 1, 1, 1, 1]
    same(found.image, wanted.image)
    assert torch.equal(found.audio, wanted.audio)


@pytest.mark.parametrize('part, most', [('_predict', 4), ('decode', 2)])
def test_samples(part, most, parts, monkeypatch, tmp_path):
    preset, _, stable_diffusion, audioldm = parts
    conditions, options = text_targets(stable_diffusion, audioldm, TEXTS), dict(steps=2, progress=False)
    wanted = generate_samples(conditions, stable_diffusion, audioldm, preset, tmp_path/'wanted.npz', **options)
    for generator in (stable_diffusion, audioldm): monkeypatch.setattr(generator, part, holding(most, getattr(generator, part), []))
    with pytest.warns(UserWarning) as said: found = generate_samples(conditions, stable_diffusion, audioldm, preset, tmp_path/'found.npz', **options)
    assert [str(w.message) for w in said] == [f'{made} 0-5: out of memory with 5 at once, going on with 2' for made in ('pictures', 'sounds')]
    assert np.abs(found.images.astype(int) - wanted.images).max() <= 1
    np.testing.assert_allclose(found.audio, wanted.audio, atol=1e-4)


def test_one_row_that_does_not_fit_is_an_error(parts, monkeypatch, tmp_path):
    preset, _, stable_diffusion, audioldm = parts
    conditions = text_targets(stable_diffusion, audioldm, TEXTS[:2])
    monkeypatch.setattr(audioldm, '_predict', holding(1, audioldm._predict, []))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match='GPU 0 has a total capacity'):
        generate_samples(conditions, stable_diffusion, audioldm, preset, tmp_path/'samples.npz', steps=2, progress=False)
    assert not list(tmp_path.iterdir())
