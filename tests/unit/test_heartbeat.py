"""What ranks learn of each other over their lines, here two ends of a pair of sockets."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from megatron_ext.parallel import heartbeat
from megatron_ext.parallel.heartbeat import GONE_WITHOUT_A_WORD, Heartbeat


def connect(*ranks: int) -> dict[int, Heartbeat]:
    """Ranks with a line between rank 0 and each other, as `Heartbeat.connect` makes them."""
    made = {rank: Heartbeat(rank=rank, world_size=4, node=f"n{rank}", pid=100 + rank) for rank in (0, *ranks)}
    for rank in ranks:
        near, far = socket.socketpair()
        made[0]._add(near, made[rank]._hello)
        made[rank]._add(far, made[0]._hello)
    return made


@pytest.fixture
def three():
    made = connect(1, 2)
    yield made
    for one in made.values():
        one.close()


def test_rank_0_learns_what_each_rank_does(three):
    three[1].beat({"iteration": 4})
    three[2].beat({"iteration": 5})
    three[0].poll()
    assert [json.loads(three[0].peers[rank].word) for rank in (1, 2)] == [{"iteration": 4}, {"iteration": 5}]
    assert three[0].peers[2].node == "n2" and three[0].peers[2].pid == 102


def test_silence_is_counted_from_the_last_word(three):
    three[1].beat(1)
    three[0].poll()
    before = three[0].peers[1].silent_seconds
    time.sleep(0.02)
    assert three[0].peers[1].silent_seconds >= before + 0.02
    three[1].beat(2)
    three[0].poll()
    assert three[0].peers[1].silent_seconds < before + 0.02


def test_rank_that_ends_without_a_word_is_lost_to_all(three):
    for line in three[1]._lines.values():
        line.connection.close()  # as the system does with the sockets of a process that was killed
    three[0].poll()
    three[2].poll()
    assert three[0].lost == three[2].lost == {1: GONE_WITHOUT_A_WORD}


def test_rank_that_says_why_it_leaves_is_lost_with_its_reason(three):
    three[1].close("failed: ValueError: x")
    three[0].poll()
    three[2].poll()
    assert three[0].lost == three[2].lost == {1: "failed: ValueError: x"}
    assert three[0].peers[1].state == "lost"


def test_rank_that_leaves_in_order_is_not_lost(three):
    three[1].close()
    three[0].poll()
    assert three[0].lost == {} and three[0].peers[1].state == "left"


def test_loss_of_rank_0_is_seen_by_the_others(three):
    for line in three[0]._lines.values():
        line.connection.close()
    three[1].poll()
    assert three[1].lost == {0: GONE_WITHOUT_A_WORD}


def test_rank_0_tells_all_to_leave(three):
    three[0].end_all("rank 1 hangs")
    three[1].poll()
    three[2].poll()
    assert three[1].end == three[2].end == "rank 1 hangs"


def test_beats_to_a_stopped_rank_never_block_and_none_of_the_rest_is_cut(three):
    word = {"where": "x" * 1000}
    for _ in range(2000):  # far more than sockets hold
        three[1].beat(word)
    three[1].close("failed: y")
    for _ in range(50):
        three[0].poll()
    assert json.loads(three[0].peers[1].word) == word


def test_words_that_come_in_pieces_are_put_together(three):
    line = next(iter(three[1]._lines.values())).connection
    for piece in (b'beat {"itera', b'tion": 7}', b"\nbeat 8"):
        line.send(piece)
        three[0].poll()
    assert json.loads(three[0].peers[1].word) == {"iteration": 7}


def test_rank_is_let_in_though_strangers_come_first_and_say_nothing(monkeypatch):
    monkeypatch.setattr(heartbeat, "_HELLO_SECONDS", 0.3)
    zero, one = (Heartbeat(rank=rank, world_size=2, node=f"n{rank}", pid=100 + rank) for rank in (0, 1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        accepting = threading.Thread(target=zero._accept, args=(listener, "token"))
        accepting.start()
        one._reach("127.0.0.1", port, "token")
        accepting.join()
    assert (list(zero.peers), list(one.peers)) == ([1], [0])
    for line in (*strangers, zero, one):
        line.close()
