"""`--config FILE`: command line before file before default; a mistake is told with the file's name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from amoe import cli
from amoe.errors import ConfigError
from amoe.server.http_flags import log_options, server_options


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser("serve").parse_args(["serve", *argv])


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "amoe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


EVERYTHING = """
model: /models/one
port: 0
max-model-len: 4k
max_num_seqs: 7
schedule: lockstep
served_model_name: [a, b]
api-key: secret
enable-prefix-caching: false
disable-log-stats: true
disable-access-log: false
allowed-origins: ["https://a.example", "https://b.example"]
capacity-factor: 1.5
uds: null
"""


def test_a_file_gives_defaults(file):
    args = parse("--config", file(EVERYTHING))
    assert (args.model, args.port, args.max_model_len, args.max_num_seqs) == ("/models/one", 0, 4000, 7)
    assert (args.schedule, args.served_model_name, args.api_key) == ("lockstep", ["a", "b"], ["secret"])
    assert (args.enable_prefix_caching, args.disable_log_stats, args.disable_access_log) == (False, True, False)
    assert args.allowed_origins == ["https://a.example", "https://b.example"]
    assert (args.capacity_factor, args.uds, args.host) == (1.5, None, "127.0.0.1")


@pytest.mark.parametrize("before", [True, False])
def test_the_command_line_goes_before_the_file(file, before):
    flags = ["/models/two", "--port", "9", "--enable-prefix-caching", "--served-model-name", "c"]
    config = ["--config=" + file(EVERYTHING)]
    args = parse(*(flags + config if before else config + flags))
    assert (args.model, args.port, args.enable_prefix_caching, args.served_model_name) == (
        "/models/two",
        9,
        True,
        ["c"],
    )
    assert args.max_num_seqs == 7


def test_a_file_does_not_touch_what_it_does_not_name(file):
    assert vars(parse("m", "--config", file("port: 9"))) | {"port": 8000, "config": None} == vars(parse("m"))
    assert parse("--config", file("")).port == 8000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot': did you mean 'port'"),
        ("nothing_like_it_at_all: 1", "unknown key 'nothing-like-it-at-all'$"),
        ("config: other.yaml", "unknown key 'config'"),
        ("help: all", "unknown key 'help'"),
        ("port: many", "--port: 'many' is not a port"),
        ("port: [1, 2]", "port takes one value"),
        ("port: true", "port takes a value"),
        ("port: {a: 1}", "--port"),
        ("schedule: fast", "--schedule: invalid choice"),
        ("disable-log-stats: 1", "disable-log-stats must be true or false"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "twice"),
        ("port: 1\nhost: a\nport: 2", "port is there twice.* line 3"),
        ("served-model-name: [[a]]", "served-model-name takes a value"),
        ("[1, 2]", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("port: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_mistakes(file, text, message, capsys):
    path = file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse("--config", path)
    assert path in str(caught.value)
    assert cli.main(["serve", "--config", path]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        parse("--config", str(tmp_path / "none.yaml"))


class TestHelp:
    @pytest.mark.parametrize(
        ("topic", "there", "not_there"),
        [
            ("all", "--capacity-factor", "no-such-flag"),
            ("capacity", "--capacity-factor", "--port"),
            ("KV-cache", "--block-size", "--port"),
            ("port", "--port", "--host"),
            ("--max-num-seqs", "--max-num-seqs", "--port"),
            ("replicas", "--redundant-experts", "--port"),
        ],
    )
    def test_topics(self, topic, there, not_there, capsys):
        with pytest.raises(SystemExit) as caught:
            parse(f"--help={topic}")
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert there in shown and not_there not in shown

    def test_unknown_topic(self, capsys):
        assert cli.main(["serve", "--help=capacityy"]) == 2
        assert "capacity" in capsys.readouterr().err


class TestOptions:
    def options(self, *argv: str, **environment: str) -> Any:
        return server_options(parse("m", *argv), ("m",), environment)

    def test_keys_come_from_flags_or_the_environment(self):
        assert len(self.options(AMOE_API_KEY="a,b").http.key_digests) == 2
        assert self.options("--api-key", "a", AMOE_API_KEY="b,c").http == self.options("--api-key", "a").http
        assert self.options().http.key_digests == ()
        with pytest.raises(ConfigError, match="AMOE_API_KEY"):
            self.options(AMOE_API_KEY="a,,b")

    def test_admin_keys_are_others(self):
        assert len(self.options(AMOE_ADMIN_KEY="a,b").http.admin_digests) == 2
        assert self.options("--admin-key", "a", AMOE_ADMIN_KEY="b").http == self.options("--admin-key", "a").http
        assert self.options("--api-key", "a").http.admin_digests == ()
        with pytest.raises(ConfigError, match="AMOE_ADMIN_KEY"):
            self.options(AMOE_ADMIN_KEY="a,,b")
        with pytest.raises(ConfigError, match="--admin-key"):
            self.options("--admin-key", "a b")
        with pytest.raises(ConfigError, match="an API key is an admin key too"):
            self.options("--admin-key", "a", AMOE_API_KEY="b,a")

    def test_lists_may_be_json(self):
        words = self.options("--allowed-origins", "http://a", "http://b").http.cors
        assert words == self.options("--allowed-origins", '["http://a", "http://b"]').http.cors
        assert words.origins == ("http://a", "http://b")
        for wrong in ("[1]", "[x"):
            with pytest.raises(ConfigError, match="--allowed-origins"):
                self.options("--allowed-origins", wrong)

    def test_flags_that_do_nothing_are_refused(self):
        with pytest.raises(ConfigError, match="--enable-log-requests"):
            self.options("--max-log-len", "5")

    def test_the_log_level(self):
        assert log_options(parse("m"), {}).level == "info"
        assert log_options(parse("m"), {"AMOE_LOGGING_LEVEL": "DEBUG"}).level == "debug"
        assert log_options(parse("m", "--log-level", "error"), {"AMOE_LOGGING_LEVEL": "debug"}).level == "error"

    def test_the_old_name_of_a_flag(self):
        assert not self.options("--disable-uvicorn-access-log").http.access_log
