"""The site's PKI: what is made, what is kept, what is made anew, and that nobody else can read a key."""

import base64
import itertools
import os
import ssl
import stat
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key, load_pem_public_key

from kalium.cli.main import main
from kalium.errors import KaliumError
from kalium.pki import authority, files
from kalium.pki.authority import DAYS, USES, Role, role_of
from kalium.pki.files import CaStep

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
SANS = ("DNS:controller", "IP:127.0.0.1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a CA made at NOW."""
    assert files.init(tmp_path / "pki", now=NOW).why
    return tmp_path / "pki"


def issue(
    directory: Path,
    *,
    name: str = "controller",
    sans: tuple[str, ...] = SANS,
    role: Role = Role.CONTROLLER,
    identity: str = "",
    days: int = 365,
    now: datetime = NOW,
) -> str:
    """Issue, and return why anything changed."""
    return files.issue(directory, name, sans, role=role, identity=identity, days=days, now=now).why


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_second_run_changes_nothing(directory: Path) -> None:
    assert issue(directory)
    files.operator_key(directory)
    before = contents(directory)

    assert files.init(directory, now=NOW).why == ""
    assert issue(directory) == ""
    assert files.operator_key(directory).why == ""

    assert contents(directory) == before
    assert set(before) == {"ca.crt", "ca.key", "controller.crt", "controller.key", "operator.key", "operator.pub"}


SERVES, ASKS = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"  # serverAuth and clientAuth, RFC 5280 4.2.1.12


@pytest.mark.parametrize(
    ("role", "uses", "uris"),
    [
        (Role.AGENT, [ASKS], ["kalium://agent/node1"]),
        (Role.CONTROLLER, [SERVES, ASKS], ["kalium://controller/node1"]),
        (Role.CLIENT, [ASKS], ["kalium://client/node1"]),
        (Role.SERVER, [SERVES], []),
    ],
)
def test_a_certificate_says_what_its_owner_is_and_nothing_else(directory: Path, role: Role, uses: list[str], uris: list[str]) -> None:
    issue(directory, role=role, identity="node1", days=7)
    found = certificate(directory / "controller.crt")

    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert [each.dotted_string for each in usage] == uses
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == uris
    assert names.get_values_for_type(x509.DNSName) == ["controller"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert role_of(found) == ((role, "") if role is Role.SERVER else (role, "node1"))
    assert found.not_valid_after_utc == NOW + timedelta(days=7)
    assert certificate(directory / "ca.crt").not_valid_after_utc == NOW + timedelta(days=3650)


def test_without_an_identity_it_is_the_name(directory: Path) -> None:
    issue(directory, name="node1", role=Role.AGENT)

    assert role_of(certificate(directory / "node1.crt")) == (Role.AGENT, "node1")


def test_a_pair_of_a_site_that_knew_no_roles_is_issued_anew(directory: Path) -> None:
    """It had both uses, no URI, and a year."""
    issue(directory)
    ca = authority.read((directory / "ca.crt").read_bytes(), (directory / "ca.key").read_bytes())
    assert ca is not None
    key = ec.generate_private_key(ec.SECP256R1())
    old = (
        x509.CertificateBuilder()
        .subject_name(certificate(directory / "controller.crt").subject)
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=7))
        .add_extension(x509.ExtendedKeyUsage(USES[Role.CONTROLLER]), critical=False)
        .add_extension(x509.SubjectAlternativeName(authority.general_names("controller", SANS)), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    for suffix, data in (("crt", authority.Identity(old, key).certificate_pem()), ("key", authority.Identity(old, key).key_pem())):
        damage(directory, f"controller.{suffix}", data)
    assert [each.fault for each in files.show(directory, now=NOW)] == ["", "it has no role: issue it anew"]

    assert issue(directory, days=7) == "its role is another"

    assert issue(directory, days=7) == ""


def test_another_role_identity_or_shorter_life_means_another_certificate(directory: Path) -> None:
    issue(directory, role=Role.AGENT, days=7)

    assert issue(directory, role=Role.CLIENT, days=7) == "its role is another"
    assert issue(directory, role=Role.CLIENT, identity="node1", days=7) == "its role is another"
    assert issue(directory, role=Role.CLIENT, identity="node1", days=30) == ""
    assert issue(directory, role=Role.CLIENT, identity="node1", days=2) == "it is valid for more than 2 days"
    assert issue(directory, role=Role.CLIENT, identity="node1", days=2) == ""


def test_openssl_takes_the_chain_in_its_strictest_mood(tmp_path: Path) -> None:
    """A handshake in memory, with X509_V_FLAG_X509_STRICT as Python 3.13 has it by default."""
    files.init(tmp_path, now=datetime.now(timezone.utc))
    issue(tmp_path, now=datetime.now(timezone.utc))
    contexts = []
    issue(tmp_path, name="node1", role=Role.AGENT, now=datetime.now(timezone.utc))
    for protocol, name in ((ssl.PROTOCOL_TLS_SERVER, "controller"), (ssl.PROTOCOL_TLS_CLIENT, "node1")):
        context = ssl.SSLContext(protocol)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(tmp_path / "ca.crt")
        context.load_cert_chain(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
        contexts.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = contexts[0].wrap_bio(to_server, to_client, server_side=True)
    client = contexts[1].wrap_bio(to_client, to_server, server_hostname="127.0.0.1")

    for end in itertools.chain.from_iterable(itertools.repeat((client, server), 4)):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue

    for end, identity in ((server, "kalium://agent/node1"), (client, "kalium://controller/controller")):
        assert ("URI", identity) in (end.getpeercert() or {})["subjectAltName"]


def test_no_private_file_is_readable_for_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.init(tmp_path, now=NOW)
        issue(tmp_path)
        files.operator_key(tmp_path)
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "controller.key", "operator.key"}
    assert {name for name, mode in modes.items() if mode == 0o644} == {"ca.crt", "controller.crt", "operator.pub"}
    assert len(modes) == 6


@pytest.mark.parametrize("key", ["ca.key", "controller.key", "operator.key"])
def test_a_key_that_was_opened_to_others_is_closed_again_and_said_so(directory: Path, key: str) -> None:
    issue(directory)
    files.operator_key(directory)
    (directory / key).chmod(0o644)
    before = contents(directory)

    whys = [files.init(directory, now=NOW).why, issue(directory), files.operator_key(directory).why]

    assert sorted(whys) == ["", "", files.READABLE_FOR_OTHERS]
    assert stat.S_IMODE((directory / key).stat().st_mode) == 0o600
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("days", "after_days", "is_renewed"), [(365, 334, False), (365, 336, True), (30, 19, False), (30, 21, True), (365, 400, True)]
)
def test_a_certificate_is_renewed_in_its_last_thirty_days_or_last_third(directory: Path, days: int, after_days: int, *, is_renewed: bool) -> None:
    issue(directory, days=days)
    later = NOW + timedelta(days=after_days)

    why = issue(directory, days=days, now=later)

    assert bool(why) == is_renewed
    assert certificate(directory / "controller.crt").not_valid_after_utc == (later if is_renewed else NOW) + timedelta(days=days)
    assert issue(directory, days=days, now=later) == ""


@pytest.mark.parametrize(
    ("name", "sans", "why"),
    [
        ("controller", ("DNS:controller",), "its alternative names are others"),
        ("controller", (), "its alternative names are others"),
        ("controller", ("IP:127.0.0.1", "DNS:controller"), "its alternative names are others"),
    ],
)
def test_other_names_mean_another_certificate(directory: Path, name: str, sans: tuple[str, ...], why: str) -> None:
    issue(directory)

    assert issue(directory, name=name, sans=sans) == why

    assert issue(directory, name=name, sans=sans) == ""


def test_a_file_of_another_certificate_is_replaced(directory: Path) -> None:
    issue(directory, name="agent", sans=SANS)
    for suffix in ("crt", "key"):
        (directory / f"controller.{suffix}").write_bytes((directory / f"agent.{suffix}").read_bytes())

    assert issue(directory) == "it is for another name"


def test_a_renewed_file_keeps_the_owner_that_it_was_given_to(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller does not run as root, and its key is renewed by root."""
    issue(directory)
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _handle, user, group: owners.append((user, group)))

    issue(directory, now=NOW + timedelta(days=350))

    found = (directory / "controller.key").stat()
    assert owners == [(found.st_uid, found.st_gid)] * 2


def test_a_key_that_does_not_fit_is_replaced_with_its_certificate(directory: Path) -> None:
    """A run that was cut between the two files leaves this behind."""
    issue(directory)
    issue(directory, name="agent")
    (directory / "controller.key").write_bytes((directory / "agent.key").read_bytes())

    assert issue(directory) == "there is no certificate with its key yet"

    assert issue(directory) == ""


def test_a_new_ca_makes_every_certificate_new(directory: Path) -> None:
    issue(directory)
    for name in ("ca.crt", "ca.key"):
        (directory / name).unlink()
    files.init(directory, now=NOW)

    assert issue(directory) == "another CA issued it"


def test_a_renewed_ca_keeps_its_key_and_what_it_has_issued(directory: Path) -> None:
    key = (directory / "ca.key").read_bytes()
    later = NOW + timedelta(days=3650 - 29)
    assert issue(directory, now=later, days=365)
    assert certificate(directory / "controller.crt").not_valid_after_utc == NOW + timedelta(days=3650)  # not longer than the CA

    assert files.init(directory, now=later).why

    assert (directory / "ca.key").read_bytes() == key
    certificate(directory / "controller.crt").verify_directly_issued_by(certificate(directory / "ca.crt"))
    assert files.init(directory, now=later).why == ""


# Renewal of what is due, by whatever runs it


def renewed(directory: Path, *, now: datetime, dry_run: bool = False) -> dict[str, str]:
    """What `renew` said of each file: why it changed, or the fault; those that it left are not there."""
    return {each.path.name: each.fault or each.why for each in files.renew(directory, now=now, dry_run=dry_run) if each.fault or each.why}


def test_what_is_due_is_renewed_as_it_was_and_nothing_else(directory: Path) -> None:
    issue(directory, days=7)
    issue(directory, name="agent-node1", role=Role.AGENT, identity="node1", sans=("DNS:*.node1", "IP:::1"), days=30)
    files.audit_key(directory, "controller-audit")
    before = contents(directory)
    assert renewed(directory, now=NOW + timedelta(days=4)) == {}
    later = NOW + timedelta(days=5)
    assert renewed(directory, now=later, dry_run=True) == {"controller.crt": "it expires on 2026-03-08"}
    assert contents(directory) == before

    assert renewed(directory, now=later) == {"controller.crt": "it expires on 2026-03-08"}

    found = certificate(directory / "controller.crt")
    assert {name for name, data in contents(directory).items() if data != before[name]} == {"controller.crt", "controller.key"}
    assert (role_of(found), authority.sans_of(found), found.not_valid_after_utc) == ((Role.CONTROLLER, "controller"), SANS, later + timedelta(days=7))
    assert issue(directory, days=7, now=later) == ""
    last = NOW + timedelta(days=21)
    assert renewed(directory, now=last).keys() == {"controller.crt", "agent-node1.crt"}
    assert issue(directory, name="agent-node1", role=Role.AGENT, identity="node1", sans=("DNS:*.node1", "IP:::1"), days=30, now=last) == ""


def test_the_ca_is_renewed_with_its_pairs(directory: Path) -> None:
    issue(directory, days=7)
    later = NOW + timedelta(days=3630)

    assert set(renewed(directory, now=later)) == {"ca.crt", "controller.crt"}

    assert [each.fault for each in files.show(directory, now=later)] == ["", ""]


def test_what_is_not_ours_is_a_fault_and_stays(directory: Path, tmp_path: Path) -> None:
    """A certificate of a stranger that lies in the folder must not become one of ours."""
    files.init(tmp_path / "other", now=NOW)
    issue(tmp_path / "other", name="stranger")
    issue(directory, name="agent", role=Role.AGENT, days=7)
    for suffix in ("crt", "key"):
        damage(directory, f"stranger.{suffix}", (tmp_path / "other" / f"stranger.{suffix}").read_bytes())
        damage(directory, f"moved.{suffix}", (directory / f"agent.{suffix}").read_bytes())
    before = contents(directory)

    found = renewed(directory, now=NOW + timedelta(days=6))

    assert found == {
        "agent.crt": "it expires on 2026-03-08",
        "moved.crt": "its role or its name is none of ours: issue it anew",
        "stranger.crt": "another CA issued it",
    }
    assert {name for name, data in contents(directory).items() if data != before[name]} == {"agent.crt", "agent.key"}


def test_renewal_for_ever_goes_on_after_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    issue(directory, days=1, now=datetime.now(timezone.utc) - timedelta(hours=20))
    key = (directory / "ca.key").read_bytes()
    damage(directory, "ca.key", b"")
    waited: list[int] = []

    def wait(seconds: int) -> None:
        waited.append(seconds)
        damage(directory, "ca.key", key)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", wait)
    main(["pki", "renew", "--dir", str(directory), "--every", "3600"])

    printed = capsys.readouterr()
    assert waited == [3600] * 3
    assert printed.err.startswith("error[pki.ca]: cannot use the CA")
    assert [line.split(":")[0] for line in printed.out.splitlines()] == [f"changed {directory}/controller.crt"]


def test_who_writes_to_the_folder_waits_for_who_does(directory: Path) -> None:
    """A timer and a playbook come at the same time: a key of the one beside the certificate of the other would fit nobody."""
    issued: list[str] = []
    with files._alone(directory, dry_run=False):
        other = threading.Thread(target=lambda: issued.append(issue(directory)))
        other.start()
        other.join(0.2)
        assert (issued, other.is_alive()) == ([], True)
    other.join(10)

    assert issued == ["there is no certificate with its key yet"]


# A change of the CA


def change(directory: Path, step: CaStep) -> str:
    return files.change_ca(directory, step, now=NOW).why


def test_a_change_of_the_ca_keeps_every_pair_good_until_it_has_been_issued_anew(directory: Path) -> None:
    issue(directory)
    old = certificate(directory / "ca.crt")

    assert [change(directory, CaStep.BEGIN), change(directory, CaStep.BEGIN)] == ["a second CA is trusted", ""]
    assert issue(directory) == ""
    assert [each.fault for each in files.show(directory, now=NOW)] == ["", "", ""]
    assert [change(directory, CaStep.SWITCH), change(directory, CaStep.SWITCH)] == ["the second CA issues", ""]
    assert [each.fault for each in files.show(directory, now=NOW)] == ["", "", ""]
    before = (directory / "ca.crt").read_bytes()
    with pytest.raises(KaliumError, match=r"the old CA issued controller\.crt"):
        change(directory, CaStep.FINISH)
    assert (directory / "ca.crt").read_bytes() == before
    assert issue(directory) == "another CA issued it"
    assert [change(directory, CaStep.FINISH), change(directory, CaStep.FINISH)] == ["the old CA is not trusted any more", ""]

    new = certificate(directory / "ca.crt")
    assert set(contents(directory)) == {"ca.crt", "ca.key", "controller.crt", "controller.key"}
    assert new.public_key() != old.public_key()
    assert len(x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())) == 1
    assert [each.fault for each in files.show(directory, now=NOW)] == ["", ""]
    certificate(directory / "controller.crt").verify_directly_issued_by(new)


@pytest.mark.parametrize(
    ("done", "step", "first"),
    [
        ((), CaStep.SWITCH, "begin"),
        ((CaStep.BEGIN,), CaStep.FINISH, "switch"),
        ((CaStep.BEGIN, CaStep.SWITCH), CaStep.BEGIN, "finish"),
    ],
)
def test_a_step_whose_turn_it_is_not_is_refused_with_the_one_that_comes_first(
    directory: Path, done: tuple[CaStep, ...], step: CaStep, first: str
) -> None:
    for each in done:
        change(directory, each)
    before = contents(directory)

    with pytest.raises(KaliumError) as refusal:
        change(directory, step)

    assert (refusal.value.code, f"--step {first}` first" in refusal.value.next_step) == ("pki.ca", True)
    assert contents(directory) == before


def test_a_step_that_was_cut_after_its_key_goes_on_with_that_key(directory: Path) -> None:
    files.change_ca(directory, CaStep.BEGIN, now=NOW)
    bundle = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
    damage(directory, "ca.crt", bundle[0].public_bytes(Encoding.PEM))
    assert files.change_ca(directory, CaStep.BEGIN, now=NOW, dry_run=True).why

    assert change(directory, CaStep.BEGIN)

    assert x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())[1].public_key() == bundle[1].public_key()


def test_a_ca_that_is_renewed_during_a_change_leaves_the_other_one_trusted(directory: Path) -> None:
    change(directory, CaStep.BEGIN)
    other = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())[1]

    assert files.init(directory, now=NOW + timedelta(days=3630)).why

    assert x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())[1] == other


def test_a_host_that_issues_nothing_has_no_key_of_the_ca_and_that_is_no_fault(directory: Path) -> None:
    issue(directory)
    (directory / "ca.key").unlink()

    assert [each.fault for each in files.show(directory, now=NOW)] == ["", ""]


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    assert files.init(tmp_path, now=NOW, dry_run=True).why == "there is no CA yet"
    assert files.operator_key(tmp_path, dry_run=True).why == "there is no operator's key yet"
    assert contents(tmp_path) == {}
    files.init(tmp_path, now=NOW)
    before = contents(tmp_path)

    assert files.issue(tmp_path, "agent", (), role=Role.AGENT, days=365, now=NOW, dry_run=True).why

    assert contents(tmp_path) == before


def test_the_operators_key_signs_and_its_public_half_is_written_again(tmp_path: Path) -> None:
    files.operator_key(tmp_path)
    private = (tmp_path / "operator.key").read_bytes()
    (tmp_path / "operator.pub").unlink()

    assert files.operator_key(tmp_path).why == "operator.pub was not the key's public half"

    key = load_pem_private_key(private, None)
    public = load_pem_public_key((tmp_path / "operator.pub").read_bytes())
    public.verify(key.sign(b"policy"), b"policy")  # type: ignore[union-attr, call-arg]  # Ed25519, or this raises
    assert (tmp_path / "operator.key").read_bytes() == private
    assert base64.b64decode(files.operator_raw(tmp_path)) == public.public_bytes_raw()  # type: ignore[union-attr]


def damage(directory: Path, name: str, data: bytes) -> None:
    (directory / name).write_bytes(data)


def rsa_key() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("broken", "data", "command"),
    [
        ("ca.key", b"", "init"),
        ("ca.crt", b"not PEM", "init"),
        ("ca.key", b"", "issue"),
        ("operator.key", b"not PEM", "operator-key"),
        ("node1.key", b"not PEM", "audit-key"),
        ("node1.key", b"rsa", "audit-key"),
        ("operator.key", b"rsa", "operator-key"),
        ("operator.pub", b"not PEM", "raw"),
    ],
)
def test_what_a_person_must_not_lose_is_never_replaced(directory: Path, broken: str, data: bytes, command: str) -> None:
    """A damaged CA or operator's key is an error with the way out, not a reason to make another."""
    files.operator_key(directory)
    files.audit_key(directory, "node1")
    damage(directory, broken, rsa_key() if data == b"rsa" else data)
    before = contents(directory)
    commands: dict[str, Callable[[], object]] = {
        "init": lambda: files.init(directory, now=NOW),
        "issue": lambda: files.issue(directory, "agent", (), role=Role.AGENT, days=365, now=NOW),
        "operator-key": lambda: files.operator_key(directory),
        "audit-key": lambda: files.audit_key(directory, "node1"),
        "raw": lambda: files.operator_raw(directory),
    }

    with pytest.raises(KaliumError) as refusal:
        commands[command]()

    assert refusal.value.code in ("pki.ca", "pki.operator_key", "pki.audit_key")
    assert refusal.value.exit_code == 3
    assert contents(directory) == before


def test_a_public_half_without_its_key_is_not_replaced(tmp_path: Path) -> None:
    files.operator_key(tmp_path)
    (tmp_path / "operator.key").unlink()

    with pytest.raises(KaliumError, match=r"operator\.pub is there without operator\.key"):
        files.operator_key(tmp_path)


def test_the_key_of_an_audit_log_is_made_once(tmp_path: Path) -> None:
    """Every later run, by whatever the site has become, leaves the key by which the log so far is verified."""
    assert files.audit_key(tmp_path, "node1", dry_run=True).why == "there is no audit key yet"
    assert contents(tmp_path) == {}
    assert files.audit_key(tmp_path, "node1").why
    before = contents(tmp_path)

    assert files.audit_key(tmp_path, "node1").why == ""

    key = load_pem_private_key(before["node1.key"], None)
    load_pem_public_key(before["node1.pub"]).verify(key.sign(b"head"), b"head")  # type: ignore[union-attr, call-arg]  # Ed25519, or this raises
    assert contents(tmp_path) == before
    assert set(before) == {"node1.key", "node1.pub"}
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in before} == {"node1.key": 0o600, "node1.pub": 0o644}
    (tmp_path / "node1.key").unlink()
    with pytest.raises(KaliumError, match=r"node1\.pub is there without node1\.key"):
        files.audit_key(tmp_path, "node1")


def test_an_expired_ca_issues_nothing(directory: Path) -> None:
    with pytest.raises(KaliumError, match="it expired on 2036"):
        issue(directory, now=NOW + timedelta(days=3651))


@pytest.mark.parametrize(
    ("name", "sans", "days"),
    [
        ("../agent", (), 365),
        ("ca", (), 365),
        ("", (), 365),
        ("a" * 65, (), 365),
        ("-agent", (), 365),
        ("agent", ("controller",), 365),
        ("agent", ("IP:10.0.0.0/8",), 365),
        ("agent", ("DNS:",), 365),
        ("agent", ("DNS:a b",), 365),
        ("agent", ("URI:http://a",), 365),
        ("agent", (), 0),
        ("agent", (), -5),
        ("agent", (), 100_000),
        ("agent", ("URI:kalium://controller/a",), 7),
    ],
)
def test_arguments_that_cannot_be_are_wrong_usage_and_write_nothing(directory: Path, name: str, sans: tuple[str, ...], days: int) -> None:
    before = contents(directory)

    with pytest.raises(KaliumError) as refusal:
        issue(directory, name=name, sans=sans, days=days)

    assert (refusal.value.code, refusal.value.exit_code) == ("pki.usage", 2)
    assert contents(directory) == before


@pytest.mark.parametrize("identity", ["a/b", "../a", "a b", "a" * 254, "node\n", "%61"])
def test_an_identity_cannot_say_more_than_a_name(directory: Path, identity: str) -> None:
    with pytest.raises(KaliumError, match="it cannot be the name of a certificate"):
        issue(directory, role=Role.AGENT, identity=identity)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, seen at the flush."""
    before = contents(directory)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KaliumError, match="No space left on device"):
        issue(directory)

    assert contents(directory) == before


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda directory: None, ""),
        (lambda directory: damage(directory, "controller.key", rsa_key()), "controller.key is not its key"),
        (lambda directory: (directory / "controller.key").chmod(0o640), "controller.key is readable for others"),
        (lambda directory: (directory / "controller.key").unlink(), "controller.key is not its key"),
    ],
)
def test_show_says_what_cannot_be_used(directory: Path, change: Callable[[Path], object], fault: str) -> None:
    issue(directory)
    change(directory)

    ca, controller = files.show(directory, now=NOW)

    assert (ca.file, ca.fault) == ("ca.crt", "")
    assert (ca.role, controller.role, controller.identity) == ("ca", "controller", "controller")
    assert (controller.file, controller.fault) == ("controller.crt", fault)
    assert controller.names == ("controller", "127.0.0.1", "kalium://controller/controller")


def test_show_names_strangers_and_the_expired(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    files.init(other, now=NOW)
    issue(other, name="stranger")
    for suffix in ("crt", "key"):
        (directory / f"stranger.{suffix}").write_bytes((other / f"stranger.{suffix}").read_bytes())
    issue(directory)

    assert {each.file: each.fault for each in files.show(directory, now=NOW)} == {
        "ca.crt": "",
        "controller.crt": "",
        "stranger.crt": "another CA issued it",
    }
    assert {each.fault for each in files.show(directory, now=NOW + timedelta(days=366))} == {"", "not valid now"}


def test_the_command_says_changed_and_then_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ansible reads the first word."""
    commands = [
        ["init", "--dir", str(tmp_path)],
        ["issue", "--dir", str(tmp_path), "--role", "controller", "--name", "controller", "--san", "DNS:controller", "--san", "IP:127.0.0.1"],
        ["issue", "--dir", str(tmp_path), "--role", "agent", "--name", "agent-node1", "--identity", "node1"],
        ["operator-key", "--dir", str(tmp_path)],
        ["audit-key", "--dir", str(tmp_path), "--name", "node1"],
    ]

    codes = [main(["pki", *command]) for command in commands * 2]
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    assert codes == [0] * 10
    assert words == ["changed"] * 5 + ["unchanged"] * 5
    assert main(["pki", "operator-key", "--dir", str(tmp_path), "--print-raw"]) == 0
    assert len(base64.b64decode(capsys.readouterr().out.strip())) == 32
    assert main(["pki", "show", "--dir", str(tmp_path)]) == 0
    assert "agent-node1.crt: CN=agent-node1, agent node1 (agent-node1, kalium://agent/node1), until " in capsys.readouterr().out
    assert DAYS[Role.AGENT] == (certificate(tmp_path / "agent-node1.crt").not_valid_after_utc - datetime.now(timezone.utc)).days + 1
    (tmp_path / "controller.key").unlink()
    assert main(["pki", "show", "--dir", str(tmp_path), "--output", "json"]) == 1


def test_the_command_tells_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "issue", "--dir", str(tmp_path), "--role", "agent", "--name", "agent"]) == 3

    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error[pki.ca]: cannot issue with the CA")
    assert second == "next: make it: `kalium pki init`"
