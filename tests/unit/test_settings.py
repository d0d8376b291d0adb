"""What a node may be told, and where it listens unless it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.errors import PairingError, UsageError
from edgellm.identity import TrustStore
from edgellm.localcluster import pair_homes
from edgellm.node import usual_listen
from edgellm.settings import ALL_NETWORKS, LOOPBACK, NodeSettings


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "192.168.1.7"])
def test_without_encryption_nobody_outside_may_connect(listen: str, tmp_path: Path) -> None:
    NodeSettings("a", tmp_path, listen=listen)
    with pytest.raises(UsageError, match="without encryption"):
        NodeSettings("a", tmp_path, listen=listen, secure=False)


@pytest.mark.parametrize("listen", [LOOPBACK, "::1", "localhost"])
def test_without_encryption_on_this_machine(listen: str, tmp_path: Path) -> None:
    assert not NodeSettings("a", tmp_path, listen=listen, secure=False).exposed


def test_a_device_opens_to_the_network_when_it_has_somebody_there(tmp_path: Path) -> None:
    assert usual_listen(tmp_path / "a") == LOOPBACK
    TrustStore(tmp_path / "a").found("a")
    assert usual_listen(tmp_path / "a") == LOOPBACK
    pair_homes({tmp_path / "a": "a", tmp_path / "b": "b"})
    assert usual_listen(tmp_path / "a") == usual_listen(tmp_path / "b") == ALL_NETWORKS


def test_homes_are_paired_once_and_for_all(tmp_path: Path) -> None:
    homes = {tmp_path / name: name for name in "abc"}
    pair_homes(dict(list(homes.items())[:2]))
    first = TrustStore(tmp_path / "b")
    pair_homes(homes)
    stores = [TrustStore(home) for home in homes]
    assert {store.cluster_id for store in stores} == {first.cluster_id}
    assert all(store.trusted(other.identity.device_id) for store in stores for other in stores)
    members = stores[0].members
    pair_homes(homes)
    assert TrustStore(tmp_path / "a").members == members


def test_two_clusters_are_not_made_one(tmp_path: Path) -> None:
    for pair in ("ab", "cd"):
        pair_homes({tmp_path / name: name for name in pair})
    with pytest.raises(PairingError):
        pair_homes({tmp_path / name: name for name in "ac"})
