"""Engines: what a machine cannot do is said at once; one engine a GPU, a port a run; advice after an OOM."""

import os
import subprocess
import sys

import nbformat
import pytest
from trl import GRPOConfig
from trl.trainer.utils import ensure_master_addr_port

from runner import ROOT, engines, parameters, plan, policies, sweep, task

GOOD = "9.0, 80000, 81559"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the packages named and an nvidia-smi that prints `says` (None: there is none)."""
    def build(packages=("vllm", "unsloth"), says=GOOD):
        for name in packages:
            (tmp_path / "site" / name).mkdir(parents=True)
            (tmp_path / "site" / name / "__init__.py").touch()
        (tmp_path / "bin").mkdir()
        if says is not None:
            program = tmp_path / "bin/nvidia-smi"
            program.write_text(f"#!/bin/sh\necho '{says}'\n")
            program.chmod(0o755)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return build


@pytest.mark.skipif(engines.find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("packages, engine, missing", [((), "vllm", "vllm"), ((), "unsloth", "vllm"),
                                                       (("vllm",), "unsloth", "unsloth")])
def test_a_missing_package_is_named_with_the_way_to_get_it(machine, packages, engine, missing):
    machine(packages)
    with pytest.raises(ValueError, match=f"needs the package {missing}, .*make setup GPU=1.*engine='transformers'"):
        engines.check_engine(engine)


@pytest.mark.parametrize("says, words", [
    (None, "needs a CUDA GPU, and nvidia-smi shows none"), ("7.5, 15000, 15360", "lacks .*compute capability 7.5"),
    ("9.0, 20000, 81559", "only 19.5 GiB are free: stop what else runs there")])
def test_a_machine_that_cannot_is_told_why(machine, says, words):
    machine(says=says)
    with pytest.raises(ValueError, match=words):
        engines.check_engine("vllm")


def test_a_machine_that_can_is_left_alone(machine, monkeypatch):
    machine()
    engines.check_engine("vllm")
    machine_says = engines.gpu_query("compute_cap,memory.free,memory.total")
    assert machine_says == [["9.0", "80000", "81559"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engines.gpu_query("name") == []


def test_a_part_of_a_gpu_is_for_engines_that_share(machine, monkeypatch):
    machine()
    engines.check_engine("transformers", 0.25)
    engines.check_engine("server", 0.25)
    monkeypatch.setenv("GRPO_NOISE_GPU_SHARE", "0.25")
    for engine in ("vllm", "unsloth"):
        with pytest.raises(ValueError, match="needs a GPU to itself, not --gpus-per-run 0.25: give 1, or choose"):
            engines.check_engine(engine)


@pytest.mark.parametrize("rank, served", [(1, 8), (8, 8), (9, 16), (64, 64), (512, 512)])
def test_the_engine_serves_the_next_rank(rank, served):
    assert engines.served_rank(rank) == served


def test_a_rank_above_the_engines_limit_is_refused_before_anything_is_loaded():
    assert parameters.resolve("tiny", lora_rank=513).lora_rank == 513
    with pytest.raises(ValueError, match="lora_rank=513 is more than vLLM serves: choose at most 512"):
        parameters.resolve("tiny", lora_rank=513, engine="vllm")


@pytest.mark.parametrize("given, words", [
    ({"engine": "vllm", "top_p": 0.9}, "set top_p=1"),
    ({"engine": "unsloth", "loss_type": "bnpo"}, "choose another loss or another engine")])
def test_what_an_engine_would_compute_otherwise_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        parameters.resolve("smol", **given)


def test_the_options_are_ones_that_the_trainer_knows(machine):
    machine(says="81559")
    params, model = parameters.resolve("smol", engine="vllm"), policies.tiny_model(0)
    options = engines.grpo_options(params, model)
    assert options["generation_kwargs"]["stop_token_ids"] == model.generation_config.eos_token_id
    assert set(options) <= set(GRPOConfig.__dataclass_fields__)
    assert options["vllm_importance_sampling_mode"] == "token_truncate"  # no completion is dropped unseen
    assert options["vllm_max_model_length"] == params.max_prompt_length + params.max_completion_length
    assert engines.grpo_options(parameters.resolve("tiny"), model) == {}


def test_the_engine_gets_what_it_needs_and_never_more_than_its_part(machine, monkeypatch):
    machine(says="81559")
    params, model = parameters.resolve("qwen2.5-math-1.5b", engine="vllm"), policies.tiny_model(0)
    keys_and_values = 32 * 1536 * 2 * 2 * 4 * 24 * 2  # sequences, tokens, key and value, layers, heads, size, bytes
    needed = 2 * model.num_parameters() + keys_and_values + engines.WORKING_MEMORY
    assert engines.rollout_bytes(model, params) == needed
    given = engines.grpo_options(params, model)["vllm_gpu_memory_utilization"]
    assert given == pytest.approx(needed / (81559 * 2**20), abs=1e-4)
    machine_of_8_gib = 8192
    monkeypatch.setattr(engines, "gpu_query", lambda fields: [[str(machine_of_8_gib)]])
    assert engines.grpo_options(params, model)["vllm_gpu_memory_utilization"] == engines.ROLLOUT_MEMORY


def test_colocated_runs_that_start_together_take_different_ports(monkeypatch):
    """TRL keeps the port that it is given; left alone it tries four fixed ones first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ports = []
    for _ in range(2):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        engines.prepare_environment("vllm")
        ensure_master_addr_port()
        ports.append(int(os.environ["MASTER_PORT"]))
    assert len(set(ports)) == 2 and not set(ports) & {29500, 23456, 12355, 12345}


@pytest.mark.parametrize("part", [0, 0.25])
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_sweep_gives_an_engine_a_gpu_to_itself(machine, part, address):
    machine()
    grid = [parameters.resolve("smol", model="smol", data_dir="arithmetic", engine="vllm")]
    with pytest.raises(ValueError, match=f"needs a GPU to itself, not --gpus-per-run {part}: give 1"):
        plan.check_resources(grid, address, part)


@pytest.mark.parametrize("needs, words", [
    ({"CPU": 5}, "--cpus-per-run 5: the largest node that is there has 4"),
    ({"CPU": 1, "GPU": 1}, "--gpus-per-run 1: the largest node that is there has 0.5")])
def test_more_than_any_node_has_is_refused(needs, words):
    nodes = [{"CPU": 4, "GPU": 0.5}, {"CPU": 2}]
    sweep.refuse_too_large(nodes, {"CPU": 4, "GPU": 0.5})
    with pytest.raises(ValueError, match=words):
        sweep.refuse_too_large(nodes, needs)


@pytest.mark.slow
def test_more_than_there_is_is_refused_and_not_waited_for(workspace):
    study = workspace / "many.yaml"
    study.write_text("title: t\narms: [{}]\nseeds: [0]\nuse_selected: false\n")
    done = subprocess.run([sys.executable, "-m", "runner", str(study), "--runs-only", "--cpus-per-run", "1000"],
                          cwd=ROOT,
                          env=os.environ | {"GRPO_NOISE_WORK": str(workspace)}, capture_output=True, text=True,
                          timeout=1800)
    assert done.returncode == 2 and "--cpus-per-run 1000: the largest node that is there has" in done.stderr


@pytest.mark.parametrize("said", [
    "CUDA out of memory. Tried to allocate 20.00 GiB",
    "Free memory on device cuda:0 (4.34/79.18 GiB) on startup is less than desired GPU memory utilization"])
def test_a_run_out_of_memory_gets_advice_and_no_second_try(tmp_path, monkeypatch, said):
    (tmp_path / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell(f"raise RuntimeError({said!r})")
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "notebooks/02_train.ipynb")
    monkeypatch.setenv("GRPO_NOISE_GPU_SHARE", "1")  # what the run sets is taken back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(task, "ROOT", tmp_path)
    monkeypatch.setattr(parameters, "WORK", tmp_path)
    result = task.execute(parameters.resolve("tiny").model_dump(), 0.25)
    assert result["status"] == "failed" and not result["retry"]
    assert said in result["message"] and "--gpus-per-run" in result["message"]
