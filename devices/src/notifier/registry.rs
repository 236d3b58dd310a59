//! Who is told, and who was told.
//!
//! A [`Told`] shares ownership of the notifiers that it is about, so neither unregistering nor dropping the registry can keep one from
//! hearing the end of its attempt. No lock of the registry is held while a notifier runs; it may register and unregister others.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_transport::units::MigrationId;

use super::{Mode, Modes, Notifier, Priority, Setup};
use crate::DeviceError;

/// All notifiers of a VM. Clones are handles of the same registry.
#[derive(Clone, Debug, Default)]
pub struct Notifiers(Arc<Mutex<Registry>>);

/// Names a registered notifier. Never used again for another one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NotifierId(u64);

#[derive(Debug, Default)]
struct Registry {
    registered: u64,
    /// In the order of SETUP.
    members: Vec<Member>,
    /// Between a SETUP and the end of its attempt.
    under_way: bool,
    /// Saw SETUP in an attempt whose `Told` was dropped.
    owed: Vec<Arc<Slot>>,
}

#[derive(Clone, Debug)]
struct Member {
    id: NotifierId,
    priority: Priority,
    modes: Modes,
    slot: Arc<Slot>,
}

struct Slot {
    name: String,
    notifier: Mutex<Box<dyn Notifier>>,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Who was told SETUP and must hear how the attempt ends.
///
/// Dropping it tells nobody anything: only the owner knows where the guest is. That is a bug of the owner; it is logged, panics in
/// debug builds, and those who were told hear FAILED at the latest before the next SETUP.
#[derive(Debug)]
#[must_use = "those who were told SETUP must hear DONE or FAILED"]
pub struct Told {
    slots: Vec<Arc<Slot>>,
    /// None once the attempt has ended.
    registry: Option<Arc<Mutex<Registry>>>,
}

/// The migration must not take place.
#[derive(Debug)]
#[must_use = "those who were told SETUP must hear FAILED"]
pub struct Vetoed {
    /// Who objects, and why.
    pub error: DeviceError,
    /// Who was told SETUP, the one that objects included.
    pub told: Told,
}

impl Notifiers {
    /// A registry without notifiers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `notifier`, which is to hear of migrations of `modes`, from the next attempt on.
    pub fn register(
        &self,
        modes: impl Into<Modes>,
        priority: Priority,
        notifier: Box<dyn Notifier>,
    ) -> NotifierId {
        let mut registry = lock(&self.0);
        registry.registered += 1;
        let id = NotifierId(registry.registered);
        let at = registry
            .members
            .partition_point(|member| member.priority <= priority);
        let slot = Arc::new(Slot {
            name: notifier.name().to_owned(),
            notifier: Mutex::new(notifier),
        });
        registry.members.insert(
            at,
            Member {
                id,
                priority,
                modes: modes.into(),
                slot,
            },
        );
        id
    }

    /// Removes a notifier. If it has seen SETUP, it is dropped only after it has heard how the attempt ends. False if it was removed
    /// before.
    pub fn unregister(&self, id: NotifierId) -> bool {
        let mut registry = lock(&self.0);
        let at = registry.members.iter().position(|member| member.id == id);
        let removed = at.map(|at| registry.members.remove(at));
        // Its drop must not run under our lock.
        drop(registry);
        removed.is_some()
    }

    /// Names of all registered notifiers, in the order of SETUP.
    pub fn names(&self) -> Vec<String> {
        let registry = lock(&self.0);
        let names = registry
            .members
            .iter()
            .map(|member| member.slot.name.clone());
        names.collect()
    }

    /// SETUP: tells everybody who listens to `setup.mode`, until somebody objects.
    ///
    /// # Errors
    /// The objection, and who must hear FAILED. Also while an attempt is under way: then nobody was told.
    pub fn setup(&self, setup: &Setup) -> Result<Told, Vetoed> {
        let mut told = Told {
            slots: Vec::new(),
            registry: None,
        };
        let (chosen, owed) = {
            let mut registry = lock(&self.0);
            if registry.under_way {
                let error = DeviceError::Vetoed {
                    device: "notifiers".to_owned(),
                    reason: "they have not heard the end of the attempt before".to_owned(),
                };
                return Err(Vetoed { error, told });
            }
            registry.under_way = true;
            told.registry = Some(Arc::clone(&self.0));
            let wants = |member: &&Member| member.modes.contains(setup.mode);
            let chosen: Vec<Member> = registry.members.iter().filter(wants).cloned().collect();
            (chosen, std::mem::take(&mut registry.owed))
        };
        for slot in owed.iter().rev() {
            slot.tell("FAILED", |notifier| notifier.failed());
        }
        for member in chosen {
            // An earlier notifier may have unregistered it meanwhile.
            if !self.has(member.id) {
                continue;
            }
            told.slots.push(Arc::clone(&member.slot));
            let answer = member
                .slot
                .call("SETUP", |notifier| notifier.setup(setup))
                .and_then(|answer| answer);
            if let Err(error) = answer {
                return Err(Vetoed { error, told });
            }
        }
        Ok(told)
    }

    /// The first device that the guest still has to let go of before the migration may go on; `None` when nobody waits any more. May be
    /// called from another thread than the rest.
    ///
    /// # Errors
    /// Waiting is in vain. The caller owes [`failed`](Self::failed).
    pub fn pending(&self, told: &Told) -> Result<Option<String>, DeviceError> {
        for slot in &told.slots {
            let pending = slot.call("a question", |notifier| notifier.pending())?;
            if let Some(what) = pending? {
                return Ok(Some(what));
            }
        }
        Ok(None)
    }

    /// DONE: the target runs the guest.
    pub fn done(&self, mut told: Told) {
        for slot in std::mem::take(&mut told.slots) {
            slot.tell("DONE", |notifier| notifier.done());
        }
    }

    /// FAILED: the guest stays here. To be called before any vCPU runs again.
    pub fn failed(&self, mut told: Told) {
        for slot in std::mem::take(&mut told.slots).iter().rev() {
            slot.tell("FAILED", |notifier| notifier.failed());
        }
    }

    /// The process ends while nobody knows where the guest runs: nobody is told anything.
    pub fn abandon(&self, mut told: Told) {
        let slots = std::mem::take(&mut told.slots);
        tracing::warn!(
            notifiers = ?slots,
            "this process ends without knowing where the guest runs; the notifiers are not told"
        );
    }

    /// INCOMING_FAILED: tells everybody who listens to `mode`, in the order of FAILED. At the target, before the source can learn that
    /// `migration` failed.
    pub fn incoming_failed(&self, mode: Mode, migration: MigrationId) {
        let members = lock(&self.0).members.clone();
        for member in members.iter().rev() {
            if member.modes.contains(mode) && self.has(member.id) {
                member.slot.tell("INCOMING_FAILED", |notifier| {
                    notifier.incoming_failed(migration);
                });
            }
        }
    }

    /// The end of a migration of mode cpr-exec that the program before has begun, see [`Notifier::after_exec`]: DONE in the order of DONE,
    /// FAILED in that of FAILED.
    pub fn after_exec(&self, migration: MigrationId, done: bool) {
        let mut members = lock(&self.0).members.clone();
        if !done {
            members.reverse();
        }
        let event = if done { "DONE" } else { "FAILED" };
        for member in members {
            if member.modes.contains(Mode::CprExec) && self.has(member.id) {
                member.slot.tell(event, |notifier| {
                    notifier.after_exec(migration, done);
                });
            }
        }
    }

    fn has(&self, id: NotifierId) -> bool {
        lock(&self.0).members.iter().any(|member| member.id == id)
    }
}

impl Slot {
    /// Calls the notifier. A panic of it must not take the others' news away, nor the engine's thread.
    fn call<T>(
        &self,
        event: &str,
        call: impl FnOnce(&mut dyn Notifier) -> T,
    ) -> Result<T, DeviceError> {
        let mut notifier = lock(&self.notifier);
        catch_unwind(AssertUnwindSafe(|| call(&mut **notifier)))
            .map_err(|panic| DeviceError::panicked(&self.name, event, &*panic))
    }

    /// Calls the notifier for an event that it cannot answer.
    fn tell(&self, event: &str, call: impl FnOnce(&mut dyn Notifier)) {
        if let Err(error) = self.call(event, call) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a notifier is broken; the others hear {event} all the same"
            );
        }
    }
}

impl Told {
    /// Names of those who were told, in that order.
    pub fn names(&self) -> Vec<&str> {
        self.slots.iter().map(|slot| slot.name.as_str()).collect()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let Some(registry) = self.registry.take() else {
            return;
        };
        let owed = std::mem::take(&mut self.slots);
        let forgotten = !owed.is_empty();
        if forgotten {
            tracing::error!(notifiers = ?owed, "nobody told these notifiers how the migration ended");
        }
        let mut registry = lock(&registry);
        registry.under_way = false;
        registry.owed.extend(owed);
        drop(registry);
        debug_assert!(
            !forgotten || std::thread::panicking(),
            "a Told was dropped instead of being told DONE or FAILED"
        );
    }
}

/// Nothing half-made can be behind these locks: the registry's changes are single steps, and a panic of a notifier is caught inside.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
