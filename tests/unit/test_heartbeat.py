"""A line a minute where there is no terminal."""

import queue

import pytest

from launch import heartbeat


def test_it_says_the_newest_status_until_it_is_closed(monkeypatch):
    monkeypatch.setattr(heartbeat, "_SECONDS", 0.001)
    said = queue.Queue()
    beat = heartbeat.Heartbeat(said.put, silent=False)
    assert said.get(timeout=60) == "after 1 min: preparing"
    beat.status = "policy: step 5 of 10"
    while not said.get(timeout=60).endswith(beat.status):
        pass
    beat.close()
    beat.thread.join(60)
    while not said.empty():
        said.get()
    with pytest.raises(queue.Empty):
        said.get(timeout=0.05)


def test_a_terminal_has_bars_instead(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert heartbeat.Heartbeat(print).thread is None
