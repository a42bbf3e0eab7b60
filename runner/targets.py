"""What a command works on: a study, or runs that are named by id or folder."""

from pathlib import Path

from runner import OUTPUTS, ROOT, WORK, studies
from runner.files import digest, read_json
from runner.parameters import Params, run_id, study_folder_name
from runner.studies import Study


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
    """A study of finished or unfinished runs. Its arms have no names, so the noise names them.

    ValueError if a folder is not where the store would have it.
    """
    grid = [Params(**read_json(folder / "params.json")) for folder in folders]
    for params, folder in zip(grid, folders, strict=True):
        if params.folder.resolve() != folder.resolve():
            raise ValueError(f"{folder} holds the run {run_id(params)}, whose place is "
                             f"{params.folder}: move it there")
    title = f"Run {run_id(grid[0])}" if len(grid) == 1 else f"{len(grid)} runs"
    return Study(title=title, arms=[{}], seeds=[0], use_selected=False), grid
