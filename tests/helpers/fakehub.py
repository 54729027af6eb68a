"""A Hugging Face Hub on loopback, in memory: enough of its API to create, upload, list and download model repositories.

Spoken: whoami-v2, repos/create, validate-yaml, preupload, Git LFS batch (transfer "basic") with a PUT that checks the
SHA-256, commit (ndjson), model info, revision, refs, tree, paths-info, and resolve with HEAD, GET and Range.
Not spoken: xet (clients set ``HF_HUB_DISABLE_XET=1``), data sets, pull requests, branches other than main.

    with FakeHub() as hub:
        subprocess.run([...], env=os.environ | hub.environ(cache=tmp_path))
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER = "tester"
ORGANISATIONS = ("acme",)
LFS_ABOVE = 4096  # bytes; the Hub stores larger files and every *.safetensors with LFS


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """The files of one repository, and one revision hash per commit (the last one is ``main``)."""

    name: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit")

    def commit(self, message: str) -> str:
        self.messages.append(message)
        self.commits.append(hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest())
        return self.commits[-1]

    def entry(self, path: str) -> dict:
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path in self.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """Entries below ``folder`` ("" for the root); only its direct children unless recursive."""
        prefix = folder + "/" if folder else ""
        below = [path for path in sorted(self.files) if path.startswith(prefix)]
        if recursive:
            return [self.entry(path) for path in below]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in below if "/" in path[len(prefix) :]}
        files = [self.entry(path) for path in below if "/" not in path[len(prefix) :]]
        return files + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]


class Refused(Exception):
    """Becomes an HTTP error; ``code`` is the X-Error-Code header, from which the client picks an exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message} | body


class FakeHub(ThreadingHTTPServer):
    """The server. ``repos`` holds what was uploaded, ``requests`` every "METHOD path" asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}  # LFS objects by SHA-256, kept across repositories as on the Hub
        self.requests: list[str] = []
        self.corrupt_uploads = False  # flip one bit of every LFS object on arrival, as a broken proxy would

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environ(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process; must be set before it imports huggingface_hub.

        Args:
            home: an empty folder for the client's download cache and login.
            token: what the client is logged in with; None for not logged in.
        """
        client = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return client | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": token or ""}

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are tried in order; an action returns the JSON answer, or sends its own and returns None."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format, *args) -> None:  # noqa: A002 (the base class's name)
        self.server.requests.append(f"{self.command} {self.path}")

    def handle_any(self) -> None:
        # The whole body is read even when the request is refused: its rest would be taken for the next request.
        self.content = self.read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for method, pattern, action in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    answer = action(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    if answer is not None:
                        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                    return
            raise Refused(404, f"no such route: {self.command} {url.path}")
        except Refused as refusal:
            headers = {"Content-Type": "application/json", "X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, json.dumps(refusal.body).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- who may do what -----------------------------------------------------------------------------------------------

    def signed_in(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            raise Refused(401, "Invalid credentials in Authorization header")
        return bool(token)

    def writer(self, namespace: str) -> None:
        if not self.signed_in():
            raise Refused(401, "Unauthorized")
        if namespace not in (USER, *ORGANISATIONS):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace}")

    def repo(self, name: str, revision: str = "main", write: bool = False) -> Repo:
        if write:
            self.writer(name.split("/")[0])
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.signed_in()):
            raise Refused(404 if self.signed_in() else 401, "Repository not found", "RepoNotFound")
        if revision not in ("main", repo.commits[-1]):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    # -- routes --------------------------------------------------------------------------------------------------------

    def whoami(self) -> dict:
        if not self.signed_in():
            raise Refused(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": USER, "orgs": [{"name": name} for name in ORGANISATIONS]}

    def create(self) -> dict:
        asked = json.loads(self.content)
        namespace = asked.get("organization") or USER
        self.writer(namespace)
        name = f"{namespace}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[name] = Repo(name, private)
        return {"url": url, "name": name}

    def validate_yaml(self) -> dict:
        content = json.loads(self.content)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = [
            {"message": f'"{key}" must be a string'}
            for key in ("license", "library_name", "pipeline_tag", "base_model_relation")
            if not isinstance(metadata.get(key, ""), str)
        ]
        if metadata.get("license") == "other" and "license_name" not in metadata:
            errors.append({"message": '"license_name" is required when license is "other"'})
        for entry in metadata.get("model-index", []):
            for result in entry["results"]:
                if {"task", "dataset", "metrics"} - result.keys():
                    errors.append({"message": '"model-index" is not valid'})
        if errors:
            raise Refused(400, "Invalid metadata", errors=errors)
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def preupload(self, name: str, revision: str) -> dict:
        repo = self.repo(name, revision, write=True)
        return {"files": [self.upload_mode(repo, asked) for asked in json.loads(self.content)["files"]]}

    def upload_mode(self, repo: Repo, asked: dict) -> dict:
        path = asked["path"]
        lfs = asked["size"] > LFS_ABOVE or path.endswith(".safetensors")
        oid = git_oid(repo.files[path]) if path in repo.files and not lfs else None
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def lfs_batch(self, name: str) -> dict:
        self.repo(name, write=True)
        objects = []
        for asked in json.loads(self.content)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.uploads:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict:
        data = self.content
        if self.server.corrupt_uploads:
            data = bytes([data[0] ^ 1]) + data[1:]
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "SHA-256 of the object is not the one announced")
        self.server.uploads[oid] = data
        return {}

    def commit(self, name: str, revision: str) -> dict:
        repo = self.repo(name, revision, write=True)
        operations = [json.loads(line) for line in self.content.splitlines() if line]
        summary = ""
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
                repo.lfs.discard(value["path"])
            elif key == "lfsFile" and value["oid"] in self.server.uploads:
                repo.files[value["path"]] = self.server.uploads[value["oid"]]
                repo.lfs.add(value["path"])
            elif key == "deletedFile" and value["path"] in repo.files:
                del repo.files[value["path"]]
            else:
                raise Refused(400, f"cannot commit {key} {value['path']}")
        oid = repo.commit(summary)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}

    def info(self, name: str, revision: str = "main") -> dict:
        repo = self.repo(name, revision or "main")
        card = re.match(rb"---\n(.*?)\n---\n", repo.files.get("README.md", b""), re.DOTALL)
        answer = {"_id": "0" * 24, "id": name, "modelId": name, "sha": repo.commits[-1], "private": repo.private}
        answer |= {"cardData": yaml.safe_load(card[1]) if card else None, "tags": [], "gated": False, "disabled": False}
        if "config.json" in repo.files:
            answer["config"] = {"model_type": json.loads(repo.files["config.json"]).get("model_type")}
        return answer | {"siblings": [{"rfilename": path} for path in sorted(repo.files)]}

    def refs(self, name: str) -> dict:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.repo(name).commits[-1]}
        return {"branches": [main], "tags": [], "converts": []}

    def tree(self, name: str, revision: str, folder: str) -> list[dict]:
        entries = self.repo(name, revision).tree(folder, self.query.get("recursive") == ["true"])
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return entries

    def paths_info(self, name: str, revision: str) -> list[dict]:
        repo = self.repo(name, revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.content)["paths"]
        else:
            paths = parse_qs(self.content.decode()).get("paths", [])
        return [repo.entry(path) for path in paths if path in repo.files]

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, revision)
        headers = {"X-Repo-Commit": repo.commits[-1], "Accept-Ranges": "bytes"}
        if path not in repo.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, b"Entry not found", headers)
        data = repo.files[path]
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest() if path in repo.lfs else git_oid(data)}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        return self.send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("GET", rf"/api/models/{NAME}/refs", Handler.refs),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", rf"/api/models/{NAME}(?:/revision/{REVISION})?", Handler.info),
    ("HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
