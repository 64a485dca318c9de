"Pictures and sounds from a frozen language model. The public names load on first use: `import egmi` is fast."
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers, which run nothing
    from .base.config import Preset, get_preset
    from .data.corpora import load_audiocaps, load_coco
    from .data.folders import load_folder
    from .data.hub import load_huggingface
    from .evaluation.folders import score_sounds, write_sounds
    from .frozen.audioldm import AudioLDM
    from .frozen.diffusion import StableDiffusion
    from .frozen.imagebind import ImageBind
    from .frozen.pandagpt import PandaGPT
    from .mapper import (
        Conditions, CrossMapper, EGMIMapper, GILLMapper, MapperConfig, NextGPTMapper, SeparatedMapper)
    from .model import EGMI, EGMIOutput
    from .tokens import ModalityTokens
    from .training import Conditioner

MODULES = {  # public name -> the module that defines it
    'AudioLDM': 'egmi.frozen.audioldm',
    'Conditioner': 'egmi.training',
    'Conditions': 'egmi.mapper',
    'CrossMapper': 'egmi.mapper',
    'EGMI': 'egmi.model',
    'EGMIMapper': 'egmi.mapper',
    'EGMIOutput': 'egmi.model',
    'GILLMapper': 'egmi.mapper',
    'ImageBind': 'egmi.frozen.imagebind',
    'MapperConfig': 'egmi.mapper',
    'ModalityTokens': 'egmi.tokens',
    'NextGPTMapper': 'egmi.mapper',
    'PandaGPT': 'egmi.frozen.pandagpt',
    'Preset': 'egmi.base.config',
    'SeparatedMapper': 'egmi.mapper',
    'StableDiffusion': 'egmi.frozen.diffusion',
    'get_preset': 'egmi.base.config',
    'load_audiocaps': 'egmi.data.corpora',
    'load_coco': 'egmi.data.corpora',
    'load_folder': 'egmi.data.folders',
    'load_huggingface': 'egmi.data.hub',
    'score_sounds': 'egmi.evaluation.folders',
    'write_sounds': 'egmi.evaluation.folders',
}

__all__ = list(MODULES)


def __getattr__(name):
    "Load the module of a public name"
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(globals().keys() | MODULES.keys())
