"""What is published: a wheel that works anywhere, and an sdist from which the same wheel is built."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import llama2tut

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("configs", "data/dialogues", "data/dialogues-zh", "data/general", "data/prompts", "reports/page.html",
           "py.typed")


def build(source: Path, target: Path, *kinds: str) -> Path:
    """The one file that the build backend makes of a source tree, without a network."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", target, *kinds], cwd=source, check=True,
                   capture_output=True)
    [made] = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"), "-t", "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("sdist"), "-t", "sdist")


@pytest.fixture(scope="module")
def anywhere(wheel, tmp_path_factory):
    """Runs `llama2tut` as the wheel installs it, in a folder that knows nothing of the repository."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                    "--target", site, wheel], check=True, capture_output=True)

    def run(*command) -> str:
        done = subprocess.run([*command], cwd=folder, capture_output=True, text=True, check=False,
                              env=os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return site, run


def test_recipes_templates_and_samples_are_found_outside_the_repository(anywhere, toy_model_dir):
    site, run = anywhere
    program = site / "bin" / "llama2tut"
    assert run(program, "--version") == f"llama2tut {llama2tut.__version__}\n"
    assert "arithmetic_train.csv  40 rows" in run(program, "gen-arithmetic", "--train", "40", "--validation", "4",
                                                  "--test", "4")
    plan = run(program, "finetune", "--task", "arithmetic", "--config", "arithmetic-cpu", "--model", toy_model_dir,
               "--dry-run")
    recipe = yaml.safe_load((REPOSITORY / "configs" / "arithmetic-cpu.yaml").read_text())
    for key in ("limit", "batch_size", "lr"):
        assert f"\n{key}: {recipe[key]}\n" in plan
    found = run(sys.executable, "-c", "from llama2tut.resources import shipped\n"
                "from llama2tut.tasks.rows import load_rows\n"
                "from llama2tut.tasks.task import SAMSUM\n"
                "print(len(load_rows(SAMSUM, 'dialogues', seed=0, splits=('test',)).test))\n"
                f"for name in {SHIPPED}:\n"
                "    print(shipped(name), shipped(name).exists())")
    recipes = {path.name for path in (site / "llama2tut" / "configs").iterdir()}
    assert recipes == {path.name for path in (REPOSITORY / "configs").glob("*.yaml")}  # the tasks' rows are not shipped
    rows, *places = found.splitlines()
    assert int(rows) > 0
    assert places == [f"{site}/llama2tut/{name} True" for name in SHIPPED]


def test_the_sdist_builds_the_same_wheel_and_holds_the_tests(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path], check=True)  # Python 3.11.0 has no `filter` to extract with
    for name in ("tests/project/test_wheel.py", "scripts/setup.sh", "docs/configuration.md", "requirements.lock",
                 "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "configs/arithmetic-cpu.yaml"):
        assert name in names
    assert not [name for name in names if name.startswith(("data/arithmetic", "outputs", ".venv"))]
    again = build(next(tmp_path.glob("llama2tut-*")), tmp_path / "wheel", "-t", "wheel")
    first, second = (zipfile.ZipFile(file) for file in (wheel, again))
    assert sorted(first.namelist()) == sorted(second.namelist())
    assert all(first.read(name) == second.read(name) for name in first.namelist())


def test_the_metadata_is_valid_and_says_what_is_true(wheel):
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(name), validate=True)
        [licence] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence).split() == (REPOSITORY / "LICENSE").read_bytes().split()
    assert (metadata.name, str(metadata.version)) == ("llama2tut", llama2tut.__version__)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()


def test_changelog_and_citation_are_of_this_version():
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert newest
    assert newest[1] == citation["version"] == llama2tut.__version__
    assert (citation["cff-version"], citation["license"], citation["title"]) == ("1.2.0", "Apache-2.0", "llama2tut")
    assert citation["message"]
    assert citation["authors"]
