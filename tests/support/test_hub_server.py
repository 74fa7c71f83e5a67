"""The test Hub against the real client: what it keeps, what it serves, whom it refuses, how it fails when told to."""

import hashlib
import json
import os
import socket
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.flow import byte_tokenizer
from tests.support.hub_repository import git_hash
from tests.support.hub_server import MAX_THREADS, HubServer
from tests.support.tiny_models import tiny_model

WEIGHTS = bytes(range(256)) * 200
CARD = "---\nlicense: mit\nlibrary_name: transformers\ntags:\n- tiny\nbase_model: org/base\n---\n# A card\n"

LOADING = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained("org/tiny")
model = AutoModelForCausalLM.from_pretrained("org/tiny")
print(json.dumps(model(tokenizer("What is 17 times 23?", return_tensors="pt").input_ids).logits.tolist()))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small text, binary both sides of the limit, and a file that is large by its name."""
    made = tmp_path / "folder"
    (made / "deep" / "er").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "config.json").write_text("{}")
    (made / "empty").touch()
    (made / "deep" / "small.bin").write_bytes(WEIGHTS[:1000])
    (made / "deep" / "er" / "large.bin").write_bytes(WEIGHTS)
    (made / "model.safetensors").write_bytes(WEIGHTS[:100])
    return made


def contents(folder: str | Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def pushed(hub, folder: Path, repo_id: str = "org/tiny", **settings) -> str:
    hub.api().create_repo(repo_id, **settings)
    return hub.api().upload_folder(repo_id=repo_id, folder_path=folder).oid


def fetched(
    url: str, method: str = "GET", content: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """What a plain HTTP client gets: the status, the headers, the body."""
    try:
        with urlopen(Request(url, content, headers, method=method)) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_a_user_is_told_who_they_are(hub):
    assert hub.api().whoami()["name"] == "test-user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("hf_unknown").whoami()


def test_a_folder_comes_back_as_it_went(hub, folder, tmp_path):
    sha = pushed(hub, folder)
    assert contents(folder).items() <= hub.repos["org/tiny"].files.items()

    downloaded = hub.api().snapshot_download("org/tiny", cache_dir=tmp_path / "empty")

    assert Path(downloaded).name == sha == hub.repos["org/tiny"].main.id
    assert contents(downloaded) == hub.repos["org/tiny"].files


def test_large_files_take_the_large_way(hub, folder):
    pushed(hub, folder)
    entries = {entry.path: entry for entry in hub.api().list_repo_tree("org/tiny", recursive=True)}
    large = {"model.safetensors": WEIGHTS[:100], "deep/er/large.bin": WEIGHTS}
    assert {path for path, entry in entries.items() if getattr(entry, "lfs", None)} == set(large)
    for path, content in large.items():
        assert entries[path].lfs.sha256 == hashlib.sha256(content).hexdigest()
        assert entries[path].size == len(content)
    assert entries["deep/small.bin"].blob_id == git_hash("blob", WEIGHTS[:1000])
    assert set(entries) - set(hub.repos["org/tiny"].files) == {"deep", "deep/er"}
    # The storage was at another address and got no token, and each object was checked after.
    storage = hub.asked("/storage/")
    assert len(storage) == 2
    assert not [request for request in storage if request.token]
    assert len(hub.asked("POST .*verify")) == 2


def test_the_storage_asks_for_its_signature(hub, folder):
    pushed(hub, folder)
    url = hub.signed(f"/storage/org/tiny/{hashlib.sha256(WEIGHTS).hexdigest()}")
    assert fetched(url)[::2] == (200, WEIGHTS)
    assert fetched(url[:-1])[0] == 403
    assert fetched(url.split("?")[0], "PUT", WEIGHTS)[0] == 403
    assert fetched(url, "PUT", WEIGHTS[1:])[0] == 400


def test_an_object_can_come_in_parts(hub, folder):
    hub.part_size = 20_000
    pushed(hub, folder)
    assert hub.repos["org/tiny"].files["deep/er/large.bin"] == WEIGHTS
    assert len(hub.asked("PUT /storage/.*/[123]$")) == 3
    assert not hub.parts


@pytest.mark.parametrize("asked", ["bytes=10-19", "bytes=51000-", "bytes=0-"])
@pytest.mark.parametrize("path", ["deep/er/large.bin", "as_text"])
def test_a_part_of_a_file(hub, folder, asked, path):
    (folder / "as_text").write_text("0123456789" * 5120)
    pushed(hub, folder)
    url = f"{hub.endpoint}/org/tiny/resolve/main/{path}"
    whole = (folder / path).read_bytes()
    status, headers, part = fetched(url, Range=asked)
    start, stop = (int(number or len(whole) - 1) for number in asked.removeprefix("bytes=").split("-"))
    assert (status, part) == (206, whole[start : stop + 1])
    assert headers["Content-Range"] == f"bytes {start}-{stop}/{len(whole)}"
    assert fetched(url, Range=f"bytes={len(whole)}-")[0] == 416


def test_what_a_file_is_said_to_be(hub, folder):
    sha = pushed(hub, folder)
    api = hub.api()
    small = api.get_hf_file_metadata(url=f"{hub.endpoint}/org/tiny/resolve/main/config.json")
    assert (small.commit_hash, small.etag, small.size) == (sha, git_hash("blob", b"{}"), 2)
    large = api.get_hf_file_metadata(url=f"{hub.endpoint}/org/tiny/resolve/main/model.safetensors")
    assert (large.commit_hash, large.etag, large.size) == (sha, hashlib.sha256(WEIGHTS[:100]).hexdigest(), 100)
    assert not large.location.startswith(hub.endpoint)
    assert large.xet_file_data is None
    described = api.get_paths_info("org/tiny", ["deep", "config.json", "absent"], expand=True)
    assert [entry.path for entry in described] == ["deep", "config.json"]
    assert described[1].last_commit.oid == sha
    assert [entry.path for entry in api.list_repo_tree("org/tiny", "deep")] == ["deep/er", "deep/small.bin"]


def test_what_a_model_is_said_to_be(hub, folder):
    sha = pushed(hub, folder)
    info = hub.api().model_info("org/tiny", files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == ("org/tiny", "org", sha, False, False)
    assert {sibling.rfilename: sibling.size for sibling in info.siblings} == {
        path: len(content) for path, content in hub.repos["org/tiny"].files.items()
    }
    assert {"tiny", "transformers", "base_model:org/base", "license:mit"} <= set(info.tags)
    assert (info.library_name, info.card_data.base_model) == ("transformers", "org/base")
    few = hub.api().model_info("org/tiny", expand=["sha"])
    assert (few.sha, few.siblings) == (sha, None)


def test_creating_twice_and_deleting(hub, folder):
    api = hub.api()
    pushed(hub, folder)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/tiny")
    assert api.create_repo("org/tiny", exist_ok=True).repo_id == "org/tiny"
    assert api.repo_exists("org/tiny")
    api.delete_repo("org/tiny")
    assert not api.repo_exists("org/tiny")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/tiny")
    api.delete_repo("org/tiny", missing_ok=True)
    assert api.create_repo("mine").repo_id == "test-user/mine"


def test_operations_of_a_commit(hub, folder):
    pushed(hub, folder)
    api = hub.api()
    before = hub.repos["org/tiny"].files
    operations = [
        CommitOperationAdd("added.txt", b"new"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("deep/", is_folder=True),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
    ]
    done = api.create_commit("org/tiny", operations, commit_message="Many things", commit_description="At once")
    after = hub.repos["org/tiny"].files
    assert set(after) - set(before) == {"added.txt", "copy.safetensors"}
    assert set(before) - set(after) == {"config.json", "deep/small.bin", "deep/er/large.bin"}
    assert after["copy.safetensors"] == before["model.safetensors"]
    commits = api.list_repo_commits("org/tiny")
    assert [commit.title for commit in commits][::2] == ["Many things", "initial commit"]
    assert (commits[0].commit_id, commits[0].message, commits[0].authors) == (done.oid, "At once", ["test-user"])


def test_commits_that_are_refused(hub, folder):
    first = pushed(hub, folder)
    api = hub.api()
    api.upload_file(repo_id="org/tiny", path_in_repo="a", path_or_fileobj=b"1")
    state = hub.repos["org/tiny"].main

    def commit(*operations, **settings):
        return api.create_commit("org/tiny", operations, commit_message="no", **settings)

    add = CommitOperationAdd("a", b"2")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit(add, parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        commit(CommitOperationAdd("a", b"2"), revision="absent")
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        commit(CommitOperationDelete("absent"))
    with pytest.raises(ValueError, match="Invalid YAML"):
        commit(CommitOperationAdd("README.md", b"---\na: [\n---\n"))
    with pytest.raises(ValueError, match="Use a model id"):
        commit(CommitOperationAdd("README.md", b"---\nbase_model: /home/me/model\n---\n"))
    assert hub.repos["org/tiny"].main is state
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(CommitOperationAdd("README.md", b"# no metadata"))
    oid = hashlib.sha256(b"never uploaded").hexdigest()
    lines = [
        {"key": "header", "value": {"summary": "no"}},
        {"key": "lfsFile", "value": {"path": "x.safetensors", "algo": "sha256", "oid": oid, "size": 14}},
    ]
    status, _, body = fetched(
        f"{hub.endpoint}/api/models/org/tiny/commit/main",
        "POST",
        "\n".join(map(json.dumps, lines)).encode(),
        Authorization=f"Bearer {hub.token}",
    )
    assert (status, b"not uploaded" in body) == (400, True)


def test_an_unchanged_folder_makes_no_commit(hub, folder):
    sha = pushed(hub, folder)
    assert hub.api().upload_folder(repo_id="org/tiny", folder_path=folder).oid == sha
    assert len(hub.asked("POST .*/commit/")) == 1


def test_revisions(hub, folder, tmp_path):
    api = hub.api()
    first = pushed(hub, folder)
    api.create_tag("org/tiny", tag="v1.0")
    api.create_branch("org/tiny", branch="a/branch", revision="v1.0")
    second = api.upload_file(repo_id="org/tiny", path_in_repo="config.json", path_or_fileobj=b'{"second": 2}').oid
    third = api.upload_file(
        repo_id="org/tiny", path_in_repo="config.json", path_or_fileobj=b"[3]", revision="a/branch"
    ).oid

    expected = {
        None: (second, '{"second": 2}'), "main": (second, '{"second": 2}'), "v1.0": (first, "{}"),
        "a/branch": (third, "[3]"), first: (first, "{}"), third: (third, "[3]"),
    }  # fmt: skip
    for revision, (sha, text) in expected.items():
        path = Path(api.hf_hub_download("org/tiny", "config.json", revision=revision))
        assert path.read_text() == text
        assert path.parent.name == sha == api.model_info("org/tiny", revision=revision).sha
    assert api.model_info("org/tiny", revision=first[:8]).sha == first
    listed = api.list_repo_refs("org/tiny")
    assert {ref.name: ref.target_commit for ref in listed.branches} == {"main": second, "a/branch": third}
    assert [(ref.ref, ref.target_commit) for ref in listed.tags] == [("refs/tags/v1.0", first)]

    for clash in (
        lambda: api.create_tag("org/tiny", tag="v1.0"),
        lambda: api.create_branch("org/tiny", branch="main"),
    ):
        with pytest.raises(HfHubHTTPError, match="409"):
            clash()
    api.create_tag("org/tiny", tag="v1.0", exist_ok=True)
    api.delete_tag("org/tiny", tag="v1.0")
    api.delete_branch("org/tiny", branch="a/branch")
    assert not api.revision_exists("org/tiny", "v1.0")
    assert not api.revision_exists("org/tiny", "a/branch")
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download("org/tiny", revision="v1.0", cache_dir=tmp_path / "empty")


def test_a_missing_file_is_remembered(hub, folder):
    pushed(hub, folder)
    with pytest.raises(EntryNotFoundError):
        hub.api().hf_hub_download("org/tiny", "absent.json")
    assert not hub.api().file_exists("org/tiny", "absent.json")
    with pytest.raises(EntryNotFoundError):
        list(hub.api().list_repo_tree("org/tiny", "absent"))


def test_a_private_repository_is_there_for_its_owners_only(hub, folder):
    pushed(hub, folder, "test-org/secret", private=True)
    stranger = hub.add_user("stranger")
    assert Path(hub.api().hf_hub_download("test-org/secret", "model.safetensors")).read_bytes() == WEIGHTS[:100]
    for token in (False, stranger, "hf_unknown"):
        api = hub.api(token)
        with pytest.raises(HfHubHTTPError):
            api.model_info("test-org/secret")
        with pytest.raises(HfHubHTTPError):
            api.hf_hub_download("test-org/secret", "config.json")
    for token in (False, stranger):
        with pytest.raises(RepositoryNotFoundError):
            hub.api(token).model_info("test-org/secret")
    hub.api().update_repo_settings("test-org/secret", private=False)
    assert hub.api(False).model_info("test-org/secret").private is False


def test_who_may_not_write(hub, folder):
    pushed(hub, folder)
    before = hub.repos["org/tiny"].main
    for token in (hub.add_user("stranger"), hub.add_user("test-user", "org", role="read")):
        api = hub.api(token)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("org/other")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_file(repo_id="org/tiny", path_in_repo="a", path_or_fileobj=b"1")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.delete_repo("org/tiny")
    with pytest.raises(HfHubHTTPError, match="401"):
        hub.api(False).upload_file(repo_id="org/tiny", path_in_repo="a", path_or_fileobj=b"1")
    assert hub.repos["org/tiny"].main is before


def test_a_gated_repository_shows_itself_but_not_its_files(hub, folder):
    pushed(hub, folder)
    hub.api().update_repo_settings("org/tiny", gated="manual")
    for token in (False, hub.add_user("stranger")):
        api = hub.api(token)
        assert api.model_info("org/tiny").gated == "manual"
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("org/tiny", "config.json")
        with pytest.raises(GatedRepoError):
            api.auth_check("org/tiny")
    hub.api().auth_check("org/tiny", write=True)
    assert hub.api().hf_hub_download("org/tiny", "config.json")


@pytest.mark.parametrize("performed", [False, True])
@pytest.mark.parametrize("status", [None, 400])
def test_a_commit_that_fails_is_made_by_the_second_run(hub, folder, status, performed):
    hub.api().create_repo("org/tiny")
    hub.fail_next("POST .*/commit/", status, performed=performed)
    with pytest.raises(Exception, match="A failure made by the test" if status else "Server disconnected"):
        hub.api().upload_folder(repo_id="org/tiny", folder_path=folder)
    assert ("config.json" in hub.repos["org/tiny"].files) is performed
    hub.api().upload_folder(repo_id="org/tiny", folder_path=folder)
    assert contents(folder).items() <= hub.repos["org/tiny"].files.items()
    assert len(hub.repos["org/tiny"].commits) == 2
    # What was stored by the first run is not sent again.
    assert len(hub.asked("PUT /storage/")) == 2


def test_an_upload_that_breaks_off_is_tried_again_and_then_given_up(hub, folder):
    hub.api().create_repo("org/tiny")
    hub.fail_next("PUT /storage/", times=2)
    hub.fail_next("POST .*verify", 503)
    hub.api().upload_folder(repo_id="org/tiny", folder_path=folder)
    assert [request.status for request in hub.asked("PUT /storage/")].count(None) == 2
    assert len(hub.repos["org/tiny"].objects) == 2

    (folder / "more.safetensors").write_bytes(WEIGHTS[::-1])
    hub.fail_next("PUT /storage/", times=6)
    with pytest.raises(RuntimeError, match=r"more\.safetensors"):
        hub.api().upload_folder(repo_id="org/tiny", folder_path=folder)
    assert "more.safetensors" not in hub.repos["org/tiny"].files
    hub.api().upload_folder(repo_id="org/tiny", folder_path=folder)
    assert hub.repos["org/tiny"].files["more.safetensors"] == WEIGHTS[::-1]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    pushed(hub, folder)
    hub.fail_next("GET /storage/", sent=30_000)
    path = hub.api().hf_hub_download("org/tiny", "deep/er/large.bin")
    assert Path(path).read_bytes() == WEIGHTS
    broken, resumed = hub.asked("GET /storage/")
    assert (broken.status, resumed.status, resumed.headers["range"]) == (None, 206, "bytes=30000-")


def test_a_card_goes_up_and_comes_down(hub):
    hub.api().create_repo("org/tiny")
    card = ModelCard.from_template(ModelCardData(license="mit", tags=["tiny"], base_model="org/base"), model_id="tiny")
    hub.api().upload_file(repo_id="org/tiny", path_in_repo="README.md", path_or_fileobj=str(card).encode())
    loaded = ModelCard.load("org/tiny")
    assert loaded.content == card.content
    assert loaded.data.to_dict() == {"license": "mit", "tags": ["tiny"], "base_model": "org/base"}


def test_a_client_that_goes_in_the_middle_leaves_nothing_behind(hub):
    hub.api().create_repo("org/tiny")
    address = ("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))
    start = f"POST /api/models/org/tiny/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
    for rest in (
        "Content-Length: 100\r\n\r\n{",
        "Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        "Transfer-Encoding: chunked\r\n\r\n",
    ):
        with socket.create_connection(address) as client:
            client.sendall((start + rest).encode())
    assert hub.api().whoami()
    assert not hub.asked("/commit/")


def test_an_unknown_request_is_said_to_be_unknown(hub):
    with pytest.raises(HfHubHTTPError, match="has no GET /api/datasets/org/data"):
        hub.api().dataset_info("org/data")


def test_the_threads_are_few_and_end(hub, folder):
    def running(prefix: str) -> int:
        return sum(thread.name.startswith(prefix) for thread in threading.enumerate())

    for number in range(40):
        (folder / f"{number}.txt").write_text(str(number))
    before = running("hub listener")
    with HubServer() as another:
        pushed(another, folder)
        another.api().snapshot_download("org/tiny", max_workers=32)
        assert running("hub listener") == before + 1
        assert 1 <= running("hub connection") <= MAX_THREADS
    assert running("hub connection") == 0
    assert running("hub listener") == before
    with pytest.raises(Exception, match="Connection refused"):
        another.api().whoami()
    assert not hub.requests


def test_a_model_loads_in_this_process_and_in_a_fresh_one(hub, tmp_path):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.push_to_hub("org/tiny", token=hub.token, private=True)
    tokenizer.push_to_hub("org/tiny", token=hub.token)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.repos["org/tiny"].files)
    ids = tokenizer("What is 17 times 23?", return_tensors="pt").input_ids
    expected = model(ids).logits

    here = AutoModelForCausalLM.from_pretrained("org/tiny", token=hub.token)
    assert torch.equal(here(ids).logits, expected)
    again = AutoTokenizer.from_pretrained("org/tiny", token=hub.token)
    assert torch.equal(again("What is 17 times 23?", return_tensors="pt").input_ids, ids)

    done = hub.run(LOADING, tmp_path / "empty", hub.token)
    assert (done.returncode, done.stderr) == (0, "")
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)

    with pytest.raises(OSError, match="org/tiny is not a local folder and is not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("org/tiny", cache_dir=tmp_path / "without")


def test_the_environment_of_a_fresh_process_names_this_hub_alone(hub, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "https_proxy", "HTTP_PROXY", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_STEPFLOW_SHARED", "kept")
    environment = hub.environment(tmp_path)
    assert {name for name in environment if name.startswith(("HF", "TRANSFORMERS"))} == {
        "HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET",
        "HF_STEPFLOW_SHARED",
    }  # fmt: skip
    assert not [name for name in environment if name.lower() in ("http_proxy", "https_proxy")]
    assert environment["PATH"] == os.environ["PATH"]
    assert hub.environment(tmp_path, "mine")["HF_TOKEN"] == "mine"


def test_the_config_of_a_model_alone(hub):
    tiny_model("qwen3").config.push_to_hub("org/config", token=hub.token)
    assert AutoConfig.from_pretrained("org/config").model_type == "qwen3"
