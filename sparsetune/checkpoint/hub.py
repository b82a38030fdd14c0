"""Checkpoints on the Hugging Face Hub: pushed and pulled with its own client, huggingface_hub.

Only files that a checkpoint has are downloaded; nothing from a repository is run.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.checkpoint.storage import (
    DIAL_FILE,
    MANIFEST_FILE,
    POLICY_FILE,
    check_folder,
    load_checkpoint,
    save_checkpoint,
)
from sparsetune.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SCHEME = "hf:/"
"""Beginning of a reference: hf://OWNER/NAME, or hf:/OWNER/NAME as `Path` writes it."""

FILES = (POLICY_FILE, MANIFEST_FILE, DIAL_FILE)
CARD_FILE, VIDEO_FOLDER = "README.md", "videos"


@dataclass(frozen=True)
class HubReference:
    """A repository on the Hub, and a branch, tag or commit; None is the newest of its main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubReference":
        """Parse OWNER/NAME or hf://OWNER/NAME, either with @REVISION; UsageError for anything else."""
        part = r"[A-Za-z0-9][-\w.]*"
        found = re.fullmatch(rf"(?:hf:/+)?({part}/{part})(?:@([-\w./]+))?", text, re.ASCII)
        if found is None or ".." in text or "--" in found[1]:
            raise UsageError(f"{text} is not OWNER/NAME or hf://OWNER/NAME@REVISION of the Hugging Face Hub")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def download(reference: HubReference) -> Path:
    """Download a checkpoint to the client's own cache, and return its folder there.

    Without the network, or with HF_HUB_OFFLINE, that is what the cache has.

    Raises:
        CheckpointError: it can't be downloaded, or the repository has no checkpoint.
    """
    with _hub_errors(f"read {reference}", reference):
        from huggingface_hub import snapshot_download

        found = snapshot_download(reference.repo, revision=reference.revision, allow_patterns=list(FILES))
    folder = Path(found)
    missing = [name for name in (POLICY_FILE, MANIFEST_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{reference} is no checkpoint: it lacks {' and '.join(missing)}; use a repository that "
            "`sparsetune checkpoint push` wrote"
        )
    return folder


def pull(reference: HubReference, folder: Path) -> Path:
    """Save a checkpoint from the Hub in a folder, as `save_checkpoint` does; return the folder.

    Raises:
        CheckpointError: as `download`, `load_checkpoint` and `save_checkpoint` raise it.
    """
    check_folder(folder)
    return save_checkpoint(load_checkpoint(download(reference)), folder)


def push(
    folder: Path, repo: str, card: str, videos: Mapping[str, Path] | None = None, *, private: bool | None = None
) -> str:
    """Push a checkpoint's folder to the Hub in one commit, and return the commit's address.

    The repository is made if there is none; of its files only a checkpoint's, the card and videos are replaced.

    Args:
        folder: as `save_checkpoint` wrote it.
        repo: OWNER/NAME.
        card: the model card, written as README.md.
        videos: names in the repository's folder `videos`, and their files.
        private: whether a new repository is private; None is the Hub's default, public for most owners.

    Raises:
        CheckpointError: the Hub can't be reached, or refuses.
    """
    content: dict[str, bytes | Path] = {name: folder / name for name in FILES if (folder / name).is_file()}
    content[CARD_FILE] = card.encode()
    content |= {f"{VIDEO_FOLDER}/{name}": path for name, path in (videos or {}).items()}
    with _hub_errors(f"push to {repo}", HubReference(repo)):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        replaced = [name for name in api.list_repo_files(repo) if name in FILES or name.startswith(f"{VIDEO_FOLDER}/")]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, value) for name, value in content.items()),
            *(CommitOperationDelete(name) for name in replaced if name not in content),
        ]
        return str(api.create_commit(repo, operations, commit_message="Push a checkpoint of sparsetune").commit_url)


@contextlib.contextmanager
def _hub_errors(doing: str, reference: HubReference) -> Iterator[None]:
    """Raise what the client raises as one line that says what to do, and keep its progress bars off the terminal."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shows_progress = not are_progress_bars_disabled()
    try:
        if shows_progress:
            disable_progress_bars()
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set, and the hub's cache doesn't have it; unset it"
        elif isinstance(cause_of := error.__cause__, errors.HfHubHTTPError):
            cause = _refusal(cause_of, reference)
        else:
            cause = _unreachable()
        raise CheckpointError(f"cannot {doing}: {cause}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"cannot {doing}: there is no revision {reference.revision}; give another branch, tag or commit"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"cannot {doing}: {_refusal(error, reference)}") from error
    except (errors.HTTPError, errors.XetDownloadError) as error:  # type: ignore[attr-defined]  # httpx's base class
        raise CheckpointError(f"cannot {doing}: {_unreachable()}") from error
    except (OSError, RuntimeError, ValueError) as error:  # the last two are failed uploads and malformed answers
        raise CheckpointError(
            f"cannot {doing}: {getattr(error, 'strerror', None) or error}; try again later"
        ) from error
    finally:
        if shows_progress:
            enable_progress_bars()


def _unreachable() -> str:
    from huggingface_hub import constants

    return f"the hub at {constants.ENDPOINT} can't be reached; check the network, or HF_ENDPOINT"


def _refusal(error: "HfHubHTTPError", reference: HubReference) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code
    if status == 403:
        return f"the token has no right to (403); use one that may write to {reference.repo.partition('/')[0]}"
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such repository, or it is private ({status}); check the name, or log in with `hf auth login`"
        )
    if status == 401:
        return "the hub needs a token that it accepts (401); log in with `hf auth login`, or set HF_TOKEN"
    return f"the hub refused with status {status}; try again later"
