"""`papermill nbs/report.ipynb` gathers the tables of a folder of runs, and says which are missing."""
import json
import shutil

import pandas as pd
import pytest

from conftest import ROOT, papermill

RUNS = ROOT/'runs/mini'


def gather(folder, runs):
    return papermill(folder, folder/'cache', notebook=ROOT/'nbs/report.ipynb', runs=runs, out_dir=None)


def page(folder):
    "Everything that the executed notebook shows, pictures aside."
    cells = json.loads((folder/'executed.ipynb').read_text())['cells']
    return '\n'.join(''.join(text) for c in cells for o in c.get('outputs', []) for kind, text in o.get('data', {}).items() if kind.startswith('text/'))


@pytest.mark.parametrize('names', [['ablation'], ['text_to_audio', 'audio_editing', 'ablation']])
def test_tables_that_are_there_are_shown_and_the_others_named(tmp_path, names):
    for name in names: shutil.copytree(RUNS/name, tmp_path/'runs'/name)
    done = gather(tmp_path, tmp_path/'runs')
    assert done.returncode == 0, done.stderr[-3000:]
    shown, table3 = page(tmp_path), pd.read_csv(RUNS/'ablation/table3.csv').set_index('system')
    assert f"{table3.clip_text_image['EGMI mapper']:.3f}".rstrip('0') in shown
    for name, title in dict(text_to_audio='Table 1', audio_editing='Table 2', ablation='Table 3').items():
        assert (f'### {title}' in shown) == (name in names)
        assert (f'make {name.replace("_", "-")}' in shown) == (name not in names)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path/'runs').mkdir()
    assert 'holds no table: run make ablation' in gather(tmp_path, tmp_path/'runs').stderr
