"""A model repository of the Hugging Face Hub as a store: one commit holds a whole version.

Tokens come from HF_TOKEN or `hf auth login`, by way of the Hub's own library.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from inference.errors import InputError
from inference.target import EMBEDDED
from pipelines.files import replacing, sha256_file
from pipelines.pairs.stores import Store

README_FILE = "README.md"
_ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?/?")
_EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded target is called on the Hub."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_api() -> HfApi:
    """The way to the Hub."""
    return HfApi()


class HubStore(Store):
    """A repository at a revision.

    Attributes:
        private: whether a repository that has to be made is private.
    """

    own_files = (README_FILE, ".gitattributes")
    at_once = True

    def __init__(self, where: str, *, private: bool) -> None:
        super().__init__(where)
        found = _ADDRESS.fullmatch(where)
        if found is None:
            raise InputError(f"{where!r} is no repository", mend="hf://user/repo or hf://user/repo@revision")
        self.repo, self.branch = found[1], found[2]
        self.private = private
        self._api = hub_api()
        self._commit: str | None = None

    def sizes(self) -> dict[str, int]:
        """See `Store`; from here on, files are those of the commit that was the newest now."""
        try:
            self._commit = self._api.repo_info(self.repo, revision=self.branch).sha
            tree = list(self._api.list_repo_tree(self.repo, recursive=True, revision=self._commit))
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return {}
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    def fetch(self, name: str, to: Path) -> None:
        """See `Store`."""
        scratch = to.with_name(f".{to.name}.hub")
        try:
            got = self._api.hf_hub_download(self.repo, name, revision=self._commit, local_dir=scratch)
            with replacing(to) as aside:
                shutil.move(got, aside)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def digest(self, name: str) -> str:
        """See `Store`; the file is fetched into the library's own cache."""
        return sha256_file(Path(self._api.hf_hub_download(self.repo, name, revision=self._commit)))

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`; all of them in one commit. Large files that were uploaded before a kill are not sent again."""
        self._api.create_repo(self.repo, private=self.private, exist_ok=True)
        if self.branch:
            self._api.create_branch(self.repo, branch=self.branch, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        self._api.create_commit(
            self.repo,
            operations,
            commit_message="A dspark pair",
            revision=self.branch,
            parent_commit=self._commit,  # what was pushed by somebody else since `sizes` is not overwritten
        )


def readme(info: Mapping[str, Any], card: str, *, where: str) -> str:
    """The repository's page: what the Hub wants to know in front, then the version's model card.

    Args:
        info: `pair.json`.
        card: `MODEL_CARD.md`.
        where: address of the repository.
    """
    target = _EMBEDDED_ID if info["target"]["path"] == EMBEDDED else str(info["target"]["path"])
    data = ModelCardData(
        library_name="dspark",
        pipeline_tag="text-generation",
        base_model=target if _HUB_ID.fullmatch(target) else None,
        tags=["dspark", "speculative-decoding", "draft-model", f"draft:{info['draft'].get('kind', 'none')}"],
    )
    use = f"## Get it\n\n    dspark pairs import {where}\n"
    return f"---\n{data.to_yaml()}\n---\n\n{card.rstrip()}\n\n{use}"
