"""Rules of `docs/contributing.md`."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re

import equinox as eqx
import eqx_bilevel


package = pathlib.Path(eqx_bilevel.__file__).parent
docs = pathlib.Path(__file__).parent.parent / "docs"


def _modules():
    found = pkgutil.walk_packages(eqx_bilevel.__path__, "eqx_bilevel.")
    return [importlib.import_module(module.name) for module in found]


def _classes():
    classes = {c for m in _modules() for _, c in inspect.getmembers(m, inspect.isclass)}
    ours = [c for c in classes if c.__module__.startswith("eqx_bilevel")]
    return [c for c in ours if issubclass(c, eqx.Module)]


def _overridden(cls):
    # Concrete methods of its bases that a class defines once more.
    for name, value in vars(cls).items():
        method = inspect.isfunction(value) or isinstance(value, property)
        if not method or name in ("__init__", "__repr__", "__eq__", "__hash__"):
            continue
        for base in cls.__mro__[1:]:
            if base not in (object, eqx.Module) and name in vars(base):
                if not getattr(vars(base)[name], "__isabstractmethod__", False):
                    yield base.__name__, name


def test_classes_are_abstract_or_final():
    classes = _classes()
    assert len(classes) > 30
    for cls in classes:
        abstract = cls.__name__.lstrip("_").startswith("Abstract")
        assert inspect.isabstract(cls) == abstract, cls
        assert list(_overridden(cls)) == [], cls
        for base in cls.__bases__:
            public = base.__name__.lstrip("_")
            assert base is eqx.Module or public.startswith("Abstract"), (cls, base)


def test_the_rule_finds_offenders():
    class Sharper(eqx_bilevel.Gaussian):
        def profile(self, s, order):
            return eqx_bilevel.Gaussian.profile(self, 2 * s, order)

    assert list(_overridden(Sharper)) == [("Gaussian", "profile")]


def _imported(path: pathlib.Path):
    # Which modules of the package a file imports, as paths from the package.
    folder = path.parent.relative_to(package).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            inside = folder[: len(folder) + 1 - node.level]
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                yield (*inside, *name.split("."))[0]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            names = [module] if module else [a.name for a in node.names]
            assert not any(n.startswith("eqx_bilevel") for n in names), path


def test_files_import_from_files_above():
    text = (docs / "contributing.md").read_text()
    order = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text, re.MULTILINE)
    files = [p for p in package.rglob("*.py") if p != package / "__init__.py"]
    entries = {p.relative_to(package).parts[0].removesuffix(".py") for p in files}
    assert entries == set(order)
    num_imports = 0
    for path in files:
        entry = path.relative_to(package).parts[0].removesuffix(".py")
        for other in _imported(path):
            assert order.index(other) <= order.index(entry), (path, other)
            num_imports += other != entry
    assert num_imports > 50


def test_only_the_outer_problem_knows_optax():
    knows = [p.name for p in package.rglob("*.py") if "import optax" in p.read_text()]
    assert sorted(knows) == ["_optimiser.py", "_outer.py", "_runs.py"]
