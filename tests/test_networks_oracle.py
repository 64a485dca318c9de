"""Cnn14 and VGGish at full size equal those of panns_inference (with torchlibrosa) and torchvggish."""
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch

from egmi.base.audio import SAMPLE_RATE
from egmi.evaluation.networks import Cnn14, VGGish, at_16k, log_mel_examples, split_examples

rng = np.random.default_rng(0)


def noise(n):
    "Noise that swells and fades"
    return (.2 * rng.normal(size=n) * np.sin(np.arange(n) / 9000)).astype(np.float32)


WAVES = [noise(48_000), noise(35_000), np.zeros(32_000, np.float32)]


def randomise(model):
    "Weights under which a sound still matters behind many layers; the spectrogram stays."
    torch.manual_seed(0)
    for name, t in model.state_dict().items():
        if 'extractor' in name or not t.is_floating_point():
            continue
        if t.ndim > 1:
            t.normal_(std=(2 * t.shape[0] / t.numel())**.5)
        elif name.endswith('running_var') or 'bn' in name and name.endswith('weight'):
            t.uniform_(.5, 1.5)
        else:
            t.normal_(std=.1)
    return model.eval()


def relative_difference(ours, theirs):
    difference = float(abs(ours - theirs).max() / abs(theirs).max())
    print(difference)
    return difference


def test_cnn14_equals_panns_inference(tmp_path, monkeypatch):
    package = ModuleType('panns_inference')  # its own __init__ downloads
    package.__path__ = list(find_spec('panns_inference').submodule_search_locations)
    monkeypatch.setitem(sys.modules, 'panns_inference', package)
    published = import_module('panns_inference.models').Cnn14
    theirs = randomise(published(SAMPLE_RATE, 512, 160, 64, 50, 8000, 527))
    theirs.bn0.running_mean.uniform_(-40, -20)
    theirs.bn0.running_var.uniform_(100, 300)
    torch.save(dict(iteration=1, model=theirs.state_dict()), tmp_path/'cnn14.pth')
    ours = Cnn14.from_official(tmp_path/'cnn14.pth')
    for wave in WAVES:
        sound = torch.tensor(at_16k([wave], SAMPLE_RATE, centred=True)[0])[None]
        with torch.no_grad():
            log_mel = theirs.logmel_extractor(theirs.spectrogram_extractor(sound))[:, 0]
            found = theirs(sound)
            assert float((ours.log_mel(sound) - log_mel).abs().max()) <= 1e-4  # dB
        features, logits = ours.classify([wave], SAMPLE_RATE)
        assert relative_difference(features, found['embedding'].numpy()) <= 1e-5
        assert relative_difference(1 / (1 + np.exp(-logits)), found['clipwise_output'].numpy()) <= 1e-5


def test_vggish_equals_torchvggish(tmp_path):
    theirs = randomise(import_module('torchvggish.torchvggish')._vgg(postprocess=False))
    examples = import_module('torchvggish.vggish_input').waveform_to_examples
    torch.save(theirs.state_dict(), tmp_path/'vggish.pth')
    ours = VGGish.from_official(tmp_path/'vggish.pth')
    # as audioldm_eval hands them over
    centred = [at_16k([wave], SAMPLE_RATE, centred=True)[0] for wave in WAVES]
    mels = np.concatenate([log_mel_examples(split_examples(wave)) for wave in centred])
    with torch.no_grad():
        expected = torch.cat([examples(wave, SAMPLE_RATE) for wave in centred])
        difference = float(abs(mels - expected[:, 0].numpy()).max())
        print('mels', difference)
        assert difference <= 1e-5
        theirs.embeddings = theirs.embeddings[:-1]  # without the last ReLU
        features = theirs(expected).numpy()
    assert relative_difference(ours.embed(WAVES, SAMPLE_RATE), features) <= 1e-5
