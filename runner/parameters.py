"""What the parameters of a run are, which values are allowed, and what the run is called."""

import ast
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lib import noise
from lib.rewards import estimator
from runner import OUTPUTS, ROOT, WORK, engines
from runner.files import digest
from runner.provenance import assignments
from runner.reading import load_yaml, nearest, read_mapping, validate

PROFILES = ROOT / "params/profiles"
NOT_HASHED = {"output_dir", "report_to", "gradient_checkpointing"}  # they change no result
# not hashed at their defaults, so that earlier runs keep their names
ADDED_LATER = {name for name, named in noise.NAMED.items() if named.added_later}
ADDED_LATER |= {"train_difficulties", "cue"}


def _no_truth_value(value):
    """YAML reads `yes` as true, and pydantic would read that as the rate 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number, not yes, no, true or false")
    return value


Real = Annotated[float, BeforeValidator(_no_truth_value),
                 AfterValidator(lambda x: x + 0.0)]  # -0.0 becomes 0.0: they are one run
Rate = Annotated[Real, Field(ge=0, le=1)]

RatesByDifficulty = Annotated[str, AfterValidator(noise.one_spelling)] | None

# A field for each rate that names a channel: one that is new in lib.noise is a parameter of runs.
NoiseParams = pydantic.create_model(
    "NoiseParams", noise_level=(Literal[noise.LEVELS], "rollout"),
    **{name: (RatesByDifficulty, None) if named.by_difficulty else (Rate, 0.0)
       for name, named in noise.NAMED.items()})


class Params(NoiseParams):
    """Everything that decides a run. The notebook 02_train says what each parameter does."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    profile: str
    output_dir: str = "outputs"
    # the policy and the data
    model: str
    base_seed: int = Field(0, ge=0)
    data_dir: str
    train_difficulties: str = Field("all", pattern=r"^(all|\d(-\d)?(,\d(-\d)?)*)$")
    prompt_template: Literal["none", "chat", "qwen-math", "r1-zero"] = "none"
    engine: Literal["transformers", "server", "vllm", "unsloth"] = "transformers"
    max_prompt_length: int = Field(512, gt=0)
    max_completion_length: int = Field(512, gt=0)
    # the noise, beside the rates of NoiseParams
    reward: Literal["accuracy", "format", "majority", "integer", "cue"] = "accuracy"
    cue: str | None = Field(None, min_length=1, max_length=80)
    mitigation: Literal["none", "backward", "forward", "sgrpo"] = "none"
    assumed_false_positive_rate: Real | None = Field(None, ge=0, le=1)
    assumed_false_negative_rate: Real | None = Field(None, ge=0, le=1)
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
    grpo_beta: Real = Field(0.0, ge=0)
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

    @model_validator(mode="after")
    def consistent(self):
        """Refuse values that are allowed each, but not together."""
        contradictions = list(_contradictions(self))
        if contradictions:
            raise ValueError("; ".join(contradictions))
        return self

    @property
    def channel(self) -> noise.Channel:
        """The noise channel of the run."""
        return noise.channel(**{name: getattr(self, name) for name in noise.PARAMETERS})

    @property
    def assumed_rates(self) -> tuple[float, float]:
        """(a, b) that a mitigation believes in: the channel's own, unless others are given.

        b is a tuple if the channel has a rate for each difficulty; then no mitigation is allowed.
        """
        a, b = self.assumed_false_positive_rate, self.assumed_false_negative_rate
        own = self.channel
        if a is None:
            a = own.false_positive_rate
        if b is None:
            b = own.false_negative_rate
        return a, b

    @property
    def prompts_per_step(self) -> int:
        """Problems in one batch of rollouts; each is answered num_generations times."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batch // self.num_generations

    @property
    def folder(self) -> Path:
        """The folder of the run, in the store that all studies share, or in another output_dir."""
        return WORK / self.output_dir / "runs" / run_id(self)

    @property
    def base_folder(self) -> Path:
        """Where evaluations of the base policy of the run are kept, in the same store."""
        model = re.sub(r"[^\w.+-]+", "-", self.model).strip("-")
        return WORK / self.output_dir / "runs" / f"base-{model}-s{self.base_seed}"


# --- what is refused ------------------------------------------------------------------------------


def _contradictions(p: Params) -> Iterator[str]:
    """A sentence for each pair of parameters that do not go together."""
    for check in (_output_dir, _reward_and_cue, _noise_and_mitigation, _engine):
        try:
            check(p)
        except ValueError as e:
            yield str(e)
    batch = p.per_device_train_batch_size * p.gradient_accumulation_steps
    if batch % p.num_generations:
        yield (f"per_device_train_batch_size × gradient_accumulation_steps = {batch} completions "
               f"do not divide into groups of num_generations={p.num_generations}")
    if p.max_steps == 0:
        yield "max_steps=0 trains nothing: give at least 1, or -1 for num_train_epochs"
    if p.save_steps % p.num_iterations:
        yield (f"save_steps={p.save_steps} is not a multiple of num_iterations={p.num_iterations}: "
               "a checkpoint between two optimiser steps on the same rollouts cannot be resumed "
               "exactly")


def _output_dir(p: Params):
    folder = Path(p.output_dir)
    if folder.is_absolute() or ".." in folder.parts:
        raise ValueError(f"output_dir={p.output_dir!r} leaves the workspace: name a folder such as "
                         "outputs/mine")


def _reward_and_cue(p: Params):
    if p.reward == "cue" and not (p.cue or "").strip():
        raise ValueError("reward='cue' accepts every completion that contains a phrase: give the "
                         "phrase, such as cue='Therefore'")
    if p.cue is not None and p.reward != "cue":
        raise ValueError(f"cue={p.cue!r} has no effect with reward={p.reward!r}: set reward='cue', "
                         "or leave the cue out")


def _noise_and_mitigation(p: Params):
    _, b = p.assumed_rates
    if p.mitigation != "none" and isinstance(b, tuple):
        raise ValueError(f"mitigation={p.mitigation!r} believes in one rate, and "
                         "mask_rate_by_difficulty has several: give assumed_false_negative_rate")
    estimator(p.mitigation, *p.assumed_rates)
    if p.mitigation == "sgrpo" and p.scale_rewards != "none":
        raise ValueError("mitigation='sgrpo' returns advantages itself, and scale_rewards="
                         f"{p.scale_rewards!r} would undo its weights: set scale_rewards='none'")


def _engine(p: Params):
    if p.engine == "transformers":
        return
    engines.served_rank(p.lora_rank)
    if p.top_p < 1:
        raise ValueError(f"top_p={p.top_p:g} with engine={p.engine!r}: the engine's probabilities "
                         "would be those of the kept tokens, the trainer's those of all: set "
                         "top_p=1")
    if p.engine == "unsloth" and p.loss_type == "bnpo":
        raise ValueError("loss_type='bnpo' is computed otherwise by unsloth: choose another loss "
                         "or another engine")


# --- where values come from -----------------------------------------------------------------------


def resolve(profile: str | None = None, use_selected: bool = False, **given) -> Params:
    """Parameters of one run: the profile's, then the selected ones if asked for, then those given.

    None means "as the profile says", and for the profile "as the model suggests". noise_seed
    defaults to seed. ValueError names each mistake.
    """
    if profile is None:
        profile = profile_of_model(given.get("model"))
    defaults = profile_defaults(profile, use_selected)
    return validate(Params, completed(defaults, given), f"profile {profile}")


def profile_of_model(model: str | None) -> str:
    """The profile of a run that names none: "own" for a model that this project does not know."""
    if model is None:
        return "tiny"
    known = {"tiny": "tiny", "smol": "smol", "smol-warm": "smol"}
    return known.get(model, "own")


def profile_defaults(profile: str, use_selected: bool) -> dict[str, Any]:
    """What a profile says, and if asked for, the hyperparameter study's choice. Reads two files."""
    values, _ = load_yaml(PROFILES, profile, "profile")
    if use_selected:
        values |= selected(profile)
    return values | {"profile": profile}


def completed(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The defaults, overruled by what is given and is not None. noise_seed defaults to seed."""
    values = defaults | {name: value for name, value in given.items() if value is not None}
    values.setdefault("noise_seed", values.get("seed", 0))
    return values


def study_folder_name(study: str, profile: str) -> str:
    """The tiny profile's studies carry the study's name; other profiles add theirs."""
    return study if profile == "tiny" else f"{study}-{profile}"


def selected_file(profile: str) -> Path:
    """Where the hyperparameter study of a profile writes its choice."""
    return OUTPUTS / study_folder_name("hyperparameters", profile) / "selected.yaml"


def selected(profile: str) -> dict[str, Any]:
    """The hyperparameter study's choice: the one made here, else the published one, else {}."""
    own = selected_file(profile)
    published = ROOT / "outputs" / own.parent.name / own.name
    for file in (own, published):
        if file.exists():
            return read_mapping(file, "choice of hyperparameters")["selected"]
    return {}


def given_parameters(names: dict[str, Any], known=()) -> dict[str, Any]:
    """Parameters among a notebook's global names; papermill itself only warns of an unknown one.

    names: globals(). IPython keeps the executed cells in `In`. Two kinds of cells give parameters:
    the one that papermill inserts, and cells of plain assignments of which at least one is known.
    Other variables of the notebook are none of our business.
    ValueError for an unknown name, and for a list where the notebook's own default is none.
    """
    known = set(known) or set(Params.model_fields)
    defaults: dict[str, Any] = {}
    inserted: dict[str, None] = {}
    for cell in names.get("In", []):
        assigned = assignments(cell)
        if cell.startswith("# Parameters\n"):
            inserted |= dict.fromkeys(_assigned_names(cell))
        elif known & assigned.keys():
            defaults = assigned | defaults
    given = {name: names[name] for name in {**defaults, **inserted}}
    mistakes = list(_wrongly_given(given, known, defaults))
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return given


def _wrongly_given(given: dict, known: set[str], defaults: dict) -> Iterator[str]:
    for name, value in given.items():
        if name not in known:
            yield f"{name!r} is not a parameter{nearest(name, known)}"
        elif isinstance(value, list | dict) and not isinstance(defaults.get(name), list):
            yield (f"{name}={value!r} is a list: give one value, and execute the notebook once for "
                   "each (a grid of runs is a study, as in params/studies/flip.yaml)")


def _assigned_names(cell: str) -> list[str]:
    """Also of values that are no literals: papermill writes an infinity as float('inf')."""
    statements = [line for line in ast.parse(cell).body if isinstance(line, ast.Assign)]
    return [target.id for line in statements for target in line.targets]


# --- what a run is called -------------------------------------------------------------------------


@cache
def run_id(params: Params) -> str:
    """Readable settings and 8 hex digits of the hash of all parameters: flip-0.2-s1-1c2f9a03."""
    values = vars(params)
    arm, _, _ = noise.describe(values)
    arm = re.sub(r"[^0-9a-z.]+", "-", arm.lower()).strip("-")
    seeds = f"s{params.seed}"
    if params.base_seed:
        seeds = f"b{params.base_seed}-{seeds}"
    unchanged = {name for name in ADDED_LATER
                 if values[name] == Params.model_fields[name].default}
    hashed = values.keys() - NOT_HASHED - unchanged
    return f"{arm}-{seeds}-{digest({name: values[name] for name in hashed})}"


def steps_in(params: Params, problems: int) -> int:
    """Optimiser steps of a run on `problems` training problems. ValueError if they fill no step."""
    prompts = params.prompts_per_step
    if problems < prompts:
        raise ValueError(f"{problems} training problems are fewer than the {prompts} that one step "
                         "takes: lower per_device_train_batch_size, or make more data (01_data)")
    if params.max_steps > 0:
        return params.max_steps
    return math.ceil(problems // prompts * params.num_iterations * params.num_train_epochs)
