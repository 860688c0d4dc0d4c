"""What Slurm's options may be: refused here in one line, before anything is written or sent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from strategies.errors import ConfigError
from trainer.secrets import redacted_words

_NAMES = {
    "partition": (r"[\w.+-]+(,[\w.+-]+)*", "gpu, or several as in gpu,reserve"),
    "account": (r"[\w.@+-]+", "research"),
    "qos": (r"[\w.@+-]+", "normal"),
    "constraint": (r"[\w.,:=&|*\[\]()+-]+", "p5, or p4d|p5"),
}
_LONGEST_SIGNAL_S = 65535
"""Slurm keeps it in 16 bits."""
_OF_SBATCH = {
    **{key: f"launcher.{key}" for key in ("nodes", "partition", "account", "qos", "constraint", "time", "exclusive")},
    "ntasks-per-node": "launcher.processes",
    "ntasks": "launcher.nodes and launcher.processes",
    "cpus-per-task": "launcher.cpus_per_process",
    "gpus-per-node": "launcher.gpus_per_node",
    "signal": "launcher.stop_before",
    "requeue": "launcher.max_requeues",
    "no-requeue": "launcher.max_requeues",
    "job-name": "--name",
    "array": "--multirun",
    **dict.fromkeys(("output", "error", "open-mode", "chdir"), "run.dir"),
}
"""Option -> what says it here."""
_OF_SRUN = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "launcher.nodes and launcher.processes"),
    "cpus-per-task": "launcher.cpus_per_process",
    "gpus-per-node": "launcher.gpus_per_node",
    "container-image": "launcher.container_image",
    "container-mounts": "launcher.container_mounts",
}
_ONE_GPU_EACH = ("gpus-per-task", "gpu-bind", "ntasks-per-gpu")
_UNFIT = ("wrap", "wait", "parsable", "test-only", "kill-on-bad-exit", "export", "auto-resume", "container-workdir",
          "label", "pty", "multi-prog", "jobid", "job-id", "input")  # fmt: skip
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_SET_BY_ITSELF = re.compile(
    r"SLURM_.*|SBATCH_.*|SHARDWRIGHT_(GRACE_S|ENDS)|((LOCAL_|GROUP_)?(RANK|WORLD_SIZE))|TORCHELASTIC_.*"
)


def name(key: str, given: str | None) -> None:
    """A partition, account, QOS or constraint.

    Raises:
        ConfigError: Slurm would take it for something else.
    """
    form, example = _NAMES[key]
    if given is not None and not re.fullmatch(form, given):
        raise ConfigError(f"launch: {key}={given!r} can't be Slurm's. Write it like {example} (launcher.{key}).")


def whole_seconds(given: str, key: str) -> int:
    """A duration: `90m`, `2h`, `1d`, `HH:MM:SS` or `D-HH:MM:SS`.

    Raises:
        ConfigError: it is none, or a number of something.
    """
    text = given.strip()
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        found = float(match[1]) * units[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        if minutes > 59 or seconds > 59 or (match[1] and hours > 23):
            raise ConfigError(f"launch: {key}={given} has more than 59 minutes or 23 hours ({key}).")
        found = 86400 * days + 3600 * hours + 60 * minutes + seconds
    else:
        unit = f"{text}m (minutes, as sbatch means it)" if text.isdecimal() else "90m, 2h, 1d, HH:MM:SS or D-HH:MM:SS"
        raise ConfigError(f"launch: {key}={given!r} is no duration. Write {unit} ({key}).")
    if found < 1:
        raise ConfigError(f"launch: {key}={given} is no time at all ({key}).")
    return int(found)


def as_slurm(seconds: int) -> str:
    """`D-HH:MM:SS`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"


def refuse_stop_before(time: str | None, stop_before: str) -> None:
    """The signal has to come after the start.

    Raises:
        ConfigError: it wouldn't, or Slurm can't note it.
    """
    before_s = whole_seconds(stop_before, "launcher.stop_before")
    if before_s > _LONGEST_SIGNAL_S:
        raise ConfigError(f"launch: stop_before={stop_before} is more than 18 hours (launcher.stop_before).")
    # Slurm looks once a minute, and may tell the job up to a minute early.
    if time is not None and whole_seconds(time, "launcher.time") < before_s + 60:
        raise ConfigError(
            f"launch: time={time} leaves no time to train: the job is told to stop {stop_before} before its end, or up "
            "to a minute earlier. Ask for more time, or be told later (launcher.time, launcher.stop_before)."
        )


def refuse_options(given: Mapping[str, str], key: str) -> None:
    """Further options of sbatch or srun.

    Args:
        given: option without dashes -> value; empty: it has none.
        key: `sbatch` or `srun`.

    Raises:
        ConfigError: one is none, is said elsewhere, or breaks what the script relies on.
    """
    for option, value in given.items():
        where = f"launcher.{key}.{option}"
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", option) or len(option) < 2:
            raise ConfigError(f"launch: {key}.{option} is no option. Write its long name, as in {key}.mem=0 ({where}).")
        said = (_OF_SBATCH if key == "sbatch" else _OF_SRUN).get(option)
        if said is not None:
            raise ConfigError(f"launch: {key}.{option}={value} is said by {said} here. Use that ({where}).")
        if option in _ONE_GPU_EACH:
            raise ConfigError(
                f"launch: {key}.{option}={value} would show each process one GPU, which it would look for under its "
                f"own number. Ask for GPUs with launcher.gpus_per_node ({where})."
            )
        if option in _UNFIT:
            raise ConfigError(
                f"launch: {key}.{option} would break what the script does with its processes. Leave it out ({where})."
            )
        if not _is_line(value):
            raise ConfigError(f"launch: {key}.{option}={value!r} isn't one line of text ({where}).")


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Variables that can't be set, that Slurm or the script sets, or whose value is a secret.

    Raises:
        ConfigError: names the variable.
    """
    for variable, value in environment.items():
        where = f"launcher.environment.{variable}"
        if not _VARIABLE.fullmatch(variable):
            raise ConfigError(f"launch: {variable!r} is no variable's name ({where}).")
        if _SET_BY_ITSELF.fullmatch(variable):
            raise ConfigError(f"launch: {variable} is set in the job by itself. Leave it out ({where}).")
        if not _is_line(value):
            raise ConfigError(f"launch: {variable}={value!r} isn't one line of text ({where}).")
        if redacted_words([f"{variable}={value}"]) != [f"{variable}={value}"]:
            raise ConfigError(
                f"launch: {variable} is a secret, and the script is a file. Export it before this command: sbatch "
                f"passes the environment on ({where})."
            )


def refuse_setup(lines: Sequence[str]) -> None:
    """Lines of shell that hold a secret, or are several.

    Raises:
        ConfigError: which one.
    """
    for line in lines:
        if not _is_line(line) or not line.strip():
            raise ConfigError(f"launch: setup={line!r} isn't one line of shell (launcher.setup).")
        looked_up = re.sub(r"\w+=[\"']?\$\S*", "", line)  # read from elsewhere: what one should do
        if redacted_words([looked_up]) != [looked_up]:
            raise ConfigError(
                f"launch: the set-up line {redacted_words([line])[0]!r} holds a secret, and the script is a file. "
                "Export it before this command, or read it from a file there (launcher.setup)."
            )


def refuse_secrets(words: Sequence[str]) -> None:
    """Words of the job whose values nobody else should read.

    Raises:
        ConfigError: names the key.
    """
    for word in words:
        if redacted_words([word]) != [word] and "${oc.env:" not in word:
            key = word.partition("=")[0].lstrip("+~")
            raise ConfigError(
                f"launch: {key} is a secret, and the script is a file. Export it as a variable before this command, "
                f"which sbatch passes on, and write {key}='${{oc.env:NAME}}' ({key})."
            )


def refuse_container(image: str | None, mounts: Sequence[str]) -> None:
    """What pyxis can't read.

    Raises:
        ConfigError: a mount isn't `from:to`, or there is nothing to mount into.
    """
    if image is None and mounts:
        raise ConfigError(
            f"launch: container_mounts={list(mounts)} and no container. Give launcher.container_image, or leave them "
            "out (launcher.container_mounts)."
        )
    if image is not None and (not image.strip() or re.search(r"\s", image)):
        raise ConfigError(
            f"launch: container_image={image!r} is no image. Give a squashfs file, or registry#name:tag "
            "(launcher.container_image)."
        )
    for mount in mounts:
        if not re.fullmatch(r"[^:,\s]+(:/[^:,\s]*(:[\w+]+)?)?", mount):
            raise ConfigError(
                f"launch: container_mounts={mount!r} is no mount. Write /from:/to, /from:/to:ro or /same "
                "(launcher.container_mounts)."
            )


def refuse_path(path: Path, key: str) -> None:
    """Of the job's log, which Slurm reads as a pattern.

    Raises:
        ConfigError: there is no way to write it.
    """
    if "\\" in str(path) or not _is_line(str(path)):
        raise ConfigError(f"launch: {str(path)!r} can't be the place of a job's log. Choose another folder ({key}).")


def _is_line(text: str) -> bool:
    return text.replace("\t", " ").isprintable()
