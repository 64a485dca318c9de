"""The committed weights: what the manifest says, small, in half precision, and readable without egmi."""
import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch

from egmi.base.config import WEIGHTS
from egmi.base.loading import read_tensors
from test_packaging import committed_files

MB = 10**6
COMPONENTS = {'clip', 'clap', 'imagebind', 'projection', 'judge', 'stable-diffusion', 'audioldm', 'egmi'}
MANIFEST = json.loads((WEIGHTS/'manifest.json').read_text())
FILES = MANIFEST['files']
TENSOR_FILES = [name for name in FILES if name.endswith(('.safetensors', '.pt'))]


def components(names):
    "The folders of some files."
    return {name.split('/')[0] for name in names}


def test_manifest_lists_what_git_holds():
    prefix = 'egmi/weights/'
    held = {name.removeprefix(prefix) for name in committed_files() if name.startswith(prefix)}
    assert held == {*FILES, 'manifest.json'}


def test_no_file_is_unlisted():
    found = {path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob('*') if path.is_file()}
    assert found == {*FILES, 'manifest.json'}


def test_every_component_is_there_and_says_how_it_was_made():
    assert components(FILES) == COMPONENTS
    assert components(TENSOR_FILES) == COMPONENTS
    assert set(MANIFEST['made']) == COMPONENTS
    for parts in MANIFEST['made'].values():
        for part in parts.values():
            assert part['command']


@pytest.mark.parametrize('name', FILES)
def test_file_is_what_the_manifest_says(name):
    data = (WEIGHTS/name).read_bytes()
    assert len(data) == FILES[name]['bytes']
    assert hashlib.sha256(data).hexdigest() == FILES[name]['sha256']
    assert len(data) < 16 * MB


def test_all_together_are_small():
    assert MANIFEST['total_bytes'] == sum(entry['bytes'] for entry in FILES.values()) < 60 * MB


@pytest.mark.parametrize('name', TENSOR_FILES)
def test_tensors_are_half_precision_and_finite(name):
    "But for attention masks, which hold minus infinity."
    tensors = read_tensors(WEIGHTS/name)
    floats = {key: t for key, t in tensors.items() if t.is_floating_point()}
    assert {t.dtype for t in floats.values()} == {torch.float16}
    for key, t in floats.items():
        assert not t.isnan().any()
        assert t.isfinite().all() or key.endswith('.mask')


# What a user with transformers and diffusers, but without egmi, gets.
# Prints {output: [shape, smallest, largest, standard deviation]}.
WITHOUT_EGMI = '''
import json, os, sys
sys.modules['egmi'] = None  # importing it is an error
import numpy as np
import torch
from diffusers import AudioLDMPipeline, StableDiffusionPipeline
from transformers import (
    ClapFeatureExtractor, ClapModel, ClapTextModelWithProjection, CLIPImageProcessor, CLIPModel,
    CLIPTextModel, CLIPTokenizer, RobertaTokenizer)

folder = sys.argv[1]
found = {}

def note(name, x):
    x = np.asarray(x, dtype=np.float64)
    found[name] = [list(x.shape), x.min(), x.max(), x.std()]

def load(kind, name, **options):
    return kind.from_pretrained(os.path.join(folder, name), **options)

captions = ['The image of a large red bell', 'The sound of a dog']
float32 = dict(dtype=torch.float32)
noise = np.random.default_rng(0)
pictures = list(noise.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
sounds = list(noise.normal(0, .1, (3, 40960)).astype(np.float32))
with torch.no_grad():
    ids = load(CLIPTokenizer, 'clip')(captions, padding='max_length', return_tensors='pt')
    pixels = load(CLIPImageProcessor, 'clip')(pictures, return_tensors='pt')
    out = load(CLIPModel, 'clip', **float32)(input_ids=ids.input_ids, **pixels)
    note('clip picture', out.image_embeds)
    note('clip text', out.text_embeds)
    states = load(CLIPTextModel, 'clip', **float32)(ids.input_ids).last_hidden_state
    note('clip text states', states)

    ids = load(RobertaTokenizer, 'clap')(captions, padding=True, return_tensors='pt')
    extract = load(ClapFeatureExtractor, 'clap')
    mels = extract(sounds, sampling_rate=16000, return_tensors='pt')
    out = load(ClapModel, 'clap', **float32)(**ids, input_features=mels.input_features)
    note('clap sound', out.audio_embeds)
    note('clap text', out.text_embeds)
    text_model = load(ClapTextModelWithProjection, 'clap', **float32)
    note('clap text alone', text_model(**ids).text_embeds)

few = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
draw = load(StableDiffusionPipeline, 'stable-diffusion', **float32)
note('stable-diffusion', draw(captions, output_type='np', **few).images)
play = load(AudioLDMPipeline, 'audioldm', **float32)
note('audioldm', play(captions, audio_length_in_s=2.56, **few).audios)
print(json.dumps(found))
'''


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    command = [sys.executable, '-c', WITHOUT_EGMI, WEIGHTS]
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    process = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


OUTPUTS = [ # name, shape, largest magnitude
    ('clip picture', [3, 128], 1),
    ('clip text', [2, 128], 1),
    ('clip text states', [2, 32, 128], 100),
    ('clap sound', [3, 128], 1),
    ('clap text', [2, 128], 1),
    ('clap text alone', [2, 128], 100),
    ('stable-diffusion', [2, 64, 64, 3], 1),
    ('audioldm', [2, 40960], 2)]


@pytest.mark.slow
@pytest.mark.parametrize('name, shape, limit', OUTPUTS)
def test_component_works_without_egmi(outputs, name, shape, limit):
    found, smallest, largest, deviation = outputs[name]
    assert found == shape
    assert all(map(math.isfinite, (smallest, largest, deviation)))
    assert -limit <= smallest < largest <= limit
    assert deviation > 1e-3
