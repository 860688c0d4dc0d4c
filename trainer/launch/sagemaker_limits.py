"""What SageMaker takes and what it doesn't, as far as it can be known before anything is sent."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Mapping

from strategies.errors import ConfigError
from trainer.sagemaker.hyperparameters import MOST_CHARACTERS, PIECE
from trainer.sagemaker.metric_definitions import LONGEST, MOST

MOST_HYPERPARAMETERS = 100
_MOST_ENVIRONMENT = 100
_LONGEST_ENVIRONMENT = 512
_MOST_TAGS = 50
_MOST_CHANNELS = 20
WITH_SMDDP = ("ml.p4d.24xlarge", "ml.p4de.24xlarge")
_WITH_EFA = re.compile(
    r"ml\.(p3dn\.24|p4de?\.24|p5(e|en)?\.48|p6-\w+\.48|p6e-\w+\.36|trn1n?\.32|trn2\.48|g4dn\.(8|12|16)"
    r"|g(5|6|6e)\.(8|12|16|24|48)|g7e?\.(8|12|24|48)|c5n\.(9|18)|c6i\.32|m6i\.32|c7i\.48|m7i\.48|r7i\.48)xlarge"
)
_OURS = re.compile(
    r"SHARDWRIGHT_(SCRIPT|PROCESSES|MAX_RESTARTS)|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|SM_.*"
)


def instance_type(given: str | None) -> str:
    """The name with `ml.` in front.

    Raises:
        ConfigError: there is none, or it has another form.
    """
    if given is None:
        raise ConfigError("launch: which machine? Give one, such as ml.g5.2xlarge (launcher.instance_type).")
    name = given.strip().lower()
    name = name if name.startswith("ml.") else f"ml.{name}"
    if not re.fullmatch(r"ml\.[a-z][a-z0-9]*(-[a-z0-9]+)?\.(medium|large|[1-9]\d*xlarge|xlarge)", name):
        raise ConfigError(
            f"launch: instance_type={given} is no instance type. Write it as in ml.p4d.24xlarge "
            "(launcher.instance_type)."
        )
    return name


def has_efa(name: str) -> bool:
    """Whether hosts of this type talk past the kernel, as far as is known here."""
    return _WITH_EFA.fullmatch(name) is not None


def place(given: str | None) -> str:
    """`bucket/prefix` as an address without a slash at its end.

    Raises:
        ConfigError: there is none, or it is no address of S3.
    """
    if given is None:
        raise ConfigError(
            "launch: where do code, checkpoints and models go? Give a bucket and a prefix of yours, as in "
            "launcher.bucket=my-bucket/training (launcher.bucket)."
        )
    return address(given, "launcher.bucket")


def address(given: str, key: str) -> str:
    """The same for any key."""
    text = given.strip().removeprefix("s3://").rstrip("/")
    bucket, _, prefix = text.partition("/")
    if (
        not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket)
        or not re.fullmatch(r"[\w!.*'()/=+@-]*", prefix, re.ASCII)
        or "//" in text
        or len(text) > 800
    ):
        raise ConfigError(f"launch: {given!r} is no place in S3. Write bucket/prefix ({key}).")
    return f"s3://{text}"


def split_address(given: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`."""
    bucket, _, prefix = given.removeprefix("s3://").partition("/")
    return bucket, prefix


def image(given: str | None) -> str:
    """The image's address.

    Raises:
        ConfigError: there is none, or it is none.
    """
    if given is None:
        raise ConfigError(
            "launch: which image? Take pytorch-training or huggingface-pytorch-training of AWS, with Python 3.11 or "
            "newer and torch 2.6 or newer: 763104351884.dkr.ecr.REGION.amazonaws.com/pytorch-training:TAG; the tags "
            "are listed at aws.github.io/deep-learning-containers (launcher.image)."
        )
    if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", given) or len(given) > 255:
        raise ConfigError(f"launch: {given!r} is no image. Write registry/name:tag (launcher.image).")
    return given


def role(given: str | None) -> str:
    """The ARN of the job's role.

    Raises:
        ConfigError: there is none, or it is no ARN.
    """
    example = "arn:aws:iam::123456789012:role/training"
    if given is None:
        raise ConfigError(
            f"launch: which role do the machines take? Give an ARN such as {example}; it needs "
            "AmazonSageMakerFullAccess, or what that says of training jobs and your bucket (launcher.role)."
        )
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", given):
        raise ConfigError(f"launch: role={given} is no role's ARN. Write it as in {example} (launcher.role).")
    return given


def refuse_environment(environment: Mapping[str, str]) -> None:
    """What the service doesn't take, and what the job sets by itself.

    Raises:
        ConfigError: names the variable.
    """
    for name, value in environment.items():
        key = f"launcher.environment.{name}"
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,511}", name):
            raise ConfigError(f"launch: {name!r} is no variable's name. Use letters, digits and _ ({key}).")
        if _OURS.fullmatch(name):
            raise ConfigError(f"launch: {name} is set in the job by itself. Leave it out ({key}).")
        if len(value) > _LONGEST_ENVIRONMENT:
            raise ConfigError(
                f"launch: {name} has {len(value)} characters, SageMaker takes {_LONGEST_ENVIRONMENT}. Put it into a "
                f"file of a channel, or a secret of Secrets Manager ({key})."
            )
    _refuse_more(len(environment), _MOST_ENVIRONMENT - 10, "variables", "launcher.environment")


def refuse_tags(tags: Mapping[str, str]) -> None:
    """What the service doesn't take.

    Raises:
        ConfigError: names the tag.
    """
    for name, value in tags.items():
        if not 1 <= len(name) <= 128 or len(value) > 256 or name.lower().startswith("aws:"):
            raise ConfigError(
                f"launch: the tag {name}={value} isn't taken: names have 1 to 128 characters and don't begin with "
                f"aws:, values have 256 at most (launcher.tags.{name})."
            )
    _refuse_more(len(tags), _MOST_TAGS, "tags", "launcher.tags")


def refuse_metrics(definitions: Mapping[str, str]) -> None:
    """What the service doesn't take.

    Raises:
        ConfigError: names the metric.
    """
    for name, regex in definitions.items():
        key = f"launcher.metric_definitions.{name}"
        if not 1 <= len(name) <= 255 or not 1 <= len(regex) <= LONGEST:
            raise ConfigError(f"launch: the regex of {name} has {len(regex)} characters, not 1 to {LONGEST} ({key}).")
        try:
            groups = re.compile(regex).groups
        except re.error as error:
            raise ConfigError(f"launch: the regex of {name} can't be read: {error} ({key}).") from error
        if groups == 0:
            raise ConfigError(f"launch: the regex of {name} has no group for the value. Put ( ) around it ({key}).")
    _refuse_more(len(definitions), MOST, "metrics, ours among them", "launcher.metric_definitions")


def refuse_hyperparameters(given: Mapping[str, str]) -> None:
    """What the service doesn't take, and names at which torchrun would stumble.

    Raises:
        ConfigError: names the hyperparameter.
    """
    for name, value in given.items():
        key = f"launcher.hyperparameters.{name}"
        if name.startswith(("sagemaker_", PIECE)):
            raise ConfigError(f"launch: the hyperparameter {name} is set by itself. Leave it out ({key}).")
        if len(name) > 256 or len(value) > MOST_CHARACTERS:
            raise ConfigError(
                f"launch: the hyperparameter {name} has {len(value):,} characters, SageMaker takes "
                f"{MOST_CHARACTERS:,} ({key})."
            )
        if stumbling := torchrun_takes(name):
            raise ConfigError(
                f"launch: torchrun would take --{name} for its own {stumbling}, wherever it stands. Rename the "
                f"hyperparameter ({key})."
            )


def torchrun_takes(name: str) -> str | None:
    """The option of torchrun that `--name` could stand for; argparse takes beginnings, also after the script's name."""
    import logging

    logging.disable(logging.WARNING)  # torch says here that it has no Triton
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            from torch.distributed.run import get_args_parser
    finally:
        logging.disable(logging.NOTSET)
    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    flag = f"-{name}" if len(name) == 1 else f"--{name}"
    begins = [option for option in options if option == flag or option.startswith(f"--{name}")]
    return begins[0] if begins else None


def refuse_channels(names: Collection[str]) -> None:
    """More than the service takes.

    Raises:
        ConfigError: says how many.
    """
    _refuse_more(len(names), _MOST_CHANNELS - 1, "channels besides the code", "launcher.channels")


def _refuse_more(found: int, most: int, what: str, key: str) -> None:
    if found > most:
        raise ConfigError(f"launch: {found} {what}, SageMaker takes {most}. Leave some out ({key}).")
