"""Which cluster a stage attaches to."""

from __future__ import annotations

import socket

import pytest

from pipelines import cluster


def noted(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "find_bootstrap_address", lambda _: address)


def test_a_cluster_that_was_killed_and_is_still_noted_is_not_waited_for_and_no_longer_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[bool] = []
    monkeypatch.setattr(cluster, "reset_ray_address", lambda: removed.append(True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        noted(monkeypatch, address)
        assert not cluster.noted_cluster_is_gone()
        assert not removed
    assert cluster.noted_cluster_is_gone()
    assert removed


def test_without_a_note_or_with_an_address_given_ray_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    noted(monkeypatch, None)
    assert not cluster.noted_cluster_is_gone()
    noted(monkeypatch, "127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not cluster.noted_cluster_is_gone()
