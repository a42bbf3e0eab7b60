"""Can this machine load a model, from a folder or from the hub? Asked before anything slow is loaded.

Weights are read from safetensors only, which hold numbers: a pickle (.bin, .pt) can run any code when it is opened.
"""

import json
import os
import re
from pathlib import Path

from runner import dataset


def check_folder(folder: Path, kind: str = "model"):
    """FileNotFoundError or ValueError, in one sentence, if `folder` holds no model (or adapter) that may be loaded."""
    config, weights = ("config.json", "model") if kind == "model" else ("adapter_config.json", "adapter_model")
    if not (folder / config).is_file():
        raise FileNotFoundError(f"{kind}={str(folder)!r} is not a folder with {config}: give one"
                                + (", or a hub id" if kind == "model" else ""))
    if not any((folder / f"{weights}.safetensors{end}").is_file() for end in ("", ".index.json")):
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f"only {pickles[0]}, which could run code when it is opened" if pickles else "none"
        raise ValueError(f"{kind}={str(folder)!r}: weights are read from {weights}.safetensors, and there is {why}")


def without_secrets(text: str) -> str:
    """`text` without passwords in addresses and without the values of environment variables that hold tokens."""
    for name, value in os.environ.items():
        if len(value) > 7 and re.search("TOKEN|SECRET|PASSWORD|API_KEY", name):
            text = text.replace(value.strip(), f"<{name}>")
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def check(model: str):
    """FileNotFoundError, in one sentence and within seconds, if the hub does not deliver `model` to this machine.

    Nothing is downloaded: the hub is asked once for the head of config.json. What the local cache holds needs no hub.
    """
    import httpx  # here, since most runs need no hub
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    folder = "give a local folder as `model` (-p model FOLDER)"
    if dataset.endpoint_has_password() and os.environ.get("HF_HUB_OFFLINE") in (None, "", "0"):
        raise FileNotFoundError(f"model={model.rpartition('@')[2]!r} is not asked for, since HF_ENDPOINT holds a "
                                f"password, which would be written to logs: set HF_TOKEN instead, or {folder}")
    why = f"is neither here nor can its hub be reached: {folder}, or set HF_ENDPOINT to a hub that this machine reaches"
    try:
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 5)
        if get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=seconds).commit_hash:
            return  # only a hub says of which commit a file is: a proxy's page does not
    except errors.HFValidationError:
        shown = model.rpartition("@")[2]  # an address may begin with a password
        raise FileNotFoundError(f"model={shown!r} is neither a folder here nor a hub id such as "
                                "Qwen/Qwen2.5-Math-1.5B") from None
    except errors.GatedRepoError:
        why = "is gated: accept its licence on its page of the hub, and set HF_TOKEN to a token of that account"
    except errors.RepositoryNotFoundError:
        why = "is neither a folder here nor a model on the hub: check the spelling, and set HF_TOKEN if it is private"
    except errors.EntryNotFoundError:
        why = "is not a transformers model: its repository on the hub has no config.json"
    except errors.OfflineModeIsEnabled:
        why = f"is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub: unset it, or {folder}"
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        way = "check HF_TOKEN" if status in (401, 403) else "check HF_ENDPOINT" if status == 404 else "try again later"
        why = f"is not here, and its hub refuses it with HTTP status {status}: {way}, or {folder}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        pass
    if not _cached(model):
        raise FileNotFoundError(f"model={model!r} {why}")


def _cached(model: str) -> bool:
    """Whether the hub's local cache holds the configuration and all weights, as safetensors, of a model."""
    from huggingface_hub import try_to_load_from_cache

    def held(name):
        path = try_to_load_from_cache(model, name)
        return path if isinstance(path, str) else None  # it may also say that the repository has no such file

    def whole(weights):
        index = held(weights + ".index.json")
        shards = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {weights}
        return all(map(held, shards))

    return bool(held("config.json")) and whole("model.safetensors")
