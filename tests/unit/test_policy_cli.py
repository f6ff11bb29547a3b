"""`kalium policy` as a user calls it: exit codes, the two lines of an error, files written whole or not at all."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from kalium.cli.main import NOUNS, main
from kalium.policy.schema import published

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ROOT / "policies"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kalium(capsys: pytest.CaptureFixture[str]) -> Run:
    """`kalium("policy", "lint", ...)` gives exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse: help and wrong usage
            code = int(left.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """The operator's private and public key."""
    key = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
    private, public = tmp_path / "operator.key", tmp_path / "operator.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A copy of a good policy that a test may damage."""
    path = tmp_path / "shop.yml"
    path.write_bytes((POLICIES / "hello-retail.yml").read_bytes())
    return path


def replaced(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_lint_of_a_good_policy_is_done(kalium: Run, policy: Path) -> None:
    code, out, err = kalium("policy", "lint", policy)

    assert (code, err) == (0, "")
    assert out.endswith(f"{policy}: 0 errors, 0 warnings, 0 notes\n")


def test_lint_of_a_broken_policy_says_no(kalium: Run, policy: Path) -> None:
    replaced(policy, "https: GET", "methd: GET")

    code, out, _ = kalium("policy", "lint", policy, POLICIES / "hello-retail.yml")

    assert code == 1
    assert f'error[policy.unknown_key]: cannot compile {policy}: line 26: unknown key "methd"' in out
    assert f"{policy}: 2 errors, 0 warnings, 0 notes\n" in out


def test_lint_for_programs_is_json(kalium: Run, policy: Path) -> None:
    replaced(policy, "https: GET", "methd: GET")

    code, out, _ = kalium("policy", "lint", policy, "--output", "json")

    assert code == 1
    assert [(entry["file"], entry["line"], entry["severity"], entry["code"]) for entry in json.loads(out)] == [
        (str(policy), 26, "error", "policy.unknown_key"),
        (str(policy), 32, "error", "policy.unknown_key"),
    ]


def test_compile_writes_the_same_bytes_to_a_file_and_to_a_pipe(policy: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kalium.cli.main", "policy", "compile", str(policy)]

    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    subprocess.run([*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, check=True, capture_output=True, timeout=60)

    assert piped == (tmp_path / "out.json").read_bytes() != b""


def test_what_sign_writes_verify_takes(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    signed = tmp_path / "shop.signed.json"

    assert kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)[0] == 0
    code, out, _ = kalium("policy", "verify", signed, "--key", keys[1], "--output", "json")

    assert code == 0
    assert {**json.loads(out), "key_id": ""} == {"app": "hello-retail", "version": 3, "mode": "enforce", "key_id": ""}


def test_a_compiled_policy_signs_as_its_source_does(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    kalium("policy", "compile", policy, "-o", tmp_path / "compiled.json")

    kalium("policy", "sign", tmp_path / "compiled.json", "--key", keys[0], "-o", tmp_path / "one.json")
    kalium("policy", "sign", policy, "--key", keys[0], "-o", tmp_path / "other.json")

    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_signing_again_leaves_the_file_alone(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    signed = tmp_path / "shop.signed.json"
    _, first, _ = kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)
    inode = signed.stat().st_ino

    _, second, _ = kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)

    assert (": written, " in first, ": unchanged, " in second, signed.stat().st_ino) == (True, True, inode)


def test_a_dry_run_writes_nothing(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = kalium("policy", "sign", policy, "--key", keys[0], "-o", tmp_path / "shop.signed.json", "--dry-run")

    assert (code, "would be written" in out) == (0, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operator.key", "operator.pub", "shop.yml"]


def test_a_changed_policy_needs_a_higher_version(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Controllers and guards take no version twice, so the operator hears it before they do."""
    signed = tmp_path / "shop.signed.json"
    kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)
    before = signed.read_bytes()
    replaced(policy, "deadline_ms: 250", "deadline_ms: 251")

    code, _, err = kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)
    assert (code, signed.read_bytes()) == (1, before)
    assert err.startswith("error[policy.version]: cannot sign version 3 of hello-retail: ")
    assert "next: write `version: 4` into the policy" in err

    replaced(policy, "version: 3", "version: 4")
    assert kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)[0] == 0
    assert signed.read_bytes() != before


def test_a_damaged_file_is_replaced(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    signed = tmp_path / "shop.signed.json"
    signed.write_text("half a", encoding="ascii")

    assert kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)[0] == 0
    assert kalium("policy", "verify", signed, "--key", keys[1])[0] == 0


def test_a_policy_that_denies_every_start_is_not_signed(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """It compiles, and lint calls it an error: what lint refuses is not put in force."""
    text = policy.read_text(encoding="utf-8")
    policy.write_text(text[: text.index("entries:")] + "entries: []\n" + text[text.index("\nfunctions:") :], encoding="utf-8")

    code, _, err = kalium("policy", "sign", policy, "--key", keys[0], "-o", tmp_path / "out.json")

    assert (code, "error[policy.no_entries]" in err, (tmp_path / "out.json").exists()) == (1, True, False)


@pytest.mark.parametrize("damage", [(b'"signature":"', b'"signature":"AAAA'), (b'"policy":"eyJ', b'"policy":"fyJ')])
def test_a_damaged_envelope_does_not_verify(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    signed = tmp_path / "shop.signed.json"
    kalium("policy", "sign", policy, "--key", keys[0], "-o", signed)
    signed.write_bytes(signed.read_bytes().replace(*damage))

    code, _, err = kalium("policy", "verify", signed, "--key", keys[1])

    assert (code, err.startswith("error[policy.signature]: cannot load a policy: ")) == (1, True)


def test_the_wrong_half_of_the_key_is_named(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, err = kalium("policy", "sign", policy, "--key", keys[1], "-o", tmp_path / "out.json")

    assert code == 3
    assert err.startswith(f"error[policy.key]: cannot read the operator's key {keys[1]}: it is not an unencrypted private key in PEM\nnext: ")


def test_a_folder_that_is_not_there_fails_the_environment(kalium: Run, policy: Path, tmp_path: Path) -> None:
    code, _, err = kalium("policy", "compile", policy, "-o", tmp_path / "nowhere" / "out.json")
    missing, _, missing_err = kalium("policy", "lint", tmp_path / "nothing.yml")

    assert (code, missing) == (3, 3)
    assert err.startswith(f"error[cli.file]: cannot write {tmp_path / 'nowhere' / 'out.json'}: No such file or directory\nnext: ")
    assert missing_err.startswith(f"error[cli.file]: cannot read {tmp_path / 'nothing.yml'}: No such file or directory\nnext: ")


def test_show_draws_states_messages_and_lines(kalium: Run) -> None:
    code, out, _ = kalium("policy", "show", POLICIES / "hello-retail.yml", "--function", "product-photos-master")

    assert code == 0
    assert "function product-photos-master: entry, 4 states, 3 messages" in out
    assert "  state 0 (start)\n    invoke product-photos-3-receive  -> 1   line 55\n" in out
    assert out.endswith("  state 3 (may end)\n")


def test_show_takes_all_three_forms(kalium: Run, policy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    kalium("policy", "compile", policy, "-o", tmp_path / "compiled.json")
    kalium("policy", "sign", policy, "--key", keys[0], "-o", tmp_path / "signed.json")

    shown = {kalium("policy", "show", path) for path in (policy, tmp_path / "compiled.json", tmp_path / "signed.json")}

    assert len(shown) == 1


def test_show_as_a_graph_is_dot(kalium: Run) -> None:
    _, out, _ = kalium("policy", "show", POLICIES / "hello-retail.yml", "--function", "product-photos-master", "--format", "dot")

    assert out.startswith('digraph "hello-retail" {\n')
    assert '    f0_0 -> f0_1 [label="invoke product-photos-3-receive\\nline 55"];' in out
    assert out.count("{") == out.count("}")


def test_show_for_programs_is_the_compiled_form(kalium: Run) -> None:
    _, out, _ = kalium("policy", "show", POLICIES / "hello-retail.yml", "--function", "product-photos-master", "--output", "json")

    assert json.loads(out)["app_cfg"].keys() == {"product-photos-master"}


def test_show_of_an_unknown_function_is_wrong_usage(kalium: Run) -> None:
    code, _, err = kalium("policy", "show", POLICIES / "hello-retail.yml", "--function", "f")

    assert (code, "next: use one of product-photos-1-microbench, " in err) == (2, True)


def test_a_failing_example_says_what_was_expected(kalium: Run, tmp_path: Path) -> None:
    examples = tmp_path / "shop.examples.yml"
    examples.write_text(
        """\
schema: kalium/examples-v1
starts: {allowed: [product-photos-master, nobody], denied: [product-photos-4-success]}
examples:
  - name: wrong order
    function: product-photos-master
    allowed: [invoke product-photos-6-report]
  - name: wrong hope
    function: product-photos-master
    denied: [invoke product-photos-3-receive]
  - name: wrong reason
    function: product-photos-master
    denied: [invoke product-photos-6-report]
    reason: not_in_policy
    may_end: true
  - name: no message
    function: product-photos-master
    allowed: [invoke]
  - name: no function
    function: f
""",
        encoding="ascii",
    )

    code, out, _ = kalium("policy", "test", POLICIES / "hello-retail.yml", examples)

    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("error")] == [
        f"error[policy.example]: cannot play {examples} under {POLICIES / 'hello-retail.yml'}: line {line}: {found}"
        for line, found in (
            (2, "nobody is not a function of the policy; the example says allowed"),
            (2, "a client's start of product-photos-4-success is allowed; the example says denied"),
            (6, '"wrong order": invoke product-photos-6-report is out_of_order; expected here: invoke product-photos-3-receive @line 55'),
            (9, '"wrong hope": invoke product-photos-3-receive is allowed'),
            (12, '"wrong reason": invoke product-photos-6-report is out_of_order, not not_in_policy'),
            (14, '"wrong reason": the invocation may not end there'),
            (17, '"invoke" is not a message as logs write it'),
            (19, "f is not a function of the policy"),
        )
    ]
    assert out.endswith(f"{examples}: 5 examples, 8 failures\n")


def test_examples_of_another_shape_are_refused(kalium: Run, tmp_path: Path) -> None:
    examples = tmp_path / "shop.examples.yml"
    examples.write_text("schema: kalium/examples-v1\nexamples: [{name: x, funktion: f}]\n", encoding="ascii")

    code, out, _ = kalium("policy", "test", POLICIES / "hello-retail.yml", examples)

    assert (code, 'unknown key "funktion"' in out) == (1, True)


def test_the_schema_is_the_published_file(kalium: Run) -> None:
    """Editors read the file, the compiler the module: they are one."""
    _, out, _ = kalium("policy", "schema")

    assert out == published() == (ROOT / "kalium" / "policy" / "kalium-v1.schema.json").read_text(encoding="ascii")


VERDICT = {
    "event": "verdict", "time_ms": 1_700_000_000_123, "app": "shop", "function": "buy", "allowed": False, "would_deny": False,
    "reason": "out_of_order", "policy_version": 7, "line": 38,
    "message": "mysql insert write t", "peer": "database", "expected": ["mysql begin @line 36"],
}  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three verdicts, a line of another kind, and one that is being written."""
    path = tmp_path / "verdicts.jsonl"
    allowed = {**VERDICT, "allowed": True, "reason": "allowed", "expected": [], "message": "mysql begin", "line": 36}
    audited = {**VERDICT, "allowed": True, "would_deny": True, "app": "shop-audit", "line": 0, "expected": []}
    lines = [json.dumps(record) for record in (VERDICT, allowed, {"event": "started"}, audited)]
    path.write_text("\n".join(lines) + '\n{"event": "verd', encoding="ascii")
    return path


def test_explain_says_why_and_what_was_expected(kalium: Run, log: Path) -> None:
    code, out, _ = kalium("policy", "explain", "--log", log)

    assert code == 0
    assert out == (
        "2023-11-14 22:13:20.123 shop/buy denied: mysql insert write t to database\n"
        "    why: out_of_order; line 38 of the policy allows it at another place\n"
        "    expected: mysql begin @line 36\n"
        "2023-11-14 22:13:20.123 shop/buy allowed: mysql begin to database\n"
        "    by line 36 of policy version 7\n"
        "2023-11-14 22:13:20.123 shop-audit/buy would deny: mysql insert write t to database\n"
        "    why: out_of_order\n"
        "    expected: no further message\n"
    )


def test_explain_shows_the_id_and_the_fail_mode(kalium: Run, log: Path) -> None:
    forgiven = {**VERDICT, "allowed": True, "reason": "allowed", "fail_mode": "allow", "id": "00f1e2d300000002"}
    plain = {**VERDICT, "allowed": True, "reason": "allowed", "fail_mode": "", "id": "00f1e2d300000003"}
    denied = {**VERDICT, "fail_mode": "deny", "id": "00f1e2d300000001"}
    log.write_text("".join(json.dumps(record) + "\n" for record in (denied, forgiven, plain)), encoding="ascii")

    _, out, _ = kalium("policy", "explain", "--log", log)

    assert out.count("    fail mode: deny, because no controller answered\n    id: 00f1e2d300000001\n") == 1
    assert out.count("    fail mode: allow, because no controller answered\n    id: 00f1e2d300000002\n") == 1
    assert "00f1e2d300000003" not in out


@pytest.mark.parametrize(
    ("options", "count"),
    [(["--denied"], 2), (["--app", "shop"], 2), (["--function", "buy", "--last", "1"], 1), (["--denied", "--app", "shop"], 1), (["--app", "x"], 0)],
)
def test_explain_chooses(kalium: Run, log: Path, options: list[str], count: int) -> None:
    code, out, _ = kalium("policy", "explain", "--log", log, "--output", "json", *options)

    assert (len(json.loads(out)), code) == (count, 0 if count else 1)


def test_explain_waits_for_the_first_that_fits(kalium: Run, log: Path) -> None:
    """The agent writes a moment after the function has its answer."""
    late = threading.Timer(0.2, lambda: log.write_text(json.dumps({**VERDICT, "app": "late"}) + "\n", encoding="ascii"))
    late.start()
    try:
        code, out, _ = kalium("policy", "explain", "--log", log, "--app", "late", "--wait", "30")
    finally:
        late.join()

    assert (code, " late/buy denied: " in out) == (0, True)


def test_explain_of_a_damaged_log_names_the_line(kalium: Run, log: Path) -> None:
    log.write_text("{}\nnot json\n", encoding="ascii")

    code, _, err = kalium("policy", "explain", "--log", log)

    assert (code, "line 2 is not JSON" in err) == (3, True)


def test_the_command_lists_its_nouns_and_examples(kalium: Run) -> None:
    code, out, _ = kalium("--help")

    assert code == 0
    assert all(f"  {noun} " in out for noun in NOUNS) and "examples:" in out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["policy"], ["policy", "nonsense"], ["policy", "explain", "--last", "0"]])
def test_wrong_usage_is_told_apart(kalium: Run, arguments: list[str]) -> None:
    code, out, err = kalium(*arguments)

    assert (code, out) == (2, "")
    assert err


def test_the_version_is_that_of_the_package(kalium: Run) -> None:
    assert kalium("--version")[:2] == (0, "kalium 0.1.0\n")


def test_one_noun_does_not_import_another() -> None:
    """A host that lacks the packages of one noun can still run the others."""
    program = (
        "import sys; from kalium.cli.main import main; main(['policy', 'schema']);"
        "print(sorted(name for name in sys.modules if name.startswith('kalium.cli.')))"
    )

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.splitlines()[-1] == "['kalium.cli.files', 'kalium.cli.main', 'kalium.cli.policy']"


def test_an_interrupted_command_says_so(kalium: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kalium.cli.policy.run_schema", interrupted)

    code, _, err = kalium("policy", "schema")

    assert (code, err.startswith("error[cli.interrupted]: ")) == (130, True)


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`kalium policy schema | head -1` ends quietly."""
    command = f"'{sys.executable}' -m kalium.cli.main policy show policies/hello-retail.yml --output json | true"

    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
