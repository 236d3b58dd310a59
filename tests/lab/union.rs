//! Everybody who writes to guest memory is in the united dirty log: a vCPU, the VMM, a back end in the kernel. The others have cases of
//! their own: back ends in other processes outside of the lab, and a PCI device in `vfio_pci`, because its IOMMU keeps no record, so that
//! all memory counts as written.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmferry_devices::kvm::{KvmDirtyLog, MemorySlots};
use vmferry_devices::vhost::VhostLog;
use vmferry_devices::vmm_writes::VmmWriteLog;
use vmferry_tests::virtqueue::{marked, ram};
use vmferry_transport::memory::{DirtyLog, UnitedLog};

use crate::harness::until;
use crate::modules::load_kvm;
use crate::vhost::{Guest, Host, Net, PAGES, number_in, open_vhost};

/// Where the vCPU's program is, and what it writes.
const PROGRAM: u64 = 0xc9;
const BY_VCPU: u64 = 0xc8;
/// What the VMM writes.
const BY_VMM: u64 = 0xd2;
/// Stores a byte at offset 0x8000 of the data segment, and halts.
const STORE: [u8; 4] = [0xa2, 0x00, 0x80, 0xf4];

/// Runs the program from its start to its end, in real mode.
fn store(vcpu: &mut VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (PROGRAM << 12, 0xc900);
    (sregs.ds.base, sregs.ds.selector) = (0xc0000, 0xc000);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::Hlt => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_writer_is_in_the_united_log_and_nothing_else() {
    load_kvm();
    let net = Net::new(6);
    let tap = net.open();
    let (memory, ram) = ram(PAGES);
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let slots = Arc::new(MemorySlots::new(vm.clone(), &ram, &[0], None).unwrap());
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let write = |page: u64, bytes: &[u8]| {
        let address = GuestAddress(page << 12);
        memory.memory().write_slice(bytes, address).unwrap();
    };
    write(PROGRAM, &STORE);
    // KVM takes the first access to a page for a write, whatever it is: the program's has it here.
    store(&mut vcpu);
    let mut guest = Guest::new(&memory);
    let host = Host::net(open_vhost("net"), &tap, &memory);
    host.start_anew(&guest);
    let mut log = UnitedLog::new(vec![
        Box::new(KvmDirtyLog::new(slots)),
        Box::new(VmmWriteLog::new(memory.regions().to_vec()).unwrap()),
        Box::new(VhostLog::new(memory.clone(), vec![host.device.clone()])),
    ]);
    log.start().unwrap();
    // What was there before: reported once, and forgotten when it is read.
    let fetch = |log: &mut UnitedLog| {
        let mut map = ram.empty_map();
        log.fetch(&mut map).unwrap();
        if let Some(protector) = log.protector() {
            let runs: Vec<_> = map.runs().collect();
            protector.protect(&runs).unwrap();
        }
        marked(&map, PAGES).into_iter().collect::<BTreeSet<_>>()
    };
    fetch(&mut log);
    // The rings, which the driver and the back end write.
    let rings: BTreeSet<_> = (0..8).collect();
    for turn in 0..3 {
        let outside = |seen: BTreeSet<u64>| &seen - &rings;
        assert_eq!(outside(fetch(&mut log)), BTreeSet::new(), "turn {turn}");
        store(&mut vcpu);
        assert_eq!(outside(fetch(&mut log)), BTreeSet::from([BY_VCPU]));
        write(BY_VMM, &[1]);
        assert_eq!(outside(fetch(&mut log)), BTreeSet::from([BY_VMM]));
        net.host_sends(turn);
        let (slot, packet) = until("the packet", || guest.take());
        assert_eq!(number_in(&packet), Some(turn));
        host.device.lock().unwrap().stop().unwrap();
        let buffer = Guest::page(slot, false);
        let seen = fetch(&mut log);
        assert!(seen.contains(&guest.to.used_page()), "{seen:?}");
        assert_eq!(outside(seen), BTreeSet::from([buffer]));
        host.device.lock().unwrap().start().unwrap();
        // All of them in one round.
        store(&mut vcpu);
        write(BY_VMM, &[2]);
        let all = outside(fetch(&mut log));
        assert_eq!(all, BTreeSet::from([BY_VCPU, BY_VMM]));
    }
    log.stop().unwrap();
}
