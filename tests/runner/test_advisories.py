"""`make audit` against a service of advisories on loopback: what it passes, what it finds, what it could not check."""

import http.server
import json
import subprocess
import threading

import pytest

from runner import ROOT

pytestmark = pytest.mark.slow  # installs pip-audit
ADVISORY = {"id": "PYSEC-0", "summary": "made up", "affected": [{"package": {"name": "nbformat", "ecosystem": "PyPI"}}]}


@pytest.fixture
def service():
    """(address, {package: advisories}, names that were asked for) of a service that speaks OSV's v1 protocol."""
    known, asked = {}, []

    class Advisories(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            asked.append(name)
            body = json.dumps({"vulns": known[name]} if name in known else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query", known, asked
    server.shutdown()


def audit(address: str) -> tuple[int, str]:
    """Exit status and output of the target."""
    done = subprocess.run(["make", "-s", "audit", f"OSV={address}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    return done.returncode, done.stdout


def test_both_locks_are_asked_for_in_full_and_an_advisory_is_named(service):
    address, known, asked = service
    status, said = audit(address)
    assert status == 0 and said.count("no known vulnerability") == 2
    lines = [line for lock in ("cpu", "gpu") for line in (ROOT / f"requirements/{lock}.txt").read_text().splitlines()]
    locked = {line.split("==")[0].split("[")[0].lower() for line in lines if "==" in line and ";" not in line}
    assert len(locked) > 100 and {n.replace("_", "-").replace(".", "-") for n in locked} <= set(asked)
    known["nbformat"] = [ADVISORY]
    status, said = audit(address)
    assert status and "nbformat" in said and "PYSEC-0" in said and "no known vulnerability" not in said


def test_a_service_that_does_not_answer_is_no_pass():
    status, said = audit("http://127.0.0.1:9/v1/query")
    assert status and said.count("was not checked") == 2 and "no known vulnerability" not in said
