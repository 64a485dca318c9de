"""A trained EGMI goes to the hub and comes back whole: tokens, mapper, how it was made, and its card."""
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from stand_in import COMMIT, TOKEN

from egmi import EGMI
from egmi.mapper import BASELINES, MAPPERS
from egmi.model import find_trained, load_conditioner

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT/'runs/mini/ablation'


@pytest.fixture(scope='module')
def egmi():
    "Tokens and mapper that the package does not have: all weights are its own plus a half."
    egmi = EGMI.from_pretrained('mini', device='cpu')
    with torch.no_grad():
        for p in egmi.conditioner.parameters():
            p += .5
    return egmi


def check_same_weights(a, b):
    weights = b.state_dict()
    assert {name.partition('.')[0] for name in weights} == {'tokens', 'mapper'}
    assert set(a.state_dict()) == set(weights)
    for name, p in a.state_dict().items():
        assert torch.equal(p, weights[name].half().float()), name


@pytest.mark.slow
def test_what_is_pushed_comes_back(egmi, server):
    address = egmi.push_to_hub('me/bells', RUN, private=True, token=TOKEN)
    assert address.endswith(f'me/bells/commit/{COMMIT}')
    wanted, = server.created
    assert wanted.get('visibility') == 'private' or wanted.get('private')  # older clients say the latter
    files = server.repos['me/bells']
    sounds = {f'samples/{path.name}' for path in RUN.glob('*-EGMI*.wav')}
    assert len(sounds) == 3
    assert set(files) == sounds | {
        'config.json', 'model.safetensors', 'training.json', 'README.md', 'samples/samples.png'}

    again = EGMI.from_pretrained('me/bells', device='cpu')
    assert set(server.loaded) == {'config.json', 'model.safetensors', 'training.json'}  # not the samples
    check_same_weights(again.conditioner, egmi.conditioner)
    assert again.origin == egmi.origin and again.origin['config']['n_train'] == 1600
    assert again.preset == egmi.preset


@pytest.mark.slow
def test_the_card_tells_how_good_it_is(egmi, server):
    egmi.push_to_hub('me/bells', RUN, token=TOKEN)
    card = ModelCard(server.repos['me/bells']['README.md'].decode())
    assert card.data.license == 'apache-2.0' and 'text-to-audio' in card.data.tags
    table = json.loads((RUN/'run.json').read_text())['table']
    for row in table:
        assert row['system'] in card.text
        value, low, high = [row[f'clap_text_audio{end}'] for end in ('', '_low', '_high')]
        assert f'| {value:.3g} ({low:.3g} to {high:.3g}) |' in card.text
    n = sum(p.numel() for p in egmi.conditioner.parameters())
    for text in ("from_pretrained('me/bells')", f'{n:,} parameters', '| pictures with captions | 1,600 |',
                 '![samples](samples/samples.png)', 'src="samples/0-EGMI-mapper.wav"'):
        assert text in card.text, text


@pytest.mark.slow
def test_experiments_take_a_shared_mapper(egmi, server):
    egmi.push_to_hub('me/bells', token=TOKEN)
    folder, preset = find_trained('me/bells', MAPPERS | BASELINES, 'mini')
    assert preset == 'mini'
    check_same_weights(load_conditioner(folder, egmi.panda), egmi.conditioner)
    server.repos.clear()  # once it is here the hub is not needed
    assert find_trained('me/bells')[0] == folder


@pytest.mark.slow
def test_no_path_of_this_machine_is_shared(egmi, server):
    data, out = '/home/me/red birds', '/home/me/runs/1'
    command = f"egmi train --data '{data}' --out={out}"
    config = dict(data=data, sounds='/home/me/songs', out_dir=out, trained=[out], steps=20)
    origin = egmi.origin | dict(command=command, config=config)
    parts = (egmi.panda, egmi.conditioner, egmi.stable_diffusion, egmi.audioldm)
    EGMI(egmi.preset, *parts, origin).push_to_hub('me/bells', token=TOKEN)
    for name, content in server.repos['me/bells'].items():
        assert b'/home' not in content, name
    shared = json.loads(server.repos['me/bells']['training.json'])['conditioner']
    assert shared['command'] == "egmi train --data 'red birds' --out=1"
    assert shared['config'] == dict(data='red birds', sounds='songs', out_dir='1', trained=['1'], steps=20)
    assert b'| data | red birds |' in server.repos['me/bells']['README.md']


@pytest.mark.slow
def test_a_second_push_replaces_the_first(egmi, server):
    for value in (0., 1.):
        other = EGMI(egmi.preset, egmi.panda, egmi.conditioner, egmi.stable_diffusion, egmi.audioldm)
        with torch.no_grad():
            other.conditioner.tokens.weight.fill_(value)
        other.push_to_hub('me/bells', token=TOKEN)
    folder, _ = find_trained('me/bells')
    assert (load_conditioner(folder, egmi.panda).tokens.weight == 1).all()
    assert 'Nothing is recorded about its training' in server.repos['me/bells']['README.md'].decode()


def test_a_model_that_is_not_there(server):
    message = '^me/nothing is no folder, and the hub does not give .*: check the name'
    with pytest.raises(FileNotFoundError, match=message) as e:
        EGMI.from_pretrained('me/nothing')
    assert '\n' not in str(e.value)


@pytest.mark.slow
def test_who_may_not_write_is_told_in_one_line(egmi, server):
    with pytest.raises(PermissionError, match='^me/bells cannot be written to .*log in with') as e:
        egmi.push_to_hub('me/bells', token='hf_wrong')
    assert '\n' not in str(e.value) and not server.repos
    with pytest.raises(ValueError, match='nowhere/run.json is not the record of an experiment'):
        egmi.push_to_hub('me/bells', 'nowhere', token=TOKEN)
    assert not server.created


@pytest.mark.slow
def test_saving_again_replaces_the_card(egmi, tmp_path):
    egmi.save_pretrained(tmp_path/'a', RUN)
    assert 'clap_text_audio' in (tmp_path/'a/README.md').read_text()
    egmi.save_pretrained(tmp_path/'a')
    assert 'clap_text_audio' not in (tmp_path/'a/README.md').read_text()
    leftovers = [path.name for path in tmp_path.rglob('.*')]
    assert not leftovers
