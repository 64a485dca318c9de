"""Render README.md from nbs/index.ipynb with nbconvert, so that no Quarto is needed."""
import re
import shutil
from pathlib import Path
from posixpath import join, normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^#\|\s*(\w+)(?::\s*(\w+))?.*\n?', re.MULTILINE)
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\w+:|#|/)([^)"]+)')


def link_from_root(text):
    "Links relative to nbs/ as links relative to the repository."
    return LINK.sub(lambda match: match[1] + normpath(join('nbs', match[2])), text)


def visible(cell):
    "The cell as the reader sees it: directives obeyed, then removed; None when nothing is left."
    if cell.cell_type == 'markdown':
        cell.source = link_from_root(cell.source)
        return cell
    directives = dict(DIRECTIVE.findall(cell.source))
    if cell.cell_type == 'raw' or 'hide' in directives or directives.get('include') == 'false':
        return None
    if directives.get('output') == 'false':
        cell.outputs = []
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data:
            data['text/markdown'] = link_from_root(data['text/markdown'])
    cell.source = '' if directives.get('echo') == 'false' else DIRECTIVE.sub('', cell.source)
    return cell if cell.source or cell.outputs else None


def render(nb):
    "Markdown text and its pictures, `{path: bytes}`."
    nb.cells = [c for c in map(visible, nb.cells) if c is not None]
    exporter = MarkdownExporter()
    formats = ['text/markdown', 'image/svg+xml', 'image/png', 'text/plain']
    exporter.config.NbConvertBase.display_data_priority = formats
    resources = {'output_files_dir': 'README_files', 'unique_key': 'README'}
    text, resources = exporter.from_notebook_node(nb, resources)
    # left by cells whose code is not echoed
    text = re.sub(r'^```\w*\n\s*```$|^[ \t]+$', '', text, flags=re.MULTILINE)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources['outputs']


if __name__ == '__main__':
    text, pictures = render(nbformat.read(ROOT/'nbs/index.ipynb', as_version=4))
    shutil.rmtree(ROOT/'README_files', ignore_errors=True)
    for path, data in pictures.items():
        (ROOT/path).parent.mkdir(exist_ok=True)
        (ROOT/path).write_bytes(data)
    (ROOT/'README.md').write_text(text, encoding='utf-8')
