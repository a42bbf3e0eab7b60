"""What the parameters of a run are, which values are allowed, and what the run is called."""

import difflib
import math
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from lib import noise
from lib.rewards import estimator
from runner import OUTPUTS, ROOT, WORK, dataset, engines
from runner.files import digest
from runner.provenance import assignments

PROFILES = ROOT / "params/profiles"
NOT_HASHED = {"output_dir", "report_to", "gradient_checkpointing"}  # these do not change what a run computes
# not hashed at their defaults, so that earlier runs keep their names
ADDED_LATER = {name for name, named in noise.NAMED.items() if named.added_later}

# A field for each rate that names a channel, so a channel that is new in lib.noise is a parameter of runs.
NoiseParams = create_model("NoiseParams", noise_level=(Literal[noise.LEVELS], "rollout"),
                           **{name: (float, Field(0.0, ge=0, le=1)) for name in noise.NAMED})


class Params(NoiseParams):
    """Everything that decides a run. The notebook 02_train says what each parameter does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str
    output_dir: str = "outputs"
    # the policy and the data
    model: str
    base_seed: int = Field(0, ge=0)
    data_dir: str
    prompt_template: Literal["none", "chat", "qwen-math", "r1-zero"] = "none"
    engine: Literal["transformers", "vllm", "unsloth"] = "transformers"
    max_prompt_length: int = Field(512, gt=0)
    max_completion_length: int = Field(512, gt=0)
    # the noise, beside the rates of NoiseParams
    reward: Literal["accuracy", "format", "majority"] = "accuracy"
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
    def channel(self) -> noise.Channel:
        """The noise channel of the run."""
        return noise.channel(**{name: getattr(self, name) for name in noise.PARAMETERS})

    @property
    def assumed_rates(self) -> tuple[float, float]:
        """(a, b) that a mitigation believes in: the channel's own, unless others are given."""
        a, b, own = self.assumed_false_positive_rate, self.assumed_false_negative_rate, self.channel
        return own.false_positive_rate if a is None else a, own.false_negative_rate if b is None else b

    @property
    def folder(self) -> Path:
        """The folder of the run, in the one store that all studies share (unless output_dir names another)."""
        return WORK / self.output_dir / "runs" / run_id(self)

    @property
    def base_folder(self) -> Path:
        """Where evaluations of the base policy of the run are kept, in the same store."""
        model = re.sub(r"[^\w.+-]+", "-", self.model).strip("-")
        return WORK / self.output_dir / "runs" / f"base-{model}-s{self.base_seed}"


@lru_cache  # the cells of a study share their folders
def _check_folders(work: Path, output_dir: str, data_dir: str):
    """ValueError if a folder among the parameters is not one, or leaves the workspace, also through a link."""
    target = (work / output_dir).resolve()
    if ".." in Path(output_dir).parts or not any(
            target.is_relative_to(root) for root in (work, (work / "outputs").resolve())):
        raise ValueError(f"output_dir={output_dir!r} leaves the workspace: name a folder such as outputs/mine")
    dataset.data_folder(data_dir)


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


@cache
def run_id(params: Params) -> str:
    """Readable settings and 8 hex digits of the hash of all parameters, such as flip-0.2-s1-1c2f9a03."""
    return _name(vars(params))


def _name(p: dict[str, Any]) -> str:
    """`run_id` of parameters as params.json holds them."""
    arm = re.sub(r"[^0-9a-z.]+", "-", noise.describe(p)[0].lower()).strip("-")
    base = f"-b{p['base_seed']}" if p["base_seed"] else ""
    same = {name for name in ADDED_LATER if name in p and p[name] == Params.model_fields[name].default}
    return f"{arm}{base}-s{p['seed']}-{digest({name: p[name] for name in p.keys() - NOT_HASHED - same})}"


def steps_in(params: Params, problems: int) -> int:
    """Optimiser steps of a run on `problems` training problems."""
    if params.max_steps > 0:
        return params.max_steps
    prompts = params.per_device_train_batch_size * params.gradient_accumulation_steps // params.num_generations
    return math.ceil(problems // prompts * params.num_iterations * params.num_train_epochs)
