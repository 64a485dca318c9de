"""The converted CLAP equals `laion_clap`, and so does `LaionClap`: HTSAT-tiny at full size, RoBERTa with two layers."""
import os
import subprocess
import sys

# Runs in a process of its own, with a command line that laion_clap would refuse and no hub: it must be shielded from both.
SCRIPT = """
import sys
import numpy as np
import torch
import transformers

from egmi.base.config import component_path
from egmi.evaluation.encoders import Clap, LaionClap, shielded

roberta, options = dict(vocab_size=529, num_hidden_layers=2, max_position_embeddings=130), dict(tokenizer=component_path('clap'))
config_with = lambda eps: transformers.ClapConfig(text_config=roberta | dict(layer_norm_eps=eps))
argv = list(sys.argv)
with shielded(config_with(1e-5)):
    from laion_clap import CLAP_Module
    torch.manual_seed(0)
    module = CLAP_Module(device='cpu')
assert sys.argv == argv

theirs = module.model.eval()
for name, p in theirs.named_parameters():
    if p.ndim == 1 and p.is_floating_point(): p.data += .1 * torch.randn_like(p)  # biases and norms start at 0 and 1, where a swap is not seen
theirs.audio_branch.bn0.running_mean.uniform_(-40, -20)
theirs.audio_branch.bn0.running_var.uniform_(100, 300)
old = {'text_branch.embeddings.position_ids': torch.arange(130)[None]}  # written by the transformers of that time
torch.save(dict(epoch=np.int64(1), state_dict={f'module.{k}': v for k, v in (theirs.state_dict() | old).items()}), sys.argv[1])

texts = ['a drum', 'in a heavy shower there are two big white clocks', 'frogs']
rng = np.random.default_rng(0)
waves = [(.2 * rng.normal(size=n) * np.sin(np.arange(n) / 9000)).astype(np.float32) for n in (480_000, 130_000, 48_000)]
laion = LaionClap(sys.argv[1], config=config_with(1e-5), **options)
tokens = laion.tokenizer(texts, padding=True, return_tensors='pt')
with torch.no_grad(): expected = dict(text=theirs.get_text_embedding(dict(tokens)).numpy(), audio=module.get_audio_embedding_from_data(waves))
difference = lambda name, found: float(abs(found - expected[name]).max())
print('text laion', difference('text', laion.embed_texts(texts)))
print('audio laion', difference('audio', laion.embed_sounds(waves, laion.mels.sampling_rate)))
print('one laion', abs(laion.embed_texts(texts[:1]) - expected['text'][:1]).max())

for eps in (1e-5, 1e-12):
    ours = Clap.from_official(sys.argv[1], config=config_with(eps), **options)
    print('text', eps, difference('text', ours.embed_texts(texts)))
print('audio', 50, difference('audio', ours.embed_sounds(waves, 48_000)))
longer = [np.concatenate([waves[0], waves[1]])]
print('longer 50', abs(ours.embed_sounds(longer, 48_000) - laion.embed_sounds(longer, 48_000)).max())
ours.mels = transformers.ClapFeatureExtractor(truncation='rand_trunc', padding='repeatpad')
print('audio', 0, difference('audio', ours.embed_sounds(waves, 48_000)))
"""


def test_converted_clap_equals_laion_clap(tmp_path):
    process = subprocess.run([sys.executable, '-c', SCRIPT, tmp_path/'clap.pt'], env=os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path)),
                             capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in process.stdout.splitlines() if line.startswith(('text', 'audio', 'one', 'longer'))}
    assert all(found[what, 'laion'] <= 1e-6 for what in ('text', 'audio', 'one')) and found['longer', '50'] <= 1e-4
    assert found['text', '1e-05'] <= 1e-4 and found['audio', '50'] <= 1e-4
    assert found['text', '1e-12'] > found['text', '1e-05'] and found['audio', '0'] > 1e-3  # the wrong options are seen
