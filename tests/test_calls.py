"""What a user may hand in and find: 0 is 0, many prompts in any form, a cache that mends itself, files in their place."""
import hashlib
import itertools
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
import pandas as pd
import pytest
import soundfile
import torch

from conftest import ROOT, environment

from egmi.data import toybox
from egmi.evaluation import made_once
from egmi.fitting import FitConfig, fit, in_batches
from egmi.folders import embed_sounds, read_pairs
from egmi.mini.corpus import render_corpus
from egmi.model import EGMI
from egmi.training import stored_targets


@pytest.fixture(scope='module')
def egmi():
    return EGMI.from_pretrained('mini', 'cpu')


@pytest.fixture(scope='module')
def scene():
    return toybox('test', 1)[0]


def seeded(): return dict(generator=torch.Generator().manual_seed(0), steps=2, progress=False)


# 0 is 0

def test_no_guidance_draws_the_condition_alone(egmi, scene):
    def picture(scale): return np.asarray(egmi.generate('a bell', outputs='image', guidance_image=scale, **seeded()).images[0])
    def sound(scale): return egmi.generate('a bell', outputs='audio', guidance_audio=scale, **seeded()).audio
    def edit(scale): return egmi.edit('a bell', scene.audio, 16000, guidance_scale=scale, **seeded()).audio
    for make in (picture, sound, edit):
        assert np.array_equal(make(0), make(1)) and np.array_equal(make(-3), make(1))  # as diffusers has it
        assert not np.array_equal(make(0), make(None))


NO_COUNTS = (0, -1, 1.5, True, '4')


@pytest.mark.parametrize('call, name, bad', [
    *[(call, 'steps', bad) for call in ('generate', 'edit') for bad in NO_COUNTS],
    *[('generate', 'max_new_tokens', bad) for bad in NO_COUNTS],
    *[('generate', name, bad) for name in ('guidance_image', 'guidance_audio') for bad in ('3', True, float('nan'))],
    *[('edit', 'guidance_scale', bad) for bad in ('3', True, float('nan'))],
    *[('edit', 'strength', bad) for bad in ('.5', True, float('nan'), -.1)],
    *[(call, 'sample_rate', bad) for call in ('generate', 'edit') for bad in (0, -16000, '16000', True)],
], ids=lambda value: repr(value))
def test_numbers_are_refused_by_name_before_any_work(call, name, bad, egmi, scene, monkeypatch):
    for work in ('prefix', 'image_features', 'audio_features'): monkeypatch.setattr(egmi.panda, work, None)
    given = dict(text='a bell', audio=scene.audio, sample_rate=16000) | {name: bad}
    with pytest.raises(ValueError, match=rf'^{name} must .* not {bad!r}$'): getattr(egmi, call)(**given)


def test_lower_floors_refuse_them_too(egmi):
    clip_BLC, clap_BC = egmi.stable_diffusion.unconditional, egmi.audioldm.unconditional
    for bad in NO_COUNTS:
        for name in ('steps', 'batch_size'):
            message = rf'^{name} must be a whole number of 1 or more, not {bad!r}$'
            with pytest.raises(ValueError, match=message): egmi.stable_diffusion.generate(clip_BLC, **{name: bad})
            with pytest.raises(ValueError, match=message): egmi.audioldm.edit(clap_BC, np.zeros((1, 16000)), **{name: bad})
        with pytest.raises(ValueError, match='^batch_size must be'): in_batches(len, 3, bad)  # 0 went on for ever
    with pytest.raises(ValueError, match='^a sound of 0 seconds has no samples$'): egmi.audioldm.generate(clap_BC, 0)
    with pytest.raises(ValueError, match='nothing to generate'): egmi.stable_diffusion.generate(clip_BLC[:0])


# One or many

SAID = ['a bell', 'two birds', 'a drum in the rain']


@pytest.mark.parametrize('given', [
    SAID, tuple(SAID), (text for text in SAID), map(str, SAID), np.array(SAID), np.array(SAID, dtype=object), dict(enumerate(SAID)).values(),
    pd.Series(SAID), pd.Series(SAID, index=[7, 3, 3]), pd.Series(SAID, dtype='string'), pd.Series(SAID, dtype='category'), pd.Index(SAID),
], ids=lambda value: type(value).__name__)
def test_texts_in_any_form(given, egmi):
    assert egmi.prompts(given, None, None, None) == (SAID, [None] * 3)


def test_a_string_is_one_text(egmi):
    for text in ('a bell', np.str_('a bell')): assert len(egmi.conditions(text)) == 1
    out = egmi.generate(pd.Series(SAID[:2], index=[9, 9]), outputs='audio', **seeded())
    assert out.images is None and out.audio.shape[0] == 2


def type_name(value): return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize('given, message', [
    (5, ', not 5'), (b'a bell', ", not b'a bell'"), (dict(a='a bell'), ", not {'a': 'a bell'}"), ({'a bell'}, ", not {'a bell'}"), (float('nan'), ', not nan'),
    (pd.DataFrame(dict(caption=SAID)), ', not DataFrame of shape [3, 1]'), (np.array([SAID]), ', not ndarray of shape [1, 3]'),
    (['a bell', None], ' 1, not None'), (['a bell', 5], ' 1, not 5'), ([['a bell']], " 0, not ['a bell']"), (iter([b'']), " 0, not b''"),
    (pd.Series(['a bell', float('nan')]), ' 1, not nan'), (pd.Series(['a bell', None], dtype='string'), ' 1, not <NA>'),
], ids=type_name)
def test_what_is_no_text_is_named(given, message, egmi):
    place, what = message.split(', ', 1)
    with pytest.raises(TypeError) as error: egmi.generate(given)
    assert str(error.value) == f'text{place} must be a string, {what}'


@pytest.mark.parametrize('nothing', [[], (), iter([]), np.array([], dtype=str), pd.Series([], dtype=object)], ids=lambda value: type(value).__name__)
def test_nothing_to_generate(nothing, egmi):
    with pytest.raises(ValueError, match='^there is nothing to generate: text is empty$'): egmi.generate(nothing)


def test_pictures_and_sounds_in_any_form(egmi):
    scenes = toybox('test', 2)
    pictures, sounds = [s.image for s in scenes], [s.audio for s in scenes]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    features = lambda **given: torch.stack(egmi.prompts(None, given.get('images'), given.get('audio'), 16000)[1])
    for given in (tuple(pictures), iter(pictures), pd.Series(pictures, index=[5, 5]), pixels): assert torch.equal(features(images=given), features(images=pictures))
    for given in (tuple(sounds), iter(sounds), pd.Series(sounds, index=[5, 5])): assert torch.equal(features(audio=given), features(audio=sounds))
    assert len(features(images=pixels[0])) == len(features(images=pictures[0])) == len(features(audio=sounds[0])) == 1
    with pytest.raises(TypeError, match="^images 1 .*'bell.png'"): features(images=[pictures[0], 'bell.png'])
    with pytest.raises(TypeError, match="^audio .*'bell.wav'"): features(audio='bell.wav')


def test_sounds_to_edit_in_any_form(egmi, scene):
    expected = egmi.edit(SAID[:2], [scene.audio] * 2, 16000, **seeded()).audio
    again = egmi.edit(pd.Series(SAID[:2], index=[4, 4]), itertools.repeat(scene.audio, 2), 16000, **seeded()).audio
    assert np.array_equal(expected, again)
    for nothing in ([], None):
        with pytest.raises(ValueError, match='^there is nothing to edit'): egmi.edit('louder', nothing, 16000)


@pytest.mark.parametrize('outputs, message', [
    ('images', r"^unknown outputs \['images'\]: choose from text, image, audio$"), (['audio', 'video'], r"^unknown outputs \['video'\]"), ((), '^no outputs are wanted'),
], ids=type_name)
def test_outputs_that_there_are_not(outputs, message, egmi):
    with pytest.raises(ValueError, match=message): egmi.generate('a bell', outputs=outputs)


# The cache mends itself

def damaged(path, kind):
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(dict(empty=b'', cut=data[:-1], garbage=b'\0' * len(data), flipped=data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:])[kind])


def arrays(folder):
    return lambda: made_once(folder/'made.npz', lambda: dict(x=np.arange(1000)))['x'].sum()


def training(folder):
    def run():
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 1)
        return fit(model, lambda step: model(torch.ones(2, 64)).square().mean(), FitConfig(steps=4, batch_size=2), folder/'fit.pt')[-1]
    return run


def encoder(seed):
    "Stands in for a generator: embeddings that depend on the captions' lengths."
    torch.manual_seed(seed)
    return SimpleNamespace(text_encoder=torch.nn.Linear(2, 2), encode_text=lambda texts: torch.tensor([[len(t) + seed] * 50 for t in texts]).float())


def targets(folder):
    return lambda: float(stored_targets(encoder(0), encoder(1), SAID * 20, folder, shard_size=40, progress=False)[range(60)].clap_NC.sum())


def features(folder):
    for kind in ('real', 'made'):
        (folder.parent/kind).mkdir()
        for i in range(2): soundfile.write(folder.parent/kind/f'{i}.wav', np.random.default_rng(i).normal(0, .1, 40960), 16000)
    sounds = read_pairs(folder.parent/'real', folder.parent/'made', progress=False)[0]
    return lambda: round(float(embed_sounds(sounds, dict(judge='judge/sound'), progress=False)['features'].sum()), 2)


def scenes(folder):
    return lambda: int(np.sum(render_corpus('train', 4).waves_NT, dtype=int))


CACHED = {arrays: 'made.npz', training: 'fit.pt', targets: '*.clap.npy', features: 'sounds/*/*.npz', scenes: 'toybox/*/waves.npy'}


@pytest.mark.parametrize('kind', ['empty', 'cut', 'garbage', 'flipped'])
@pytest.mark.parametrize('cached', CACHED, ids=lambda f: f.__name__)
def test_damaged_file_is_named_and_made_again(cached, kind, tmp_path, monkeypatch):
    if kind == 'flipped' and CACHED[cached].endswith('.npy'): pytest.skip('memory-mapped rows have no checksums')
    folder = tmp_path/'cache'
    folder.mkdir()
    monkeypatch.setenv('EGMI_CACHE', str(folder))
    run = cached(folder)
    whole = run()
    path = sorted(folder.glob(CACHED[cached]))[0]
    damaged(path, kind)
    with pytest.warns(UserWarning, match=r'is damaged \(.*\): deleted, to be made again') as said: assert run() == whole
    assert len(said) == 1 and str(path).startswith(str(said[0].message).split(' is damaged')[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run() == whole
    assert not [p for p in folder.rglob('.*')]


def test_seconds_of_earlier_runs(tmp_path):
    from egmi.evaluation import kept_seconds
    for text in ('', '{"training": 1', '[]', 'null'):
        (tmp_path/'seconds.json').write_text(text)
        with pytest.warns(UserWarning, match='seconds.json is damaged'): assert kept_seconds(tmp_path) == {}
        assert not (tmp_path/'seconds.json').exists()


def test_a_file_that_may_not_be_read_is_kept(tmp_path):
    from egmi.config import read_kept
    (tmp_path/'a').write_text('whole')
    for error in (PermissionError, OSError, MemoryError):
        def read(path): raise error
        with pytest.raises(error): read_kept(tmp_path/'a', read)
    assert (tmp_path/'a').read_text() == 'whole'


def test_checkpoint_of_another_run_is_an_error_and_stays(tmp_path):
    training(tmp_path)()
    path, before = tmp_path/'fit.pt', (tmp_path/'fit.pt').read_bytes()
    other = torch.nn.Linear(8, 1)
    for model, config, what in ((torch.nn.Linear(64, 1), FitConfig(steps=5, batch_size=2), 'steps'), (other, FitConfig(steps=4, batch_size=2), 'model')):
        with pytest.raises(ValueError, match=f'^checkpoint {path} was made with another {what}: delete it or choose another folder$'): fit(model, None, config, path)
    assert path.read_bytes() == before


def test_what_a_killed_writer_leaves_is_deleted_later(tmp_path):
    code = "import sys, time; from egmi.config import replacing\nwith replacing(sys.argv[1]) as beside:\n    beside.write_text('half'); print('written', flush=True); time.sleep(60)"
    killed = subprocess.Popen([sys.executable, '-c', code, tmp_path/'a.txt'], stdout=subprocess.PIPE)
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = tmp_path.iterdir()
    write = [sys.executable, '-c', "import sys; from egmi.config import write_json; write_json(sys.argv[1], {})", tmp_path/'b.json']
    subprocess.run(write, check=True)
    assert left.exists()  # somebody may still be writing it
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    subprocess.run(write, check=True)
    assert os.listdir(tmp_path) == ['b.json']


# Files in their place, for everybody

def test_a_training_leaves_the_package_as_it_is(tmp_path):
    "From any folder, and from the published weights."
    site = tmp_path/'site'
    shutil.copytree(ROOT/'egmi', site/'egmi', ignore=shutil.ignore_patterns('__pycache__'))
    before = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in site.rglob('*') if p.is_file()}
    (tmp_path/'elsewhere').mkdir()
    command = [sys.executable, '-m', 'egmi.mini.judge', '--device', 'cpu', '--onward', '--steps', '1', '--batch_size', '2', '--n_scenes', '4']
    process = subprocess.run(command, cwd=tmp_path/'elsewhere', capture_output=True, text=True,
                             env=environment(tmp_path/'cache', PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE='1'))
    assert process.returncode == 0, process.stderr[-3000:]
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in site.rglob('*') if p.is_file()} == before
    made = json.loads((tmp_path/'elsewhere/weights/judge/training.json').read_text())
    assert {part: run['onward_from']['steps'] > 1 for part, run in made.items()} == dict(picture=True, sound=True)
    assert all('--root' not in run['command'] for run in made.values())
    assert sorted(os.listdir(tmp_path/'elsewhere/weights')) == ['judge', 'manifest.json']


# Writes one file of each kind below argv[1], under the umask argv[2].
WRITERS = '''
import os, sys
from pathlib import Path
import numpy as np, torch
os.umask(int(sys.argv[2], 8))
folder = Path(sys.argv[1])
os.environ['EGMI_CACHE'] = str(folder/'cache')
from egmi.config import write_json
from egmi.evaluation import made_once
from egmi.fitting import FitConfig, fit
from egmi.imagebind import ImageBind, ImageBindConfig, TowerConfig
from egmi.mapper import EGMIMapper, MapperConfig
from egmi.mini.corpus import render_corpus
from egmi.mini.judge import Judge
from egmi.mini.weights import Making, publish
from egmi.model import save_conditioner
from egmi.reporting import write_table
from egmi.tokens import ModalityTokens
from egmi.training import Conditioner
import pandas as pd

mapper = EGMIMapper(MapperConfig(d_llm=8, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8, n_queries=2, d_clip=4, d_clap=4))
save_conditioner(Conditioner(ModalityTokens.from_embedding(torch.randn(40, 8)), mapper), folder/'egmi', 'EGMI mapper', 'mini')
mapper.save_pretrained(folder/'mapper')
tower = TowerConfig(16, 1, 1)
ImageBind(ImageBindConfig(embed_dim=8, vision=tower, audio=tower, text=tower, vocab=20, eos_id=19)).save_pretrained(folder/'imagebind')
Judge(3, ['object']).save_pretrained(folder/'judge')
making, layer = Making('toy', 'cpu', folder/'weights'), torch.nn.Linear(2, 1)
making.fit('layer', layer, lambda step: layer(torch.ones(1, 2)).sum(), FitConfig(steps=1))
publish(making, lambda beside: Judge(3, ['object']).save_pretrained(beside/'judge'))
made_once(folder/'a.npz', lambda: dict(x=np.zeros(2)))
write_json(folder/'a.json', {})
write_table(folder/'a.csv', pd.DataFrame(dict(a=[1])))
render_corpus('train', 2)
'''


@pytest.mark.parametrize('umask', ['022', '077'])
def test_files_have_the_permissions_of_other_files(umask, tmp_path):
    folder = tmp_path/'written'
    folder.mkdir()
    process = subprocess.run([sys.executable, '-c', WRITERS, folder, umask], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    paths = list(folder.rglob('*'))
    assert sum(p.suffix == '.safetensors' for p in paths) == 5
    modes = {p.relative_to(folder).as_posix(): f'{p.stat().st_mode & 0o777:o}' for p in paths}
    expected = {p.relative_to(folder).as_posix(): f'{(0o777 if p.is_dir() else 0o666) & ~int(umask, 8):o}' for p in paths}
    assert modes == expected
