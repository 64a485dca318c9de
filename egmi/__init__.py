"Pictures and sounds from a frozen language model. The public names load on first use: `import egmi` is fast."
import inspect
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
    'outputs': ['EGMIOutput'],
    'model': ['EGMI'],
    'data': ['load_audiocaps', 'load_coco', 'load_folder', 'load_huggingface'],
    'evaluation.folders': ['score_sounds', 'write_sounds'],
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names}
__all__ = list(MODULES)


def parts(value):
    "A function itself; a class, and the public functions that it and its bases in this package define"
    yield value
    for base in getattr(value, '__mro__', ()):
        if base.__module__.startswith(__name__):
            for name in vars(base):
                member = getattr(base, name)
                function = getattr(member, '__func__', member)  # of a class method
                if inspect.isfunction(function) and not name.startswith('_'):
                    yield function


def explain(value):
    "Append the comments behind the parameters to the docstring, where `help` and `?` show them"
    from fastcore.docments import docments
    marker = '\n\nParameters and result:\n'
    if marker in (value.__doc__ or ''):
        return
    notes = docments(value, returns=True)
    lines = [f'    {name}: {note}' for name, note in notes.items() if note]
    if lines:
        value.__doc__ = (value.__doc__ or '') + marker + '\n'.join(lines)


def __getattr__(name):
    "Load the module of a public name"
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{MODULES[name]}'), name)
    for part in parts(value):
        explain(part)
    globals()[name] = value
    return value


def __dir__():
    own = {'PUBLIC', 'MODULES', 'import_module', 'inspect', 'parts', 'explain'}
    return sorted((globals().keys() | MODULES.keys()) - own)
