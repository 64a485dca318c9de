"""Trainings of the small models as a user runs them: one result for one seed, after a kill too."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import environment

from egmi.base.config import WEIGHTS

pytestmark = pytest.mark.slow

CLIP = dict(batch_size=16, n_scenes=64)


def start_training(name, cache, *flags, **options):
    "A running `python -m egmi.small.NAME`."
    command = [sys.executable, '-m', f'egmi.small.{name}', '--device', 'cpu', *flags]
    for option, value in options.items():
        command += [f'--{option}', str(value)]
    variables = environment(cache, OMP_NUM_THREADS='1')
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def weights_in(root):
    "Bytes of every tensor file below `root`."
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*.safetensors')}


def test_one_seed_gives_one_set_of_weights(tmp_path):
    runs = []
    for name in ('first', 'second'):
        cache = tmp_path/f'{name}-cache'
        runs.append(start_training('clip', cache, root=tmp_path/name, steps=3, vision_steps=2, **CLIP))
    for run in runs:
        finish(run)
    first = weights_in(tmp_path/'first')
    assert list(first) == ['clip/model.safetensors']
    assert first == weights_in(tmp_path/'second')
    made = json.loads((tmp_path/'first/manifest.json').read_text())['made']['clip']
    assert {part: run['steps'] for part, run in made.items()} == dict(contrastive=3, vision=2)


def test_a_killed_training_goes_on(tmp_path):
    sizes = dict(steps=101, batch_size=2, n_scenes=8)
    killed = start_training('judge', tmp_path/'killed', root=tmp_path/'resumed', **sizes)
    whole = start_training('judge', tmp_path/'cache', root=tmp_path/'whole', **sizes)
    while not (tmp_path/'killed/training/judge/picture.pt').exists():
        assert killed.poll() is None
        time.sleep(.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path/'resumed/judge').exists()
    finish(start_training('judge', tmp_path/'killed', root=tmp_path/'resumed', **sizes))
    finish(whole)
    assert weights_in(tmp_path/'whole') == weights_in(tmp_path/'resumed') != {}


def test_another_round_keeps_the_tokenizer_of_the_weights(tmp_path):
    root = tmp_path/'weights'
    shutil.copytree(WEIGHTS/'clip', root/'clip')
    finish(start_training('clip', tmp_path/'cache', '--onward', root=root, steps=2, vision_steps=3, **CLIP))
    assert (root/'clip/tokenizer.json').read_bytes() == (WEIGHTS/'clip/tokenizer.json').read_bytes()
    made = json.loads((root/'clip/training.json').read_text())
    assert {part: run['steps'] for part, run in made.items()} == dict(contrastive=2, vision=3)
    assert all('onward_from' in run for run in made.values())
    assert made['contrastive']['command'].startswith('python -m egmi.small.clip --device cpu --onward')


# Writes two checkpoints; the disk is full before the second, if a limit is given.
FULL_DISK = '''
import resource, sys, torch
from pathlib import Path
from egmi.base.fitting import FitConfig, fit

torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
def loss_fn(step):
    if step == 15 and len(sys.argv) > 2:
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return model(torch.ones(8, 64)).square().mean()
print(len(fit(model, loss_fn, FitConfig(steps=20, batch_size=8, save_every=10), Path(sys.argv[1]))))
'''


def fit_linear(path, *limit):
    command = [sys.executable, '-c', FULL_DISK, path, *limit]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    full = fit_linear(tmp_path/'linear.pt', '1000')
    assert full.returncode == 1
    assert 'OSError' in full.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ['linear.pt']
    assert fit_linear(tmp_path/'linear.pt').stdout == '20\n'
