"""From published weights in the documented places to a `paper` run that starts."""
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
from egmi.evaluation.outputs import load_networks
from egmi.frozen.weights import SOURCES, wanted_files
from egmi.model import load_generators, load_panda
from egmi.small.random_weights import TINY, write_weights

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
    for variable in ('EGMI_WEIGHTS', 'HF_HUB_CACHE'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('EGMI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    (tmp_path/'cache/weights').mkdir(parents=True)
    (tmp_path/'hub').mkdir()
    for path in written.glob('weights/*'):
        (tmp_path/'cache/weights'/path.name).symlink_to(path)
    for path in written.glob('hub/*'):
        (tmp_path/'hub'/path.name).symlink_to(path)
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    return tmp_path


def test_every_part_of_the_paper_preset_is_found_from_another_folder(user):
    panda = load_panda(PAPER)
    networks = load_networks(PAPER)
    stable_diffusion, audioldm = load_generators(PAPER)
    assert panda.llm.config.vocab_size == 401 and panda.encoder.config.embed_dim == 48
    assert stable_diffusion.unconditional.shape == (1, 77, 32)
    assert audioldm.unconditional.shape == (1, 32)
    for name in ('clip', 'clap'):
        assert networks[name].embed_texts(['a bell']).shape == (1, 32)
    for name in PAPER.classifiers.values():
        assert component_path(name) == str(user/'cache/weights'/name)


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
    for folder in (snapshot.parent, snapshot.parent.parent/'refs'):
        folder.mkdir(parents=True)
    (snapshot.parent.parent/'refs/main').write_text('0' * 40)
    snapshot.symlink_to(local.readlink())
    assert component_path(PAPER.llm) == str(local)
    local.unlink()
    assert component_path(PAPER.llm) == str(snapshot)
    assert load_panda(PAPER).llm.config.vocab_size == 401


# What is downloaded

GB = 10**9
KB = 10**3


def weights(stem, gigabytes, ends=('bin', 'safetensors')):
    "One file in several formats."
    return {f'{stem}.{end}': gigabytes * GB for end in ends}


def small(*names):
    "Configs and vocabularies."
    return dict.fromkeys(names, KB)


STABLE_DIFFUSION = {  # the mirror's files; GB of the full-precision ones
    **weights('unet/diffusion_pytorch_model', 3.44),
    **weights('unet/diffusion_pytorch_model.fp16', 1.72),
    **weights('unet/diffusion_pytorch_model.non_ema', 3.44),
    **weights('vae/diffusion_pytorch_model', .335),
    **weights('vae/diffusion_pytorch_model.fp16', .167),
    **weights('text_encoder/model', .492, ['safetensors']),
    **weights('text_encoder/model.fp16', .246, ['safetensors']),
    **weights('text_encoder/pytorch_model', .492, ['bin']),
    **weights('text_encoder/pytorch_model.fp16', .246, ['bin']),
    **weights('safety_checker/model', 1.2, ['safetensors']),
    **weights('safety_checker/pytorch_model', 1.2, ['bin']),
    **weights('v1-5-pruned', 7.7, ['ckpt', 'safetensors']),
    **weights('v1-5-pruned-emaonly', 4.27, ['ckpt', 'safetensors']),
    **small('model_index.json', 'README.md', 'v1-inference.yaml', 'scheduler/scheduler_config.json'),
    **small('feature_extractor/preprocessor_config.json', 'unet/config.json', 'vae/config.json'),
    **small('text_encoder/config.json', 'safety_checker/config.json'),
    **small('tokenizer/vocab.json', 'tokenizer/merges.txt', 'tokenizer/special_tokens_map.json'),
    **small('tokenizer/tokenizer_config.json')}
AUDIOLDM = {
    **weights('unet/diffusion_pytorch_model', 2.957),
    **weights('vae/diffusion_pytorch_model', .222),
    **weights('text_encoder/pytorch_model', .501, ['bin']),  # as they were before anybody converted them
    **weights('vocoder/pytorch_model', .221, ['bin']),
    **small('model_index.json', 'scheduler/scheduler_config.json'),
    **small('tokenizer/vocab.json', 'tokenizer/merges.txt'),
    **small('unet/config.json', 'vae/config.json', 'text_encoder/config.json', 'vocoder/config.json')}
SCORER = small('config.json', 'preprocessor_config.json', 'vocab.json', 'merges.txt', 'tokenizer.json',
               'tokenizer_config.json', 'special_tokens_map.json')
CLIP = {
    **weights('model', 1.71, ['safetensors']), **weights('pytorch_model', 1.71, ['bin']),
    **weights('flax_model', 1.71, ['msgpack']), **weights('tf_model', 1.71, ['h5']), **SCORER}
CLAP = {**weights('model', .615, ['safetensors']), **weights('pytorch_model', .615, ['bin']), **SCORER}
VICUNA = {
    **weights('pytorch_model-00001-of-00002', 9.98, ['bin']),
    **weights('pytorch_model-00002-of-00002', 3.5, ['bin']),
    **small('pytorch_model.bin.index.json', 'config.json', 'generation_config.json', 'tokenizer.model'),
    **small('tokenizer_config.json', 'special_tokens_map.json', 'README.md')}
SHARDED = {
    **VICUNA,
    **weights('model-00001-of-00002', 6.74, ['safetensors']),
    **weights('model-00002-of-00002', 6.74, ['safetensors']),
    **small('model.safetensors.index.json')}
PANDAGPT = {**weights('pytorch_model', .0755, ['pt']), **small('README.md', '.gitattributes')}
REPOSITORIES = {
    'Vision-CAIR/vicuna-7b': VICUNA, PAPER.pandagpt: PANDAGPT, PAPER.stable_diffusion: STABLE_DIFFUSION,
    PAPER.audioldm: AUDIOLDM, PAPER.clip: CLIP, PAPER.clap: CLAP}


@pytest.mark.parametrize('part, listed, gigabytes', [
    ('language model', VICUNA, 13.5), ('language model', SHARDED, 13.5),
    ('projection and LoRA', PANDAGPT, .08), ('Stable Diffusion', STABLE_DIFFUSION, 4.3),
    ('AudioLDM', AUDIOLDM, 3.9), ('CLIP', CLIP, 1.7), ('CLAP', CLAP, .6)],
    ids=lambda v: v if isinstance(v, str) else '')
def test_only_what_is_loaded_is_downloaded(part, listed, gigabytes):
    source = next(s for s in SOURCES if s.part == part)
    wanted = wanted_files(listed, source.files)
    assert sum(listed[name] for name in wanted) == pytest.approx(gigabytes * GB, rel=.06)
    assert source.gigabytes == gigabytes
    assert not [name for name in wanted if re.search(r'fp16|non_ema|ckpt|h5$|msgpack|safety|README', name)]
    found = [name for name in wanted if name.endswith(('.bin', '.safetensors'))]
    formats = {(os.path.dirname(name), name.rpartition('.')[2]) for name in found}
    assert len({folder for folder, _ in formats}) == len(formats)


class Hub(BaseHTTPRequestHandler):
    "The hub and the other addresses, with small files of the published names; AudioLDM's repository is down."
    protocol_version = 'HTTP/1.1'
    served = []

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        headers = {'Content-Length': len(body), 'X-Repo-Commit': '1' * 40, **headers}
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split('?')[0].removeprefix('/')
        repository = next((id for id in REPOSITORIES if f'{id}/' in f'{path}/'), None)
        if repository == PAPER.audioldm:
            self.answer(b'', 500)
        elif path.startswith('api/'):
            self.answer_api(path, repository)
        else:
            self.answer_file(path, repository)

    do_HEAD = do_GET

    def answer_api(self, path, repository):
        "The list of a repository's files, in either form."
        if not repository:
            return self.answer(b'', 404)
        names = REPOSITORIES[repository]
        if '/tree/' in path:
            found = [dict(type='file', path=name, size=len(content(name)), oid=sha1(name)) for name in names]
        else:
            found = dict(id=repository, sha='1' * 40, siblings=[dict(rfilename=name) for name in names])
        self.answer(json.dumps(found).encode(), Content_Type='application/json')

    def answer_file(self, path, repository):
        name = path.split('/resolve/')[1].split('/', 1)[1] if repository else path
        if self.command == 'GET':
            self.served.append(f'{repository or "file"}/{name}')
        self.answer(content(name), ETag=f'"{sha1(name)}"', Accept_Ranges='bytes')


def sha1(name):
    return hashlib.sha1(name.encode()).hexdigest()


def content(name):
    "What a file of this name holds here."
    if name.endswith('.index.json'):
        places = {str(i): f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)}
        return json.dumps(dict(weight_map=places)).encode()
    if name.endswith('.json'):
        return json.dumps(dict(name=name)).encode()
    if name.endswith('.safetensors'):
        return safetensors.torch.save({name: torch.zeros(1)})
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
    if not s.url:
        return s
    body = f'\\x80 this is {s.id}'.encode('latin-1')
    sha256 = hashlib.sha256(body).hexdigest()
    return replace(s, url=f'{sys.argv[1]}/{s.id}', bytes=len(body), sha256=sha256)

egmi.frozen.weights.SOURCES = tuple(map(here, egmi.frozen.weights.SOURCES))
sys.exit(not egmi.frozen.weights.list_weights('paper', fetch=True))
'''


def test_download_goes_on_after_a_source_that_fails(hub, tmp_path):
    by_hand = tmp_path/'cache/weights'/PAPER.clap
    by_hand.mkdir(parents=True)
    for name in CLAP:
        (by_hand/name).write_bytes(content(name))
    begun = tmp_path/'cache/weights'/PAPER.pandagpt
    begun.mkdir(parents=True)
    variables = dict(
        HF_ENDPOINT=hub, HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path/'hf'), HF_HUB_DISABLE_XET='1')
    process = subprocess.run(
        [sys.executable, '-c', DOWNLOAD, hub], cwd=tmp_path, env=environment(tmp_path/'cache', **variables),
        capture_output=True, text=True, timeout=300)
    assert process.returncode == 1, process.stderr[-3000:]
    missing = process.stdout.split('Missing')[1].splitlines()[1:]
    assert len(missing) == 1 and missing[0].startswith('AudioLDM: cvssp/audioldm-l-full is missing')
    assert re.search(r'^AudioLDM: .*500', process.stderr, re.MULTILINE)
    assert (begun/'pytorch_model.pt').exists()  # completed where it lies
    for repository, listed in REPOSITORIES.items():
        source = next(s for s in SOURCES if s.hub == repository)
        start = f'{repository}/'
        came = {name.removeprefix(start) for name in Hub.served if name.startswith(start)}
        is_skipped = repository in (PAPER.clap, PAPER.audioldm)
        assert came == (set() if is_skipped else wanted_files(listed, source.files)), repository
    files = {name for name in Hub.served if name.startswith('file/')}
    assert files == {f'file/{s.id}' for s in SOURCES if s.url}


# merge-vicuna

def test_merge_vicuna_hands_over_its_folders(monkeypatch, command):
    asked = []
    monkeypatch.setattr(egmi.frozen.vicuna, 'merge_vicuna', lambda *folders: asked.append(folders))
    assert command('weights', 'merge-vicuna', '--llama', 'a', '--delta', 'b', '--out', 'c') == (0, '', [])
    assert asked == [('a', 'b', 'c')]


@pytest.mark.parametrize('options', [[], ['--llama', 'a'], ['--llama', 'a', '--delta', 'b']], ids=len)
def test_merge_vicuna_names_what_it_needs(options, command):
    message = 'egmi: merge-vicuna needs --llama DIR, --delta DIR and --out DIR'
    assert command('weights', 'merge-vicuna', *options) == (2, '', [message])


# papermill, word for word

def test_papermill_on_a_terminal_asks_for_the_output_path(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.run(
        [sys.executable, '-m', 'papermill', NOTEBOOK], cwd=tmp_path, env=environment(tmp_path/'cache'),
        stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = os.read(ours, 10_000).decode().strip().splitlines()
    os.close(ours)
    assert process.returncode
    assert said[-1].strip() == "Error: Missing argument 'OUTPUT_PATH'"
    assert not os.listdir(tmp_path)
