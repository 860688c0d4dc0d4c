"""The dashboard and the alert rules: they speak of numbers that there are. What they say is tested by Prometheus itself
(`test_prometheus.py`)."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from strategies.errors import ConfigError
from tests.trainer.commands.jobs import ROOT
from trainer.cli import main
from trainer.metrics.memory import host_memory
from trainer.metrics.prometheus.alerts import alert_rules
from trainer.metrics.prometheus.catalogue import BY_NAME, FAMILIES, exposed
from trainer.metrics.prometheus.dashboard import dashboard

_NAME = re.compile(r"shardwright[_:][a-z_]+")
_PATTERN = re.compile(r"__name__=~\"([^\"]+)\"")


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(alert_rules())["groups"]
    return list(group["rules"])


def unknown_names(expression: str) -> set[str]:
    """Names in an expression that neither the endpoint nor a rule gives."""
    known = {*BY_NAME, *(rule["record"] for rule in rules() if "record" in rule)}
    return set(_NAME.findall(_PATTERN.sub("", expression))) - known


# The catalogue.


def test_catalogue_follows_prometheus_conventions() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"shardwright(_[a-z]+)+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert not re.search(r"_(s|ms|mib|gib|mb)(_|$)", family.name)
        assert family.help.endswith(".")
    families = [family.name.removesuffix("_total") for family in FAMILIES]
    assert len(set(families)) == len(families)  # OpenMetrics calls a counter without its _total


def test_catalogue_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(shardwright_\w+)` \| (\w+) \| (.+?) \| (?:`(\w+)`)? *\|$", page, re.MULTILINE)
    assert rows == [(each.name, each.kind, each.help, each.logged) for each in FAMILIES]


def test_every_alert_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    alerts = {rule["alert"].removeprefix("Shardwright") for rule in rules() if "alert" in rule}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) - {*BY_NAME} == alerts


# The alerts.


def test_alerts_speak_of_numbers_that_there_are() -> None:
    for rule in rules():
        assert unknown_names(rule["expr"]) == set(), rule
    assert unknown_names("max(shardwright_los) > 1") == {"shardwright_los"}  # the check can fail


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    names = [rule["alert"] for rule in alerts]
    assert len(set(names)) == len(names) >= 12
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "$labels.run" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 40
        value, comparison = re.split(r"\n(?=[<>=!]+ )", rule["expr"], maxsplit=1)
        assert value.count("(") == value.count(")")
        assert re.match(r"(>|<|==|!=) [\d.]+\n", comparison)


def test_alerts_take_thresholds_of_ones_own() -> None:
    before = alert_rules().splitlines()
    after = alert_rules({"ShardwrightRunStalled": 600, "DiskFull": 0.125}).splitlines()
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [("> 300", "> 600"), ("< 0.05", "< 0.125")]


@pytest.mark.parametrize(
    ("name", "part"), [("RunStaled", "Nearest: RunStalled"), ("CheckpointHangs", "with a threshold")]
)
def test_alert_that_takes_no_threshold_is_refused(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{part}"):
        alert_rules({name: 1})


# The dashboard.


def test_dashboard_speaks_of_numbers_that_there_are() -> None:
    expressions = re.findall(r'"(?:expr|query|definition)": "((?:[^"\\]|\\.)*)"', json.dumps(dashboard()))
    assert len(expressions) > 35
    for expression in expressions:
        assert unknown_names(expression.replace('\\"', '"')) == set()


def test_dashboard_shows_every_number() -> None:
    text = json.dumps(dashboard())
    shown = {name for name in BY_NAME if re.search(rf"{name}\b", text)}
    elsewhere = {"checkpoints_total", "saving", "samples_total", "samples_per_second", "start_timestamp_seconds"}
    assert set(BY_NAME) - shown <= {f"shardwright_{name}" for name in elsewhere}


def test_dashboard_is_one_that_grafana_can_lay_out() -> None:
    found = dashboard()
    panels = found["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    places = [(panel["gridPos"], panel["title"]) for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place, _ in places)
    for (one, a), (other, b) in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (a, b)
    variables = {each["name"] for each in found["templating"]["list"]}
    for panel in panels:
        targets = panel.get("targets", [])
        assert bool(targets) == (panel["type"] != "row")
        assert len({target["refId"] for target in targets}) == len(targets)
        for target in targets:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
            assert target["expr"].count("(") == target["expr"].count(")")
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)


# The command.


def monitoring(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["monitoring", *words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_monitoring_writes_what_prometheus_and_grafana_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "watch"
    words = (str(folder), str(tmp_path / "runs" / "first"), "--threshold", "RunStalled=60")
    code, out, err = monitoring(capsys, *words)
    assert (code, err) == (0, "")
    assert f"logger.prometheus.targets={folder}/targets" in out
    assert "--web.listen-address=127.0.0.1:9090" in out
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    [job] = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [
        f"{folder}/targets/*.json",
        f"{tmp_path}/runs/first/prometheus/*.json",
    ]
    assert (folder / "targets").is_dir()
    assert (folder / "alerts.yml").read_text() == alert_rules({"RunStalled": 60})
    assert json.loads((folder / "dashboard.json").read_text()) == dashboard()
    assert monitoring(capsys, *words)[0] == 0  # the same again


def test_monitoring_leaves_changed_files_alone_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alerts.yml").write_text("mine")
    code, out, err = monitoring(capsys, str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "alerts.yml" in err
    assert "--force" in err
    assert [path.name for path in tmp_path.iterdir()] == ["alerts.yml"]
    assert monitoring(capsys, str(tmp_path), "--force")[0] == 0
    assert (tmp_path / "alerts.yml").read_text() == alert_rules()


@pytest.mark.parametrize("word", ["RunStalled", "RunStalled=soon", "RunStalled=nan", "Nothing=3"])
def test_monitoring_threshold_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    code, out, err = monitoring(capsys, str(tmp_path), "--threshold", word)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word.partition("=")[0] in err


# The memory of a container.


def test_host_memory_within_a_container_is_its_own(tmp_path: Path) -> None:
    whole = host_memory(tmp_path)
    assert 0 < whole[0] < whole[1]
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path)[1] == whole[1]
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2**28}\ninactive_file {2**28}\n")
    assert host_memory(tmp_path) == (2**30 - 2**29 + 2**28, 2**30)


def test_exposed_name_of_a_logged_number_is_the_catalogue_s() -> None:
    for family in FAMILIES:
        if family.logged:
            assert exposed(family.logged) is family
