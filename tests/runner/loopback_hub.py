"""A tiny hub on loopback: serves local folders as repositories, so that the download path is tested for real.

    with serve({("dataset", "fdyrd/MATH"): folder}) as endpoint:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)})

Answers what `snapshot_download`, `hf_hub_download` and `from_pretrained` ask: repository information, the
list of files, and the files with their ETag. One revision a repository, whatever its name. A gated repository shows
its list of files to everybody, and the files to those who send its token.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

Repositories = dict[tuple[str, str], Path]  # (repository type: model, dataset or space; owner/name) -> folder


def _index(folder: Path) -> dict[str, tuple[Path, int, str]]:
    """{name in the repository: (path, size in bytes, git's id of the content)}"""
    index = {}
    for path in sorted(f for f in Path(folder).rglob("*") if f.is_file()):
        size, digest = path.stat().st_size, hashlib.sha1()
        digest.update(b"blob %d\0" % size)
        digest.update(path.read_bytes())
        index[path.relative_to(folder).as_posix()] = path, size, digest.hexdigest()
    return index


@contextmanager
def serve(repositories: Repositories, requests: list[str] | None = None,
          gated: dict[tuple[str, str], str] | None = None) -> Iterator[str]:
    """Serve the repositories as they are now on a free port of 127.0.0.1; yields the endpoint.

    `requests` collects what was asked for, as "GET /path". `gated` holds the tokens of gated repositories: without
    a token their files are refused with status 401, with another token with 403. Folders are read once, at the start.
    """
    indexes = {key: _index(folder) for key, folder in repositories.items()}
    commits = {
        key: hashlib.sha1(repr(sorted((n, f[2]) for n, f in index.items())).encode()).hexdigest()
        for key, index in indexes.items()
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if requests is not None:
                requests.append(f"{self.command} {path}")
            for (kind, name), index in indexes.items():
                commit = commits[kind, name]
                page = f"/{name}/resolve/" if kind == "model" else f"/{kind}s/{name}/resolve/"
                if path.startswith(page):
                    token = (gated or {}).get((kind, name))
                    sent = self.headers.get("Authorization")
                    if token and sent != f"Bearer {token}":
                        why = f"Access to {kind} {name} is restricted."
                        return self.send(403 if sent else 401, b"", X_Error_Code="GatedRepo", X_Error_Message=why)
                    return self.file(index, path.removeprefix(page).partition("/")[2], commit)
                page = f"/api/{kind}s/{name}"
                if path == page or path.startswith(page + "/revision/"):
                    siblings = [{"rfilename": f} for f in index]
                    about = {"id": name, "sha": commit, "private": False, "tags": [], "downloads": 0}
                    body = json.dumps(about | {"siblings": siblings}).encode()
                    return self.send(200, body, Content_Type="application/json")
                if path.startswith(page + "/tree/"):
                    return self.tree(index, path.removeprefix(page + "/tree/").partition("/")[2])
            self.send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

        do_HEAD = do_GET

        def tree(self, index: dict, below: str) -> None:
            entries = [
                {"type": "file", "path": name, "size": size, "oid": blob_id}
                for name, (_, size, blob_id) in index.items()
                if name.startswith(below and below + "/")
            ]
            if not entries:
                return self.send(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            self.send(200, json.dumps(entries).encode(), Content_Type="application/json")

        def file(self, index: dict, name: str, commit: str) -> None:
            if name not in index:
                return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            path, _, blob_id = index[name]
            self.send(200, path.read_bytes(), ETag=f'"{blob_id}"', X_Repo_Commit=commit, Accept_Ranges="none")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
