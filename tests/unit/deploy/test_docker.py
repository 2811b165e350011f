"""No Docker engine runs here. What images and compose files say of this repository can be checked all the same."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from amoe.cli import build_parser
from amoe.config import EngineConfig

ROOT = Path(__file__).parents[3]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cuda")
PINNED = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?[a-z0-9.-]*")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, in order."""
    text = "\n".join(line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def last(name: str, instruction: str) -> str:
    return [arguments for word, arguments in instructions(name) if word == instruction][-1]


def filled(value: Any) -> Any:
    """A compose file's value with the defaults of its variables."""
    if isinstance(value, dict):
        return {key: filled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


@pytest.fixture
def compose() -> dict[str, Any]:
    return filled(yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text()))


def is_ignored(path: str) -> bool:
    """By .dockerignore, whose last matching line decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not line.startswith("#") and (fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/")):
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize("name", DOCKERFILES)
class TestDockerfile:
    def test_its_bases_are_pinned(self, name: str):
        bases = [arguments.split()[0] for word, arguments in instructions(name) if word == "FROM"]
        assert bases and all(PINNED.fullmatch(base) for base in bases)

    def test_it_runs_as_nobody_in_particular(self, name: str):
        uid, _, gid = last(name, "USER").partition(":")
        assert int(uid) > 0 and gid == "0", "numeric, so that Kubernetes can see that it is not root"
        after = [word for word, _ in instructions(name)]
        assert "RUN" not in after[after.index("USER") :]

    def test_what_it_copies_is_there_and_not_ignored(self, name: str):
        copied = [shlex.split(arguments)[:-1] for word, arguments in instructions(name) if word == "COPY"]
        sources = [source for sources in copied for source in sources if not sources[0].startswith("--from")]
        assert sources
        for source in sources:
            assert (ROOT / source).exists() and not is_ignored(source), source
        for needed in ("amoe/cli.py", "amoe/builtin/model/config.json", "amoe/server/page"):
            assert (ROOT / needed).exists() and not is_ignored(needed), needed

    def test_what_it_installs_is_ours_with_an_extra_that_there_is(self, name: str):
        install = next(
            arguments for word, arguments in instructions(name) if word == "RUN" and "pip install" in arguments
        )
        (extra,) = re.search(r"\.\[(\w+)\]", install).groups()
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert ("whl/cpu" in install) == (name == "docker/Dockerfile")

    def test_the_server_understands_its_flags(self, name: str):
        program, *flags = json.loads(last(name, "ENTRYPOINT"))
        assert program == "amoe"
        args = build_parser("serve").parse_args(flags)
        assert args.host == "0.0.0.0", "else nobody outside of the container reaches it"
        assert str(args.port) == last(name, "EXPOSE")
        assert args.device == ("cuda" if name.endswith(".cuda") else EngineConfig(model="m").device)

    def test_its_health_check_asks_for_health(self, name: str):
        check = last(name, "HEALTHCHECK")
        program, flag, source = json.loads(check[check.index("[") :])
        assert (program, flag) == ("python", "-c")
        ast.parse(source)
        assert f"http://127.0.0.1:{last(name, 'EXPOSE')}/health" in source
        assert "--start-period" in check

    def test_it_is_labelled_and_stops_as_the_server_expects(self, name: str):
        labels = " ".join(arguments for word, arguments in instructions(name) if word == "LABEL")
        assert {"title", "description", "licenses"} <= set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels))
        assert last(name, "STOPSIGNAL") == "SIGTERM"


class TestCompose:
    def test_images_are_pinned_and_watched(self, compose: dict[str, Any]):
        for name, service in compose["services"].items():
            assert "build" in service or (PINNED.fullmatch(service["image"]) and service["healthcheck"]), name

    def test_what_is_built_and_mounted_is_there(self, compose: dict[str, Any]):
        folder = ROOT / "docker"
        build = compose["services"]["amoe"]["build"]
        assert (folder / build["context"] / build["dockerfile"]).is_file()
        for service in compose["services"].values():
            for volume in service["volumes"]:
                source = volume.split(":")[0]
                assert source in compose["volumes"] or (folder / source).exists(), volume
                assert source in compose["volumes"] or volume.endswith(":ro")

    def test_no_port_is_open_to_others(self, compose: dict[str, Any]):
        ports = [port for service in compose["services"].values() for port in service["ports"]]
        assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)

    def test_the_server_understands_its_command(self, compose: dict[str, Any]):
        service = compose["services"]["amoe"]
        entrypoint = json.loads(last("docker/Dockerfile", "ENTRYPOINT"))[1:]
        args = build_parser("serve").parse_args([*entrypoint, *service["command"]])
        (mount,) = service["volumes"]
        assert args.model == mount.split(":")[1]
        assert f"{args.port}:{args.port}" in service["ports"][0]
        assert (ROOT / "docker" / mount.split(":")[0] / "config.json").is_file()

    def test_prometheus_finds_the_server_and_its_rules(self, compose: dict[str, Any]):
        config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
        local = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
        (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
        host, port = target.split(":")
        assert host in compose["services"] and compose["services"][host]["ports"][0].endswith(f":{port}")
        assert config["scrape_configs"][0]["job_name"] == local["scrape_configs"][0]["job_name"], "alerts name it"
        assert config["global"] == local["global"]
        mounts = dict(reversed(volume.split(":")[:2]) for volume in compose["services"]["prometheus"]["volumes"])
        for path in (*config["rule_files"], "/etc/prometheus/prometheus.yml"):
            assert (ROOT / "docker" / mounts[path]).is_file()

    def test_grafana_finds_prometheus_and_its_dashboards(self, compose: dict[str, Any]):
        service = compose["services"]["grafana"]
        environment = service["environment"]
        host, port = environment["PROMETHEUS_URL"].removeprefix("http://").split(":")
        assert compose["services"][host]["ports"][0].endswith(f":{port}")
        mounts = dict(reversed(volume.split(":")[:2]) for volume in service["volumes"])
        provisioning = ROOT / "docker" / mounts["/etc/grafana/provisioning"]
        (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
        assert source["url"] == "${PROMETHEUS_URL}"
        (provider,) = yaml.safe_load((provisioning / "dashboards" / "amoe.yml").read_text())["providers"]
        dashboards = ROOT / "docker" / mounts[provider["options"]["path"]]
        home = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
        assert str(home.parent) == provider["options"]["path"] and (dashboards / home.name).is_file()

    def test_visitors_may_only_look(self, compose: dict[str, Any]):
        environment = compose["services"]["grafana"]["environment"]
        assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
        assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
        assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"

    def test_dependencies_exist(self, compose: dict[str, Any]):
        for service in compose["services"].values():
            assert set(service.get("depends_on", ())) <= set(compose["services"])

    def test_the_override_for_gpus_fits(self, compose: dict[str, Any]):
        override = yaml.safe_load((ROOT / "docker" / "compose.cuda.yaml").read_text())
        assert set(override["services"]) <= set(compose["services"])
        assert override["services"]["amoe"]["build"]["dockerfile"] in DOCKERFILES
