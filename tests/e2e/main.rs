//! Whole migrations between real processes, and everything that can go wrong with one: a guest that keeps writing and checking its
//! memory is moved, killed, cancelled and lied to. One line per module: what it proves.
//!
//! Every case runs on host threads and, where /dev/kvm is, on KVM; case names end with the accelerator. Cases take turns, two at a time
//! ([`harness::turn`]), heavy ones have the machine to themselves ([`harness::whole_machine`]), those that only wait for a deadline do
//! neither. What is random prints its seed; `VMFERRY_SEED` repeats it.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy exempts test functions but not what they call"
)]

/// Makes one test per accelerator of each function named.
macro_rules! on_both_accelerators {
    ($($case:ident),* $(,)?) => {
        mod soft {
            $(#[test]
            fn $case() {
                super::$case($crate::harness::Accel::Soft);
            })*
        }
        mod kvm {
            $(#[test]
            fn $case() {
                if $crate::harness::kvm_is_here() {
                    super::$case($crate::harness::Accel::Kvm);
                }
            })*
        }
    };
}

mod grid; // tables of faults, square by square
mod harness; // processes under test, and what can be asked of them
mod line; // what a guest says on its serial port, in order
mod listener; // a server that VMs tell how their migrations go
mod peer; // either side of the protocol, spoken by hand
mod proc; // what the kernel says of a process
mod proxy; // a link that changes, drops and cuts what passes
mod qmp; // the control interface, events kept
mod stand_in; // programs that a VM is told to become
mod storage; // back ends of disks in processes of their own
mod successor; // processes that a VM goes on in
mod tap; // taps on a bridge, and packets that a guest sends back
mod terminal; // a pseudo terminal, and what stands on its screen
mod upgrades; // one guest through many processes
mod watch; // two VMs that may never run at the same time

mod bad_input; // I3, I5: targets and peers that do not fit; the guest stays, and moves to a good target afterwards
mod cancel; // I3, I6: an operator who changes his mind
mod cancel_src; // I3, I6: the same in each status, as QEMU tests it
mod cli; // every command as scripts use it
mod cli_qemu; // the same against QEMU
mod cli_watch; // following at a terminal, and Ctrl-C
mod control; // I3, I6: yank, blockers, dirty rates, settings under way, a second incoming migration, descriptors
mod corrupt; // I2, I5: pages and state that were changed on the way
mod disk; // I2, I3: what the guest has on its disk
mod doubt; // I1: the link is lost at the commit
mod faults; // I1, I3, I6, I7: every fault in every phase
mod flow; // the main job over every transport
mod hammer; // I3, I4, I6, I7: clients that hammer while migrations fail
mod kill; // I1, I3: either side is killed at any moment
mod memory; // a target without memory
mod network; // two network namespaces, as two hosts
mod observe; // metrics, records, log lines and the page in a browser, of real migrations
mod ownership; // I1, I3, I7: disks have one owner, and those who were told hear the end
mod qemu_list; // I2, I3: paths of QEMU's test list that no other module has
mod reboot; // I1, I2, I3: memory that stays in a file while its guest is saved
mod soak; // I2, I4: many migrations, nothing lost, nothing leaked
mod sparse; // memory that the guest never touched stays out of both processes
mod streams; // I2, I3, I5: files, pipes and commands that hold a VM, sockets that are passed in
mod tap_net; // I2: no packet is lost or doubled when a guest moves to another tap
mod target_errors; // I3: the target's words at the source, and a target that can always be asked
mod upgrade; // I1, I3, I4: a new process on the same host, and everything that can go wrong with it
mod upgrade_exec; // I1, I3, I4: the same process becomes a new program
mod upgrade_faults; // I1, I3, I4, I7: every fault at every step of an upgrade
mod upgrade_qemu; // I2: a VM of QEMU goes on in a new QEMU
mod upgrade_return; // I3: a new program that fails, whatever the old one was started for
mod upgrade_serial; // I2: no byte of the serial port is lost or doubled in an upgrade
mod upgrade_soak; // I1, I2, I4: many upgrades of one guest with all its devices, nothing lost, nothing leaked
mod versions; // I2, I3: VMs of older builds, and back to them
mod vhost_user; // I2, I3: disks whose back end is another process
