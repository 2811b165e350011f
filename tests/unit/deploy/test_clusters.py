"""The files for Ray Serve, KubeRay, Kubernetes and SkyPilot: valid, of one piece, and with flags that there are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from amoe import __version__, cli
from amoe.cluster.ray_cluster.placement import PIN_AMOUNT, pin_of
from amoe.server.cli import settings_of
from tests.unit.deploy.kubernetes_schemas import SCHEMAS

# Ray Serve's modules warn about themselves when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore:Using extra keyword arguments")

DEPLOY = Path(__file__).parents[3] / "deploy"
KUBERNETES = ["kubernetes/amoe.yaml", "kubernetes/podmonitor.yaml", "ray/raycluster.yaml", "ray/rayservice.yaml"]
RAY = ["ray/raycluster.yaml", "ray/rayservice.yaml"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def ray_cluster(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterConfig", spec)


def serve_config(name: str) -> dict[str, Any]:
    (document,) = documents(name)
    return yaml.safe_load(document["spec"]["serveConfigV2"]) if "spec" in document else document


def check(args: dict[str, Any]) -> dict[str, Any]:
    from amoe.cluster import ray_serve  # late: it takes seconds

    return ray_serve.check(args)


def parse(flags: list[str]):
    """A command line of `amoe serve`, as it is checked."""
    return settings_of(cli.build_parser("serve").parse_args(["serve", *flags]), {})


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_knows_every_field(name: str):
    for document in documents(name):
        jsonschema.validate(document, SCHEMAS[document["kind"]])


@pytest.mark.parametrize("name", ["ray/serve.yaml", "ray/rayservice.yaml"])
def test_serve_takes_the_configuration_and_amoe_its_arguments(name: str):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_config(name))
    (application,) = config.applications
    assert application.import_path == "amoe.cluster.ray_serve:build_app"
    assert [deployment.name for deployment in application.deployments] == ["amoe"]
    assert check(application.args)["model"] == "/models/model"


@pytest.mark.parametrize("name", RAY)
def test_the_pods_of_a_ray_cluster(name: str):
    spec = ray_cluster(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {f"amoe-ray:{__version__}"}, "the same Ray, Python and amoe everywhere"
    mounts = [group["template"]["spec"]["containers"][0]["volumeMounts"] for group in groups]
    assert all(mount[0]["mountPath"] == "/models" for mount in mounts)
    base = re.search(r"^FROM rayproject/ray:(\S+?)-py", (DEPLOY / "ray/Dockerfile").read_text(), re.MULTILINE)
    assert base is not None and base[1] == spec["rayVersion"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", RAY)
def test_roles_have_groups_of_their_own(name: str):
    """The resource that a worker asks for is what its group of pods declares."""
    spec = ray_cluster(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    declared = {}
    for group in spec["workerGroupSpecs"]:
        (value,) = shlex.split(group["rayStartParams"]["resources"])  # KubeRay puts it into a shell's command
        declared[group["groupName"]] = json.loads(value)
    assert declared == {role: {pin_of(role): 1} for role in ("attention", "experts")}


def test_the_ray_service_fits_into_its_pods():
    args = check(serve_config("ray/rayservice.yaml")["applications"][0]["args"])
    spec = ray_cluster("ray/rayservice.yaml")
    cpus = {
        group["groupName"]: int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
        for group in spec["workerGroupSpecs"]
    }
    assert args["ray-pin-roles"]
    assert args["threads-per-worker"] + 1 <= cpus["attention"], "the replica is beside the attention worker"
    assert args["threads-per-worker"] <= cpus["experts"]
    experts = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "experts")
    assert args["expert-workers"] == experts["replicas"]
    assert args["max-expert-workers"] == experts["maxReplicas"]
    options = serve_config("ray/rayservice.yaml")["applications"][0]["deployments"][0]["ray_actor_options"]
    assert options["resources"] == {pin_of("attention"): PIN_AMOUNT}


def commands(name: str, program: str) -> list[list[str]]:
    """Flags of `program` in the comments of a file."""
    text = re.sub(r"\\\n#\s*", "", (DEPLOY / name).read_text(encoding="utf-8"))
    return [shlex.split(found) for found in re.findall(rf"{program} ([^\n]*)", text)]


def test_the_command_for_a_ray_cluster():
    (flags,) = commands("ray/raycluster.yaml", "amoe serve")
    config, options, _ = parse(flags)
    assert options.executor.name == "ray" and options.executor.ray_pin_roles
    assert (
        config.placement.max_expert_workers == ray_cluster("ray/raycluster.yaml")["workerGroupSpecs"][1]["maxReplicas"]
    )


def test_plain_kubernetes():
    deployment, service = documents("kubernetes/amoe.yaml")
    (monitor,) = documents("kubernetes/podmonitor.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"], monitor["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, options, _ = parse(container["args"])
    assert options.shutdown_timeout_s < pod["terminationGracePeriodSeconds"]
    (port,) = container["ports"]
    assert {service["spec"]["ports"][0]["targetPort"], monitor["spec"]["podMetricsEndpoints"][0]["port"]} == {
        port["name"]
    }
    probes = [container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(probe["httpGet"] == {"path": "/health", "port": port["name"]} for probe in probes)
    assert container["image"] == f"amoe:{__version__}"


def test_skypilot():
    """Its own schema (0.14.1) has taken the file as well."""
    (task,) = documents("skypilot/amoe.yaml")
    assert set(task) == {"name", "workdir", "resources", "secrets", "file_mounts", "setup", "run", "service"}
    _, options, _ = parse(shlex.split(task["run"])[2:])
    assert (options.host, options.port) == ("0.0.0.0", task["resources"]["ports"])
    assert shlex.split(task["run"])[2] in task["file_mounts"]
    assert task["service"]["readiness_probe"]["path"] == "/health"
