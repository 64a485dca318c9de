"""The committed weights: what the manifest says, small, in half precision, and readable without egmi."""
import hashlib
import json
import math
import subprocess
import sys

import pytest

from egmi.base.config import WEIGHTS
from test_packaging import committed_files

MB = 10**6
COMPONENTS = {'clip', 'clap', 'imagebind', 'projection', 'judge', 'stable-diffusion', 'audioldm', 'egmi'}
MANIFEST = json.loads((WEIGHTS/'manifest.json').read_text())
FILES = MANIFEST['files']
TENSOR_FILES = [name for name in FILES if name.endswith(('.safetensors', '.pt'))]


def test_manifest_lists_what_git_holds():
    held = {name.removeprefix('egmi/weights/') for name in committed_files() if name.startswith('egmi/weights/')}
    assert held == {*FILES, 'manifest.json'}


def test_no_file_is_unlisted():
    assert {p.relative_to(WEIGHTS).as_posix() for p in WEIGHTS.rglob('*') if p.is_file()} == {*FILES, 'manifest.json'}


def test_every_component_is_there_and_says_how_it_was_made():
    assert {name.split('/')[0] for name in FILES} == COMPONENTS == {name.split('/')[0] for name in TENSOR_FILES}
    assert set(MANIFEST['made']) == COMPONENTS and all(part['command'] for parts in MANIFEST['made'].values() for part in parts.values())


@pytest.mark.parametrize('name', FILES)
def test_file_is_what_the_manifest_says(name):
    data = (WEIGHTS/name).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (FILES[name]['bytes'], FILES[name]['sha256'])
    assert len(data) < 16 * MB


def test_all_together_are_small():
    assert MANIFEST['total_bytes'] == sum(entry['bytes'] for entry in FILES.values()) < 60 * MB


@pytest.mark.parametrize('name', TENSOR_FILES)
def test_tensors_are_half_precision_and_finite(name):
    "But for attention masks, which hold minus infinity."
    import torch
    from safetensors.torch import load_file
    tensors = load_file(WEIGHTS/name) if name.endswith('.safetensors') else torch.load(WEIGHTS/name, weights_only=True)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert [key for key, t in tensors.items() if not t.isfinite().all() and not key.endswith('.mask')] == []
    assert not any(t.isnan().any() for t in tensors.values())


# What a stranger with transformers and diffusers, but without egmi, gets. Prints {output: [shape, smallest, largest, standard deviation]}.
STRANGER = '''
import json, os, sys
sys.modules['egmi'] = None  # importing it is an error
import numpy as np, torch
from diffusers import AudioLDMPipeline, StableDiffusionPipeline
from transformers import (ClapFeatureExtractor, ClapModel, ClapTextModelWithProjection, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer, RobertaTokenizer)

folder, noise, seen = sys.argv[1], np.random.default_rng(0), {}
def see(name, x):
    x = np.asarray(x, dtype=np.float64)
    seen[name] = [list(x.shape), x.min(), x.max(), x.std()]
def load(kind, name, **options): return kind.from_pretrained(os.path.join(folder, name), **options)

captions, float32 = ['The image of a large red bell', 'The sound of a dog'], dict(dtype=torch.float32)
with torch.no_grad():
    ids = load(CLIPTokenizer, 'clip')(captions, padding='max_length', return_tensors='pt')
    pixels = load(CLIPImageProcessor, 'clip')(list(noise.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)), return_tensors='pt')
    out = load(CLIPModel, 'clip', **float32)(input_ids=ids.input_ids, **pixels)
    see('clip picture', out.image_embeds); see('clip text', out.text_embeds)
    see('clip text states', load(CLIPTextModel, 'clip', **float32)(ids.input_ids).last_hidden_state)

    ids = load(RobertaTokenizer, 'clap')(captions, padding=True, return_tensors='pt')
    mels = load(ClapFeatureExtractor, 'clap')(list(noise.normal(0, .1, (3, 40960)).astype(np.float32)), sampling_rate=16000, return_tensors='pt')
    out = load(ClapModel, 'clap', **float32)(**ids, input_features=mels.input_features)
    see('clap sound', out.audio_embeds); see('clap text', out.text_embeds)
    see('clap text alone', load(ClapTextModelWithProjection, 'clap', **float32)(**ids).text_embeds)

few = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
see('stable-diffusion', load(StableDiffusionPipeline, 'stable-diffusion', **float32)(captions, output_type='np', **few).images)
see('audioldm', load(AudioLDMPipeline, 'audioldm', **float32)(captions, audio_length_in_s=2.56, **few).audios)
print(json.dumps(seen))
'''


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    command = [sys.executable, '-c', STRANGER, WEIGHTS]
    process = subprocess.run(command, cwd=tmp_path_factory.mktemp('elsewhere'), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize('name, shape, limit', [
    ('clip picture', [3, 128], 1), ('clip text', [2, 128], 1), ('clip text states', [2, 32, 128], 100),
    ('clap sound', [3, 128], 1), ('clap text', [2, 128], 1), ('clap text alone', [2, 128], 100),
    ('stable-diffusion', [2, 64, 64, 3], 1), ('audioldm', [2, 40960], 2)])
def test_component_works_without_egmi(outputs, name, shape, limit):
    found, smallest, largest, deviation = outputs[name]
    assert found == shape
    assert all(map(math.isfinite, (smallest, largest, deviation))) and -limit <= smallest < largest <= limit
    assert deviation > 1e-3
