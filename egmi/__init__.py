"Pictures and sounds from a frozen language model. The public names load on first use: `import egmi` is fast."
from importlib import import_module

__version__ = "0.1.0"

PUBLIC = {  # module -> what it offers at the top of the package
    'base.config': ['Preset', 'get_preset'],
    'frozen.imagebind': ['ImageBind'],
    'frozen.pandagpt': ['PandaGPT'],
    'frozen.diffusion': ['StableDiffusion'],
    'frozen.audioldm': ['AudioLDM'],
    'tokens': ['ModalityTokens'],
    'mapper': ['Conditions', 'CrossMapper', 'EGMIMapper', 'GILLMapper', 'MapperConfig', 'NextGPTMapper',
               'SeparatedMapper'],
    'training': ['Conditioner'],
    'model': ['EGMI', 'EGMIOutput'],
    'data': ['load_audiocaps', 'load_coco', 'load_folder', 'load_huggingface'],
    'evaluation.folders': ['score_sounds', 'write_sounds'],
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names}
__all__ = list(MODULES)


def __getattr__(name):
    "Load the module of a public name"
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(globals().keys() | MODULES.keys())
