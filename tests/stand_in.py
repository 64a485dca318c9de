"""A stand-in for the Hugging Face hub: a small server on this machine, which the client of huggingface_hub
really talks to. A replaced client would not notice a request that the hub refuses."""
import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants as hub

TOKEN = 'hf_secret'
COMMIT = 'c' * 40


class Hub(BaseHTTPRequestHandler):
    "The requests that sharing and loading a model make; `server.repos` is id -> {path: bytes}."

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
        path = urlsplit(self.path).path.strip('/').removeprefix('api/models/')
        if path.startswith('api/'):
            return self.refuse(404, 'NotFound')
        owner, name, action, _, *rest = path.split('/')
        files = self.server.repos.get(f'{owner}/{name}')
        if files is None:
            return self.refuse(404, 'RepoNotFound')
        if action == 'revision':
            return self.answer(dict(id=f'{owner}/{name}', sha=COMMIT, siblings=[]))
        if action == 'tree':
            tree = [dict(type='file', path=file, size=len(content), oid=hashlib.sha1(content).hexdigest())
                    for file, content in files.items()]
            return self.answer(tree)
        content = files['/'.join(rest)]
        self.server.loaded.append('/'.join(rest))
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args):
        "Say nothing"


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
