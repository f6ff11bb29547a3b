"""What the controller reads: its configuration, its certificates, and the directory of policies. Each refusal says what to do."""

import json
import os
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from controller_samples import compiled
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kalium.controller import identity, tls
from kalium.controller.config import AuditFiles, Config, Listen, Store, TlsFiles, load
from kalium.controller.identity import NOBODY, PeerIdentity
from kalium.controller.store import FILES_MAX, PolicyDirectory
from kalium.errors import KaliumError
from kalium.pki import files
from kalium.pki.authority import Role
from kalium.pki.files import CaStep
from kalium.policy.envelope import sign
from kalium.protocol.limits import ENVELOPE_BYTES_MAX

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
GOOD: dict[str, Any] = {
    "listen": {"host": "127.0.0.1", "port": 5000},
    "tls": {"ca": "pki/ca.crt", "cert": "pki/controller.crt", "key": "/etc/kalium/pki/controller.key"},
    "operator_key": "operator.pub",
    "policies_dir": "policies",
}


def test_a_configuration_is_read_with_paths_from_its_own_directory(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    path.write_text(json.dumps(GOOD))

    config = load(path)

    assert config == Config(
        path,
        "127.0.0.1",
        5000,
        TlsFiles(tmp_path / "pki/ca.crt", tmp_path / "pki/controller.crt", Path("/etc/kalium/pki/controller.key")),
        tmp_path / "operator.pub",
        tmp_path / "policies",
    )


def test_the_optional_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    store = {"kind": "redis", "url": "rediss://kalium@store:6380/2", "prefix": "k:", "ca": "store.crt", "password_file": "/etc/kalium/store.password"}
    audit = {"log": "audit.jsonl", "key": "audit.key", "fsync": "always", "max_mib": 16}
    path.write_text(
        json.dumps({**GOOD, "name": "ctl-1", "store": store, "audit": audit, "metrics": {"host": "127.0.0.1", "port": 5001}, "busy_poll_us": 300})
    )

    config = load(path)

    assert config.busy_poll_us == 300
    assert config.name == "ctl-1"
    assert config.store == Store("redis", "rediss://kalium@store:6380/2", "k:", tmp_path / "store.crt", Path("/etc/kalium/store.password"))
    assert config.audit == AuditFiles(tmp_path / "audit.jsonl", tmp_path / "audit.key", "always", 16)
    assert config.metrics == Listen("127.0.0.1", 5001)


@pytest.mark.parametrize("store", [{"kind": "memory"}, None])
def test_what_is_left_out_has_its_default(tmp_path: Path, store: object) -> None:
    path = tmp_path / "controller.json"
    path.write_text(json.dumps({**GOOD, "audit": {"log": "a", "key": "k"}} if store is None else {**GOOD, "store": store}))

    config = load(path)

    assert (config.name, config.store, config.metrics, config.busy_poll_us) == ("controller", Store("memory"), None, 0)
    assert config.audit == (AuditFiles(tmp_path / "a", tmp_path / "k", "interval", 64) if store is None else None)


@pytest.mark.parametrize(
    "url",
    [
        "redis://store", "redis://store:6379/", "redis://user@[::1]:6379/15", "rediss://store", "unix:///run/redis.sock", "unix://user@/run/redis.sock?db=3",
    ],
)  # fmt: skip
def test_a_store_has_one_of_three_kinds_of_address(tmp_path: Path, url: str) -> None:
    path = tmp_path / "controller.json"
    path.write_text(json.dumps({**GOOD, "store": {"kind": "redis", "url": url}}))

    assert load(path).store == Store("redis", url)


def redis_at(url: object, **more: object) -> str:
    return json.dumps({**GOOD, "store": {"kind": "redis", "url": url, **more}})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not JSON"),
        ("[]", "the configuration is not an object"),
        (json.dumps({**GOOD, "workers": 2}), "unknown key workers"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "policies_dir"}), "no key policies_dir"),
        (json.dumps({**GOOD, "listen": {"host": "127.0.0.1"}}), "listen has no key port"),
        (json.dumps({**GOOD, "listen": {"host": "127.0.0.1", "port": "5000"}}), r"listen\.port is not a whole number"),
        (json.dumps({**GOOD, "listen": {"host": "127.0.0.1", "port": 65536}}), r"listen\.port is not a whole number"),
        (json.dumps({**GOOD, "listen": {"host": "127.0.0.1", "port": True}}), r"listen\.port is not a whole number"),
        (json.dumps({**GOOD, "listen": {"host": "", "port": 1}}), r"listen\.host is not a text"),
        (json.dumps({**GOOD, "operator_key": None}), "operator_key is not a text"),
        (json.dumps({**GOOD, "name": ""}), "name is not a text"),
        (json.dumps({**GOOD, "name": "a b"}), "name is not one of letters"),
        (json.dumps({**GOOD, "name": "-a"}), "name is not one of letters"),
        (json.dumps({**GOOD, "store": None}), "store is not an object"),
        (json.dumps({**GOOD, "store": {"kind": "memory", "url": "redis://a"}}), "store has an unknown key url"),
        (json.dumps({**GOOD, "store": {"kind": "disk", "url": "redis://a"}}), r"store\.kind is neither"),
        (json.dumps({**GOOD, "store": {"kind": "redis"}}), "store has no key url"),
        (redis_at(""), r"store\.url is not a text"),
        (redis_at("http://store"), "is none of redis"),
        (redis_at("redis://"), "names no host"),
        (redis_at("redis://store/0?timeout=3"), "names no host, or more"),
        (redis_at("redis://store/x"), "names no host, or more"),
        (redis_at("redis://store:x"), "cannot be read"),
        (redis_at("redis://store#1"), "has a fragment"),
        (redis_at("unix://store/path"), "is no path of a socket"),
        (redis_at("redis://user:secret@store"), r"holds a password, which belongs in store\.password_file"),
        (redis_at("redis://:@store"), "holds a password"),
        (redis_at("redis://store", ca="ca.crt"), r"store\.ca is given"),
        (redis_at("redis://store", prefix="{a}"), r"store\.prefix is not"),
        (redis_at("redis://store", prefix="k" * 65), r"store\.prefix is not"),
        (redis_at("redis://store", password="secret"), "store has an unknown key password"),
        (json.dumps({**GOOD, "audit": {"log": "a"}}), "audit has no key key"),
        (json.dumps({**GOOD, "audit": {"log": "a", "key": "b", "fsync": "often"}}), r"audit\.fsync is not one of"),
        (json.dumps({**GOOD, "audit": {"log": "a", "key": "b", "max_mib": 0}}), r"audit\.max_mib is not"),
        (json.dumps({**GOOD, "audit": {"log": "a", "key": "b", "max_mib": True}}), r"audit\.max_mib is not"),
        (json.dumps({**GOOD, "busy_poll_us": -1}), "busy_poll_us is not a whole number"),
        (json.dumps({**GOOD, "busy_poll_us": True}), "busy_poll_us is not a whole number"),
        (json.dumps({**GOOD, "busy_poll_us": 100_001}), "busy_poll_us is not a whole number"),
        (json.dumps({**GOOD, "metrics": {"host": "127.0.0.1"}}), "metrics has no key port"),
        (json.dumps({**GOOD, "metrics": {"host": "127.0.0.1", "port": -1}}), r"metrics\.port is not a whole number"),
        ("[" * 70_000, "more than 65536 bytes"),
        ("[" * 60_000, "not JSON"),
    ],
)
def test_a_configuration_that_is_not_whole_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "controller.json"
    path.write_text(text)

    with pytest.raises(KaliumError, match=found) as refusal:
        load(path)

    assert (refusal.value.code, refusal.value.exit_code) == ("controller.config", 3)


def test_a_configuration_that_is_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match="No such file"):
        load(tmp_path / "controller.json")


# Certificates


@pytest.fixture
def pki(tmp_path: Path) -> TlsFiles:
    """A CA and a certificate for 365 days from NOW."""
    files.init(tmp_path, now=NOW)
    files.issue(tmp_path, "controller", (), role=Role.CONTROLLER, days=365, now=NOW)
    return TlsFiles(tmp_path / "ca.crt", tmp_path / "controller.crt", tmp_path / "controller.key")


def other(pki: TlsFiles, name: str) -> bytes:
    """The file of that name from another PKI."""
    directory = pki.ca.parent / "other"
    files.init(directory, now=NOW)
    files.issue(directory, "controller", (), role=Role.CONTROLLER, days=365, now=NOW)
    return (directory / name).read_bytes()


def test_good_files_are_taken(pki: TlsFiles) -> None:
    tls.check(pki, now=NOW)


@pytest.mark.parametrize(
    ("change", "after", "found"),
    [
        (lambda pki: None, timedelta(days=365), r"controller\.crt: it expired on 2027-03-01"),
        (lambda pki: None, timedelta(days=3650), r"ca\.crt: it expired on 2036"),
        (lambda pki: None, timedelta(days=-1), r"it is valid from 2026-03-01 11:55 UTC on"),
        (lambda pki: pki.ca.write_bytes(other(pki, "ca.crt")), timedelta(0), r"the CA .* did not issue it"),
        (lambda pki: pki.key.write_bytes(other(pki, "controller.key")), timedelta(0), r"it is not the key of .*controller\.crt"),
        (lambda pki: pki.key.write_bytes(b"?"), timedelta(0), r"controller\.key: it is not an unencrypted private key"),
        (lambda pki: pki.cert.write_bytes(b"?"), timedelta(0), r"controller\.crt: it is not a certificate"),
        (lambda pki: pki.key.unlink(), timedelta(0), r"controller\.key: No such file"),
        (lambda pki: pki.ca.unlink(), timedelta(0), r"ca\.crt: No such file"),
        (lambda pki: (pki.key.unlink(), pki.key.mkdir()), timedelta(0), r"controller\.key: Is a directory"),
    ],
    ids=["expired", "ca_expired", "not_yet_valid", "wrong_ca", "wrong_key", "no_key", "no_certificate", "key_away", "ca_away", "key_unreadable"],
)
def test_a_file_that_tls_cannot_use_is_named_with_the_reason(
    pki: TlsFiles, change: Callable[[TlsFiles], object], after: timedelta, found: str
) -> None:
    change(pki)

    with pytest.raises(KaliumError, match=found) as refusal:
        tls.check(pki, now=NOW + after)

    assert refusal.value.code == "controller.tls"
    assert len(refusal.value.for_humans().splitlines()) == 2


def test_a_certificate_has_to_be_this_controllers(pki: TlsFiles) -> None:
    tls.check(pki, name="controller", now=NOW)

    with pytest.raises(KaliumError, match="it is of the controller controller, not other"):
        tls.check(pki, name="other", now=NOW)

    files.issue(pki.ca.parent, "controller", (), role=Role.AGENT, days=365, now=NOW)
    with pytest.raises(KaliumError, match="its role is agent, not controller"):
        tls.check(pki, now=NOW)


def test_while_a_site_changes_its_ca_pairs_of_both_are_good(pki: TlsFiles) -> None:
    folder = pki.ca.parent
    old = (folder / "controller.crt").read_bytes(), (folder / "controller.key").read_bytes()
    files.change_ca(folder, CaStep.BEGIN, now=NOW)
    tls.check(pki, now=NOW)
    files.change_ca(folder, CaStep.SWITCH, now=NOW)
    tls.check(pki, now=NOW)
    files.issue(folder, "controller", (), role=Role.CONTROLLER, days=365, now=NOW)
    tls.check(pki, now=NOW)
    files.change_ca(folder, CaStep.FINISH, now=NOW)
    tls.check(pki, now=NOW)

    pki.cert.write_bytes(old[0])
    pki.key.write_bytes(old[1])

    with pytest.raises(KaliumError, match="did not issue it"):
        tls.check(pki, now=NOW)


def test_a_ca_that_is_over_does_not_spoil_the_other_one(pki: TlsFiles) -> None:
    folder = pki.ca.parent
    later = NOW + timedelta(days=3640)
    files.change_ca(folder, CaStep.BEGIN, now=later)
    files.change_ca(folder, CaStep.SWITCH, now=later)
    files.issue(folder, "controller", (), role=Role.CONTROLLER, days=365, now=later)

    tls.check(pki, now=later + timedelta(days=20))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((("URI", "kalium://agent/node0"),), PeerIdentity(identity.Role.AGENT, "node0")),
        ((("DNS", "a"), ("URI", "kalium://client/a")), PeerIdentity(identity.Role.CLIENT, "a")),
        ((("DNS", "kalium://agent/node0"),), NOBODY),
        ((("URI", "kalium://agent/node0"), ("URI", "kalium://agent/node1")), NOBODY),
        ((("URI", "kalium://root/node0"),), NOBODY),
        ((("URI", "kalium:///node0"),), NOBODY),
        ((("URI", "kalium://agent/"),), NOBODY),
        ((), NOBODY),
    ],
)
def test_who_a_peer_is_comes_from_the_one_uri_of_its_certificate(names: tuple[tuple[str, str], ...], expected: PeerIdentity) -> None:
    subject = ((("commonName", "cn"),),)

    peer = tls.peer_of({"subject": subject, "subjectAltName": names, "notAfter": "Mar  1 12:00:00 2026 GMT"})

    assert peer == tls.Peer("cn", expected, NOW.timestamp())


def test_a_peer_without_a_certificate_is_nobody_and_over() -> None:
    assert tls.peer_of(None) == tls.Peer("", NOBODY, 0.0)


def test_a_replaced_file_changes_the_stamps(pki: TlsFiles) -> None:
    before = tls.stamps(pki)
    pki.cert.write_bytes(pki.cert.read_bytes() + b"\n")
    changed = tls.stamps(pki)
    pki.cert.unlink()

    assert len({before, changed, tls.stamps(pki)}) == 3


# Policies

KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
LATER_NS = 10 * 10**9


class Policies:
    """A directory of policies, and a clock that stands LATER_NS behind the files' times unless a test moves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_ns = 10**18 + LATER_NS
        self.directory = PolicyDirectory(path, KEY.public_key(), clock_ns=lambda: self.now_ns)
        path.mkdir()

    def write(self, name: str, data: bytes, *, mtime_ns: int = 10**18) -> None:
        (self.path / name).write_bytes(data)
        os.utime(self.path / name, ns=(mtime_ns, mtime_ns))

    def changes(self) -> list[tuple[str, str]]:
        """File, and the version of its policy or the code of its refusal."""
        return [
            (found.file, str(found.policy.version) if found.policy else found.refusal.code if found.refusal else "nothing")
            for found in self.directory.changes()
        ]


@pytest.fixture
def policies(tmp_path: Path) -> Policies:
    return Policies(tmp_path / "policies")


def test_a_policy_is_found_once_and_again_when_it_changes(policies: Policies) -> None:
    policies.write("shop.signed.json", sign(compiled(), KEY))
    assert policies.changes() == [("shop.signed.json", "1")]
    assert policies.changes() == []

    policies.write("shop.signed.json", sign(compiled(2), KEY), mtime_ns=10**18 + 1)

    assert policies.changes() == [("shop.signed.json", "2")]
    assert policies.changes() == []


def test_a_file_that_was_only_touched_is_no_change(policies: Policies) -> None:
    policies.write("shop.signed.json", sign(compiled(), KEY))
    policies.changes()

    policies.write("shop.signed.json", sign(compiled(), KEY), mtime_ns=10**18 + 5)

    assert policies.changes() == []


def test_a_file_written_twice_within_a_tick_is_seen(policies: Policies) -> None:
    """Same size, same time: a young file is read again until its time is past."""
    policies.now_ns = 10**18 + 1
    policies.write("shop.signed.json", sign(compiled(1), KEY))
    assert policies.changes() == [("shop.signed.json", "1")]
    second = sign(compiled(2), KEY)
    assert len(second) == (policies.path / "shop.signed.json").stat().st_size

    policies.write("shop.signed.json", second)

    assert policies.changes() == [("shop.signed.json", "2")]


def test_files_that_are_no_policies_are_not_looked_at(policies: Policies) -> None:
    """The second is what a writer has not renamed yet."""
    for name in ("README", ".shop.signed.json", "shop.yml", "shop.json"):
        policies.write(name, b"?")

    assert policies.changes() == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "policy.malformed"),
        (b"{}", "policy.malformed"),
        (sign(compiled(), Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)), "policy.signature"),
        (sign(compiled(), KEY).replace(b'"signature":"', b'"signature":"AAAA'), "policy.signature"),
        (sign(compiled(1, "other"), KEY), "controller.policy_file"),
        (b" " * (ENVELOPE_BYTES_MAX + 1), "controller.policy_file"),
    ],
    ids=["empty", "no_envelope", "another_key", "damaged", "of_another_app", "too_large"],
)
def test_a_bad_file_is_refused_once_for_each_content(policies: Policies, data: bytes, code: str) -> None:
    policies.write("shop.signed.json", data)

    assert policies.changes() == [("shop.signed.json", code)]
    assert policies.changes() == []
    policies.write("shop.signed.json", sign(compiled(2), KEY), mtime_ns=10**18 + 1)
    assert policies.changes() == [("shop.signed.json", "2")]


def test_a_damaged_file_that_is_repaired_is_found_again(policies: Policies) -> None:
    """What the operator sees is the return of the same version; whether it is new is the state's affair."""
    good = sign(compiled(), KEY)
    policies.write("shop.signed.json", good)
    policies.changes()
    policies.write("shop.signed.json", good[:-5], mtime_ns=10**18 + 1)
    policies.changes()

    policies.write("shop.signed.json", good, mtime_ns=10**18 + 2)

    assert policies.changes() == [("shop.signed.json", "1")]


def test_a_file_that_goes_and_comes_back_is_found_again(policies: Policies) -> None:
    policies.write("shop.signed.json", sign(compiled(), KEY))
    policies.changes()
    (policies.path / "shop.signed.json").unlink()
    assert policies.changes() == []

    policies.write("shop.signed.json", sign(compiled(), KEY))

    assert policies.changes() == [("shop.signed.json", "1")]


def test_a_pipe_does_not_hold_the_reader(policies: Policies) -> None:
    os.mkfifo(policies.path / "shop.signed.json")

    assert policies.changes() == [("shop.signed.json", "controller.policy_file")]
    assert policies.changes() == []


def test_a_link_to_nowhere_is_refused_once(policies: Policies) -> None:
    (policies.path / "shop.signed.json").symlink_to("nowhere")

    assert policies.changes() == [("shop.signed.json", "controller.policy_file")]
    assert policies.changes() == []


def test_a_bad_file_does_not_hide_a_good_one(policies: Policies) -> None:
    policies.write("bad.signed.json", b"?")
    policies.write("shop.signed.json", sign(compiled(), KEY))

    assert policies.changes() == [("bad.signed.json", "policy.malformed"), ("shop.signed.json", "1")]


def test_a_directory_that_cannot_be_read_or_is_too_full_is_an_error(policies: Policies) -> None:
    for number in range(FILES_MAX + 1):
        (policies.path / f"app-{number}.signed.json").touch()
    with pytest.raises(KaliumError, match=f"{FILES_MAX + 1} files"):
        policies.changes()
    for path in policies.path.iterdir():
        path.unlink()
    policies.path.rmdir()

    with pytest.raises(KaliumError, match="No such file"):
        policies.changes()
