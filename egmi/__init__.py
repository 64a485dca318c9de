"Pictures and sounds from a frozen language model. The public names load on first use: `import egmi` is fast."
import inspect
import sys
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


def describe(parameter):
    "Name, type and default of a parameter"
    facts = []
    annotation = parameter.annotation
    if isinstance(annotation, type) and annotation is not inspect.Parameter.empty:
        facts.append(annotation.__name__)
    elif annotation is not inspect.Parameter.empty:
        facts.append(inspect.formatannotation(annotation))
    if parameter.default is not inspect.Parameter.empty:
        facts.append(f'default {parameter.default!r}')
    return f'{parameter.name} ({", ".join(facts)})' if facts else parameter.name


def explain(value):
    "Append the comments behind parameters and result to the docstring, where `help` and `?` show them"
    from fastcore.docments import docments
    doc = value.__doc__ or ''
    if '\n\nParameters:\n' in doc or '\n\nReturns:\n' in doc:
        return
    notes = docments(value, returns=True)
    lines = []
    for name, parameter in inspect.signature(value).parameters.items():
        if notes.get(name):
            lines.append(f'    {describe(parameter)}: {notes[name]}')
    if lines:
        doc += '\n\nParameters:\n' + '\n'.join(lines)
    if notes.get('return'):
        doc += f'\n\nReturns:\n    {notes["return"]}'
    value.__doc__ = doc


def explain_loaded():
    "Explain the public names of all modules that are loaded: what a function returns, and not it alone"
    for name, module in MODULES.items():
        loaded = sys.modules.get(f'{__name__}.{module}')
        value = globals().get(name) or getattr(loaded, '__dict__', {}).get(name)
        if value is not None:
            for part in parts(value):
                explain(part)


def __getattr__(name):
    "Load the module of a public name"
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{MODULES[name]}'), name)
    globals()[name] = value
    explain_loaded()
    return value


def __dir__():
    own = {'PUBLIC', 'MODULES', 'import_module', 'inspect', 'sys',
           'parts', 'describe', 'explain', 'explain_loaded'}
    return sorted((globals().keys() | MODULES.keys()) - own)
