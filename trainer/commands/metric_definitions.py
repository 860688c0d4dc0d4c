"""The regexes by which SageMaker reads a run's numbers from its log."""

from __future__ import annotations

import json
from argparse import Namespace

from trainer.commands import Parser


def parser() -> Parser:
    """`shardwright metric-definitions`'s own options."""
    return Parser(
        "metric-definitions",
        "Print SageMaker's metric definitions for the lines that a run prints, as JSON: for an estimator of "
        "SageMaker's SDK, or a tuning job. shardwright launch launcher=sagemaker sends them by itself.",
    )


def main(options: Namespace) -> int:
    """On stdout, and nothing else."""
    from trainer.sagemaker.metric_definitions import as_request, metric_definitions

    print(json.dumps(as_request(metric_definitions()), indent=1))
    return 0
