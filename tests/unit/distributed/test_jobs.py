"""The Jobs API over HTTP: addresses, tokens, refusals, jobs and their exit codes."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from rlhf_ray.distributed import jobs
from rlhf_ray.distributed.jobs import connect, dashboard_url
from rlhf_ray.errors import ConfigError
from tests.unit.dashboard import TOKEN, Dashboard, job, serving


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", *jobs.ADDRESSES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head:9000", "http://head:9000"),
        ("head", "http://head:8265"),
        ("https://ray.example.org/", "https://ray.example.org"),
        ("http://[::1]:8265/", "http://[::1]:8265"),
    ],
)
def test_an_address_becomes_a_url(given: str, url: str) -> None:
    assert dashboard_url(given) == url


@pytest.mark.parametrize("given", ["auto", "ray://head:10001", "http://head:8265/jobs", "http://head:port", "a b"])
def test_an_address_without_a_jobs_api(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--address: got .*, wanted the address of the cluster's dashboard"):
        dashboard_url(given)


def test_a_login_in_an_address_is_not_shown() -> None:
    with pytest.raises(ConfigError) as error:
        dashboard_url("http://me:hunter2@head:8265")
    assert "hunter2" not in str(error.value)


def test_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no cluster is named"):
        dashboard_url(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379x")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: got '10.0.0.1:6379x'"):
        dashboard_url(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:1")
    assert dashboard_url(None) == "http://head:1"


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"cannot be reached: .*refused"):
            connect(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConfigError, match=r"does not answer within 0\.2 s"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_wait_that_no_timeout_of_a_library_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the look-up of a name can be."""
    for_ever = threading.Event()
    monkeypatch.setattr(jobs, "PROBE_S", 0.05)
    monkeypatch.setattr(jobs, "_probe", lambda url: for_ever.wait(5))
    with pytest.raises(ConfigError, match="does not answer"):
        connect("http://head:8265")
    for_ever.set()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"ray_version": null}', b"{}"])
def test_something_else_answers(body: bytes) -> None:
    with serving(Dashboard(version_body=body)) as other, pytest.raises(ConfigError, match="not as a Ray dashboard"):
        connect(other.address)


def test_no_token() -> None:
    with serving(Dashboard(token=TOKEN)) as dashboard, pytest.raises(ConfigError, match="wants a token, and there is"):
        connect(dashboard.address)


def test_a_wrong_token_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-4711")
    with serving(Dashboard(token=TOKEN)) as dashboard, pytest.raises(ConfigError) as error:
        connect(dashboard.address)
    assert "refuses the token of RAY_AUTH_TOKEN (status 403)" in str(error.value)
    assert "wrong-4711" not in str(error.value)


def test_a_token_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    with serving(Dashboard(token=TOKEN)) as dashboard, pytest.raises(ConfigError, match="no header can carry"):
        connect(dashboard.address)


def test_where_the_token_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(Dashboard(token=TOKEN)) as dashboard:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(TOKEN + "\n")
        assert connect(dashboard.address).authenticated
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
        with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH: .*named cannot be read"):
            connect(dashboard.address)
        (tmp_path / "named").write_text("another")
        with pytest.raises(ConfigError, match=r"refuses the token of .*named"):
            connect(dashboard.address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        assert connect(dashboard.address).ray_version == "2.60.0"


def test_a_token_goes_only_to_a_cluster_that_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(Dashboard()) as dashboard:
        server = connect(dashboard.address)
        assert not server.authenticated
        assert server.jobs() == []
        assert dashboard.tokens_sent == [None, None]


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_exit_codes(status: str, code: int | None, wanted: int | None) -> None:
    with serving(Dashboard(jobs=[job("a", status, driver_exit_code=code)])) as dashboard:
        found = connect(dashboard.address).job("a")
    assert (found.exit_code, found.ended) == (wanted, wanted is not None)


def test_jobs_come_newest_first_and_foreign_drivers_not_at_all() -> None:
    known = [job("old", "SUCCEEDED", start_time=1000), job("new", "RUNNING", start_time=2000), {"submission_id": None}]
    with serving(Dashboard(jobs=known)) as dashboard:
        server = connect(dashboard.address)
        assert [(each.id, each.started_s) for each in server.jobs()] == [("new", 2.0), ("old", 1.0)]
        with pytest.raises(ConfigError, match="knows no job 'lost'"):
            server.job("lost")


def test_the_wait_between_the_signals_is_that_of_the_job() -> None:
    environment = {"env_vars": {jobs.STOP_WAIT: "600"}}
    known = [job("ours", "RUNNING", runtime_env=environment), job("plain", "RUNNING")]
    with serving(Dashboard(jobs=known)) as dashboard:
        server = connect(dashboard.address)
        assert [server.job(name).stop_wait_s for name in ("ours", "plain")] == [600.0, 3.0]


def test_a_log_whose_stream_cannot_be_had_is_read_at_the_end() -> None:
    known = [job("a", "FAILED", driver_exit_code=3)]
    with serving(Dashboard(jobs=known, logs={"a": "one\ntwo\n"})) as dashboard:
        pieces: list[str] = []
        assert connect(dashboard.address).follow("a", pieces.append).exit_code == 3
    assert pieces == ["one\ntwo\n"]


def test_a_stream_that_begins_anew_is_written_once() -> None:
    pieces: list[str] = []
    log = jobs._Log(pieces.append)
    log.take("one\n")
    log.take("tw")
    log.position = 0
    log.take("one\ntwo\n")
    log.take("three\n")
    assert "".join(pieces) == "one\ntwo\nthree\n"


def test_a_cluster_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST_S", 0.0)
    with serving(Dashboard(jobs=[job("a", "RUNNING")])) as dashboard:
        server = connect(dashboard.address)
    with pytest.raises(jobs.LostError, match="answers no more"):
        server.follow("a", lambda text: None)
