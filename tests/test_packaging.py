"""What an installation brings: pyproject.toml, the requirements files and the imports say the same."""

import importlib.metadata
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import MODULES, imports_of

from pipeline import cpp
from pipeline.data import native
from pipeline.models import kernels

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
RUN_TIME = PROJECT["project"]["dependencies"]
DEVELOPMENT = PROJECT["project"]["optional-dependencies"]["dev"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by canonical name, without comments and references to other files."""
    stripped = (re.sub(r"#.*", "", line).strip() for line in lines)
    found = [Requirement(line) for line in stripped if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.mark.parametrize(
    ("allowed", "file"), [(RUN_TIME, "requirements.txt"), (DEVELOPMENT, "requirements-dev.txt")], ids=["run", "dev"]
)
def test_the_pinned_versions_are_allowed_ones(allowed, file):
    wanted, pinned = requirements(allowed), requirements((REPOSITORY / file).read_text().splitlines())
    assert pinned.keys() == wanted.keys()
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and wanted[name].specifier.contains(pin.version), name
        assert requirement.marker == wanted[name].marker, name


def test_the_run_time_dependencies_are_the_imported_packages():
    """Without onnxruntime and pyarrow, which are asked for when they are needed, and Triton, of which torch brings the version
    that fits it; with tensorboard and nvJPEG, which torch and DALI load."""
    providers = importlib.metadata.packages_distributions()
    imported = {name.split(".")[0] for module in MODULES for name in imports_of(module)}
    foreign = imported - set(sys.stdlib_module_names) - {"pipeline", "launch", "tools", "pyarrow"}
    distributions = {canonicalize_name(providers[name][0]) for name in foreign if name != "nvidia"}
    assert "nvidia" in foreign
    assert (
        distributions - {"onnxruntime", "triton"} | {"nvidia-dali-cuda130", "nvidia-nvjpeg", "tensorboard"}
        == requirements(RUN_TIME).keys()
    )


def test_a_wheel_has_every_file_of_its_packages():
    patterns = ["*.py", *PROJECT["tool"]["setuptools"]["package-data"]["*"]]
    files = [path for package in ("pipeline", "launch", "tools") for path in (REPOSITORY / package).rglob("*")]
    names = [path.name for path in files if path.is_file() and "__pycache__" not in path.parts]
    assert names and [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert found.get("namespaces", True)  # folders of data alone are found as such
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in files}
    assert [name for name in folders if not any(fnmatch(name, pattern) for pattern in found["include"])] == []


def test_continuous_integration_runs_the_two_commands_of_the_readme():
    workflow = yaml.safe_load(Path(REPOSITORY, ".github", "workflows", "test.yaml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make demo", "make test"]


def test_the_parts_in_cpp_compile_where_there_is_gcc():
    """Their own tests are left out where they cannot be used, as with a clang without OpenMP."""
    if sys.platform != "linux" or b"Free Software Foundation" not in cpp.version_of(cpp.find_compiler()):
        pytest.skip("no Linux with GCC")
    assert native.unavailable_reason() is None and kernels.unavailable_reason() is None
