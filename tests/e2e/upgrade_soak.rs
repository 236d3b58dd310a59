//! I1, I2, I4: many upgrades in a row of one guest with a disk of another process, a tap, a serial port and two vCPUs. Where the kernel has
//! vhost-net it moves the packets (in the lab it does; `tests/lab/in_place.rs` does the same there), elsewhere the processes do.
//! `VMFERRY_UPGRADES` says how many.

use crate::harness::{Accel, number_from_env, whole_machine};
use crate::upgrades::upgrade_again_and_again;

on_both_accelerators!(a_guest_survives_many_upgrades_with_all_it_has_and_nothing_grows);

const UPGRADES: u64 = 6;

fn a_guest_survives_many_upgrades_with_all_it_has_and_nothing_grows(accel: Accel) {
    let _turn = whole_machine();
    let count = number_from_env("VMFERRY_UPGRADES").unwrap_or(UPGRADES);
    upgrade_again_and_again(accel, count, false);
}
