"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd on 127.0.0.1, in a folder of their own.

Needs Debian's ``slurm-wlm`` and ``munge`` and nothing of their configuration. Every port is one that was free, and
:meth:`Cluster.stop` ends what was started and nothing else.
"""

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from distributed import free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}

# Jobs have what they ask for of 8 cores and 8 GPUs a node that need not be there. config_overrides: believe this file.
# KillWait and SlurmdTimeout are short, so that a test sees in seconds what a cluster does in minutes.
_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld/pid
SlurmdPidFile={folder}/%n/pid
SlurmctldLogFile={folder}/ctld/log
SlurmdLogFile={folder}/%n/log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 SocketsPerBoard=1 CoresPerSocket=8 "
    "ThreadsPerCore=1 RealMemory=16000 Gres=gpu:8"
)


def missing() -> list[str]:
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """The cluster, started; use as a context, or call :meth:`stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="megagpt-slurm-"))
        os.chmod(self.folder, 0o755)  # munged wants to be reachable
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env = {**kept, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen] = {}
        self._handler = signal.getsignal(signal.SIGTERM)
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # tests told to end stop the cluster first
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_flags())
            self._until(lambda: (self.folder / "munge/socket").exists(), 10, "munged")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes(*NODES)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # starting and stopping --------------------------------------------------------------------------------------

    def _configure(self) -> None:
        for name in ("munge", "ctld", *NODES):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        nodes = "\n".join(_NODE.format(name=name, port=free_port()) for name in NODES)
        nodes += "\n" + _NODE.format(name="n3", port=free_port()) + " State=DOWN"  # to be named, never to run on
        values = {"folder": self.folder, "user": getpass.getuser(), "ctld_port": free_port(), "nodes": nodes}
        (self.folder / "slurm.conf").write_text(_CONF.format(**values))
        for i in range(8):
            (self.folder / f"gpu{i}").touch()  # a file stands for each device
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("")

    def _munge_flags(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{flag}={self.folder}/munge/{name}" for flag, name in files.items()]

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def _start(self, program: str, *args: str, name: str | None = None) -> None:
        log = self.folder / f"{name or program}.out"
        with open(log, "ab") as out:
            self._processes[name or program] = subprocess.Popen(
                [shutil.which(program, path=_path()), *args],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C in the terminal is for the tests
                preexec_fn=_end_with_parent,
            )

    def wait_for_nodes(self, *nodes: str) -> None:
        """Until ``nodes`` can run jobs."""

        def ready() -> bool:
            states = self.ask("sinfo", "-h", "-N", "-o", "%N %T", check=False).split("\n")
            return all(f"{node} idle" in states for node in nodes)

        self._until(ready, 30, "the nodes")

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's slurmd and everything that it runs end without a word."""
        victims = [self._processes.pop(node).pid, *self._of_node(node)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _of_node(self, node: str) -> list[int]:
        """The processes of jobs on ``node``, and the slurmstepd above each."""
        tasks = [pid for pid, env in self.processes() if env.get("SLURMD_NODENAME") == node]
        return [*tasks, *{parent for pid in tasks if (parent := _stepd_of(pid))}]

    def stop(self) -> None:
        """End every job and daemon of this cluster and remove its folder."""
        signal.signal(signal.SIGTERM, self._handler)
        if "slurmctld" in self._processes:
            jobs = self.ask("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:
                self.ask("scancel", *jobs, check=False)
                self.ask("scancel", "--signal=KILL", "--full", *jobs, check=False)
                with contextlib.suppress(AssertionError):
                    self._until(lambda: not self.ask("squeue", "-h", check=False), 15, "the end of all jobs")
        for process in reversed(list(self._processes.values())):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        for pid, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, job: str | None = None) -> list[tuple[int, dict[str, str]]]:
        """The processes of jobs of this cluster, or of one of them, that live: (pid, environment)."""
        mine = os.getpid()
        daemons = {process.pid for process in self._processes.values()}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                env = dict(word.split("=", 1) for word in words if "=" in word)
                pid = int(path.parent.name)
                own = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in env
                if own and job in (None, env["SLURM_JOB_ID"]):
                    found += [(pid, env)] if pid not in daemons and pid != mine else []
        return found

    # jobs -------------------------------------------------------------------------------------------------------

    def ask(self, *command: str, check: bool = True, **more) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.env, **more.pop("env", {})},
            capture_output=True,
            text=True,
            timeout=60,
            **more,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def sbatch(self, *words, cwd: Path, **env: str) -> str:
        """Submit; the job's number."""
        return self.ask("sbatch", "--parsable", *words, cwd=cwd, env=env).partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str, timeout: float = 240) -> str:
        """The state in which the job ended, for good."""

        def ended() -> bool:
            return self.job(job)["JobState"] in FINISHED

        self._until(ended, timeout, f"job {job}", lambda: self.job(job))
        return self.job(job)["JobState"]

    def output(self, job: str) -> str:
        return Path(self.job(job)["StdOut"]).read_text(errors="replace")

    def until(self, condition, timeout: float = 120, what: str = "it", show=lambda: "") -> None:
        self._until(condition, timeout, what, show)

    def _until(self, condition, timeout: float, what: str, show=lambda: "") -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}: {show()}\n{self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        logs = [path for path in sorted(self.folder.glob("**/log")) if path.is_file()]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


def _end_with_parent() -> None:
    """A daemon gets TERM when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _stepd_of(pid: int) -> int | None:
    """The slurmstepd that is an ancestor of a task."""
    while pid > 1:
        try:
            if b"slurmstepd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
            pid = int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])
        except OSError:
            return None
    return None
