"""Building, installing and loading the compiled libraries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lance_kernels

ROOT = Path(__file__).parent.parent

SMOKE = """
import torch, lance_kernels
x, u, v = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(6, 3).double(), torch.randn(5, 2).double()
core = torch.ops.lance.tucker_project(x, [None, u, v])
torch.testing.assert_close(core, torch.einsum("bij,ip,jq->bpq", x, u, v))
info = lance_kernels.build_info()
print(lance_kernels.__file__, info["cpu_library"], info["compiler"], info["pure_python_reason"], sep="|")
"""


def run(arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def smoke(package, tmp_path, **environment):
    """Runs the smoke test against the package in the directory `package`, away from the checkout."""
    result = run(["-c", SMOKE], tmp_path, PYTHONPATH=str(package), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("|")


def copy_sources(target):
    """A tree that builds, without what is compiled and without other people's caches."""
    for name in ("csrc", "lance_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    readme = ROOT / "README.md"
    (target / "README.md").write_text(readme.read_text() if readme.exists() else "lance_kernels\n")
    return target


def build_wheel(source, tmp_path, *options, **environment):
    wheels = tmp_path / "wheels"
    result = run(
        ["-m", "pip", "wheel", "-v", source, "--no-deps", "-w", wheels, *options], tmp_path, MAX_JOBS="2", **environment
    )
    return result, next(iter(wheels.glob("*.whl")), None)


def install(wheel, target, tmp_path):
    result = run(["-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], tmp_path)
    assert result.returncode == 0, result.stderr
    return target


def without_compiled_package(target):
    """The package's Python files alone, copied."""
    shutil.copytree(
        ROOT / "lance_kernels", target / "lance_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return target


def test_build_info_tells_what_was_compiled():
    info = lance_kernels.build_info()
    assert info["cpu_library"] is not None
    assert Path(info["cpu_library"]).exists()
    assert info["cpu_capability"] in ("generic", "avx2", "avx512")
    assert info["compiler"].startswith(("gcc", "clang"))
    assert info["minimum_torch"] == "2.11"
    assert info["pure_python_reason"] is None


def test_wheel_installs_elsewhere_and_runs(tmp_path):
    source = copy_sources(tmp_path / "source")
    result, wheel = build_wheel(source, tmp_path, "--no-build-isolation", LANCE_REQUIRE_EXT="1")
    assert wheel is not None, result.stdout + result.stderr
    assert "none-any" not in wheel.name
    target = install(wheel, tmp_path / "target", tmp_path)
    module, library, compiler, reason = smoke(target, tmp_path)
    assert module.startswith(str(target))
    assert library == str(target / "lance_kernels" / "lance_cpu.so")
    assert compiler != "None"
    assert reason == "None"


def test_isolated_build_finds_the_outer_torch(tmp_path):
    # The build environment is stood in for by an interpreter that does not see site-packages (-S), with setuptools and
    # pybind11 put in front, as pip's isolation does.
    source = copy_sources(tmp_path / "source")
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources", "pybind11", "packaging"):
        found = next((Path(entry) / name for entry in sys.path if (Path(entry) / name).is_dir()), None)
        if found is not None:
            (packages / name).symlink_to(found)
    script = "import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    result = run(["-S", "-c", script], source, PYTHONPATH=str(packages), LANCE_REQUIRE_EXT="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("lance_kernels")


def test_no_compiler_installs_pure_python_and_says_so(tmp_path):
    source = copy_sources(tmp_path / "source")
    result, wheel = build_wheel(source, tmp_path, "--no-build-isolation", CXX="no-such-compiler", LANCE_REQUIRE_EXT="0")
    assert wheel is not None, result.stdout + result.stderr
    assert wheel.name.endswith("none-any.whl")
    assert "WITHOUT its compiled kernels" in result.stdout + result.stderr
    _, library, compiler, reason = smoke(install(wheel, tmp_path / "target", tmp_path), tmp_path)
    assert (library, compiler) == ("None", "None")
    assert "no-such-compiler" in reason


def test_required_extension_makes_a_missing_compiler_an_error(tmp_path):
    source = copy_sources(tmp_path / "source")
    result = run(["setup.py", "--name"], source, CXX="no-such-compiler", LANCE_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "LANCE_REQUIRE_EXT" in result.stderr
    assert "no-such-compiler" in result.stderr


def test_no_torch_is_not_buildable(tmp_path):
    source = copy_sources(tmp_path / "source")
    (source / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    script = "import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    result = run(["-c", script], source, LANCE_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "this torch is broken" in result.stderr
    result = run(["-c", script], source, LANCE_REQUIRE_EXT="0")
    assert result.returncode == 0, result.stderr
    assert "WITHOUT its compiled kernels" in result.stderr


def test_a_damaged_library_is_an_error_with_its_cause(tmp_path):
    package = without_compiled_package(tmp_path / "package")
    library = package / "lance_kernels" / "lance_cpu.so"
    library.write_bytes(b"not a library")
    result = run(["-c", "import lance_kernels"], tmp_path, PYTHONPATH=str(package))
    assert result.returncode != 0
    assert f"{library} is there but does not load" in result.stderr
    assert "invalid ELF header" in result.stderr or "file too short" in result.stderr


def test_a_named_library_that_is_missing_is_an_error(tmp_path):
    missing = tmp_path / "missing.so"
    result = run(["-c", "import lance_kernels"], tmp_path, LANCE_CPU_LIBRARY=str(missing))
    assert result.returncode != 0
    assert str(missing) in result.stderr


def test_an_absent_library_leaves_the_references(tmp_path):
    package = without_compiled_package(tmp_path / "package")
    module, library, _, reason = smoke(package, tmp_path)
    assert module.startswith(str(package))
    assert library == "None"
    assert reason == "None"


@pytest.mark.parametrize("capability", ["generic", "avx2"])
def test_a_lower_instruction_set_can_be_asked_for(tmp_path, capability):
    script = "import lance_kernels; print(lance_kernels.build_info()['cpu_capability'])"
    result = run(["-c", script], tmp_path, LANCE_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("generic", capability)


def test_cmake_builds_and_tests_the_same_sources(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.fail("cmake is not installed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in (configure, [cmake, "--build", tmp_path], ["ctest", "--test-dir", tmp_path, "--output-on-failure"]):
        result = subprocess.run(
            list(map(str, command)), env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr
    assert "100% tests passed" in result.stdout
