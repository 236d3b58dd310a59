//! I2: what a guest says on its serial port while it changes its process.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::cli::vmferry;
use crate::harness::{Accel, Launch, Machine, turn, until};
use crate::line::Line;
use crate::qmp::Qmp;

on_both_accelerators!(
    what_a_guest_says_to_a_file_is_neither_lost_nor_doubled_though_nobody_reads,
    what_a_guest_says_on_standard_output_is_neither_lost_nor_doubled_though_nobody_reads,
);

fn machine(accel: Accel) -> Machine {
    // Some hundred digits per second: what waits has room for a minute of them.
    Machine {
        working_set: "64K",
        fill: "1M",
        ..Machine::small(accel)
    }
}

fn what_a_guest_says_to_a_file_is_neither_lost_nor_doubled_though_nobody_reads(accel: Accel) {
    let folder = tempfile::tempdir().unwrap();
    let line = Line::new(folder.path());
    let launch = Launch::default().with(&["--serial", line.path()]);
    goes_on(accel, launch, line);
}

fn what_a_guest_says_on_standard_output_is_neither_lost_nor_doubled_though_nobody_reads(
    accel: Accel,
) {
    let folder = tempfile::tempdir().unwrap();
    let line = Line::new(folder.path());
    let shell = format!("exec \"$0\" \"$@\" >{}", line.path());
    let launch = Launch::default()
        .through(&["sh", "-c", &shell])
        .with(&["--serial", "stdio"]);
    goes_on(accel, launch, line);
}

fn passes(qmp: &Path) -> u64 {
    let mut qmp = until("somebody answers", || Qmp::connect(qmp));
    let workload = qmp.execute("x-query-workload", json!({})).unwrap();
    assert_eq!(workload["errors"], 0, "{workload}");
    workload["passes"].as_u64().unwrap()
}

/// The process that has the guest. Dropping it kills it.
struct Killed(Option<Pid>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // Fails if it has ended.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn goes_on(accel: Accel, launch: Launch, mut line: Line) {
    let _turn = turn();
    let vm = machine(accel).start_source(launch.with(&["--workload-serial"]));
    let qmp = vm.qmp_path();
    line.hear_more(20);
    // Whoever opens it again finds nothing.
    line.remove();
    let mut last = Killed(None);
    for mode in ["transfer", "exec"] {
        line.fill();
        let full = passes(&qmp);
        let output = vmferry(&qmp, &["upgrade", "--json", "--mode", mode]);
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let new = Pid::from_raw(i32::try_from(report["new-pid"].as_i64().unwrap()).unwrap());
        last.0 = new;
        until("the guest says more that nobody reads", || {
            (passes(&qmp) > full + 20).then_some(())
        });
        line.hear_more(20);
    }
}
