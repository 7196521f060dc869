"""Workers on several hosts against one database; one host is cut off, and healed: `make scale-out`.

    hub: PostgreSQL, Storage, the provider's fake ── bridge ─┬─ host 1: worker.py
                                                             ├─ host 2: worker.py   ✂ link down, up
                                                             └─ host 3: worker.py

Each host is a network namespace, and so is the hub: nothing here touches the machine's own network.
With all hosts busy, one loses its link; the others take over what it held, it comes back, and what
it still thought to be its own changes nothing. Needs root. Prints its numbers as JSON; whatever is
wrong ends it with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

from actors import User  # noqa: E402
from database import Database, assert_books_balance  # noqa: E402
from fake_replicate import Behaviour, FakeReplicate  # noqa: E402
from worker_process import WorkerProcess, Workers, eventually  # noqa: E402

from stack import Stack, interrupt  # noqa: E402

HUB = "10.77.0.1"
HOSTS = {number: f"darkroom-{os.getpid()}-{number}" for number in (1, 2, 3)}
HBA = """
host all all 127.0.0.1/32 scram-sha-256
host all all 10.77.0.0/24 scram-sha-256
"""


def say(text: str) -> None:
    """Tell how far it is."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A bridge in this process's own network namespace, and a namespace for each host."""
    ip("link set lo up", "link add hub type bridge", f"address add {HUB}/24 dev hub")
    ip("link set hub up")
    try:
        for number, name in HOSTS.items():
            ip(
                f"netns add {name}",
                f"link add host{number} type veth peer name eth0 netns {name}",
                f"link set host{number} master hub up",
                f"-n {name} address add 10.77.0.{10 + number}/24 dev eth0",
                f"-n {name} link set lo up",
                f"-n {name} link set eth0 up",
            )
        yield
    finally:
        for name in HOSTS.values():  # their links go with them, the hub's with this process
            if Path("/run/netns", name).exists():
                ip(f"netns delete {name}")


class Fleet(Workers):
    """Workers on the hosts, and a user who wants many pictures."""

    def __init__(self, stack: Stack, fake: FakeReplicate, slots: int) -> None:
        super().__init__(Database(stack.database_url, "postgres"), stack, stack.folder)
        self.environment |= {
            "REPLICATE_API_TOKEN": fake.token,
            "WORKER_SLOTS": str(slots),
            "WORKER_GRACE_SECONDS": "0.5",
        }
        self.extra_secrets = {fake.token, f"{fake.origin}/files"}
        self.db.lift_limits()
        self.db.execute("update public.models set is_active = true")
        self.db.runs_at("replicate", fake.url)
        self.user = User(self.db).has_paid().has(credits=1_000_000)

    def __exit__(self, failure: object, *rest: object) -> None:
        """Clean up; tell what the workers logged only where something is wrong."""
        with contextlib.redirect_stdout(io.StringIO() if failure is None else sys.stderr):
            super().__exit__(failure, *rest)

    def start_on(self, number: int) -> WorkerProcess:
        log_file = self.folder / f"host-{number}-{len(self.processes)}.log"
        within = ["ip", "netns", "exec", HOSTS[number]]
        self.processes.append(WorkerProcess(log_file, self.environment, within))
        return self.processes[-1]

    def ask(self, jobs: int) -> None:
        for number in range(jobs):
            self.user.enqueue(f"picture {number}", "black-forest-labs/flux-schnell")

    def done(self) -> int:
        query = "select count(*) from public.generations where status = 'completed'"
        return int(self.db.value(query))

    def held_by(self, process: WorkerProcess) -> set[str]:
        query = "select job_id::text as id from private.running_jobs where worker_id = %s"
        return {row["id"] for row in self.db.execute(query, process.worker_id)}

    def cut_and_heal(self, jobs: int) -> dict[str, Any]:
        """Cut off a busy host until the others have done all jobs; heal it, and ask for more."""
        db, processes = self.db, {number: self.start_on(number) for number in HOSTS}
        before, victim = self.done(), processes[2]
        self.ask(jobs)
        eventually(lambda: all(self.held_by(each) for each in processes.values()), within=60)
        eventually(lambda: all(map(self.checkpointed, self.held_by(victim))), within=60)
        say("cutting off host 2")
        ip("link set host2 down")
        cut_at = db.value("select clock_timestamp()")
        time.sleep(0.5)  # what was on the wire
        held = self.held_by(victim)
        eventually(lambda: self.done() == before + jobs, within=300)
        taken_over = db.execute(
            "select generation_id::text as id,"
            " extract(epoch from min(started_at) - %s)::float as after from private.attempts"
            " where generation_id = any(%s::uuid[]) and worker_id <> %s group by 1",
            cut_at,
            list(held),
            victim.worker_id,
        )
        assert held and {row["id"] for row in taken_over} == held
        say("healing it")
        ip("link set host2 up")
        healed_at = db.value("select clock_timestamp()")
        for job in held:
            # repeated: what it had to say had been settled without it.
            victim.logged(f"job.(lost|repeated) job={job}", within=90)
        back = "select extract(epoch from seen_at - %s)::float from private.workers where id = %s"
        seconds = eventually(lambda: max(0, db.value(back, healed_at, victim.worker_id)), within=90)
        self.ask(jobs)
        eventually(lambda: self.done() == before + 2 * jobs, within=300)
        query = "select count(*) from private.attempts where worker_id = %s and started_at > %s"
        for process in processes.values():
            process.stop()
        return {
            "jobs_held_by_the_host_cut_off": len(held),
            "seconds_until_taken_over": [round(row["after"], 1) for row in taken_over],
            "late_results_fenced": len(held),
            "seconds_from_healing_to_its_beat": round(seconds, 1),
            "attempts_of_the_healed_host": db.value(query, victim.worker_id, healed_at),
        }

    def count(self, bought: int) -> dict[str, int]:
        """Count what was lost or doubled; all of it must be 0."""
        assert_books_balance(self.db)
        row = self.db.row(
            "select count(*) as jobs, count(*) filter (where status <> 'completed') as lost,"
            " sum((select count(*) from private.attempts as a where a.generation_id = g.id"
            "   and a.outcome = 'completed') - 1)::int as completed_twice,"
            " sum((select count(*) from public.images as i where i.generation_id = g.id) - 1)::int"
            "   as images_doubled"
            " from public.generations as g"
        )
        return row | {"bought_twice": bought - row["jobs"]}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build it all, run it, and return the numbers."""
    folder.chmod(0o711)
    hba = folder / "hba.conf"
    hba.write_text(HBA)
    hba.chmod(0o644)
    with network(), FakeReplicate(HUB) as fake:
        stack = Stack(folder / "stack", fsync=given.durable)
        stack.cluster.host = stack.gateway.host = HUB
        stack.cluster.tuning = {"hba_file": str(hba), "listen_addresses": f"127.0.0.1,{HUB}"}
        fake.default = Behaviour(seconds=given.seconds)
        try:
            with Fleet(stack.up(), fake, given.slots) as fleet:
                intervals = "set lease = %s * interval '1 s', heartbeat = %s * interval '1 s'"
                query = f"update private.settings {intervals}"
                fleet.db.execute(query, given.lease, given.lease / 4)
                cut = fleet.cut_and_heal(given.jobs)
                counts = fleet.count(len(fake.predictions))
                return vars(given) | {"namespaces": [*HOSTS.values()]} | cut | counts
        finally:
            stack.clean()


def main() -> None:
    """Go into a network namespace of its own, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=8, help="of each worker")
    parser.add_argument("--jobs", type=int, default=120, help="in each round")
    parser.add_argument("--seconds", type=float, default=2, help="the provider takes for a job")
    parser.add_argument("--lease", type=float, default=60, help="seconds, of four beats")
    parser.add_argument("--durable", action="store_true", help="fsync, as in production")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("scale_out: needs root, for network namespaces")
    if not given.inside:
        command = ["unshare", "--net", sys.executable, __file__, *sys.argv[1:], "--inside"]
        os.execvp(command[0], command)
    signal.signal(signal.SIGTERM, interrupt)
    with tempfile.TemporaryDirectory(prefix="darkroom-scale-out-") as folder:
        print(json.dumps(measure(given, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
