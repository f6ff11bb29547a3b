"""docs/reference/cli.md lists every noun, verb and option that there is, and no other."""

import argparse
import itertools
import re
from pathlib import Path

import pytest

from kalium.cli.main import NOUNS, parser_for
from kalium.controller.log import EVENTS, FIELDS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")


def section(noun: str) -> str:
    """The part of the page about one noun."""
    return TEXT.split(f"\n## kalium {noun}\n")[1].split("\n## ")[0]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table that begins with `header`."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text.split(header)[1].splitlines()[2:])
    return [[cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")] for line in lines]


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers below `parser`, by name."""
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def has_verbs(command: argparse.ArgumentParser) -> bool:
    """Whether it is a noun; `status` and `explain` are commands by themselves."""
    return any(isinstance(action, argparse._SubParsersAction) for action in command._actions)


@pytest.mark.parametrize("noun", NOUNS)
def test_the_page_has_every_verb_and_option_of_a_noun(noun: str) -> None:
    command = subparsers_of(parser_for(noun))[noun]
    verbs = subparsers_of(command) if has_verbs(command) else {noun: command}

    said = {}
    for verb, options, _ in rows(section(noun), "| Verb | Options | Does |"):
        said[verb.strip("`").split()[0]] = set(re.findall(r"--[a-z-]+", options))

    there = {
        name: {option for action in verb._actions for option in action.option_strings if option.startswith("--")} - {"--help"}
        for name, verb in verbs.items()
    }
    assert said == there


def test_the_page_names_the_nouns_and_no_others() -> None:
    assert set(re.findall(r"^## kalium (\w+)$", TEXT, re.MULTILINE)) == set(NOUNS)


def test_the_page_lists_the_events_of_the_controllers_log() -> None:
    said = {
        event.strip("`"): (level, set(re.findall(r"`(\w+)`", fields)))
        for event, level, fields in rows(section("controller"), "| Event | Level | Fields |")
    }

    assert {event: level for event, (level, _) in said.items()} == EVENTS
    assert set().union(*(fields for _, fields in said.values())) <= FIELDS
