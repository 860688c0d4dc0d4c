"""The display: lines that programs can read, and a live picture that leaves the terminal sane."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from trainer.metrics.display import Display, render, step_line
from trainer.metrics.logs import set_up_logs
from trainer.metrics.text import compact, duration, printable, short

ROOT = Path(__file__).resolve().parents[3]
NUMBER = r"(-?\d+(\.\d+)?(e[-+]\d+)?|nan|-?inf)"
STEP = re.compile(
    rf"step=\d+/\d+ loss={NUMBER} grad_norm={NUMBER} lr={NUMBER} tokens_per_s=\d+( samples_per_s={NUMBER})?"
    rf" step_s={NUMBER}( mfu={NUMBER})?( eta=\d+:\d\d:\d\d)? memory_mib=\d+( \w+={NUMBER})*"
)
METRICS = {
    "loss": 1.23449,
    "grad_norm": 0.51231,
    "lr": 1e-3,
    "tokens": 123456,
    "tokens_per_s": 11000.4,
    "step_s": 0.0931,
    "data_s": 0.001,
    "memory_mib": 402.7,
}


class Hand:
    """A clock's hand that moves only when told to."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def test_step_line_reads_as_promised() -> None:
    assert step_line(100, 2000, METRICS, 80.4) == (
        "step=100/2000 loss=1.2345 grad_norm=0.5123 lr=0.001 tokens_per_s=11000 step_s=0.0931 eta=0:01:20 "
        "memory_mib=403"
    )


def test_step_line_without_known_end_has_neither_end_nor_time_left() -> None:
    assert step_line(5, None, {"loss": 1.0, "accuracy": 0.5}, None) == "step=5 loss=1.0000 accuracy=0.5000"


@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, 123456.0, 1e30, -2.5, float("nan"), float("inf"), float("-inf")])
def test_step_line_any_value_matches_the_regular_expression(value: float) -> None:
    line = step_line(1, 9, {**METRICS, "loss": value, "grad_norm": value, "lr": value, "mine": value}, 3.0)
    assert STEP.fullmatch(line), line


def test_display_plain_prints_lines_in_order() -> None:
    stream, hand = io.StringIO(), Hand()
    with Display(20, 0, 10, stream, hand) as display:
        hand.at = 5.0
        display.advance(11)
        display.step(15, METRICS)
        display.evaluation(1, 4)
        display.evaluated(15, {"val_loss": 1.2})
        display.checkpoint(done=False)
        display.message("checkpoint at step 15")
    first, *rest = stream.getvalue().splitlines()
    assert STEP.fullmatch(first)
    assert "eta=0:00:05" in first  # five steps in five seconds, five to go
    assert rest == ["step=15 val_loss=1.2000", "checkpoint at step 15"]


def test_display_time_left_after_going_back_starts_anew() -> None:
    stream, hand = io.StringIO(), Hand()
    with Display(100, 0, 0, stream, hand) as display:
        for step, at in ((10, 10.0), (20, 20.0), (10, 30.0), (20, 50.0)):
            hand.at = at
            display.step(step, METRICS)
    assert "eta=0:02:40" in stream.getvalue().splitlines()[-1]


def test_display_other_rank_is_silent_but_logs(tmp_path: Path) -> None:
    stream = io.StringIO()
    logs = set_up_logs(tmp_path, 3)
    try:
        with Display(20, 3, 0, stream) as display:
            display.step(1, METRICS)
            display.message("hello")
    finally:
        logs.close()
    assert stream.getvalue() == ""
    lines = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("INFO shardwright: hello")


def test_display_message_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    Display(1, 0, 0, stream).message("a\x1b[2Jb\x07\rc\n[red]d[/red]")
    assert stream.getvalue() == "a\ufffd[2Jb\ufffd\ufffdc\n[red]d[/red]\n"


def test_display_table_is_text_without_terminal() -> None:
    from rich.table import Table

    table = Table("name", "value")
    table.add_row("loss", "1.5")
    stream = io.StringIO()
    Display(1, 0, 0, stream).show(table)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue() == render(table) + "\n"
    assert "loss" in stream.getvalue()


PROGRAM = """
import os, signal, sys, time
from trainer.metrics.display import Display
display = Display(30, 0)
display.message("reading data")
with display:
    for step in range(1, 31):
        time.sleep(0.01)
        display.advance(step)
        if step % 10 == 0:
            display.step(step, {"loss": 2.0, "tokens_per_s": 11000.0, "memory_mib": 403.0})
        if step == 20:
            for batch in range(3):
                display.evaluation(batch, 3)
            display.evaluated(step, {"val_loss": 1.5})
            print("printed by somebody else")
            if os.fork() == 0:
                print("printed by a child", flush=True)
                os._exit(0)
            os.wait()
            if sys.argv[1] == "error":
                raise ValueError("broken")
            if sys.argv[1] == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
display.message("all done")
"""


class Terminal:
    """Just enough of one to see what stands on the screen."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0
        self.cursor = True

    def feed(self, text: str) -> None:
        for escape, mode, char in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", text):
            if mode == "A":
                self.row = max(0, self.row - int(escape or 1))
            elif mode == "K":
                self.lines[self.row] = ""
            elif mode in "hl" and escape == "?25":
                self.cursor = mode == "h"
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif char:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1


def run_on_terminal(ending: str) -> tuple[Terminal, int, bool]:
    """The screen at the end, the exit code, and whether the terminal's settings are what they were."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    before = termios.tcgetattr(side)
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, ending], stdin=side, stdout=side, stderr=side, env=environment
    )
    seen = b""
    os.set_blocking(main, False)
    while True:
        done = process.poll() is not None
        try:
            seen += os.read(main, 1 << 16)
        except BlockingIOError:
            if done:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
    same = termios.tcgetattr(side) == before
    os.close(main)
    os.close(side)
    terminal = Terminal()
    terminal.feed(seen.decode())
    return terminal, process.returncode, same


def test_live_display_to_the_end_shows_messages_whole_and_the_last_state() -> None:
    terminal, code, same = run_on_terminal("end")
    assert code == 0
    assert same
    assert terminal.cursor
    shown = [line.rstrip() for line in terminal.lines if line.strip()]
    assert shown[:4] == ["reading data", "step=20 val_loss=1.5000", "printed by somebody else", "printed by a child"]
    assert re.fullmatch(r"step 30/30 .*100% \d:\d\d:\d\d 0:00:00 left", shown[4])
    assert shown[5:] == ["loss 2.0000  val 1.5000  11.0k tokens/s  403 MiB", "all done"]


@pytest.mark.parametrize(("ending", "word"), [("error", "ValueError: broken"), ("interrupt", "KeyboardInterrupt")])
def test_live_display_left_by_an_exception_leaves_the_terminal_sane(ending: str, word: str) -> None:
    terminal, code, same = run_on_terminal(ending)
    assert code != 0
    assert same
    assert terminal.cursor
    assert terminal.lines[-1] == ""  # the shell's prompt stands at the beginning of a line
    assert word in [line.rstrip() for line in terminal.lines]


def test_live_display_killed_leaves_a_visible_cursor() -> None:
    terminal, code, same = run_on_terminal("kill")
    assert code == -9
    assert same
    assert terminal.cursor


def test_text_forms() -> None:
    assert [compact(value) for value in (0, 93, 999, 11000, 110000, 1.5e6, 2e12)] == [
        "0", "93", "999", "11.0k", "110k", "1.50M", "2.00T",
    ]  # fmt: skip
    assert [duration(value) for value in (0, 80, 3661, 360000)] == ["0:00:00", "0:01:20", "1:01:01", "100:00:00"]
    assert [short(value) for value in (0, 1.23456, 1e-5, 1e7)] == ["0.0000", "1.2346", "1e-05", "1e+07"]
    assert printable("a\tb\r\nc\x00\x9b") == "a\tb\nc\ufffd\ufffd"
