"""Loaders of data sets, each imported on first use: `from egmi.data import load_folder`."""
from importlib import import_module

LOADERS = dict( # name -> module
    load_audiocaps='corpora',
    load_coco='corpora',
    load_folder='folders',
    load_huggingface='hub',
    load_karpathy='corpora',
    load_vctk='corpora',
)
__all__ = list(LOADERS)


def __getattr__(name):
    "Import a loader when it is asked for, so that `import egmi.data` stays fast."
    if name not in LOADERS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = import_module(f'{__name__}.{LOADERS[name]}')
    return getattr(module, name)


def __dir__():
    return sorted((globals().keys() | LOADERS.keys()) - {'LOADERS', 'import_module'})
