"""What a notebook is not given is the preset's, and what a recipe leaves open is the size of the data."""
import json
import math
from dataclasses import replace

import pytest

import egmi.base.config
from conftest import ROOT
from egmi.base.config import MINI, PAPER
from egmi.small.rehearsal import write_audiocaps, write_coco
from egmi.toybox.scenes import toybox

TRAINING = dict(n_train=1600, steps=300, batch_size=8, lr=1e-3, lr_tokens=3e-2)
LARGE = dict(n_train=None, steps=None, batch_size=128, lr=1e-3, lr_tokens=5e-3)
RECIPES = dict(
    ablation=(
        TRAINING | dict(n_eval=96, n_vocabulary=96, n_sounds=None, seeds=[0, 1, 2]),
        LARGE | dict(n_eval=5000, n_vocabulary=None, n_sounds=None, seeds=[0])),
    text_to_audio=(
        TRAINING | dict(n_eval=192, seeds=[0, 1]),
        LARGE | dict(n_eval=None, seeds=[0, 1])),
    audio_editing=(
        dict(n_eval=96, n_strength=32, n_data=16, seeds=[0]),
        dict(n_eval=500, n_strength=100, n_data=200, seeds=[0])))


def run_cells(notebook, until, **parameters):
    "Names of a notebook, once it has run from its parameters to the cell that holds `until`."
    cells = json.loads((ROOT/f'nbs/{notebook}.ipynb').read_text())['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    namespace = {}
    exec(sources[0], namespace)
    namespace |= parameters
    for source in sources[1:]:
        exec(source, namespace)
        if until in source:
            return namespace


def filled(notebook, **parameters):
    return run_cells(notebook, 'recipe_values(globals()', **parameters)


@pytest.mark.parametrize('notebook', RECIPES)
@pytest.mark.parametrize('preset', ['mini', 'paper'])
def test_parameters_that_are_not_given_are_the_presets(notebook, preset):
    expected = RECIPES[notebook][preset == 'paper']
    names = filled(notebook, preset=preset)
    assert {name: names[name] for name in expected} == expected
    assert names['config'].items() >= expected.items()
    assert all(name in names['__annotations__'] for name in expected)


@pytest.mark.parametrize('notebook', RECIPES)
def test_parameters_that_are_given_stay(notebook):
    names = filled(notebook, preset='paper', n_eval=7, seeds=[3], sampling_steps=2)
    assert (names['n_eval'], names['seeds']) == (7, [3])
    preset = names['run'].preset
    assert (preset.steps_image, preset.steps_audio) == (2, 2)


def test_none_of_any_other_parameter_is_a_mistake():
    with pytest.raises(ValueError, match="^parameter 'memory' must be of type float, not None$"):
        filled('ablation', memory=None)


def test_presets_have_steps_for_pictures_and_for_sounds():
    assert (MINI.steps_image, MINI.steps_audio) == (12, 12)
    assert (PAPER.steps_image, PAPER.steps_audio) == (50, 200)
    assert (MINI.training['warmup_steps'], PAPER.training['warmup_steps']) == (20, 100)


def test_a_rehearsal_is_short():
    names = filled('ablation', preset='paper', weights='tiny')
    short = dict(n_train=16, steps=4, batch_size=8, n_eval=4)
    assert {name: names[name] for name in short} == short
    assert (names['run'].preset.steps_image, names['run'].preset.steps_audio) == (4, 4)


# Everything that is there

@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    write_coco(folder, 'train2017', toybox('train', 7))
    write_coco(folder, 'val2017', toybox('test', 5))
    return str(folder)


@pytest.fixture(scope='module')
def audiocaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp('audiocaps')
    write_audiocaps(folder, 'test', toybox('validation', 6))
    return str(folder)


@pytest.fixture
def open_recipe(monkeypatch):
    "Preset mini, to be trained on all that is there, in batches of three."
    training = MINI.training | dict(n_train=None, steps=None, batch_size=3)
    preset = replace(MINI, training=training, text_to_audio=dict(n_eval=None, seeds=[0]))
    monkeypatch.setitem(egmi.base.config.PRESETS, 'mini', preset)


def resolved(notebook, folder, **parameters):
    "What the record of a run will say of its parameters, once the data are read."
    names = run_cells(notebook, 'run.config |= ', out_dir=str(folder/'out'), device='cpu', **parameters)
    return names['run'].config


def test_table_3_takes_all_captions_once(open_recipe, coco, audiocaps, tmp_path):
    config = resolved('ablation', tmp_path, data=coco, sounds=audiocaps, n_eval=5)
    expected = dict(n_train=7, steps=math.ceil(7 / 3), batch_size=3, n_eval=5, n_sounds=6)
    assert config.items() >= expected.items()
    assert (config['steps_image'], config['steps_audio']) == (12, 12)


def test_table_1_takes_all_clips(open_recipe, coco, audiocaps, tmp_path):
    config = resolved('text_to_audio', tmp_path, data=audiocaps, pairs=coco)
    expected = dict(n_train=7, steps=3, n_eval=6)
    assert config.items() >= expected.items()


@pytest.mark.parametrize('parameters, message', [
    (dict(n_eval=6), 'has 5 held-out pictures, and 6 are asked for: ask for fewer$'),
    (dict(n_eval=5, n_train=8), 'has 7 captions to train on, and 8 are asked for: ask for fewer$'),
    (dict(n_eval=5, n_sounds=7), 'has 6 clips, and 7 are asked for: ask for fewer$'),
    (dict(n_eval=1), '^n_eval must be 2 or more, not 1: intervals need 2 clips$')])
def test_more_than_there_is_is_one_line(open_recipe, coco, audiocaps, parameters, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        resolved('ablation', tmp_path, data=coco, sounds=audiocaps, **parameters)
    assert '\n' not in str(raised.value)


def test_folder_of_sounds_is_looked_at_first(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=f'^sounds folder {tmp_path} lacks test.csv, audio: it needs'):
        resolved('ablation', tmp_path, data=coco, sounds=str(tmp_path))
    assert not (tmp_path/'out').exists()


def test_too_few_clips_for_table_1_name_their_folder(open_recipe, coco, tmp_path):
    write_audiocaps(tmp_path, 'test', toybox('validation', 3))
    with pytest.raises(ValueError, match=f'^{tmp_path} has 3 clips, and 4 are asked for'):
        resolved('text_to_audio', tmp_path, data=str(tmp_path), pairs=coco)
