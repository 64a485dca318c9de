"""Where memory runs out the batch is halved, which is said, and nothing else changes."""
import os
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import egmi.training
from egmi.evaluation.samples import generate_samples
from egmi.base.memory import MemoryBudget
from egmi.frozen.diffusion import generators_for
from egmi.frozen.prefix import run_prefix, run_tail
from egmi.mapper import Conditions
from egmi.model import load_generators, load_panda, mapper_config
from egmi.small.random_weights import TINY, random_preset, weight_variables, write_weights
from egmi.training import Prompts, keep_prefixes, make_conditioner, predict_conditions

TEXTS = ['a bell', 'three big green whistles indoors', 'a drum in the rain', 'two birds',
         'by a busy road there is a frog']


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "The tiny random models, in full precision."
    folder = tmp_path_factory.mktemp('random')/'all'
    write_weights(TINY, folder)
    preset = replace(random_preset(TINY), llm_dtype='float32')
    with mock.patch.dict(os.environ, weight_variables(folder)):
        panda = load_panda(preset)
        stable_diffusion, audioldm = load_generators(preset)
    audioldm.seconds = .64
    return preset, panda, stable_diffusion, audioldm


def holding(most, function, asked, position=0):
    "The function on a device that has memory for `most` rows of the argument at `position`."
    def limited(*args, **kwargs):
        n_rows = len(args[position])
        asked.append(n_rows)
        if n_rows > most:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB. '
                                         'GPU 0 has a total capacity of 7.00 MiB.')
        return function(*args, **kwargs)

    return limited


def same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def keep(panda):
    return keep_prefixes(panda, Prompts(TEXTS), MemoryBudget(gibibytes=1), progress=False)


def test_prefixes(parts, monkeypatch):
    panda = parts[1]
    asked = []
    wanted = keep(panda)
    monkeypatch.setattr(egmi.training, 'run_prefix', holding(2, run_prefix, asked, position=1))
    with pytest.warns(UserWarning, match='^prefixes: out of memory with 5 at once, going on with 2$'):
        found = keep(panda)
    assert asked == [5, 2, 2, 1]
    for i in range(5):
        assert torch.equal(found[[i]].mask, wanted[[i]].mask)
        same(found[[i]].keys, wanted[[i]].keys)
        same(found[[i]].values, wanted[[i]].values)


def test_conditions(parts, monkeypatch):
    preset, panda, *generators = parts
    asked = []
    conditioner = make_conditioner('EGMI mapper', panda, mapper_config(preset, panda, *generators))
    prefixes = keep(panda)
    wanted = predict_conditions(conditioner, panda, prefixes)
    monkeypatch.setattr(egmi.training, 'run_tail', holding(3, run_tail, asked, position=1))
    with pytest.warns(UserWarning, match='going on with 2$'):
        found = predict_conditions(conditioner, panda, prefixes)
    assert asked == [5, 2, 2, 1]
    same(found.image, wanted.image)
    same(found.audio, wanted.audio)


def running_out(generator, function, most, monkeypatch):
    "The sizes that are asked of a function of a generator, which has memory for `most` rows."
    asked = []
    monkeypatch.setattr(generator, 'fitted', {})
    monkeypatch.setattr(generator, function, holding(most, getattr(generator, function), asked))
    return asked


@pytest.mark.parametrize('which', [2, 3], ids=['image', 'audio'])
def test_targets(which, parts, monkeypatch):
    generator = parts[which]
    wanted = generator.encode_captions(TEXTS)
    asked = running_out(generator, '_embed', 1, monkeypatch)
    with pytest.warns(UserWarning) as said:
        found = generator.encode_captions(TEXTS)
    assert [str(w.message) for w in said] == [
        f'captions: out of memory with {n} at once, going on with {n // 2}' for n in (5, 2)]
    assert asked == [5, 2, 1, 1, 1, 1, 1]
    same(found, wanted)


def generate(generator):
    "What a generator makes of the five captions, as an array."
    condition = generator.encode_captions(TEXTS)
    made = generator.generate(condition, generator=generators_for(range(5)), steps=2, progress=False)
    return np.stack(made).astype(float)


@pytest.mark.parametrize('function, most', [('_predict', 4), ('_decode', 2)])
@pytest.mark.parametrize('which, tolerance', [(2, 1), (3, 1e-3)], ids=['image', 'audio'])
def test_samples(which, tolerance, function, most, parts, monkeypatch):
    "Memory runs out once in the life of a generator, and nothing is denoised again for what is decoded."
    generator = parts[which]
    calls = running_out(generator, '_predict', 99, monkeypatch)
    wanted = generate(generator)
    n_calls = len(calls)
    asked = running_out(generator, function, most, monkeypatch)
    with pytest.warns(UserWarning) as said:
        found = [generate(generator) for _ in range(2)]
    name = type(generator).__name__
    work = {'_predict': name, '_decode': f'{name}, decoding'}[function]
    assert [str(w.message) for w in said] == [f'{work}: out of memory with 5 at once, going on with 2']
    assert [n for n in asked if n > most] == asked[:1]
    if function == '_decode':
        assert asked == [5, 2, 2, 1, 2, 2, 1]
        assert len(calls) == 3 * n_calls
    for made in found:
        np.testing.assert_allclose(made, wanted, rtol=0, atol=tolerance)


def test_parts_begin_with_what_fitted(parts, monkeypatch, tmp_path):
    _, _, *generators = parts
    conditions = Conditions(*[generator.encode_captions(TEXTS) for generator in generators])
    for generator in generators:
        running_out(generator, '_predict', 2, monkeypatch)
    with pytest.warns(UserWarning) as said:
        generate_samples(conditions, *generators, tmp_path/'made', steps=2, part_size=2, progress=False)
    assert [str(w.message) for w in said] == [
        f'{name}: out of memory with 2 at once, going on with 1' for name in ('StableDiffusion', 'AudioLDM')]


@pytest.mark.parametrize('function', ['encode_audio', '_predict', '_decode'])
def test_edits(function, parts, monkeypatch):
    audioldm = parts[3]
    condition = audioldm.encode_captions(TEXTS[:3])
    waves = .1 * np.random.default_rng(0).normal(size=(3, 8000)).astype(np.float32)

    def edit():
        return audioldm.edit(condition, waves, generator=generators_for(range(3)), steps=4, progress=False)

    wanted = edit()
    running_out(audioldm, function, 2, monkeypatch)
    with pytest.warns(UserWarning, match='out of memory with 3 at once, going on with 1$'):
        found = edit()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_one_row_that_does_not_fit_is_an_error(parts, monkeypatch):
    audioldm = parts[3]
    running_out(audioldm, '_predict', 1, monkeypatch)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match='GPU 0 has a total capacity'):
        generate(audioldm)
