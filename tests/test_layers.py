"""Folders are layers: imports only go up the list, and light parts stay light."""
import ast
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ['base', 'toybox', 'frozen', 'paper', 'data', 'evaluation', 'small']
HEAVY = {'matplotlib', 'IPython', 'diffusers', 'datasets'}
USERS = {  # module -> the heavy libraries that are its business
    'base.drawing': {'matplotlib', 'IPython'},
    'frozen.diffusion': {'diffusers'},
    'frozen.audioldm': {'diffusers'},
    'evaluation.reporting': {'matplotlib'}}


def reading_order():
    "Modules without `egmi.`, in the order of their notebooks."
    modules = []
    for part in PARTS:
        for path in sorted((ROOT/'nbs'/part).glob('[0-9]*.ipynb')):
            name = path.stem.split('_', 1)[1]
            modules.append(name if part == 'paper' else f'{part}.{name}')
    return modules


ORDER = reading_order()


def imported(module):
    "Modules of this package that a module imports, inside functions too."
    path = ROOT/'egmi'/f'{module.replace(".", "/")}.py'
    package = f'egmi.{module}'.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = resolve_name('.' * node.level + (node.module or ''), package)
            found |= {name} | {f'{name}.{alias.name}' for alias in node.names}
    return {name.removeprefix('egmi.') for name in found} & set(ORDER)


def test_every_notebook_exports_the_module_of_its_name():
    files = {path.relative_to(ROOT/'egmi').with_suffix('').as_posix().replace('/', '.')
             for path in (ROOT/'egmi').rglob('*.py') if not path.name.startswith('_')}
    assert files == set(ORDER)


@pytest.mark.parametrize('module', ORDER)
def test_imports_go_up(module):
    below = {name for name in imported(module) if ORDER.index(name) >= ORDER.index(module)}
    assert not below


def test_imports_are_seen():
    assert {'tokens', 'mapper', 'losses', 'frozen.prefix'} <= imported('training')


def heavy_modules(module):
    "Heavy libraries that a fresh interpreter holds after importing a module."
    code = f'import egmi.{module}, json, sys; print(json.dumps([name.split(".")[0] for name in sys.modules]))'
    process = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    return HEAVY & set(json.loads(process.stdout.splitlines()[-1]))


LIGHT = [module for module in ORDER if not module.startswith('small.')]


@pytest.mark.parametrize('module', LIGHT)
def test_only_what_draws_plays_or_diffuses_loads_what_that_takes(module):
    allowed = set().union(*(USERS[name] for name in USERS if name == module or name in imported(module)))
    assert heavy_modules(module) <= allowed
