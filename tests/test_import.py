"""`import egmi` is light: the public names, and the heavy libraries behind them, load on first use."""
import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

import egmi

HEAVY = {
    'torch', 'torchvision', 'torchaudio', 'transformers', 'diffusers', 'pandas', 'matplotlib', 'scipy',
    'numpy'}
CONTRACT = {
    'EGMI', 'EGMIOutput', 'ModalityTokens', 'EGMIMapper', 'SeparatedMapper', 'CrossMapper', 'Conditions',
    'load_folder', 'score_sounds', 'write_sounds'}


def modules_after(statement):
    "Top-level modules that a fresh interpreter holds after `statement`."
    code = f'{statement}\nimport json, sys; print(json.dumps([m for m in sys.modules if "." not in m]))'
    process = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    return set(json.loads(process.stdout))


def test_import_is_light():
    found = modules_after('import egmi; dir(egmi); hasattr(egmi, "nothing")')
    assert 'egmi' in found
    assert not found & HEAVY


def test_heavy_modules_would_be_seen():
    assert 'torch' in modules_after('import egmi; egmi.ModalityTokens')


@pytest.mark.parametrize('name', egmi.__all__)
def test_public_names_are_those_of_their_modules(name):
    found = getattr(egmi, name)
    assert found is getattr(import_module(f'egmi.{egmi.MODULES[name]}'), name)
    assert found.__module__.startswith(f'egmi.{egmi.MODULES[name]}') and found.__doc__


def test_public_names_are_listed():
    assert CONTRACT <= set(egmi.__all__) <= set(dir(egmi))
    assert {'__version__', '__doc__'} <= set(dir(egmi))


def test_unknown_name():
    with pytest.raises(AttributeError, match="^module 'egmi' has no attribute 'no_such_name'$"):
        egmi.no_such_name


def test_help_shows_the_comments_of_parameters():
    generate = inspect.getdoc(egmi.EGMI.generate)
    assert 'sample_rate: of samples that come without one, Hz' in generate
    assert 'return: samples of the first prompt, then of the next' in generate
    assert 'device: as `pick_device` takes it' in inspect.getdoc(egmi.EGMI.from_pretrained)
    assert 'audio: [N, C] for AudioLDM' in inspect.getdoc(egmi.Conditions)
    assert 'return: FileExample' in inspect.getdoc(egmi.load_folder)


def test_comments_are_added_once():
    inherited = [cls.encode_captions.__doc__ for cls in (egmi.StableDiffusion, egmi.AudioLDM)]
    assert inherited[0] == inherited[1]
    assert inherited[0].count('captions:') == 1
