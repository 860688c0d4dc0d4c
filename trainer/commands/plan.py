"""Predict what a configuration takes and costs, for each way to spread it, without training."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from strategies.activations import ActivationCheckpointing
    from strategies.base import Strategy
    from trainer.planner.cluster import Machines
    from trainer.planner.search import Wanted


def parser() -> Parser:
    """`shardwright plan`'s own options."""
    found = Parser(
        "plan",
        "Predict what a configuration takes on each rank, how fast it is and what it costs, for the strategy that is "
        "chosen, or for each one if none is; best first. Trains nothing, and needs none of the machines: say which "
        "with cluster=p5 (see conf/cluster). Without a cluster only memory is predicted, for --ranks processes. "
        "Writes plan.json and plan.png into run.dir if that is given.",
    )
    found.add_argument("--ranks", type=_at_least_one, default=1, metavar="N", help="processes, without a cluster")
    found.add_argument(
        "--nodes", type=_numbers, metavar="N,N,...", help="numbers of nodes to compare; default: cluster.nodes"
    )
    found.add_argument("--tokens", type=_positive, metavar="N", help="to train on: shows days and money; such as 1e12")
    found.add_argument(
        "--overhead", type=_share, default=0.0, metavar="SHARE", help="of the time, lost to saves and restarts; 0 to 1"
    )
    found.add_argument("--top", type=_at_least_one, default=20, metavar="N", help="candidates to show; default: 20")
    found.add_argument(
        "--cast", action="store_true",
        help="as programs run that cast weights for the step (FSDP2's MixedPrecisionPolicy, DeepSpeed's bf16); "
        "ours keep them in fp32, with autocast",
    )  # fmt: skip
    found.add_argument(
        "--sensitivity", action="store_true", help="show how far a change of each efficiency factor moves the answer"
    )
    found.add_argument("keys", nargs="*", metavar="key=value", help="as for shardwright train, and cluster=...")
    return found


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000_000:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_at_least_one(part.strip()) for part in text.split(",")]


def _positive(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 1 <= found <= 1e18:
        raise ArgumentTypeError(f"{text!r} is not a number of tokens, from 1 to 1e18")
    return found


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise ArgumentTypeError(f"{text!r} is not a share, from 0 to below 1")
    return found


def main(options: Namespace) -> int:
    """Takes the keys of `train`; prints tables, and writes `plan.json` and `plan.png` where run.dir is given."""
    from strategies.errors import ConfigError
    from trainer.config import compose, made
    from trainer.planner.efficiency import efficiency_of
    from trainer.planner.report import Report, show, write
    from trainer.planner.search import search, without_machines

    config = compose(options.keys)
    numbers = made(config.precision).numbers
    machines = None if config.cluster is None else made(config.cluster).facts(numbers)
    for name, given in (
        ("--nodes", options.nodes),
        ("--tokens", options.tokens),
        ("--sensitivity", options.sensitivity),
    ):
        if given and machines is None:
            raise ConfigError(f"plan: {name} needs a cluster. Say which, such as cluster=p5 (cluster).")
    if options.ranks != 1 and machines is not None:
        raise ConfigError(
            f"plan: --ranks={options.ranks}, and the cluster says how many there are. Use --nodes, or cluster.devices "
            "(cluster)."
        )
    wanted = wanted_of(options.keys, config, machines, options.cast)
    report = Report(spec=wanted.facts.spec, tokens=options.tokens, overhead=options.overhead, ranks=options.ranks)
    if machines is None:
        report.memory_only, report.refused[0] = without_machines(wanted, options.ranks)
        if not report.memory_only:
            raise ConfigError(next(iter(report.refused[0].values())))
    else:
        factors = efficiency_of(machines.device, numbers)
        if machines.power_w is not None and factors.nominal_w is not None and machines.power_w < factors.nominal_w:
            factors = factors.at_power(machines.power_w)
        report.machines, report.factors = machines, factors
        for nodes in options.nodes or [machines.nodes]:
            report.found[nodes], report.refused[nodes] = search(wanted, machines.on(nodes), factors)
        if not any(report.found.values()):
            raise ConfigError(next(why for refused in report.refused.values() for why in refused.values()))
        if options.sensitivity and report.best is not None:
            report.sensitivity = _sensitivity(report, wanted)
        if report.best is None:
            report.advice = _advice(options.keys, config, wanted, machines.on(max(report.found)), factors)
    show(report, top=options.top)
    if config.run.dir is not None:
        write(report, Path(config.run.dir))
    return 0


def wanted_of(keys: Sequence[str], config: Any, machines: Machines | None, cast: bool = False) -> Wanted:
    """What the job is, and what it leaves to the planner.

    Args:
        keys: as they were given.
        config: composed from them.
        machines: to plan for; None: only memory is asked for.
        cast: weights are cast for a step.

    Raises:
        ConfigError: the model can't be made, or not without storage.
    """
    from strategies.errors import ConfigError
    from trainer.commands.parts import tokenizer_of
    from trainer.config import made
    from trainer.models.base import AbstractModel
    from trainer.planner.facts import facts_of
    from trainer.planner.search import Wanted

    model, trainer, precision = made(config.model), made(config.trainer), made(config.precision)
    if not isinstance(model, AbstractModel):
        raise ConfigError("plan: model=own is made by a Trainer subclass, which isn't here. Choose another (model).")
    model.prepare(tokenizer_of(config.data))
    on_cpu = machines is not None and machines.device.lower().startswith(("cpu", "amd", "intel", "arm"))
    facts = facts_of(
        model,
        made(config.optimizer).slots_per_parameter,
        precision,
        length=_length(config, model),
        device="cpu" if on_cpu else "cuda",
        cast=cast,
    )
    batch_given = any(key.startswith(("trainer.global_batch=", "experiment=")) for key in keys)
    return Wanted(
        facts=facts,
        strategies=_strategies(keys, config),
        checkpointing=_ways(keys, trainer),
        global_batch=trainer.global_batch if batch_given else None,
        micro_batch=trainer.micro_batch,
        clip_norm=trainer.clip_norm,
        compiled=bool(config.compile),
        cast=cast,
    )


def _length(config: Any, model: Any) -> int:
    """Tokens of a sample, as the data cuts them; else as many as the model knows."""
    given = config.data.get("length") if config.data is not None else None
    length = int(given or model.positions or 512)
    return min(length, model.positions) if model.positions else length


def _strategies(keys: Sequence[str], config: Any) -> Mapping[str, Strategy]:
    """The one that was named, or whatever there is."""
    from trainer.config import each_of, made

    named = [key.partition("=")[2] for key in keys if key.startswith("strategy=")]
    if named or any(key.startswith(("strategy.", "experiment=")) for key in keys):
        return {named[-1] if named else "the strategy": made(config.strategy)}
    found: dict[str, Strategy] = each_of("strategy")
    return found


def _ways(keys: Sequence[str], trainer: Any) -> Mapping[str, ActivationCheckpointing | None]:
    """How activations may be kept: as was said, or each way."""
    from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing

    if trainer.recomputing is not None or any(key.startswith("trainer.activation_checkpointing") for key in keys):
        return {trainer.activation_checkpointing.name: trainer.recomputing}
    return {
        "none": None,
        "selective": ActivationCheckpointing(keep=COSTLY_OPERATORS),
        "selective/2": ActivationCheckpointing(keep=COSTLY_OPERATORS, products_every=2),
        "full": ActivationCheckpointing(),
    }


def _sensitivity(report: Any, wanted: Wanted) -> dict[str, float]:
    """Factor -> by what part the best plan's tokens per second fall if the factor is a tenth lower."""
    from trainer.planner.search import again

    best, factors = report.best, report.factors
    found = {}
    for name in factors.factors():
        changed = again(wanted, best, factors.with_factors(**{name: 0.9 * getattr(factors, name)}))
        if changed.speed is not None:
            found[name] = changed.speed.tokens_per_s / best.speed.tokens_per_s - 1
    return found


def _advice(keys: Sequence[str], config: Any, wanted: Wanted, machines: Machines, factors: Any) -> list[str]:
    """Changes with which something fits, the cheapest first; one line each."""
    from trainer.config import each_of
    from trainer.planner.advice import changes

    optimizers = {name: it.slots_per_parameter for name, it in each_of("optimizer").items()}
    return changes(wanted, machines, factors, optimizers=optimizers, clusters=each_of("cluster"))
