"""Estimates count what the experiments made, load nothing, and are what the page of costs shows."""
import json
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, environment
from nbclient import NotebookClient

from egmi.base.config import get_preset
from egmi.evaluation.costs import (
    STRENGTHS, estimate_ablation, estimate_audio_editing, estimate_text_to_audio)
from egmi.evaluation.reporting import SOURCE

MINI = get_preset('mini')
RUNS = ROOT/'runs/mini'
PAGE = ROOT/'nbs/costs.ipynb'


def read_config(experiment):
    return json.loads((RUNS/experiment/'run.json').read_text())['config']


def amounts(cost):
    return {row['what']: row['amount'] for row in cost.rows}


# What is counted

def test_amounts_of_table_3():
    c = read_config('ablation')
    n_captions = c['n_eval'] + c['n_vocabulary']
    estimated = amounts(estimate_ablation(
        MINI, MINI.training, c['n_train'], c['n_train'], 3 * len(c['seeds']), n_captions))
    clips = pd.read_csv(RUNS/'ablation/clips.csv')
    made = clips[~clips.system.str.contains('floor')]
    assert estimated['pictures'] == estimated['sounds'] == len(made)
    assert estimated['training'] == c['steps']


def test_amounts_of_table_1():
    c = read_config('text_to_audio')
    estimated = amounts(estimate_text_to_audio(
        MINI, MINI.training, c['n_train'], c['n_train'], c['n_eval'], len(c['seeds'])))
    clips = pd.read_csv(RUNS/'text_to_audio/clips.csv')
    made = clips[clips.system.str.contains('^AudioLDM|^EGMI|mapper')]
    assert estimated['sounds'] == len(made)
    assert 'pictures' not in estimated


def test_amounts_of_table_2():
    c = read_config('audio_editing')
    assert c['strengths'] == list(STRENGTHS)
    assert not c['data'] # no speech
    estimated = amounts(estimate_audio_editing(MINI, c['n_eval'], c['n_strength'], seeds=len(c['seeds'])))
    table = pd.read_csv(RUNS/'audio_editing/table2.csv')
    edited = table[table.n.notna() & (table.system != SOURCE)]
    curve = pd.read_csv(RUNS/'audio_editing/strength.csv')
    assert estimated['edits'] == len(edited) * c['n_eval'] + len(curve) * c['n_strength']


# What is loaded

DRY = '''
import sys
from egmi.base.config import get_preset
from egmi.evaluation.costs import estimate_training
assert 'torch' not in sys.modules
paper = get_preset('paper')
cost = estimate_training(paper, paper.training, 1000, 500, 3)
import gc, torch
tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type != 'meta']
print(cost.time, sum(x.numel() for x in tensors))
'''


@pytest.mark.slow
def test_an_estimate_needs_no_weights_and_loads_none(tmp_path):
    process = subprocess.run(
        [sys.executable, '-c', DRY], env=environment(tmp_path), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    *time, numbers = process.stdout.split()
    assert time == ['over', '4', 's']
    assert int(numbers) < 100_000


# What is shown

def shown(notebook):
    "Everything that the cells of a notebook show."
    outputs = []
    for cell in notebook.cells:
        for output in cell.get('outputs', []):
            outputs.append(output.get('data', {}).get('text/html') or output.get('text', output.get('data')))
    return outputs


@pytest.mark.slow
def test_the_page_shows_what_is_estimated_now(tmp_path):
    stored = nbformat.read(PAGE, 4)
    fresh = nbformat.read(PAGE, 4)
    NotebookClient(fresh, timeout=120, resources=dict(metadata=dict(path=PAGE.parent))).execute()
    assert len(shown(stored)) > 8
    assert shown(fresh) == shown(stored)
