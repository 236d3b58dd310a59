//! A guest on a tap, on a bridge: it moves to another tap, and nothing is lost but what was sent while it stood, and nothing doubled.

use serde_json::json;

use crate::harness::{Accel, Launch, Machine, turn, until};
use crate::tap::{Bridge, Echo};

on_both_accelerators!(packets_follow_a_guest_to_another_tap_and_only_those_of_the_pause_are_lost);

fn packets_follow_a_guest_to_another_tap_and_only_those_of_the_pause_are_lost(accel: Accel) {
    let _turn = turn();
    let Some(bridge) = Bridge::new(2) else {
        return;
    };
    let machine = Machine::small(accel);
    let mut source = machine.start_source(bridge.launch(Launch::default(), 0));
    source.warm_up();
    let echo = Echo::start(&bridge);
    let mut target = machine.start_target("tcp:127.0.0.1:0", bridge.launch(Launch::default(), 1));
    // Both processes are where the taps are, on one host.
    let address = target.address();
    let goes_on = |more: u64| {
        let before = echo.answers();
        until("answers", || {
            (echo.answers() >= before + more).then_some(())
        });
    };
    goes_on(50);
    echo.may_lose();
    let first = echo.sent();
    source.set(json!({ "x-verify": true }));
    source.migrate(&address);
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info} {}", target.said());
    // It announces itself, and is found at the other tap.
    until("the guest is found", || {
        (bridge.received(1) > 1).then_some(())
    });
    goes_on(5);
    let last = echo.sent();
    echo.must_answer_from(last);
    goes_on(50);
    target.assert_guest_works();
    let answers = echo.end();
    let lost: Vec<u64> = (0..)
        .zip(&answers)
        .filter(|(_, count)| **count == 0)
        .map(|(number, _)| number)
        .collect();
    println!("{} packets, lost in the pause: {lost:?}", answers.len());
    assert!(answers.iter().all(|count| *count <= 1), "{answers:?}");
    assert!(
        lost.iter().all(|number| (first..last).contains(number)),
        "{first} to {last}"
    );
    // One pause.
    assert!(
        lost.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "{lost:?}"
    );
}
