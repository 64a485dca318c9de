"""From published weights in the documented places to a `paper` run that starts: look-up, downloads, papermill."""
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch

from conftest import NOTEBOOK, environment

import egmi.frozen.vicuna
from egmi.base.config import component_path, get_preset
from egmi.evaluation.scoring import Scorer
from egmi.model import load_generators, load_panda
from egmi.small.rehearsal import TINY, write_weights
from egmi.frozen.weights import SOURCES, main, wanted_files

PAPER = get_preset('paper')


# Look-up

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Tiny random weights under the published names."
    folder = tmp_path_factory.mktemp('written')/'all'
    write_weights(TINY, folder)
    return folder


@pytest.fixture
def user(written, tmp_path, monkeypatch):
    "The weights where a user's lie, in the default places, and a working folder that is none of them."
    for variable in ('EGMI_WEIGHTS', 'HF_HUB_CACHE'): monkeypatch.delenv(variable)
    monkeypatch.setenv('EGMI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache/weights').mkdir()
    (tmp_path/'hub').mkdir()
    for path in written.glob('weights/*'): (tmp_path/'cache/weights'/path.name).symlink_to(path)
    for path in written.glob('hub/*'): (tmp_path/'hub'/path.name).symlink_to(path)
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    return tmp_path


def test_every_part_of_the_paper_preset_is_found_from_another_folder(user):
    panda, scorer, (stable_diffusion, audioldm) = load_panda(PAPER), Scorer(PAPER), load_generators(PAPER)
    assert panda.llm.config.vocab_size == 401 and panda.encoder.config.embed_dim == 48
    assert stable_diffusion.unconditional.shape == (1, 77, 32) and audioldm.unconditional.shape == (1, 32)
    assert scorer.clip.embed_texts(['a bell']).shape == scorer.clap.embed_texts(['a bell']).shape == (1, 32)
    for name in PAPER.listeners.values(): assert component_path(name) == str(user/'cache/weights'/name)


def test_a_hub_id_copied_by_hand_comes_first(user):
    by_hand = user/'cache/weights'/PAPER.clip
    assert component_path(PAPER.clip).startswith(str(user/'hub'))
    by_hand.parent.mkdir()
    by_hand.symlink_to(component_path(PAPER.clip))
    assert component_path(PAPER.clip) == str(by_hand)


def test_vicuna_of_the_weights_folder_comes_before_that_of_the_hub(user):
    local = user/'cache/weights/vicuna-7b-v0'
    assert component_path(PAPER.llm) == str(local)
    snapshot = user/'hub/models--Vision-CAIR--vicuna-7b/snapshots'/('0' * 40)
    for folder in (snapshot.parent, snapshot.parent.parent/'refs'): folder.mkdir(parents=True)
    (snapshot.parent.parent/'refs/main').write_text('0' * 40)
    snapshot.symlink_to(local.readlink())
    assert component_path(PAPER.llm) == str(local)
    local.unlink()
    assert component_path(PAPER.llm) == str(snapshot)
    assert load_panda(PAPER).llm.config.vocab_size == 401


# What is downloaded

GB, KB = 10**9, 10**3
STABLE_DIFFUSION = {  # the mirror's files; GB of the full-precision ones
    **{f'unet/diffusion_pytorch_model{kind}.{end}': share * GB for kind, share in (('', 3.44), ('.fp16', 1.72), ('.non_ema', 3.44)) for end in ('bin', 'safetensors')},
    **{f'vae/diffusion_pytorch_model{kind}.{end}': share * GB for kind, share in (('', .335), ('.fp16', .167)) for end in ('bin', 'safetensors')},
    **{f'text_encoder/{stem}': share * GB for stem, share in (('model.safetensors', .492), ('model.fp16.safetensors', .246), ('pytorch_model.bin', .492), ('pytorch_model.fp16.bin', .246))},
    **{f'safety_checker/{stem}': 1.2 * GB for stem in ('model.safetensors', 'pytorch_model.bin')},
    **{f'v1-5-pruned{kind}.{end}': share * GB for kind, share in (('', 7.7), ('-emaonly', 4.27)) for end in ('ckpt', 'safetensors')},
    **{name: KB for name in ('model_index.json', 'README.md', 'v1-inference.yaml', 'scheduler/scheduler_config.json', 'feature_extractor/preprocessor_config.json',
                             *(f'{part}/config.json' for part in ('unet', 'vae', 'text_encoder', 'safety_checker')),
                             *(f'tokenizer/{name}' for name in ('vocab.json', 'merges.txt', 'special_tokens_map.json', 'tokenizer_config.json')))}}
AUDIOLDM = {**{f'{part}.{end}': size * GB for part, size in (('unet/diffusion_pytorch_model', 2.957), ('vae/diffusion_pytorch_model', .222)) for end in ('bin', 'safetensors')},
            'text_encoder/pytorch_model.bin': .501 * GB, 'vocoder/pytorch_model.bin': .221 * GB,  # as they were before anybody converted them
            **{name: KB for name in ('model_index.json', 'scheduler/scheduler_config.json', 'tokenizer/vocab.json', 'tokenizer/merges.txt',
                                     *(f'{part}/config.json' for part in ('unet', 'vae', 'text_encoder', 'vocoder')))}}
SCORER = ('config.json', 'preprocessor_config.json', 'vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json')
CLIP = {**dict.fromkeys(('model.safetensors', 'pytorch_model.bin', 'flax_model.msgpack', 'tf_model.h5'), 1.71 * GB), **dict.fromkeys(SCORER, KB)}
CLAP = {**dict.fromkeys(('model.safetensors', 'pytorch_model.bin'), .615 * GB), **dict.fromkeys(SCORER, KB)}
VICUNA = {'pytorch_model-00001-of-00002.bin': 9.98 * GB, 'pytorch_model-00002-of-00002.bin': 3.5 * GB,
          **dict.fromkeys(('pytorch_model.bin.index.json', 'config.json', 'generation_config.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'README.md'), KB)}
SHARDED = {**VICUNA, **{f'model-0000{i}-of-00002.safetensors': 6.74 * GB for i in (1, 2)}, 'model.safetensors.index.json': KB}
PANDAGPT = {'pytorch_model.pt': .0755 * GB, 'README.md': KB, '.gitattributes': KB}
REPOSITORIES = {'Vision-CAIR/vicuna-7b': VICUNA, PAPER.pandagpt: PANDAGPT, PAPER.stable_diffusion: STABLE_DIFFUSION, PAPER.audioldm: AUDIOLDM,
                PAPER.clip: CLIP, PAPER.clap: CLAP}


@pytest.mark.parametrize('part, listed, gigabytes', [
    ('language model', VICUNA, 13.5), ('language model', SHARDED, 13.5), ('projection and LoRA', PANDAGPT, .08), ('Stable Diffusion', STABLE_DIFFUSION, 4.3),
    ('AudioLDM', AUDIOLDM, 3.9), ('CLIP', CLIP, 1.7), ('CLAP', CLAP, .6)], ids=lambda v: v if isinstance(v, str) else '')
def test_only_what_is_loaded_is_downloaded(part, listed, gigabytes):
    source = next(s for s in SOURCES if s.part == part)
    wanted = wanted_files(listed, source.files)
    assert sum(listed[name] for name in wanted) == pytest.approx(gigabytes * GB, rel=.06) and source.gigabytes == gigabytes
    assert not [name for name in wanted if re.search(r'fp16|non_ema|ckpt|h5$|msgpack|safety|README', name)]
    weights = [name for name in wanted if name.endswith(('.bin', '.safetensors'))]
    assert len({os.path.dirname(name) for name in weights}) == len({(os.path.dirname(name), name.rpartition('.')[2]) for name in weights})


class Hub(BaseHTTPRequestHandler):
    "The hub and the other addresses, with small files of the published names; AudioLDM's repository is down."
    protocol_version = 'HTTP/1.1'
    served = []

    def log_message(self, *args): pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {'Content-Length': len(body), 'X-Repo-Commit': '1' * 40, **headers}.items(): self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_GET(self):
        path = self.path.split('?')[0].removeprefix('/')
        repository = next((id for id in REPOSITORIES if f'{id}/' in f'{path}/'), None)
        if repository == PAPER.audioldm: return self.answer(b'', 500)
        if path.startswith('api/') and not repository: return self.answer(b'', 404)
        if path.startswith('api/') and '/tree/' in path:
            entries = [dict(type='file', path=name, size=len(content(name)), oid=hashlib.sha1(name.encode()).hexdigest()) for name in REPOSITORIES[repository]]
            return self.answer(json.dumps(entries).encode(), Content_Type='application/json')
        if path.startswith('api/'):
            info = dict(id=repository, sha='1' * 40, siblings=[dict(rfilename=name) for name in REPOSITORIES[repository]])
            return self.answer(json.dumps(info).encode(), Content_Type='application/json')
        name = path.split('/resolve/')[1].split('/', 1)[1] if repository else path
        if self.command == 'GET': self.served.append(f'{repository or "file"}/{name}')
        self.answer(content(name), ETag=f'"{hashlib.sha1(name.encode()).hexdigest()}"', Accept_Ranges='bytes')

    do_HEAD = do_GET


def content(name):
    "What a file of this name holds here."
    if name.endswith('.index.json'): return json.dumps(dict(weight_map={str(i): f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)})).encode()
    if name.endswith('.json'): return json.dumps(dict(name=name)).encode()
    if name.endswith('.safetensors'): return safetensors.torch.save({name: torch.zeros(1)})
    return f'\x80 this is {name}'.encode('latin-1')


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


DOWNLOAD = '''
import hashlib, sys
import egmi.frozen.weights
from dataclasses import replace
def here(s):
    body = f'\\x80 this is {s.id}'.encode('latin-1')
    return replace(s, url=f'{sys.argv[1]}/{s.id}', bytes=len(body), sha256=hashlib.sha256(body).hexdigest()) if s.url else s
egmi.frozen.weights.SOURCES = tuple(map(here, egmi.frozen.weights.SOURCES))
egmi.frozen.weights.main('paper', download=True)
'''


def test_download_goes_on_after_a_source_that_fails(hub, tmp_path):
    by_hand = tmp_path/'cache/weights'/PAPER.clap
    by_hand.mkdir(parents=True)
    for name in CLAP: (by_hand/name).write_bytes(content(name))
    begun = tmp_path/'cache/weights'/PAPER.pandagpt
    begun.mkdir(parents=True)
    variables = dict(HF_ENDPOINT=hub, HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path/'hf'), HF_HUB_DISABLE_XET='1')
    command = [sys.executable, '-c', DOWNLOAD, hub]
    process = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path/'cache', **variables), capture_output=True, text=True, timeout=300)
    assert process.returncode == 1, process.stderr[-3000:]
    missing = process.stdout.split('Missing')[1].splitlines()[1:]
    assert len(missing) == 1 and missing[0].startswith('AudioLDM: cvssp/audioldm-l-full is missing')
    assert re.search(r'^AudioLDM: .*500', process.stderr, re.MULTILINE)
    assert (begun/'pytorch_model.pt').exists()  # completed where it lies
    for repository, listed in REPOSITORIES.items():
        source = next(s for s in SOURCES if s.hub == repository)
        came = {name.removeprefix(f'{repository}/') for name in Hub.served if name.startswith(f'{repository}/')}
        assert came == (set() if repository in (PAPER.clap, PAPER.audioldm) else wanted_files(listed, source.files)), repository
    assert {name for name in Hub.served if name.startswith('file/')} == {f'file/{s.id}' for s in SOURCES if s.url}


# merge-vicuna

def test_merge_vicuna_hands_over_its_folders(monkeypatch):
    asked = []
    monkeypatch.setattr(egmi.frozen.vicuna, 'merge_vicuna', lambda *folders: asked.append(folders))
    main('merge-vicuna', llama='a', delta='b', out='c')
    assert asked == [('a', 'b', 'c')]


@pytest.mark.parametrize('options', [{}, dict(llama='a'), dict(llama='a', delta='b')], ids=len)
def test_merge_vicuna_names_what_it_needs(options):
    with pytest.raises(SystemExit, match='^egmi-weights: merge-vicuna needs --llama DIR, --delta DIR and --out DIR$'): main('merge-vicuna', **options)


# papermill, word for word

def test_papermill_on_a_terminal_asks_for_the_output_path(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.run([sys.executable, '-m', 'papermill', NOTEBOOK], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(tmp_path/'cache'))
    os.close(theirs)
    said = os.read(ours, 10_000).decode().strip().splitlines()
    os.close(ours)
    assert process.returncode and said[-1].strip() == "Error: Missing argument 'OUTPUT_PATH'" and not os.listdir(tmp_path)
