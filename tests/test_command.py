"""The command `egmi`: help at once, files by prompt and seed, one line for every wrong use."""
import configparser
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT, environment

from egmi import __version__
from egmi.base.config import MINI
from egmi.commands import generate
from egmi.commands.command import app
from egmi.model import EGMI

COMMANDS = ['generate', 'edit', 'train', 'evaluate', 'weights', 'ablation', 'text-to-audio', 'audio-editing']
HEAVY = {
    'torch', 'transformers', 'diffusers', 'accelerate', 'huggingface_hub', 'numpy', 'pandas', 'scipy', 'PIL',
    'datasets', 'soundfile', 'matplotlib', 'IPython', 'papermill', 'fastcore'}
LOADED = """
import json, sys
from egmi.commands.command import main
for command in sys.argv[1:]:
    sys.argv = ['egmi', *command.split()]
    main()
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))
"""


# Help and version

def loaded_by(*commands):
    "The packages that a fresh process holds after these commands."
    process = subprocess.run(
        [sys.executable, '-c', LOADED, *commands], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(json.loads(process.stdout.splitlines()[-1]))


def test_help_loads_nothing_that_takes_long():
    found = loaded_by('', '--help', '--version', *[f'{command} --help' for command in COMMANDS])
    assert {'egmi', 'typer'} <= found
    assert found & HEAVY == set()


def test_a_package_that_takes_long_would_be_seen():
    assert {'torch', 'numpy'} <= loaded_by('train --dry-run')


def test_help_lists_the_commands(command):
    status, said, errors = command('--help')
    listed = [line.split()[0] for line in said.partition('Commands:\n')[2].splitlines()]
    assert (status, listed, errors) == (0, COMMANDS, [])
    assert command() == (0, said, [])


def test_version_and_module(tmp_path):
    process = subprocess.run(
        [sys.executable, '-m', 'egmi', '--version'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert process.stdout == f'egmi {__version__}\n'


def test_it_is_installed():
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini')
    assert settings['DEFAULT']['console_scripts'] == 'egmi=egmi.commands.command:main'


# Making samples

@pytest.fixture(scope='module')
def mini():
    return EGMI.from_pretrained('mini', 'cpu')


@pytest.fixture
def loaded(mini, monkeypatch):
    "The commands find the models loaded."
    monkeypatch.setattr(generate, 'load', lambda *options: mini)
    return mini


def read_manifest(folder):
    return [json.loads(line) for line in (folder/'manifest.jsonl').read_text('utf-8').splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_file_is_what_python_makes_of_prompt_and_seed(loaded, command, tmp_path):
    status, said, errors = command('generate', 'a dog', '--seed', 7, '--steps', 2, '--out', tmp_path)
    assert (status, errors) == (0, [])
    assert said.splitlines() == [f'{tmp_path}/a-dog-7.png', f'{tmp_path}/a-dog-7.wav']
    made = loaded.generate('a dog', seed=7, steps=2)
    np.testing.assert_array_equal(pixels(tmp_path/'a-dog-7.png'), np.asarray(made.images[0]))
    wave, rate = soundfile.read(tmp_path/'a-dog-7.wav', dtype='float32')
    np.testing.assert_array_equal(wave, made.audio[0])
    assert rate == made.sample_rate
    line, = read_manifest(tmp_path)
    assert line == dict(
        files=['a-dog-7.png', 'a-dog-7.wav'], prompt='a dog', image=None, audio=None, seed=7,
        outputs=['image', 'audio'], steps=2, seconds=None, model='mini', egmi=__version__)


def test_neighbours_and_batches_change_nothing(loaded, command, tmp_path, monkeypatch):
    options = ['--steps', 2, '--outputs', 'image']
    command('generate', 'a dog', '--seed', 4, *options, '--out', tmp_path/'alone')
    monkeypatch.setattr(loaded, 'preset', replace(loaded.preset, sampling_batch=4))
    command('generate', 'a bell', 'a dog', '--samples', 3, '--seed', 2, *options, '--out', tmp_path/'many')
    names = [f'{thing}-{seed}.png' for thing in ('a-bell', 'a-dog') for seed in (2, 3, 4)]
    assert [line['files'] for line in read_manifest(tmp_path/'many')] == [[name] for name in names]
    files = ('alone/a-dog-4.png', 'many/a-dog-4.png', 'many/a-dog-3.png')
    alone, same, other = (pixels(tmp_path/file) for file in files)
    assert abs(alone - same).max() <= 2  # a batch rounds otherwise
    assert abs(alone - other).max() > 50


def test_prompts_of_a_file_and_of_stdin(loaded, tmp_path):
    (tmp_path/'prompts.txt').write_bytes('\ufeffa dog\r\n\r\n  Собака  \n'.encode())
    options = ['--steps', '1', '--outputs', 'image', '--out', str(tmp_path/'out')]
    result = CliRunner().invoke(app, ['generate', '--file', str(tmp_path/'prompts.txt'), *options])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ['generate', 'a cat', '--file', '-', *options], input='a bee\n')
    assert result.exit_code == 0, result.output
    lines = read_manifest(tmp_path/'out')
    assert [line['prompt'] for line in lines] == ['a dog', 'Собака', 'a cat', 'a bee']
    names = ['a-dog-0.png', 'собака-0.png', 'a-cat-0.png', 'a-bee-0.png']
    assert [line['files'] for line in lines] == [[name] for name in names]


def test_nothing_is_overwritten(loaded, command, tmp_path):
    for prompt in ('a dog', 'a dog', 'A dog!'):
        command('generate', prompt, '--steps', 1, '--outputs', 'image', '--out', tmp_path)
    names = [line['files'][0] for line in read_manifest(tmp_path)]
    assert names == ['a-dog-0.png', 'a-dog-0-2.png', 'a-dog-0-3.png']
    assert sorted(os.listdir(tmp_path)) == sorted([*names, 'manifest.jsonl'])


@pytest.fixture
def media(tmp_path):
    "Two pictures, and a stereo sound at a rate of its own."
    Image.new('RGB', (30, 20), 'red').save(tmp_path/'red.png')
    Image.new('RGB', (30, 20), 'blue').save(tmp_path/'blue.jpg')
    tone_T = np.sin(np.arange(22050) / 9) / 3
    soundfile.write(tmp_path/'tone.wav', np.stack([tone_T, tone_T / 2], 1), 22050)
    return tmp_path


def test_pictures_and_sounds_are_inputs(loaded, command, media):
    status, _, errors = command(
        'generate', 'and now', '--images', media/'red.png', '--images', media/'blue.jpg', '--audio',
        media/'tone.wav', '--steps', 1, '--outputs', 'audio,text', '--out', media/'out')
    assert (status, errors) == (0, [])
    lines = read_manifest(media/'out')
    assert [line['image'] for line in lines] == [f'{media}/red.png', f'{media}/blue.jpg']
    assert lines[1]['files'] == ['and-now-blue-tone-0.wav', 'and-now-blue-tone-0.txt']
    given = [Image.open(line['image']) for line in lines]
    made = loaded.generate(
        'and now', given, media/'tone.wav', outputs='audio', seed=[0, 0], steps=1)
    for line, wave in zip(lines, made.audio, strict=True):
        np.testing.assert_array_equal(soundfile.read(media/'out'/line['files'][0], dtype='float32')[0], wave)


def test_an_edit_keeps_the_length(loaded, command, media):
    status, _, errors = command(
        'edit', 'louder', '--audio', media/'tone.wav', '--samples', 2, '--steps', 2, '--out', media/'out')
    assert (status, errors) == (0, [])
    first, second = [line['files'] for line in read_manifest(media/'out')]
    assert (first, second) == (['louder-tone-0.wav'], ['louder-tone-1.wav'])
    waves = [soundfile.read(media/'out'/file)[0] for file in (first[0], second[0])]
    assert [len(wave) for wave in waves] == [16000, 16000] and abs(waves[0] - waves[1]).max() > 1e-3


@pytest.mark.slow
def test_from_a_fresh_process(tmp_path, new_cache):
    process = subprocess.run(
        [sys.executable, '-m', 'egmi', 'generate', 'a dog', '--seconds', '1', '--steps', '1',
         '--outputs', 'audio'],
        cwd=tmp_path, env=environment(new_cache()), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout == 'generated/a-dog-0.wav\n'
    assert soundfile.info(tmp_path/'generated/a-dog-0.wav').duration == 1


# Wrong uses

WRONG = [
    ([], 'there is nothing to work on: give prompts, --file FILE'),
    (['  '], 'there is nothing to work on: give prompts, --file FILE'),
    (['a', '--file', 'none.txt'], "Invalid value for '--file': 'none.txt': No such file or directory"),
    (['a', '--file', 'latin.txt'], 'latin.txt is no text in UTF-8 ('),
    (['caf\udce9'], "prompt has no character at 3 but '\\udce9': read it with the encoding"),
    (['a', '--images', 'none.png'], '--images: picture none.png is missing'),
    (['a', '--images', 'latin.txt'], '--images: picture latin.txt cannot be read'),
    (['a', '--images', '.'], '--images: picture . is a folder'),
    (['a', '--images', ''], '--images is an empty string: give a path or a URL'),
    (['a', '--images', 'http://127.0.0.1:1/a.png'], '--images: http://127.0.0.1:1/a.png cannot be'),
    (['a', '--audio', 'none.wav'], '--audio: sound none.wav is missing'),
    (['a', '--audio', 'latin.txt'], '--audio: sound latin.txt cannot be read'),
    (['a', '--audio', 'short.wav'], '--audio lasts 6.25 ms: at least 25 ms are needed'),
    (['a', 'b', '--images', 'c', '--images', 'd', '--images', 'e'], '2 text, 3 images, 0 audio: give one'),
    (['a', '--outputs', 'video'], "unknown outputs ['video']: choose from text, image, audio"),
    (['a', '--steps', '0'], "Invalid value for '--steps'"),
    (['a', '--steps', '1000'], 'steps must be fewer than 1,000, the levels of noise'),
    (['a', '--samples', '0'], "Invalid value for '--samples'"),
    (['a', '--seed', '-1'], "Invalid value for '--seed'"),
    (['a', '--seed', str(2**63 - 1), '--samples', '2'], 'seed must be at most 2**63 - 2 for 2 samples'),
    (['a', '--seconds', 'long'], "Invalid value for '--seconds'"),
    (['a', '--seconds', 'nan'], 'seconds must be a finite number, not nan'),
    (['a', '--seconds', '1e9'], 'seconds must lie between 0.025 and 600, not 1000000000.0'),
    (['a', '--device', 'cuda:7'], "device 'cuda:7' is not available here: use auto or cpu"),
    (['a', '--out', 'latin.txt'], "cannot write to out_dir 'latin.txt'"),
    (['a', '--stepz', '3'], 'No such option: --stepz'),
]


@pytest.mark.parametrize('words, message', WRONG, ids=[' '.join(words) for words, _ in WRONG])
def test_a_wrong_use_is_one_line_before_anything_is_loaded(words, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, 'load', lambda *options: pytest.fail('loaded'))
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9')
    soundfile.write('short.wav', np.sin(np.arange(100)), 16000)
    status, said, (line,) = command('generate', *words)
    assert (status, said) == (2, '') and line.startswith(f'egmi: {message}')
    assert sorted(os.listdir(tmp_path)) == ['latin.txt', 'short.wav']


@pytest.mark.parametrize('words, message', [
    (['a', '--audio', 'none.wav'], '--audio: sound none.wav is missing'),
    ([' ', '--audio', 'tone.wav'], 'there is nothing to change: say in a prompt'),
    (['a', '--audio', 'tone.wav', '--strength', '2'], "Invalid value for '--strength'"),
    (['a', '--audio', 'tone.wav', '--steps', '1000'], 'steps must be fewer than 1,000'),
    (['a', '--audio', 'tone.wav', '--device', 'cuda:7'], "device 'cuda:7' is not available here"),
    (['a'], "Missing option '--audio'"),
])
def test_a_wrong_edit_is_one_line(words, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, 'load', lambda *options: pytest.fail('loaded'))
    soundfile.write('tone.wav', np.sin(np.arange(1600)) / 2, 16000)
    status, said, (line,) = command('edit', *words)
    assert (status, said) == (2, '') and line.startswith(f'egmi: {message}')
    assert os.listdir(tmp_path) == ['tone.wav']


def test_a_wrong_prompt_needs_no_heavy_package():
    wrong = 'import sys; from egmi.commands.command import main\n'
    wrong += 'sys.argv = ["egmi", "generate"]\n'
    wrong += 'try: main()\nexcept SystemExit as e: print(e.code, "torch" in sys.modules)'
    process = subprocess.run(
        [sys.executable, '-c', wrong], check=True, capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == '2 False\n'


@pytest.mark.parametrize('model', ['small', 'paper', 'me/repo', 'latin.txt'])
def test_a_model_that_is_none_is_one_line(model, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9')
    for words in (['generate', 'a'], ['edit', 'a', '--audio', 'tone.wav']):
        soundfile.write(tmp_path/'tone.wav', np.sin(np.arange(1600)) / 2, 16000)
        status, said, (line,) = command(*words, '--model', model)
        assert (status, said) == (2, '') and model in line
    assert sorted(os.listdir(tmp_path)) == ['latin.txt', 'tone.wav']


def test_a_model_without_pictures_is_one_line(command, tmp_path, monkeypatch):
    conditioner = SimpleNamespace(mapper=SimpleNamespace(image_head=None))
    monkeypatch.setattr(generate, 'load', lambda *options: EGMI(MINI, None, conditioner, None, None))
    status, said, (line,) = command('generate', 'a', '--out', tmp_path/'out')
    assert (status, said) == (2, '') and line.endswith('makes no pictures: leave image out of outputs')
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_there_stays(loaded, command, tmp_path, monkeypatch):
    def refuse(self, *given, **options):
        raise ValueError('the prompt is wrong')
    monkeypatch.setattr(EGMI, 'generate', refuse)
    for folder in (tmp_path, tmp_path/'new'):
        assert command('generate', 'a', '--out', folder) == (2, '', ['egmi: the prompt is wrong'])
    assert os.listdir(tmp_path) == []


def test_a_failure_is_one_line_with_its_traceback_in_a_file(loaded, command, tmp_path, monkeypatch):
    def fail(self, *given, **options):
        raise RuntimeError('no kernel image\nand eight more lines')
    monkeypatch.setattr(EGMI, 'generate', fail)
    status, said, (line,) = command('generate', 'a', '--out', tmp_path/'out')
    assert (status, said) == (1, '') and line.endswith(f'no kernel image (where: {tmp_path}/out/error.txt)')
    assert 'in fail' in (tmp_path/'out/error.txt').read_text()


@pytest.mark.parametrize('words, message', [
    (['ablation', '-p', 'stepz', '3'], "unknown parameter 'stepz': did you mean 'steps'?"),
    (['ablation', '-p', 'steps'], "-p lacks a value: -p NAME VALUE, or -y 'NAME: VALUE'"),
    (['ablation', '--steps', '3'], 'no such option or argument: --steps: parameters are set by -p'),
    (['draw'], "No such command 'draw'"),
    (['evaluate', 'a'], "Missing argument 'generated'"),
    (['weights', '--fetch'], 'No such option: --fetch')])
def test_other_wrong_uses_are_one_line(words, message, command):
    status, said, (line,) = command(*words)
    assert (status, said) == (2, '') and line.startswith(f'egmi: {message}')


# Experiments

@pytest.fixture
def run_egmi(tmp_path, new_cache):
    "Finished process of `egmi` in an empty folder."
    def run(*words):
        return subprocess.run(
            [sys.executable, '-m', 'egmi', *words], cwd=tmp_path, env=environment(new_cache()),
            capture_output=True, text=True, timeout=600)
    return run


@pytest.mark.slow
@pytest.mark.parametrize('experiment', ['ablation', 'text-to-audio', 'audio-editing'])
def test_what_a_notebook_refuses_is_its_last_line(experiment, run_egmi, tmp_path):
    process = run_egmi(experiment, '-p', 'n_eval', 'many')
    assert process.returncode == 2
    assert process.stderr == "egmi: parameter 'n_eval' must be of type int, not 'many'\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_an_experiment_runs_its_notebook(run_egmi, tmp_path):
    sizes = dict(n_eval=2, n_strength=2, strengths=[.5], sampling_steps=2)
    words = [word for name, value in sizes.items() for word in ('-p', name, str(value))]
    process = run_egmi('audio-editing', *words, '--out', 'out')
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.rstrip().endswith('files in out')
    assert {'table2.csv', 'table2.png', 'run.json', 'audio_editing.ipynb'} <= set(os.listdir(tmp_path/'out'))
    config = json.loads((tmp_path/'out/run.json').read_text())['config']
    assert {name: config[name] for name in sizes} == sizes
