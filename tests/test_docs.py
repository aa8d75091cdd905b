"""Pages say what is there: links resolve, commands and their keys exist, experiments have pages."""

import re
import shlex
from pathlib import Path

import pytest

from speechssm.cli import VERBS
from speechssm.configuration import compose, conf_folder, group_options, plain_keys
from speechssm.errors import SpeechSSMError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("conf", "data", "experiments", "speechssm", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))])

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```(?:sh|bash)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^(?: {4}|\t)(.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:python train\.py|speechssm \S)")
# A value that stands for the reader's own: FOLDER, RUN_OR_SWEEP, `...`
PLACEHOLDER = re.compile(r"[A-Z_]*|\.\.\.")


def pages() -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(text: str) -> list[str]:
    """Commands in code blocks and between backquotes, comments removed, as one line each."""
    blocks = [*FENCED.findall(text), *INDENTED.findall(text)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    lines = [re.split(r"\s{2,}|\s#", line.strip())[0] for line in lines]
    return sorted({line for line in lines if COMMAND.match(line)})


def faults(command: str) -> str:
    """What is wrong with a quoted command: the first word that its config does not know, or ''."""
    words = shlex.split(command)
    verb, words = ("train", words[2:]) if words[0] == "python" else (words[1], words[2:])
    if verb in ("VERB", "--help", "--version"):
        return ""
    if verb not in VERBS:
        return f"no verb {verb}"
    overrides = []
    for word in words:
        if word.startswith("["):  # an option that may be left out
            word = word[1:].removesuffix("]")
        key, equals, value = word.partition("=")
        if not equals:
            continue  # subjects and flags have no key
        if PLACEHOLDER.fullmatch(value.split("/")[0]):
            # Any value will do; of a config group, any of its files.
            group = key not in plain_keys(verb) and group_options(key)
            value = group[0] if group else "x"
        elif verb == "train" and value[0] not in "[{":
            value = value.split(",")[0]  # the first job of a sweep
        overrides.append(f"{key}={value}")
    try:
        compose(verb, overrides)
    except SpeechSSMError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", pages())
def test_relative_links_resolve(page: Path):
    assert not broken_links(page)


@pytest.mark.parametrize("page", pages())
def test_quoted_commands_exist_with_their_keys(page: Path):
    wrong = {command: faults(command) for command in commands(page.read_text())}
    assert not {command: fault for command, fault in wrong.items() if fault}


def test_the_readme_quotes_commands():
    found = commands((ROOT / "README.md").read_text())
    verbs = {"train" if c.startswith("python") else c.split()[1] for c in found}
    assert {"prepare", "train", "tokenize", "generate", "report"} <= verbs


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("speechssm tokenise data=AUDIO", True),
        ("speechssm tokenize data=AUDIO tokenizer=RUN out=UNITS indx=1", True),
        ("speechssm encode codecs=RUN", True),
        ("python train.py stage=lm sequence.length=10 data.foldr=UNITS", True),
        ("python train.py stage=lm model=griffon", True),
        ("python train.py -m stage=lm seed=1,2 model=griffin_demo,transformer_demo", False),
        ("speechssm prepare corpus=librispeech source=FOLDER corpus.heldout=[dev-clean]", False),
        ("speechssm report folder=FOLDER [format=html,markdown,latex]", False),
    ],
)
def test_the_check_of_commands_tells_right_from_wrong(command: str, wrong: bool):
    assert bool(faults(command)) is wrong


def test_every_experiment_has_its_page():
    names = [path.stem for path in (conf_folder() / "experiment").glob("*.yaml")]
    assert names
    missing = [n for n in names if not (ROOT / "experiments" / n / "README.md").is_file()]
    assert not missing
    index = (ROOT / "experiments" / "README.md").read_text()
    assert not [name for name in names if f"({name}/README.md)" not in index]
