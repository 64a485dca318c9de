"""What README shows is pasted and runs: Python, and the commands that make samples."""
import json
import os
import re
import shlex

import numpy as np
import pytest
import soundfile
from PIL import Image

from conftest import ROOT
from egmi.toybox.scenes import toybox
from stand_in import TOKEN

README = (ROOT/'README.md').read_text()
DRUM = 'a-big-blue-drum-on-the-beach'


def blocks(language):
    "What stands between the fences of a language."
    return re.findall(rf'^```{language}\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)


def find_block(text):
    "The one Python block that holds a text."
    block, = [block for block in blocks('python') if text in block]
    return block


def commands(*names):
    "The lines that call `egmi` by one of these names."
    lines = [line for block in blocks('sh') for line in block.splitlines()]
    return [line for line in lines if line.startswith(tuple(f'egmi {name} ' for name in names))]


def test_every_python_block_is_run_here():
    assert len(blocks('python')) == 2


@pytest.mark.slow
def test_making_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(find_block('out.save('), {})
    names = [f'{DRUM}-{seed}.{ending}' for seed in (0, 1) for ending in ('json', 'png', 'wav')]
    assert sorted(os.listdir('drums')) == names
    said = capsys.readouterr().out.splitlines()
    assert said == [f'a big blue drum on the beach {seed} (64, 64) (40960,)' for seed in (0, 1)]


@pytest.mark.slow
def test_sharing(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', TOKEN)  # as `hf auth login` leaves it
    namespace = {}
    exec(find_block('push_to_hub'), namespace)
    assert {*os.listdir('drummer')} == {*server.repos['owner/drummer']}
    assert 'model.safetensors' in server.loaded and namespace['egmi'].preset.name == 'mini'


@pytest.mark.slow
@pytest.mark.parametrize('line', [line for line in commands('generate', 'edit') if '--model' not in line])
def test_commands_make_samples(line, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'prompts.txt').write_text('a dog\na cat in the rain\n')
    Image.new('RGB', (64, 64), 'red').save('a.png')
    for name in ('b.wav', 'bell.wav'):
        soundfile.write(name, np.sin(np.arange(16_000) / 9) / 2, 16_000)
    words = shlex.split(line, comments=True)
    status, said, errors = command(*words[1:])
    assert (status, errors) == (0, [])
    manifest, = tmp_path.glob('*/manifest.jsonl')
    files = [name for text in manifest.read_text().splitlines() for name in json.loads(text)['files']]
    assert files and said.splitlines() == [f'{manifest.parent.name}/{name}' for name in files]


@pytest.mark.slow
def test_training_on_own_pictures(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'birds').mkdir()
    for i, scene in enumerate(toybox('train', 12)):
        scene.image.save(f'birds/{i}.png')
        (tmp_path/f'birds/{i}.txt').write_text(scene.caption)
    train, = [line for line in commands('train') if 'birds/' in line]
    generate, = [line for line in commands('generate') if '--model' in line]
    for line, short in ((train, ['--steps', '2', '--sampling-steps', '2']), (generate, ['--steps', '2'])):
        words = shlex.split(line, comments=True)
        status, _, errors = command(*words[1:], *short)
        assert (status, errors) == (0, [])
    assert {'progress.png', 'samples.png'} <= {*os.listdir('birdsong')}
    assert len(os.listdir('generated')) == 3
