"""Servers beside each other, and the rounds in which they take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from benchmarks.console import BenchError, say
from benchmarks.serving import servers
from benchmarks.serving.cells import FAST, PATHS, PEERS, REFERENCE, SLOW, Amount, Cell, Choice
from benchmarks.serving.client import Client
from benchmarks.serving.models import Model, demo_configs, planned, small_config
from benchmarks.serving.processes import all_cpu_s, busy_cores, require_memory
from benchmarks.serving.servers import Server
from quantserve_bench.request import Target

SETTLE_S: Final = 3.0
"""From the last request until idling is measured; vLLM's worker spins for one second after work."""
IDLE_S: Final = 5.0
AWAKE_S: Final = 0.4
"""Between two looks at what other processes use, and at least from thawing a server until it is asked."""
CALM_CORES: Final = 0.3
WARM_TOKENS: Final = 8

BUILDS: Final[Mapping[str, servers.Build]] = {
    "bare": servers.bare,
    "one": servers.quantserve,
    "several": servers.quantserve,
    "ray-default": servers.ray_default,
    "ray-direct": servers.ray_direct,
}


@dataclass(frozen=True)
class Beside:
    """A server that stands beside vLLM's own, and the cells on which they are compared.

    Attributes:
        server: a key of `BUILDS`.
        models: what it serves.
        paths: keys of `PATHS`: ways to ask it.
        cells: what is sent.
    """

    server: str
    models: Sequence[Model]
    paths: tuple[str, ...]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Group:
    """Models on vLLM's own server, and what is compared with it.

    Attributes:
        name: in results.
        models: one process group of vLLM's server each.
        beside: one server after the other.
    """

    name: str
    models: Sequence[Model]
    beside: Sequence[Beside]


@dataclass
class Found:
    """What was measured: plain data, for results.json.

    Attributes:
        runs: one entry per cell, path and round.
        starts: one entry per start of a server.
        refused: path -> why it was not measured.
        client_priority: whether the client ran before any server's process.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    client_priority: bool = False


def groups(choice: Choice) -> list[Group]:
    """Everything that was chosen, in the order in which it is measured."""
    out: list[Group] = []
    configs = demo_configs()
    if "demo" in choice.shapes:
        out.append(group_of_one(choice, "demo", planned(configs[:1])[0], FAST))
        demo = planned(configs)
        ids = [model.id for model in demo]
        cells = [*choice.short(ids[0], FAST), *choice.middle(ids[0], FAST)]
        cells += [cell for id in ids[1:] for cell in choice.middle(id, FAST) if cell in choice.short(id, FAST)]
        out.append(Group("three", demo, several(choice, demo, [*dict.fromkeys(cells), *choice.together(ids, FAST)])))
    if "small" in choice.shapes:
        small = small_config()
        out.append(group_of_one(choice, "small", planned([small])[0], SLOW))
        # Planned together: models side by side on a CPU are not bound to the same core, in vLLM's own servers neither.
        pair = planned([small, configs[0]])
        out.append(Group("pair", pair, several(choice, pair, choice.middle(pair[0].id, SLOW))))
    return [group for group in out if group.beside]


def group_of_one(choice: Choice, name: str, model: Model, amount: Amount) -> Group:
    """One model alone."""
    return Group(name, [model], alone(choice, model, amount))


def alone(choice: Choice, model: Model, amount: Amount) -> list[Beside]:
    """The servers of one model."""
    out = []
    if "one" in choice.paths:
        out.append(Beside("one", [model], ("one",), choice.matrix(model.id, amount)))
    for peer in PEERS:
        if peer in choice.paths:
            cells = choice.short(model.id, amount) if amount is FAST else choice.middle(model.id, amount)
            out.append(Beside(peer, [model], (peer,), cells))
    return out


def several(choice: Choice, models: Sequence[Model], cells: Sequence[Cell]) -> list[Beside]:
    """The server of several models."""
    paths = tuple(path for path in ("route", "shared") if path in choice.paths)
    return [Beside("several", models, paths, cells)] if paths else []


class Bench:
    """Measures groups.

    Args:
        choice: what of everything.
        save: called with all that was found after every round.
    """

    def __init__(self, choice: Choice, save: Callable[[Found], None]) -> None:
        self._choice = choice
        self._save = save
        self.found = Found()

    def run(self) -> Found:
        """Everything; what does not run is refused, and the rest goes on."""
        client = Client()
        self.found.client_priority = client.priority
        try:
            for group in groups(self._choice):
                try:
                    self._group(client, group)
                except BenchError as error:  # vLLM's own server did not start, or there is not enough memory
                    for beside in group.beside:
                        self._refuse(beside, group, error)
            self._starts()
        finally:
            client.close()
        return self.found

    def _group(self, client: Client, group: Group) -> None:
        require_memory(len(group.models) + max(len(beside.models) for beside in group.beside))
        with self._server(REFERENCE, group.models, group.name) as reference:
            for beside in group.beside:
                reference.freeze()
                try:
                    with self._server(beside.server, beside.models, group.name) as server:
                        server.freeze()
                        self._rounds(client, group, beside, reference, server)
                except BenchError as error:
                    self._refuse(beside, group, error)
                finally:
                    reference.thaw()

    def _refuse(self, beside: Beside, group: Group, error: BenchError) -> None:
        for path in beside.paths:
            self.found.refused[f"{path} ({group.name})"] = str(error)
        say(f"{', '.join(beside.paths)}: refused: {error}")
        self._save(self.found)

    @contextmanager
    def _server(self, name: str, models: Sequence[Model], group: str) -> Iterator[Server]:
        """A started server, with its times and what it uses when idle."""
        say(f"starting {name} with {', '.join(model.id for model in models)}")
        server = Server(name, BUILDS[name](models))
        try:
            await_calm(self._choice.patience_s)
            all_before, began = all_cpu_s(), time.monotonic()
            server.start()
            others = (all_cpu_s() - all_before - server.cpu_s()) / (time.monotonic() - began)
            server.started.other_cores = max(0.0, others)
            time.sleep(SETTLE_S)
            before, began = server.cpu_s(), time.monotonic()
            time.sleep(IDLE_S)
            server.started.idle_cores = (server.cpu_s() - before) / (time.monotonic() - began)
            server.started.memory_bytes = server.memory()
            took = max(server.started.first_token_s.values())
            say(f"  first token after {took:.1f} s; idle: {server.started.idle_cores:.3f} cores")
            self.found.starts.append({"server": name, "group": group, **vars(server.started)})
            yield server
        finally:
            server.stop()

    def _rounds(self, client: Client, group: Group, beside: Beside, reference: Server, server: Server) -> None:
        turns = [(REFERENCE, reference), *((path, server) for path in beside.paths)]
        for path, at in turns:
            for cell in warm_cells(beside.cells):
                self._turn(client, cell, path, at, f"warm {path}")
        for number in range(self._choice.rounds):
            began = time.monotonic()
            for cell in beside.cells:
                seed = f"{group.name} {beside.server} {number} {cell.name}"
                for path, at in turns if number % 2 == 0 else turns[::-1]:
                    run = self._turn(client, cell, path, at, seed)
                    about = {"group": group.name, "server": beside.server, "path": path, "round": number}
                    self.found.runs.append({**about, "cell": cell.name, **run})
            self._save(self.found)
            say(f"  {beside.server}, round {number + 1} of {self._choice.rounds}: {time.monotonic() - began:.0f} s")

    def _turn(self, client: Client, cell: Cell, path: str, server: Server, seed: str) -> dict[str, Any]:
        """One cell through one path, while no other server uses the processor."""
        targets = targets_of(path, server, cell)
        warm = replace(cell, output_tokens=WARM_TOKENS, requests=cell.users)
        server.thaw()
        try:
            await_calm(self._choice.patience_s)
            client.load(warm, targets, f"wake {seed}", f"wake {path}")
            client.prepare(cell, seed, path)
            all_before, before, began = all_cpu_s(), server.cpu_s(), time.monotonic()
            run = client.send(targets)
            everything, own = all_cpu_s() - all_before, server.cpu_s() - before
            others = (everything - own - run["cpu_s"]) / (time.monotonic() - began)
            return {**run, "server_cpu_s": own, "other_cores": max(0.0, others)}
        finally:
            server.freeze()

    def _starts(self) -> None:
        """Starts for their times alone: each model of the demo by itself, and all at once."""
        wanted: list[str] = [name for name in (REFERENCE, "one") if name in self._choice.paths]
        configs = demo_configs() if self._choice.starts else []
        for _ in range(self._choice.starts):
            for config in configs:
                for name in wanted:
                    self._start(name, planned([config]))
            for name in ("bare", "several") if "shared" in self._choice.paths else ():
                self._start(name, planned(configs))

    def _start(self, name: str, models: Sequence[Model]) -> None:
        try:
            with self._server(name, models, "starts"):
                pass
        except BenchError as error:
            say(f"{name}: {error}")
        self._save(self.found)


def await_calm(patience_s: float) -> None:
    """Wait until others leave the processor alone, but not for ever; what they use is in the results anyway."""
    deadline = time.monotonic() + patience_s
    while busy_cores(AWAKE_S) > CALM_CORES and time.monotonic() < deadline:
        time.sleep(AWAKE_S)


def warm_cells(cells: Sequence[Cell]) -> list[Cell]:
    """One small load for every kind of request in the cells."""
    kinds = {(cell.models, cell.api, cell.input_tokens): cell for cell in sorted(cells, key=lambda cell: cell.users)}
    return [replace(cell, requests=2 * cell.users) for cell in kinds.values()]


def targets_of(path: str, server: Server, cell: Cell) -> list[Target]:
    """Where a path leads, per model of a cell."""
    if path not in PATHS:
        raise BenchError(f"unknown path {path}")
    return [server.shared(model) if path == "shared" else server.route(model) for model in cell.models]
