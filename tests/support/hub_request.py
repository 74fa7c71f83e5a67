"""A request to the test Hub, its answer, the table of routes, and who may do what."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.support.hub_repository import Refusal, Repository

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

REPO = "(?P<repo_id>[^/]+(?:/[^/]+)?)"
NO_RIGHTS = "You don't have the rights to {} under the namespace {!r}"


@dataclass
class User:
    """Who a token belongs to, where it may write, and whether it may write at all."""

    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


@dataclass
class Request:
    """A request as it came, and the status that it was answered with; None where the connection was dropped."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    status: int | None = None

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refusal(400, "The body is not JSON") from None

    def asks(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")


@dataclass
class Answer:
    """What goes back: a JSON value or bytes, and headers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Registers a function for a method and a path; it gets the hub, the request and the named groups, decoded."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def user_of(hub: "HubServer", request: Request) -> User | None:
    """Who asks; None for a request without a token."""
    if request.token is None:
        return None
    if request.token not in hub.users:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return hub.users[request.token]


def readable(hub: "HubServer", request: Request, repo_id: str) -> Repository:
    """The repository, if whoever asks may know that it exists; a private one looks like none to others."""
    user = user_of(hub, request)
    repository = hub.repos.get(repo_id)
    if repository is not None and (not repository.private or (user and user.owns(repository.namespace))):
        return repository
    if user is None:
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")
    raise Refusal(404, "Repository not found", "RepoNotFound")


def writable(hub: "HubServer", request: Request, repo_id: str) -> Repository:
    """The repository, if whoever asks may change it."""
    repository = readable(hub, request, repo_id)
    check_rights(user_of(hub, request), repository.namespace, "change a model")
    return repository


def check_rights(user: User | None, namespace: str, action: str) -> User:
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if user.role != "write" or not user.owns(namespace):
        raise Refusal(403, NO_RIGHTS.format(action, namespace))
    return user


def check_gate(hub: "HubServer", request: Request, repository: Repository) -> None:
    """Refuses the files of a gated model to whoever was not let in."""
    user = user_of(hub, request)
    if repository.gated and not (user and user.owns(repository.namespace)):
        message = f"Access to model {repository.id} is restricted."
        raise Refusal(403 if user else 401, message, "GatedRepo")
