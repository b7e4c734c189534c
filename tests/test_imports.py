"""Dependencies point one way: entry points use the trainer, the trainer uses the parts, the parts use the foundations."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

LAYERS = [
    {
        "pipeline.class_names",
        "pipeline.cpp",
        "pipeline.errors",
        "pipeline.exits",
        "pipeline.machine",
        "pipeline.nvjpeg",
        "pipeline.paths",
    },
    {"pipeline.preemption"},
    {"pipeline.command"},
    {"pipeline.followers", "pipeline.renamed", "pipeline.run_dir", "pipeline.unused", "pipeline.words"},
    {"pipeline.parsing"},
    {"pipeline.config", "pipeline.distributed", "pipeline.measured", "pipeline.ranking"},
    {"pipeline.config_file", "pipeline.cuda_graphs", "pipeline.paper", "pipeline.run_log"},
    {
        "pipeline.data",
        "pipeline.models",
        "pipeline.metrics",
        "pipeline.checkpoint",
        "pipeline.compilation",
        "pipeline.monitor",
        "pipeline.audit",
        "pipeline.history",
        "pipeline.pace",
        "pipeline.pictures",
        "pipeline.precision",
        "pipeline.provenance",
        "pipeline.watchdog",
    },
    {"pipeline.preprocessing"},
    {"pipeline.external_weights"},
    {
        "pipeline.autotune",
        "pipeline.batches",
        "pipeline.cautions",
        "pipeline.ema",
        "pipeline.evaluation",
        "pipeline.feature_reuse",
        "pipeline.finite",
        "pipeline.objective",
        "pipeline.optim",
        "pipeline.recipes",
        "pipeline.resume",
        "pipeline.weights",
    },
    {"pipeline.budget", "pipeline.joint_objective", "pipeline.start"},
    {"pipeline.run"},
    {"pipeline.report", "pipeline.update"},
    {"pipeline.hooks"},
    {"pipeline.trainer"},
    {"pipeline.api", "pipeline.torchrun", "pipeline.train"},
    {"tools.support"},
    {"tools.lab", "launch"},
    {"tools"},
]
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in ("pipeline", "tools", "launch")
    for path in (REPOSITORY / folder).rglob("*.py")
    if path.parent.name != "pipeline" or path.name != "__init__.py"
)


def layer_and_part(module: str) -> tuple[int, str]:
    return next(
        (number, part)
        for number, parts in enumerate(LAYERS)
        for part in parts
        if module == part or module.startswith(part + ".")
    )


def imports_of(module: str) -> set[str]:
    source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "pipeline" else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_below_or_from_its_own_part(module):
    own_layer, own_part = layer_and_part(module)
    for imported in imports_of(module):
        if imported.split(".")[0] in ("pipeline", "tools", "launch") and imported != "pipeline":
            layer, part = layer_and_part(imported)
            assert layer < own_layer or part == own_part, f"{module} imports {imported}"


def test_configuration_needs_no_torch():
    assert not any(
        name.split(".")[0] == "torch" for name in imports_of("pipeline.config") | imports_of("pipeline.config_file")
    )


def test_no_users_command_needs_the_laboratory():
    users = [module for module in MODULES if module.startswith("tools.") and not module.startswith("tools.lab.")]
    assert not [module for module in users if any(name.startswith("tools.lab") for name in imports_of(module))]


def test_dali_is_imported_where_pipelines_of_it_are_defined_and_nowhere_else():
    users = [module for module in MODULES if any(name.startswith("nvidia") for name in imports_of(module))]
    assert set(users) <= {"pipeline.data.dali", "pipeline.data.dali_stages", "tools.lab.peers"}


@pytest.mark.parametrize("package", ["pipeline", "tools", "launch.__main__"])
def test_waiting_threads_are_set_up_before_torch_is_loaded(package):
    """OpenMP reads its settings when it is loaded. The launcher needs no torch at all: it takes seconds to load."""
    script = f"import os, sys, {package}; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.stdout == "10000 False\n"
