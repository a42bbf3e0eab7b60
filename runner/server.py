"""vLLM servers with runtime LoRA: one on each GPU serves all runs of a study that train there.

A server listens on 127.0.0.1 at a free port, and asks for a key of its own. One that dies is
started again. `runner.rollouts` is the side of the runs.
"""

import ctypes
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from runner import engines, model_files
from runner.parameters import Params

if TYPE_CHECKING:  # it imports torch, which takes seconds and which a server does not need
    from runner.rollouts import Client

START_LIMIT = 900  # seconds until a server must answer for the first time
# Batch sizes with a CUDA graph, and the largest batch: a hundred sizes take longer to start, and a
# batch larger than all of them is computed without a graph.
GRAPH_SIZES = (1, 8, 32, 64, 128, 256, 384, 512, 640, 768, 896)
# Tokens of a step in which some requests decode and others bring their prompts. Without graphs for
# such steps, starting their kernels took 28 to 44 % of a server's time in a study of eight runs.
MIXED_SIZES = (1024, 2048)
# A server schedules its requests in one thread, which is busy before the GPU is. More runs on a GPU
# than this have several servers.
RUNS_A_SERVER = 4
KEYS_AND_VALUES = 0.5  # of a server's memory, if it shares the GPU; the rest is weights and work


@dataclass(frozen=True)
class Serving:
    """What a server must be able to do: its model, and the largest run that it serves."""

    source: str  # folder or hub id of the base policy
    length: int  # tokens of the longest prompt and completion
    rank: int  # of the largest adapter
    adapters: int  # that are used at the same time
    completions: int  # that are written at the same time
    on_a_gpu: int = 1  # such servers that share a GPU

    @classmethod
    def of(cls, grid: list[Params], at_once: int, completions: int | None = None) -> "Serving":
        """What the runs of a grid need, `at_once` of which train beside a GPU at the same time.

        completions: written at the same time; by default one batch of each of those runs.
        ValueError if the runs have more than one base policy: a server has one.
        """
        sources = sorted({model_files.policy_source(params) for params in grid})
        if len(sources) > 1:
            raise ValueError(f"a rollout server has one base policy, and these runs have "
                             f"{len(sources)} ({', '.join(sources)}): make a study of each")
        batch = max(p.prompts_per_step * p.num_generations for p in grid)
        servers = math.ceil(at_once / RUNS_A_SERVER)
        adapters = math.ceil(at_once / servers)
        return cls(source=sources[0], adapters=adapters, on_a_gpu=servers,
                   completions=completions or min(1024, adapters * batch),
                   length=max(p.max_prompt_length + p.max_completion_length for p in grid),
                   rank=max(engines.served_rank(p.lora_rank) for p in grid))


class Server:
    """A vLLM server on this machine. It is started again when it dies, until `stop` is called."""

    def __init__(self, serving: Serving, log: Path, memory: float = engines.ALONE_MEMORY,
                 gpu: str | None = None):
        """Start it; `wait` returns when it answers.

        memory: the part of the GPU's memory for all servers there. gpu: as in
        CUDA_VISIBLE_DEVICES; None is "as here".
        """
        self.port, self.key = engines.free_port(), secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{self.port}"
        self.gpu, self.log, self.restarts = gpu, log, 0
        self.command = [sys.executable, "-m", engines.server_module(),
                        *self._options(serving, memory / serving.on_a_gpu)]
        self.environment = os.environ | {
            "VLLM_API_KEY": self.key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1"}
        self.environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self.environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # of a colocated engine
        if gpu is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.http = httpx.Client(base_url=self.url, timeout=5)
        self._stopping, self._one_at_a_time = threading.Event(), threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    def _options(self, serving: Serving, memory: float) -> list[str]:
        options = [
            "--model", serving.source, "--served-model-name", engines.BASE,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--enable-lora", "--max-loras", str(serving.adapters),
            "--max-cpu-loras", str(2 * serving.adapters + 2), "--max-lora-rank", str(serving.rank),
            "--max-model-len", str(serving.length), "--max-num-seqs", str(serving.completions),
            "--gpu-memory-utilization", f"{memory:.3f}",
            "--tokens-only",  # token ids in and out: nothing is spent on text
            "--generation-config", "vllm",  # not the model's own temperature and penalties
            "--logprobs-mode", "processed_logprobs",  # at the run's temperature, as the trainer's
            "--disable-uvicorn-access-log", "--disable-log-stats"]
        if engines.vllm_on_cpu():  # fp32 as everywhere on a CPU; nothing is compiled
            return [*options, "--dtype", "float32", "--enforce-eager"]
        found = engines.gpu_query("memory.total")
        if serving.on_a_gpu > 1 and found:
            # vLLM would take what it sees free, and count what servers beside it take meanwhile.
            room = KEYS_AND_VALUES * memory * int(found[0][0]) * 2**20
            options += ["--kv-cache-memory-bytes", str(int(room))]
        decoding = [size for size in GRAPH_SIZES if size < serving.completions]
        mixed = [size for size in MIXED_SIZES if size > serving.completions]
        sizes = [*decoding, serving.completions, *mixed]
        return [*options, "--dtype", "bfloat16",
                "--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes})]

    def _start(self):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log,
                                            stderr=log, start_new_session=True,
                                            preexec_fn=_end_with_parent)

    def wait(self) -> "Server":
        """Wait until it answers. RuntimeError with the end of its log if it does not start."""
        deadline = time.monotonic() + START_LIMIT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the rollout server did not start. The end of {self.log}:\n"
                                   + self.log.read_text()[-2000:])
            time.sleep(0.5)
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return self

    def answers(self) -> bool:
        """Whether the server says that it is well."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _keep_alive(self):
        while not self._stopping.wait(1):
            with self._one_at_a_time:
                if self.process.poll() is not None and not self._stopping.is_set():
                    self._kill_group()  # its engine may be alive, and hold the GPU's memory
                    self.restarts += 1
                    self._start()

    def stop(self):
        """End the server and everything that it started."""
        with self._one_at_a_time:
            self._stopping.set()
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(20)
            self._kill_group()
            self.process.wait()

    def _kill_group(self):
        """Kill what is left of the processes that the server started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _end_with_parent():
    """In the child: have the system end it with the process that started it, however that ends."""
    set_death_signal = 1  # PR_SET_PDEATHSIG in Linux' prctl.h
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


@contextmanager
def clients(grid: list[Params], log: Path, memory: float = engines.ALONE_MEMORY,
            completions: int | None = None, on_a_gpu: int = 1) -> Iterator[list["Client"]]:
    """Clients of the server that the environment names, else of servers for the time of the block.

    Then there are `on_a_gpu` on each GPU that this process may use, which share `memory` of it, or
    one in all with vLLM for CPUs. completions: that each writes at the same time.
    """
    from runner import rollouts

    given = rollouts.from_environment()
    if given:
        yield given
        return
    gpus = [index for [index] in engines.gpu_query("index")]
    serving = Serving.of(grid, 1, completions)
    if gpus:
        serving = replace(serving, on_a_gpu=on_a_gpu)
    servers = [Server(serving, log.with_suffix(f".{gpu or 0}-{number}.log"), memory, gpu)
               for gpu in gpus or [None] for number in range(serving.on_a_gpu)]
    try:
        yield [rollouts.Client(server.wait().url, server.key) for server in servers]
    finally:
        for server in servers:
            server.stop()


@contextmanager
def client_for(params: Params, engine: str) -> Iterator["Client | None"]:
    """A client for one run; None if its engine is no server."""
    if engine != "server":
        yield None
        return
    with clients([params], log_folder(params) / params.folder.name, engines.SERVER_MEMORY) as found:
        yield found[0]


def log_folder(params: Params) -> Path:
    """Where the logs of servers are."""
    return params.folder.parent / ".servers"


# --- the servers of a sweep -----------------------------------------------------------------------


class NodeServers:
    """The servers of one node of a cluster, as an actor of Ray. A sweep has one on each node."""

    def __init__(self, serving: Serving, memory: float, logs: Path, gpus: list[str] | None):
        """Start a server on each of `gpus`; None is all that the node has."""
        if gpus is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides what nobody asked for
            gpus = [index for [index] in engines.gpu_query("index")]
        node = os.uname().nodename
        self.servers = [Server(serving, logs / f"{node}-{gpu or 0}-{number}.log", memory, gpu)
                        for gpu in gpus or [None] for number in range(serving.on_a_gpu)]

    def addresses(self) -> list[dict[str, str | None]]:
        """url, key and gpu of each server, when all of them answer."""
        return [{"url": server.wait().url, "key": server.key, "gpu": server.gpu}
                for server in self.servers]

    def stop(self):
        """End them all."""
        for server in self.servers:
            server.stop()


class SweepServers:
    """The rollout servers of a sweep: url, key and gpu of each, by the id of their node."""

    def __init__(self, ray, grid: list[Params], needs: dict[str, float], at_once: int,
                 memory: float, gpus: list[str] | None):
        """See NodeServers. needs: resources of a run; at_once: runs beside a GPU's servers."""
        self.ray, self.needs = ray, needs
        self.arguments = Serving.of(grid, at_once), memory, log_folder(grid[0]), gpus
        self.actors: dict = {}
        self.addresses: dict[str, list[dict]] = {}

    def start_on_new_nodes(self):
        """Start servers on nodes that can train and have none, and wait for them."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.ray.remote(num_cpus=0)(NodeServers)
        for node in self.ray.nodes():
            name = node["NodeID"]
            if node["Alive"] and self._can_train(node) and name not in self.actors:
                here = NodeAffinitySchedulingStrategy(name, soft=False)
                self.actors[name] = actor.options(scheduling_strategy=here).remote(*self.arguments)
        for name in self.actors.keys() - self.addresses.keys():
            self._wait_for(name)

    def _can_train(self, node: dict) -> bool:
        return all(node["Resources"].get(what, 0) >= each for what, each in self.needs.items())

    def _wait_for(self, name: str):
        """Learn the addresses of a node's servers. A node that is lost meanwhile is forgotten."""
        try:
            self.addresses[name] = self.ray.get(self.actors[name].addresses.remote())
        except self.ray.exceptions.RayActorError:
            del self.actors[name]
        except self.ray.exceptions.RayTaskError as e:
            raise RuntimeError(str(e.cause)) from None

    def stop(self):
        """End the servers on all nodes."""
        for actor in self.actors.values():
            try:
                self.ray.get(actor.stop.remote(), timeout=60)
            except Exception:  # the node or its actor is gone, and the server with it
                continue
