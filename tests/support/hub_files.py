"""Routes of the test Hub about files: commits, the large file storage, downloads.

Large files go to and come from a storage under another host name, where a signature in the URL replaces the token.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.support.hub_repository import Commit, Refusal, Repository, StoredFile, is_large
from tests.support.hub_request import REPO, Answer, Request, check_gate, readable, route, writable

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

STORED = "/storage/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(hub: "HubServer", request: Request, repo_id: str, revision: str) -> Answer:
    commit = writable(hub, request, repo_id).resolve(revision)
    files = []
    for asked in request.json["files"]:
        path = asked["path"]
        large = is_large(path, asked["size"], base64.b64decode(asked["sample"]))
        there = commit.files.get(path)
        oid = there.etag if there is not None and there.large == large else None
        files.append(
            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid},
        )
    return Answer({"files": files})


@route("POST", f"/api/models/{REPO}/commit/(?P<branch>[^/]+)")
def commit(hub: "HubServer", request: Request, repo_id: str, branch: str) -> Answer:
    if request.asks("create_pr"):
        raise Refusal(501, "The test Hub has no pull requests")
    repository = writable(hub, request, repo_id)
    if branch not in repository.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    parent = repository.branches[branch]
    lines = list(operations(request))
    if not lines or lines[0][0] != "header":
        raise Refusal(400, "The first line of a commit is its header")
    header = lines[0][1]
    if not parent.id.startswith(header.get("parentCommit", "")):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for key, value in lines[1:]:
        change(repository, parent, files, key, value)
    author = hub.users[request.token].name
    done = repository.commit(branch, files, header["summary"], header.get("description", ""), author)
    url = f"{hub.endpoint}/{repo_id}/commit/{done.id}"
    return Answer({"success": True, "commitOid": done.id, "commitUrl": url, "hookOutput": ""})


def operations(request: Request) -> Iterator[tuple[str, dict]]:
    """Reads the lines of a commit."""
    for line in request.body.splitlines():
        try:
            operation = json.loads(line)
            yield operation["key"], operation["value"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(400, f"Not an operation of a commit: {line[:80]!r}") from None


def change(repository: Repository, parent: Commit, files: dict[str, StoredFile], key: str, value: dict) -> None:
    """Does one operation of a commit to the files."""
    path = value["path"]
    if key == "file":
        try:
            files[path] = StoredFile(base64.b64decode(value["content"], validate=True))
        except binascii.Error:
            raise Refusal(400, f"The content of {path} is not base64") from None
    elif key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise Refusal(400, f"The LFS file {path} was not uploaded: no object {value['oid']}")
        files[path] = StoredFile(repository.objects[value["oid"]], large=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound", parent.id)
    elif key == "deletedFolder":
        gone = parent.under(path.rstrip("/"))
        if not gone:
            raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound", parent.id)
        for name in gone:
            files.pop(name, None)
    else:
        raise Refusal(400, f"Unknown operation {key!r}")


@route("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
@route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: "HubServer", request: Request, repo_id: str, revision: str, path: str) -> Answer:
    repository = readable(hub, request, repo_id)
    check_gate(hub, request, repository)
    commit = repository.resolve(revision)
    file = commit.file(path)
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
    if not file.large:
        return content(request, file.content, headers)
    headers |= {
        "X-Linked-Etag": f'"{file.sha256}"',
        "X-Linked-Size": str(len(file.content)),
        "Location": hub.signed(f"/storage/{quote(repo_id)}/{file.sha256}"),
    }
    return Answer(b"", 302, headers)


def content(request: Request, whole: bytes, headers: dict[str, str]) -> Answer:
    """Answers with bytes, or the part that a Range header asks for."""
    headers = headers | {"Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(whole, 200, headers)
    start, stop = int(asked[1]), int(asked[2] or len(whole) - 1) + 1
    if start >= len(whole):
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(whole)}"})
    part = whole[start:stop]
    span = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
    return Answer(part, 206, headers | {"Content-Range": span})


@route("POST", f"/{REPO}\\.git/info/lfs/objects/batch")
def lfs_batch(hub: "HubServer", request: Request, repo_id: str) -> Answer:
    repository = writable(hub, request, repo_id)
    return Answer(
        {"transfer": "basic", "objects": [upload(hub, repository, asked) for asked in request.json["objects"]]}
    )


def upload(hub: "HubServer", repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
    """Tells where an object goes: nowhere if it is there, in one piece, or in parts where the hub has a part size."""
    oid, size = asked["oid"], asked["size"]
    if oid in repository.objects:
        return {"oid": oid, "size": size}
    place = f"/storage/{quote(repository.id)}/{oid}"
    if hub.part_size and size > hub.part_size:
        numbers = range(1, -(-size // hub.part_size) + 1)
        header = {str(number): hub.signed(f"{place}/{number}") for number in numbers}
        action = {"href": hub.signed(f"{place}/complete"), "header": header | {"chunk_size": str(hub.part_size)}}
    else:
        action = {"href": hub.signed(place)}
    verify = {"href": f"{hub.endpoint}/{repository.id}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": action, "verify": verify}}


@route("POST", f"/{REPO}\\.git/info/lfs/objects/verify")
def lfs_verify(hub: "HubServer", request: Request, repo_id: str) -> Answer:
    repository = writable(hub, request, repo_id)
    stored = repository.objects.get(request.json["oid"])
    if stored is None or len(stored) != request.json["size"]:
        raise Refusal(404, f"No object {request.json['oid']} of {request.json['size']} bytes")
    return Answer({})


@route("PUT", STORED)
def store(hub: "HubServer", request: Request, repo_id: str, oid: str) -> Answer:
    hub.check_signature(request)
    return keep(hub.repos[repo_id], oid, request.body)


@route("PUT", STORED + "/(?P<number>[0-9]+)")
def store_part(hub: "HubServer", request: Request, repo_id: str, oid: str, number: str) -> Answer:
    hub.check_signature(request)
    hub.parts.setdefault((repo_id, oid), {})[int(number)] = request.body
    return Answer(b"", headers={"ETag": part_etag(request.body)})


@route("POST", STORED + "/complete")
def complete(hub: "HubServer", request: Request, repo_id: str, oid: str) -> Answer:
    hub.check_signature(request)
    parts = hub.parts.pop((repo_id, oid), {})
    named = [(part["partNumber"], part["etag"]) for part in request.json["parts"]]
    if named != [(number, part_etag(part)) for number, part in sorted(parts.items())]:
        raise Refusal(400, "The parts named are not those that were uploaded")
    return keep(hub.repos[repo_id], oid, b"".join(parts[number] for number, _ in named))


def part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


def keep(repository: Repository, oid: str, body: bytes) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, f"The content does not have the sha256 {oid}")
    repository.objects[oid] = body
    return Answer(b"")


@route("GET", STORED)
def stored(hub: "HubServer", request: Request, repo_id: str, oid: str) -> Answer:
    hub.check_signature(request)
    return content(request, hub.repos[repo_id].objects[oid], {"ETag": f'"{oid}"'})
