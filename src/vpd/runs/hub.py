"""Uploads trained models to the Hugging Face hub, and reads licences there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError

from vpd.runs.model_card import BaseModel, license_fields


def with_license(base: BaseModel, token: str | None) -> BaseModel:
    """Return a model with the licence that its card on the hub states, where it is not known yet.

    Args:
        base: The model.
        token: The token of a user who may read it; None for the one that ``hf auth login`` has stored.
    """
    if base.license or base.hub_id is None:
        return base
    try:
        card = HfApi(token=token).model_info(base.hub_id).card_data
    except HfHubHTTPError:  # It may be gone, or closed to this user.
        return base
    return base if card is None else replace(base, license=license_fields(card))


def upload_model(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload a model folder into a repository, which is made where it is missing.

    Args:
        folder: The folder, all of which is uploaded.
        repo_id: The repository as ``owner/name``, or the name alone for the token's owner.
        private: Whether a new repository is private; None for the owner's default.
        token: The token of a user who may write there; None for the one that ``hf auth login`` has stored.
        commit_message: The message of the one commit that is made.
        revision: The branch, which is made where it is missing; None for the main one.
        create_pr: Whether to open a pull request instead of committing.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The hub refuses.
    """
    api = HfApi(token=token)
    # The answer has the owner's name where ``repo_id`` leaves it out.
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(full_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=full_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
