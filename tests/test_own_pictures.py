"""`egmi train FOLDER`: pictures of one's own become a mapper that loads, generates, and fits the tables."""
import io
import json
import os
import shutil
import subprocess
import sys
import time

import datasets
import pandas as pd
import pytest
from PIL import Image

from conftest import environment
from egmi.data.folders import load_folder
from egmi.model import BASELINES, MAPPERS, find_trained
from egmi.toybox.scenes import toybox

N_PICTURES = 40
SHORT = ['--steps', '30', '--batch-size', '4', '--save-every', '10', '--sampling-steps', '2']


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "An imagefolder of 40 pictures, sorted by what is in them."
    folder = tmp_path_factory.mktemp('own')/'pictures'
    folder.mkdir()
    rows = []
    scenes = sorted(toybox('train', N_PICTURES), key=lambda scene: scene.caption)
    for i, scene in enumerate(scenes):
        scene.image.resize((100 + i, 80)).save(folder/f'{i:02}.jpg')
        rows.append(dict(file_name=f'{i:02}.jpg', text=scene.caption))
    pd.DataFrame(rows).to_csv(folder/'metadata.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def egmi(cache):
    "Runs the command in a process of its own."
    def run(*options, check=True):
        process = subprocess.run(
            [sys.executable, '-m', 'egmi', *map(str, options)], cwd=cache, env=environment(cache),
            capture_output=True, text=True, timeout=600)
        assert not check or process.returncode == 0, process.stderr[-3000:]
        return process
    return run


@pytest.fixture(scope='module')
def trained(egmi, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')/'out'
    said = egmi('train', pictures, '--out', folder, *SHORT).stdout
    assert '36 pictures' in said and '4 held-out captions' in said
    assert 'everything is drawn and played in its style' in said
    return folder


@pytest.mark.slow
def test_it_leaves_what_it_made(trained, pictures):
    record = json.loads((trained/'run.json').read_text())
    assert record['n'] == dict(train=36, held_out=4) and record['config']['n_train'] == 36
    seen = pd.read_csv(trained/'progress.csv')
    assert list(seen.groupby('step').size().items()) == [(0, 4), (10, 4), (20, 4), (30, 4)]
    held_out = set(seen.caption)
    everything = {e.caption for e in load_folder(pictures)}
    hashes = (trained/'pairs.txt').read_text().split()
    assert held_out < everything and len(set(hashes)) == 36
    table = pd.DataFrame(record['table']).set_index('system')
    for half in ('clip_condition', 'clap_condition'):
        last = seen[seen.step == 30][half]
        assert table[half]['EGMI mapper, seed 0'] == pytest.approx(last.mean(), abs=1e-4)
        assert last.mean() != seen[seen.step == 0][half].mean()
    assert seen[seen.step == 30].clip_condition.min() > seen[seen.step == 0].clip_condition.max() + .1
    for name in ('progress.png', 'samples.png'):
        assert min(Image.open(trained/name).size) > 100
    made = trained/'progress/EGMI mapper, seed 0'
    assert sorted(path.name for path in made.iterdir()) == ['000000', '000010', '000020', '000030']
    first, last = (Image.open(made/step/'0.png').tobytes() for step in ('000000', '000030'))
    assert first != last


@pytest.mark.slow
def test_its_folder_is_a_model(trained, egmi, tmp_path):
    folder, preset = find_trained(trained, MAPPERS | BASELINES)
    assert (folder, preset) == (trained/'EGMI mapper, seed 0', 'mini')
    said = egmi('generate', 'a bell', '--model', trained, '--steps', 2, '--out', tmp_path/'made').stdout
    assert len(said.split()) == len({*os.listdir(tmp_path/'made')} - {'manifest.jsonl'}) == 2


@pytest.mark.slow
def test_a_second_call_does_nothing_again(trained, egmi, pictures):
    def times():
        return {path: path.stat().st_mtime_ns for path in trained.rglob('*.*') if path.is_file()}
    before = times()
    said = egmi('train', pictures, '--out', trained, *SHORT).stdout
    assert 'EGMI mapper, seed 0, other captions' in said
    assert {path for path, when in times().items() if before.get(path) != when} <= {trained/'stages.json'}


@pytest.mark.slow
def test_a_kill_changes_nothing(trained, pictures, cache, egmi, tmp_path):
    out = tmp_path/'out'
    command = [sys.executable, '-m', 'egmi', 'train', pictures, '--out', out, *SHORT]
    process = subprocess.Popen(command, cwd=cache, env=environment(cache), stderr=subprocess.DEVNULL)
    while not (out/'progress/EGMI mapper, seed 0/000010').exists():
        assert process.poll() is None
        time.sleep(.05)
    process.kill()
    process.wait()
    assert not (out/'run.json').exists()
    egmi('train', pictures, '--out', out, *SHORT)
    for name in ('progress.csv', 'losses.csv', 'samples.png', 'EGMI mapper, seed 0/model.safetensors'):
        assert (out/name).read_bytes() == (trained/name).read_bytes(), name


@pytest.mark.slow
def test_table_3_takes_the_folder_and_what_it_trained(trained, pictures, egmi, tmp_path):
    short = ['-p', 'sampling_steps', 2]
    egmi('ablation', '-p', 'trained', trained, *short, '--out', tmp_path/'taken')
    egmi('ablation', '-p', 'data', pictures, '-p', 'steps', 2, '-y', 'seeds: [0]', *short,
         '--out', tmp_path/'own')
    of_training = json.loads((trained/'run.json').read_text())['config']['ids']
    for name, systems in dict(taken=3, own=5).items():
        table = pd.read_csv(tmp_path/name/'table3.csv')
        assert len(table) == systems and set(table.n) == {4}
        record = json.loads((tmp_path/name/'run.json').read_text())
        assert record['n']['test'] == 4
        assert name == 'own' or record['ids']['train'] == of_training
    seen = pd.read_csv(trained/'progress.csv').query('step == 30')
    row = pd.read_csv(tmp_path/'taken/table3.csv').set_index('system').loc['EGMI mapper']
    assert row.clip_condition == pytest.approx(seen.clip_condition.mean(), abs=1e-3)


@pytest.mark.parametrize('change, message', [
    (lambda folder: (folder/'00.jpg').unlink(), '1 of 40 examples (2.5%) are bad: picture'),
    (lambda folder: (folder/'metadata.csv').unlink(), 'has no captioned pictures: add captions.csv'),
    (lambda folder: (folder/'metadata.csv').write_text('file_name,alt\n00.jpg,a dog\n'),
     'has no column caption: columns are file_name, alt; name those of picture and caption as columns'),
    (lambda folder: (folder/'metadata.csv').write_text('file_name,text\n00.jpg,a dog\n'),
     'has a single picture: give two or more')])
def test_what_is_wrong_with_a_folder_is_one_line(change, message, pictures, command, tmp_path):
    folder = tmp_path/'pictures'
    shutil.copytree(pictures, folder)
    change(folder)
    status, _, (line,) = command('train', folder, '--out', tmp_path/'out')
    assert status == 2 and message in line
    assert not (tmp_path/'out').exists()


def test_columns_and_bad_pictures_have_options(pictures, command, tmp_path):
    folder = tmp_path/'pictures'
    shutil.copytree(pictures, folder)
    table = (folder/'metadata.csv').read_text()
    (folder/'metadata.csv').write_text(table.replace('file_name,text', 'picture,alt'))
    (folder/'00.jpg').unlink()
    options = ['--columns', 'picture,alt', '--max-bad', '.03', '--dry-run']
    with pytest.warns(UserWarning, match='1 of 40 examples'):
        status, said, _ = command('train', folder, *options)
    assert status == 0 and '36 pictures' in said


def test_more_samples_than_captions_are_held_out(pictures, command, tmp_path):
    status, _, (line,) = command('train', pictures, '--samples', '5', '--out', tmp_path/'out')
    assert status == 2 and 'has 4 held-out pictures, and 5 are asked for: ask for fewer' in line


# A dataset of the hub

def parquet(scenes):
    rows = dict(photo=[scene.image for scene in scenes], alt=[scene.caption for scene in scenes])
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows).cast_column('photo', datasets.Image()).to_parquet(file)
    return file.getvalue()


def test_a_dataset_of_the_hub(server, command):
    scenes = toybox('train', 12)
    splits = dict(train=scenes[:9], validation=scenes[9:])
    server.repos['me/birds'] = {f'data/{n}-00000-of-00001.parquet': parquet(s) for n, s in splits.items()}
    status, said, _ = command('train', 'me/birds', '--columns', 'photo,alt', '--dry-run')
    assert status == 0 and '9 pictures' in said
    status, _, (line,) = command('train', 'me/birds', '--dry-run')
    assert status == 2 and 'me/birds has no column caption: columns are photo, alt; name' in line
    status, _, (line,) = command('train', 'me/bees', '--dry-run')
    assert status == 2 and 'me/bees is no folder with pictures, and datasets does not load it (' in line
