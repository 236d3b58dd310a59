//! What Ctrl-C and other signals mean for somebody who follows a migration. Decides; the follower acts.

use std::io::{self, IsTerminal};

use clap::ValueEnum;

use crate::cli::signals::Signal;

/// What Ctrl-C does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(in crate::cli) enum OnInterrupt {
    /// Ask; without a terminal to ask at, detach
    Ask,
    /// Cancel the migration and wait for its end; a second Ctrl-C detaches
    Cancel,
    /// Stop following; the migration goes on
    Detach,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Decision {
    /// Nothing: go on following.
    Watch,
    /// Show [`QUESTION`], or the one with a third choice.
    Ask,
    /// Withdraw the question and go on following.
    Withdraw,
    /// Tell the VM to cancel, and go on following.
    Cancel,
    /// Tell the VM to switch over, and go on following.
    Continue,
    /// Stop following, because of this signal.
    Detach(u8),
}

const QUESTION: &str = "[c]ancel the migration, [d]etach, or Enter to keep watching? ";
const QUESTION_AT_SWITCHOVER: &str =
    "[s]witch over, [c]ancel, [d]etach, or Enter to keep watching? ";

/// Follows what the operator has said so far.
#[derive(Debug)]
pub(super) struct Interrupts {
    manner: OnInterrupt,
    can_ask: bool,
    asking: bool,
    cancelled: bool,
}

impl Interrupts {
    pub(super) fn new(manner: OnInterrupt) -> Self {
        Self {
            manner,
            can_ask: io::stdin().is_terminal() && io::stderr().is_terminal(),
            asking: false,
            cancelled: false,
        }
    }

    /// A question is open.
    pub(super) fn is_asking(&self) -> bool {
        self.asking
    }

    /// The words for [`Decision::Ask`].
    pub(super) fn question(&self, may_continue: bool) -> &'static str {
        if may_continue {
            QUESTION_AT_SWITCHOVER
        } else {
            QUESTION
        }
    }

    /// A signal has come.
    pub(super) fn signal(&mut self, signal: Signal) -> Decision {
        let detach = Decision::Detach(signal.number());
        match (signal, self.manner) {
            (Signal::Continue, _) => Decision::Watch,
            // Losing the one who watches must not decide about the VM.
            (Signal::Terminate | Signal::HangUp, _) | (_, OnInterrupt::Detach) => detach,
            (Signal::Interrupt, OnInterrupt::Cancel) if !self.cancelled => self.cancel(),
            (Signal::Interrupt, OnInterrupt::Ask) if self.can_ask && !self.asking => {
                self.asking = true;
                Decision::Ask
            }
            (Signal::Interrupt, _) => detach,
        }
    }

    /// A line was typed while asking; an empty one at the end of input.
    pub(super) fn answer(&mut self, line: &str, may_continue: bool) -> Decision {
        self.asking = false;
        match line.trim().to_ascii_lowercase().as_str() {
            "" => Decision::Withdraw,
            "c" | "cancel" => self.cancel(),
            "d" | "detach" => Decision::Detach(Signal::Interrupt.number()),
            "s" | "switch" | "switch over" | "continue" if may_continue => Decision::Continue,
            _ => {
                self.asking = true;
                Decision::Ask
            }
        }
    }

    /// The question has no point any more.
    pub(super) fn withdraw(&mut self) {
        self.asking = false;
    }

    fn cancel(&mut self) -> Decision {
        self.cancelled = true;
        Decision::Cancel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_terminal(manner: OnInterrupt) -> Interrupts {
        Interrupts {
            can_ask: true,
            ..Interrupts::new(manner)
        }
    }

    fn without_terminal(manner: OnInterrupt) -> Interrupts {
        Interrupts {
            can_ask: false,
            ..Interrupts::new(manner)
        }
    }

    #[test]
    fn the_first_ctrl_c_asks_and_the_second_detaches() {
        let mut at = at_terminal(OnInterrupt::Ask);
        assert_eq!(at.signal(Signal::Interrupt), Decision::Ask);
        assert_eq!(at.signal(Signal::Interrupt), Decision::Detach(2));
    }

    #[test]
    fn every_answer_is_understood_or_asked_for_again() {
        let answer = |line, may_continue| {
            let mut at = at_terminal(OnInterrupt::Ask);
            at.signal(Signal::Interrupt);
            let decision = at.answer(line, may_continue);
            assert_eq!(at.is_asking(), decision == Decision::Ask, "{line:?}");
            decision
        };
        assert_eq!(answer("c\n", false), Decision::Cancel);
        assert_eq!(answer("Cancel\n", false), Decision::Cancel);
        assert_eq!(answer("d\n", false), Decision::Detach(2));
        assert_eq!(answer("\n", false), Decision::Withdraw);
        assert_eq!(answer("", false), Decision::Withdraw);
        assert_eq!(answer("yes\n", false), Decision::Ask);
        assert_eq!(answer("s\n", false), Decision::Ask);
        assert_eq!(answer("s\n", true), Decision::Continue);
    }

    #[test]
    fn a_watcher_that_is_lost_decides_nothing() {
        for manner in [OnInterrupt::Ask, OnInterrupt::Cancel, OnInterrupt::Detach] {
            for mut at in [at_terminal(manner), without_terminal(manner)] {
                assert_eq!(at.signal(Signal::Continue), Decision::Watch);
                assert_eq!(at.signal(Signal::Terminate), Decision::Detach(15));
                assert_eq!(at.signal(Signal::HangUp), Decision::Detach(1));
            }
        }
        let mut at = without_terminal(OnInterrupt::Ask);
        assert_eq!(at.signal(Signal::Interrupt), Decision::Detach(2));
    }

    #[test]
    fn who_asked_for_a_cancel_gets_it_once() {
        let mut at = without_terminal(OnInterrupt::Cancel);
        assert_eq!(at.signal(Signal::Interrupt), Decision::Cancel);
        assert_eq!(at.signal(Signal::Interrupt), Decision::Detach(2));
    }
}
