"""The rendezvous where a port is in use, another attempt is there, or another rank has failed."""

import socket
import threading

import pytest

from hpcssl.distributed import announcement, launch, rendezvous
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.errors import Stopped, WorldError
from tests.forked import free_port
from tests.waiting import PATIENCE_S


def make_info(rank, port, token="job.1"):
    return launch.LaunchInfo(rank=rank, local_rank=rank, size=2, address="127.0.0.1", port=port, token=token)


@pytest.fixture
def port_in_use(monkeypatch):
    """A port at which another program accepts connections and never answers."""
    monkeypatch.setattr(announcement, "CONNECT_S", 0.2)
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def never(*_):
    return False


def test_rank_0_moves_to_another_port_and_the_others_find_it(port_in_use):
    joined = {}

    def join(rank):
        joined[rank] = rendezvous.join(make_info(rank, port_in_use), PATIENCE_S, never)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (store, info), (_, other_info) = joined[0], joined[1]
    assert info.port == other_info.port != port_in_use
    store.set("from", "rank 0")
    again = rendezvous.open_store(other_info)  # as the heartbeat does, over a connection of its own
    again.set("from", "rank 1")
    assert KeyValueStore(joined[1][0]).get(["from"]) == ["rank 0"]
    assert all(announcement.read("127.0.0.1", port) is None for port in launch.ports_for(make_info(0, port_in_use)))


def test_rank_0_names_the_ports_if_all_are_in_use(port_in_use, monkeypatch):
    monkeypatch.setattr(launch, "PORTS", 1)
    with pytest.raises(WorldError) as caught:
        rendezvous.join(make_info(0, port_in_use), PATIENCE_S, never)
    assert caught.value.got.split()[:2] == ["ports", str(port_in_use)]


def test_a_rank_that_waits_leaves_when_another_one_has_failed(monkeypatch):
    monkeypatch.setattr(rendezvous, "FAILURE_POLL_S", 0.0)
    answers = iter(["", "", "error: rank 0: all ports are in use"])
    with pytest.raises(WorldError) as caught:
        rendezvous.join(make_info(1, free_port()), 3600.0, never, lambda: next(answers))
    assert "error: rank 0: all ports are in use" in caught.value.got


def test_a_rank_that_waits_for_rank_0_stops_on_request_while_a_port_does_not_answer(port_in_use):
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        rendezvous.join(make_info(1, port_in_use), 3600.0, lambda: next(answers))


def test_the_store_of_another_attempt_is_passed_over(monkeypatch):
    """At first the other attempt has the port alone; then this attempt's rank 0 comes, at another port."""
    port, found, searching = free_port(), [], threading.Event()
    other = announcement.Announcement(make_info(0, port, "job.2"), 1)
    original = announcement.read

    def read(address, number):
        answer = original(address, number)
        if answer is not None:
            searching.set()
        return answer

    monkeypatch.setattr(announcement, "read", read)
    thread = threading.Thread(target=lambda: found.append(rendezvous.join(make_info(1, port), PATIENCE_S, never)))
    thread.start()
    assert searching.wait(PATIENCE_S)
    _, info = rendezvous.join(make_info(0, port), PATIENCE_S, never)
    thread.join()
    assert [here.port for _, here in found] == [info.port]
    monkeypatch.setattr(rendezvous, "OTHER_ATTEMPT_S", 0.0)
    with pytest.raises(WorldError) as caught:
        rendezvous.join(make_info(1, port, "job.3"), PATIENCE_S, never)
    assert caught.value.what == "rank 1 of attempt job.3"
    assert caught.value.got == f"attempt job.2 at 127.0.0.1:{port}"
    other.close()


def test_rank_0_names_an_address_that_is_not_its_own(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("The client socket has failed to connect\n to any network address")

    monkeypatch.setattr(rendezvous, "TCPStore", refuse)
    with pytest.raises(WorldError) as caught:
        rendezvous.join(make_info(0, free_port()), PATIENCE_S, never)
    assert caught.value.what == "rank 0 at 127.0.0.1" and "MASTER_ADDR" in caught.value.fix
    assert caught.value.got == "The client socket has failed to connect to any network address"
