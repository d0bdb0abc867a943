"""Mutation testing: does a test fail for every wrong operator, comparison, number and name of a package?

    python tools/mutants.py src/sfumato/diffusion tests/diffusion --out mutants.jsonl [--again] [--budget 8]

Each mutant runs in a fork of a process that holds torch and the oracles already, against those tests alone that reach
its line, first those that saw its neighbours, then the quickest, until one fails; a limit of CPU time ends what would
never end. Results are appended to the file, in an order drawn by the seed: a run that is broken off is a fair sample,
and goes on where it stopped. With --budget a mutant gets so many seconds of tests (as traced) at first; --again runs
once more, against all of them, what survived.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import gc
import importlib
import importlib.util
import json
import math
import os
import random
import resource
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import pytest

WARM = "torch numpy scipy.integrate scipy.special scipy.stats PIL.ImageFont hypothesis.strategies diffusers.schedulers"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
PAIRS = (
    "alpha sigma, x0 eps, from_x0 from_eps, t_min t_max, sigma_min sigma_max, beta_start beta_end, p q, low high, "
    "strong weak, a b, u v, min max, sin cos, any all, isinf isfinite, log1p expm1, h h1, sum prod, int float, "
    "first second, exp log"
)
OTHER = {x: y for pair in PAIRS.split(", ") for x, y in (pair.split(), pair.split()[::-1])}
OPERATORS: dict[type[Any], list[type[Any]]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Div], ast.USub: [ast.UAdd], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip
Line = tuple[str, int]


# ── what may be changed ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Mutant:
    """One change to one module: its name says where and what, ``lines`` are those of its statement."""

    name: str
    path: Path
    function: str
    lines: tuple[int, ...]
    build: Callable[[], CodeType]


def changes(node: ast.AST, names: set[str]) -> Iterator[ast.AST]:
    """What may stand in a node's place; of names, those that its function knows."""
    match node:
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield from (_with(node, op=other()) for other in OPERATORS[type(op)])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield from (_with(node, ops=[*ops[:i], other(), *ops[i + 1 :]]) for other in OPERATORS[type(op)])
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Name(id=name, ctx=ast.Load()) if OTHER.get(name) in names:
            yield _with(node, id=OTHER[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in OTHER:
            yield _with(node, attr=OTHER[name])
        case ast.Raise() | ast.AugAssign():
            yield ast.Pass()


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module; annotations and text are left alone."""
    tree = ast.parse(path.read_text())
    names = set(dir(builtins))

    def visit(node: ast.AST, statement: ast.AST, function: str, put: Callable[[ast.AST], None]) -> Iterator[Mutant]:
        nonlocal names
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".strip(".")
        if isinstance(node, ast.FunctionDef) and isinstance(statement, (ast.Module, ast.ClassDef)):
            names = set(dir(builtins)) | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        if isinstance(node, ast.stmt):
            statement = node
        for new in changes(node, names):

            def build(new: ast.AST = new) -> CodeType:
                put(new)
                code = compile(ast.fix_missing_locations(tree), str(path), "exec")
                put(node)
                return code

            at = f"{path.name}:{getattr(node, 'lineno', 0)}:{getattr(node, 'col_offset', 0)}"
            yield Mutant(f"{at} {_text(node)} -> {_text(new)}", path, function, _lines(statement), build)
        typed = "TypeAlias" in _text(getattr(node, "annotation", None))
        for field, value in [] if typed else list(ast.iter_fields(node)):
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and field not in ("annotation", "returns"):

                    def place(new: ast.AST, field: str = field, i: int = i, value: Any = value) -> None:
                        if isinstance(value, list):
                            value[i] = new
                        else:
                            setattr(node, field, new)

                    yield from visit(child, statement, function, place)

    yield from visit(tree, tree, "", lambda new: None)


def _lines(statement: ast.AST) -> tuple[int, ...]:
    """Lines of a statement, without those of the statements inside it."""
    first = getattr(statement, "lineno", 0)
    inside = [s.lineno for s in getattr(statement, "body", []) if isinstance(s, ast.stmt)]
    return tuple(range(first, max(first, min(inside) - 1 if inside else getattr(statement, "end_lineno", 0)) + 1))


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for field, value in fields.items():
        setattr(new, field, value)
    return new


def _text(node: ast.AST | None) -> str:
    return ast.unparse(node).split("\n")[0] if isinstance(node, (ast.expr, ast.stmt)) else ""


class Changed(SourceFileLoader):
    """Finds and loads a mutant's module, changed."""

    def __init__(self, package: str, mutant: Mutant) -> None:
        stem = mutant.path.stem
        super().__init__(package if stem == "__init__" else f"{package}.{stem}", str(mutant.path))
        self.code = mutant.build()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's spec; None for any other."""
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        """The changed code."""
        return self.code


# ── which tests can see it ─────────────────────────────────────────────────────────────────────────────


class Reach:
    """A pytest plugin that learns which lines of a package each test reaches, and how long it takes."""

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.imported: set[Line] = set()
        self.here = self.imported
        self.lines: dict[str, set[Line]] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """A tracer for ``sys.settrace``."""
        if not frame.f_code.co_filename.startswith(self.package):
            return None
        self.here.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """What is reached from now on is this test's."""
        self.here = self.lines.setdefault(nodeid, set())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the time of setup, call and teardown."""
        self.seconds[report.nodeid] += report.duration


class Chosen:
    """A pytest plugin that runs chosen tests alone, in their order, and says at once which one fails."""

    def __init__(self, tests: list[str], say: Callable[[str], object]) -> None:
        self.place, self.say = {test: k for k, test in enumerate(tests)}, say

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose and order."""
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Speak before pytest writes its report."""
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self.say(item.nodeid)


def forked(work: Callable[[Callable[[Any], NoReturn]], object], seconds: float) -> Any:
    """What work answers in a child with a limit of CPU time; None if the child died of it, or otherwise."""
    read, write = os.pipe()
    gc.freeze()
    if os.fork() == 0:
        gc.disable()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)

        def answer(value: Any) -> NoReturn:
            with os.fdopen(write, "w") as pipe:
                json.dump(value, pipe)
            os._exit(0)

        try:
            work(answer)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text) if text else None


def warm() -> None:
    """Load what every test would load again, and make Hypothesis draw the same examples each time."""
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in WARM.split():
        importlib.import_module(name)
    import diffusers
    from hypothesis import Phase, settings

    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler"):
        getattr(diffusers, name)
    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None, derandomize=True)
    settings.load_profile("mutants")  # the tests' own profile starts from it


def main() -> None:
    """Read the arguments, learn what each test reaches, and run the mutants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="its folder, below src")
    parser.add_argument("tests", type=Path, help="their folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each mutant that was run")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--again", action="store_true", help="run once more what survived")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of tests, as traced, for one mutant")
    args = parser.parse_args()
    package, tests = args.package.resolve(), args.tests.resolve()
    name = ".".join(package.parts[package.parts.index("src") + 1 :])
    warm()

    def learn(answer: Callable[[Any], NoReturn]) -> None:
        reach = Reach(package)
        sys.settrace(reach.trace)
        if pytest.main([*OPTIONS, str(tests)], plugins=[reach]) == 0:
            lines = {test: sorted(lines) for test, lines in reach.lines.items()}
            answer({"seconds": reach.seconds, "imported": sorted(reach.imported), "lines": lines})

    if (learned := forked(learn, 3600)) is None:
        sys.exit("the tests must pass before anything is changed")
    time_of, imported = learned["seconds"], {tuple(line) for line in learned["imported"]}
    reached_by: dict[Line, set[str]] = defaultdict(set)
    for test, lines in learned["lines"].items():
        for line in lines:
            reached_by[tuple(line)].add(test)

    everything = [m for path in sorted(package.glob("*.py")) for m in mutants(path)]
    random.Random(args.seed).shuffle(everything)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    last = {r["mutant"]: r for r in known}
    seen_by: dict[str, list[str]] = defaultdict(list)  # function -> tests that saw its mutants, newest last
    for r in known:
        seen_by[r["function"]] += [r["by"]] if r["by"] in time_of else []
    todo = [m for m in everything if (args.again and not last[m.name]["killed"] if m.name in last else not args.again)]
    print(f"{len(everything)} mutants, {len(last)} known, {len(todo)} to run", flush=True)
    for i, mutant in enumerate(todo):
        lines = {(str(mutant.path), line) for line in mutant.lines}
        near = set().union(*(reached_by[line] for line in lines))
        able = set(time_of) if lines & imported else near  # a module's own tables may change what any test does
        first = seen_by[mutant.function][-8:]
        order = sorted(able, key=lambda t: (t not in first, t not in near, time_of[t]))
        seconds, chosen = 0.0, list[str]()
        while order and seconds < args.budget:
            seconds += time_of[order[0]]
            chosen.append(order.pop(0))

        def attempt(answer: Callable[[Any], NoReturn], mutant: Mutant = mutant, chosen: list[str] = chosen) -> None:
            sys.meta_path.insert(0, Changed(name, mutant))  # type: ignore[arg-type]
            files = sorted({str(tests.parent.parent / test.split("::")[0]) for test in chosen})
            answer({0: "", 1: "import"}.get(pytest.main([*OPTIONS, *files], plugins=[Chosen(chosen, answer)]), "end"))

        by = forked(attempt, 3 * seconds + 20) if chosen else ""
        killed = by != ""  # None: it died, or never came to an end
        result = {"mutant": mutant.name, "function": mutant.function, "killed": killed, "by": by, "tests": len(chosen),
                  "left": len(order)}  # fmt: skip
        seen_by[mutant.function] += [by] if by in time_of else []
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if not killed:
            print(f"{i + 1}/{len(todo)} survived {len(chosen)} of {len(able)} tests: {mutant.name}", flush=True)


if __name__ == "__main__":
    main()
