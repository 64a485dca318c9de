"""Trainings of the small models as a user runs them: alike for one seed, whole after a kill, and safe on a full disk."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from conftest import environment

from egmi.base.config import WEIGHTS


def trainer(name, cache, *flags, **options):
    "A running `python -m egmi.small.NAME`."
    command = [sys.executable, '-m', f'egmi.small.{name}', '--device', 'cpu', *flags, *(str(word) for k, v in options.items() for word in (f'--{k}', v))]
    return subprocess.Popen(command, env=environment(cache, OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def weights_in(root):
    "Bytes of every tensor file below `root`."
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*.safetensors')}


def test_one_seed_gives_one_set_of_weights(tmp_path):
    sizes = dict(steps=3, vision_steps=2, batch_size=16, n_scenes=64)
    for name in ('first', 'second'): finished(trainer('clip', tmp_path/f'{name}-cache', root=tmp_path/name, **sizes))
    first, second = weights_in(tmp_path/'first'), weights_in(tmp_path/'second')
    assert list(first) == ['clip/model.safetensors'] and first == second
    manifest = json.loads((tmp_path/'first/manifest.json').read_text())
    assert {part: run['steps'] for part, run in manifest['made']['clip'].items()} == dict(contrastive=3, vision=2)


def test_a_killed_training_goes_on(tmp_path):
    sizes = dict(steps=130, batch_size=4, n_scenes=32)
    finished(trainer('judge', tmp_path/'cache', root=tmp_path/'whole', **sizes))
    killed = trainer('judge', tmp_path/'other', root=tmp_path/'resumed', **sizes)
    while not (tmp_path/'other/training/judge/picture.pt').exists(): time.sleep(.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path/'resumed/judge').exists()
    finished(trainer('judge', tmp_path/'other', root=tmp_path/'resumed', **sizes))
    assert weights_in(tmp_path/'whole') == weights_in(tmp_path/'resumed') != {}


def test_another_round_keeps_the_tokenizer_that_the_weights_know(tmp_path):
    shutil.copytree(WEIGHTS/'clip', tmp_path/'weights/clip')
    finished(trainer('clip', tmp_path/'cache', '--onward', steps=2, vision_steps=3, batch_size=16, n_scenes=64, root=tmp_path/'weights'))
    assert (tmp_path/'weights/clip/tokenizer.json').read_bytes() == (WEIGHTS/'clip/tokenizer.json').read_bytes()
    made = json.loads((tmp_path/'weights/clip/training.json').read_text())
    assert [(made[part]['steps'], 'onward_from' in made[part]) for part in ('contrastive', 'vision')] == [(2, True), (3, True)]


# Writes two checkpoints; the disk is full before the second, if a limit is given.
FULL_DISK = '''
import resource, sys, torch
from pathlib import Path
from egmi.base.fitting import FitConfig, fit

torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
def loss_fn(step):
    if step == 15 and len(sys.argv) > 2: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    return model(torch.ones(8, 64)).square().mean()
print(len(fit(model, loss_fn, FitConfig(steps=20, batch_size=8, save_every=10), Path(sys.argv[1]))))
'''


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    run = lambda *limit: subprocess.run([sys.executable, '-c', FULL_DISK, tmp_path/'linear.pt', *limit], capture_output=True, text=True)
    full = run('1000')
    assert full.returncode == 1 and 'OSError' in full.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ['linear.pt']
    assert run().stdout == '20\n'
