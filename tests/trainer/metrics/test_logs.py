"""Log files: everything in them, errors also on the console."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.metrics.logs import LOGGER, Logs, set_up_logs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    found = set_up_logs(tmp_path, 0)
    yield found
    found.close()


def test_logs_message_has_time_and_level(logs: Logs) -> None:
    LOGGER.info("hello")
    assert logs.path.name == "rank-0.log"
    assert logs.path.read_text().endswith(" INFO shardwright: hello\n")
    assert logs.path.read_text().startswith("2")


def test_logs_library_warning_is_written_once(logs: Logs) -> None:
    logging.getLogger("transformers.modeling").warning("odd weights")
    assert logs.path.read_text().count("odd weights") == 1


def test_logs_set_up_again_goes_on_in_the_same_file(logs: Logs, tmp_path: Path) -> None:
    LOGGER.info("first start")
    again = set_up_logs(tmp_path, 0)
    LOGGER.info("second start")
    again.close()
    assert logs.path.read_text().count("start") == 2


def test_logs_closed_writes_no_more(logs: Logs) -> None:
    logs.close()
    logs.close()
    LOGGER.warning("too late")
    assert logs.path.read_text() == ""
    assert LOGGER.propagate


PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from trainer.metrics.logs import set_up_logs
set_up_logs(Path(sys.argv[1]), 1)
warnings.warn("a python warning")
library = logging.getLogger("transformers")  # what that library does when it is imported
handler = logging.StreamHandler()
library.addHandler(handler)
library.propagate = False
logging.getLogger("transformers.models").warning("a library warning")
logging.getLogger("transformers.models").error("a library error")
logging.getLogger("unheard.of").warning("another warning")
logging.getLogger("unheard.of").error("another error")
"""


def test_logs_console_keeps_errors_and_the_file_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr.splitlines() == ["a library error", "[rank 1] ERROR unheard.of: another error"]
    text = (tmp_path / "logs" / "rank-1.log").read_text()
    for said in ("a python warning", "a library warning", "a library error", "another warning", "another error"):
        assert text.count(f": {said}") == 1, said
