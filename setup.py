"""Package metadata comes from settings.ini, so that nbdev and pip read the same file."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = Path('README.md')
EXPERIMENTS = ['ablation.ipynb', 'text_to_audio.ipynb', 'audio_editing.ipynb']  # run by `egmi ablation`...

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13))],
    packages=[*find_packages(include=['egmi', 'egmi.*']), 'egmi.notebooks'],
    package_dir={'egmi.notebooks': 'nbs'},
    package_data={'egmi': ['py.typed', 'weights/**/*'], 'egmi.notebooks': EXPERIMENTS},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
