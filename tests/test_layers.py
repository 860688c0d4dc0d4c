"""The layers of docs/architecture, held by reading the source: who may import whom, and what nobody writes.

`violations` checks one file; the planted ones below show that each rule can fail.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"conf", "scripts", "strategies", "tests", "trainer"}

# In order: each may import those before it.
SEAM = (
    *("errors", "timing", "elastic", "launchers", "meeting", "world", "ec2", "interfaces", "backends", "simulated"),
    *("efa_rules", "efa", "smddp", "precision", "blocks", "activations", "footprint", "base"),
)
ROLES = ("data", "models", "metrics", "checkpoint", "hooks")
COMMANDS = "trainer/commands/"  # part of the command line, so above everything else in trainer/

KNOWS_EVERY_STRATEGY = {"trainer/build.py", "trainer/config.py"}
KNOWS_HYDRA = {
    *("trainer/build.py", "trainer/cli.py", "trainer/complaints.py", "trainer/config.py"),
    "trainer/launch/space.py",  # reads sweeps in its grammar
}
ABOVE_THE_ROLES = {"trainer", "trainer.build", "trainer.cli", "trainer.config", "trainer.trainer"}

# Seconds to import, or not installed everywhere: only inside functions.
HEAVY = (
    *("accelerate", "boto3", "datasets", "deepspeed", "horovod", "matplotlib", "mlflow", "pandas", "peft"),
    *("prometheus_client", "pyarrow", "scipy", "sklearn", "tensorboard", "tokenizers", "torch.utils.tensorboard"),
    *("transformers", "wandb"),
)
TESTING = ("strategies/testing", "strategies/_testing")  # its workers are its own children, on pipes of its own
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MAY_PICKLE = {"trainer/checkpoint/metadata.py"}  # reads torch's own format through an unpickler that allows a list

# Words that mean nothing but a strategy; the other names of `strategy=` also mean other things.
STRATEGY_NAME = re.compile(r"ddp|mics|fsdp(_\w+)?|zero([1-3](_\w+)?|_\w+)|horovod(_\w+)?|\w+Strategy")
ALSO_STRATEGY_NAMES = {"accelerate", "auto", "deepspeed", "single"}

MAX_LINES = {"strategies": 400, "trainer": 400, "scripts": 150}
LONGER = {"scripts/bootstrap.py": 240}  # does its work itself: nothing of ours is installed yet


def violations(path: str, source: str) -> list[str]:
    """What the file `path` (relative to the checkout) does against the rules, as `path:line: what`."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    package = path.split("/")[0]
    found: list[tuple[int, str]] = []
    for node, name in _imports(tree):
        reason = _RULES.get(package, _anything)(path, name)
        if reason is None and package != "tests":
            reason = _forbidden_import(path, name, at_top=_at_module_level(node, parents))
        if reason is not None:
            found.append((node.lineno, f"imports {name}: {reason}"))
    for node in ast.walk(tree):
        found += [(node.lineno, reason) for reason in _insecure(node)]
        if package in ("scripts", "trainer"):
            found += [(node.lineno, reason) for reason in _asks_which_strategy(node)]
    limit = LONGER.get(path, MAX_LINES.get(package))
    length = len(source.splitlines())
    if limit is not None and length > limit and not path.startswith(TESTING):
        found.append((limit, f"{length} lines, more than {limit}: probably two ideas"))
    return [f"{path}:{line}: {what}" for line, what in sorted(set(found))]


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Each import statement and the dotted name that it reads; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node, f"{module}.{alias.name}" if _is_module(f"{module}.{alias.name}") else module


def _is_module(name: str) -> bool:
    if name == "torch.utils.tensorboard":
        return True
    path = ROOT.joinpath(*name.split("."))
    return name.split(".")[0] in OURS and (path.is_dir() or path.with_suffix(".py").is_file())


def _at_module_level(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return False
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return False
    return True


# Who may import whom. Each returns why not, or None.


def _strategies(path: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    if top not in OURS:
        return None
    if top != "strategies":
        return "strategies/ stands below it"
    mine, theirs = path.removesuffix(".py").split("/")[1], rest.split(".")[0]
    if mine in ("testing", "__init__") or mine.startswith("_testing"):
        return None
    if mine in SEAM:
        return None if theirs in SEAM[: SEAM.index(mine)] else "the seam's order is " + ", ".join(SEAM)
    if theirs in SEAM or (theirs.startswith("_") and not theirs.startswith("_testing")):
        return None
    return None if theirs == mine else "a plugin uses base, precision, world, errors, backends and private modules only"


def _trainer(path: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    if top not in OURS:
        return None
    if top == "strategies":
        if rest.split(".")[0] in SEAM or (not rest and path in KNOWS_EVERY_STRATEGY):
            return None
        return "trainer/ uses only the seam of strategies/"
    if top != "trainer":
        return "trainer/ stands below it"
    parts, theirs = path.removesuffix(".py").split("/"), rest.split(".")[0]
    if path == "trainer/trainer.py" and name in ABOVE_THE_ROLES - {"trainer.trainer"}:
        return "the loop is below what builds it"
    if len(parts) > 2 and not path.startswith(COMMANDS) and (name in ABOVE_THE_ROLES or theirs == "commands"):
        return "a role is below the loop and what builds it"
    if len(parts) > 2 and parts[1] in ROLES and theirs in ROLES[ROLES.index(parts[1]) + 1 :]:
        return "the roles' order is " + ", ".join(ROLES)
    return None


def _scripts(path: str, name: str) -> str | None:
    top = name.split(".")[0]
    if path in ("scripts/bench_loop.py", "scripts/bench_engines.py"):  # what somebody writes who has no framework
        return "it is what ours is held against" if top in ("trainer", "strategies") else None
    if top in sys.stdlib_module_names or (top == "trainer" and path != "scripts/bootstrap.py"):
        return None
    return "a script is a thin entry point over trainer/"


def _anything(path: str, name: str) -> str | None:
    return None


_RULES = {"scripts": _scripts, "strategies": _strategies, "trainer": _trainer}


def _forbidden_import(path: str, name: str, *, at_top: bool) -> str | None:
    if name.startswith("."):
        return "absolute imports only"
    top = name.split(".")[0]
    if top in ("hydra", "omegaconf") and path not in KNOWS_HYDRA:
        return "only build.py, config.py, complaints.py, cli.py and launch/space.py see Hydra"
    if top in PICKLES and path not in MAY_PICKLE and not path.startswith(TESTING):
        return "a pickle runs code when it is read"
    if at_top and any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY):
        return "heavy, import it inside the function that needs it"
    return None


# What nobody writes.


def _insecure(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
        yield "write torch.load(..., weights_only=True), so that it can be seen"
    if isinstance(node, ast.Call):
        given = {word.arg: word.value for word in node.keywords}
        if ast.unparse(node.func) == "torch.load" and not _is_true(given.get("weights_only")):
            yield "torch.load without weights_only=True"
        for word in ("allow_pickle", "trust_remote_code"):
            if _is_true(given.get(word)):
                yield f"{word}=True"
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and _is_true(value):
                yield "trust_remote_code=True"


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _asks_which_strategy(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and node.args:
        function, first = ast.unparse(node.func), ast.unparse(node.args[0])
        if function in ("isinstance", "issubclass") and re.search(r"\w+Strategy\b", ast.unparse(node)):
            yield "asks for a strategy's class"
        if function in ("hasattr", "getattr") and re.search(r"strategy$", first, re.IGNORECASE):
            yield f"{function} on a strategy: what it can do is in the seam"
        if re.search(r"strategy.*\.(startswith|endswith)$", function, re.IGNORECASE):
            yield "compares a strategy's name"
    if isinstance(node, ast.Compare) and _names_a_strategy([node.left, *node.comparators]):
        yield "compares with a strategy's name"
    if isinstance(node, ast.Match):
        patterns = [part.value for case in node.cases for part in ast.walk(case) if isinstance(part, ast.MatchValue)]
        classes = [ast.unparse(p.cls) for c in node.cases for p in ast.walk(c) if isinstance(p, ast.MatchClass)]
        if _names_a_strategy([node.subject, *patterns]) or any(name.endswith("Strategy") for name in classes):
            yield "compares with a strategy's name"


def _names_a_strategy(sides: list[ast.expr]) -> bool:
    """Whether a comparison of these has a strategy's name, or a doubtful one beside the word strategy."""
    words = {
        part.value
        for side in sides
        for part in ast.walk(side)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    classes = [ast.unparse(side) for side in sides if isinstance(side, ast.Name | ast.Attribute)]
    if any(STRATEGY_NAME.fullmatch(word) for word in words) or any(
        re.search(r"(^|\.)\w+Strategy$", name) for name in classes
    ):
        return True
    others = " ".join(ast.unparse(side) for side in sides if not isinstance(side, ast.Constant))
    return bool(words & ALSO_STRATEGY_NAMES) and "strategy" in others.lower()


# The checkout keeps the rules.

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("scripts", "strategies", "tests", "trainer")
    for path in (ROOT / package).rglob("*.py")
)


def test_sources_are_found() -> None:
    assert {"strategies/base.py", "trainer/trainer.py", "tests/test_layers.py"} <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES)
def test_source_keeps_the_layers(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_configurations_never_trust_remote_code() -> None:
    trusting = [path for path in (ROOT / "conf").rglob("*.yaml") if re.search(r"remote_code:\s*true", path.read_text())]
    assert trusting == []


# The rules can fail.

PLANTED = [
    ("strategies/ddp.py", "import trainer", "imports trainer:"),
    ("strategies/ddp.py", "def f():\n    from trainer.progress import Progress", "imports trainer.progress:"),
    ("strategies/ddp.py", "from strategies.single import SingleStrategy", "imports strategies.single:"),
    ("strategies/ddp.py", "from strategies import single", "imports strategies.single:"),
    ("strategies/ddp.py", "from strategies import built_in", "imports strategies:"),
    ("strategies/ddp.py", "from strategies.testing import check", "imports strategies.testing:"),
    ("strategies/_torch.py", "from strategies.ddp import DDPStrategy", "imports strategies.ddp:"),
    ("strategies/world.py", "from strategies.backends import Backend", "imports strategies.backends:"),
    ("strategies/base.py", "import hydra", "imports hydra:"),
    ("strategies/zero.py", "import deepspeed", "imports deepspeed: heavy"),
    ("strategies/testing.py", "import trainer.trainer", "imports trainer.trainer:"),
    ("trainer/loop.py", "from strategies import built_in", "imports strategies:"),
    ("trainer/build.py", "from strategies.ddp import DDPStrategy", "imports strategies.ddp:"),
    ("trainer/loop.py", "import scripts.train", "imports scripts.train:"),
    ("trainer/loop.py", "from omegaconf import OmegaConf", "imports omegaconf:"),
    ("trainer/trainer.py", "from trainer.build import build", "imports trainer.build:"),
    ("trainer/data/base.py", "from trainer.trainer import Trainer", "imports trainer.trainer:"),
    ("trainer/data/base.py", "from trainer import Trainer", "imports trainer:"),
    ("trainer/hooks/base.py", "from trainer.config import load", "imports trainer.config:"),
    ("trainer/hooks/base.py", "from trainer.commands import plan", "imports trainer.commands"),
    ("strategies/zero.py", "import pickle", "imports pickle:"),
    ("trainer/data/base.py", "from trainer.models.base import Task", "imports trainer.models.base:"),
    ("trainer/models/base.py", "from ..data import base", "absolute imports only"),
    ("trainer/models/base.py", "import transformers", "imports transformers: heavy"),
    ("trainer/plots.py", "try:\n    import matplotlib.pyplot as plt\nexcept ImportError: ...", "heavy"),
    ("trainer/logs.py", "class A:\n    from torch.utils.tensorboard import SummaryWriter", "heavy"),
    ("trainer/logs.py", "from torch.utils import tensorboard", "heavy"),
    ("trainer/io.py", "def f():\n    import pickle", "imports pickle:"),
    ("trainer/io.py", "import torch\ntorch.load('x')", "torch.load without"),
    ("tests/test_io.py", "import torch\ntorch.load('x', weights_only=False)", "torch.load without"),
    ("trainer/io.py", "from torch import load", "torch.load"),
    ("trainer/io.py", "np.load('x', allow_pickle=True)", "allow_pickle=True"),
    ("trainer/hf.py", "f(trust_remote_code=True)", "trust_remote_code=True"),
    ("trainer/hf.py", "f(**{'trust_remote_code': True})", "trust_remote_code=True"),
    ("trainer/loop.py", "isinstance(plugin, DDPStrategy)", "strategy's class"),
    ("trainer/loop.py", "isinstance(plugin, (int, ddp.DDPStrategy))", "strategy's class"),
    ("trainer/loop.py", "type(plugin) is DDPStrategy", "strategy's name"),
    ("trainer/loop.py", "hasattr(self.strategy, 'engine')", "hasattr on a strategy"),
    ("trainer/loop.py", "getattr(strategy, 'engine', None)", "getattr on a strategy"),
    ("trainer/loop.py", "name == 'ddp'", "strategy's name"),
    ("trainer/loop.py", "name in ('fsdp_full', 'x')", "strategy's name"),
    ("trainer/loop.py", "config.strategy.name != 'single'", "strategy's name"),
    ("trainer/loop.py", "type(strategy).__name__ == 'DDPStrategy'", "strategy's name"),
    ("trainer/loop.py", "strategy_name.startswith('zero')", "strategy's name"),
    ("trainer/loop.py", "match name:\n    case 'zero3': ...", "strategy's name"),
    ("trainer/loop.py", "match plugin:\n    case DDPStrategy(): ...", "strategy's name"),
    ("trainer/loop.py", "x = 1\n" * 401, "401 lines"),
    ("scripts/train.py", "x = 1\n" * 151, "151 lines"),
    ("scripts/train.py", "import strategies", "imports strategies:"),
    ("scripts/train.py", "import torch", "imports torch:"),
    ("scripts/bootstrap.py", "from trainer.cli import main", "imports trainer.cli:"),
]

PERMITTED = [
    (
        "strategies/ddp.py",
        "from strategies._torch import TorchStrategy\nfrom strategies.base import Plan\nimport torch",
    ),
    ("strategies/zero.py", "def connect():\n    import deepspeed"),
    ("strategies/testing.py", "from strategies import built_in\nfrom strategies.single import SingleStrategy"),
    ("strategies/testing.py", "x = 1\n" * 500),
    ("strategies/ddp.py", "isinstance(x, DDPStrategy)"),
    ("trainer/build.py", "import hydra\nimport strategies\nfrom trainer.trainer import Trainer"),
    ("trainer/hooks/samples.py", "from trainer.data.base import Tokenizer\nfrom trainer.progress import Progress"),
    ("trainer/models/hf.py", "if TYPE_CHECKING:\n    import transformers"),
    ("trainer/models/hf.py", "def make():\n    import transformers"),
    ("trainer/checkpoint/metadata.py", "import pickle"),
    ("trainer/commands/export.py", "def main():\n    from trainer.config import compose"),
    ("strategies/_testing_pool.py", "import pickle"),
    ("trainer/io.py", "torch.load('x', weights_only=True)"),
    ("trainer/hf.py", "f(trust_remote_code=False)"),
    (
        "trainer/loop.py",
        "micro_batch == 'auto'\nkind == 'single'\nissubclass(plugin, Strategy)\ngetattr(options, name)",
    ),
    ("trainer/loop.py", "self.strategy.step(model, optimizer)\nzero = name == 'zero'"),
    ("scripts/train.py", "import sys\nfrom trainer.cli import main"),
    ("tests/trainer/test_x.py", "import transformers\nfrom strategies.ddp import DDPStrategy"),
]


@pytest.mark.parametrize(("path", "source", "expected"), PLANTED)
def test_violations_of_a_planted_one_are_reported(path: str, source: str, expected: str) -> None:
    found = violations(path, source)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(("path", "source"), PERMITTED)
def test_violations_of_permitted_source_are_none(path: str, source: str) -> None:
    assert violations(path, source) == []
