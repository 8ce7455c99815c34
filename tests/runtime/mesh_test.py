"""A mesh over several processes gives each the rows of a batch that its index names."""

import dataclasses

import pytest

from ldrld_jax.errors import UserError
from ldrld_jax.runtime.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh reads."""

    id: int
    process_index: int


def slice_of(hosts: int, each: int) -> list[Device]:
    """Returns devices that are numbered across the hosts, as the chips of a TPU slice may be."""
    return [Device(i, i % hosts) for i in range(hosts * each)]


@pytest.mark.parametrize(("hosts", "each", "data", "model"), [(4, 4, -1, 1), (4, 4, 8, 2), (2, 8, 4, 4), (4, 4, 4, 4)])
def test_the_rows_of_a_process_follow_each_other_in_the_order_of_the_processes(hosts, each, data, model):
    mesh = make_mesh(data, model, devices=slice_of(hosts, each))
    rows = [{device.process_index for device in row} for row in mesh.devices]
    per_host = len(rows) // hosts
    assert rows == [{host} for host in range(hosts) for _ in range(per_host)]
    for row in mesh.devices:  # beside each other on a host
        assert [device.id for device in row] == sorted(device.id for device in row)


@pytest.mark.parametrize(("data", "model", "got"), [(2, 8, "2 x 8"), (8, 1, "8 x 1"), (3, 4, "3 x 4")])
def test_unequal_shares_are_refused(data, model, got):
    with pytest.raises(UserError, match=f"all 16 devices of the 4 processes, mesh.data a multiple of 4, .* got {got}"):
        make_mesh(data, model, devices=slice_of(4, 4))


def test_processes_with_unequal_numbers_of_devices_are_refused():
    devices = [Device(i, min(i // 4, 1)) for i in range(12)]
    with pytest.raises(UserError, match="got 12 x 1 with 4 or 8 devices in a process"):
        make_mesh(devices=devices)
