"""docs/studies.md: every key of a study and of a profile, with examples that work."""

import re
import typing

import pytest
import yaml

from runner import ROOT, studies
from runner.parameters import ADDED_LATER, Params, resolve

PAGE = (ROOT / "docs/studies.md").read_text()
OF_A_STUDY, OF_AN_ARM, OF_A_RUN = (
    re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| `(.+)` \|$", part, re.M)
    for part in re.split(r"^## Keys of .*$", PAGE, flags=re.M)[1:])
NO_DEFAULT = {"must be there", "as `seed`", "the channel's own rate", "no phrase", "no rates"}
NEEDS = {"cue": {"reward": "cue"}}  # parameters that make sense beside another one only


def test_the_page_has_every_key_once():
    keys = [[row[0] for row in table] for table in (OF_A_STUDY, OF_AN_ARM, OF_A_RUN)]
    assert sorted(keys[0]) == sorted([*studies.StudyFile.model_fields, "profiles"])
    assert keys[1] == ["name", "reference"]
    assert len(set(keys[2])) == len(keys[2])
    # a channel of one's own (docs/recipe-channel.md) works without a line here
    assert {*keys[2], "profile"} | ADDED_LATER == Params.model_fields.keys()


@pytest.mark.parametrize("key, about, left_out, example", OF_A_RUN, ids=[row[0] for row in OF_A_RUN])
def test_a_parameter_of_a_run(key, about, left_out, example):
    given = yaml.safe_load(example)
    assert list(given) == [key]
    assert getattr(resolve("tiny", **given, **NEEDS.get(key, {})), key) == given[key]
    field = Params.model_fields[key]
    if left_out not in NO_DEFAULT:
        assert yaml.safe_load(left_out.strip("`")) == field.default
    for choice in typing.get_args(field.annotation):
        if isinstance(choice, str):
            assert re.search(rf"\b{choice}\b", about), f"{choice} is not named"


@pytest.mark.parametrize("key, example", [(row[0], row[3]) for row in OF_A_STUDY], ids=[row[0] for row in OF_A_STUDY])
def test_a_key_of_a_study(tmp_path, key, example):
    usual = {"title": "t", "arms": [{"name": "clean"}, {"name": "flip .3", "label_flip_rate": 0.3}], "seeds": [0]}
    given = yaml.safe_load(example)
    assert list(given) == [key]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(usual | given))
    study, grid = studies.load_study(str(tmp_path / "study.yaml"), "tiny")
    if key == "profiles":
        assert [params.seed for params in grid] == [0, 1, 0, 1]
    else:
        assert getattr(study, key) == given[key]
    left_out = {row[0]: row[2] for row in OF_A_STUDY}[key]
    field = studies.StudyFile.model_fields.get(key)
    if field and field.default is not None and not field.is_required() and key != "fixed":
        assert yaml.safe_load(left_out.strip("`")) == field.default


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S), ids=lambda text: text[:20])
def test_the_examples_are_accepted(tmp_path, block):
    values = yaml.safe_load(block)
    if "arms" not in values:
        assert resolve("tiny", **values).model == values["model"]
        return
    (tmp_path / "study.yaml").write_text(block)
    study, grid = studies.load_study(str(tmp_path / "study.yaml"), "tiny")
    assert len(grid) in (6, 12) and studies.compared_with_nothing(study, grid) == ""
