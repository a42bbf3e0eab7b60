"""What a command works on: a study, or runs that are named by id or folder."""

from pathlib import Path

from runner import OUTPUTS, ROOT, WORK, studies
from runner.files import digest, read_json
from runner.parameters import Params, run_id, study_folder_name
from runner.studies import Study, arm_of

SEEDS = {"seed", "base_seed", "noise_seed", "output_dir"}


def load(target: str, profile: str) -> tuple[Study, list[Params]]:
    """A study and the parameters of its runs; of runs, their study. See `studies.load_study`."""
    folders = folders_of(target)
    if folders:
        return as_study(folders)
    return studies.load_study(target, profile)


def folder_of(target: str, profile: str) -> Path:
    """Where tables, figures and rendered notebooks of a study, or of these runs, are."""
    folders = folders_of(target)
    if not folders:
        name = Path(target).stem if target.endswith((".yaml", ".yml")) else target
        return OUTPUTS / study_folder_name(name, profile)
    if len(folders) == 1:
        return OUTPUTS / f"run-{folders[0].name}"
    return OUTPUTS / f"runs-{digest(sorted(folder.name for folder in folders))}"


def folders_of(given: str) -> list[Path]:
    """The folders of runs that are named by id or folder, separated by commas; [] if none is one.

    ValueError if some are runs and some are not.
    """
    names = [name.strip() for name in str(given).split(",")]
    folders = [folder_of_run(name) for name in names]
    if not any(folders):
        return []
    missing = [name for name, folder in zip(names, folders, strict=True) if folder is None]
    if missing:
        raise ValueError(f"there is no run {', '.join(missing)}: give the id of a run in "
                         "outputs/runs, or its folder")
    return folders


def folder_of_run(name: str) -> Path | None:
    """The folder of the run with this id or path, or None."""
    if not name:
        return None
    for folder in (OUTPUTS / "runs" / name, WORK / name, ROOT / name, Path(name)):
        if (folder / "params.json").is_file():
            return folder
    return None


def as_study(folders: list[Path]) -> tuple[Study, list[Params]]:
    """A study of finished or unfinished runs. Runs that differ in their seeds alone are one arm.

    ValueError if a folder is not where the store would have it.
    """
    grid = [Params(**read_json(folder / "params.json")) for folder in folders]
    for params, folder in zip(grid, folders, strict=True):
        if params.folder.resolve() != folder.resolve():
            raise ValueError(f"{folder} holds the run {run_id(params)}, whose place is "
                             f"{params.folder}: move it there")
    names = names_of_arms(grid)
    reference = next((name for name in names.values() if name.startswith("clean")),
                     names[run_id(grid[0])])
    title = f"Run {run_id(grid[0])}" if len(grid) == 1 else f"{len(grid)} runs"
    study = Study(title=title, arms=[{}], seeds=[0], use_selected=False,
                  names={run: (name, reference) for run, name in names.items()})
    return study, grid


def names_of_arms(grid: list[Params]) -> dict[str, str]:
    """{run id: arm}. Where other parameters than noise differ, the arm's name says how."""
    by_label: dict[str, list[Params]] = {}
    for params in grid:
        by_label.setdefault(arm_of(params), []).append(params)

    names = {}
    for label, alike in by_label.items():
        differing = differing_settings(alike)
        for params in alike:
            remarks = [f"{name} {getattr(params, name)}" for name in differing]
            names[run_id(params)] = ", ".join([label, *remarks])
    return names


def differing_settings(grid: list[Params]) -> list[str]:
    """The parameters in which runs differ, but for their seeds."""
    first, *others = (params.model_dump(exclude=SEEDS) for params in grid)
    return [name for name in first if any(other[name] != first[name] for other in others)]
