//! The states of a device under VFIO's migration protocol, version 2, and the ways between them. Arithmetic only.
//!
//! ```text
//! RUNNING  <----> RUNNING_P2P  <----> STOP <----> RESUMING
//!    ^                 ^               ^
//!    v                 v               v
//! PRE_COPY <----> PRE_COPY_P2P ---> STOP_COPY
//! ```
//!
//! States in the lower row share a stream that is read; RESUMING has one that is written. The kernel goes any other way as a combination
//! of these arcs: the shortest, and never through a state with a stream, unless both ends are in the lower row and the stream stays the
//! same. From STOP_COPY there is no way back to PRE_COPY, and it must not be asked for: Linux 6.12 looks for it without end. A device
//! that lacks the P2P states, or PRE_COPY, goes the same ways and leaves them out. ERROR is left by a reset only.
//!
//! Leaving RESUMING makes the device check what it was given. That is why a target must go RESUMING -> STOP before it says that it is
//! ready: on the way RESUMING -> RUNNING the same check would come too late.

use std::fmt;

/// State of a device. The numbers are the kernel's.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum DeviceState {
    /// It failed a transition and must be reset.
    Error = 0,
    /// It does nothing, and does not change.
    Stop = 1,
    /// It works.
    Running = 2,
    /// As [`Stop`](Self::Stop); its state can be read to the end.
    StopCopy = 3,
    /// It does nothing; a state can be written.
    Resuming = 4,
    /// It works, but begins no access to other devices.
    RunningP2p = 5,
    /// It works; its state can be read while it changes.
    PreCopy = 6,
    /// Both of the last two.
    PreCopyP2p = 7,
}

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

impl DeviceState {
    /// Every state, in the order of the numbers.
    pub const ALL: [Self; 8] = [
        Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p,
    ];

    /// The state with the kernel's number `number`; `None` for one that this build does not know.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.number() == number)
    }

    /// The kernel's number.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// Whether the state of the device is read in it: these share one stream.
    pub fn is_saving(self) -> bool {
        matches!(self, PreCopy | PreCopyP2p | StopCopy)
    }

    /// Whether the device may change by itself, raise interrupts or write memory.
    pub fn is_active(self) -> bool {
        matches!(self, Running | RunningP2p | PreCopy | PreCopyP2p)
    }

    /// The state in which the device is as active, and begins no access to other devices; `None` if it is in such a state, or does not
    /// have one.
    pub fn quieter(self, support: Support) -> Option<Self> {
        let quieter = match self {
            Running => RunningP2p,
            PreCopy => PreCopyP2p,
            _ => return None,
        };
        support.has(quieter).then_some(quieter)
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error => "ERROR",
            Stop => "STOP",
            Running => "RUNNING",
            StopCopy => "STOP_COPY",
            Resuming => "RESUMING",
            RunningP2p => "RUNNING_P2P",
            PreCopy => "PRE_COPY",
            PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// Which parts of the protocol a device has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Support {
    /// STOP_COPY and RESUMING: it can migrate.
    pub stop_copy: bool,
    /// RUNNING_P2P, and PRE_COPY_P2P if there is PRE_COPY: several such devices can migrate together.
    pub p2p: bool,
    /// PRE_COPY: part of its state can be sent while it works.
    pub pre_copy: bool,
}

impl Support {
    /// From the flags of VFIO_DEVICE_FEATURE_MIGRATION. Flags that are not known are left out.
    pub fn from_flags(flags: u64) -> Self {
        Self {
            stop_copy: flags & 1 != 0,
            p2p: flags & 2 != 0,
            pre_copy: flags & 4 != 0,
        }
    }

    /// Whether a device with this support has `state`.
    pub fn has(self, state: DeviceState) -> bool {
        match state {
            Error => true,
            Stop | Running | StopCopy | Resuming => self.stop_copy,
            RunningP2p => self.stop_copy && self.p2p,
            PreCopy => self.stop_copy && self.pre_copy,
            PreCopyP2p => self.stop_copy && self.p2p && self.pre_copy,
        }
    }
}

/// The arcs that a device with everything goes in one step.
const ARCS: [(DeviceState, DeviceState); 15] = [
    (Running, RunningP2p),
    (RunningP2p, Running),
    (RunningP2p, Stop),
    (Stop, RunningP2p),
    (Stop, StopCopy),
    (StopCopy, Stop),
    (Stop, Resuming),
    (Resuming, Stop),
    (Running, PreCopy),
    (PreCopy, Running),
    (RunningP2p, PreCopyP2p),
    (PreCopyP2p, RunningP2p),
    (PreCopy, PreCopyP2p),
    (PreCopyP2p, PreCopy),
    (PreCopyP2p, StopCopy),
];

/// The steps of the way from `from` to `to`, without `from`: what the kernel does when it is asked for `to`, and what states may be
/// found if it fails half-way. Empty if they are the same.
///
/// `None` if there is no way, or if the device lacks one of the two states. No way leads to ERROR, or from it.
pub fn path(support: Support, from: DeviceState, to: DeviceState) -> Option<Vec<DeviceState>> {
    if !support.has(from) || !support.has(to) || from == Error || to == Error {
        return None;
    }
    // A device that lacks states passes them by: it goes from the state before to the one after.
    let mut steps = full_path(from, to)?;
    steps.retain(|state| support.has(*state));
    Some(steps)
}

/// The same for a device with everything: a breadth-first search.
fn full_path(from: DeviceState, to: DeviceState) -> Option<Vec<DeviceState>> {
    let same_stream = from.is_saving() && to.is_saving();
    let may_pass = |state: DeviceState| {
        if same_stream {
            state.is_saving()
        } else {
            !state.is_saving() && state != Resuming
        }
    };
    let mut paths = vec![vec![from]];
    let mut at = 0;
    while let Some(path) = paths.get(at).cloned() {
        at += 1;
        let last = path[path.len() - 1];
        if last == to {
            return Some(path[1..].to_vec());
        }
        for (_, next) in ARCS.iter().filter(|(start, _)| *start == last) {
            // STOP_COPY -> STOP would end the stream that both ends share.
            if !path.contains(next) && (*next == to || may_pass(*next)) {
                let mut longer = path.clone();
                longer.push(*next);
                paths.push(longer);
            }
        }
    }
    None
}

/// Whether the kernel answers the way from `from` to `to` with a new stream.
pub fn opens_stream(from: DeviceState, to: DeviceState) -> bool {
    match to {
        Resuming => from != Resuming,
        _ => to.is_saving() && !from.is_saving(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Support = Support {
        stop_copy: true,
        p2p: true,
        pre_copy: true,
    };

    /// The first step of every way, as the kernel's documentation of the state machine has it. Rows and columns in the order of the
    /// kernel's numbers.
    #[rustfmt::skip]
    const FIRST_STEPS: [[Option<DeviceState>; 8]; 8] = {
        const X: Option<DeviceState> = None;
        const S: Option<DeviceState> = Some(Stop);
        const R: Option<DeviceState> = Some(Running);
        const C: Option<DeviceState> = Some(StopCopy);
        const L: Option<DeviceState> = Some(Resuming);
        const Q: Option<DeviceState> = Some(RunningP2p);
        const P: Option<DeviceState> = Some(PreCopy);
        const B: Option<DeviceState> = Some(PreCopyP2p);
        [
            // ERROR STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P
            [X, X, X, X, X, X, X, X], // from ERROR
            [X, S, Q, C, L, Q, Q, Q], // from STOP
            [X, Q, R, Q, Q, Q, P, Q], // from RUNNING
            [X, S, S, C, S, S, X, X], // from STOP_COPY
            [X, S, S, S, L, S, S, S], // from RESUMING
            [X, S, R, S, S, Q, R, B], // from RUNNING_P2P
            [X, R, R, B, R, R, P, B], // from PRE_COPY
            [X, Q, Q, C, Q, Q, P, B], // from PRE_COPY_P2P
        ]
    };

    fn all_supports() -> impl Iterator<Item = Support> {
        (0..8).map(Support::from_flags)
    }

    fn pairs() -> impl Iterator<Item = (DeviceState, DeviceState)> {
        DeviceState::ALL
            .into_iter()
            .flat_map(|from| DeviceState::ALL.map(|to| (from, to)))
    }

    fn first_step(from: DeviceState, to: DeviceState) -> Option<DeviceState> {
        FIRST_STEPS[from as usize][to as usize]
    }

    #[test]
    fn numbers_and_states_belong_together() {
        for state in DeviceState::ALL {
            assert_eq!(DeviceState::from_number(state.number()), Some(state));
        }
        assert_eq!(DeviceState::from_number(8), None);
        assert_eq!(DeviceState::from_number(u32::MAX), None);
    }

    #[test]
    fn every_way_begins_as_the_kernel_begins_it() {
        for (from, to) in pairs() {
            let found = path(FULL, from, to);
            if from == to && from != Error {
                assert_eq!(found, Some(Vec::new()), "{from} -> {to}");
                continue;
            }
            let first = found.map(|steps| steps[0]);
            assert_eq!(first, first_step(from, to), "{from} -> {to}");
        }
    }

    #[test]
    fn a_way_is_made_of_single_arcs_and_what_is_left_of_it_is_the_way_of_the_rest() {
        for (from, to) in pairs() {
            let Some(steps) = path(FULL, from, to) else {
                continue;
            };
            let mut at = from;
            for (index, step) in steps.iter().enumerate() {
                assert!(
                    ARCS.contains(&(at, *step)),
                    "{from} -> {to}: {at} -> {step}"
                );
                assert_eq!(path(FULL, *step, to).unwrap(), steps[index + 1..]);
                at = *step;
            }
            assert_eq!(at, to);
        }
    }

    #[test]
    fn no_way_passes_through_a_state_with_a_stream_unless_the_stream_stays() {
        for (from, to) in pairs() {
            for step in path(FULL, from, to)
                .iter()
                .flat_map(|steps| steps.split_last())
            {
                for passed in step.1 {
                    assert_ne!(*passed, Resuming, "{from} -> {to}");
                    if passed.is_saving() {
                        assert!(from.is_saving() && to.is_saving(), "{from} -> {to}");
                    }
                }
            }
        }
    }

    /// The kernel steps over what a device lacks, one first step after the other.
    #[test]
    fn a_device_that_lacks_states_goes_the_same_ways_without_them() {
        for support in all_supports() {
            for (from, to) in pairs() {
                let mut expected = Vec::new();
                let mut at = from;
                let mut possible = support.has(from) && support.has(to) && from != Error;
                while possible && at != to {
                    match first_step(at, to) {
                        Some(step) => at = step,
                        None => possible = false,
                    }
                    if support.has(at) {
                        expected.push(at);
                    }
                }
                let expected = (possible && to != Error).then_some(expected);
                assert_eq!(
                    path(support, from, to),
                    expected,
                    "{support:?}: {from} -> {to}"
                );
            }
        }
    }

    #[test]
    fn a_stream_is_opened_by_entering_a_state_that_has_one_from_outside() {
        for (from, to) in pairs() {
            let Some(steps) = path(FULL, from, to) else {
                continue;
            };
            let last_but_one = steps.iter().rev().nth(1).copied().unwrap_or(from);
            let enters = match (last_but_one, to) {
                _ if from == to => false,
                (Stop, Resuming | StopCopy) | (Running, PreCopy) | (RunningP2p, PreCopyP2p) => true,
                _ => false,
            };
            assert_eq!(opens_stream(from, to), enters, "{from} -> {to}");
        }
    }

    #[test]
    fn every_active_state_has_a_quieter_one_where_the_device_supports_it() {
        for support in all_supports() {
            for state in DeviceState::ALL {
                let expected = match state {
                    Running if support.stop_copy && support.p2p => Some(RunningP2p),
                    PreCopy if support.stop_copy && support.p2p && support.pre_copy => {
                        Some(PreCopyP2p)
                    }
                    _ => None,
                };
                assert_eq!(state.quieter(support), expected, "{support:?}: {state}");
            }
        }
    }

    #[test]
    fn a_stop_passes_p2p_on_its_way_for_every_device_that_has_it() {
        for support in all_supports().filter(|support| support.stop_copy && support.p2p) {
            for from in [Running, PreCopy]
                .into_iter()
                .filter(|from| support.has(*from))
            {
                let quieter = from.quieter(support).unwrap();
                assert_eq!(path(support, from, StopCopy).unwrap()[0], quieter);
            }
            assert_eq!(path(support, Stop, Running).unwrap(), [RunningP2p, Running]);
        }
    }
}
