"""The wheel that `pip install .` builds works outside the repository."""
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from egmi.commands.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('base', 'toybox', 'frozen', 'data', 'evaluation', 'small', 'commands')
ORACLES = {'statsmodels', 'mel-cepstral-distance', 'panns-inference', 'torchlibrosa', 'torchvggish'}


def run(*command, cwd):
    "What a command prints."
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def committed_files():
    "Files that git tracks or would track, relative to the repository."
    options = ('-z', '--cached', '--others', '--exclude-standard')
    names = run('git', 'ls-files', *options, cwd=ROOT).split('\0')
    return [name for name in names if name and (ROOT/name).is_file()]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy, so that no stale build folder reaches the wheel and none is left behind."
    tmp = tmp_path_factory.mktemp('wheel')
    for name in committed_files():
        copy = tmp/'source'/name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, copy)
    options = ('--no-deps', '--no-build-isolation', '--wheel-dir', tmp)
    run(sys.executable, '-m', 'pip', 'wheel', *options, tmp/'source', cwd=tmp)
    return next(tmp.glob('egmi-*.whl'))


def belongs_to_the_package(name):
    return name.startswith('egmi/') and (
        name.endswith(('.py', '/py.typed')) or name.startswith('egmi/weights/'))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {name for name in committed_files() if belongs_to_the_package(name)}
    expected |= {f'egmi/notebooks/{name}.ipynb' for name in EXPERIMENTS}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert {f'egmi/{part}/__init__.py' for part in PARTS} <= found
    assert {'egmi/__init__.py', 'egmi/py.typed'} <= found
    assert found == expected


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info, = {name.split('/')[0] for name in archive.namelist() if '.dist-info/' in name}
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(f'{info}/entry_points.txt').decode())
    assert dict(entry_points['nbdev']) == {'egmi': 'egmi._modidx:d'}
    assert dict(entry_points['console_scripts']) == {'egmi': 'egmi.commands.command:main'}
    assert 'Requires-Python: >=3.11' in archive.read(f'{info}/METADATA').decode()


def required_versions():
    "Name -> versions, of all requirements in settings.ini."
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini')
    lines = ' '.join(settings['DEFAULT'][f'{extra}requirements'] for extra in ('', 'dev_'))
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines.split())}


def pinned_versions():
    "Name -> version, as in constraints.txt."
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pairs = [line.split('==') for line in lines if '==' in line]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_has_its_tested_version():
    required = required_versions()
    pinned = pinned_versions()
    assert [name for name, versions in required.items() if not versions.contains(pinned[name])] == []
    for library in ('transformers', 'diffusers'):
        assert '<' in str(required[library])
    assert ORACLES <= required.keys() and 'laion-clap' in pinned


IMPORT_ALL = """
import importlib, sys
site, *modules = sys.argv[1:]
sys.path.insert(0, site)
for name in modules:
    print(importlib.import_module(name).__file__)
import egmi
for name in egmi.__all__:
    print(sys.modules[getattr(egmi, name).__module__].__file__)
"""


@pytest.mark.slow
def test_wheel_imports_elsewhere(wheel, tmp_path):
    site = tmp_path/'site'
    zipfile.ZipFile(wheel).extractall(site)
    modules = []
    for path in sorted((site/'egmi').rglob('*.py')):
        if not path.name.startswith('_'):
            modules.append('.'.join(path.relative_to(site).with_suffix('').parts))
    files = run(sys.executable, '-c', IMPORT_ALL, site, *modules, cwd=tmp_path).splitlines()
    assert len(files) > len(modules) > 0
    assert all(Path(file).is_relative_to(site) for file in files)


@pytest.mark.slow
def test_wheel_runs_its_own_notebooks(wheel, tmp_path):
    site = tmp_path/'site'
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | dict(PYTHONPATH=str(site))
    for name in EXPERIMENTS:
        command = name.replace('_', '-')
        process = subprocess.run(
            [sys.executable, '-m', 'egmi', command, '--help'], cwd=tmp_path, env=environment, check=True,
            capture_output=True, text=True)
        assert f'Parameters of {site}/egmi/notebooks/{name}.ipynb:' in process.stdout
        packed = (site/f'egmi/notebooks/{name}.ipynb').read_bytes()
        assert packed == (ROOT/f'nbs/{name}.ipynb').read_bytes()
