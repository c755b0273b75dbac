"""The rooms of the library: what a file may import, what it may reach for, how full a room may be.

Everything is read from the source with `ast`. `violations` reads the imports of all files, those
inside functions and under ``TYPE_CHECKING`` too, and knows nothing of the library but the table
`ROOMS`. `intrusions` reads every name with a leading underscore, and whose it is.
"""

import ast
import graphlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_nf"


@dataclass(frozen=True)
class Room:
    """A file or folder of `pyro_nf` and what its files may import."""

    floor: int  # the rooms of all lower floors
    beside: tuple[str, ...] = ()  # and these of the same floor
    pyro: tuple[str, ...] = ()  # these parts of Pyro
    pyro_in_functions: tuple[str, ...] = ()  # and these when they are needed, not at import
    is_door: bool = False  # its face shows names of the rooms below


ROOMS = {
    "_checks": Room(1),
    "_storage": Room(1),
    "ops": Room(1, beside=("_checks",)),
    "nn": Room(2),
    "univariate": Room(2),
    "transforms": Room(3, pyro=("pyro.distributions",)),
    "flows": Room(4, pyro=("pyro.distributions",)),
    "train": Room(4, beside=("flows",), pyro=("pyro.distributions",)),
    "testing": Room(
        4, beside=("flows",), pyro=("pyro.distributions",), pyro_in_functions=("pyro",)
    ),
    "plots": Room(4, beside=("flows", "train"), pyro=("pyro.distributions",)),
    "sites": Room(5, pyro=("pyro",)),
    "model": Room(6, pyro=("pyro",)),
    "search": Room(7, pyro=("pyro",)),
    "guides": Room(8, pyro=("pyro",)),
    "posterior": Room(9, pyro=("pyro",)),
    "vi": Room(10, pyro=("pyro",)),
    "infer": Room(11, is_door=True),
}


# Rooms that are collections: one file for each of many things of a kind.
ZOOS = {"univariate", "nn", "transforms"}
MOST_FILES = 8

# What others keep behind an underscore and is used nevertheless: nothing public says the same.
FOREIGN = {
    "_C": "torch: whether torch.func, a tracer or a compiler is at work",
    "_are_functorch_transforms_active": "torch: of _C",
    "_current_level": "torch: whether a forward-mode derivative is taken",
    "_functorch": "torch: of _C",
    "_get_tracing_state": "torch: of _C",
    "_python_dispatch": "torch: the module of TorchDispatchMode",
    "_pytree": "torch: tensors in nested containers",
    "_schema": "torch: whether an operation writes in place",
    "_overloadname": "torch: the operation that does not",
    "_parameters": "torch: of a Module, those that are None too",
    "_buffers": "torch: of a Module",
    "_modules": "torch: of a Module",
    "_DropoutNd": "torch: the base of all dropouts",
    "_asdict": "Python: of a named tuple, public in spite of its underscore",
    "_Subsample": "pyro: the site of a plate that takes a subsample",
    "_mask": "pyro: of a MaskedDistribution",
    "_mean_accept_prob": "pyro: of a kernel of HMC",
    "_get_loc_and_scale": "pyro: the coordinates of its normal guides",
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is a module, or a module and a name in it."""

    line: int
    target: str
    in_function: bool


def imports(path: str, source: str) -> Iterator[Import]:
    """All imports of the file ``path`` (relative to the package, as ``nn/mlp.py``)."""
    folder = ["pyro_nf", *Path(path).parent.parts]

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    # `import a.b` binds a, `import a.b as c` binds a.b.
                    bound = alias.name if alias.asname else alias.name.split(".")[0]
                    yield Import(child.lineno, bound, in_function)
            elif isinstance(child, ast.ImportFrom):
                base = folder[: len(folder) + 1 - child.level] if child.level else []
                for alias in child.names:
                    target = ".".join([*base, *filter(None, [child.module]), alias.name])
                    yield Import(child.lineno, target, in_function)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, in_function or is_function)

    return walk(ast.parse(source), False)


def is_within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def is_face(path: str) -> bool:
    return Path(path).name == "__init__.py"


def room_of(path: str) -> str:
    """The first part of the path; the library's own face is ``__init__``."""
    return Path(path).with_suffix("").parts[0]


def complaint(path: str, imported: Import, source_path: str | None) -> str | None:
    """What is wrong with an import in ``path`` from the file ``source_path``, if anything.

    ``source_path`` is None when the imported name is not found in the library.
    """
    name, target = room_of(path), imported.target
    room = ROOMS.get(name, Room(floor=0))
    if is_within(target, ("pyro",)):
        known = room.pyro + (room.pyro_in_functions if imported.in_function else ())
        return None if is_within(target, known) else f"{name} may not know {target}"
    if not is_within(target, ("pyro_nf",)):
        return None
    if source_path is None:
        return f"{target} does not exist"
    if path == "__init__.py":
        return None  # the library's face shows what it likes
    if is_face(source_path):
        return f"imports {target} from a face; import from the file"
    other = room_of(source_path)
    if other == name:
        return None
    if is_face(path) and not room.is_door:
        return f"the face of {name} shows {target}, which is not its own"
    floor = ROOMS[other].floor if other in ROOMS else 0
    if floor < room.floor or other in room.beside:
        return None
    return f"{name} (floor {room.floor}) imports {other} (floor {floor})"


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of the files ``{path relative to the package: source}``."""
    module_paths = {
        ".".join(["pyro_nf", *Path(path).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources
    }
    found = []
    graph: dict[str, set[str]] = {path: set() for path in sources}
    for path, source in sources.items():
        if room_of(path) not in ROOMS and path != "__init__.py":
            found.append(f"{path}: belongs to no room; give it a floor in ROOMS")
            continue
        for imported in imports(path, source):
            # `from a import b` names the module a.b or the name b of the module a.
            parent = imported.target.rpartition(".")[0]
            source_path = module_paths.get(imported.target, module_paths.get(parent))
            message = complaint(path, imported, source_path)
            if message is not None:
                found.append(f"{path}:{imported.line}: {message}")
            elif source_path is not None:
                graph[path].add(source_path)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " <- ".join(error.args[1]))
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """The names with a leading underscore that a file gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def reached(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and names with a leading underscore that a file takes from something else.

    What an object asks of itself (``self._x``) does not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            is_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
            is_super = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"
            if not (is_own or is_super):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, a.name) for a in node.names if is_private(a.name))


def intrusions(sources: Mapping[str, str]) -> list[str]:
    """Where a file reaches for what another keeps behind a leading underscore."""
    trees = {path: ast.parse(source) for path, source in sources.items()}
    owners = {path: defined(tree) for path, tree in trees.items()}
    found = []
    for path, tree in trees.items():
        for line, name in reached(tree):
            homes = [other for other, names in owners.items() if name in names]
            if path not in homes and name not in FOREIGN:
                whose = f"which belongs to {', '.join(homes)}" if homes else "which is not ours"
                found.append(f"{path}:{line}: reaches for {name}, {whose}")
    return found


def crowds(sources: Mapping[str, str]) -> list[str]:
    """The folders with too many files, their faces not counted."""
    files = [Path(path) for path in sources if not is_face(path)]
    counts = Counter(path.parent.as_posix() for path in files)
    return [
        f"{folder} has {count} files, more than {MOST_FILES}"
        for folder, count in counts.items()
        if count > MOST_FILES and folder not in ZOOS
    ]


def library() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }


@pytest.mark.parametrize("rule", [violations, intrusions, crowds], ids=lambda rule: rule.__name__)
def test_the_library_keeps_its_rules(rule: Callable[[Mapping[str, str]], list[str]]) -> None:
    sources = library()
    assert sources
    assert not rule(sources), "\n".join(rule(sources))


def test_no_private_name_of_others_is_listed_that_nobody_needs() -> None:
    needed = {name for source in library().values() for _, name in reached(ast.parse(source))}
    assert set(FOREIGN) <= needed


# A small made-up library, all in order.
IN_ORDER = {
    "__init__.py": "from pyro_nf import flows\nfrom pyro_nf.guides.guide import AutoFlow",
    "_checks.py": "import torch",
    "ops/__init__.py": "from pyro_nf.ops.masks import mask",
    "ops/masks.py": "import torch\nfrom pyro_nf._checks import check",
    "nn/made.py": "from pyro_nf.ops import masks\nfrom pyro_nf._checks import check",
    "transforms/__init__.py": "",
    "transforms/base.py": "import pyro.distributions as dist\nfrom pyro.distributions import util",
    "transforms/chain.py": "from .base import FlowTransform\nfrom ..nn.made import MADE",
    "flows/__init__.py": "from .flow import Flow",
    "flows/flow.py": "from pyro import distributions\nfrom pyro_nf.transforms.base import Chain",
    "train/density.py": "from pyro_nf.flows.flow import Flow",
    "testing.py": "from pyro_nf.flows.flow import Flow\ndef check_guide():\n    import pyro.infer",
    "guides/guide.py": "import pyro\nfrom pyro_nf.train.density import fit_density",
    "infer/__init__.py": "from pyro_nf.guides.guide import AutoFlow",
}


def test_checker_accepts_a_library_in_order() -> None:
    assert violations(IN_ORDER) == []
    assert intrusions(IN_ORDER) == []
    assert crowds(IN_ORDER) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("ops/a.py", "from pyro_nf.nn.made import MADE", "ops (floor 1) imports nn (floor 2)"),
        ("nn/a.py", "\nimport pyro_nf.flows.flow as f", "nn/a.py:2: nn (floor 2) imports flows"),
        ("transforms/a.py", "from ..flows.flow import Flow", "imports flows (floor 4)"),
        ("flows/a.py", "from pyro_nf.train.density import fit_density", "imports train (floor 4)"),
        ("nn/a.py", "def f():\n    from pyro_nf.flows.flow import Flow", "imports flows (floor 4)"),
        (
            "nn/a.py",
            "if TYPE_CHECKING:\n    from pyro_nf.flows.flow import Flow",
            "imports flows (floor 4)",
        ),
        (
            "testing.py",
            "def f():\n    from pyro_nf.guides.guide import G",
            "imports guides (floor 8)",
        ),
        ("ops/a.py", "import pyro", "ops may not know pyro"),
        ("nn/a.py", "import pyro.distributions as dist", "nn may not know pyro.distributions"),
        ("univariate/a.py", "from pyro.distributions import Normal", "may not know pyro.distrib"),
        ("transforms/a.py", "import pyro.distributions", "transforms may not know pyro"),
        ("transforms/a.py", "from pyro import poutine", "transforms may not know pyro.poutine"),
        ("flows/a.py", "def f():\n    import pyro.infer as i", "flows may not know pyro.infer"),
        ("testing.py", "import pyro.infer as i", "testing may not know pyro.infer"),
        ("__init__.py", "import pyro", "__init__ may not know pyro"),
        ("guides/a.py", "import pyro_nf", "imports pyro_nf from a face"),
        ("guides/a.py", "from pyro_nf import flows", "imports pyro_nf.flows from a face"),
        ("guides/a.py", "from pyro_nf.flows import Flow", "imports pyro_nf.flows.Flow from a face"),
        ("flows/a.py", "from . import Flow", "imports pyro_nf.flows.Flow from a face"),
        ("flows/__init__.py", "from pyro_nf.nn.made import MADE", "which is not its own"),
        ("flows/a.py", "from pyro_nf.flows.gone import Flow", "pyro_nf.flows.gone.Flow does not"),
        ("utils.py", "", "utils.py: belongs to no room"),
        ("_checks.py", "from pyro_nf.ops.masks import mask", "_checks (floor 1) imports ops"),
        ("transforms/base.py", "from .chain import Chain", "circle: transforms/"),
        ("nn/made.py", "from .made import MADE", "circle: nn/made.py"),
    ],
)
def test_checker_finds(path: str, source: str, message: str) -> None:
    found = violations({**IN_ORDER, path: source})
    assert any(message in line for line in found), found


OWN = """
class A:
    def __init__(self):
        self._x = 1
    def _f(self, other: "A"):
        return super()._g() + other._x + cls._y
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(a): return a._x", "nn/b.py:1: reaches for _x, which belongs to nn/a.py"),
        ("def f(a):\n    a()._f(1)", "nn/b.py:2: reaches for _f, which belongs to nn/a.py"),
        ("from pyro_nf.nn.a import _f", "reaches for _f"),
        ("import torch\ntorch._secret()", "reaches for _secret, which is not ours"),
        ("class B:\n    def f(self): return self.a._x", "reaches for _x"),
        ("import torch\ntorch._C", None),
        ("class B:\n    def f(self): return self._x", None),
        ("class B:\n    _x = 1\ndef f(b): return b._x", None),
        ("_, b = 1, 2\nx = b.__class__", None),
    ],
)
def test_checker_finds_who_reaches_for_what_is_private(source: str, message: str | None) -> None:
    found = intrusions({"nn/a.py": OWN, "nn/b.py": source})
    assert bool(found) == (message is not None), found
    assert message is None or message in found[0]


def test_checker_finds_crowds() -> None:
    files = {f"guides/{i}.py": "" for i in range(MOST_FILES)}
    assert crowds(files | {"guides/__init__.py": ""}) == []
    assert "guides has 9 files" in crowds(files | {"guides/more.py": ""})[0]
    assert crowds({f"nn/{i}.py": "" for i in range(20)}) == []
