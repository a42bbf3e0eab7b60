"""Reading what a person wrote: YAML files, and mistakes in words."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError


def nearest(name: str, known: Iterable) -> str:
    """", did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return "".join(f", did you mean {name!r}?" for name in close)


def load_yaml(folder: Path, name: str, kind: str) -> tuple[dict[str, Any], Path]:
    """The values of <folder>/<name>.yaml, or of the file that `name` is the path of; and its path.

    kind: "study" or "profile". ValueError names the nearest name, or the line of a mistake.
    """
    path, own_name = folder / f"{name}.yaml", name
    if kind == "study" and name.endswith((".yaml", ".yml")):
        path, own_name = Path(name), Path(name).stem
    if not re.fullmatch(r"\w[\w.+-]*", own_name):  # it becomes a part of a folder's name
        raise ValueError(f"{kind} {own_name!r}: a name has letters, digits and . _ + - only")
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(f"there is no {kind} {own_name!r}{nearest(own_name, known)}; "
                         f"known: {', '.join(known)}")
    return read_mapping(path, kind), path


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The mapping of names to values in a YAML file. ValueError names the line of a mistake."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=NoRepeatedKeys)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1
        raise ValueError(f"{path.name}:{line}: not valid YAML: {e.problem}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as e:
        raise ValueError(f"{path.name}: no text in UTF-8: {e.reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: a {kind} is a mapping of names to values")
    return values


class NoRepeatedKeys(yaml.SafeLoader):
    """YAML, but of two equal keys it does not keep the last in silence."""

    def construct_mapping(self, node, deep=False):
        """The mapping of a node. An error if a key occurs twice."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice: keep one of them", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def validate(model: type[BaseModel], values: dict, where: str) -> BaseModel:
    """Validate, and turn pydantic's report into one sentence a mistake."""
    try:
        return model.model_validate(values)
    except ValidationError as e:
        mistakes = mistakes_in_words(model, e)
    raise ValueError(f"{where}: {'; '.join(mistakes)}")


def mistakes_in_words(model: type[BaseModel], report: ValidationError) -> list[str]:
    """One sentence for each mistake that pydantic found."""
    return [_in_words(error, model) for error in report.errors()]


def _in_words(error: dict[str, Any], model: type[BaseModel]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name!r} is not a parameter{nearest(name, model.model_fields)}"
    if error["type"] == "value_error":  # a sentence of our own
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name} is missing"
    choices = re.findall("'([^']+)'", str(error.get("ctx", {}).get("expected", "")))
    return f"{name}={error['input']!r}: {error['msg'].lower()}{nearest(error['input'], choices)}"
