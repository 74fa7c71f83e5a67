"""A repository of the test Hub: commits of files, branches, tags and large objects, in memory."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

FIRST_DATE = datetime(2026, 1, 1)
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIX = ".safetensors"
LFS_BINARY_BYTES = 10_000


class Refusal(Exception):
    """What the Hub answers instead of what was asked for.

    Args:
        status: The HTTP status.
        message: What the user reads, sent as X-Error-Message and in the body.
        code: The X-Error-Code by which the client picks the kind of its exception.
        commit: The commit in which something was looked for, sent as X-Repo-Commit.
    """

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file belongs in the large file storage: by its name, or binary and not small.

    Args:
        path: The path in the repository.
        size: The size in bytes.
        sample: The first bytes, perhaps cut inside a character.
    """
    if path.endswith(LFS_SUFFIX):
        return True
    if size <= LFS_BINARY_BYTES:
        return False
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return b"\0" in sample


def git_hash(kind: str, content: bytes) -> str:
    """The id that git gives to an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; `large` ones are in the large file storage, with a pointer to them in git."""

    content: bytes
    large: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        return git_hash("blob", self.pointer if self.large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A state of a repository, and how it came about."""

    id: str
    parent: "Commit | None"
    files: Mapping[str, StoredFile]
    title: str
    description: str
    author: str
    date: str

    def history(self) -> list["Commit"]:
        """The commit and its ancestors, newest first."""
        commits, commit = [], self
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits

    def under(self, folder: str) -> dict[str, StoredFile]:
        """The files in a folder and below it; all for the empty name."""
        start = f"{folder}/" if folder else ""
        return {path: file for path, file in sorted(self.files.items()) if path.startswith(start)}

    def folders(self) -> list[str]:
        """Every folder that holds a file, at any depth."""
        found = set()
        for path in self.files:
            parts = path.split("/")[:-1]
            found.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
        return sorted(found)

    def file(self, path: str) -> StoredFile:
        if path not in self.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", self.id)
        return self.files[path]

    def last_change(self, path: str) -> "Commit":
        """The commit that brought what a file or folder holds here."""
        last, here = self, self._content(path)
        for commit in self.history():
            if commit._content(path) != here:
                break
            last = commit
        return last

    def _content(self, path: str) -> list[tuple[str, str]]:
        return [
            (name, file.blob_id)
            for name, file in sorted(self.files.items())
            if name == path or name.startswith(f"{path}/")
        ]


@dataclass
class Repository:
    """A repository of models. `objects` holds its large files by sha256, committed or not."""

    id: str
    private: bool = False
    gated: str | bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def main(self) -> Commit:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """What a user sees on the front page: the content of the files of main, by path."""
        return {path: file.content for path, file in self.main.files.items()}

    def resolve(self, revision: str) -> Commit:
        """Finds a commit by branch, tag, or at least seven digits of its id."""
        for refs in (self.branches, self.tags, self.commits):
            if revision in refs:
                return refs[revision]
        abbreviated = [commit for id, commit in self.commits.items() if id.startswith(revision)]
        if len(revision) >= 7 and len(abbreviated) == 1:
            return abbreviated[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(
        self, branch: str, files: Mapping[str, StoredFile], title: str, description: str = "", author: str = ""
    ) -> Commit:
        """Puts a commit on top of a branch; the first one makes main.

        Args:
            branch: The branch.
            files: All files after the commit.
            title: The first line of the message.
            description: The rest of the message.
            author: The name of the user.
        """
        if branch not in self.branches and self.commits:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = self.branches.get(branch)
        number = len(self.commits)
        tree = sorted((path, file.blob_id) for path, file in files.items())
        identity = json.dumps([self.id, number, parent and parent.id, tree, title, description, author])
        commit = Commit(
            id=git_hash("commit", identity.encode()),
            parent=parent,
            files=dict(files),
            title=title,
            description=description,
            author=author,
            date=f"{(FIRST_DATE + timedelta(minutes=number)).isoformat()}.000Z",
        )
        self.commits[commit.id] = commit
        self.branches[branch] = commit
        return commit
