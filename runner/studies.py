"""Studies: a grid of runs, written as a YAML file."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lib import noise
from runner import OUTPUTS, ROOT
from runner.parameters import (
    PROFILES,
    Params,
    _check,
    _check_below,
    _defaults,
    _with_defaults,
    load_yaml,
    nearest,
    run_id,
    study_folder_name,
)

STUDIES = ROOT / "params/studies"


def folder_of(name: str, profile: str) -> Path:
    """Where the tables, figures and rendered notebooks of a study are. Its runs are in the store, outputs/runs."""
    file = Path(name)
    study = file.stem if file.suffix in (".yaml", ".yml") else str(name)
    return OUTPUTS / study_folder_name(study, profile)


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
        return (self.names and self.names.get(run_id(params))) or (noise.describe(vars(params))[0], "clean")


def load_study(name: str, profile: str) -> tuple[Study, list[Params]]:
    """A study and the parameters of all its runs, checked before anything starts."""
    values, path = load_yaml(STUDIES, name, "study")
    for other in values.get("profiles", {}):
        load_yaml(PROFILES, other, "profile")  # a mistyped profile would be ignored in silence
    values |= values.pop("profiles", {}).get(profile, {})
    study = _check(Study, values, path.name)
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
                given = dict(zip(lists, values, strict=True), seed=seed, base_seed=base_seed)
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
