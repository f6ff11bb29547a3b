"""The folders are the architecture: imports run one way, and the pure packages stay pure."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each package may import of ours. `cli` is the border and may import every noun.
ALLOWED: dict[str, set[str]] = {
    "kalium.policy": {"kalium.policy"},
    "kalium.protocol": {"kalium.protocol", "kalium.policy"},
    "kalium.pki": {"kalium.pki"},
    "kalium.audit": {"kalium.audit"},
    "kalium.controller": {"kalium.controller", "kalium.protocol", "kalium.policy", "kalium.audit"},
    "kalium.engine": {"kalium.engine"},
    "kalium.registrar": {"kalium.registrar", "kalium.engine"},  # for the agent's socket, which both register at
    "kalium.builder": {"kalium.builder"},
    "kalium.imageserver": {"kalium.imageserver"},
    "kalium.mailsink": {"kalium.mailsink"},
}
# Every package may use these: the error shape for people, and the version.
COMMON = {"kalium", "kalium.__version__", "kalium.errors"}
# A policy is decided and a frame is parsed without a socket, a clock or randomness.
PURE = ("kalium.policy", "kalium.protocol")
IMPURE_MODULES = {"socket", "ssl", "asyncio", "time", "subprocess", "threading", "random", "aiohttp", "requests"}
PRODUCT_NEVER = {"fabric", "ansible", "matplotlib", "pandas", "experiments"}


def modules_under(package: str) -> Iterator[Path]:
    """Every source file of `package`, sorted."""
    yield from sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Absolute dotted names imported anywhere in `path`; relative imports are resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            yield name
            if name == "kalium" or not node.module:
                yield from (f"{name}.{alias.name}" for alias in node.names)


def owner_of(name: str) -> str:
    """The package of ours that `name` belongs to, as ALLOWED spells it."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    """`cli`, `controller` -> `protocol` -> `policy`; nothing looks up or sideways."""
    files = list(modules_under(package))
    assert files, f"{package} has no source: rename it here too"

    strangers = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports_of(path)
        if name.split(".")[0] == "kalium" and owner_of(name) not in ALLOWED[package] | COMMON
    }

    assert strangers == set()


@pytest.mark.parametrize("package", PURE)
def test_the_deciding_packages_open_no_socket_and_read_no_clock(package: str) -> None:
    """The same inputs give the same verdict; time comes in as an argument."""
    impure = {
        f"{path.relative_to(ROOT)}: {name}" for path in modules_under(package) for name in imports_of(path) if name.split(".")[0] in IMPURE_MODULES
    }

    assert impure == set()


def test_the_product_does_not_know_the_experiments_or_their_tools() -> None:
    """Experiments import the product, never the other way round."""
    known = {
        f"{path.relative_to(ROOT)}: {name}" for path in modules_under("kalium") for name in imports_of(path) if name.split(".")[0] in PRODUCT_NEVER
    }

    assert known == set()


@pytest.mark.parametrize("package", ["kalium", "experiments"])
def test_every_package_says_what_belongs_there(package: str) -> None:
    """A reader of any folder learns its purpose from the first line of its `__init__`."""
    silent = [
        str(path.relative_to(ROOT))
        for path in modules_under(package)
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]

    assert silent == []


@pytest.mark.parametrize("folder", ["playbooks", "inventory", "roles", "functions", "results", "policies", "tests", "docs", "runtime", "experiments"])
def test_every_folder_has_a_paragraph_about_itself(folder: str) -> None:
    """Folders that are not packages say it in a README."""
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")

    assert len(text.split()) >= 12
