"""Models by their name on the Hugging Face hub, such as ``state-spaces/mamba-130m``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from simba_lab.checkpoint.state_spaces import CONFIG_FILE
from simba_lab.checkpoint.weights import WEIGHTS_FILES, index_file, shard_names
from simba_lab.errors import InputError

REACH_SECONDS = 5.0
"""How long the hub may take to answer at all; the client's own retries would take half a minute without a network."""
TOKENIZER_FILE = "tokenizer.json"
NEOX = "EleutherAI/gpt-neox-20b"
"""Whose tokenizer state-spaces' models use; their own folders hold none."""

Get = Callable[[str], Path | None]


def is_name(text: str) -> bool:
    """Whether a text that is no path here may name a model on the hub: ``owner/model``, no folder called ``owner``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None and not Path(text).parent.exists()


def fetch(name: str) -> Path:
    """Folder with a model's config, weights and, if it has one, tokenizer: from the hub's cache, else downloaded.

    Raises InputError that says what to copy where when there is no network, or that the hub has no such model.
    """
    cached = _gather(lambda file: _from_cache(name, file))
    if cached is not None:
        return cached
    _check_reach(name, f"its {CONFIG_FILE}, {' or '.join(WEIGHTS_FILES)} and {TOKENIZER_FILE}", f"a folder ./{name}")
    folder = _gather(lambda file: _download(name, file))
    if folder is None:
        raise InputError(f"checkpoint: {name} on the hub has no {CONFIG_FILE} with {' or '.join(WEIGHTS_FILES)}")
    _download(name, TOKENIZER_FILE)
    return folder


def fetch_tokenizer(beside: str) -> Path:
    """The GPT-NeoX tokenizer for the model ``beside``. Raises InputError as :func:`fetch`."""
    cached = _from_cache(NEOX, TOKENIZER_FILE)
    if cached is not None:
        return cached
    _check_reach(NEOX, f"its {TOKENIZER_FILE}", f"the folder of {beside}")
    path = _download(NEOX, TOKENIZER_FILE)
    if path is None:
        raise InputError(f"tokenizer: {NEOX} on the hub has no {TOKENIZER_FILE}")
    return path


def _gather(get: Get) -> Path | None:
    """Folder of a whole model, all its files gotten; None if one is not to be had."""
    config = get(CONFIG_FILE)
    if config is None:
        return None
    for file in WEIGHTS_FILES:
        if get(file) is not None:
            return config.parent
        index = get(index_file(file))
        if index is not None and all(get(shard) is not None for shard in shard_names(index)):
            return config.parent
    return None


def _from_cache(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _download(name: str, file: str) -> Path | None:
    """The file on this machine; None if the hub does not have it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, file, etag_timeout=REACH_SECONDS))
    except GatedRepoError:
        raise InputError(f"checkpoint: {name} wants its terms accepted on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(f"checkpoint: {name} does not exist, neither here nor on the hub") from None
    except LocalEntryNotFoundError as error:
        raise InputError(f"checkpoint: {file} of {name} cannot be downloaded: {_first_line(error)}") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"checkpoint: {file} of {name} cannot be downloaded: {_first_line(error)}") from None


def _check_reach(name: str, files: str, place: str) -> None:
    reason = _why_unreachable()
    if reason is not None:
        raise InputError(
            f"checkpoint: {name} is not here and the hub cannot be reached ({reason}): "
            f"copy {files} into {place}, from a machine with a network"
        )


def _why_unreachable() -> str | None:
    """None if the hub answers, whatever it says."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:  # which errors there are depends on the client's version and its HTTP library
        return _first_line(error) or type(error).__name__
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
