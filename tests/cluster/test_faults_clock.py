"""A device whose clock is wrong. A library that is loaded before all others tells a process, and
OpenSSL in it, another time; the machine's own clock stays."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.cluster.joined import joined
from tests.cluster.processes import finish, start, wait_for

CLOCK = """
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <stdlib.h>
    #include <sys/time.h>
    #include <time.h>
    #include <unistd.h>
    #include <sys/syscall.h>

    static long off(void) { const char *t = getenv("CLOCK_OFF_S"); return t ? atol(t) : 0; }

    int clock_gettime(clockid_t id, struct timespec *at) {
        int made = syscall(SYS_clock_gettime, id, at);
        if (!made && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += off();
        return made;
    }

    time_t time(time_t *at) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        if (at) *at = now.tv_sec;
        return now.tv_sec;
    }

    int gettimeofday(struct timeval *at, void *zone) {
        struct timespec now;
        (void) zone;
        clock_gettime(CLOCK_REALTIME, &now);
        at->tv_sec = now.tv_sec;
        at->tv_usec = now.tv_nsec / 1000;
        return 0;
    }
"""
DAY_S = 86_400


HANDSHAKE = """
import ssl, sys
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
server.load_cert_chain(sys.argv[1])
client.check_hostname = False
client.load_verify_locations(sys.argv[1])
to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
near = client.wrap_bio(to_client, to_server)
far = server.wrap_bio(to_server, to_client, server_side=True)
for side in (near, far, near):
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        pass
"""


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that sets a process's clock off by CLOCK_OFF_S seconds, for OpenSSL as well."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(textwrap.dedent(CLOCK), encoding="utf-8")
    made = folder / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(folder / "clock.c")],
        check=True, timeout=60,
    )  # fmt: skip
    asked = [sys.executable, "-c", "import time; print(time.time())"]
    env = os.environ | {"LD_PRELOAD": str(made), "CLOCK_OFF_S": str(-DAY_S)}
    shown = subprocess.run(asked, env=env, check=True, capture_output=True, text=True, timeout=60)
    assert float(shown.stdout) == pytest.approx(time.time() - DAY_S, abs=30)
    # Negative control: a certificate that usual TLS refuses by that clock, and not by ours.
    asked = [sys.executable, "-c", HANDSHAKE, str(_valid_today(folder / "today.pem"))]
    ours = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert ours.returncode == 0, ours.stderr
    theirs = subprocess.run(asked, env=env, capture_output=True, text=True, timeout=60)
    assert "not yet valid" in theirs.stderr
    return made


def _valid_today(path: Path) -> Path:
    """A certificate, and its key, that is valid for an hour more and less."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "today")])
    now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - hour)
        .not_valid_after(now + hour)
        .sign(key, hashes.SHA256())
    )
    written = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(written + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    "off_s",
    [
        pytest.param(DAY_S, id="a day ahead"),
        pytest.param(-DAY_S, id="a day behind", marks=pytest.mark.slow),
        pytest.param(-40 * 365 * DAY_S, id="forty years behind", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_clock_has_no_effect(off_s: int, wrong_clock: Path, tmp_path: Path) -> None:
    """A device whose clock is off by a day, or was never set: it pairs, computes, and stays."""
    env = {"LD_PRELOAD": str(wrong_clock), "CLOCK_OFF_S": str(off_s)}
    with joined(tmp_path, "kitchen", {}) as kitchen:
        code = str(json.loads(kitchen.out.read_bytes())["code"])
        with joined(tmp_path, "attic", env, "--code", code, "--peer", kitchen.address) as attic:
            wait_for(lambda: "Found device attic" in kitchen.said())
            process = start(
                ["chat", "--home", str(tmp_path / "kitchen"), "--json", "--exact",
                 "--model", "stub:6:delay=0.02", "--stages", "kitchen:0-3,attic:3-6",
                 "--peer", attic.address, "--prompt", "Hello", "--max-tokens", "150"],
                tmp_path,
            )  # fmt: skip
            ended = finish(process)
            assert ended.code == 0, ended.err
            assert len(ended.json["tokens"]) == 150
            assert ended.json["recoveries"] == []
            for side in (kitchen, attic):
                assert "does not answer" not in side.said()
                assert "Lost device" not in side.said()
