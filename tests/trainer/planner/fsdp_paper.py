"""Draw docs/images/fsdp-paper.png: what the planner predicts of the FSDP paper's runs of T5 (arXiv 2304.11277).

    python -m tests.trainer.planner.fsdp_paper

The paper shows its values in figures only; what its text says of them is drawn as lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.trainer.planner.accuracy import PAPER, planned

PICTURE = Path(__file__).parents[3] / "docs/images/fsdp-paper.png"
SIZES = {"t5_611m": "611M", "t5_2b": "2.28B", "t5_11b": "11.3B"}
WAYS = {
    "DDP": ("strategy=ddp", "fp32"),
    "FSDP": ("strategy=fsdp_full", "fp32"),
    "FSDP, bf16": ("strategy=fsdp_full", "bf16"),
}
NODES = (1, 2, 4, 8, 16, 32, 64)
PUBLISHED_LOSS = 0.07
"""Section 5.4: TFLOP/s per GPU of T5-11B on 512 GPUs, against 8."""


def per_device(keys: tuple[str, ...]) -> list[tuple[int, float | None]]:
    """Devices and TFLOP/s of each; None: it doesn't fit."""
    found: list[dict[str, Any]] = planned([*PAPER, *keys])["candidates"]
    return [
        (each["devices"], each["speed"]["tflops_per_s_per_device"] if each["fits"] else None)
        for each in sorted(found, key=lambda each: each["devices"])
    ]


def main() -> None:
    """Plan all runs, print them, and draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, (strategy, numbers)) in enumerate(WAYS.items()):
        cast = ("--cast",) if numbers == "bf16" else ()
        for place, (model, size) in enumerate(SIZES.items()):
            way = "full" if model == "t5_11b" else "none"
            keys = (*cast, strategy, f"model={model}", f"precision={numbers}", "trainer.micro_batch=8")
            [(_, speed)] = per_device((*keys, f"trainer.activation_checkpointing={way}"))
            print(f"{size}, {name}: {'does not fit' if speed is None else f'{speed:.1f} TFLOP/s per GPU'}")
            at = place + 0.27 * (number - 1)
            left.bar(at, speed or 0, 0.25, color=f"C{number}", label=None if place else name)
            if speed is None:
                left.text(at, 2, "out of memory", rotation=90, ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(SIZES)), [f"T5 {size}" for size in SIZES.values()])
    left.set_title("8 GPUs, batch 8; the paper: DDP as FSDP,\nand out of memory at 11.3B", fontsize=9)
    for batch in (8, 16):
        keys = ("--cast", "strategy=fsdp_full", "model=t5_11b", "precision=bf16", f"trainer.micro_batch={batch}")
        nodes = ("--nodes", ",".join(str(each) for each in NODES))
        found = per_device((*nodes, *keys, "trainer.activation_checkpointing=full"))
        devices, speeds = [each for each, _ in found], [speed or float("nan") for _, speed in found]
        print(f"batch {batch}: {', '.join(f'{n}: {speed:.1f}' for n, speed in zip(devices, speeds, strict=True))}")
        [line] = right.plot(devices, speeds, "o-", label=f"batch {batch}, predicted")
        right.plot(
            devices[-1], speeds[0] * (1 - PUBLISHED_LOSS), "x", color=line.get_color(), label="7 % below 8 GPUs (paper)"
        )
    right.set_xscale("log", base=2)
    right.set_xticks([8 * each for each in NODES], [str(8 * each) for each in NODES])
    right.set_xlabel("GPUs")
    right.set_title("T5 11.3B, FSDP in bf16, activations computed again", fontsize=9)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_ylabel("TFLOP/s per GPU")
        axes.legend(fontsize=8)
    figure.suptitle("FSDP paper (arXiv 2304.11277), predicted: A100 of 80 GB, 2 Tb/s per node, sequences of 512")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
