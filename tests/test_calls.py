"""0 is 0, a cache that mends itself, files in their place and for everybody."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from conftest import ROOT, environment

from egmi.base.files import made_once, read_kept
from egmi.base.fitting import FitConfig, fit, in_batches
from egmi.evaluation.experiment import kept_seconds
from egmi.evaluation.folders import read_pairs
from egmi.evaluation.outputs import run_on_files
from egmi.model import EGMI
from egmi.small.corpus import render_corpus
from egmi.toybox.scenes import toybox


@pytest.fixture(scope='module')
def egmi():
    return EGMI.from_pretrained('mini', 'cpu')


@pytest.fixture(scope='module')
def scene():
    return toybox('test', 1)[0]


# 0 is 0

NO_COUNTS = (0, -1, 1.5, True, '4')
NO_NUMBERS = ('3', True, float('nan'))
NO_RATES = (0, -16000, 16, .5, '16000', True)
REFUSED = [
    *[('generate', 'steps', bad) for bad in NO_COUNTS],
    *[('edit', 'steps', bad) for bad in NO_COUNTS],
    *[('generate', 'max_new_tokens', bad) for bad in NO_COUNTS],
    *[('generate', name, bad) for name in ('guidance_image', 'guidance_audio') for bad in NO_NUMBERS],
    *[('edit', 'guidance_scale', bad) for bad in NO_NUMBERS],
    *[('edit', 'strength', bad) for bad in ('.5', True, float('nan'), -.1)],
    *[('generate', 'sample_rate', bad) for bad in NO_RATES],
    *[('edit', 'sample_rate', bad) for bad in NO_RATES]]


@pytest.mark.parametrize('call, name, bad', REFUSED, ids=repr)
def test_numbers_are_refused_by_name_before_any_work(call, name, bad, egmi, scene, monkeypatch):
    for work in ('embed_prompts', 'generate_text', 'image_features', 'audio_features'):
        monkeypatch.setattr(egmi.panda, work, None)
    given = dict(text='a bell', audio=scene.audio, sample_rate=16000) | {name: bad}
    with pytest.raises(ValueError, match=rf'^{name} must .* not {bad!r}$'):
        getattr(egmi, call)(**given)


NO_WAVES = dict(
    nan=(lambda wave: wave * np.nan, 'sound 0 holds NaN'),
    cast=(lambda wave: wave * 2**15, 'sound 0 has a peak of'),
    empty=(lambda wave: wave[:0], 'sound 0 has zero length'))


@pytest.mark.parametrize('spoil, message', NO_WAVES.values(), ids=NO_WAVES)
def test_the_lower_edit_refuses_what_is_no_waveform(spoil, message, egmi, scene):
    clap_BC = egmi.audioldm.unconditional
    with pytest.raises(ValueError, match=message):
        egmi.audioldm.edit(clap_BC, [spoil(scene.audio)])


def test_the_lower_edit_reads_16_bits(egmi, scene):
    clap_BC = egmi.audioldm.unconditional
    in_16_bits = (scene.audio * 2**15).astype(np.int16)
    peaks = []
    for wave_T in (in_16_bits, scene.audio):
        edited = egmi.audioldm.edit(clap_BC, [wave_T], 0., progress=False)
        peaks.append(np.abs(edited).max())
    assert peaks[0] == pytest.approx(peaks[1], rel=.05)


@pytest.mark.parametrize('name', ['steps', 'batch_size'])
@pytest.mark.parametrize('bad', NO_COUNTS, ids=repr)
def test_generators_refuse_counts_too(name, bad, egmi):
    message = rf'^{name} must be a whole number of 1 or more, not {bad!r}$'
    with pytest.raises(ValueError, match=message):
        egmi.stable_diffusion.generate(egmi.stable_diffusion.unconditional, **{name: bad})
    with pytest.raises(ValueError, match=message):
        egmi.audioldm.edit(egmi.audioldm.unconditional, np.zeros((1, 16000)), **{name: bad})


def test_nothing_is_not_generated(egmi):
    with pytest.raises(ValueError, match='^a sound of 0 seconds has no samples$'):
        egmi.audioldm.generate(egmi.audioldm.unconditional, seconds=0)
    with pytest.raises(ValueError, match='nothing to generate'):
        egmi.stable_diffusion.generate(egmi.stable_diffusion.unconditional[:0])
    for bad in NO_COUNTS:
        with pytest.raises(ValueError, match='^batch_size must'):
            in_batches(len, 3, bad)  # 0 would never end


# The cache mends itself

def damage(path, kind):
    "Spoil a file in one of four ways."
    data = bytearray(path.read_bytes())
    if kind == 'empty':
        data.clear()
    if kind == 'cut':
        data.pop()
    if kind == 'garbage':
        data = bytes(len(data))
    if kind == 'flipped':
        data[200] ^= 1  # within the first array, not the headers of a zip file
    path.write_bytes(data)


def arrays(folder):
    def make():
        return dict(x=np.arange(1000))

    def run():
        return made_once(folder/'made.npz', make)['x'].sum()
    return run


def training(folder):
    def run():
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 1)
        config = FitConfig(steps=4, batch_size=2)

        def loss_fn(step):
            return model(torch.ones(2, 64)).square().mean()
        return fit(model, loss_fn, config, folder/'fit.pt')[-1]
    return run


def features(folder):
    for kind in ('real', 'made'):
        (folder.parent/kind).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).normal(0, .1, 40960)
            soundfile.write(folder.parent/kind/f'{i}.wav', noise, 16000)
    sounds = read_pairs(folder.parent/'real', folder.parent/'made', progress=False)[0]

    def run():
        outputs = run_on_files(sounds, dict(judge='judge/sound'), progress=False)
        return round(float(outputs['features'].sum()), 2)
    return run


def scenes(folder):
    def run():
        return int(np.sum(render_corpus('train', 4).waves_NT, dtype=int))
    return run


CHECKED = [(arrays, 'made.npz'), (training, 'fit.pt'), (features, 'sounds/*/*.npz')]
MAPPED = [(scenes, 'toybox/*/waves.npy')]  # no checksums, but lengths
DAMAGED = [
    *[(*case, kind) for case in CHECKED + MAPPED for kind in ('empty', 'cut', 'garbage')],
    *[(*case, 'flipped') for case in CHECKED]]


def name_of(value):
    return getattr(value, '__name__', value)


@pytest.mark.parametrize('cached, pattern, kind', DAMAGED, ids=name_of)
def test_damaged_file_is_named_and_made_again(cached, pattern, kind, tmp_path, monkeypatch):
    folder = tmp_path/'cache'
    folder.mkdir()
    monkeypatch.setenv('EGMI_CACHE', str(folder))
    run = cached(folder)
    whole = run()
    path = min(folder.glob(pattern))
    damage(path, kind)
    with pytest.warns(UserWarning, match=r'is damaged \(.*\): deleted, to be made again') as messages:
        assert run() == whole
    assert len(messages) == 1
    assert str(path).startswith(str(messages[0].message).split(' is damaged')[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run() == whole
    assert not list(folder.rglob('.*'))


@pytest.mark.parametrize('text', ['', '{"training": 1', '[]', 'null'])
def test_seconds_of_earlier_runs(text, tmp_path):
    (tmp_path/'seconds.json').write_text(text)
    with pytest.warns(UserWarning, match='seconds.json is damaged'):
        assert kept_seconds(tmp_path) == {}
    assert not (tmp_path/'seconds.json').exists()


@pytest.mark.parametrize('error', [PermissionError, OSError, MemoryError])
def test_a_file_that_may_not_be_read_is_kept(error, tmp_path):
    def read(path):
        raise error
    (tmp_path/'a').write_text('whole')
    with pytest.raises(error):
        read_kept(tmp_path/'a', read)
    assert (tmp_path/'a').read_text() == 'whole'


@pytest.mark.parametrize('width, steps, what', [(64, 5, 'steps'), (8, 4, 'model')])
def test_checkpoint_of_another_run_is_an_error_and_stays(width, steps, what, tmp_path):
    training(tmp_path)()
    path = tmp_path/'fit.pt'
    before = path.read_bytes()
    message = f'^checkpoint {path} was made with another {what}: delete it or choose another folder$'
    with pytest.raises(ValueError, match=message):
        fit(torch.nn.Linear(width, 1), None, FitConfig(steps=steps, batch_size=2), path)
    assert path.read_bytes() == before


SLOW_WRITER = """
import sys, time
from egmi.base.files import replacing
with replacing(sys.argv[1]) as beside:
    beside.write_text('half')
    print('written', flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_deleted_later(tmp_path):
    killed = subprocess.Popen([sys.executable, '-c', SLOW_WRITER, tmp_path/'a.txt'], stdout=subprocess.PIPE)
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left, = tmp_path.iterdir()
    code = 'import sys; from egmi.base.files import write_json; write_json(sys.argv[1], {})'
    write = [sys.executable, '-c', code, tmp_path/'b.json']
    subprocess.run(write, check=True)
    assert left.exists()  # somebody may still be writing it
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    subprocess.run(write, check=True)
    assert os.listdir(tmp_path) == ['b.json']


# Files in their place, for everybody

def contents(folder):
    "The sha256 of every file."
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.mark.slow
def test_a_training_leaves_the_package_as_it_is(tmp_path):
    "From any folder, and from the published weights."
    site = tmp_path/'site'
    shutil.copytree(ROOT/'egmi', site/'egmi', ignore=shutil.ignore_patterns('__pycache__'))
    before = contents(site)
    work = tmp_path/'elsewhere'
    work.mkdir()
    sizes = ['--steps', '1', '--batch_size', '2', '--n_scenes', '4']
    command = [sys.executable, '-m', 'egmi.small.judge', '--device', 'cpu', '--onward', *sizes]
    variables = environment(tmp_path/'cache', PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE='1')
    process = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert contents(site) == before
    made = json.loads((work/'weights/judge/training.json').read_text())
    again = {part for part, run in made.items() if run['onward_from']['steps'] > 1}
    assert again == {'picture', 'sound'}
    assert all('--root' not in run['command'] for run in made.values())
    assert sorted(os.listdir(work/'weights')) == ['judge', 'manifest.json']


# Writes one file of each kind below argv[1], under the umask argv[2].
WRITERS = '''
import os, sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
os.umask(int(sys.argv[2], 8))
folder = Path(sys.argv[1])
os.environ['EGMI_CACHE'] = str(folder/'cache')
from egmi.base.files import made_once, write_json, write_table
from egmi.base.fitting import FitConfig
from egmi.evaluation.judge import Judge
from egmi.frozen.imagebind import ImageBind, ImageBindConfig, TowerConfig
from egmi.mapper import EGMIMapper, MapperConfig
from egmi.model import save_conditioner
from egmi.small.corpus import render_corpus
from egmi.small.publishing import TrainingRun, publish
from egmi.tokens import ModalityTokens
from egmi.training import Conditioner

sizes = dict(d_llm=8, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8)
mapper = EGMIMapper(MapperConfig(**sizes, n_queries=2, d_clip=4, d_clap=4))
tokens = ModalityTokens.from_embedding(torch.randn(40, 8))
save_conditioner(Conditioner(tokens, mapper), folder/'egmi', 'EGMI mapper', 'mini')
tower = TowerConfig(16, 1, 1)
towers = dict(vision=tower, audio=tower, text=tower)
ImageBind(ImageBindConfig(embed_dim=8, **towers, vocab=20, eos_id=19)).save_pretrained(folder/'imagebind')
Judge(3, ['object']).save_pretrained(folder/'judge')
run = TrainingRun('toy', 'cpu', folder/'weights')
layer = torch.nn.Linear(2, 1)
run.fit('layer', layer, lambda step: layer(torch.ones(1, 2)).sum(), FitConfig(steps=1))
publish(run, lambda beside: Judge(3, ['object']).save_pretrained(beside/'judge'))
made_once(folder/'a.npz', lambda: dict(x=np.zeros(2)))
write_json(folder/'a.json', {})
write_table(folder/'a.csv', pd.DataFrame(dict(a=[1])))
render_corpus('train', 2)
'''


@pytest.mark.slow
@pytest.mark.parametrize('umask', ['022', '077'])
def test_files_have_the_permissions_of_other_files(umask, tmp_path):
    folder = tmp_path/'written'
    folder.mkdir()
    command = [sys.executable, '-c', WRITERS, folder, umask]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    paths = list(folder.rglob('*'))
    assert sum(path.suffix == '.safetensors' for path in paths) == 4
    usual = {True: 0o777 & ~int(umask, 8), False: 0o666 & ~int(umask, 8)}
    wrong = [path for path in paths if path.stat().st_mode & 0o777 != usual[path.is_dir()]]
    assert wrong == []
