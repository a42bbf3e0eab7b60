"""Reading what a person wrote: YAML files, and mistakes in words.

YAML 1.1 reads `yes` as true, `010` as eight and `1:30` as ninety, and of two equal keys it keeps
the last. Here such values are refused, with the line and the remedy.
"""

import difflib
import re
import string
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

# What an unquoted value of each type must look like to be taken as that. All else is doubtful.
PLAIN = {
    "tag:yaml.org,2002:bool": r"(?i:true|false)",  # not yes, no, on, off
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)",  # not 010, 0x1F, 1_000, 1:30
    "tag:yaml.org,2002:float": r"[-+]?\d*\.\d*([eE][-+]?\d+)?",  # not 1:30.5, 1_0.5, .inf, .nan
    "tag:yaml.org,2002:timestamp": r"(?!)",  # no date: nothing here takes one
}


def nearest(name: str, known: Iterable) -> str:
    """", did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return "".join(f", did you mean {name!r}?" for name in close)


def load_yaml(folder: Path, name: str, kind: str,
              mistakes: list[str] | None = None) -> tuple[dict[str, Any], Path]:
    """The values of <folder>/<name>.yaml, or of the file that `name` is the path of; and its path.

    kind: "study" or "profile". mistakes: see `read_mapping`. ValueError names the nearest name, or
    each mistake with its line.
    """
    if not isinstance(name, str):
        raise ValueError(f"{kind}={name!r} is not a name: give one {kind}, such as {kind}='tiny'")
    path, own_name = folder / f"{name}.yaml", name
    if kind == "study" and name.endswith((".yaml", ".yml")):
        path, own_name = Path(name), Path(name).stem
    if not re.fullmatch(r"\w[\w.+-]*", own_name):  # it becomes a part of a folder's name
        raise ValueError(f"{kind} {own_name!r}: a name has letters, digits and . _ + - only")
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(f"there is no {kind} {own_name!r}{nearest(own_name, known)}; "
                         f"known: {', '.join(known)}")
    return read_mapping(path, kind, mistakes), path


def read_mapping(path: Path, kind: str, mistakes: list[str] | None = None) -> dict[str, Any]:
    """The mapping of names to values in a YAML file. ValueError lists mistakes with their lines.

    mistakes: a list that takes doubtful values and repeated keys instead. Then the values are as
    YAML reads them, so that the caller can look for other mistakes as well.
    """
    text = _text_of(path)
    try:
        values, found = _values_in(text, path.name)
    except RecursionError:
        raise ValueError(f"{path.name}: brackets are nested too deeply for a {kind}") from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise ValueError(f"{path.name}:{line}: not valid YAML: {e.reason}") from None
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1
        raise ValueError(f"{path.name}:{line}: not valid YAML: {e.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}:1: a {kind} is a mapping of names to values")
    if mistakes is not None:
        mistakes += found
    elif found:
        raise ValueError("\n".join(found))
    return values


def _values_in(text: str, file: str) -> tuple[Any, list[str]]:
    """What a YAML text says, {} if it is empty; and what `_mistakes` finds in it, with lines."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return {}, []
    mistakes = [f"{file}:{line}: {what}" for line, what in sorted(_mistakes(root))]
    return yaml.safe_load(text), mistakes


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[:e.start].count(b"\n") + 1
        raise ValueError(f"{path.name}:{line}: not UTF-8: save the file as UTF-8") from None


def _mistakes(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """(line, what is wrong and what to do) for each doubtful value and each repeated key."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias (*name) leads to a node a second time
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield from _doubtful(node)
        elif isinstance(node, yaml.MappingNode):
            yield from _repeated(node)
            waiting += [part for pair in node.value for part in pair]
        else:
            waiting += node.value


def _doubtful(node: yaml.ScalarNode) -> Iterator[tuple[int, str]]:
    if node.tag in PLAIN and not re.fullmatch(PLAIN[node.tag], node.value):
        read_as = yaml.safe_load(node.value)
        yield (node.start_mark.line + 1,
               f"YAML reads {node.value} as {read_as}: write a plain decimal number, true or "
               "false, or put it in quotes")


def _repeated(node: yaml.MappingNode) -> Iterator[tuple[int, str]]:
    first_line: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first_line:
            yield line, (f"{name!r} is given twice, first in line {first_line[name]}: "
                         "keep one of them")
        first_line.setdefault(name, line)


# --- models --------------------------------------------------------------------------------------


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


def wrong_template(key: str, template: Any, known: Collection[str]) -> Iterator[str]:
    """What is wrong with a text in which {parameter} stands for a value."""
    if not isinstance(template, str):
        yield f"{key}={template!r} is no text: put it in quotes"
        return
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        yield f"{key}={template!r}: {str(e).lower()}"
        return
    for _, field, _, _ in parts:
        if field is not None and field not in known:
            yield (f"name and reference may use parameters in braces, and {field!r} is none"
                   f"{nearest(field, known)}")


def as_list(value: Any) -> list:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]
