"""`egmi train` alone and under `accelerate launch`, and the tables that take its folder."""
import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
from accelerate.utils.other import get_free_port

from conftest import ROOT, check_cells, environment, run_experiment

SYSTEMS = ['Separated mapper', 'Cross mapper', 'EGMI mapper', 'NExT-GPT-style mapper', 'GILL-style mapper']
NAMES = [f'{system}, seed 0' for system in SYSTEMS]
RECIPE = ['--preset', 'paper', '--weights', 'tiny', '--systems', 'all', '--steps', '20']
SAMPLES = ['--samples', '4', '--sampling-steps', '2']
IN_FLOAT32 = """from egmi.base import config
config.multiplies_bfloat16 = lambda: False
from egmi.commands.command import main
main()
"""  # in bfloat16 the shares of a batch are rounded otherwise than the whole
LAUNCHER = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--main_process_port']


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def start(tmp_path_factory, cache):
    "Starts egmi train in one process or two."
    script = tmp_path_factory.mktemp('script')/'train.py'
    script.write_text(IN_FLOAT32)

    def begin(out, *options, processes=1):
        launcher = [*LAUNCHER, str(get_free_port())] if processes > 1 else []
        command = [sys.executable, *launcher, script, 'train', *options, '--out', out]
        return subprocess.Popen(
            command, cwd=cache, env=environment(cache, OMP_NUM_THREADS='1'),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return begin


def finish(process):
    "What a command prints that must succeed."
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return said


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
    "Folder of systems that one process trained, with samples."
    folder = tmp_path_factory.mktemp('alone')/'trained'
    said = finish(start(folder, *RECIPE, *SAMPLES))
    assert '20 steps of 8 pairs, 3 systems' in said
    return folder


@pytest.fixture(scope='module')
def together(start, tmp_path_factory, alone):
    "The same by two processes."
    folder = tmp_path_factory.mktemp('together')/'trained'
    said = finish(start(folder, *RECIPE, *SAMPLES, processes=2))
    assert said.count('20 steps of 8 pairs, 3 systems') == 1  # only one process talks
    return folder


def read_losses(folder):
    return pd.read_csv(folder/'losses.csv').set_index('step')


def assert_same_losses(folder, expected):
    found, expected = read_losses(folder), read_losses(expected)
    assert set(found) == set(expected) == set(NAMES) and len(found) == 20
    np.testing.assert_allclose(found[NAMES], expected[NAMES], rtol=1e-5)


def samples_of(folder):
    "Name -> array of all samples; the folders above are named by what decides them."
    return {path.name: np.load(path) for path in folder.glob('samples/*/*/*.npy')}


@pytest.mark.slow
def test_two_processes_train_what_one_trains(alone, together):
    records = [json.loads((folder/'run.json').read_text()) for folder in (alone, together)]
    assert [record['processes'] for record in records] == [1, 2]
    assert records[0]['config'] == records[1]['config']
    assert_same_losses(together, alone)
    losses = read_losses(together)
    assert (losses.iloc[-1] < losses.iloc[0]).all()


@pytest.mark.slow
def test_two_processes_make_the_samples_of_one(alone, together):
    made, expected = samples_of(together), samples_of(alone)
    names = [f'{system}-0-test-0-4' for system in SYSTEMS] + ['text encoder (upper bound)-test-0-4']
    audio = {f'{name}-audio.npy' for name in names}
    images = {f'{name}-images.npy' for name in names if 'GILL' not in name}  # which makes sounds alone
    assert set(made) == set(expected) == audio | images
    for name in made:
        near = 2 if name in images else .02  # weights that differ by 1e-7 are saved in half precision
        np.testing.assert_allclose(made[name].astype(float), expected[name], atol=near)
    scored = [path.name for path in together.glob('samples/*/*/*.npz')]
    assert len(scored) == len(audio) + len(images)


@pytest.mark.slow
def test_sounds_of_audiocaps_are_made_beside_them(start, alone, cache, tmp_path):
    folder = shutil.copytree(alone, tmp_path/'trained', ignore=shutil.ignore_patterns('samples'))
    sounds = next(cache.glob('rehearsal/*/data-*/audiocaps'))
    finish(start(folder, *RECIPE, '--sampling-steps', '2', '--sounds', sounds))
    made = samples_of(folder)
    systems = {name.rpartition('-audiocaps-')[0] for name in made if name.endswith('-audio.npy')}
    assert systems == {f'{system}-0' for system in SYSTEMS} | {'text encoder (upper bound)'}
    assert len(made) == len(systems)  # no pictures


@pytest.mark.slow
def test_a_killed_training_goes_on_with_two_processes(start, alone, tmp_path):
    folder = tmp_path/'trained'
    process = start(folder, *RECIPE)
    while not (folder/'checkpoints/EGMI mapper, seed 0.pt').exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(.01)
    process.kill()
    process.communicate()
    assert not list(folder.glob('*, seed 0')) and not (folder/'run.json').exists()
    with pytest.raises(ValueError, match='is unfinished: `egmi train --preset paper .*` goes on with it'):
        check_cells(ROOT/'nbs/ablation.ipynb', preset='paper', weights='tiny', trained=str(folder))
    finish(start(folder, *RECIPE, processes=2))
    assert_same_losses(folder, alone)


@pytest.mark.slow
def test_another_recipe_is_one_line_and_changes_nothing(start, alone, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob('*.safetensors')}
    process = start(alone, *RECIPE, '--steps', '30', '--seeds', '1')
    _, errors = process.communicate(timeout=300)
    line, = [line for line in errors.splitlines() if line.startswith('egmi')]
    assert process.returncode == 2
    assert 'steps (20, now 30), seeds ([0], now [1])' in line
    assert {path: path.stat().st_mtime_ns for path in alone.rglob('*.safetensors')} == before


# The tables take the folder

TAKEN = dict(preset='paper', weights='tiny', sampling_steps=2)


@pytest.mark.slow
def test_table_3_of_trained_systems_uses_their_samples(alone, cache, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in alone.glob('samples/*/*/*-test-*')}
    out = run_experiment(tmp_path, cache, 'ablation', trained=alone, **TAKEN)
    table = pd.read_csv(out/'table3.csv').set_index('system')
    assert table.index.tolist()[1:-1] == SYSTEMS[:3]
    record = json.loads((out/'run.json').read_text())
    recipe = json.loads((alone/'recipe.json').read_text())
    assert record['training'] == recipe and record['config']['steps'] == 20
    assert record['n']['train'] == 16 and 'training' not in record['seconds']
    for name in NAMES[:3]:
        assert record['final_loss'][name] == pytest.approx(read_losses(alone)[name].mean())
    saved = 'EGMI mapper, seed 0/model.safetensors'
    assert (out/'egmi/model.safetensors').read_bytes() == (alone/saved).read_bytes()
    after = {path: path.stat().st_mtime_ns for path in alone.glob('samples/*/*/*-test-*')}
    assert len(before) == 6 + 5 + 6 + 5 and after == before


@pytest.mark.slow
def test_table_1_of_trained_systems(alone, cache, tmp_path):
    out = run_experiment(tmp_path, cache, 'text_to_audio', trained=alone, **TAKEN)
    record = json.loads((out/'run.json').read_text())
    had = {system: of['steps'] for system, of in record['training'].items()}
    assert had == dict.fromkeys(['EGMI', *SYSTEMS[3:]], 20)
    assert not {'training', 'features', 'prefixes'} & set(record['seconds'])


@pytest.mark.slow
def test_table_1_trains_what_lacks(alone, cache, tmp_path):
    without = tmp_path/'trained'
    shutil.copytree(alone, without)
    recipe = json.loads((without/'recipe.json').read_text())
    recipe['systems'].remove('GILL-style mapper')
    (without/'recipe.json').write_text(json.dumps(recipe))
    run_experiment(tmp_path, cache, 'text_to_audio', trained=without, **TAKEN)
    trained, = cache.glob('text_to_audio/training/*')
    assert [path.name for path in trained.glob('*, seed 0')] == ['GILL-style mapper, seed 0']
    losses = pd.read_csv(trained/'losses.csv')['GILL-style mapper, seed 0']
    np.testing.assert_allclose(losses, read_losses(alone)['GILL-style mapper, seed 0'], rtol=.01)  # bfloat16


@pytest.mark.slow
@pytest.mark.parametrize('changes, message', [
    (dict(trained='nowhere'), 'nowhere holds no trained systems (recipe.json is missing)'),
    (dict(preset='mini', weights='pretrained'), "trained with preset 'random-tiny', not 'mini'"),
    (dict(steps=3, seeds=[0]), 'trained systems have a recipe of their own: leave out steps, seeds'),
    (dict(matched=True), 'says which mappers take part: leave out matched')])
def test_what_does_not_fit_a_folder_is_one_line(changes, message, alone):
    options = dict(preset='paper', weights='tiny', trained=str(alone)) | changes
    with pytest.raises((ValueError, OSError)) as raised:
        check_cells(ROOT/'nbs/ablation.ipynb', **options)
    assert message in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.slow
def test_a_damaged_or_missing_system_is_one_line(alone, tmp_path):
    folder = tmp_path/'trained'
    shutil.copytree(alone, folder, ignore=shutil.ignore_patterns('samples'))
    weights = folder/'EGMI mapper, seed 0/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-20])
    options = dict(preset='paper', weights='tiny', trained=str(folder))
    with pytest.raises(ValueError, match='model.safetensors is damaged .* delete run.json beside it, and `'):
        check_cells(ROOT/'nbs/ablation.ipynb', **options)
    recipe = json.loads((folder/'recipe.json').read_text())
    recipe['systems'].remove('EGMI mapper')
    (folder/'recipe.json').write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match='has no EGMI mapper, only Separated mapper, Cross mapper'):
        check_cells(ROOT/'nbs/ablation.ipynb', **options)


# Bad input and the dry run, in this process

@pytest.fixture
def call(command, tmp_path):
    "Exit status of egmi train, its output and its own lines on stderr."
    def run(*options):
        return command('train', '--out', tmp_path/'out', *options)
    return run


@pytest.mark.parametrize('options, message', [
    (['--systems', 'EGMI mapper,Best mapper'], "--systems: there is no 'Best mapper': choose from Separated"),
    (['--seeds', '0,one'], "--seeds: give whole numbers such as 0,1,2, not '0,one'"),
    (['--preset', 'large'], "unknown preset 'large'"),
    (['--weights', 'tiny'], "preset 'mini' has none"),
    (['--steps', '0'], 'steps must be a whole number of 1 or more'),
    (['--lr', '-1'], 'lr and lr_tokens must be positive'),
    (['--steps', 'many'], "Invalid value for '--steps': Input should be a valid integer"),
    (['--stepz', '9'], 'No such option: --stepz')])
def test_a_wrong_option_is_one_line_and_status_2(options, message, call, tmp_path):
    status, _, (line,) = call(*options)
    assert status == 2 and message in line
    assert not (tmp_path/'out').exists()


def test_a_folder_that_is_not_there_is_one_line(call, tmp_path):
    status, _, (line,) = call(tmp_path/'none')
    assert status == 2 and f'there is no folder {tmp_path}/none' in line
    assert not (tmp_path/'out').exists()


def test_a_folder_that_cannot_be_written_is_one_line(call, tmp_path):
    (tmp_path/'file').touch()
    status, _, (line,) = call('--out', tmp_path/'file/out')
    assert status == 2 and 'choose another folder with --out DIR' in line


def test_a_folder_without_captions_is_one_line(call, tmp_path):
    (tmp_path/'pictures').mkdir()
    status, _, (line,) = call(tmp_path/'pictures')
    assert status == 2 and 'has no captioned pictures: add captions.csv' in line


def test_pairs_that_are_not_those_of_the_folder_are_one_line(call, tmp_path):
    from egmi.base.config import get_preset
    from egmi.evaluation.trainings import begin_training, training_parts, training_recipe
    mini = get_preset('mini')
    pairs = training_parts(mini, '', mini.training | dict(n_train=4))['train']
    recipe = training_recipe(mini, '', pairs, ['EGMI mapper'], [0], mini.training)
    begin_training(tmp_path/'out', pairs, recipe, 'egmi train')
    own = tmp_path/'own'
    own.mkdir()
    for i, scene in enumerate([*pairs, pairs[0]]):  # one of them is held out
        scene.image.save(own/f'{i}.png')
        (own/f'{i}.txt').write_text(scene.caption)
    status, _, (line,) = call('--n-train', '4', own)
    assert status == 2 and f'{tmp_path}/out holds a training with another recipe: ids (' in line
    assert 'steps' not in line


def test_weights_that_lack_are_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv('EGMI_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    (tmp_path/'captions.csv').touch()
    status, _, (line,) = call('--preset', 'paper', tmp_path)
    assert status == 2 and '`egmi weights paper` says how to get it' in line


def test_a_gpu_that_is_not_there_is_one_line(call):
    status, _, (line,) = call('--device', 'cuda:7')
    assert status == 2 and "device 'cuda:7' is not available here" in line


def test_too_little_disk_is_one_line(call, monkeypatch):
    space = namedtuple('space', 'total used free')(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: space)
    status, said, (line,) = call('--n-train', '4', '--steps', '2')
    assert status == 1 and 'GB free, and' in line and line.startswith('egmi: disk:')


def test_the_dry_run_needs_neither_weights_nor_data(call, tmp_path, monkeypatch):
    monkeypatch.setenv('EGMI_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    three = ', '.join(SYSTEMS[:3])
    status, said, lines = call('--preset', 'paper', '--systems', three, '--samples', '5000', '--dry-run')
    assert (status, lines) == (0, [])
    assert '118,287 pictures' in said and '4,624 steps of 128 pairs, 3 systems' in said
    assert '20,000 of 50 steps' in said and '20,000 of 200 steps' in said  # the text encoders' too
    assert 'H100' in said and 'RTX 4090' in said
    assert not (tmp_path/'out').exists()


def test_three_mappers_on_all_of_coco_take_less_than_an_hour():
    from egmi.commands.train import count_pairs, estimate_cost, make_request
    request = make_request(
        'paper', 'pretrained', '', ','.join(SYSTEMS[:3]), '0', {}, 0, None, 0., '',
        columns='', max_bad=.01, save_every=None, sounds='')
    cost = estimate_cost(request, *count_pairs(request), processes=1, card='H100')
    assert 1800 < cost.seconds < 3600
