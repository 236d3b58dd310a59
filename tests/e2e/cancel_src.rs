//! `migrate_cancel` at the source in each status, again and again: what it does is what QEMU's tests
//! `/migration/cancel/src/after/STATUS` demand, whose names are those of the cases, and the statuses that are missing there. After each
//! cancel a migration to a fresh target works at once.

use std::thread;

use serde_json::{Value, json};
use vmferry_transport::wire::frame::TargetFrame;

use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::listener::Listener;
use crate::proxy::{Passing, Proxy, Verdict};
use crate::qmp::Qmp;

on_both_accelerators!(
    cancel_src_after_none,
    cancel_src_after_setup,
    cancel_src_after_wait_unplug,
    cancel_src_after_active,
    cancel_src_after_pre_switchover,
    cancel_src_after_device,
    cancel_src_after_cancelling,
    cancel_src_after_cancelled,
    cancel_src_after_failing,
    cancel_src_after_failed,
    cancel_src_after_completed,
);

/// In each status, in a row.
const TIMES: u32 = 10;
/// Tries in which a status that does not last was over before the cancel, until that is a failure of the test.
const MISSED_MAX: u32 = 50;
/// A device that the guest must let go of before it can migrate.
const PRIMARY: &str = "net0";

/// A VM and who hears of its migrations.
struct Side {
    vm: Vm,
    listener: Listener,
}

/// A source in the status, on its way to a target.
struct Scene<'a> {
    source: &'a mut Side,
    target: &'a mut Side,
    link: Option<Proxy>,
}

fn machine(accel: Accel) -> Machine {
    Machine {
        mem: "16M",
        working_set: "1M",
        dirty_rate: "5000",
        fill: "2M",
        ..Machine::small(accel)
    }
}

impl Side {
    fn start(start: impl FnOnce(Launch) -> Vm) -> Self {
        let listener = Listener::new();
        let vm = start(listener.attend(Launch::default()));
        listener.knows(&vm);
        Self { vm, listener }
    }

    fn target(machine: &Machine, launch: &Launch) -> Self {
        Self::start(|more| {
            let more = more.with(&launch.words());
            machine.start_target("tcp:127.0.0.1:0", more)
        })
    }
}

impl Scene<'_> {
    /// Through a link with this hook.
    fn migrate_through(&mut self, hook: impl FnMut(&Passing<'_>) -> Verdict + Send + 'static) {
        let link = Proxy::new(&self.target.vm.address(), hook);
        self.source.vm.migrate(&link.address());
        self.link = Some(link);
    }

    fn migrate(&mut self) {
        let address = self.target.vm.address();
        self.source.vm.migrate(&address);
    }

    /// Pages move, and do so for ever.
    fn stay_active(&mut self) {
        self.source.vm.set(json!({ "downtime-limit": 0 }));
        self.migrate();
        self.source.vm.wait_status("active");
    }

    fn set_capability(&mut self, name: &str, on: bool) {
        let capability = json!({ "capability": name, "state": on });
        let capabilities = json!({ "capabilities": [capability] });
        self.source
            .vm
            .execute("migrate-set-capabilities", capabilities);
    }
}

/// What a cancel is to do.
struct Case {
    status: &'static str,
    /// The status at the end.
    ends: &'static str,
    launch: Launch,
    /// Brings a migration into the status.
    bring: fn(&mut Scene<'_>),
}

impl Case {
    fn new(status: &'static str, ends: &'static str, bring: fn(&mut Scene<'_>)) -> Self {
        Self {
            status,
            ends,
            launch: Launch::default(),
            bring,
        }
    }

    fn run(self, accel: Accel) {
        let machine = machine(accel);
        let mut source = self.source(&machine);
        let (mut times, mut missed) = (0, 0);
        while times < TIMES {
            let mut target = Side::target(&machine, &self.launch);
            let seen = self.cancel(&mut source, &mut target);
            if seen {
                times += 1;
            } else {
                missed += 1;
                assert!(missed < MISSED_MAX, "{} is always over", self.status);
            }
            source = self.move_on(&machine, source, target);
            if self.status == "none" {
                // A VM that a guest has come to has a status.
                source = self.source(&machine);
            }
        }
    }

    fn source(&self, machine: &Machine) -> Side {
        let mut source =
            Side::start(|launch| machine.start_source(launch.with(&self.launch.words())));
        source.vm.warm_up();
        source
    }

    /// Cancels once. Returns whether the status was still there.
    fn cancel(&self, source: &mut Side, target: &mut Side) -> bool {
        let mut scene = Scene {
            source,
            target,
            link: None,
        };
        (self.bring)(&mut scene);
        let link = scene.link.take();
        assert!(self.is_passing() || source.vm.status() == self.status);
        source.vm.query("migrate_cancel");
        let seen = !self.is_passing() || source.vm.status() == self.status;
        source.listener.let_go();
        if self.status == "none" {
            assert_eq!(source.vm.status(), "none");
        } else {
            let info = source.vm.wait_migration();
            assert_eq!(info["status"], self.ends, "{info}");
        }
        // Once more changes nothing.
        source.vm.query("migrate_cancel");
        let ended = source.vm.status();
        assert_eq!(ended, self.ends);
        let statuses = source.vm.statuses();
        let cancels = statuses
            .iter()
            .filter(|status| *status == "cancelling")
            .count();
        assert_eq!(cancels, usize::from(ended == "cancelled"), "{statuses:?}");
        source.listener.assert_order("source");
        if ended != "completed" {
            source.vm.assert_guest_works();
        }
        drop(link);
        seen
    }

    /// Whether the status ends by itself.
    fn is_passing(&self) -> bool {
        ["cancelling", "failing"].contains(&self.status)
    }

    /// To a fresh target, unless the guest has moved already.
    fn move_on(&self, machine: &Machine, mut source: Side, mut target: Side) -> Side {
        if self.ends == "completed" {
            target.vm.assert_guest_works();
            source.vm.assert_guest_stopped();
            return target;
        }
        match target.vm.status_if_it_lives() {
            // Nobody has spoken to it.
            Some(status) if status == "none" => {}
            _ => {
                // Only a killed one says nothing.
                if self.status != "failing" {
                    target.vm.assert_gave_up("incoming migration failed");
                }
                target = Side::target(machine, &self.launch);
            }
        }
        let capability = json!({ "capability": "pause-before-switchover", "state": false });
        source.vm.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": [capability] }),
        );
        source.vm.set(json!({ "downtime-limit": 300 }));
        let lets_go = (self.status == "wait-unplug").then(|| let_go(&source.vm));
        source.vm.move_to(&mut target.vm);
        if let Some(lets_go) = lets_go {
            lets_go.join().unwrap();
        }
        target
    }
}

/// The guest lets go of its device when it is asked to.
fn let_go(vm: &Vm) -> thread::JoinHandle<()> {
    let mut qmp = Qmp::connect(&vm.qmp_path()).unwrap();
    thread::spawn(move || {
        qmp.event(|event| event["event"] == "UNPLUG_PRIMARY");
        let id = json!({ "id": PRIMARY });
        assert_eq!(qmp.execute("x-confirm-unplug", id), Ok(json!({})));
    })
}

fn cancel_src_after_none(accel: Accel) {
    Case::new("none", "none", |_| {}).run(accel);
}

fn cancel_src_after_setup(accel: Accel) {
    Case::new("setup", "cancelled", |scene| {
        scene.migrate_through(|passing| match passing {
            Passing::Target(TargetFrame::HelloReply(_)) => Verdict::Drop,
            _ => Verdict::Pass,
        });
        let target = &mut scene.target.vm;
        until("the target sets up", || {
            (target.status() == "setup").then_some(())
        });
    })
    .run(accel);
}

fn cancel_src_after_wait_unplug(accel: Accel) {
    let case = Case::new("wait-unplug", "cancelled", |scene| {
        scene.migrate();
        scene.source.vm.wait_status("wait-unplug");
    });
    let launch = Launch::default().with(&["--x-failover-primary", PRIMARY]);
    Case { launch, ..case }.run(accel);
}

fn cancel_src_after_active(accel: Accel) {
    Case::new("active", "cancelled", |scene| scene.stay_active()).run(accel);
}

fn cancel_src_after_pre_switchover(accel: Accel) {
    Case::new("pre-switchover", "cancelled", |scene| {
        scene.set_capability("pause-before-switchover", true);
        scene.migrate();
        scene.source.vm.wait_status("pre-switchover");
    })
    .run(accel);
}

fn cancel_src_after_device(accel: Accel) {
    Case::new("device", "cancelled", |scene| {
        scene.migrate_through(|passing| match passing {
            Passing::Target(TargetFrame::Ready(_)) => Verdict::Drop,
            _ => Verdict::Pass,
        });
        scene.source.vm.wait_status("device");
    })
    .run(accel);
}

fn cancel_src_after_cancelling(accel: Accel) {
    Case::new("cancelling", "cancelled", |scene| {
        scene.stay_active();
        scene.source.listener.hold("failed");
        scene.source.vm.query("migrate_cancel");
        scene.source.vm.wait_status("cancelling");
    })
    .run(accel);
}

fn cancel_src_after_cancelled(accel: Accel) {
    Case::new("cancelled", "cancelled", |scene| {
        scene.stay_active();
        scene.source.vm.query("migrate_cancel");
        scene.source.vm.wait_status("cancelled");
    })
    .run(accel);
}

fn cancel_src_after_failing(accel: Accel) {
    Case::new("failing", "failed", |scene| {
        scene.stay_active();
        scene.source.listener.hold("failed");
        scene.target.vm.kill();
        scene.source.vm.wait_status("failing");
    })
    .run(accel);
}

fn cancel_src_after_failed(accel: Accel) {
    Case::new("failed", "failed", |scene| {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", nobody.local_addr().unwrap());
        drop(nobody);
        scene.source.vm.migrate(&address);
        let info: Value = scene.source.vm.wait_migration();
        assert_eq!(info["status"], "failed");
        scene.source.vm.wait_status("failed");
    })
    .run(accel);
}

fn cancel_src_after_completed(accel: Accel) {
    Case::new("completed", "completed", |scene| {
        scene.migrate();
        scene.source.vm.wait_status("completed");
    })
    .run(accel);
}
