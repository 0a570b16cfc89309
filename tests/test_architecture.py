"""The rules of the house as tests: who may import whom, what an import costs, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"
FILES = sorted(PACKAGE.rglob("*.py"))

ALL = {"ops", "losses", "models", "sharding", "data", "train", "generate", "evals", "analysis"}
# package -> what it may import from jaxlm besides `typing` and itself; a dotted name allows that module alone.
LAYERS: dict[str, set[str]] = {
    "typing": set(),
    "ops": set(),
    "losses": {"ops"},
    "models": {"ops"},
    "sharding": {"models.spec"},
    "data": set(),
    "train": {"losses", "ops", "sharding", "data.batch", "models.spec"},
    "generate": {"models", "ops"},
    "evals": {"generate", "models", "data", "ops"},
    "analysis": {"models", "ops", "data"},
    "recipes": ALL,
    "bench": ALL | {"recipes"},
    "cli": ALL | {"recipes", "bench"},
}
THIRD_PARTY_ONLY_IN = {
    "orbax": {"train/checkpoint.py"},
    "torch": {"bench"},
    "transformers": {"bench"},
}
FORBIDDEN = (
    "jax._src",
    "jax.core",
    "flax.nnx",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "tensorflow",
    "clu",
)
BARE_JAX_FREE = ("data",)


def imports(path: Path) -> list[str]:
    """Every module that a file imports, at any depth, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layering(path):
    own = layer(path)
    if own == "__init__":
        assert not [n for n in imports(path) if n.startswith("jaxlm")]
        return
    for name in imports(path):
        if not name.startswith("jaxlm."):
            continue
        target = name.removeprefix("jaxlm.")
        allowed = LAYERS[own] | {own, "typing"}
        assert any(target == a or target.startswith(a + ".") for a in allowed), f"{own} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_forbidden_imports(path):
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN), f"{relative} imports {name}"
        top = name.split(".")[0]
        if top in THIRD_PARTY_ONLY_IN:
            places = THIRD_PARTY_ONLY_IN[top]
            assert any(relative.startswith(p) for p in places), f"{relative} imports {top}; only {places} may"
        if layer(path) in BARE_JAX_FREE:
            assert top not in ("jax", "flax", "optax"), f"{relative} imports {top}: data is numpy only"


def _loaded(statement: str, *packages: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*[p for p in {packages!r} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


HEAVY = ("flax", "orbax", "optax", "tensorflow_datasets", "tensorflow", "torch", "transformers", "grain",
         "matplotlib", "sentencepiece", "tokenizers", "ml_collections", "chex", "jinja2", "pyarrow")  # fmt: skip


@pytest.mark.parametrize("module", ["jaxlm", "jaxlm.losses", "jaxlm.ops.token_stats"])
def test_importing_a_loss_loads_jax_and_nothing_heavier(module):
    assert _loaded(f"import {module}", *HEAVY) == set()


def test_the_data_package_never_loads_jax():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if layer(p) == "data"]
    statement = "import " + ", ".join(m.removesuffix(".__init__") for m in modules if not m.endswith(("prefetch",)))
    assert _loaded(statement, "jax", "tensorflow", "torch") == set()


def test_the_core_never_loads_nnx():
    modules = ["jaxlm.models.decoder", "jaxlm.models.linen", "jaxlm.train.loop", "jaxlm.train.step"]
    assert _loaded("import " + ", ".join(modules), "flax.nnx", "tensorflow", "torch") == set()


def _public(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    return [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_is_documented_and_annotated(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path}: no module docstring"
    for node in _public(tree):
        doc = ast.get_docstring(node)
        assert doc, f"{path}:{node.lineno} {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns, f"{path}:{node.lineno} {node.name}: no return annotation"
            for arg in node.args.args + node.args.kwonlyargs:
                assert arg.annotation, f"{path}:{node.lineno} {node.name}: {arg.arg} is not annotated"


def test_no_module_is_a_bag():
    assert not [p for p in FILES if p.stem in ("utils", "util", "common", "helpers", "misc")]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
