"""docs/architecture.md, kept true by reading the source: floors, MPI, ranks, environment, state, sizes of files.

Only code is judged (names, attributes, imports), never comments, docstrings or messages: prose may well say which
collective an op puts in, while code that cannot name a rank cannot depend on one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mpillama"
MAX_LINES = 450

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
MUTABLE_TYPES = {"dict", "list", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "ChainMap"}
RANK = re.compile(r"(\w+_)?rank|Get_rank")
# Whole identifiers: q_lora_rank, n_group (of experts) and broadcast_to (of arrays) are none of these.
PARALLEL = re.compile(
    r"(my_|local_|global_|node_|tp_|n_|num_)?ranks?|((tp|dp|pp|ep|rank)_)?(sub)?(group|comm|world)|(COMM_)?WORLD"
    r"|(world|group|comm|tp|local)_size|I?(all_?reduce|all_?gather|all_?to_?all|reduce_?scatter|bcast|broadcast|barrier)v?"
    r"|mpi4py|mpi|nccl|rccl",
    re.IGNORECASE,
)
SIZE = re.compile(r"size|\w*world_size|group_size|tp_size|n_ranks|tp")


def read_floors(text: str) -> dict[str, int]:
    """Floor of each top-level module or package, from the table in docs/architecture.md."""
    floors = {"": 0, "__init__": 0, "__main__": 6}  # the package itself holds the version; -m mpillama is the CLI
    for floor, modules in re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE):
        floors |= {name.rstrip("/"): int(floor) for name in re.findall(r"`([^`]+)`", modules)}
    return floors


FLOORS = read_floors((ROOT / "docs" / "architecture.md").read_text())


def identifier(node: ast.AST) -> str:
    """Name that `node` refers to: of a variable, an attribute or a called function; empty for anything else."""
    if isinstance(node, ast.Call):
        return identifier(node.func)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_rank(node: ast.AST) -> bool:
    return RANK.fullmatch(identifier(node)) is not None


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in `tree`, for types only or in functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and identifier(node) in {"import_module", "__import__"}:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def top_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those under a module-level if, try or with included."""
    for statement in statements:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from top_level(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from top_level(handler.body)


def check_imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    top = module.split(".")[1] if "." in module else ""
    if top not in FLOORS:
        yield f"{module} has no floor: add it to the table in docs/architecture.md"
        return
    for line, name in imports(tree, module, is_package):
        first, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if first == "mpi4py" and top not in {"comm", "spmd"}:
            yield f"{line}: imports mpi4py, which only comm/ and spmd may"
        if first == "mpillama" and FLOORS.get(target, 0) > FLOORS[top]:  # a name that is no module is of floor 0
            yield f"{line}: floor {FLOORS[top]} imports mpillama.{target} of floor {FLOORS[target]}"


def check_rank_0(tree: ast.Module, top: str) -> Iterator[str]:
    if top in {"comm", "spmd", "cli", "__main__"}:
        return
    for node in ast.walk(tree):
        asked: list[ast.expr] = []  # what is taken for true or false, or compared with a number
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Constant) and isinstance(side.value, int) for side in sides):
                asked = sides
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            asked = [node.test]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            asked = [node.operand]
        elif isinstance(node, ast.BoolOp):
            asked = node.values
        for expression in filter(is_rank, asked):
            yield f"{expression.lineno}: treats one rank specially, which only comm/, spmd and cli/ may"


def check_environment(tree: ast.Module, top: str) -> Iterator[str]:
    if FLOORS.get(top, 0) >= 5:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and identifier(node.value) == "os":
            yield f"{node.lineno}: os.{node.attr} below floor 5"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"{node.lineno}: os.{a.name} below floor 5" for a in node.names if a.name in ENVIRONMENT)


def check_state(tree: ast.Module) -> Iterator[str]:
    """Upper-case tables are constants by convention; a mutable under another name is state that all callers share."""
    literals = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
    for node in top_level(tree.body):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        if isinstance(node.value, literals) or (
            isinstance(node.value, ast.Call) and identifier(node.value) in MUTABLE_TYPES
        ):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                name = identifier(target)
                if name and not name.isupper() and not (name.startswith("__") and name.endswith("__")):
                    yield f"{node.lineno}: module-level mutable `{name}`"
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            yield f"{inner.lineno}: global {', '.join(inner.names)}"


def check_plain(tree: ast.Module) -> Iterator[str]:
    """A model text names no rank, no group and no collective, and divides nothing by a number of ranks."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, (ast.Name, ast.Attribute)):
            names = [identifier(node)]
        elif isinstance(node, (ast.arg, ast.keyword)):
            names = [node.arg or ""]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (getattr(node, "module", None) or "").split(".")
        elif isinstance(node, ast.Call) and identifier(node) == "getattr":
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.FloorDiv, ast.Mod)):
            sizes = filter(SIZE.fullmatch, [identifier(node.right)])
            yield from (f"{node.lineno}: local sizes come from the arrays, not from `// {size}`" for size in sizes)
        for name in names:
            if PARALLEL.fullmatch(name.lstrip("_")):
                yield f"{getattr(node, 'lineno', 0)}: `{name}` in a model text"


def complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    """All that is wrong with the source of `module` (dotted name)."""
    tree = ast.parse(source)
    top = module.split(".")[1] if "." in module else ""
    found = [*check_imports(tree, module, is_package), *check_rank_0(tree, top)]
    found += [*check_environment(tree, top), *check_state(tree)]
    if top == "models":
        found += check_plain(tree)
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert complaints(path.read_text(), module, is_package) == []


def test_no_file_is_longer_than_can_be_read() -> None:
    suffixes = {".py", ".c", ".h", ".cpp", ".hpp", ".cu", ".cuh"}
    files = [path for path in PACKAGE.rglob("*") if path.suffix in suffixes]
    assert files
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_table_of_floors_is_read() -> None:
    assert {"errors": 0, "gguf": 1, "comm": 2, "models": 3, "engine": 4, "spmd": 5, "cli": 6}.items() <= FLOORS.items()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mpillama.layout", "from mpillama.ops import Ops"),
        ("mpillama.layout", "import mpillama.ops"),
        ("mpillama.layout", "from mpillama import ops"),
        ("mpillama.layout", "from .ops import Ops"),
        ("mpillama.gguf.reader", "from ..comm import base"),
        ("mpillama.gguf.reader", "from .. import runner"),
        ("mpillama.engine.sequence", "def f():\n    from mpillama.cli import options"),
        ("mpillama.engine.sequence", "import importlib\nimportlib.import_module('mpillama.cli')"),
        ("mpillama.misplaced", "x = 1"),
        ("mpillama.ops", "from mpi4py import MPI"),
        ("mpillama.runner", "import mpi4py.MPI"),
        ("mpillama.runner", "def f(group):\n    return group.rank == 0"),
        ("mpillama.runner", "def f(rank):\n    return 1 if not rank else 2"),
        ("mpillama.ops", "def f(self):\n    if self.group.rank:\n        pass"),
        ("mpillama.ops", "def f(my_rank, x):\n    return x and 0 < my_rank"),
        ("mpillama.ops", "import os\nx = os.environ['HOME']"),
        ("mpillama.engine.plan", "from os import getenv"),
        ("mpillama.ops", "cache = {}"),
        ("mpillama.ops", "cache: dict[str, int] = dict()"),
        ("mpillama.ops", "try:\n    import x\nexcept ImportError:\n    seen = [1]"),
        ("mpillama.ops", "from collections import defaultdict\nd = defaultdict(list)"),
        ("mpillama.ops", "N = 0\ndef f():\n    global N\n    N += 1"),
        ("mpillama.models.ffn", "def f(ops, x):\n    return ops.allreduce(x)"),
        ("mpillama.models.ffn", "def f(ops, x):\n    return ops.group"),
        ("mpillama.models.ffn", "def f(x, rank):\n    return x"),
        ("mpillama.models.ffn", "def f(g, x):\n    return g(x, world_size=1)"),
        ("mpillama.models.ffn", "def f(ops, x):\n    return getattr(ops, 'all_gather')(x)"),
        ("mpillama.models.ffn", "from mpillama.comm import base"),
        ("mpillama.models.ffn", "def f(config, size):\n    return config.n_head // size"),
    ],
)
def test_breach_is_found(module: str, source: str) -> None:
    assert complaints(source, module), f"not found in {module}: {source}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mpillama.comm.mpi", "from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 0:\n    pass"),
        ("mpillama.cli.main", "import os\nos.environ['HOME']\nfrom mpillama.errors import UserError"),
        (
            "mpillama.gguf.reader",
            "from .types import GGMLType\nfrom ..errors import GGUFError\nfrom mpillama import config",
        ),
        ("mpillama.ops", "from mpillama.comm.base import Group\n__all__ = ['f']\nNAMES = {'a': 1}\n_TABLE = [1]"),
        ("mpillama.tokenizer.bpe", "def f(rank, best, x):\n    found = []\n    return rank < best or x == 0"),
        ("mpillama.models.moe", '"""The allreduce comes later."""\nx = config.n_group + config.q_lora_rank  # rank'),
        ("mpillama.models.moe", "import numpy as np\ny = np.broadcast_to(x, shape).size // 2"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert complaints(source, module) == []
