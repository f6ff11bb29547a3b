"""`kalium function` and `kalium engine` as they are typed, against an engine of the tests."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from engine_world import World, echo, http_answer, play, world

from kalium.cli.main import main

STACK = """\
version: 1.0
provider: {name: openfaas, gateway: http://127.0.0.1:31112}
functions:
  echo:
    lang: python3
    handler: ./echo
    image: echo-built
    fprocess: python3 h.py
    environment: {NUMBER: 1, FLAG: true, TEXT: "yes"}
    labels: {tier: t1}
  other:
    image: shop/echo:2
"""


class Terminal:
    """Types commands and keeps what they print."""

    def __init__(self, site: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.site, self.folder, self._capsys = site, folder, capsys
        self.stack, self.images = folder / "stack.yml", folder / "images.json"
        self.stack.write_text(STACK, encoding="utf-8")
        self.images.write_text(json.dumps({"echo-built": {"image": "shop/echo:1"}}), encoding="utf-8")

    async def type(self, verb: str, *words: str) -> tuple[int, str, str]:
        options = ["--gateway", f"http://{self.site.listening['address']}"]
        if verb != "invoke":
            options += ["--password-file", str(self.site.config.password_file)]
        if verb == "deploy":
            options += ["-f", str(self.stack), "--images", str(self.images)]
        self._capsys.readouterr()
        code = await asyncio.to_thread(main, ["function", verb, *words, *options])
        printed = self._capsys.readouterr()
        assert len(printed.err.splitlines()) in (0, 2), "an error is two lines"
        return code, printed.out, printed.err


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plays a story that is given a terminal."""

    def played(story: Any) -> None:
        async def whole() -> None:
            async with world(tmp_path) as site:
                await story(Terminal(site, tmp_path, capsys))

        play(whole())

    return played


def test_a_stack_file_is_deployed_and_waited_for(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        code, out, err = await terminal.type("deploy")
        assert (code, err) == (0, "")
        assert out.splitlines() == ["deployed echo (shop/echo:1)", "deployed other (shop/echo:2)", "ready echo", "ready other"]
        described = await terminal.site.describe()
        assert described["availableReplicas"] == 1
        assert described["envVars"] == {"NUMBER": "1", "FLAG": "true", "TEXT": "yes"}
        assert (described["labels"], described["envProcess"]) == ({"tier": "t1"}, "python3 h.py")
        assert (await terminal.type("deploy", "--only", "other", "--no-wait"))[1] == "updated other (shop/echo:2)\n"

    terminal(story)


def test_a_dry_run_changes_nothing(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        code, out, _ = await terminal.type("deploy", "--dry-run", "--only", "echo")
        assert (code, json.loads(out)[0]["service"]) == (0, "echo")
        assert (await terminal.site.call("GET", "/system/functions"))[1] == "[]"
        await terminal.type("deploy")
        assert (await terminal.type("remove", "echo", "--dry-run"))[:2] == (0, "would remove echo and its 1 instances\n")
        assert (await terminal.site.describe())["availableReplicas"] == 1

    terminal(story)


@pytest.mark.parametrize(
    ("stack", "words", "told"),
    [
        ("functions: [", (), "it is no YAML"),
        ("functions: {}", (), "it has no `functions`"),
        ("functions: {echo: 1}", (), "it has no `functions`"),
        ("functions: {echo: {labels: [a]}}", (), "echo: environment, labels and annotations map names to texts"),
        (STACK, ("--only", "absent"), "it has no function absent, only echo, other"),
    ],
)
def test_a_stack_file_that_cannot_be_meant_is_wrong_usage(terminal: Any, stack: str, words: tuple[str, ...], told: str) -> None:
    async def story(terminal: Terminal) -> None:
        terminal.stack.write_text(stack, encoding="utf-8")
        code, _, err = await terminal.type("deploy", *words)
        assert (code, told in err) == (2, True), err

    terminal(story)


def test_what_the_gateway_refuses_is_the_answer_no(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        terminal.site.machine.images.clear()
        code, _, err = await terminal.type("deploy")
        assert (code, "400 image shop/echo:1 is not on this machine" in err) == (1, True), err
        assert (await terminal.type("remove", "echo"))[0] == 1
        assert (await terminal.type("describe", "echo"))[0] == 1

    terminal(story)


def test_an_instance_that_fails_ends_the_wait_with_its_reason(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        terminal.site.machine.fails = lambda command: "no sandbox today" if " start " in command else None
        code, _, err = await terminal.type("deploy", "--only", "echo")
        assert (code, "podman cannot start it: Error: no sandbox today" in err) == (1, True), err

    terminal(story)


def test_functions_are_listed_and_described_for_people_and_for_programs(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        await terminal.type("deploy")
        lines = (await terminal.type("list"))[1].splitlines()
        assert [line.split() for line in lines] == [
            ["NAME", "READY", "INVOCATIONS", "RUNTIME", "APP", "IMAGE"],
            ["echo", "1/1", "0", "stock", "-", "shop/echo:1"],
            ["other", "1/1", "0", "stock", "-", "shop/echo:2"],
        ]
        assert [entry["name"] for entry in json.loads((await terminal.type("list", "--output", "json"))[1])] == ["echo", "other"]
        text = (await terminal.type("describe", "echo"))[1]
        assert "annotation kalium.io/address:" in text
        assert "FLAG, NUMBER, TEXT" in text
        assert "yes" not in text, "values may be passwords"
        assert json.loads((await terminal.type("describe", "echo", "--output", "json"))[1])["name"] == "echo"

    terminal(story)


def test_an_invocation_prints_the_answer_and_its_exit_code_is_the_answers(terminal: Any) -> None:
    async def story(terminal: Terminal) -> None:
        await terminal.type("deploy", "--only", "echo")
        body = terminal.folder / "body.json"
        body.write_text('{"a": 1}', encoding="utf-8")

        code, out, _ = await terminal.type(
            "invoke", "echo", "--data", f"@{body}", "--path", "/x?y=1", "--header", "X-Call-Id: mine", "--method", "PUT"
        )
        said = json.loads(out)
        assert (code, said["body"], said["head"].splitlines()[0]) == (0, '{"a": 1}', "PUT /x?y=1 HTTP/1.1")
        assert "X-Call-Id: mine" in said["head"]
        assert "Content-Type: application/json" in said["head"]

        async def refuse(head: str, body: str) -> bytes:
            return http_answer(403, b"not yours")

        terminal.site.machine.answering = refuse
        code, out, err = await terminal.type("invoke", "echo")
        assert (code, out, "it answered 403" in err) == (1, "not yours", True)
        terminal.site.machine.answering = echo
        assert (await terminal.type("invoke", "echo", "--header", "no colon"))[0] == 2
        assert (await terminal.type("invoke", "echo", "--path", "x"))[0] == 2
        assert (await terminal.type("invoke", "absent"))[0] == 1
        assert (await terminal.type("invoke", "echo", "--data", "@/absent"))[0] == 3

    terminal(story)


def test_a_wrong_password_and_no_gateway_are_told(terminal: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def story(terminal: Terminal) -> None:
        terminal.site.config.password_file.write_text("wrong", encoding="utf-8")
        code, _, err = await terminal.type("list")
        assert (code, "does not take the password" in err) == (3, True), err
        for url, expected in (("http://127.0.0.1:1", 3), ("https://127.0.0.1", 2), ("http://127.0.0.1:x", 2), ("gateway", 2)):
            assert await asyncio.to_thread(main, ["function", "invoke", "echo", "--gateway", url]) == expected, url

    terminal(story)


@pytest.mark.parametrize("words", [["serve"], ["network", "up"], ["network", "down"]])
def test_an_engine_without_a_configuration_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["engine", *words, "--config", str(tmp_path / "absent.json")]) == 3
    assert capsys.readouterr().err.startswith("error[engine.config]: cannot read the configuration ")
