"""``.ci/install-slurm`` with stand-ins for apt-get and id: what it would do to a machine that lacks Slurm."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "install-slurm"
APT = """#!/bin/sh
echo "$DEBIAN_FRONTEND: $*" >>"$LOG"
if [ "$1" = install ]; then
    "$SLURM_SBIN/policy-rc.d"
    echo "services may start: $?" >>"$LOG"
fi
exit "${APT_CODE:-0}"
"""


@pytest.fixture
def machine(tmp_path):
    """A PATH with what the script calls, and a function that runs it."""
    folders = {name: tmp_path / name for name in ("bin", "sbin")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("bash", "sh", "chmod", "rm"):
        (folders["bin"] / name).symlink_to(Path("/bin") / name)

    def program(folder: str, name: str, text: str = "#!/bin/sh\n") -> None:
        path = folders[folder] / name
        path.write_text(text)
        path.chmod(0o755)

    def run(code: int = 0, **env: str) -> tuple[str, str]:
        """What was asked of apt-get, and what the script has said."""
        log = tmp_path / "log"
        log.write_text("")
        env = {"PATH": str(folders["bin"]), "SLURM_SBIN": str(folders["sbin"]), "LOG": str(log), **env}
        done = subprocess.run(["/bin/bash", SCRIPT], env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode == code, done.stderr
        return log.read_text(), done.stdout + done.stderr

    program("bin", "id", "#!/bin/sh\necho 0\n")
    program("bin", "apt-get", APT)
    run.program = program
    run.policy = folders["sbin"] / "policy-rc.d"
    return run


INSTALLED = """\
noninteractive: update -qq
noninteractive: install -y -qq --no-install-recommends slurm-wlm munge
services may start: 101
"""


@pytest.mark.parametrize("code", [0, 100], ids=["apt-get works", "apt-get fails"])
def test_as_root_the_packages_are_installed_and_start_nothing(code, machine):
    machine.program("bin", "sbatch")  # one of several is not enough
    if code:
        asked, _ = machine(code, APT_CODE=str(code))
        assert asked == INSTALLED.partition("\n")[0] + "\n"
    else:
        asked, told = machine()
        assert asked == INSTALLED
        assert "installing slurm-wlm and munge for the tests" in told
    assert not machine.policy.exists()


def test_the_policy_that_a_machine_has_stays_as_it_is(machine):
    text = "#!/bin/sh\nexit 101\n# the administrator's\n"
    machine.program("sbin", "policy-rc.d", text)
    assert machine()[0] == INSTALLED
    assert machine.policy.read_text() == text


def test_nothing_is_asked_for_where_slurm_is_or_where_only_root_could(machine):
    machine.program("bin", "id", "#!/bin/sh\necho 1000\n")
    asked, told = machine()
    assert asked == ""
    assert "Slurm is missing and only root on Debian can install it here: its tests will be skipped" in told
    for folder, name in (("sbin", "munged"), ("sbin", "slurmctld"), ("sbin", "slurmd"), ("bin", "sbatch")):
        machine.program(folder, name)
    assert machine() == ("", "")
