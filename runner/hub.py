"""What the hub has, and whether this machine gets it: asked before anything slow is loaded."""

import json
import os
import re
from pathlib import Path

# Why a model is not had, to follow its name, by the error of the hub's client. {local}: the way
# without a hub.
REASONS = {
    "HFValidationError": "is neither a folder here nor a hub id such as Qwen/Qwen2.5-Math-1.5B",
    "GatedRepoError": "is gated: accept its licence on its page of the hub, and set HF_TOKEN to a "
                      "token of that account",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the hub: check the "
                               "spelling, and set HF_TOKEN if it is private",
    "EntryNotFoundError": "has no {file} in its repository on the hub: check the spelling, or "
                          "{local}",
    "OfflineModeIsEnabled": "is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub: "
                            "unset it, or {local}",
}
UNREACHABLE = ("is neither here nor can its hub be reached: {local}, or set HF_ENDPOINT to a hub "
               "that this machine reaches")
REFUSED = "is not here, and its hub refuses it with HTTP status %d: %s, or {local}"
REMEDIES = {401: "check HF_TOKEN", 403: "check HF_TOKEN", 404: "check HF_ENDPOINT"}
PASSWORD = ("is not asked for, since HF_ENDPOINT holds a password, which would be written to logs: "
            "set HF_TOKEN instead, or {local}")


def without_secrets(text: str) -> str:
    """`text` without passwords in addresses and without tokens from environment variables."""
    for name, value in os.environ.items():
        if len(value) > 7 and re.search("TOKEN|SECRET|PASSWORD|API_KEY", name):
            text = text.replace(value.strip(), f"<{name}>")
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def endpoint_has_password() -> bool:
    """Whether HF_ENDPOINT holds one: the hub's client would write it to its log."""
    address = os.environ.get("HF_ENDPOINT", "").partition("://")[2]
    return "@" in address.partition("/")[0]


def check_hub(model: str, file: str = "config.json"):
    """FileNotFoundError, in one sentence and within seconds, if the hub does not deliver `model`.

    Nothing is downloaded: the hub is asked once for the head of `file`. What the local cache holds
    needs no hub.
    """
    refuse_password(model, file)
    why = _why_not(model, file)
    if why and not _is_cached(model, file):
        raise _not_found(model, file, why)


def refuse_password(model: str, file: str = "config.json"):
    """FileNotFoundError if asking the hub would write a password to logs."""
    offline = os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
    if endpoint_has_password() and not offline:
        raise _not_found(model, file, PASSWORD)


def _not_found(model: str, file: str, why: str) -> FileNotFoundError:
    """The error for one of the reasons above."""
    name = model.rpartition("@")[2]  # an address may begin with a password
    local = "give a local folder as `model` (-p model FOLDER)"
    if file != "config.json":
        local = f"put {Path(file).name} into the folder models"
    return FileNotFoundError(f"model={name!r} {why.format(file=file, local=local)}")


def download(model: str, file: str) -> Path:
    """One file of a model on the hub, from the local cache when it is there."""
    from huggingface_hub import hf_hub_download

    check_hub(model, file)
    try:
        return Path(hf_hub_download(model, file))
    except Exception as e:  # the hub client's own errors, httpx's and the system's
        why = without_secrets(str(e).splitlines()[0])
        raise OSError(f"model={f'{model}/{file}'!r} cannot be downloaded ({why}): try again, or "
                      "give the file as `model` (-p model FILE.gguf)") from None


def _why_not(model: str, file: str) -> str | None:
    """Why the hub does not deliver this file now, to follow the model's name; None if it does."""
    import httpx  # here, since most runs need no hub
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 5)
    try:
        metadata = get_hf_file_metadata(hf_hub_url(model, file), timeout=seconds)
    except (errors.HFValidationError, httpx.HTTPError, httpx.InvalidURL, OSError) as e:
        return _reason(e)
    # Only a hub says of which commit a file is: the page of a proxy does not.
    return None if metadata.commit_hash else UNREACHABLE


def _reason(error: Exception) -> str:
    """What an error of the hub's client means."""
    for kind in type(error).__mro__:
        if kind.__name__ in REASONS:
            return REASONS[kind.__name__]
    response = getattr(error, "response", None)
    if response is None:
        return UNREACHABLE
    remedy = REMEDIES.get(response.status_code, "try again later")
    return REFUSED % (response.status_code, remedy)


def _is_cached(model: str, file: str) -> bool:
    """Whether the hub's local cache holds a file of a model.

    For config.json: also all weights, as safetensors.
    """
    if _cached_file(model, file) is None:
        return False
    if file != "config.json":
        return True
    index = _cached_file(model, "model.safetensors.index.json")
    if index is None:
        return _cached_file(model, "model.safetensors") is not None
    shards = set(json.loads(Path(index).read_text())["weight_map"].values())
    return all(_cached_file(model, shard) for shard in shards)


def _cached_file(model: str, file: str) -> str | None:
    """The path of a file in the hub's local cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, file)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None  # it may also say that there is no such file
