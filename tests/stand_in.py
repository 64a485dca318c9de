"""A stand-in for the Hugging Face hub: a small server on this machine, which the client of huggingface_hub
really talks to. A replaced client would not notice a request that the hub refuses."""
import base64
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants as hub

TOKEN = 'hf_secret'
COMMIT = 'c' * 40


class Hub(BaseHTTPRequestHandler):
    "The requests that sharing and loading a model or a dataset make; `server.repos` is id -> {path: bytes}."

    def answer(self, data=b'', code=200, **headers):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
            headers['Content-Type'] = 'application/json'
        self.send_response(code)
        for name, value in (headers | {'Content-Length': str(len(data))}).items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def refuse(self, code, kind):
        self.answer(dict(error=kind), code, X_Error_Code=kind, X_Error_Message=kind)

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        path = urlsplit(self.path).path
        if path == '/api/validate-yaml':
            return self.answer({})
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.refuse(401, 'Unauthorized')
        if path == '/api/repos/create':
            wanted = json.loads(body)
            repo = f'{wanted["organization"]}/{wanted["name"]}'
            self.server.repos.setdefault(repo, {})
            self.server.created.append(wanted)
            return self.answer(dict(url=f'{hub.ENDPOINT}/{repo}'))
        repo, action = path.removeprefix('/api/models/').rsplit('/', 2)[:2]
        if action == 'preupload':
            names = [file['path'] for file in json.loads(body)['files']]
            modes = [dict(path=name, uploadMode='regular', shouldIgnore=False) for name in names]
            return self.answer(dict(files=modes))
        for line in body.splitlines():
            item = json.loads(line)
            if item['key'] == 'file':
                value = item['value']
                self.server.repos[repo][value['path']] = base64.b64decode(value['content'])
        self.answer(dict(commitUrl=f'{hub.ENDPOINT}/{repo}/commit/{COMMIT}', commitOid=COMMIT))

    def do_GET(self):
        url = urlsplit(self.path)
        path = url.path.strip('/').removeprefix('api/')
        for kind in ('models/', 'datasets/'):
            path = path.removeprefix(kind)
        parts = path.split('/')
        repo, action, file = '/'.join(parts[:2]), ''.join(parts[2:3]), '/'.join(parts[4:])
        files = self.server.repos.get(repo)
        if files is None:
            return self.refuse(404, 'RepoNotFound')
        if action in ('', 'revision'):
            return self.answer(dict(id=repo, sha=COMMIT, siblings=[]))
        if action == 'tree':
            return self.answer(listing(files, file, 'recursive=true' in url.query.lower()))
        if file not in files:
            return self.refuse(404, 'EntryNotFound')
        self.server.loaded.append(file)
        tag = hashlib.sha1(files[file]).hexdigest()
        self.answer(files[file], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args):
        "Say nothing"


def listing(files, folder, recursive):
    "What is in a folder, as the hub says it."
    items = []
    for path, content in files.items():
        if recursive or os.path.dirname(path) == folder:
            oid = hashlib.sha1(content).hexdigest()
            items.append(dict(type='file', path=path, size=len(content), oid=oid))
    if not recursive and not folder:
        below = {os.path.dirname(path) for path in files} - {''}
        items += [dict(type='directory', path=path, oid=COMMIT) for path in below]
    return items


@contextmanager
def serving():
    "The stand-in while it runs."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.created, server.loaded = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
