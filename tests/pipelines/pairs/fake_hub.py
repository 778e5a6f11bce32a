"""A Hub of one process: the few endpoints that pushing and fetching a model repository take.

    with serving() as hub:
        HfApi(endpoint=hub.endpoint, token="hf_test")

Every push is a commit on a branch; files travel inside the commit, as small ones do on the real Hub.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        endpoint: its address.
        branches: newest commit by repository and branch.
        commits: files by commit.
        private: whether a repository was made private.
        tokens: authorization headers that came.
        fail_next: status codes that the next requests are answered with instead.
    """

    endpoint: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    fail_next: list[int] = field(default_factory=list)

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """Put files on top of a branch."""
        sha = hashlib.sha1(f"{repo} {branch} {len(self.commits)}".encode()).hexdigest()
        before = self.commits.get(self.branches[repo].get(branch, ""), {})
        self.commits[sha] = {**before, **files}
        self.branches[repo][branch] = sha
        return sha

    def at(self, repo: str, revision: str) -> str | None:
        """The commit of a branch or of itself."""
        branches = self.branches.get(repo, {})
        return branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, repo: str, revision: str = "main") -> Files:
        """What a repository holds."""
        sha = self.at(repo, revision)
        assert sha is not None, f"{repo} has no {revision}"
        return self.commits[sha]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests read what matters."""

    def _answer(self, value: Any = None, *, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, status=404, X_Error_Code=code)

    def _began(self) -> list[str] | None:
        """Parts of the path; None when the request has been answered with a failure."""
        self.hub.tokens.add(self.headers.get("authorization"))
        if self.hub.fail_next:
            self._answer({"error": "busy"}, status=self.hub.fail_next.pop(0))
            return None
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match self._began():
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", user, name, "branch", branch]:
                branches = self.hub.branches[f"{user}/{name}"]
                status = 409 if branch in branches else 200
                branches.setdefault(branch, branches["main"])
                self._answer({}, status=status)
            case ["api", "models", _, _, "preupload", _]:
                asked = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self._answer({"files": [{"path": f["path"], **regular} for f in asked]})
            case ["api", "models", user, name, "commit", branch]:
                self._commit(f"{user}/{name}", branch, [json.loads(line) for line in body.splitlines()])
            case ["api", *_]:
                self._missing("EntryNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.hub.branches else 200
        if status == 200:
            self.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.branches[repo] = {}
            self.hub.commit(repo, "main", {".gitattributes": b"*.bin filter=lfs\n"})
        self._answer({"url": f"{self.hub.endpoint}/{repo}", "id": repo}, status=status)

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        parent = next(line["value"].get("parentCommit") for line in lines if line["key"] == "header")
        if parent not in (None, self.hub.at(repo, branch)):
            self._answer({"error": "the branch has moved"}, status=412)
            return
        files = [line["value"] for line in lines if line["key"] == "file"]
        sha = self.hub.commit(repo, branch, {f["path"]: base64.b64decode(f["content"]) for f in files})
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._answer({"success": True, "commitOid": sha, "commitUrl": url})

    def do_GET(self) -> None:
        match self._began():
            case ["api", "models", user, name, *rest]:
                self._describe(f"{user}/{name}", rest)
            case [user, name, "resolve", revision, *path]:
                self._resolve(f"{user}/{name}", revision, "/".join(path))

    do_HEAD = do_GET

    def _describe(self, repo: str, rest: list[str]) -> None:
        if repo not in self.hub.branches:
            self._missing("RepoNotFound")
            return
        sha = self.hub.at(repo, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            self._missing("RevisionNotFound")
        elif rest[:1] == ["tree"]:
            files = self.hub.commits[sha]
            self._answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in sorted(files.items())])
        else:
            self._answer({"id": repo, "modelId": repo, "sha": sha, "private": True, "siblings": [], "tags": []})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        sha = self.hub.at(repo, revision)
        if sha is None or path not in self.hub.commits[sha]:
            self._missing("EntryNotFound")
            return
        content = self.hub.commits[sha][path]
        etag = hashlib.sha256(content).hexdigest()
        self._answer(raw=content, ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges="bytes")


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub for the length of a block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
