"""Command lines in the shared worker processes, as a terminal would run them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def command(words: list[str]) -> tuple[int, str, str]:
    """`shardwright` with these words in this process; exit code, stdout, stderr."""
    from trainer.cli import main

    return _called(lambda: main(words))


def script(path: str, name: str, words: list[str], *defaults: str) -> tuple[int, str, str]:
    """What a script does that ends in `run(<name>, *defaults)`; exit code, stdout, stderr."""
    from trainer import run

    cls = getattr(_module(Path(path)), name)
    sys.argv = [path, *words]
    return _called(lambda: run(cls, *defaults))


def _called(function: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            function()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("a command ends with SystemExit")


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
