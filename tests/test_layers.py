"""Folders are layers: imports only go up the list, and modules load no more than they use."""
import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import resolve_name
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ['base', 'toybox', 'frozen', 'paper', 'data', 'evaluation', 'small', 'commands']
HEAVY = {'matplotlib', 'IPython', 'diffusers', 'datasets'}
USERS = {  # module -> the heavy libraries that are its business; whoever imports it may load them too
    'base.drawing': {'matplotlib', 'IPython'},
    'frozen.diffusion': {'diffusers'},
    'frozen.audioldm': {'diffusers'},
    'small.diffusion': {'diffusers'},
    'small.stable_diffusion': {'diffusers'},
    'small.audioldm': {'diffusers'},
    'evaluation.reporting': {'matplotlib'},
}


# The order of the modules

def read_order(root):
    "Modules without `egmi.`, in the order of their notebooks."
    modules = []
    for part in PARTS:
        for path in sorted((root/'nbs'/part).glob('[0-9]*.ipynb')):
            name = path.stem.split('_', 1)[1]
            modules.append(name if part == 'paper' else f'{part}.{name}')
    return modules


def read_modules(root):
    "Modules without `egmi.` that the package has."
    package = root/'egmi'
    paths = [path for path in package.rglob('*.py') if not path.name.startswith('_')]
    return {path.relative_to(package).with_suffix('').as_posix().replace('/', '.') for path in paths}


def imported_names(node, package):
    "Full names of what an import statement brings in, modules or what they define."
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    source = resolve_name('.' * node.level + (node.module or ''), package)
    return {f'{source}.{alias.name}' for alias in node.names}


def read_imports(root, module):
    "Modules of the package that a module imports, inside functions too, and names that no module has."
    modules = read_modules(root)
    package = f'egmi.{module}'.rpartition('.')[0]
    path = root/f'egmi/{module.replace(".", "/")}.py'
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for name in imported_names(node, package):
            inside = name.removeprefix('egmi.')
            if inside == name or inside.startswith('__'): # another package; __version__
                continue
            parent = inside.rpartition('.')[0]
            found.add(inside if inside in modules else parent if parent in modules else inside)
    return found


def imports_that_go_down(root):
    "(module, import) for all that does not stand above the module in the list."
    order = read_order(root)
    wrong = []
    for k, module in enumerate(order):
        wrong += [(module, name) for name in sorted(read_imports(root, module)) if name not in order[:k]]
    return wrong


def test_every_notebook_exports_the_module_of_its_name():
    order = read_order(ROOT)
    assert sorted(read_modules(ROOT)) == sorted(order)


def test_imports_go_up():
    assert imports_that_go_down(ROOT) == []


# What a module loads

def first_to_load(modules):
    "Heavy library -> the first of these modules that has it loaded; for a fresh process."
    first = {}
    for module in modules:
        import_module(f'egmi.{module}')
        loaded = {name.partition('.')[0] for name in sys.modules}
        for library in HEAVY & loaded:
            first.setdefault(library, module)
    return first


def read_allowed(root, users):
    "Module -> the heavy libraries that it or what it imports may load."
    allowed = {}
    for module in read_order(root):
        allowed[module] = set(users.get(module, ()))
        for name in read_imports(root, module):
            allowed[module] |= allowed.get(name, set())
    return {module: sorted(libraries) for module, libraries in allowed.items()}


def modules_that_load_too_much(root, users):
    "(module, library) for the first module that loads one it may not; a process for each set of libraries."
    allowed = read_allowed(root, users)
    code = 'import json, sys, test_layers; print(json.dumps(test_layers.first_to_load(sys.argv[1:])))'
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), str(ROOT/'tests')]))
    wrong = []
    for libraries, modules in groupby(sorted(allowed, key=allowed.get), key=allowed.get):
        process = subprocess.run([sys.executable, '-c', code, *modules], env=environment, cwd=root,
                                 check=True, stdout=subprocess.PIPE, text=True)
        first = json.loads(process.stdout.splitlines()[-1])
        wrong += [(first[library], library) for library in first if library not in libraries]
    return wrong


def test_modules_load_no_more_than_they_use():
    assert modules_that_load_too_much(ROOT, USERS) == []


# Both tests fail where they should

@pytest.fixture
def plant(tmp_path):
    "Writes a package of three modules, one in each of three parts, with the given lines of code."
    (tmp_path/'datasets.py').touch() # instead of the library
    order = ['base.files', 'tokens', 'data.hub']
    folders = ['base/01_files', 'paper/01_tokens', 'data/01_hub']

    def write(**code):
        for module, notebook in zip(order, folders, strict=True):
            path = tmp_path/f'egmi/{module.replace(".", "/")}.py'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code.get(path.stem, ''))
            (path.parent/'__init__.py').touch()
            (tmp_path/f'nbs/{notebook}.ipynb').parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/f'nbs/{notebook}.ipynb').touch()
        return tmp_path
    return write


@pytest.mark.parametrize('line', [
    'import egmi.data.hub', 'import json, egmi.data.hub as hub', 'from egmi.data.hub import load',
    'from egmi.data import hub', 'from .data.hub import load', 'from .data import hub',
    'from . import data', 'from egmi.data import load', 'from egmi import EGMI',
    'def load():\n    from .data.hub import load', 'if True:\n    import egmi.data.hub'])
def test_an_import_that_goes_down_is_found(line, plant):
    (module, name), = imports_that_go_down(plant(tokens=line))
    assert module == 'tokens' and name in ('data.hub', 'data', 'data.load', 'EGMI')


def test_imports_that_go_up_pass(plant):
    tokens = 'import json\nfrom egmi import __version__\nfrom egmi.base.files import opened'
    hub = 'from ..tokens import Tokens\nfrom ..base.files import opened'
    root = plant(tokens=tokens + '\nfrom .base import files', hub=hub)
    assert imports_that_go_down(root) == []
    assert read_imports(root, 'data.hub') == {'tokens', 'base.files'}


def test_a_library_that_is_not_allowed_is_found(plant):
    root = plant(files='import datasets', tokens='from .base import files')
    assert modules_that_load_too_much(root, {}) == [('base.files', 'datasets')]
    assert modules_that_load_too_much(root, {'base.files': {'datasets'}}) == []


def test_a_library_inside_a_function_is_not_loaded(plant):
    root = plant(hub='def load():\n    import datasets')
    assert modules_that_load_too_much(root, {}) == []
