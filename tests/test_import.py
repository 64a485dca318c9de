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
    for line in (
            '    text (default None): one text or many',
            '    sample_rate (int, default None): Hz, of arrays and tensors that come without one',
            '    generator (Generator, default None): draws the seeds instead; None is the global one',
            'Returns:\n    samples of the first prompt, then of the next'):
        assert f'\n{line}' in generate
    device = "device (str, default 'auto'): auto, cpu, cuda, cuda:1, mps..."
    assert device in inspect.getdoc(egmi.EGMI.from_pretrained)
    assert 'audio (Tensor): [N, C] for AudioLDM' in inspect.getdoc(egmi.Conditions)
    assert 'image (torch.Tensor | None): [N, L, C] for' in inspect.getdoc(egmi.Conditions)
    assert 'Returns:\n    FileExample' in inspect.getdoc(egmi.load_folder)


METHODS = ['generate', 'edit', 'conditions', 'prompts', 'save_pretrained', 'push_to_hub']


@pytest.mark.parametrize('method', METHODS)
def test_help_leaves_no_parameter_out(method):
    function = getattr(egmi.EGMI, method)
    listed = inspect.getdoc(function).partition('Parameters:\n')[2].splitlines()
    _, *names = inspect.signature(function).parameters
    assert [line.split()[0].rstrip(':') for line in listed[:len(names)]] == names


def test_help_explains_what_is_returned_too():
    code = 'from egmi import EGMI; from egmi.outputs import EGMIOutput; help(EGMIOutput.save)'
    process = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert 'folder: made if it is missing' in process.stdout


def test_comments_are_added_once():
    inherited = [cls.encode_captions.__doc__ for cls in (egmi.StableDiffusion, egmi.AudioLDM)]
    assert inherited[0] == inherited[1]
    assert inherited[0].count('Parameters:') == inherited[0].count('captions (') == 1
