//! What the kernel's back end for packets notes of its writes: buffers and used rings, from the first one after the log began.

use std::collections::BTreeSet;

use vmferry_devices::vhost::VhostLog;
use vmferry_tests::virtqueue::{marked, ram};
use vmferry_transport::memory::{DirtyLog, GuestRam};

use crate::harness::until;
use crate::vhost::{Guest, Host, Net, PAGES, VERSION_1, number_in, open_vhost};

/// What a log reports, by page.
fn fetch(log: &mut impl DirtyLog, ram: &GuestRam) -> BTreeSet<u64> {
    let mut map = ram.empty_map();
    log.fetch(&mut map).unwrap();
    marked(&map, PAGES).into_iter().collect()
}

#[test]
fn the_log_of_packets_has_the_buffers_and_the_used_rings_and_nothing_else() {
    let net = Net::new(2);
    let tap = net.open();
    let (memory, ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let host = Host::net(open_vhost("net"), &tap, &memory);
    host.start_anew(&guest);
    let mut log = VhostLog::new(memory, vec![host.device.clone()]);
    log.start().unwrap();
    fetch(&mut log, &ram);
    for turn in 0..3 {
        net.host_sends(turn);
        let mut expected = BTreeSet::new();
        until("the packet", || {
            let (slot, packet) = guest.take()?;
            expected.insert(Guest::page(slot, false));
            number_in(&packet).map(|number| assert_eq!(number, turn))
        });
        expected.insert(guest.to.used_page());
        host.device.lock().unwrap().stop().unwrap();
        let rings = [guest.to.used_page(), guest.from.used_page()];
        let mut seen = fetch(&mut log, &ram);
        assert!(seen.is_superset(&expected), "{seen:?}");
        // When it stops and starts, a back end tells the driver of either ring whether to kick.
        expected.extend(rings);
        assert!(seen.is_subset(&expected), "{seen:?}");
        // The log outlives a stop.
        host.device.lock().unwrap().start().unwrap();
        guest.send(0, &net.packet(2, turn));
        host.kick();
        until("the answer", || guest.from.answer());
        host.device.lock().unwrap().stop().unwrap();
        seen = fetch(&mut log, &ram);
        assert!(seen.contains(&guest.from.used_page()), "{seen:?}");
        assert!(seen.is_subset(&BTreeSet::from(rings)), "{seen:?}");
        host.device.lock().unwrap().start().unwrap();
    }
    log.stop().unwrap();
    net.host_sends(9);
    until("a packet without log", || guest.take());
    log.start().unwrap();
    host.device.lock().unwrap().stop().unwrap();
    let seen = fetch(&mut log, &ram);
    let rings = BTreeSet::from([guest.to.used_page(), guest.from.used_page()]);
    assert!(seen.is_subset(&rings), "{seen:?}");
    log.stop().unwrap();
}

#[test]
fn a_log_that_begins_or_ends_between_the_two_steps_of_a_start_counts_from_the_first_packet() {
    let net = Net::new(9);
    let tap = net.open();
    let (memory, ram) = ram(PAGES);
    let mut guest = Guest::new(&memory);
    let host = Host::net(open_vhost("net"), &tap, &memory);
    let mut log = VhostLog::new(memory, vec![host.device.clone()]);
    let device = || host.device.lock().unwrap();
    device().set_features(VERSION_1).unwrap();
    device().set_rings(&guest.rings()).unwrap();
    for number in 0..3 {
        device().prepare().unwrap();
        log.start().unwrap();
        device().go().unwrap();
        net.host_sends(number);
        let (slot, packet) = until("the packet", || guest.take());
        assert_eq!(number_in(&packet), Some(number));
        device().stop().unwrap();
        let seen = fetch(&mut log, &ram);
        for page in [Guest::page(slot, false), guest.to.used_page()] {
            assert!(seen.contains(&page), "{page} of {seen:?}");
        }
        guest.offer(slot);

        device().prepare().unwrap();
        log.stop().unwrap();
        device().go().unwrap();
        net.host_sends(number);
        let (slot, packet) = until("the packet without log", || guest.take());
        assert_eq!(number_in(&packet), Some(number));
        guest.offer(slot);
        device().stop().unwrap();
    }
}
