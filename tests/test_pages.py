"""The pages say what is there: links and anchors, commands and their flags, configurations, and figures that can be checked.

No command is run that takes long. The others' arguments are read by the command's own parser.
"""

import argparse
import dataclasses
import importlib
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from torch.distributed.run import get_args_parser

from launch.cluster import Cluster
from pipeline import config_file
from pipeline.config_file import SCHEMA, load_config, parse_command_line
from pipeline.errors import UserError

FOLDERS = ("configs", "launch", "pipeline", "tests", "tools", ".readme")
PAGES = sorted(
    {*REPOSITORY.glob("*.md"), *(page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("*.md"))}
)
TOOLS = [file for file in sorted((REPOSITORY / "tools").glob("*.py")) if file.stem != "__init__"]
COMMAND = re.compile(r"(?:(?:[A-Z]\w*=\S+ )*)((?:python -m |torchrun |make )\S.*)")


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def without_code(text: str) -> str:
    """The text with neither blocks of code nor code within a line, where brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(page.read_text()).replace("\n", " "))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: list[str] = []
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), flags=re.M
    ):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{text}-{found.count(text)}" if text in found else text)
    return set(found)


def code(page: Path) -> Iterator[str]:
    """Each piece of code: the lines of indented blocks, continued ones joined, and what stands within lines of text."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)).replace("\\\n", " ")
    for line in blocks.splitlines():
        yield line.strip().removeprefix("$ ")
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^ {4}[^\n]*$|^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(page: Path) -> list[str]:
    return [match[1] for piece in code(page) if (match := COMMAND.fullmatch(piece))]


# The changelog names commands of before.
COMMANDS = sorted({command for page in PAGES if page.name != "CHANGELOG.md" for command in commands(page)})


class Understood(Exception):  # noqa: N818 - no error
    """A command has taken its arguments, and would now begin its work."""


def stop(*_: object, **__: object) -> None:
    raise Understood


@pytest.fixture
def understands(monkeypatch, tmp_path) -> Callable[[str, list[str]], None]:
    """Have a module read its arguments and do no more; an argument that it does not take is a `UserError`."""
    site = re.search(r"((?: {4}\w+: .*\n)+)", (REPOSITORY / "launch" / "README.md").read_text())
    assert site, "launch/README.md shows no site.yaml"
    (tmp_path / "site.yaml").write_text(re.sub("^ {4}", "", site[1], flags=re.MULTILINE))
    monkeypatch.chdir(REPOSITORY)

    def then_stop(parse):
        def parse_and_stop(self, *words, **options):
            parse(self, *words, **options)
            raise Understood

        return parse_and_stop

    def parse_run_and_stop(*words, **options):
        parse_command_line(*words, **options)
        raise Understood

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, then_stop(getattr(argparse.ArgumentParser, name)))

    def understand(module: str, words: list[str]) -> None:
        words = [
            {"site.yaml": str(tmp_path / "site.yaml"), "CONFIG.yaml": "configs/demo.yaml"}.get(w, w) for w in words
        ]
        main = importlib.import_module("launch.__main__" if module == "launch" else module)
        monkeypatch.setattr(
            config_file, "parse_command_line", parse_run_and_stop
        )  # after the import, which would keep it
        if module == "launch":
            monkeypatch.setattr(main, "describe", stop)
            monkeypatch.setattr(main, "_refuse_if_running", lambda run: None)
            monkeypatch.setattr(main, "is_complete", lambda *_: False)  # as the demo's run here may be
            monkeypatch.setattr(main, "refuse_impossible", lambda *_, **__: None)
        elif hasattr(main, "parse_command_line"):  # imported before
            monkeypatch.setattr(main, "parse_command_line", parse_run_and_stop)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Understood):
            main.main()

    return understand


def module_and_words(command: str) -> tuple[str, list[str]]:
    """What `python -m` or torchrun starts, and its arguments."""
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    if words[0] == "python" and (words[2] != "pipeline.torchrun" or not words[3:]):
        return words[2], words[3:]
    known, unknown = get_args_parser().parse_known_args(words[1:] if words[0] == "torchrun" else words[3:])
    assert known.module and not unknown, command
    return known.training_script, known.training_script_args


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}, which does not exist"
        assert target.is_relative_to(REPOSITORY), f"{name(page)} links out of the repository: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    for piece in code(page):
        if re.fullmatch(r"(configs|launch|pipeline|tests|tools)/[\w/+.-]*\.\w+", piece):
            assert (REPOSITORY / piece).exists(), f"{name(page)} names {piece}, which does not exist"


def test_every_picture_and_page_is_reached():
    reached = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    there = {*(REPOSITORY / ".readme").iterdir(), *(page for page in PAGES if page.name == "README.md")}
    assert {name(file) for file in there - reached} == set()


def test_the_first_page_can_be_read_to_its_end():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert "run on one GPU" in " ".join(lines[:5]) and "no ImageNet result yet" in " ".join(lines[:5])


def test_there_are_commands():
    assert len(COMMANDS) > 50, COMMANDS


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_targets_of_make_exist(command):
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in shlex.split(command, comments=True)[1:]:
        target = word.partition("=")[0]
        assert re.search(rf"^{target} *(:|\?=)", makefile, flags=re.MULTILINE), f"make has no {target}"


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make ")])
def test_commands_take_their_arguments(command, understands):
    module, words = module_and_words(command)
    if module in ("pytest", "timeit", "NAME", "tools.NAME") or not words:
        files = [word for word in words if word.startswith("tests/")]
        assert all((REPOSITORY / file).exists() for file in files)
        assert module in ("pytest", "NAME", "tools.NAME") or importlib.util.find_spec(module)
        return
    understands(module, words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fields_that_are_named_exist(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    if page.name == "CHANGELOG.md":  # it names old ones
        return
    for piece in code(page):
        words = piece.split() if re.match(r"--(run_dir|seed|\w+\.\w+)", piece) else []
        unknown = [word for word in words if word.startswith("--") and word.removeprefix("--") not in SCHEMA.fields]
        assert not unknown, f"{name(page)} names {unknown[0]}, which is no field"
        if len(words) > 1 and not any(word.isupper() for word in words):
            parse_command_line(["configs/densenet121.yaml", *words], "page", "")
        if re.fullmatch(r"(model|data|optim|train)\.[a-z_]+", piece):
            assert piece in SCHEMA.fields, f"{name(page)} names {piece}, which is no field"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_that_are_named_exist(page):
    """Flags that stand alone in a text, such as --crops 10, belong to one of the commands."""
    sources = [
        file.read_text() for folder in ("launch", "pipeline", "tools") for file in (REPOSITORY / folder).rglob("*.py")
    ]
    known = {
        a or b for source in sources for a, b in re.findall(r'"--([a-z][a-z-]*)"|"([a-z][a-z-]*)": {', source, re.M)
    }
    known |= {field.name.replace("_", "-") for field in dataclasses.fields(Cluster)}
    known |= {flag.removeprefix("--") for flag in get_args_parser()._option_string_actions}
    for piece in code(page):
        for flag in re.findall(r"(?:^|\s)--([a-z][a-z-]*)(?=[\s=]|$)", piece) if piece.startswith("--") else []:
            assert flag in known, f"{name(page)} names --{flag}, which no command has"


def test_a_flag_and_a_field_that_do_not_exist_are_noticed(understands):
    with pytest.raises(UserError, match="--cropz"):
        understands("tools.evaluate", ["W", "--data", "D", "--cropz", "1"])
    with pytest.raises(UserError, match=r"optim\.rate"):
        understands("pipeline.train", ["configs/demo.yaml", "--optim.rate", "1"])


def test_every_configuration_is_listed_with_its_published_error():
    page = (REPOSITORY / "configs" / "README.md").read_text()
    for file in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        link = file.relative_to(REPOSITORY / "configs").as_posix()
        rows = [line for line in page.splitlines() if f"]({link})" in line]
        assert rows, f"configs/README.md does not list {link}"
        published = load_config(file).published.top1
        if published is None:
            continue
        shown = f"[{published:.2f}]({link})" if "/" in link else f"{published:.2f}" if published > 9 else f"{published}"
        assert shown in rows[0], f"configs/README.md has another published error of {link} than {published}"


def test_every_command_of_tools_is_listed():
    page = (REPOSITORY / "tools" / "README.md").read_text()
    for file in TOOLS:
        section = re.search(rf"^### {file.stem}\n(.*?)(?=^#|\Z)", page, flags=re.DOTALL | re.MULTILINE)
        assert section, f"tools/README.md has no section on {file.stem}"
        assert f"    python -m tools.{file.stem} " in section[1], f"tools/README.md has no example of {file.stem}"
    for file in sorted((REPOSITORY / "tools" / "lab").glob("*.py")):
        if "def main(" in file.read_text():
            assert f"`python -m tools.lab.{file.stem}" in page, f"tools/README.md does not list tools.lab.{file.stem}"


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of Markdown tables, without the last one, which may be a remark, and the lines below headings."""
    found = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [row for row in found if set("".join(row)) - set("-: ")]


@pytest.mark.parametrize(
    ("page", "module", "words", "columns"),
    [
        ("configs/README.md", "tools.audit", ["configs/densenet121.yaml"], 4),
        pytest.param("launch/README.md", "tools.lab.scaling", [], 7, marks=pytest.mark.slow),
    ],
)
def test_tables_are_what_the_commands_print(page, module, words, columns, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [module, *words])
    importlib.import_module(module).main()
    printed = [row[:columns] for row in rows(capsys.readouterr().out)]
    shown = rows((REPOSITORY / page).read_text())
    (start,) = [i for i, row in enumerate(shown) if row[:2] == printed[0][:2]]
    table = list(itertools.takewhile(lambda row: len(row) == columns, shown[start:]))
    assert table[1:] and [row for row in table if row[1:] and row not in printed] == []
    if module == "tools.audit":  # whole, but for its last column
        assert table == printed


def test_code_of_the_pages_is_python():
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            compile(block, name(page), "exec")


def test_the_loss_on_the_page_is_the_one_that_is_tested():
    block = re.search(
        r"^```python\n(class Mixup.*?)\nobjective", (REPOSITORY / "pipeline/README.md").read_text(), re.S | re.M
    )
    assert block and block[1].strip() in (REPOSITORY / "tests" / "test_additions.py").read_text()
