"""Which worker's end says how a launch ended, and where the workers meet."""

from __future__ import annotations

import psutil
import pytest

from trainer.launch.agent import Meeting, shell_code, telling


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([75, 75], 75),
        ([1, 2], 2),
        ([75, -9], -9),  # told to end since the other was killed
        ([1, -9], -9),  # noticed that the other was killed
        ([-15, 1], 1),
        ([75, 1], 1),
        ([0, -15], -15),
    ],
)
def test_telling_is_the_cause_and_not_what_followed(codes: list[int], expected: int) -> None:
    assert telling(codes) == expected


def test_shell_code_of_a_signal_is_128_and_its_number() -> None:
    assert (shell_code(-9), shell_code(75)) == (137, 75)


def test_one_machine_listens_on_loopback_only() -> None:
    before = {entry.laddr for entry in psutil.Process().net_connections() if entry.status == "LISTEN"}
    meeting = Meeting.here("run")
    info = meeting.next_rendezvous()
    info.store.set("key", "value")
    assert info.store.get("key") == b"value"
    after = {entry.laddr for entry in psutil.Process().net_connections() if entry.status == "LISTEN"}
    assert {address.ip for address in after - before} == {"127.0.0.1"}
