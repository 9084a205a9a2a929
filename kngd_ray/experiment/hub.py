"""An export as a repository of Hugging Face's hub: its card, and the way there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kngd_ray import __version__
from kngd_ray._option import option
from kngd_ray.errors import HubError, UsageError, redact
from kngd_ray.storage import storage_errors

CARD = "README.md"
_TRANSPORT = {"TransportError", "RequestException", "ConnectionError", "TimeoutError"}  # of httpx, requests and Python


def check_push(repository: str) -> None:
    """Refuse what cannot be pushed, before anything is computed.

    Args:
        repository: ``organisation/name``.

    Raises:
        UsageError: it names no repository, there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{option('push')} {repository!r} names no repository: write ORGANISATION/NAME.") from error
    if repository.count("/") != 1:
        raise UsageError(f"{option('push')} {repository!r} names no repository: write ORGANISATION/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{option('push')} needs the Hugging Face hub, but HF_HUB_OFFLINE is set: unset it.")
    if get_token() is None:
        raise UsageError(
            f"{option('push')} needs a Hugging Face token with write access: run `hf auth login`, or set HF_TOKEN."
        )


def write_card(folder: Path, text: str, files: Mapping[str, tuple[str, ...]], facts: Mapping[str, Any]) -> None:
    """Write the card of a repository.

    Args:
        folder: of the export.
        text: the model card of the fit, in Markdown.
        files: what each file is, and what is to be said of it.
        facts: what the hub sorts models by, as ``huggingface_hub.ModelCardData`` takes it; None is left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    listed = "\n".join(f"- `{name}`: {'; '.join(said)}" for name, said in files.items())
    data = ModelCardData(**{name: fact for name, fact in facts.items() if fact is not None})
    with storage_errors(folder / CARD):
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n## Files\n\n{listed}\n").save(folder / CARD)


def push(folder: Path, repository: str) -> str:
    """Upload a folder as one commit; a missing repository is created, as a private one.

    The token is found by the hub's own client, and kept by it.

    Args:
        folder: of the export, which stays as it is.
        repository: ``organisation/name``.

    Returns:
        The repository's address.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="kngd_ray", library_version=__version__)
    try:
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"kngd-ray {__version__}")
    except Exception as error:  # whatever the hub's client, its transport or the file system raises
        raise HubError(
            f"{repository} could not be pushed: {_reason(error, api.endpoint)}; the export is in {folder}, and"
            f" `hf upload {repository} {folder} .` sends it later."
        ) from error
    return address


def _reason(error: Exception, endpoint: str) -> str:
    """Why, and what to do about it, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the token: run `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return "the token has no right to write there: take one that has, or another name"
    if status is not None:
        return f"the hub answered {status}: try again later"
    if _TRANSPORT & {cls.__name__ for cls in type(error).__mro__}:
        return f"{redact(endpoint)} cannot be reached: check the network, and HF_ENDPOINT if it is set"
    return redact((str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:"))
