"""Studies: a grid of runs, written as a YAML file."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import noise
from runner import ROOT
from runner.parameters import (
    PROFILES,
    Params,
    completed,
    profile_defaults,
    run_id,
)
from runner.reading import load_yaml, mistakes_in_words, nearest

STUDIES = ROOT / "params/studies"
SET_ELSEWHERE = {"seed", "base_seed", "profile", "output_dir", "use_selected"}
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class StudyFile(BaseModel):
    """What a study's file says. Every arm's lists are crossed with each other and with the seeds.

    A file may have a key `profiles` with what differs for a profile, such as
    `profiles: {smol: {seeds: [0, 1]}}`. With `cross_base_seeds: false` each seed has one base
    policy, in turn: seeds 0, 1, 2 on base policies 0, 1, 0.

    An arm may have a `name` and a `reference` (the name of the arm it is compared with), in which
    {parameter} stands for a value, such as "flip .3, G={num_generations}". Without a name the noise
    names the arm, and the reference is the clean arm with the same other parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str
    arms: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    base_seeds: list[Seed] = Field([0], min_length=1)
    cross_base_seeds: bool = True
    fixed: dict[str, Any] = {}
    use_selected: bool = True
    select: bool = False
    eval_split: Literal["validation", "test"] = "test"
    eval_samples: int = Field(4, ge=1)
    eval_limit: int | None = Field(None, ge=1)
    reference: str = "clean"


class Study(StudyFile):
    """A study, and what its named arms are called."""

    names: dict[str, tuple[str, str]] = {}  # run id -> (arm, reference)

    def arm_and_reference(self, params: Params) -> tuple[str, str]:
        """What tables call the arm of a run, and the arm that it is compared with."""
        return self.names.get(run_id(params)) or (arm_of(params), "clean")


class Cell(NamedTuple):
    """A run of a study, and what its arm is called if it has a name."""

    params: Params
    name: str
    reference: str


def load_study(name: str, profile: str) -> tuple[Study, list[Params]]:
    """A study and the parameters of all its runs, checked before anything starts.

    ValueError lists all mistakes of the file, a line each.
    """
    values, path = load_yaml(STUDIES, name, "study")
    mistakes: list[str] = []
    values = for_profile(values, profile, path.name, mistakes)
    file = checked(values, path.name, mistakes)
    try:
        defaults = profile_defaults(profile, file.use_selected)  # read once, not once a run
    except ValueError as e:  # without a profile, no run can be looked at
        raise ValueError("\n".join([*mistakes, str(e)])) from None
    cells = all_cells(file, defaults, path.name, mistakes)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    names = {run_id(cell.params): (cell.name, cell.reference) for cell in cells if cell.name}
    return Study(**dict(file), names=names), [cell.params for cell in cells]


def for_profile(values: dict, profile: str, where: str, mistakes: list[str]) -> dict:
    """A file's values, overruled by its part for this profile. Adds what is wrong to `mistakes`."""
    parts = values.pop("profiles", None) or {}
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        mistakes.append(f"{where}: profiles maps a profile's name to what differs for it, such as "
                        "{smol: {seeds: [0, 1]}}")
        return values
    for other in parts:
        try:
            load_yaml(PROFILES, other, "profile")
        except ValueError as e:  # a mistyped name would be ignored in silence
            mistakes.append(f"{where}: {e}")
    return values | parts.get(profile, {})


def checked(values: dict, where: str, mistakes: list[str]) -> StudyFile:
    """The file without what is wrong in it, so that the rest is looked at too. See `mistakes`."""
    try:
        return StudyFile.model_validate(values)
    except ValidationError as report:
        mistakes += [f"{where}: {what}" for what in mistakes_in_words(StudyFile, report)]
        wrong = {error["loc"][0] for error in report.errors()}
    right = {name: value for name, value in values.items() if name not in wrong}
    return StudyFile.model_validate({"title": "", "arms": [{}], "seeds": [0]} | right)


def all_cells(file: StudyFile, defaults: dict, where: str, mistakes: list[str]) -> list[Cell]:
    """The runs of all arms. Adds what is wrong to `mistakes`."""
    cells: list[Cell] = []
    are_all_names_known = True
    for number, arm in enumerate(file.arms, 1):
        found, wrong = cells_of(file, arm, defaults)
        cells += found
        mistakes += [f"{where}, arm {number}: {what}" for what in wrong]
        if wrong and "name" in file.fixed | arm:  # other arms may refer to it
            are_all_names_known = False

    mistakes += [f"{where}: {what}" for what in repeated(cells)]
    if are_all_names_known:
        mistakes += [f"{where}: {what}" for what in without_reference(cells)]
    return cells


def cells_of(file: StudyFile, arm: dict, defaults: dict) -> tuple[list[Cell], list[str]]:
    """The runs of one arm, and what is wrong with it."""
    settings = file.fixed | arm
    if "name" in settings:
        settings.setdefault("reference", file.reference)
    mistakes = list(wrong_settings(settings))
    if mistakes:
        return [], mistakes
    name, reference = settings.pop("name", ""), settings.pop("reference", "")
    lists = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    cells = []
    for (base_seed, seed), *values in itertools.product(replicates(file), *lists.values()):
        given = dict(zip(lists, values, strict=True), seed=seed, base_seed=base_seed)
        try:
            params = Params.model_validate(completed(defaults, given))
            cells.append(Cell(params, filled(name, params), filled(reference, params)))
        except ValidationError as report:
            mistakes += mistakes_in_words(Params, report)
        except ValueError as e:
            mistakes.append(str(e))
    return cells, list(dict.fromkeys(mistakes))  # a mistake is the same for every seed


def filled(template: str, params: Params) -> str:
    """A name with the values of parameters in the place of {parameter}."""
    try:
        return str(template).format(**vars(params))
    except KeyError as e:
        unknown = e.args[0]
        raise ValueError(f"{template!r}: {unknown!r} is not a parameter"
                         f"{nearest(unknown, Params.model_fields)}") from None


def replicates(file: StudyFile) -> list[tuple[int, int]]:
    """(base seed, seed) of each replicate of an arm."""
    if file.cross_base_seeds:
        return list(itertools.product(file.base_seeds, file.seeds))
    return list(zip(itertools.cycle(file.base_seeds), file.seeds, strict=False))


def wrong_settings(settings: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an arm, together with `fixed`, before its lists are crossed."""
    for key in sorted(SET_ELSEWHERE & settings.keys()):
        yield (f"{key!r} cannot be set in an arm or in fixed, since it follows from the study's "
               "seeds and --profile")
    for key, value in settings.items():
        if value == []:
            yield f"{key} is an empty list, so the arm has no run"
    if "reference" in settings and "name" not in settings:
        yield "reference is for arms that have a name: give this one a name too"


def repeated(cells: list[Cell]) -> Iterator[str]:
    """A sentence for each run that occurs more than once."""
    for name, times in Counter(run_id(cell.params) for cell in cells).items():
        if times > 1:
            yield f"the run {name} occurs {times} times: keep one of them"


def without_reference(cells: list[Cell]) -> Iterator[str]:
    """A sentence for each name that arms are compared with and that no arm has."""
    names = {cell.name for cell in cells}
    missing: dict[str, dict[str, None]] = {}  # reference -> its arms, once, not once a seed
    for cell in cells:
        if cell.name and cell.reference not in names:
            missing.setdefault(cell.reference, {})[cell.name] = None
    for reference, arms in sorted(missing.items()):
        yield (f"{', '.join(map(repr, arms))} compared with {reference!r}, and no arm has that name"
               f"{nearest(reference, names)}: give an arm this name (`name: {reference}`), or set "
               "`reference` (in an arm, or for the whole study) to the name of one")


def arm_of(params: Params) -> str:
    """What the noise alone calls the arm of a run."""
    return noise.describe(vars(params))[0]


def compared_with_nothing(study: Study, grid: list[Params]) -> str:
    """A sentence on the arms without a name that no clean arm can be compared with, or ""."""
    by_setting: dict[tuple, dict[str, None]] = {}  # setting -> its arms, in order
    for params in grid:
        if run_id(params) not in study.names:
            by_setting.setdefault(_setting(params), {})[arm_of(params)] = None
    lone = [arm for arms in by_setting.values() if "clean" not in arms for arm in arms]
    if not lone:
        return ""
    more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
    return (f"No arm without noise has the other parameters of {lone[0]}{more}, so nothing is said "
            "about what noise costs there: add such an arm ({}), or give arms a name and a "
            "reference (docs/studies.md).")


def _setting(params: Params) -> tuple:
    """All that a run shares with the clean run that it is compared with, but for seeds."""
    differ = {*noise.PARAMETERS, "reward", "cue", "seed", "noise_seed", "base_seed"}
    return tuple(value for name, value in vars(params).items() if name not in differ)
