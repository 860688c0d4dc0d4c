"""The page about runs: well-formed, complete, closed to the network, and indifferent to what a run writes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics.events import EVENTS
from trainer.metrics.jsonl import MetricsFile
from trainer.report import read_run, write_page
from trainer.report.charts import draw_charts
from trainer.report.tables import checkpoints, config_table, summary_table, warnings

_VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """What a browser would find in a page; fails where elements don't nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements for key, value in attributes.items() if key == name and value]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def readings(self) -> dict[str, Any]:
        at = self.source.index(">", self.source.index('id="readings"')) + 1
        found: dict[str, Any] = json.loads(self.source[at : self.source.index("</script>", at)])
        return found


def make_run(folder: Path, steps: int = 40, lr: float = 1e-3) -> Path:
    folder.mkdir(parents=True)
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, steps + 1):
            times = {"data_s": 0.01, "compute_s": 0.08, "communication_s": 0.01, "checkpoint_s": 0.0}
            numbers = {"loss": 1 + 4 * math.exp(-step / 10), "grad_norm": 1.0, "lr": lr, "tokens": step * 64.0}
            file.write(step, {**numbers, "tokens_per_s": 640.0, "step_s": 0.1, **times, "memory_mib": 100.0})
            if step % 20 == 0:
                file.write(step, {"val_loss": 2.0, "val_accuracy": 0.5})
    (folder / "config.yaml").write_text(f"optimizer: {{lr: {lr}, betas: [0.9, 0.95]}}\nmodel: {{path: null}}\n")
    (folder / "environment.json").write_text(
        json.dumps({"packages": {"torch": "2.13"}, "host": "vm", "command": ["train.py", f"optimizer.lr={lr}"]})
    )
    write_events(folder, ("start", 0, {}), ("checkpoint", 20, SAVED), ("end", steps, {"outcome": "finished"}))
    return folder


SAVED = {"seconds": 2.5, "stall_s": 0.25, "bytes": 3 * 2**20}


def write_events(folder: Path, *events: tuple[str, int, dict[str, Any]]) -> None:
    start = {"strategy": "ddp", "world_size": 2, "device": "cpu", "host": "vm", "last_seen_step": 0}
    lines = [
        {"event": name, "time": "2026-11-21T06:30:15+00:00", "step": step, **(start if name == "start" else {}), **more}
        for name, step, more in events
    ]
    (folder / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(*folders: Path) -> Page:
    path = folders[0].parent / "page.html"
    write_page([read_run(folder) for folder in folders], path)
    return Page(path)


def marks_of(folder: Path) -> list[tuple[float, str]]:
    [loss] = [chart for chart in draw_charts([read_run(folder)]) if chart.title == "Loss"]
    return [(mark["x"], mark["text"]) for mark in loss.data["marks"]]


# The page.


def test_page_needs_nothing_else_and_says_so_to_the_browser(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert not {"src", "srcset", "action", "data", "background", "xlink:href"} & {
        key for _, attributes in page.elements for key in attributes
    }
    assert all(value.startswith("#") for value in page.attributes("href"))
    assert "://" not in page.source
    assert not re.search(r"@import|url\((?!#)", page.source)
    [policy] = [value for value in page.attributes("content") if "default-src" in value]
    assert policy.startswith("default-src 'none';")
    code = page.source.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_page_ids_are_unique_and_every_reference_leads_somewhere(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", 30, 2e-3))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)
    assert used
    assert set(used) <= set(ids)


def test_page_shows_every_part(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    for title in ("Loss", "Loss by tokens", "Gradient norm", "Learning rate", "Tokens per second",
                  "Where the time of a step goes", "Peak memory of rank 0 (MiB)", "val_accuracy"):  # fmt: skip
        assert title in page.texts
    for said in ("optimizer.betas", "[0.9, 0.95]", "packages.torch", "finished: ", "ddp, 2 x cpu", "compute 80.0%",
                 "3.0 MiB", "2.50 s", "0.25 s", "2026-11-21 06:30:15"):  # fmt: skip
        assert said in page.text, said
    curves = page.readings["chart-0"]["series"]
    assert [curve["name"] for curve in curves] == ["train", "train, smoothed", "validation"]
    assert (curves[2]["x"], curves[2]["y"]) == ([20, 40], [2.0, 2.0])
    assert page.attributes("class").count("plot") == len(page.readings) == 8


def test_page_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror='a()'> $\\frac{ \" & \u202e"
    run = make_run(tmp_path / "<i>run")
    write_events(
        run,
        ("start", 0, {"strategy": evil, "host": evil}),
        ("continuity", 9, {"text": evil}),
        ("start", 5, {"strategy": "ddp", "changes": [evil], "checkpoint": evil, "time": evil}),
        ("end", 40, {"outcome": evil, "reason": evil}),
    )
    (run / "config.yaml").write_text(json.dumps({evil: evil}))
    (run / "environment.json").write_text(json.dumps({"host": evil, "command": [evil]}))
    (run / "summary.json").write_text(json.dumps({"reason": evil, "step": 1}))
    with MetricsFile(run / "metrics.jsonl", 40) as file:
        file.write(41, {evil: 1.0})
    page = page_of(run)
    assert [tag for tag, _ in page.elements if tag in ("script", "img", "i")] == ["script", "script"]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert evil in page.texts


def test_page_of_several_runs_shows_them_side_by_side(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", 60, lr=2e-3)
    page = page_of(first, second)
    assert {"show-0", "show-1", "only-differences"} <= set(page.attributes("id"))
    names = {curve["name"] for curve in page.readings["chart-0"]["series"]}
    assert {"a train, smoothed", "b validation"} <= names
    assert {"run-0", "run-1"} <= set(page.attributes("class"))
    rows = {row.name: row for row in config_table([read_run(first), read_run(second)])}
    assert (rows["optimizer.lr"].values, rows["optimizer.lr"].differs) == (["0.001", "0.002"], True)
    assert rows["optimizer.lr"].chosen
    assert not rows["optimizer.betas"].differs
    assert not rows["optimizer.betas"].chosen


def test_page_is_the_same_each_time_but_for_its_date(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sources = [re.sub(r"written [\d: -]+", "", page_of(run).source) for _ in range(2)]
    assert sources[0] == sources[1]


# Marks.


def test_marks_kill_resume_and_another_spread(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_events(
        run,
        ("start", 0, {}),
        ("start", 10, {"last_seen_step": 17}),
        ("end", 30, {"outcome": "stopped"}),
        ("start", 30, {"strategy": "fsdp_full", "world_size": 4}),
        ("continuity", 31, {"text": "the loss jumped"}),
        ("end", 40, {"outcome": "failed", "reason": "OutOfMemory"}),
    )
    found = marks_of(run)
    assert [x for x, _ in found] == [17, 10, 30, 31, 40]
    for (_, text), said in zip(found, ("killed", "started again", "2 → 4 ranks", "jumped", "OutOfMemory"), strict=True):
        assert said in text
    page = page_of(run)
    assert page.texts.count("ddp → fsdp_full, 2 → 4 ranks") == 9  # over the 8 charts, and in the history
    assert "var(--kill)" in page.source
    assert [each.kind for each in warnings(read_run(run))] == ["kill", "warning", "failure"]


def test_marks_outside_of_a_curve_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_events(run, ("start", 0, {}), ("start", 30, {"last_seen_step": 4000}))
    assert [x for x, _ in marks_of(run)] == [30]


def test_marks_of_many_kills_leave_the_curves_visible(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_events(run, *[("start", step // 5, {"last_seen_step": step // 5, "world_size": step}) for step in range(200)])
    assert len(marks_of(run)) > 300
    page = page_of(run)
    assert "and 191 earlier: see History" in page.text  # 199 kills, 8 are shown
    assert page.texts.count("1 → 2 ranks") == 1  # in the history; the charts have no room for words


# Runs that are not whole.


def test_run_killed_before_its_first_line_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    assert "Nothing was logged yet." in page_of(run).text
    assert "no start noted" in page_of(run).text
    write_events(run, ("start", 0, {}))
    (run / "metrics.jsonl").write_text("")
    assert "no end noted: still going, or killed" in page_of(run).text


@pytest.mark.parametrize("name", ["metrics.jsonl", EVENTS, "config.yaml", "environment.json", "summary.json"])
@pytest.mark.parametrize("damage", ["torn", "garbage", "list", "gone"])
def test_run_with_a_damaged_file_has_a_page(tmp_path: Path, name: str, damage: str) -> None:
    run = make_run(tmp_path / "run", 4)
    (run / "summary.json").write_text('{"reason": "x", "step": 4}')
    path = run / name
    data = path.read_bytes()
    changed = {"torn": data[:-3], "garbage": b"\xff\x00{]: *a\n" + data[:5], "list": b"[1, 2]"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    found = read_run(run)
    assert summary_table([found])[0].name == "state"
    assert (config_table([found]) == []) == (name == "config.yaml")
    if damage in ("torn", "garbage"):
        assert "Summary" in page_of(run).texts


def test_run_with_numbers_that_are_not_finite_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with MetricsFile(run / "metrics.jsonl", 40) as file:
        file.write(41, {"loss": math.nan, "grad_norm": math.inf})
        file.write(42, {"loss": math.nan})
    assert "not finite at 2 logged step(s), first at 41" in page_of(run).text


def test_run_with_nothing_finite_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with MetricsFile(run / "metrics.jsonl") as file:
        file.write(1, {"loss": math.nan, "lr": math.inf, "step_s": math.nan})
    assert "first at 1" in page_of(run).text


def test_run_checkpoints_newest_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4)
    write_events(run, ("checkpoint", 2, SAVED), ("checkpoint", 4, {"seconds": 90, "stall_s": None, "bytes": 5}))
    assert [(each.step, each.seconds, each.stall, each.size) for each in checkpoints(read_run(run))] == [
        ("4", "0:01:30", "-", "5 B"), ("2", "2.50 s", "0.25 s", "3.0 MiB"),
    ]  # fmt: skip


def test_run_of_many_steps_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    values = [50.0 if step == 4321 else 1.0 for step in range(9000)]
    lines = [json.dumps({"step": step, "grad_norm": value}) for step, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    [chart] = draw_charts([read_run(run)])
    assert all(len(curve["x"]) <= 2000 for curve in chart.data["series"])
    assert max(chart.data["series"][0]["y"]) > 1.0


# The command.


def report(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    from trainer.cli import main

    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, words)])
    return int(end.value.code or 0), *capsys.readouterr()


def test_report_one_run_lies_in_its_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = report(capsys, make_run(tmp_path / "run"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert Page(tmp_path / "run" / "report.html").texts.count("run") >= 1


def test_report_several_runs_lie_beside_the_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = report(capsys, make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"))
    assert (code, err) == (0, "")
    page = Page(tmp_path / "x" / "report.html")
    assert "x/run, y/run" in page.texts


def test_report_open_shows_the_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    page = tmp_path / "deep" / "er" / "page.html"
    assert report(capsys, make_run(tmp_path / "run", 4), "--open", "--output", page)[0] == 0
    assert shown == [page.as_uri()]


@pytest.mark.parametrize("words", [["{run}", "{missing}"], ["{empty}"], ["{run}", "--output", "{empty}"], []])
def test_report_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run", 4)
    places = {name: tmp_path / name for name in ("run", "empty", "missing")}
    code, _, err = report(capsys, *[word.format(**places) for word in words])
    assert code == 2
    [line] = err.splitlines()
    assert "report" in line
