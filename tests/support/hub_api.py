"""Routes of the test Hub about users and repositories: what there is, who may see it, branches and tags."""

import hashlib
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.support.hub_card import card_fields, card_problems
from tests.support.hub_repository import GIT_ATTRIBUTES, Commit, Refusal, Repository, StoredFile
from tests.support.hub_request import (
    REPO,
    Answer,
    Request,
    check_gate,
    check_rights,
    readable,
    route,
    user_of,
    writable,
)

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer


@route("GET", "/api/whoami-v2")
def whoami(hub: "HubServer", request: Request) -> Answer:
    user = user_of(hub, request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name} for name in user.organizations]
    token = {"accessToken": {"displayName": "test", "role": user.role}}
    return Answer({"type": "user", "name": user.name, "fullname": user.name, "orgs": organizations, "auth": token})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: "HubServer", request: Request) -> Answer:
    return Answer({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "HubServer", request: Request) -> Answer:
    errors, warnings = card_problems(request.json["content"])
    return Answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(hub: "HubServer", request: Request) -> Answer:
    asked = request.json
    if asked.get("type", "model") != "model":
        raise Refusal(501, f"The test Hub holds models only, not a {asked['type']}")
    user = user_of(hub, request)
    namespace = asked.get("organization") or (user.name if user else "")
    user = check_rights(user, namespace, "create a model")
    repo_id = f"{namespace}/{asked['name']}"
    url = f"{hub.endpoint}/{repo_id}"
    if repo_id in hub.repos:
        message = "You already created this model repo"
        return Answer({"error": message, "url": url}, 409, {"X-Error-Message": message})
    repository = Repository(repo_id, private=asked.get("visibility") == "private")
    repository.commit("main", {".gitattributes": StoredFile(GIT_ATTRIBUTES)}, "initial commit", author=user.name)
    hub.repos[repo_id] = repository
    return Answer({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: "HubServer", request: Request) -> Answer:
    asked = request.json
    user = user_of(hub, request)
    namespace = asked.get("organization") or (user.name if user else "")
    del hub.repos[writable(hub, request, f"{namespace}/{asked['name']}").id]
    return Answer()


@route("PUT", f"/api/models/{REPO}/settings")
def settings(hub: "HubServer", request: Request, repo_id: str) -> Answer:
    repository = writable(hub, request, repo_id)
    if "visibility" in request.json:
        repository.private = request.json["visibility"] == "private"
    if "gated" in request.json:
        repository.gated = request.json["gated"]
    return Answer({"private": repository.private, "gated": repository.gated})


@route("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?")
def auth_check(hub: "HubServer", request: Request, repo_id: str, write: str | None) -> Answer:
    check_gate(hub, request, (writable if write else readable)(hub, request, repo_id))
    return Answer({})


@route("GET", f"/api/models/{REPO}/refs")
def refs(hub: "HubServer", request: Request, repo_id: str) -> Answer:
    repository = readable(hub, request, repo_id)

    def listed(kind: str, commits: dict[str, Commit]) -> list[dict]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.id} for name, commit in commits.items()
        ]

    branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
    return Answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("POST", f"/api/models/{REPO}/branch/(?P<name>[^/]+)")
def create_branch(hub: "HubServer", request: Request, repo_id: str, name: str) -> Answer:
    repository = writable(hub, request, repo_id)
    if name in repository.branches:
        raise Refusal(409, f"Reference already exists: {name}")
    repository.branches[name] = repository.resolve(request.json.get("startingPoint", "main"))
    return Answer()


@route("DELETE", f"/api/models/{REPO}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub: "HubServer", request: Request, repo_id: str, kind: str, name: str) -> Answer:
    repository = writable(hub, request, repo_id)
    if kind == "branch" and name == "main":
        raise Refusal(403, "The main branch cannot be deleted")
    if (repository.branches if kind == "branch" else repository.tags).pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer()


@route("POST", f"/api/models/{REPO}/tag/(?P<revision>[^/]+)")
def create_tag(hub: "HubServer", request: Request, repo_id: str, revision: str) -> Answer:
    repository = writable(hub, request, repo_id)
    name = request.json["tag"]
    if name in repository.tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    repository.tags[name] = repository.resolve(revision)
    return Answer()


@route("GET", f"/api/models/{REPO}/commits/(?P<revision>[^/]+)")
def commits(hub: "HubServer", request: Request, repo_id: str, revision: str) -> Answer:
    history = readable(hub, request, repo_id).resolve(revision).history()
    return Answer(
        [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history
        ]
    )


@route("GET", "/api/models")
def list_models(hub: "HubServer", request: Request) -> Answer:
    """The public models that have all the tags asked for; the test Hub counts no downloads, so the order is by id."""
    wanted = set(request.query.get("filter", []))
    found = []
    for repository in sorted(hub.repos.values(), key=lambda one: one.id):
        fields = card_fields(repository.main)
        if not repository.private and wanted <= set(fields["tags"]):
            found.append({"_id": repository.id, "id": repository.id, "modelId": repository.id, **fields})
    return Answer(found[: int(request.query.get("limit", [len(found)])[0])])


@route("GET", f"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def model_info(hub: "HubServer", request: Request, repo_id: str, revision: str | None) -> Answer:
    repository = readable(hub, request, repo_id)
    commit = repository.resolve(revision or "main")
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.asks("blobs"):
            sibling |= {"size": len(file.content), "blobId": file.blob_id}
            if file.large:
                sibling["lfs"] = lfs_fields(file, "sha256")
        siblings.append(sibling)
    info = {
        "modelId": repository.id,
        "author": repository.namespace,
        "sha": commit.id,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": commit.history()[-1].date,
        "lastModified": commit.date,
        "siblings": siblings,
    } | card_fields(commit)
    wanted = request.query.get("expand")
    if wanted is not None:
        info = {name: value for name, value in info.items() if name in wanted}
    return Answer({"_id": hashlib.sha1(repository.id.encode()).hexdigest()[:24], "id": repository.id} | info)


def lfs_fields(file: StoredFile, digest: str) -> dict[str, Any]:
    return {digest: file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(hub: "HubServer", request: Request, repo_id: str, revision: str, folder: str | None) -> Answer:
    commit = readable(hub, request, repo_id).resolve(revision)
    if folder and folder not in commit.folders():
        raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound", commit.id)
    start = f"{folder}/" if folder else ""
    paths = [path for path in sorted([*commit.files, *commit.folders()]) if path.startswith(start)]
    if not request.asks("recursive"):
        paths = [path for path in paths if "/" not in path[len(start) :]]
    return Answer([entry(commit, path, request.asks("expand")) for path in paths])


@route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: "HubServer", request: Request, repo_id: str, revision: str) -> Answer:
    commit = readable(hub, request, repo_id).resolve(revision)
    form = parse_qs(request.body.decode())
    known = {*commit.files, *commit.folders()}
    expand = form.get("expand", ["false"])[-1].lower() == "true"
    return Answer([entry(commit, path, expand) for path in form.get("paths", []) if path in known])


def entry(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """Describes a file or folder of a commit as tree and paths-info do."""
    file = commit.files.get(path)
    if file is None:
        oid = hashlib.sha1(repr(commit._content(path)).encode()).hexdigest()
        fields: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    else:
        fields = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
        if file.large:
            fields["lfs"] = lfs_fields(file, "oid")
    if expand:
        last = commit.last_change(path)
        fields["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        if file is not None:
            fields["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return fields
