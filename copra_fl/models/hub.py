"""Upload a model folder to the Hugging Face hub, or to another server that speaks its protocol (HF_ENDPOINT)."""

from __future__ import annotations

from pathlib import Path

from copra_fl.config import ConfigError


class PushError(RuntimeError):
    """A model that could not be uploaded. The message names the cause and what to do."""


def check_access(repository: str) -> None:
    """Raise ConfigError for an invalid name of a repository, PushError without a network or an access token."""
    from huggingface_hub import constants, get_token  # slow to import, and the command line imports PushError
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise ConfigError("a model on the hub is called OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so that nothing is uploaded; unset it, on a machine with a network")
    if get_token() is None:
        raise PushError(
            f"there is no access token for {constants.ENDPOINT}: run `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload the files in `folder` to the model `repository`, created if needed, in one commit; return its address.

    `check_access` comes first. Raises PushError for an upload that failed.
    """
    from httpx import HTTPError, InvalidURL
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with copra-fl push")
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise PushError(
            f"{constants.ENDPOINT} has rejected the upload to {repository}: {reason}. Check that the access token may "
            "write there"
        ) from error
    except (HTTPError, InvalidURL, OSError) as error:
        raise PushError(
            f"cannot reach {constants.ENDPOINT}: {error}. Check the network, or set HF_ENDPOINT to another server"
        ) from error
    return str(address)
