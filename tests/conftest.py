"""What the tests of experiment notebooks share: a cache with the LLM in it, and papermill as a user calls it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/ablation.ipynb'


def papermill_command(folder, notebook=NOTEBOOK, **parameters):
    "The command that runs a notebook; the executed one goes to `folder`, results to folder/out unless `out_dir` says otherwise or is None."
    parameters = dict(out_dir=folder/'out') | parameters
    options = [option for name, value in parameters.items() if value is not None for option in (('-y', f'{name}: {value}') if isinstance(value, list) else ('-p', name, str(value)))]
    return [sys.executable, '-m', 'papermill', notebook, folder/'executed.ipynb', *options, '--no-progress-bar']


def environment(cache, **variables):
    return os.environ | dict(EGMI_CACHE=str(cache), HF_HUB_OFFLINE='1') | variables


def papermill(folder, cache, timeout=300, variables=(), **parameters):
    "Run the ablation, or another `notebook`, in `folder`; returns the finished process."
    return subprocess.run(papermill_command(folder, **parameters), cwd=folder, env=environment(cache, **dict(variables)),
                          capture_output=True, text=True, timeout=timeout)


def last_line(process):
    "What a failed command said last."
    assert process.returncode != 0
    return process.stderr.strip().splitlines()[-1]


def check_cells(notebook, **parameters):
    "Run a notebook's parameters, what papermill would inject, and the cell that checks them."
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    namespace = {}
    exec(cells[0], namespace)
    exec(cells[1], namespace | parameters)


@pytest.fixture(scope='session')
def new_cache(tmp_path_factory):
    "Makes an empty cache that borrows only the converted LLM from the usual one."
    from egmi.base.config import cache_dir
    from egmi.frozen.llm import smollm2_path
    llm, usual = smollm2_path(), cache_dir()

    def make():
        folder = tmp_path_factory.mktemp('cache')
        if llm.parent == usual: (folder/llm.name).symlink_to(llm)
        return folder
    return make
