"""A local stand-in for the Hugging Face Hub: what `huggingface_hub` asks for to load and to upload small files."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
POST = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")


class Hub:
    """Repositories in memory.

    Attributes:
      commits: the files of each commit of a repository, oldest first.
      made: the bodies of the requests that made a repository.
      asked: the path of each request for a file.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.made: list[dict] = []
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds files to a repository, and returns the commit."""
        before = self.commits.setdefault(repo, {})
        name = hashlib.sha1(repr((len(before), sorted(files.items()))).encode()).hexdigest()
        before[name] = {**(list(before.values())[-1] if before else {}), **files}
        return name

    def find(self, repo: str, revision: str) -> str:
        return list(self.commits[repo])[-1] if revision == "main" else revision


@contextlib.contextmanager
def serving(monkeypatch, cache):
    """Yields a `Hub` that huggingface_hub uses in the block, with its cache in the folder `cache`."""
    from huggingface_hub import constants

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            found = FILE.fullmatch(self.path)
            hub.asked.append(self.path)
            if found is None or found["repo"] not in hub.commits:
                return self.answer(404, X_Error_Code="RepoNotFound")
            commit = hub.find(found["repo"], found["revision"])
            if commit not in hub.commits[found["repo"]]:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if (body := hub.commits[found["repo"]][commit].get(found["file"])) is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = POST.fullmatch(self.path)
            if self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                answer = {"url": f"{constants.ENDPOINT}/{hub.made[-1].get('organization')}/{hub.made[-1]['name']}"}
            elif self.path == "/api/validate-yaml":
                answer = {"errors": [], "warnings": []}
            elif found["what"] == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
                commit = hub.commit(found["repo"], {path: base64.b64decode(text) for path, text in files.items()})
                answer = {"commitOid": commit, "commitUrl": f"{constants.ENDPOINT}/{found['repo']}/commit/{commit}"}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
