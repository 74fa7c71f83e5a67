"""A Hub on the loopback for tests: it speaks the Hub's HTTP API to the unmodified `huggingface_hub` client.

It holds models with commits, branches and tags, public, private and gated, and large files in a storage under another
host name. It has no Xet storage, which clients turn off by HF_HUB_DISABLE_XET, and no pull requests, and does not read
.gitignore. A request that it does not know is answered with status 501.

The `hub` fixture gives one to a test, and makes this process a client of it. Code that needs an empty cache or fresh
modules runs in a process of its own with `hub.environment(folder)`.
"""

import hmac
import json
import os
import re
import socketserver
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support import hub_api, hub_files
from tests.support.hub_repository import Refusal, Repository
from tests.support.hub_request import ROUTES, Answer, Request, User

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The modules whose import fills the table of routes.
ROUTE_MODULES = (hub_api, hub_files)
MAX_THREADS = 16
SECONDS_OF_SILENCE = 30
POLL_SECONDS = 0.02
SECRET = b"of the storage"
# What makes a process a client of another Hub, or of none, or of one behind a proxy.
OTHER_CLIENT = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_(?!STEPFLOW)|XDG_CACHE_HOME$|.*_proxy$", re.IGNORECASE)


@dataclass
class Fault:
    """A failure in waiting, see `HubServer.fail_next`."""

    pattern: re.Pattern[str]
    status: int | None
    times: int
    performed: bool
    sent: int


class HubServer:
    """The server. Its state is there to look at and to change, between requests.

    Attributes:
        endpoint: Its address, for HF_ENDPOINT.
        token: A token of `test-user`, who may write under that name, `test-org` and `org`.
        users: Who each token belongs to.
        repos: The repositories by id.
        requests: Every request that came, in order, with the status of its answer.
        errors: Tracebacks of the server's own mistakes; the fixture checks that there are none.
        part_size: Objects above this many bytes are uploaded in parts; None for all in one piece.
        parts: The uploaded parts of objects that are not complete.
    """

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.part_size: int | None = None
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.token = self.add_user("test-user", "test-org", "org")
        self._faults: list[Fault] = []
        self._lock = RLock()
        self._listener = _Listener(self)
        port = self._listener.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # By another name, so that clients take it for another host, to which no token may go.
        self._storage = f"http://localhost:{port}"
        self._thread = Thread(
            target=self._listener.serve_forever, args=[POLL_SECONDS], name="hub listener", daemon=True
        )

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def add_user(self, name: str, *organizations: str, role: str = "write") -> str:
        """Adds a user, and returns a token of theirs.

        Args:
            name: The name, which is also a namespace for models.
            *organizations: Further namespaces that the user may write to.
            role: "write", or "read" for a token that may not change anything.
        """
        token = f"hf_{name}_{role}"
        self.users[token] = User(name, organizations, role)
        return token

    def fail_next(
        self, pattern: str, status: int | None = None, *, times: int = 1, performed: bool = False, sent: int = 0
    ) -> None:
        """Makes the next requests of a kind fail.

        Args:
            pattern: A regular expression, searched in "METHOD /path".
            status: The status to answer with; None drops the connection.
            times: How many requests fail.
            performed: The request is carried out all the same, only its answer is lost.
            sent: How many bytes of the answer's body are sent before the connection is dropped.
        """
        with self._lock:
            self._faults.append(Fault(re.compile(pattern), status, times, performed or sent > 0, sent))

    def asked(self, pattern: str) -> list[Request]:
        """The requests so far whose "METHOD /path" a regular expression finds something in."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def api(self, token: str | bool | None = None) -> "HfApi":
        """A client of this Hub.

        Args:
            token: The token; by default that of `test-user`, and False for none.
        """
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token if token is None else token)

    def environment(self, cache_dir: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that is a client of this Hub.

        Args:
            cache_dir: The folder of all that is cached: models, remote code, settings.
            token: The token; None for a client that is not logged in.
        """
        kept = {name: value for name, value in os.environ.items() if not OTHER_CLIENT.match(name)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache_dir),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        } | ({} if token is None else {"HF_TOKEN": token})  # fmt: skip

    def run(
        self, script: str, cache_dir: str | Path, token: str | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Python script in a fresh process that is a client of this Hub.

        Args:
            script: The source text.
            cache_dir: As in `environment`.
            token: As in `environment`.
            timeout: Seconds after which it is killed.
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        environment = self.environment(cache_dir, token)
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=timeout)

    def signed(self, path: str) -> str:
        """The address of something in the storage, with leave to use it."""
        return f"{self._storage}{path}?signature={self._signature(unquote(path))}"

    def check_signature(self, request: Request) -> None:
        if request.query.get("signature") != [self._signature(request.path)]:
            raise Refusal(403, "SignatureDoesNotMatch")

    def _signature(self, path: str) -> str:
        return hmac.new(SECRET, path.encode(), "sha256").hexdigest()

    def answer(self, request: Request, path: str) -> tuple[Answer, Fault | None]:
        """Carries out a request, one at a time.

        Args:
            request: The request.
            path: Its path as it was sent, percent-encoded.

        Returns:
            The answer, and the fault that is to befall it.
        """
        with self._lock:
            self.requests.append(request)
            fault = self._fault(f"{request.method} {request.path}")
            answer = self._answer(request, path) if fault is None or fault.performed else Answer(b"")
            if fault is not None and fault.status is not None:
                answer = _refused(Refusal(fault.status, "A failure made by the test"))
            request.status = None if fault is not None and fault.status is None else answer.status
        return answer, fault

    def _fault(self, line: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and fault.pattern.search(line):
                fault.times -= 1
                return fault
        return None

    def _answer(self, request: Request, path: str) -> Answer:
        try:
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(path) if method == request.method else None
                if match is not None:
                    groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    return function(self, request, **groups)
            raise Refusal(501, f"The test Hub has no {request.method} {request.path}")
        except Refusal as refusal:
            return _refused(refusal)
        except Exception:
            self.errors.append(traceback.format_exc())
            return _refused(Refusal(500, "A mistake of the test Hub"))


def _refused(refusal: Refusal) -> Answer:
    headers = {"X-Error-Message": refusal.message.encode("ascii", "replace").decode()}
    headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
    headers |= {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
    return Answer({"error": refusal.message}, refusal.status, headers)


class _Listener(HTTPServer):
    """The listening socket of the Hub; a bounded number of threads handle the connections."""

    request_queue_size = 64

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="hub connection")
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_close(self) -> None:
        super().server_close()
        self.pool.shutdown()

    def server_bind(self) -> None:
        # HTTPServer would look its own name up in the DNS.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.pool.submit(self._handle_connection, request, client_address)

    def _handle_connection(self, connection: Any, address: Any) -> None:
        try:
            self.finish_request(connection, address)
        except (ConnectionError, TimeoutError):
            pass  # the client has gone
        except Exception:
            self.hub.errors.append(traceback.format_exc())
        finally:
            self.shutdown_request(connection)


class _Handler(BaseHTTPRequestHandler):
    """Reads one request from a connection, and writes the answer."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS_OF_SILENCE
    server: _Listener

    def log_message(self, *arguments: object) -> None:
        pass  # the requests are in hub.requests

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=unquote(url.path),
            query=parse_qs(url.query),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self._body(),
        )
        answer, fault = self.server.hub.answer(request, url.path)
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        dropped = fault is not None and fault.status is None
        if not dropped or fault.sent:
            self.send_response(answer.status)
            kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
            for name, value in ({"Content-Type": kind} | answer.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            # One request a connection: no thread waits for a client that keeps a connection for later.
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: fault.sent] if dropped else body)
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self._line().split(b";")[0], 16):
            chunks.append(self._read(size))
            self._line()
        while self._line().strip():
            pass  # trailers
        return b"".join(chunks)

    def _read(self, size: int) -> bytes:
        part = self.rfile.read(size)
        if len(part) < size:
            raise ConnectionError("the client went in the middle of a request")
        return part

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the client went in the middle of a request")
        return line


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, with this process as a client of it: online, with an empty cache, not logged in.

    The client read its environment when it was imported, so the same settings are put in its constants, where it looks
    them up. It waits a hundredth of a second, not seconds, before it tries again.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    home = tmp_path / "hf_home"
    with HubServer() as server:
        for name in list(os.environ):
            if OTHER_CLIENT.match(name):
                monkeypatch.delenv(name)
        monkeypatch.setenv("NO_PROXY", "*")
        settings = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(home / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        # Its client since 5.23, kept with the address at which it was made.
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        for function in (_http._http_backoff_base, _http.http_backoff, _http.http_stream_backoff.__wrapped__):
            monkeypatch.setitem(function.__kwdefaults__, "base_wait_time", 0.01)
            monkeypatch.setitem(function.__kwdefaults__, "max_wait_time", 0.01)
        # A client opened before would hold on to the proxies of its time.
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
    assert not server.errors, "\n".join(server.errors)
