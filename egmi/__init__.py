__version__ = "0.1.0"


def __getattr__(name):
    "Load the model on first use, so that `import egmi` stays fast."
    if name == 'EGMI':
        from egmi.model import EGMI
        return EGMI
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
