"""`papermill nbs/report.ipynb` gathers the tables of a folder of runs, and says which are missing."""
import json
import shutil

import pandas as pd
import pytest

from conftest import ROOT, last_line, papermill

pytestmark = pytest.mark.slow

RUNS = ROOT/'runs/mini'
TITLES = dict(text_to_audio='Table 1', audio_editing='Table 2', ablation='Table 3')


def gather(folder, runs):
    return papermill(folder, folder/'cache', notebook=ROOT/'nbs/report.ipynb', runs=runs, out_dir=None)


def shown_text(folder):
    "Everything that the executed notebook shows, pictures aside."
    texts = []
    for cell in json.loads((folder/'executed.ipynb').read_text())['cells']:
        for output in cell.get('outputs', []):
            for kind, text in output.get('data', {}).items():
                if kind.startswith('text/'):
                    texts.append(''.join(text))
    return '\n'.join(texts)


def check_page(folder, names):
    "The page has the tables of these experiments, and says how to make the others."
    process = gather(folder, folder/'runs')
    assert process.returncode == 0, process.stderr[-3000:]
    shown = shown_text(folder)
    table3 = pd.read_csv(RUNS/'ablation/table3.csv').set_index('system')
    assert f"{table3.clip_text_image['EGMI mapper']:.3f}".rstrip('0') in shown
    for name, title in TITLES.items():
        assert (f'### {title}' in shown) == (name in names)
        assert (f'make {name.replace("_", "-")}' in shown) == (name not in names)


def test_tables_that_are_there_are_shown_and_the_others_named(tmp_path):
    (tmp_path/'runs').mkdir()
    assert 'holds no table: run make ablation' in last_line(gather(tmp_path, tmp_path/'runs'))
    for names in (['ablation'], list(TITLES)):
        for name in names:
            shutil.copytree(RUNS/name, tmp_path/'runs'/name, dirs_exist_ok=True)
        check_page(tmp_path, names)
