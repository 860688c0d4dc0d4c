"""Predict what a configuration takes and costs, for each way to spread it, without training."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from trainer.planner.agreement import Agreement
    from trainer.planner.cluster import Machines
    from trainer.planner.report import Budget, Report
    from trainer.planner.search import Wanted

_ABOUT = """Predict what a configuration takes on each rank, how fast it is and what it costs, for the strategy that is
chosen, or for each one if none is; best first. Trains nothing, and needs none of the machines: cluster=p5 says which
(see conf/cluster; cluster=this measures the machine at hand). Without a cluster only memory is predicted, for --ranks
processes. Writes plan.json and plan.png into run.dir if that is given."""
_EXAMPLES = """examples:
  shardwright plan model=llama_8b precision=bf16 data.length=8192 cluster=p5
  shardwright plan model=llama_70b precision=bf16 cluster=p5 --nodes 1,2,4,8,16 --tokens 1e12 run.dir=plans/70b
  shardwright plan model=t5_11b cluster=p4d strategy=fsdp_full trainer.micro_batch=8 trainer.global_batch=512
  shardwright plan model=llama_1b strategy=fsdp_hybrid strategy.shard_size=4 --ranks 8 --simulate
What is predicted how: docs/planner.md"""


def parser() -> Parser:
    """`shardwright plan`'s own options."""
    found = Parser("plan", _ABOUT)
    found.epilog, found.formatter_class = _EXAMPLES, RawDescriptionHelpFormatter
    found.add_argument("keys", nargs="*", metavar="key=value", help="as for shardwright train, and cluster=...")
    where = found.add_argument_group("on which machines")
    where.add_argument("--nodes", type=_numbers, metavar="N,N,...", help="numbers of nodes to compare (cluster.nodes)")
    where.add_argument("--ranks", type=_at_least_one, metavar="N", help="processes, without a cluster (1)")
    paid = found.add_argument_group("time and money, with a cluster")
    paid.add_argument("--tokens", type=_tokens, metavar="N", help="to train on, such as 1e12: shows days and USD")
    paid.add_argument("--overhead", type=_share, metavar="SHARE", help="of the time, for saves and restarts: 0 to 1")
    paid.add_argument("--warm-up", type=_minutes, metavar="MINUTES", help="paid before the first step of each start; "
                      "a warm pool makes it short")  # fmt: skip
    paid.add_argument("--starts", type=_at_least_one, metavar="N", help="of the job, such as after interruptions (1)")
    paid.add_argument("--spot", type=_price_share, metavar="SHARE", help="of the on-demand price that is paid: 0 to 1")
    learnt = found.add_argument_group("factors of one's own, instead of published ones")
    learnt.add_argument("--calibrate", nargs="+", metavar="RUN", help="learn factors from runs that have ended, not "
                        "plan; writes plan-calibration.json into run.dir, or the current folder")  # fmt: skip
    learnt.add_argument("--calibration", metavar="FILE", help="plan with those that --calibrate wrote there")
    shown = found.add_argument_group("what is shown and checked")
    shown.add_argument("--top", type=_at_least_one, metavar="N", help="rows: first the best of each strategy, then "
                       "its other settings; default: the former")  # fmt: skip
    shown.add_argument("--sensitivity", action="store_true", help="how far a change of each factor moves the answer")
    shown.add_argument("--simulate", action="store_true", help="hold the predicted collectives of the best strategy "
                       "against a step of ranks that aren't there; ends with 1 if they differ")  # fmt: skip
    shown.add_argument("--cast", action="store_true", help="as programs run that cast weights for the step (FSDP2's "
                       "MixedPrecisionPolicy, DeepSpeed's bf16); ours keep them in fp32, with autocast")  # fmt: skip
    return found


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000_000:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to 10,000,000")
    return int(text)


def _numbers(text: str) -> list[int]:
    return sorted({_at_least_one(part.strip()) for part in text.split(",")})


def _number(what: str, low: float, high: float, *, ends: bool = True) -> Callable[[str], float]:
    """Reads one; `ends`: `low` and `high` themselves will do."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (low <= found <= high and (ends or low < found < high)):
            between = f"from {low:g} to {high:g}" if ends else f"between {low:g} and {high:g}"
            raise ArgumentTypeError(f"{text!r} is not {what} {between}")
        return found

    return read


_tokens = _number("a number of tokens", 1, 1e18)
_share = _number("a share", 0, 0.99)
_minutes = _number("a time in minutes", 0, 10_000)
_price_share = _number("a share", 0, 1, ends=False)


def main(options: Namespace) -> int:
    """Takes the keys of `train`; prints tables, and writes `plan.json` and `plan.png` where run.dir is given."""
    from trainer.commands.wanted import wanted_of
    from trainer.config import composed, made
    from trainer.place import at_home
    from trainer.planner.report import Report, refuse_unwritable, write
    from trainer.planner.search import refuse_uneven
    from trainer.planner.table import Progress, show

    if options.calibrate:
        return _calibrate(options)
    config, choices = composed(options.keys)
    folder = None if config.run.dir is None else at_home(config.run.dir)
    _refuse_contradictions(options, machines_wanted=config.cluster is not None)
    if folder is not None:
        refuse_unwritable(folder)
    precision = made(config.precision)
    with Progress() as progress:
        progress.say("the cluster")
        machines = None if config.cluster is None else _at_price(made(config.cluster).facts(precision.numbers), options)
        numbers = [] if machines is None else [machines.on(each) for each in options.nodes or [machines.nodes]]
        progress.say("the model")
        wanted = wanted_of(options.keys, config, machines, options.cast, choices["strategy"])
        for ranks in [options.ranks or 1] if machines is None else [each.size for each in numbers]:
            refuse_uneven(wanted, ranks)
        report = Report(
            spec=wanted.facts.spec,
            keys=options.keys,
            tokens_per_sample=_tokens_per_sample(wanted),
            numbers=precision.numbers.name,
            budget=_budget(options),
            ranks=options.ranks or 1,
            machines=machines,
        )
        _search(report, wanted, numbers, options, config, progress.say)
        if options.simulate:
            progress.say("a step of ranks that aren't there")
            report.agreement = _simulate(report, wanted)
    show(report, top=options.top)
    if folder is not None:
        write(report, folder)
    return 0 if report.agreement is None or report.agreement.holds else 1


def _calibrate(options: Namespace) -> int:
    from strategies.errors import ConfigError
    from trainer.config import compose
    from trainer.place import at_home
    from trainer.planner.calibrate import FILE, learn

    runs = [at_home(word) for word in options.calibrate if "=" not in word or at_home(word).is_dir()]
    keys = [*options.keys, *(word for word in options.calibrate if at_home(word) not in runs)]
    folder = compose(keys).run.dir
    if not runs:
        raise ConfigError("plan: --calibrate names no run. Give folders of runs that have ended (--calibrate).")
    if folder is not None and not at_home(folder).is_dir():
        raise ConfigError(f"plan: there is no folder {folder}. Make it, or choose another (run.dir).")
    found, lines = learn(runs, at_home(folder or ".") / FILE)
    found.write()
    print("\n".join([*lines, f"written: {found.path}; plan with it: --calibration {found.path}"]))
    return 0


def _refuse_contradictions(options: Namespace, *, machines_wanted: bool) -> None:
    from strategies.errors import ConfigError

    if not machines_wanted:
        for name in ("nodes", "tokens", "spot", "sensitivity", "calibration"):
            if getattr(options, name):
                raise ConfigError(f"plan: --{name} needs a cluster. Say which, such as cluster=p5 (cluster).")
    for name in ("overhead", "warm_up", "starts"):
        if getattr(options, name) is not None and options.tokens is None:
            option = name.replace("_", "-")
            raise ConfigError(f"plan: --{option} is for days and money. Say for how many tokens (--tokens).")
    if machines_wanted and options.ranks is not None:
        raise ConfigError(
            f"plan: --ranks={options.ranks}, and the cluster says how many there are. Use --nodes, or cluster.devices "
            "(cluster)."
        )
    if options.nodes and any(key.lstrip("+").startswith("cluster.nodes=") for key in options.keys):
        raise ConfigError("plan: --nodes and cluster.nodes both say how many. Leave one of them out (cluster.nodes).")
    if (options.warm_up is None) is not (options.starts is None) and options.starts is not None:
        raise ConfigError("plan: --starts counts how often --warm-up is paid. Give that too, in minutes (--warm-up).")


def _at_price(machines: Machines, options: Namespace) -> Machines:
    """With the share of the price that is paid for spot instances."""
    from strategies.errors import ConfigError

    if options.spot is None:
        return machines
    if machines.price_per_h is None:
        raise ConfigError(
            f"plan: --spot={options.spot:g}, and no price of {machines.name} is known. Give it in USD per hour "
            "(cluster.price)."
        )
    note = f"{options.spot:g} of {machines.price_note}"
    return replace(machines, price_per_h=options.spot * machines.price_per_h, price_note=note)


def _budget(options: Namespace) -> Budget | None:
    from trainer.planner.report import Budget

    if options.tokens is None:
        return None
    return Budget(
        tokens=options.tokens,
        overhead=options.overhead or 0.0,
        warm_up_h=(options.warm_up or 0.0) / 60,
        starts=options.starts or 1,
    )


def _tokens_per_sample(wanted: Wanted) -> int:
    batch = wanted.facts.batch(1)
    return batch.num_tokens or batch.num_targets


def _search(
    report: Report,
    wanted: Wanted,
    numbers: Sequence[Machines],
    options: Namespace,
    config: Any,
    say: Callable[[str], None],
) -> None:
    """Fill in what each strategy takes, and what follows from that.

    Raises:
        ConfigError: none can run.
    """
    from strategies.errors import ConfigError
    from trainer.planner.calibrate import Calibration
    from trainer.planner.efficiency import efficiency_of
    from trainer.planner.search import impossible, search, without_machines

    machines = report.machines
    if machines is None:
        report.memory_only, report.refused[0] = without_machines(wanted, report.ranks)
        if not report.memory_only:
            raise ConfigError(next(iter(report.refused[0].values())))
        report.impossible = impossible(wanted, report.refused[0])
        return
    factors = efficiency_of(machines.device, wanted.facts.precision.numbers)
    if options.calibration is not None:
        factors = Calibration.read(Path(options.calibration)).applied(factors, wanted.facts.precision.numbers)
    if machines.power_w is not None and factors.nominal_w is not None and machines.power_w < factors.nominal_w:
        factors = factors.at_power(machines.power_w)
    report.factors = factors
    for each in numbers:
        report.found[each.nodes], report.refused[each.nodes] = search(wanted, each, factors, say)
    if not any(report.found.values()):
        refused = [why for each in report.refused.values() for why in each.values()]
        raise ConfigError(refused[0] if refused else _no_variant(wanted, machines))
    report.impossible = impossible(wanted, report.refused[report.nodes])
    if options.sensitivity and report.best is not None:
        say("each factor")
        report.sensitivity = _sensitivity(report, wanted)
    if report.best is None:
        say("what would fit")
        report.advice = _advice(options.keys, config, wanted, report, options.spot)


def _no_variant(wanted: Wanted, machines: Machines) -> str:
    return (
        f"plan: {' and '.join(wanted.strategies)} can't be cut in groups on {machines.size} devices. "
        "Choose another, or other numbers of nodes (strategy, cluster.nodes)."
    )


def _simulate(report: Report, wanted: Wanted) -> Agreement:
    """Of the best that can be simulated; without machines, of the first strategy that can."""
    from trainer.planner.agreement import agreement, first_that_can

    if report.machines is None:
        alone = first_that_can(list(report.memory_only.values()))
        return agreement(wanted.facts, alone.strategy, alone.spread, alone.world, alone.plan)
    it = first_that_can(report.found[report.nodes])
    return agreement(wanted.facts, it.strategy, it.spread, it.world, it.plan)


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


def _advice(keys: Sequence[str], config: Any, wanted: Wanted, report: Report, spot: float | None) -> list[str]:
    """Changes with which something fits, the cheapest first; one line each."""
    from trainer.commands.wanted import applied, wanted_of
    from trainer.config import composed, each_of
    from trainer.planner.advice import found

    machines, factors = report.machines, report.factors
    assert machines is not None
    assert factors is not None

    def again(further: Sequence[str]) -> Wanted:
        changed = applied(keys, further)
        other, choices = composed(changed)
        return wanted_of(changed, other, machines, wanted.cast, choices["strategy"])

    each = found(
        wanted,
        machines.on(max(report.found)),
        factors,
        optimizers={name: it.slots_per_parameter for name, it in each_of("optimizer").items()},
        clusters=each_of("cluster"),
        strategies=each_of("strategy"),
        again=again,
        length=config.data.get("length") if config.data is not None else None,
        price_share=spot or 1.0,
    )
    return [str(change) for change in each]
