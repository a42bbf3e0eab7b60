"""What the hub has, and whether this machine gets it: asked before anything slow is loaded."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REMEDY = ("give a local folder or file as `model` (-p model FOLDER), set HF_TOKEN if the model "
          "asks for an account, or set HF_ENDPOINT to a hub that this machine reaches")


def without_secrets(text: str) -> str:
    """`text` without passwords in addresses and without tokens from environment variables."""
    for name, value in os.environ.items():
        if len(value) > 7 and re.search("TOKEN|SECRET|PASSWORD|API_KEY", name):
            text = text.replace(value.strip(), f"<{name}>")
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def refuse_password():
    """ValueError if HF_ENDPOINT holds a password: the hub's client would write it to its log."""
    if re.search("://[^/]*@", os.environ.get("HF_ENDPOINT", "")):
        raise ValueError("HF_ENDPOINT holds a password, which would be written to logs: set "
                         "HF_TOKEN instead")


@contextmanager
def explained(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what the hub's client says of a thing that is not had into one sentence with a remedy.

    Its own words tell a wrong name, a gated model, and a hub that cannot be reached apart.
    """
    try:
        yield
    except Exception as e:  # the client's own errors, httpx's and the system's
        why = " ".join(without_secrets(str(e)).split()) or type(e).__name__
        raise FileNotFoundError(f"{without_secrets(what)} is not here, and cannot be had from the "
                                f"hub ({why}): {remedy}") from None


def check_hub(model: str, file: str = "config.json"):
    """FileNotFoundError, in one sentence and within seconds, if the hub does not deliver `model`.

    Nothing is downloaded: the hub is asked once for the head of `file`, unless it is in the local
    cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    refuse_password()
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 5)
    with explained(f"model={model!r}"):
        if not isinstance(try_to_load_from_cache(model, file), str):
            get_hf_file_metadata(hf_hub_url(model, file), timeout=seconds)


def download(model: str, file: str) -> Path:
    """One file of a model on the hub, from the local cache when it is there."""
    from huggingface_hub import hf_hub_download

    check_hub(model, file)
    with explained(f"model='{model}/{file}'"):
        return Path(hf_hub_download(model, file))
