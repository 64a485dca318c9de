"""What is loaded is whole, what does not fit is refused, and merging Vicuna takes little memory."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from egmi.base.loading import load_whole
from egmi.evaluation.encoders import Clap, TransformersClip
from egmi.frozen.audioldm import AudioLDM
from egmi.frozen.diffusion import StableDiffusion
from egmi.frozen.imagebind import ImageBind
from egmi.frozen.llm import load_llm
from egmi.small.random_weights import (
    TINY, draw, write_audioldm, write_clap, write_clip, write_llm, write_stable_diffusion)

SD = StableDiffusion.from_pretrained

# (writes a folder, loads it, its subfolder, part of the names that get lost, class in the error)
PARTS = [
    (write_stable_diffusion, SD, 'text_encoder', 'final_layer_norm', 'CLIPTextModel'),
    (write_stable_diffusion, SD, 'unet', 'conv_in', 'UNet2DConditionModel'),
    (write_stable_diffusion, SD, 'vae', 'encoder', 'AutoencoderKL'),
    (write_audioldm, AudioLDM.from_pretrained, 'text_encoder', 'text_projection',
     'ClapTextModelWithProjection'),
    (write_audioldm, AudioLDM.from_pretrained, 'unet', 'class_embedding', 'UNet2DConditionModel'),
    (write_audioldm, AudioLDM.from_pretrained, 'vae', 'decoder', 'AutoencoderKL'),
    (write_audioldm, AudioLDM.from_pretrained, 'vocoder', 'mean', 'SpeechT5HifiGan'),
    (write_clip, TransformersClip, '', 'vision_model', 'CLIPModel'),
    (write_clip, TransformersClip, '', 'visual_projection', 'CLIPModel'),
    (write_clap, Clap.from_pretrained, '', 'audio_model', 'ClapModel'),
    (write_clap, Clap.from_pretrained, '', 'running_var', 'ClapModel'),
    (write_llm, load_llm, '', 'layers.1', 'LlamaForCausalLM')]
IDS = [f'{writer.__name__[6:]}-{part}-{lost}' for writer, _, part, lost, _ in PARTS]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Writes a folder of tiny weights once."
    folders = {}

    def write(writer):
        if writer not in folders:
            folders[writer] = tmp_path_factory.mktemp('weights')/'folder'
            writer(TINY, folders[writer])
        return folders[writer]
    return write


def save(state, file):
    "Write a state dict as transformers and diffusers do."
    save_file({name: t.clone() for name, t in state.items()}, file, metadata=dict(format='pt'))


def error_of(load, folder):
    "What loading a broken folder says."
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    return str(error.value)


@pytest.mark.parametrize('writer, load, part, lost, kind', PARTS, ids=IDS)
def test_files_that_lack_weights(written, writer, load, part, lost, kind):
    folder = written(writer)
    place = folder/part
    file, = place.glob('*.safetensors')
    content = file.read_bytes()
    state = load_file(file)
    names = sorted(name for name, t in state.items() if lost in name and t.is_floating_point())
    try:
        save({name: t for name, t in state.items() if lost not in name}, file)
        said = error_of(load, folder)
        assert said.startswith(f'{place} lacks {len(names)} weights of {kind}: {names[0]}')
        save(state | {names[-1]: torch.zeros(3, 3, 3)}, file)
        said = error_of(load, folder)
        assert said.startswith(f'{place} does not fit its config in 1 weights, first {names[-1]}: ')
        file.write_bytes(content[:len(content) // 2])
        said = error_of(load, folder)
        assert str(place) in said and '\n' not in said
    finally:
        file.write_bytes(content)
    load(folder)


def test_damaged_imagebind(tmp_path):
    folder = tmp_path/'imagebind'
    draw(TINY, 'imagebind').save_pretrained(folder)
    official = tmp_path/'imagebind_huge.pth'
    for damaged, source in ((folder/'model.safetensors', folder), (official, official)):
        damaged.write_bytes(b'<html>' * 99)
        with pytest.raises(ValueError, match=f'{damaged} is damaged'):
            ImageBind.from_pretrained(source)


def test_old_vae_is_whole(tmp_path):
    "Before diffusers 0.18 the attention of a VAE had other names."
    torch.manual_seed(0)
    vae = draw(TINY, 'image_vae').float()
    vae.save_config(tmp_path)
    old_names = dict(to_q='query', to_k='key', to_v='value', to_out='proj_attn')
    state = {}
    for name, t in vae.state_dict().items():
        old = name.replace('.to_out.0.', '.to_out.')
        for new, before in old_names.items():
            old = old.replace(f'attentions.0.{new}.', f'attentions.0.{before}.')
        state[old] = t
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state
    torch.save(state, tmp_path/'diffusion_pytorch_model.bin')
    loaded = load_whole(AutoencoderKL, tmp_path).state_dict()
    for name, t in loaded.items():
        assert torch.equal(t, vae.state_dict()[name])


MERGE = """
import re, sys
from pathlib import Path
from transformers import LlamaForCausalLM # the modules that torch loads on first use
from egmi.frozen.vicuna import merge_vicuna

def kilobytes(what):
    status = Path('/proc/self/status').read_text()
    return int(re.search(what + r':\\s*(\\d+) kB', status)[1])

before = kilobytes('VmRSS')
merge_vicuna(*sys.argv[1:], shard_size=10_000_000)
print(1024 * (kilobytes('VmHWM') - before))
"""


def write_constant(folder, rows, gain):
    "A Llama of 70 million parameters in one file, all of them .1 but for the gains of its norms."
    config = LlamaConfig(
        vocab_size=rows, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8)
    with torch.device('meta'):
        names = LlamaForCausalLM(config).state_dict()
    folder.mkdir()
    config.save_pretrained(folder)
    state = {}
    for name, t in names.items():
        state[name] = torch.full(t.shape, gain if 'norm' in name else .1, dtype=torch.float16)
    torch.save(state, folder/'pytorch_model.bin')
    (folder/'tokenizer.model').write_bytes(b'')


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak of memory is read from /proc')
def test_merging_takes_the_memory_of_a_few_tensors(tmp_path):
    "Both models are 140 MB in one file each; the merge needs three shards of 10 MB and a tensor or two."
    write_constant(tmp_path/'llama', 2000, gain=1)
    write_constant(tmp_path/'delta', 2001, gain=0)
    size = (tmp_path/'llama/pytorch_model.bin').stat().st_size
    folders = [tmp_path/name for name in ('llama', 'delta', 'vicuna')]
    command = [sys.executable, '-c', MERGE, *folders]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    taken = int(process.stdout)
    print(f'{taken / 1e6:.0f} MB for two models of {size / 1e6:.0f} MB')
    assert size > 135e6 and taken < .6 * size
    assert len(list((tmp_path/'vicuna').glob('*.safetensors'))) > 10
