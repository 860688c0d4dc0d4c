"""What launchers share whose job runs in an image with this package in it: image, variables, words, places."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from strategies.errors import ConfigError
from trainer.launch.base import LaunchJob
from trainer.secrets import redacted, redacted_words

OURS = re.compile(
    r"SHARDWRIGHT_(GRACE_S|SHOW|LAUNCHER)|((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|NNODES)"
    r"|PET_.*|TORCHELASTIC_.*|AWS_BATCH_.*|JOB_COMPLETION_INDEX"
)
_OUR_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
OURS_BY_NAME = ("train.py", "doctor.py")
"""Of this package, which the image has somewhere."""


def image(given: str | None) -> str:
    """The image's address.

    Raises:
        ConfigError: there is none, or it is none.
    """
    if given is None:
        raise ConfigError(
            "launch: which image? Give one that holds this package, such as that of scripts/container/Dockerfile, as "
            "registry/name:tag (launcher.image)."
        )
    name = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
    host = r"[\w.-]+(?::\d+)?"
    if not re.fullmatch(rf"(?:{host}/)?{name}(?:/{name})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", given):
        raise ConfigError(f"launch: {given!r} is no image. Write registry/name:tag (launcher.image).")
    return given


def refuse_numbers(settings: object, limits: Collection[tuple[str, int, int]]) -> None:
    """Whole numbers out of their range.

    Args:
        settings: a launcher.
        limits: field, least, most.

    Raises:
        ConfigError: names the key.
    """
    for key, least, most in limits:
        value = getattr(settings, key)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"launch: {key}={value} is not in {least} to {most} (launcher.{key}).")


def refuse_environment(environment: Mapping[str, str], secrets: Collection[str]) -> None:
    """Names that are none, that the job sets by itself, that are set twice, and secrets in plain sight.

    Raises:
        ConfigError: names the variable.
    """
    for name in (*environment, *secrets):
        key = f"launcher.{'environment' if name in environment else 'secrets'}.{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"launch: {name!r} is no variable's name. Use letters, digits and _ ({key}).")
        if OURS.fullmatch(name):
            raise ConfigError(f"launch: {name} is set in the job by itself. Leave it out ({key}).")
        if name in environment and redacted({name: environment[name]})[name] != environment[name]:
            raise ConfigError(
                f"launch: {name} looks like a secret, and whoever may describe the job could read it. Give it by "
                f"reference (launcher.secrets.{name})."
            )
        if name in environment and name in secrets:
            raise ConfigError(f"launch: {name} is a variable and a secret. Leave one of them out ({key}).")


def refuse_flags(words: Sequence[str]) -> None:
    """Words that aren't settings: the program that starts the processes would take them for its own.

    Raises:
        ConfigError: names the word.
    """
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"launch: {word} can't go along with a job. Write key=value words ({word}).")


def script_in_image(job: LaunchJob, script: str | None, folder: str | None) -> str | None:
    """Where the script lies in the image; None: it is this package's own that trains, and a name: another of its own.

    Args:
        job: names a script of this machine.
        script: `launcher.script`.
        folder: `launcher.workdir`, below which a script given by a relative path lies.

    Raises:
        ConfigError: nobody says where it lies there.
    """
    if script is not None:
        if not script.startswith("/") and folder is None:
            raise ConfigError(
                f"launch: script={script} lies below which folder of the image? Write it from / on, or give the "
                "folder (launcher.script, launcher.workdir)."
            )
        return script if script.startswith("/") else str(PurePosixPath(folder or "/", script))
    if job.script.resolve().parent == _OUR_SCRIPTS and job.script.name in OURS_BY_NAME:
        return None if job.script.name == OURS_BY_NAME[0] else job.script.name
    if folder is None or job.script.is_absolute():
        raise ConfigError(
            f"launch: where in the image does {job.script.name} lie? Give its path there, as in "
            f"launcher.script=/workspace/{job.script.name} (launcher.script)."
        )
    return str(PurePosixPath(folder, job.script.as_posix()))


def words_in_image(words: Sequence[str], run: str, root: str | None, mounted: Collection[str]) -> list[str]:
    """The job's words, with the run's folder on a volume that outlives the containers.

    Args:
        words: of the job.
        run: its name.
        root: `launcher.run_root`; None: as the words say.
        mounted: paths of volumes in the container.

    Raises:
        ConfigError: both say where, or no volume is there.
    """
    said = given(words, "run.dir")
    if root is None:
        return list(words)
    if said is not None:
        raise ConfigError(
            f"launch: run_root={root} and run.dir={said} both say where the run's files go. Leave one of them out "
            "(launcher.run_root, run.dir)."
        )
    if not is_on(root, mounted):
        where = ", ".join(sorted(mounted)) or "there is none"
        raise ConfigError(
            f"launch: run_root={root} lies on no volume ({where}), and would end with the container. Mount one there, "
            "as in launcher.volumes (launcher.run_root)."
        )
    return [*words, f"run.dir={root.rstrip('/')}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', run)}"]


def given(words: Sequence[str], key: str) -> str | None:
    """The value that the words give a key, as it is written; the last one counts."""
    found = [word.partition("=")[2] for word in words if re.match(rf"[+]*{re.escape(key)}=", word)]
    return found[-1].strip("'\"") if found else None


def outlives(words: Sequence[str], mounted: Collection[str]) -> bool:
    """Whether checkpoints stay when the containers are gone, as far as the words say."""
    places = [place for key in ("checkpoint.folder", "run.dir") if (place := given(words, key)) is not None]
    return any("://" in place or is_on(place, mounted) for place in places[:1])


def is_on(path: str, mounted: Collection[str]) -> bool:
    """Whether a path of the container lies on one of the mounted volumes."""
    return any(PurePosixPath(path).is_relative_to(place) for place in mounted)


def shared_remarks(job: LaunchJob, words: Sequence[str], secrets_belong: str, mounted: Collection[str]) -> list[str]:
    """What a person should know before it costs something.

    Args:
        job: what is started; the doctor leaves nothing behind.
        words: its own, and those that the launcher adds.
        secrets_belong: where to put them instead.
        mounted: paths of volumes in the container.
    """
    found = []
    if secret := [word.partition("=")[0] for word in words if redacted_words([word]) != [word]]:
        found.append(f"{', '.join(secret)}: whoever may describe the job can read it; {secrets_belong}")
    if job.script.name not in OURS_BY_NAME[1:] and not outlives(words, mounted):
        found.append(
            "the run's folder lies in the containers and ends with them, its checkpoints too: put it on a volume "
            "(launcher.volumes, launcher.run_root), or set checkpoint.folder=s3://bucket/prefix"
        )
    return found
