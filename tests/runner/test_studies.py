"""Studies: grids in YAML, refused with all their mistakes at once."""

import pytest

from runner import parameters, studies


def load(folder, text, profile="tiny"):
    """The study that a file with this text (or these bytes) says."""
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "bad.yaml").write_bytes(data)
    return studies.load_study(str(folder / "bad.yaml"), profile)


def refusal(folder, text):
    """The message with which such a file is refused."""
    with pytest.raises(ValueError) as error:
        load(folder, text)
    return str(error.value)


@pytest.mark.parametrize("text, words", [
    ("title: t\narms: [{}]\nseeds: [0]\nsedes: [1]\n", ["bad.yaml: 'sedes' is not a parameter", "'seeds'"]),
    ("title: t\narms: [{lable_flip_rate: 0.1}]\nseeds: [0]\n", ["bad.yaml, arm 1", "'label_flip_rate'"]),
    ("title: t\narms: [{}, {mask_rate: [0.1, 2]}]\nseeds: [0]\n", ["bad.yaml, arm 2", "mask_rate=2"]),
    ("title: t\narms: [{}]\nseeds: []\n", ["bad.yaml: seeds=[]"]),
    ("title: t\narms: []\nseeds: [0]\n", ["bad.yaml: arms=[]"]),
    ("arms: [{}]\nseeds: [0]\n", ["bad.yaml: title is missing"]),
    ("title: t\narms: [{mask_rate: []}]\nseeds: [0]\n", ["bad.yaml, arm 1", "mask_rate is an empty list"]),
    ("title: t\narms: [{}]\nseeds: [-3]\n", ["bad.yaml: seeds.0=-3", "greater than or equal to 0"]),
    ("title: t\narms: [{}]\nseeds: [true]\n", ["bad.yaml: seeds.0=True", "valid integer"]),
    ("title: t\narms: [{}]\nseeds: [0, 0]\n", ["the run clean-s0-", "occurs 2 times", "keep one"]),
    ("title: t\narms: [{mask_rate: 0.0}, {mask_rate: -0.0}]\nseeds: [0]\n", ["the run clean-s0-", "occurs 2 times"]),
    ("title: t\narms: [{}\nseeds: [0]\n", ["bad.yaml:", "not valid YAML"]),
    ("title: t\narms: [{}]\nseeds: [0]\nprofiles: {smoll: {seeds: [1]}}\n", ["no profile 'smoll'", "'smol'"]),
    ("title: t\narms: [{}]\nseeds: [0]\nprofiles: [smol]\n", ["profiles maps a profile's name to what differs"]),
    ("title: t\narms: [{}]\nseeds: [0]\nnames: {a: [b, c]}\n", ["'names' is not a parameter"]),
    ("title: t\narms: [{reference: x}]\nseeds: [0]\n", ["arm 1: reference is for arms that have a name"]),
    ("title: t\narms: [{name: 'a {'}]\nseeds: [0]\n", ["arm 1: ", "Single '{'"]),
    ("title: t\narms: [{name: 'a {sed}'}]\nseeds: [0]\n", ["'sed' is not a parameter, did you mean 'seed'"]),
    ("title: t\nreference: 'a {sed}'\narms: [{name: a}]\nseeds: [0]\n", ["'sed' is not a parameter"]),
    ("title: t\narms: [{1: 2}]\nseeds: [0]\n", ["bad.yaml: arms.0.1"]),
    ("- 1\n", ["bad.yaml: ", "mapping"]),
])
def test_a_study_with_a_mistake_is_refused(tmp_path, text, words):
    message = refusal(tmp_path, text)
    for word in words:
        assert word in message
    assert len(message.splitlines()) == 1


def test_all_mistakes_are_listed_at_once(tmp_path):
    message = refusal(tmp_path, "title: t\nsedes: [1]\nseeds: [0, 1]\nprofiles: {tinny: {}}\n"
                                "arms: [{}, {mask_rate: [2, 3]}, {sed: 1}, {mask_rate: 0.0}, {optim: []}]\n")
    found = [line.removeprefix("bad.yaml") for line in message.splitlines()]
    assert [line[:19 if "occurs 2 times" in line else 40] for line in found] == [
        ": there is no profile 'tinny', did you mean 'tiny'?"[:40],
        ": 'sedes' is not a parameter, did you mean 'seeds'?"[:40],
        ", arm 2: mask_rate=2: input should be less than"[:40],
        ", arm 2: mask_rate=3: input should be less than"[:40],
        ", arm 3: 'sed' is not a parameter, did you mean 'seed'?"[:40],
        ", arm 5: optim is an empty list, so the arm has no run"[:40],
        ": the run clean-s0-",
        ": the run clean-s1-",
    ]


def test_a_missing_reference_and_an_unknown_profile_are_listed_with_the_rest(tmp_path):
    text = "title: t\nsedes: [1]\narms: [{name: a, mask_rate: 0.1}, {sed: 1}]\nseeds: [0]\n"
    first, second, third = refusal(tmp_path, text).splitlines()
    assert "'sedes'" in first and "'sed'" in second and "'a' compared with 'clean', and no arm" in third
    # the arm that is missing may be the one with a mistake
    assert "no arm" not in refusal(tmp_path, text.replace("{sed: 1}", "{name: clean, sed: 1}"))
    with pytest.raises(ValueError) as error:
        load(tmp_path, text, "smoll")
    first, second = str(error.value).splitlines()
    assert "'sedes'" in first and "no profile 'smoll', did you mean 'smol'?; known: " in second


@pytest.mark.parametrize("arms, which", [
    ("{label_flip_rate: [0.4, 0.5]}", "flip 0.4 and 1 more"),
    ("{}, {mask_rate: 0.5, temperature: 0.9}", "mask 0.5"),
    ("{reward: format}", "format only"),
    ("{}, {label_flip_rate: 0.5}, {reward: format}", ""),
    ("{learning_rate: [1.0e-3, 2.0e-3]}", ""),
    ("{name: clean}, {name: a, mask_rate: 0.1}", ""),
])
def test_arms_that_nothing_is_compared_with_are_named(tmp_path, arms, which):
    remark = studies.compared_with_nothing(*load(tmp_path, f"title: t\narms: [{arms}]\nseeds: [0, 1]\n"))
    assert remark.startswith(f"No arm without noise has the other parameters of {which}, so nothing") if which \
        else remark == ""


# --- YAML


@pytest.mark.parametrize("text, words", [
    ("title: t\ntitle: u\narms: [{}]\nseeds: [0]\n", "bad.yaml:2: not valid YAML: 'title' is given twice"),
    ("title: t\narms:\n  - mask_rate: 0.1\n    mask_rate: 0.2\nseeds: [0]\n",
     "bad.yaml:4: not valid YAML: 'mask_rate' is given twice: keep one"),
    ("title: t\x01\narms: [{}]\nseeds: [0]\n", "bad.yaml: no text in UTF-8: special characters are not allowed"),
    ("title: Größe\narms: [{}]\nseeds: [0]\n".encode("latin-1"), "bad.yaml: no text in UTF-8: invalid"),
    ("title: t\narms: [{}]\nseeds: [0]\n".encode("utf-16"), "bad.yaml: no text in UTF-8: invalid"),
])
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path, text, words):
    assert refusal(tmp_path, text).startswith(words)


@pytest.mark.parametrize("text, value", [
    ("0.001", 0.001), ("1.0e-3", 0.001), ("1e-3", 0.001), (".5", 0.5), ("1.", 1.0), ("2", 2.0), ("+0.1", 0.1)])
def test_plain_numbers_are_what_they_look_like(tmp_path, text, value):
    _, [run] = load(tmp_path, f"title: t\narms: [{{learning_rate: {text}}}]\nseeds: [0]\n")
    assert run.learning_rate == value


def test_what_is_in_quotes_is_text(tmp_path):
    study, _ = load(tmp_path, "\ufefftitle: 'yes'\narms: [{name: '010'}]\nreference: '010'\nseeds: [0]\n")
    assert study.title == "yes" and list(study.names.values()) == [("010", "010")]


# --- arms


def test_an_arm_without_the_one_that_it_is_compared_with_is_refused(tmp_path):
    """Also if there is a clean arm without a name: references are names."""
    message = refusal(tmp_path, "title: t\narms: [{name: a, mask_rate: 0.1}]\nseeds: [0]\n")
    assert message.startswith("bad.yaml: 'a' compared with 'clean', and no arm has that name")
    assert "give an arm this name (`name: clean`), or set `reference`" in message
    message = refusal(tmp_path, "title: t\narms: [{name: a, mask_rate: 0.1}, {name: b, mask_rate: 0.2}]\nseeds: [0]\n")
    assert message.startswith("bad.yaml: 'a', 'b' compared with 'clean'")
    message = refusal(tmp_path, "title: t\nreference: clen\narms: [{name: clean}, {name: a, mask_rate: 0.1}]\n"
                                "seeds: [0]\n")
    assert "compared with 'clen', and no arm has that name, did you mean 'clean'?" in message


def test_a_study_without_names_needs_no_clean_arm(tmp_path):
    study, grid = load(tmp_path, "title: t\narms: [{mask_rate: [0.1, 0.2]}]\nseeds: [0, 1]\n")
    assert len(grid) == 4 and study.arm_and_reference(grid[0]) == ("mask 0.1", "clean")


def test_names_stand_for_values(tmp_path):
    study, grid = load(tmp_path, "title: t\nreference: G={num_generations}\nseeds: [0]\n"
                                 "arms: [{num_generations: [4, 8], name: 'G={num_generations}'}]\n")
    assert [study.arm_and_reference(run) for run in grid] == [("G=4", "G=4"), ("G=8", "G=8")]


def test_seeds_and_base_policies_are_crossed_or_go_in_turn(tmp_path):
    text = "title: t\narms: [{}]\nseeds: [0, 1, 2]\nbase_seeds: [0, 1]\n"
    crossed = {(run.seed, run.base_seed) for run in load(tmp_path, text)[1]}
    assert crossed == {(seed, base) for seed in (0, 1, 2) for base in (0, 1)}
    in_turn = [(run.seed, run.base_seed) for run in load(tmp_path, text + "cross_base_seeds: false\n")[1]]
    assert in_turn == [(0, 0), (1, 1), (2, 0)]


# --- the files that come with the project


@pytest.mark.parametrize("name", sorted(p.stem for p in studies.STUDIES.glob("*.yaml")))
def test_the_studies_are_valid_and_no_run_occurs_twice(name):
    study, grid = studies.load_study(name, "tiny")
    assert len({parameters.run_id(p) for p in grid}) == len(grid) >= len(study.seeds)


def test_a_study_may_differ_for_a_profile(tmp_path):
    text = "title: t\narms: [{}]\nseeds: [0]\nprofiles: {smol: {seeds: [4, 5]}}\n"
    assert [p.seed for p in load(tmp_path, text)[1]] == [0]
    assert [p.seed for p in load(tmp_path, text, "smol")[1]] == [4, 5]


def test_unknown_study_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'flip'"):
        studies.load_study("flp", "tiny")
