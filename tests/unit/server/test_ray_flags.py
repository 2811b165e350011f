"""Where workers run, as flags say it."""

from __future__ import annotations

import pytest

from amoe import cli
from amoe.cluster.executor import ExecutorOptions
from amoe.errors import ConfigError
from amoe.server.cli import settings_of


def settings(*flags: str):
    return settings_of(cli.build_parser("serve").parse_args(["serve", "m", *flags]), {})


def test_here_unless_said_otherwise():
    config, options, _ = settings()
    assert options.executor == ExecutorOptions() and options.executor.name == "local"
    assert config.transport == "shm"


def test_on_ray():
    flags = "--ray-address h:6379 --deployment-name chat --ray-pin-roles --ray-placement-timeout 300"
    config, options, _ = settings("--executor", "ray", *flags.split())
    assert options.executor == ExecutorOptions(
        name="ray", ray_address="h:6379", deployment="chat", ray_pin_roles=True, ray_placement_timeout_s=300.0
    )
    assert config.transport == "tcp"
    assert settings("--executor", "ray", "--transport", "distributed")[0].transport == "distributed"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--executor ray --transport shm", "--transport tcp or distributed"),
        ("--executor ray --api-server-count 2", "leave --api-server-count away"),
        ("--executor ray --deployment-name a/b", "--deployment-name 'a/b' must be"),
        ("--executor ray --deployment-name=", "--deployment-name '' must be"),
        ("--executor ray --ray-placement-timeout 0", "--ray-placement-timeout must be greater than 0"),
        ("--executor ray --ray-placement-timeout nan", "--ray-placement-timeout must be greater than 0"),
        ("--ray-address h:1", "go with --executor ray"),
        ("--ray-pin-roles", "go with --executor ray"),
        ("--deployment-name chat", "go with --executor ray"),
    ],
)
def test_what_cannot_work_is_refused(flags, message):
    with pytest.raises(ConfigError) as error:
        settings(*flags.split())
    assert message in str(error.value)
