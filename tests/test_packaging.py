"""The wheel that `pip install .` builds works outside the repository."""
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def committed_files():
    "Files that git tracks or would track, relative to the repository."
    names = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\0')
    return [name for name in names if name and (ROOT/name).is_file()]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy, so that no stale build folder reaches the wheel and none is left behind."
    tmp = tmp_path_factory.mktemp('wheel')
    for name in committed_files():
        (tmp/'source'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, tmp/'source'/name)
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp, tmp/'source', cwd=tmp)
    return next(tmp.glob('egmi-*.whl'))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {name for name in committed_files() if name.startswith('egmi/')
                and (name.endswith('.py') or name.startswith('egmi/weights/'))}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert 'egmi/__init__.py' in found
    assert found == expected


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info, = {name.split('/')[0] for name in archive.namelist() if '.dist-info/' in name}
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(f'{info}/entry_points.txt').decode())
    assert dict(entry_points['nbdev']) == {'egmi': 'egmi._modidx:d'}
    assert 'Requires-Python: >=3.11' in archive.read(f'{info}/METADATA').decode()


ORACLES = {'statsmodels', 'mel-cepstral-distance', 'panns-inference', 'torchlibrosa', 'torchvggish'}


def test_every_requirement_has_its_tested_version():
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini')
    lines = ' '.join(settings['DEFAULT'][f'{extra}requirements'] for extra in ('', 'dev_', 'paper_'))
    required = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines.split())}
    pinned = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line)
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for name, versions in required.items(): assert versions.contains(pinned[name]), name
    assert '<' in str(required['transformers']) and '<' in str(required['diffusers'])
    assert ORACLES <= required.keys() and 'laion-clap' in pinned


def test_wheel_imports_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    modules = sorted(path.relative_to(tmp_path/'site').with_suffix('').as_posix().replace('/', '.')
                     for path in (tmp_path/'site/egmi').rglob('*.py') if not path.name.startswith('_'))
    code = f"""import importlib, sys
sys.path.insert(0, {str(tmp_path/'site')!r})
for name in {modules}: print(importlib.import_module(name).__file__)"""
    files = run(sys.executable, '-c', code, cwd=tmp_path).splitlines()
    assert len(files) == len(modules) > 0
    assert all(Path(file).is_relative_to(tmp_path/'site') for file in files)
