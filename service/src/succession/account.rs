//! What the old program tells the new one of the migration so far, so that the whole can be shown: times, and how it was asked for.

use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, kill_process, waitid, waitpid};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Deserializer, Serialize};

use super::call::GUEST_RUNS;
use crate::machine::kvm::Shape;
use crate::observe::logging;
use crate::qmp::schema::BlackoutInfo;

/// The old program's account. Unknown members are of later versions, missing ones are 0.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Account {
    /// When the migration began, in microseconds of the monotonic clock, which an exec does not touch.
    pub began_us: u64,
    /// When the exec was asked for, on the same clock. What a program has spent that could not go on counts from there too.
    pub exec_us: u64,
    /// The parts of the blackout until then.
    pub blackout: BlackoutInfo,
    /// A child of this process that clears up behind the old program, and is to be waited for; 0 for none.
    pub clears_up: i32,
    /// Longest time in which the guest could not write before it was stopped, if it tells.
    pub guest_stall_us: Option<u64>,
    /// What of the machine the next program can begin at once, if it is one on KVM. It need not be true: whoever builds the machine looks
    /// whether it fits.
    #[serde(deserialize_with = "if_known")]
    pub machine: Option<Shape>,
}

/// A shape of another version is none. It must not cost the rest.
fn if_known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Shape>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

impl Account {
    /// For a letter.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Out of a letter. One that cannot be read costs figures, and must not cost the guest: it is empty then.
    pub fn decode(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|error| {
            // The log has not begun.
            logging::announce(format_args!(
                "the account of the old program cannot be read: {error}"
            ));
            Self::default()
        })
    }

    /// The whole blackout, when the new program began, had built its machine, had loaded the state, and ran the guest.
    pub fn whole(&self, times: Times) -> BlackoutInfo {
        let Times {
            began_us,
            built_us,
            loaded_us,
            running_us,
        } = times;
        let parts = BlackoutInfo {
            exec_us: began_us.saturating_sub(self.exec_us),
            build_us: built_us.saturating_sub(began_us),
            load_us: loaded_us.saturating_sub(built_us),
            resume_us: running_us.saturating_sub(loaded_us),
            ..self.blackout
        };
        let total_us = parts.parts().iter().map(|(_, us)| us).sum();
        BlackoutInfo { total_us, ..parts }
    }
}

/// The guest runs: lets the child clear up that the old program has left behind, and waits for it on a thread: it takes its time.
pub fn clear_up(child: i32) {
    let Some(pid) = Pid::from_raw(child).filter(|_| child > 0) else {
        return;
    };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    if waitid(WaitId::Pid(pid), look).is_err() {
        // A program between has waited for it. The number is somebody else's now.
        return;
    }
    // Fails if it has ended by itself.
    let _ = kill_process(pid, GUEST_RUNS);
    let wait = move || {
        // It is ours, and nobody else waits for it.
        let _ = waitpid(Some(pid), WaitOptions::empty());
    };
    if let Err(error) = std::thread::Builder::new()
        .name("vm-reap".into())
        .spawn(wait)
    {
        tracing::warn!(%error, child, "nobody waits for a child");
    }
}

/// Moments of the new program, in microseconds of the monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// It began.
    pub began_us: u64,
    /// Its machine is built.
    pub built_us: u64,
    /// The state is loaded.
    pub loaded_us: u64,
    /// The guest runs.
    pub running_us: u64,
}

/// Now, in microseconds of the monotonic clock of this host.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_survives_and_its_parts_add_up_over_both_programs() {
        let blackout = BlackoutInfo {
            total_us: 70,
            pause_us: 40,
            device_state_us: 30,
            ..BlackoutInfo::default()
        };
        let account = Account {
            began_us: 5,
            exec_us: 1000,
            blackout,
            clears_up: 0,
            guest_stall_us: Some(9),
            machine: Some(Shape {
                mem_bytes: 1 << 30,
                vcpus: 2,
                irqchip: true,
            }),
        };
        assert_eq!(Account::decode(&account.encode()), account);
        let whole = account.whole(Times {
            began_us: 1100,
            built_us: 1300,
            loaded_us: 1400,
            running_us: 1404,
        });
        assert_eq!(whole.total_us, 70 + 404);
        assert_eq!((whole.exec_us, whole.build_us), (100, 200));
        assert_eq!((whole.load_us, whole.resume_us), (100, 4));
    }

    #[test]
    fn an_account_of_another_version_is_read_as_far_as_it_goes() {
        let account = Account::decode(br#"{"began-us": 3, "later": []}"#);
        assert_eq!(account.began_us, 3);
        let of_another_shape = Account::decode(br#"{"clears-up": 5, "machine": {"vcpus": 1}}"#);
        assert_eq!(of_another_shape.clears_up, 5);
        assert_eq!(of_another_shape.machine, None);
        assert_eq!(Account::decode(b""), Account::default());
        let of_another_type = Account::decode(br#"{"began-us": "x"}"#);
        assert_eq!(of_another_type, Account::default());
    }
}
