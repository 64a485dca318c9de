"""The converted CLAP equals `laion_clap`: HTSAT-tiny at full size, RoBERTa with two layers."""
import os
import subprocess
import sys

import pytest

# Runs in a process of its own, without the hub and with a command line that laion_clap would refuse.
# On import, 1.1.7 fetches three tokenizers from the hub, and 1.1.5 reads sys.argv.
# The constructor fetches RoBERTa.
SCRIPT = """
import sys
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import BartTokenizer, BertTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

from egmi.base.config import component_path
from egmi.evaluation.encoders import Clap

ROBERTA = dict(vocab_size=529, num_hidden_layers=2, max_position_embeddings=130)


def config_with(eps):
    return transformers.ClapConfig(text_config=ROBERTA | dict(layer_norm_eps=eps))


def without_weights(name):
    return RobertaModel(RobertaConfig.from_dict(config_with(1e-5).text_config.to_dict()))


with ExitStack() as stack:
    stack.enter_context(mock.patch.object(sys, 'argv', sys.argv[:1]))
    stack.enter_context(mock.patch.object(RobertaModel, 'from_pretrained', without_weights))
    for tokenizer in (BartTokenizer, BertTokenizer, RobertaTokenizer):
        stack.enter_context(mock.patch.object(tokenizer, 'from_pretrained', lambda name: None))
    from laion_clap import CLAP_Module
    torch.manual_seed(0)
    module = CLAP_Module(device='cpu')

theirs = module.model.eval()
for name, p in theirs.named_parameters():
    if p.ndim == 1 and p.is_floating_point():
        p.data += .1 * torch.randn_like(p)  # biases and norms start at 0 and 1, where a swap is not seen
theirs.audio_branch.bn0.running_mean.uniform_(-40, -20)
theirs.audio_branch.bn0.running_var.uniform_(100, 300)
state = {f'module.{name}': t for name, t in theirs.state_dict().items()}
state['module.text_branch.embeddings.position_ids'] = torch.arange(130)[None]  # as old transformers wrote
torch.save(dict(epoch=np.int64(1), state_dict=state), sys.argv[1])

texts = ['a drum', 'in a heavy shower there are two big white clocks', 'frogs']
rng = np.random.default_rng(0)


def noise(n):
    return (.2 * rng.normal(size=n) * np.sin(np.arange(n) / 9000)).astype(np.float32)


waves = [noise(480_000), noise(130_000), noise(48_000)]
longer = [np.concatenate(waves[:2])]


def load(eps):
    return Clap.from_official(sys.argv[1], tokenizer=component_path('clap'), config=config_with(eps))


def report(what, option, found, expected):
    print(what, option, float(abs(found - expected).max()))


ours = load(1e-5)
padded = dict(ours.tokenizer(texts, padding='max_length', return_tensors='pt'))  # as laion_clap pads them
tokens = dict(ours.tokenizer(texts, padding=True, return_tensors='pt'))
with torch.no_grad():
    text = theirs.get_text_embedding(tokens).numpy()
    report('text', 'padded', theirs.get_text_embedding(padded).numpy(), text)
    audio = module.get_audio_embedding_from_data(waves)
    first = module.get_audio_embedding_from_data([longer[0][:480_000]])
report('text', 1e-5, ours.embed_texts(texts), text)
report('text', 1e-12, load(1e-12).embed_texts(texts), text)
report('audio', 50, ours.embed_sounds(waves, 48_000), audio)
report('longer', 50, ours.embed_sounds(longer, 48_000), first)
ours.mels = transformers.ClapFeatureExtractor(truncation='rand_trunc', padding='repeatpad')
report('audio', 0, ours.embed_sounds(waves, 48_000), audio)
"""


@pytest.mark.slow
def test_converted_clap_equals_laion_clap(tmp_path):
    offline = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    command = [sys.executable, '-c', SCRIPT, tmp_path/'clap.pt']
    process = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith(('text', 'audio', 'longer')):
            what, option, difference = line.split()
            found[what, option] = float(difference)
    assert found['text', 'padded'] <= 1e-6
    assert all(found[key] <= 1e-4 for key in [('text', '1e-05'), ('audio', '50'), ('longer', '50')])
    # the wrong options are seen
    assert found['text', '1e-12'] > found['text', '1e-05'] and found['audio', '0'] > 1e-3
