"""The converted CLAP equals `laion_clap`, where that is installed: HTSAT-tiny at full size, RoBERTa with two layers."""
import importlib.util
import os
import subprocess
import sys

import pytest

# Runs in a process of its own: laion_clap reads sys.argv on import, and fetches tokenizers and RoBERTa from the hub.
SCRIPT = """
import sys
import numpy as np
import torch
import transformers

roberta = dict(vocab_size=100, num_hidden_layers=2, max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5)
transformers.RobertaModel.from_pretrained = lambda name: transformers.RobertaModel(transformers.RobertaConfig(**roberta))
for name in ('BertTokenizer', 'RobertaTokenizer', 'BartTokenizer'): getattr(transformers, name).from_pretrained = lambda name: None
from laion_clap.clap_module.model import CLAP
from laion_clap.hook import CLAP_Module

from egmi.encoders import Clap

torch.manual_seed(0)
audio = dict(audio_length=1024, clip_samples=480_000, mel_bins=64, sample_rate=48_000, window_size=1024, hop_size=480, fmin=50, fmax=14_000,
             class_num=527, model_type='HTSAT', model_name='tiny')
text = dict(context_length=77, vocab_size=100, width=512, heads=8, layers=2, model_type='roberta')
theirs = CLAP(768, audio, text).eval()
for name, p in theirs.named_parameters():
    if p.ndim == 1 and p.is_floating_point(): p.data += .1 * torch.randn_like(p)  # biases and norms start at 0 and 1, where a swap is not seen
theirs.audio_branch.bn0.running_mean.uniform_(-40, -20)
theirs.audio_branch.bn0.running_var.uniform_(100, 300)
torch.save(dict(epoch=np.int64(1), state_dict={f'module.{k}': v for k, v in theirs.state_dict().items()}), sys.argv[1])

transformers.AutoTokenizer.from_pretrained = lambda *args, **options: None
difference = lambda a, b: float(abs(a - b).max())
for eps in (1e-5, 1e-12):
    config = transformers.ClapConfig(text_config=roberta | dict(layer_norm_eps=eps))
    ours = Clap.from_official(sys.argv[1], config=config)
    tokens = dict(input_ids=torch.randint(4, 100, (3, 12)), attention_mask=torch.ones(3, 12, dtype=torch.long))
    tokens['input_ids'][1, 8:], tokens['attention_mask'][1, 8:] = 1, 0
    with torch.no_grad():
        print('text', eps, difference(ours.model.get_text_features(**tokens).pooler_output, theirs.get_text_embedding(tokens)))

rng = np.random.default_rng(0)
waves = [(.2 * rng.normal(size=n) * np.sin(np.arange(n) / 9000)).astype(np.float32) for n in (480_000, 130_000, 48_000)]
module = CLAP_Module.__new__(CLAP_Module)
torch.nn.Module.__init__(module)
module.model, module.model_cfg, module.enable_fusion = theirs, dict(audio_cfg=audio), False
expected = module.get_audio_embedding_from_data(waves)
print('audio', 50, difference(ours.embed_sounds(waves, 48_000), expected))
ours.mels = transformers.ClapFeatureExtractor(truncation='rand_trunc', padding='repeatpad')
print('audio', 0, difference(ours.embed_sounds(waves, 48_000), expected))
"""


@pytest.mark.skipif(not importlib.util.find_spec('laion_clap'), reason='laion_clap is not installed')
def test_converted_clap_equals_laion_clap(tmp_path):
    process = subprocess.run([sys.executable, '-c', SCRIPT, tmp_path/'clap.pt'], env=os.environ | dict(HF_HUB_OFFLINE='1'),
                             capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in process.stdout.splitlines() if line.startswith(('text', 'audio'))}
    assert found['text', '1e-05'] <= 1e-4 and found['audio', '50'] <= 1e-4
    assert found['text', '1e-12'] > found['text', '1e-05'] and found['audio', '0'] > 1e-3  # the wrong options are seen
