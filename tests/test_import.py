"""`import egmi` is light: the heavy libraries load on first use."""
import json
import subprocess
import sys

import egmi

HEAVY = {'torch', 'torchvision', 'torchaudio', 'transformers', 'diffusers', 'pandas', 'matplotlib', 'scipy'}


def modules_after(statement):
    "Top-level modules that a fresh interpreter holds after `statement`."
    code = f'{statement}\nimport json, sys; print(json.dumps([m for m in sys.modules if "." not in m]))'
    return set(json.loads(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout))


def test_import_is_light():
    assert 'egmi' in modules_after('import egmi')
    assert not modules_after('import egmi') & HEAVY


def test_heavy_modules_would_be_seen():
    assert 'torch' in modules_after('import torch')


def test_unknown_name():
    assert not hasattr(egmi, 'no_such_name')


def test_egmi_loads_on_first_use():
    from egmi.model import EGMI
    assert egmi.EGMI is EGMI
