"""What EGMI returns can be gone through, saved and made again; it loads quietly, and parts may wait."""
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from egmi import EGMI, EGMIOutput, PandaGPT
from egmi.frozen.diffusion import LatentDiffusion, generators_for

CAPTIONS = ['a bell', 'two birds by the sea']


@pytest.fixture(scope='module')
def egmi():
    return EGMI.from_pretrained('mini', device='cpu')


@pytest.fixture(scope='module')
def out(egmi):
    generator = torch.Generator().manual_seed(0)
    return egmi.generate(CAPTIONS, outputs=['text', 'image', 'audio'], generator=generator, steps=2,
                         max_new_tokens=4, progress=False)


@pytest.mark.slow
def test_a_sample_is_made_again_from_its_prompt_and_seed(egmi, out):
    for sample, caption in zip(out, CAPTIONS, strict=True):
        assert sample.prompt == caption
        noise = dict(generator=generators_for([sample.seed]), steps=2, progress=False)
        image, = egmi.stable_diffusion.generate(egmi.conditions(sample.prompt).image, **noise)
        difference = np.asarray(image, float) - np.asarray(sample.image, float)
        assert abs(difference).mean() < 2  # of 255; an LLM in bfloat16 rounds otherwise in another batch


@pytest.mark.slow
def test_what_is_saved_is_what_was_made(out, tmp_path):
    out.save(tmp_path)
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob('*.json'))]
    assert [record['prompt'] for record in records] == CAPTIONS
    for sample, record in zip(out, records, strict=True):
        png, wav, txt = [tmp_path/name for name in record['files']]
        wave_T, rate = soundfile.read(wav, dtype='float32')
        assert record['seed'] == sample.seed and rate == sample.sample_rate == 16_000
        assert np.array_equal(wave_T, sample.audio)
        assert np.array_equal(np.asarray(Image.open(png)), np.asarray(sample.image))
        assert txt.read_text() == sample.text + '\n'
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match='is there already, nothing was saved'):
        out.save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_an_edit_says_what_it_was_made_from(egmi, out):
    changed = egmi.edit(None, list(out.audio), out.sample_rate, strength=.5, steps=2, progress=False)
    assert isinstance(changed, EGMIOutput) and changed.prompts == ['', '']
    assert len(set(changed.seeds)) == 2 and changed[0].image is None


@pytest.mark.slow
def test_parts_go_to_rest_before_the_next_is_loaded():
    order = []

    def noting(cls, method):
        original = getattr(cls, method)

        def note(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            order.append((type(self).__name__, method))
            return result
        return mock.patch.object(cls, method, note)

    with noting(LatentDiffusion, '__init__'), noting(LatentDiffusion, 'rest'), noting(PandaGPT, 'rest'):
        EGMI.from_pretrained('mini', device='cpu', offload=True)
    assert order == [
        ('PandaGPT', 'rest'), ('StableDiffusion', '__init__'), ('StableDiffusion', 'rest'),
        ('AudioLDM', '__init__'), ('AudioLDM', 'rest')]


@pytest.mark.slow
def test_loading_says_nothing():
    variables = {name: value for name, value in os.environ.items() if name != 'TQDM_DISABLE'}
    code = 'from egmi import EGMI; print(EGMI.from_pretrained("mini", device="cpu"))'
    process = subprocess.run([sys.executable, '-c', code], env=variables, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ''
    assert process.stdout.startswith('EGMI, preset mini, on cpu\nLLM')
    assert len(process.stdout.splitlines()) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.slow
def test_parts_wait_in_host_memory(egmi, out):
    lean = EGMI.from_pretrained('mini', device='cuda', offload=True)
    generator = torch.Generator().manual_seed(0)
    again = lean.generate(CAPTIONS, generator=generator, steps=2, progress=False)
    waiting = [lean.panda.encoder, lean.stable_diffusion.unet, lean.stable_diffusion.vae,
               lean.audioldm.unet, *lean.audioldm.decoders]
    assert {p.device.type for network in waiting for p in network.parameters()} == {'cpu'}
    assert lean.device.type == lean.stable_diffusion.device.type == 'cuda'
    assert again.seeds == out.seeds
    lean.to('cuda')
    assert {p.device.type for network in waiting for p in network.parameters()} == {'cuda'}
