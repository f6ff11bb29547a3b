"""`kalium policy apply`, `history` and `rollback` against a controller that runs: what is in force, and what stays when one is refused."""

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controller_samples import compiled
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_controller_server import Site, until

from kalium.cli import apply
from kalium.cli.main import main
from kalium.controller import client
from kalium.controller.config import load
from kalium.controller.store import SUFFIX
from kalium.policy import envelope
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.envelope import canonical, sign
from kalium.policy.limits import ENVELOPE_BYTES_MAX

STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)


class Operator:
    """Whoever works on the controller's host."""

    def __init__(self, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
        self.site = site
        self.folder = site.path / "policies"
        self.key = envelope.private_key((site.path / "operator.key").read_bytes(), "operator.key")
        self._capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """`run("apply", ...)` gives exit code, standard output and standard error."""
        code = main(["policy", *(str(argument) for argument in arguments), "--config", str(self.site.config)])
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    def signed(self, version: int, **changed: Any) -> Path:
        """A signed version of the policy, with other fields."""
        return self.file(sign(canonical(json.loads(compiled(version)) | changed), self.key))

    def file(self, data: bytes) -> Path:
        path = self.site.path / "new.json"
        path.write_bytes(data)
        return path

    def files(self) -> dict[str, bytes]:
        """All that is in the directory of policies."""
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def in_force(self) -> int:
        return client.status(load(self.site.config)).policies["shop"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose controller runs, with version 1 in force."""
    made = Site(tmp_path, "uvloop")
    made.start()
    yield made
    if made.process is not None:
        made.stop()


@pytest.fixture
def operator(site: Site, capsys: pytest.CaptureFixture[str]) -> Operator:
    capsys.readouterr()
    return Operator(site, capsys)


def test_a_policy_is_in_force_when_apply_says_so(operator: Operator) -> None:
    new = operator.signed(2)

    code, out, err = operator.run("apply", new)

    assert (code, out, err) == (0, "changed: shop: version 2 is in force, mode enforce\n", "")
    assert operator.in_force() == 2
    assert operator.files()["shop.signed.json"] == new.read_bytes()
    assert operator.run("apply", new)[:2] == (0, "unchanged: shop: version 2 is in force, mode enforce\n")


def test_a_new_application_needs_no_other_word(operator: Operator) -> None:
    new = operator.signed(7, app="stall")

    code, out, _ = operator.run("apply", new, "--output", "json")

    assert (code, json.loads(out)) == (0, {"app": "stall", "version": 7, "mode": "enforce", "changed": True, "dry_run": False})
    assert client.status(load(operator.site.config)).policies == {"shop": 1, "stall": 7}


def test_what_was_in_force_can_be_gone_back_to(operator: Operator) -> None:
    """Also what the site itself had put there: the text is the old one, the number a new one."""
    operator.run("apply", operator.signed(2, mode="audit"))
    operator.run("apply", operator.signed(5, mode="audit"))

    code, out, _ = operator.run("rollback", "shop", "--to", 1, "--key", operator.site.path / "operator.key")

    assert (code, out) == (0, "changed: shop: version 6, the text of version 1, is in force, mode enforce\n")
    in_place = envelope.verify(operator.files()["shop.signed.json"], operator.key.public_key())
    assert canonical(json.loads(envelope.read(operator.files()["shop.signed.json"]).compiled) | {"version": 1}) == compiled(1)
    assert (in_place.version, in_place.mode.value, operator.in_force()) == (6, "enforce", 6)
    _, listed, _ = operator.run("history", "shop", "--output", "json")
    assert [(kept["version"], kept["mode"], kept["in_place"], kept["fault"]) for kept in json.loads(listed)] == [
        (1, "enforce", False, ""),
        (2, "audit", False, ""),
        (5, "audit", False, ""),
        (6, "enforce", True, ""),
    ]
    _, shown, _ = operator.run("history", "shop")
    assert [line[:4] for line in shown.splitlines()] == ["  1 ", "  2 ", "  5 ", "* 6 "]


def grown(data: bytes) -> bytes:
    """An envelope beyond every bound."""
    return data.replace(b'"key_id"', b" " * ENVELOPE_BYTES_MAX + b'"key_id"')


def with_states(version: int, states: int) -> bytes:
    """A compiled policy whose function has so many states, in a chain."""
    document = json.loads(compiled(version))
    front = document["functions"]["front"]
    front.update(states=states, edges=[[state, 0, state + 1] for state in range(min(states, 20_000) - 1)], accept=[states - 1])
    return canonical(document)


def unchecked(data: bytes, key: Ed25519PrivateKey) -> bytes:
    """An envelope that `sign` refuses to make: whoever has the key may make it by hand."""
    fields = json.loads(sign(compiled(2), key))
    signature = key.sign(f"{envelope.SIGNED_FORMAT}\n".encode() + data)
    return canonical(fields | {"policy": b64encode(data).decode(), "signature": b64encode(signature).decode()})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda key: sign(compiled(2), STRANGER), "policy.signature"),
        (lambda key: sign(compiled(2), key).replace(b'"signature":"', b'"signature":"AAAA'), "policy.signature"),
        (lambda key: sign(compiled(2), key)[:-100], "policy.malformed"),
        (lambda key: grown(sign(compiled(2), key)), "policy.malformed"),
        (lambda key: compiled(2), "policy.malformed"),
        (lambda key: b"", "policy.malformed"),
        (lambda key: unchecked(with_states(2, 100_000), key), "policy.malformed"),
        (lambda key: unchecked(compiled(2)[:-1], key), "policy.malformed"),
        (lambda key: sign(canonical(json.loads(compiled(1)) | {"mode": "audit"}), key), "policy.version"),
    ],
    ids=["another key", "signature", "truncated", "huge", "not signed", "empty", "100,000 states", "signed and truncated", "same version"],
)
def test_a_bad_policy_changes_nothing(operator: Operator, make: Any, code: str) -> None:
    """Neither what apply is given, nor what somebody copies into the directory: what was in force stays, and the old text stays there."""
    before, data = operator.files(), make(operator.key)

    exit_code, out, err = operator.run("apply", operator.file(data))

    assert (exit_code, out) == (1, "")
    assert err.startswith(f"error[{code}]: ") and "\nnext: " in err
    assert operator.files() == before

    (operator.folder / "shop.signed.json").write_bytes(data)
    until(lambda: [line for line in operator.site.events("policy_refused") if line["reason"] in (code, "controller.policy_file")], "the refusal")
    assert operator.in_force() == 1


def test_a_version_that_does_not_grow_is_refused(operator: Operator) -> None:
    operator.run("apply", operator.signed(5))
    before = operator.files()

    code, _, err = operator.run("apply", operator.signed(4))

    assert (code, operator.files(), operator.in_force()) == (1, before, 5)
    assert "error[policy.version]: cannot apply version 4 of shop: version 5 is in force" in err
    assert "next: write `version: 6`" in err


def test_a_file_that_is_gone_or_damaged_is_repaired(operator: Operator) -> None:
    """The version is in force already, and its own bytes are put there again. Other bytes of that version are not."""
    new = operator.signed(2)
    operator.run("apply", new)
    in_place = operator.folder / "shop.signed.json"

    for damage in (in_place.unlink, lambda: in_place.write_bytes(b"?")):
        damage()
        assert operator.run("apply", new)[:2] == (0, "changed: shop: version 2 is in force, mode enforce\n")
        assert in_place.read_bytes() == new.read_bytes()

    in_place.unlink()
    assert operator.run("apply", operator.signed(2, mode="audit"))[0] == 1
    assert not in_place.exists()


def test_what_the_controller_does_not_take_is_taken_back(operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was started with another directory than the configuration names now."""
    monkeypatch.setattr(apply, "WITHDRAWN_S", 0.2)
    (tmp_path / "elsewhere").mkdir()
    operator.site.configure(policies_dir="elsewhere")

    code, _, err = operator.run("apply", operator.signed(2), "--wait", 1)

    assert code == 1
    assert "error[policy.not_taken]: cannot apply version 2 of shop: the controller has not taken it within 1 s" in err
    assert "shop.signed.json is removed again" in err
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]

    last_good = sign(compiled(1), operator.key)
    (tmp_path / "elsewhere" / "shop.signed.json").write_bytes(last_good)
    code, _, err = operator.run("apply", operator.signed(2), "--wait", 1)

    assert (code, "shop.signed.json is as it was" in err) == (1, True)
    assert (tmp_path / "elsewhere" / "shop.signed.json").read_bytes() == last_good


def test_a_file_that_was_read_before_it_was_taken_back_stays(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the controller would start with the old version next time, after agents have seen the new one."""
    answers = iter([False, True])
    monkeypatch.setattr(apply, "_is_taken", lambda *_: next(answers))
    new = operator.signed(2)

    assert operator.run("apply", new)[0] == 0
    assert operator.files()["shop.signed.json"] == new.read_bytes()


def test_without_a_controller_nothing_is_written(operator: Operator) -> None:
    operator.site.stop()
    before = operator.files()

    code, _, err = operator.run("apply", operator.signed(2))

    assert (code, operator.files()) == (3, before)
    assert "error[controller.away]" in err


def test_a_dry_run_asks_and_writes_nothing(operator: Operator) -> None:
    before = operator.files()

    code, out, _ = operator.run("apply", operator.signed(2), "--dry-run")

    assert (code, out) == (0, "changed: shop: version 2 would be put in force, mode enforce\n")
    assert (operator.files(), operator.in_force()) == (before, 1)
    assert operator.run("apply", operator.signed(1, mode="audit"), "--dry-run")[0] == 1
    operator.run("apply", operator.signed(2))
    before = operator.files()
    code, out, _ = operator.run("rollback", "shop", "--to", 1, "--key", operator.site.path / "operator.key", "--dry-run", "--output", "json")
    assert (code, json.loads(out)) == (0, {"app": "shop", "version": 3, "mode": "enforce", "changed": True, "dry_run": True})
    assert operator.files() == before


def test_going_back_says_no_where_it_cannot(operator: Operator) -> None:
    key = operator.site.path / "operator.key"
    operator.run("apply", operator.signed(2))
    (operator.folder / "history" / "shop" / f"1{SUFFIX}").write_bytes(sign(compiled(1), STRANGER))
    (operator.folder / "history" / "shop" / f"9{SUFFIX}").write_bytes(sign(compiled(2), operator.key))
    before = operator.files()

    def refused(*arguments: object) -> str:
        code, out, err = operator.run("rollback", *arguments)
        assert (code, out) == (1, "")
        return err

    assert "it is not in the history" in refused("shop", "--to", 3, "--key", key)
    assert "it is not in the history" in refused("stall", "--to", 1, "--key", key)
    assert "it names key" in refused("shop", "--to", 1, "--key", key)
    assert "it is version 2 of shop" in refused("shop", "--to", 9, "--key", key)
    assert "it is in force" in refused("shop", "--to", 2, "--key", key)
    assert "error[policy.value]" in refused("../shop", "--to", 2, "--key", key)
    another = operator.site.path / "controller.key"
    assert operator.run("rollback", "shop", "--to", 1, "--key", another)[0] == 3
    assert (operator.files(), operator.in_force()) == (before, 2)
    assert "cannot be used: it names key" in operator.run("history", "shop")[1]


def test_a_key_that_is_not_the_sites_signs_nothing(operator: Operator, tmp_path: Path) -> None:
    (tmp_path / "stranger.key").write_bytes(STRANGER.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    code, _, err = operator.run("rollback", "shop", "--to", 1, "--key", tmp_path / "stranger.key")

    assert code == 1
    assert "error[policy.signature]" in err


def test_the_history_of_nothing_is_no(operator: Operator) -> None:
    code, out, _ = operator.run("history", "shop")

    assert (code, "no version of shop was applied" in out) == (1, True)
    assert operator.run("history", "shop", "--output", "json")[:2] == (1, "[]\n")


def test_the_history_is_bounded(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "HISTORY_MAX", 2)

    for version in (2, 3, 4):
        operator.run("apply", operator.signed(version))

    assert sorted(name for name in operator.files() if name.startswith("history")) == ["history/shop/3.signed.json", "history/shop/4.signed.json"]


def test_two_that_apply_at_once_are_one_after_the_other(operator: Operator, tmp_path: Path) -> None:
    """Each of them ends with its version in force, or is refused because the other's is higher; the file is the one in force."""
    files = {version: tmp_path / f"{version}.json" for version in range(2, 6)}
    for version, path in files.items():
        path.write_bytes(sign(compiled(version), operator.key))
    codes: dict[int, int] = {}

    def apply_one(version: int) -> None:
        codes[version] = main(["policy", "apply", str(files[version]), "--config", str(operator.site.config)])

    threads = [threading.Thread(target=apply_one, args=(version,)) for version in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert codes[5] == 0 and set(codes.values()) <= {0, 1}
    assert operator.files()["shop.signed.json"] == files[5].read_bytes()
    assert operator.in_force() == 5


def test_a_policy_of_a_name_that_is_a_path_is_not_written(operator: Operator, tmp_path: Path) -> None:
    """Names of applications are names of files here."""
    data = sign(canonical(json.loads(compiled(2)) | {"app": "../../shop"}), operator.key)
    assert CompiledPolicy.parse(envelope.read(data).compiled).app == "../../shop"
    before = operator.files()

    code, _, err = operator.run("apply", operator.file(data))

    assert (code, "error[policy.value]" in err) == (1, True)
    assert operator.files() == before


def test_where_nothing_can_be_kept_nothing_is_put_in_force(operator: Operator) -> None:
    (operator.folder / "history").write_bytes(b"")
    before = operator.files()

    code, _, err = operator.run("apply", operator.signed(2))

    assert (code, "error[cli.file]: cannot make " in err) == (3, True)
    assert (operator.files(), operator.in_force()) == (before, 1)
