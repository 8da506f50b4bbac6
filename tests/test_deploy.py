"""The files in deploy/ fit the code: paths, ports, names, versions. Nothing here builds an image or asks a cluster."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from quantserve import __version__
from quantserve.cli.serve_command import command
from quantserve.config import AppConfig, HttpConfig, load_object
from quantserve.serve.gateway.middleware.api_keys import OPEN_PATHS
from quantserve.target import find_target

ROOT = Path(__file__).parents[1]
RAYSERVICE = ROOT / "deploy/kuberay/rayservice.yaml"
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
PORT = HttpConfig().port
CONFIG_MAP, SERVICE = yaml.safe_load_all(RAYSERVICE.read_text("utf-8"))
SERVE: dict[str, Any] = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CLUSTER = SERVICE["spec"]["rayClusterConfig"]


def pods() -> Iterator[dict[str, Any]]:
    yield CLUSTER["headGroupSpec"]["template"]["spec"]
    for group in CLUSTER["workerGroupSpecs"]:
        yield group["template"]["spec"]


def containers() -> Iterator[dict[str, Any]]:
    for pod in pods():
        yield from pod["containers"]


@pytest.fixture
def mounted(tmp_path: Path) -> AppConfig:
    """The application's arguments, with the volumes as Kubernetes mounts them: links to a hidden folder."""
    hidden = tmp_path / "models" / "..2026_01_01"
    hidden.mkdir(parents=True)
    (hidden.parent / "..data").symlink_to(hidden.name)
    for name, text in CONFIG_MAP["data"].items():
        (hidden / name).write_text(text)
        (hidden.parent / name).symlink_to(Path("..data", name))
    args = dict(SERVE["applications"][0]["args"])
    args.pop("target")
    text = json.dumps(args).replace("/etc/quantserve/", f"{tmp_path}/")
    assert "/etc/" not in text
    return load_object(json.loads(text), "rayservice.yaml")


def test_the_application_loads(mounted: AppConfig) -> None:
    (application,) = SERVE["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert find_target(application["args"]["target"]).name == "a10g"
    assert [model.model_id for model in mounted.models] == ["TheBloke/Llama-2-7B-chat-AWQ"]
    assert mounted.notes == []
    assert mounted.http.api_keys_file
    assert Path(mounted.http.api_keys_file).name == "keys.txt"


def test_the_serve_config_is_one_of_ray() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(SERVE)
    assert [application.name for application in config.applications] == ["quantserve"]


def test_every_pod_has_the_models_and_the_keys() -> None:
    args = SERVE["applications"][0]["args"]
    needed = [*args["models"], str(Path(args["http"]["api_keys_file"]).parent)]
    said = RAYSERVICE.read_text("utf-8")
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert set(needed) <= set(mounts)  # the application is built on any node, and runs on another
            assert {mount["name"] for mount in mounts.values()} == set(volumes)
            assert all(mounts[path]["readOnly"] for path in needed)
            assert mounts["/dev/shm"]
        assert volumes["models"]["configMap"]["name"] == CONFIG_MAP["metadata"]["name"]
        secret = volumes["keys"]["secret"]["secretName"]
        assert re.search(rf"create secret generic {secret} --from-file=keys\.txt", said)
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_ports_and_versions() -> None:
    ray = re.search(r"^ray==(\S+)$", (ROOT / "constraints/cuda.txt").read_text(), re.MULTILINE)
    assert ray
    assert ray[1] == CLUSTER["rayVersion"]
    assert SERVE["http_options"] == {"host": "0.0.0.0", "port": PORT}
    for container in containers():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == PORT
        assert container["image"].endswith(f":{__version__}-cuda")
        assert "readinessProbe" not in container  # KubeRay's own asks Serve's proxy; another would replace it


def test_the_workers_can_hold_and_finish_what_the_models_ask(mounted: AppConfig) -> None:
    (group,) = CLUSTER["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    for model in mounted.models:
        deployment, scaling = model.deployment_config, model.scaling_config
        assert deployment.autoscaling_config
        assert deployment.autoscaling_config.max_replicas * scaling.num_workers <= group["maxReplicas"] * gpus
        drain = deployment.graceful_shutdown_timeout_s or 20
        assert drain < group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert drain < SERVICE["spec"]["rayClusterDeletionDelaySeconds"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(isinstance(value, str) for value in CLUSTER["headGroupSpec"]["rayStartParams"].values())


def instructions() -> list[tuple[str, str]]:
    """Name and rest of every instruction of the Dockerfile, comments and line ends removed."""
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in pairs]


def one(name: str) -> str:
    (found,) = [rest for instruction, rest in instructions() if instruction == name]
    return found


def sources() -> list[str]:
    """What is copied into the image, relative to the root of the repository."""
    return [source for name, rest in instructions() if name == "COPY" for source in shlex.split(rest)[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last pattern that fits decides."""
    result = False
    for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text("utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatchcase(head, pattern) for head in heads)
        if fits:
            result = not line.startswith("!")
    return result


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts/setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_what_is_copied_exists_and_is_all_that_the_build_reads(setup_script: ModuleType) -> None:
    for source in sources():
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for device in ("cpu", "cuda"):
        steps = setup_script.Setup(ROOT, device, dev=False).steps()
        read = {path for step in steps for path in step.inputs}
        code = [
            *(ROOT / "core").rglob("*.py"),
            *(ROOT / "plugins").rglob("src/**/*.py"),
            *ROOT.glob("kernels/src/*/*.py"),
        ]
        for path in [
            *read,
            *code,
            *(project.with_name("README.md") for project in (ROOT / "plugins").glob("*/p*.toml")),
        ]:
            name = path.relative_to(ROOT).as_posix()
            assert any(name == source or name.startswith(f"{source}/") for source in sources()), name
            assert not ignored(name), name
    assert all(ignored(name) for name in (".git/config", ".venv/bin/python", "kernels/build/objects/x.o", "keys.txt"))


def test_the_build_argument_is_a_device(setup_script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    name, _, default = one("ARG").partition("=")
    run = " ".join(rest for instruction, rest in instructions() if instruction == "RUN")
    assert f'scripts/setup.py --device "${{{name}}}"' in run
    for device in (default, "cuda"):
        with pytest.raises(SystemExit):  # --help ends it: the options before it were taken
            setup_script.main(["--device", device, "--help"])
        assert (ROOT / "constraints" / f"{device}.txt").is_file()
    assert "--device" in capsys.readouterr().out


def test_user_port_health_and_command() -> None:
    assert one("USER").partition(":")[0] not in ("root", "0")
    assert one("EXPOSE") == str(PORT)
    probe = json.loads(one("HEALTHCHECK").partition("CMD ")[2])
    assert any(probe[-1] == f"http://127.0.0.1:{PORT}{path}" for path in OPEN_PATHS)
    entry, arguments = json.loads(one("ENTRYPOINT")), json.loads(one("CMD"))
    assert entry == ["/usr/bin/tini", "--", "quantserve"]
    assert any(name == "RUN" and " tini " in rest for name, rest in instructions())
    assert arguments[0] == "serve"
    parsed = command.make_context("serve", arguments[1:], resilient_parsing=True)
    assert isinstance(parsed, click.Context)
    assert parsed.params["host"] == "0.0.0.0"


def test_the_systemd_unit_leaves_time_to_drain() -> None:
    text = (ROOT / "deploy/systemd/quantserve.service").read_text("utf-8")
    unit = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert unit["KillMode"] == "mixed"
    assert float(unit["TimeoutStopSec"]) >= HttpConfig().drain_timeout_s + 20
    arguments = unit["ExecStart"].split()
    assert arguments[0].endswith("/.venv/bin/quantserve")
    assert arguments[1] == "serve"
    command.make_context("serve", arguments[2:], resilient_parsing=True)


def test_no_secret_is_in_a_layer() -> None:
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"key|token|secret|password", rest, re.IGNORECASE), rest


def test_variables_exist() -> None:
    """What the files name is read by somebody."""
    text = "".join(path.read_text("utf-8") for path in (ROOT / "deploy").rglob("*") if path.is_file())
    code = "".join(path.read_text("utf-8") for path in (ROOT / "core").rglob("*.py"))
    for name in set(re.findall(r"\bQUANTSERVE_[A-Z_]+", text)):
        assert f'"{name}"' in code, name
    assert re.search(r'"RAY_worker_niceness"', code)
    envs = pytest.importorskip("vllm.envs")
    settings = dict(part.split("=", 1) for part in shlex.split(one("ENV")))
    for name in settings:
        assert not name.startswith("VLLM_") or name in envs.environment_variables, name
    assert settings["HF_HOME"].startswith(one("VOLUME"))
