"""Workers on three hosts, one cut off and healed: the short form of `make scale-out`, some 30 s."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from database import PROJECT

SHORT = "--slots 2 --jobs 8 --seconds 1 --lease 3"
MAY = os.geteuid() == 0 and shutil.which("ip") and not os.system("unshare --net true 2>/dev/null")


@pytest.mark.skipif(not MAY, reason="needs root, iproute2 and network namespaces")
def test_others_take_over_from_a_host_that_is_cut_off_and_it_comes_back_harmless():
    command = [sys.executable, str(PROJECT / "tests" / "scale_out.py"), *SHORT.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wrong = ("lost", "completed_twice", "images_doubled", "bought_twice")
    assert {name: told[name] for name in wrong} == dict.fromkeys(wrong, 0)
    assert told["jobs_held_by_the_host_cut_off"] == told["late_results_fenced"] > 0
    assert min(told["seconds_until_taken_over"]) > 2  # no lease is broken, it runs out
    assert told["attempts_of_the_healed_host"] > 0
    assert not [name for name in told["namespaces"] if Path("/run/netns", name).exists()]
