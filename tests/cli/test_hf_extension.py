"""`hf sparse ...`: the command as an extension of huggingface_hub's own command line."""

from __future__ import annotations

import configparser
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.processes import ROOT, environment

extensions = pytest.importorskip("huggingface_hub.cli.extensions")


def test_the_repository_is_what_the_hub_installs() -> None:
    """A repository `hf-NAME` without a file of that name is a package with a command of that name."""
    assert extensions._get_executable_name("sparse") == "hf-sparse"
    assert not (ROOT / "hf-sparse").exists()
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == [
        "hf-sparse",
        "=",
        "hf_sparse_cli:main",
    ]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The variables of a process whose home has the extension, as an installation leaves it."""
    folder = tmp_path / ".local/share/hf/extensions/hf-sparse"
    command = folder / "venv/bin/hf-sparse"
    command.parent.mkdir(parents=True)
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom hf_sparse_cli import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    extensions.ExtensionManifest(
        owner="user",
        repo="hf-sparse",
        repo_id="user/hf-sparse",
        short_name="sparse",
        executable_path=str(command),
        type="python",
        installed_at=datetime(2026, 1, 1),
    ).save(folder)
    return environment(HOME=str(tmp_path), HF_HUB_DISABLE_UPDATE_CHECK="1", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_hf_hands_commands_flags_and_exit_codes_on(installed: dict[str, str]) -> None:
    def hf(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=installed)

    done = hf("sparse", "prune", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: hf-sparse prune" in done.stdout
    wrong = hf("sparse", "prune", "--no-such-flag")
    assert wrong.returncode == 2
    assert hf("sparse", "inspect", "no-such-folder").returncode == 1
    assert "sparse" in hf("--help").stdout
