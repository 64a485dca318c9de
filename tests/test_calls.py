"""0 is 0, prompts in any form, a cache that mends itself, files in their place and for everybody."""
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

from egmi.toybox.scenes import toybox
from egmi.evaluation.experiment import made_once
from egmi.base.fitting import FitConfig, fit, in_batches
from egmi.evaluation.folders import embed_sounds, read_pairs
from egmi.small.corpus import render_corpus
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
    def bell(**given): return egmi.generate('a bell', **given, **seeded())
    def picture(scale): return np.asarray(bell(outputs='image', guidance_image=scale).images[0])
    def sound(scale): return bell(outputs='audio', guidance_audio=scale).audio
    def edit(scale): return egmi.edit('a bell', scene.audio, 16000, guidance_scale=scale, **seeded()).audio
    for make in (picture, sound, edit):
        assert np.array_equal(make(0), make(1)) and np.array_equal(make(-3), make(1))  # as diffusers has it
        assert not np.array_equal(make(0), make(None))


NO_COUNTS, NO_NUMBERS = (0, -1, 1.5, True, '4'), ('3', True, float('nan'))


@pytest.mark.parametrize('call, name, bad', [
    *[(call, 'steps', bad) for call in ('generate', 'edit') for bad in NO_COUNTS],
    *[('generate', 'max_new_tokens', bad) for bad in NO_COUNTS],
    *[('generate', name, bad) for name in ('guidance_image', 'guidance_audio') for bad in NO_NUMBERS],
    *[('edit', 'guidance_scale', bad) for bad in NO_NUMBERS],
    *[('edit', 'strength', bad) for bad in ('.5', True, float('nan'), -.1)],
    *[(call, 'sample_rate', bad) for call in ('generate', 'edit') for bad in (0, -16000, 16, .5, '16000', True)],
], ids=lambda value: repr(value))
def test_numbers_are_refused_by_name_before_any_work(call, name, bad, egmi, scene, monkeypatch):
    for work in ('prefix', 'image_features', 'audio_features'): monkeypatch.setattr(egmi.panda, work, None)
    given = dict(text='a bell', audio=scene.audio, sample_rate=16000) | {name: bad}
    with pytest.raises(ValueError, match=rf'^{name} must .* not {bad!r}$'): getattr(egmi, call)(**given)


@pytest.mark.parametrize('wave, message', [
    (lambda wave: wave * np.nan, 'sound 0 holds NaN'), (lambda wave: wave * 2**15, 'sound 0 has a peak of'),
    (lambda wave: wave[:0], 'sound 0 has zero length')], ids=['nan', 'cast', 'empty'])
def test_the_lower_edit_reads_waveforms_as_the_upper_does(wave, message, egmi, scene):
    clap_BC = egmi.audioldm.unconditional
    with pytest.raises(ValueError, match=message): egmi.audioldm.edit(clap_BC, [wave(scene.audio)])
    in_16_bits = (scene.audio * 2**15).astype(np.int16)
    one, two = (egmi.audioldm.edit(clap_BC, [x], 0., progress=False) for x in (in_16_bits, scene.audio))
    np.testing.assert_allclose(np.abs(one).max(), np.abs(two).max(), rtol=.05)


def test_lower_floors_refuse_them_too(egmi):
    draw, edit, play = egmi.stable_diffusion.generate, egmi.audioldm.edit, egmi.audioldm.generate
    clip_BLC, clap_BC = egmi.stable_diffusion.unconditional, egmi.audioldm.unconditional
    wave_BT = np.zeros((1, 16000))
    for bad in NO_COUNTS:
        for name in ('steps', 'batch_size'):
            message = rf'^{name} must be a whole number of 1 or more, not {bad!r}$'
            with pytest.raises(ValueError, match=message): draw(clip_BLC, **{name: bad})
            with pytest.raises(ValueError, match=message): edit(clap_BC, wave_BT, **{name: bad})
        with pytest.raises(ValueError, match='^batch_size must'): in_batches(len, 3, bad)  # 0 never ended
    with pytest.raises(ValueError, match='^a sound of 0 seconds has no samples$'): play(clap_BC, 0)
    with pytest.raises(ValueError, match='nothing to generate'): draw(clip_BLC[:0])


# One or many

def type_name(value): return value if isinstance(value, str) else type(value).__name__


SAID = ['a bell', 'two birds', 'a drum in the rain']


@pytest.mark.parametrize('given', [
    SAID, tuple(SAID), (text for text in SAID), map(str, SAID), dict(enumerate(SAID)).values(),
    np.array(SAID), np.array(SAID, dtype=object), pd.Index(SAID), pd.Series(SAID),
    pd.Series(SAID, index=[7, 3, 3]), pd.Series(SAID, dtype='string'), pd.Series(SAID, dtype='category'),
], ids=type_name)
def test_texts_in_any_form(given, egmi):
    assert egmi.prompts(given, None, None, None) == (SAID, [None] * 3)


def test_a_string_is_one_text(egmi):
    for text in ('a bell', np.str_('a bell')): assert len(egmi.conditions(text)) == 1
    out = egmi.generate(pd.Series(SAID[:2], index=[9, 9]), outputs='audio', **seeded())
    assert out.images is None and out.audio.shape[0] == 2


@pytest.mark.parametrize('given, message', [
    (5, ', not 5'), (float('nan'), ', not nan'), (b'bell', ", not b'bell'"), ({'bell'}, ", not {'bell'}"),
    (dict(a='bell'), ", not {'a': 'bell'}"), (np.array([SAID]), ', not ndarray of shape [1, 3]'),
    (pd.DataFrame(dict(caption=SAID)), ', not DataFrame of shape [3, 1]'), (['bell', None], ' 1, not None'),
    (['bell', 5], ' 1, not 5'), ([['bell']], " 0, not ['bell']"), (iter([b'']), " 0, not b''"),
    (pd.Series(['bell', float('nan')]), ' 1, not nan'),
    (pd.Series(['bell', None], dtype='string'), ' 1, not <NA>'),
], ids=type_name)
def test_what_is_no_text_is_named(given, message, egmi):
    place, what = message.split(', ', 1)
    with pytest.raises(TypeError) as error: egmi.generate(given)
    assert str(error.value) == f'text{place} must be a string, {what}'


@pytest.mark.parametrize('nothing', [[], (), iter([]), np.array([], str), pd.Series([], dtype=object)], ids=type_name)
def test_nothing_to_generate(nothing, egmi):
    message = '^there is nothing to generate: text is empty$'
    with pytest.raises(ValueError, match=message): egmi.generate(nothing)


def test_pictures_and_sounds_in_any_form(egmi):
    scenes = toybox('test', 2)
    pictures, sounds = [s.image for s in scenes], [s.audio for s in scenes]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    def features(images=None, audio=None): return torch.stack(egmi.prompts(None, images, audio, 16000)[1])
    for given in (tuple(pictures), iter(pictures), pd.Series(pictures, index=[5, 5]), list(pixels), pixels):
        assert torch.equal(features(given), features(pictures))
    for given in (tuple(sounds), iter(sounds), pd.Series(sounds, index=[5, 5])):
        assert torch.equal(features(audio=given), features(audio=sounds))
    assert len(features(pixels[0])) == len(features(pictures[0])) == len(features(audio=sounds[0])) == 1
    with pytest.raises(TypeError, match="^images 1 .*'bell.png'"): features([pictures[0], 'bell.png'])
    for one in (sounds[0][None], torch.tensor(sounds[0])[None], sounds[0].tolist()):
        assert torch.equal(features(audio=one), features(audio=sounds[:1]))
    assert len(features(audio=np.stack(sounds[:1] * 9)[:, :4000])) == 9
    with pytest.raises(ValueError, match='may be 2 sounds or one with 2'):
        features(audio=np.stack(sounds[:1] * 2))
    with pytest.raises(TypeError, match="^audio .*'bell.wav'"): features(audio='bell.wav')


def test_sounds_to_edit_in_any_form(egmi, scene):
    expected = egmi.edit(SAID[:2], [scene.audio] * 2, 16000, **seeded()).audio
    texts, sounds = pd.Series(SAID[:2], index=[4, 4]), itertools.repeat(scene.audio, 2)
    again = egmi.edit(texts, sounds, 16000, **seeded()).audio
    assert np.array_equal(expected, again)
    for nothing in ([], None):
        with pytest.raises(ValueError, match='^there is nothing to edit'): egmi.edit('', nothing, 16000)


@pytest.mark.parametrize('outputs, message', [
    ('images', r"^unknown outputs \['images'\]: choose from text, image, audio$"),
    (['audio', 'video'], r"^unknown outputs \['video'\]"), ((), '^no outputs are wanted'),
], ids=type_name)
def test_outputs_that_there_are_not(outputs, message, egmi):
    with pytest.raises(ValueError, match=message): egmi.generate('a bell', outputs=outputs)


# The cache mends itself

def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == 'empty': data.clear()
    if kind == 'cut': data.pop()
    if kind == 'garbage': data = bytes(len(data))
    if kind == 'flipped': data[len(data) // 2] ^= 1
    path.write_bytes(data)


def arrays(folder):
    return lambda: made_once(folder/'made.npz', lambda: dict(x=np.arange(1000)))['x'].sum()


def training(folder):
    def run():
        torch.manual_seed(0)
        model, config = torch.nn.Linear(64, 1), FitConfig(steps=4, batch_size=2)
        def loss_fn(step): return model(torch.ones(2, 64)).square().mean()
        return fit(model, loss_fn, config, folder/'fit.pt')[-1]
    return run


def encoder(seed):
    "Stands in for a generator: embeddings that depend on the captions' lengths."
    torch.manual_seed(seed)
    def encode_text(texts): return torch.tensor([[len(text) + seed] * 50 for text in texts]).float()
    return SimpleNamespace(text_encoder=torch.nn.Linear(2, 2), encode_text=encode_text)


def targets(folder):
    def run():
        stored = stored_targets(encoder(0), encoder(1), SAID * 20, folder, shard_size=40, progress=False)
        return float(stored[range(60)].audio.sum())
    return run


def features(folder):
    for kind in ('real', 'made'):
        (folder.parent/kind).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).normal(0, .1, 40960)
            soundfile.write(folder.parent/kind/f'{i}.wav', noise, 16000)
    sounds = read_pairs(folder.parent/'real', folder.parent/'made', progress=False)[0]
    def run():
        heard = embed_sounds(sounds, dict(judge='judge/sound'), progress=False)
        return round(float(heard['features'].sum()), 2)
    return run


def scenes(folder):
    return lambda: int(np.sum(render_corpus('train', 4).waves_NT, dtype=int))


CHECKED = [(arrays, 'made.npz'), (training, 'fit.pt'), (features, 'sounds/*/*.npz')]
MAPPED = [(targets, '*.clap.npy'), (scenes, 'toybox/*/waves.npy')]  # no checksums, but lengths


@pytest.mark.parametrize('cached, pattern, kind', [
    *[(*case, kind) for case in CHECKED + MAPPED for kind in ('empty', 'cut', 'garbage')],
    *[(*case, 'flipped') for case in CHECKED],
], ids=lambda value: getattr(value, '__name__', value))
def test_damaged_file_is_named_and_made_again(cached, pattern, kind, tmp_path, monkeypatch):
    folder = tmp_path/'cache'
    folder.mkdir()
    monkeypatch.setenv('EGMI_CACHE', str(folder))
    run = cached(folder)
    whole = run()
    path = sorted(folder.glob(pattern))[0]
    damage(path, kind)
    with pytest.warns(UserWarning, match=r'is damaged \(.*\): deleted, to be made again') as said:
        assert run() == whole
    assert len(said) == 1 and str(path).startswith(str(said[0].message).split(' is damaged')[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run() == whole
    assert not [p for p in folder.rglob('.*')]


def test_seconds_of_earlier_runs(tmp_path):
    from egmi.evaluation.experiment import kept_seconds
    for text in ('', '{"training": 1', '[]', 'null'):
        (tmp_path/'seconds.json').write_text(text)
        with pytest.warns(UserWarning, match='seconds.json is damaged'): assert kept_seconds(tmp_path) == {}
        assert not (tmp_path/'seconds.json').exists()


def test_a_file_that_may_not_be_read_is_kept(tmp_path):
    from egmi.base.files import read_kept
    (tmp_path/'a').write_text('whole')
    for error in (PermissionError, OSError, MemoryError):
        def read(path): raise error
        with pytest.raises(error): read_kept(tmp_path/'a', read)
    assert (tmp_path/'a').read_text() == 'whole'


def test_checkpoint_of_another_run_is_an_error_and_stays(tmp_path):
    training(tmp_path)()
    path, before = tmp_path/'fit.pt', (tmp_path/'fit.pt').read_bytes()
    for width, steps, what in ((64, 5, 'steps'), (8, 4, 'model')):
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
    (left,) = tmp_path.iterdir()
    code = 'import sys; from egmi.base.files import write_json; write_json(sys.argv[1], {})'
    write = [sys.executable, '-c', code, tmp_path/'b.json']
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
    def contents(): return {p: hashlib.sha256(p.read_bytes()).digest() for p in site.rglob('*') if p.is_file()}
    before = contents()
    (tmp_path/'elsewhere').mkdir()
    sizes = ['--steps', '1', '--batch_size', '2', '--n_scenes', '4']
    command = [sys.executable, '-m', 'egmi.small.judge', '--device', 'cpu', '--onward', *sizes]
    variables = environment(tmp_path/'cache', PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE='1')
    options = dict(cwd=tmp_path/'elsewhere', env=variables, capture_output=True, text=True)
    process = subprocess.run(command, **options)
    assert process.returncode == 0, process.stderr[-3000:]
    assert contents() == before
    made = json.loads((tmp_path/'elsewhere/weights/judge/training.json').read_text())
    assert {part for part, run in made.items() if run['onward_from']['steps'] > 1} == {'picture', 'sound'}
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
from egmi.base.files import write_json
from egmi.evaluation.experiment import made_once
from egmi.base.fitting import FitConfig, fit
from egmi.frozen.imagebind import ImageBind, ImageBindConfig, TowerConfig
from egmi.mapper import EGMIMapper, MapperConfig
from egmi.small.corpus import render_corpus
from egmi.evaluation.judge import Judge
from egmi.small.publishing import Making, publish
from egmi.model import save_conditioner
from egmi.base.files import write_table
from egmi.tokens import ModalityTokens
from egmi.training import Conditioner
import pandas as pd

sizes = dict(d_llm=8, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8)
mapper = EGMIMapper(MapperConfig(**sizes, n_queries=2, d_clip=4, d_clap=4))
tokens = ModalityTokens.from_embedding(torch.randn(40, 8))
save_conditioner(Conditioner(tokens, mapper), folder/'egmi', 'EGMI mapper', 'mini')
mapper.save_pretrained(folder/'mapper')
tower = TowerConfig(16, 1, 1)
towers = dict(vision=tower, audio=tower, text=tower)
ImageBind(ImageBindConfig(embed_dim=8, **towers, vocab=20, eos_id=19)).save_pretrained(folder/'imagebind')
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
    usual = {True: 0o777 & ~int(umask, 8), False: 0o666 & ~int(umask, 8)}
    modes = {str(p): oct(p.stat().st_mode & 0o777) for p in paths}
    assert modes == {str(p): oct(usual[p.is_dir()]) for p in paths}
