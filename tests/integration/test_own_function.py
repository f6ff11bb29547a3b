"""docs/howto/own-function.md as a stranger follows it: every command of the page, in order, in one shell."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from .conftest import ROOT, Lines

PAGE = ROOT / "docs" / "howto" / "own-function.md"
PAGE_S_MAX = 300


def commands_of(page: str) -> str:
    """The page's ```sh blocks, joined in their order."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5, "the page builds, deploys, allows, denies and cleans up"
    return "\n".join(blocks)


def test_every_command_of_the_page_works_and_shows_both_verdicts(site: dict[str, Any], verdicts: Lines, tmp_path: Path) -> None:
    """The page ends with its function removed, after one allowed and one denied message in the verdict log."""
    script = tmp_path / "page.sh"
    script.write_text(f"set -eu\nset -o pipefail\n. {ROOT}/.venv/bin/activate\n{commands_of(PAGE.read_text(encoding='utf-8'))}", encoding="utf-8")

    done = subprocess.run(["bash", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=PAGE_S_MAX, check=False)

    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    strangers = [line for line in verdicts.read() if not line["app"].startswith("hello-retail")]
    assert any(line["allowed"] and line["kind"] not in ("start", "connect") for line in strangers), json.dumps(strangers)
    assert any(not line["allowed"] for line in strangers), json.dumps(strangers)
