//! `vmferry upgrade` with a VM of QEMU that runs our workload: a new QEMU takes it over, memory and monitor included. What QEMU 10.2 does
//! in mode cpr-exec is shown by a monitor without a machine.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry::machine::workload::layout::{MAILBOX_GPA, mailbox};

use crate::cli::{json_of, says};
use crate::harness::{program, turn, until};
use crate::qmp::Qmp;

const QEMU: &str = "qemu-system-x86_64";
const MEM: &str = "64M";

/// A microvm with the workload. Dropping it ends it, whichever process runs it.
struct Microvm {
    old: Child,
    dir: TempDir,
}

impl Microvm {
    /// `None` where there is no QEMU that can do this; says so.
    fn start(shared: bool) -> Option<Self> {
        if !has_cpr_transfer() {
            println!("SKIPPED: no QEMU 10 here; .ci/packages installs it");
            return None;
        }
        let dir = TempDir::with_prefix("vmferry-e2e-").unwrap();
        let image = dir.path().join("workload");
        let made = program()
            .args(["workload-image", "--mem", MEM, "--working-set", "4M"])
            .args(["--dirty-rate", "max", "--output"])
            .arg(&image)
            .output()
            .unwrap();
        assert!(made.status.success());
        let machine = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,memory-backend=ram0";
        // Without it the memory of the firmware is the process's own.
        let aux = if shared { ",aux-ram-share=on" } else { "" };
        let old = Command::new(QEMU)
            .args([
                "-M",
                &format!("{machine}{aux}"),
                "-accel",
                "kvm",
                "-accel",
                "tcg",
            ])
            .args([
                "-cpu",
                "qemu64",
                "-m",
                MEM,
                "-nodefaults",
                "-display",
                "none",
            ])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=ram0,size={MEM},share=on"),
            ])
            .args([
                "-no-reboot",
                "-qmp",
                "unix:qmp,server=on,wait=off",
                "-kernel",
            ])
            .arg(&image)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let vm = Self { old, dir };
        until("the workload runs", || {
            (passes(vm.old.id().into()) > Some(2)).then_some(())
        });
        Some(vm)
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// Process `pid` runs the guest, and the workload gets on without errors.
    fn assert_works(&self, pid: u64) {
        let mut qmp = until("the monitor answers", || Qmp::connect(&self.qmp()));
        let status = qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["status"], "running");
        let before = passes(pid).unwrap();
        until("the workload goes on", || {
            (passes(pid) > Some(before + 2)).then_some(())
        });
    }
}

/// Passes of the workload over its memory in process `pid`, none of which has found an error; `None` without memory. Asks the memory and not
/// the monitor: some KVMs do not survive a boot that is interrupted.
fn passes(pid: u64) -> Option<u64> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let is_ram = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|target| {
            target
                .to_string_lossy()
                .starts_with("/memfd:memory-backend")
        })
    };
    let ram = File::open(paths.into_iter().find(is_ram)?).unwrap();
    let field = |at: u64| {
        let mut value = [0; 8];
        ram.read_exact_at(&mut value, MAILBOX_GPA + at).unwrap();
        u64::from_le_bytes(value)
    };
    assert_eq!(field(mailbox::ERRORS), 0);
    Some(field(mailbox::PASSES))
}

impl Drop for Microvm {
    fn drop(&mut self) {
        // The process that has taken over is not our child, but ends when told to.
        if let Some(mut qmp) = Qmp::connect(&self.qmp()) {
            let _ = qmp.execute("quit", json!({}));
        }
        // Both fail only if it has gone already.
        let _ = self.old.kill();
        let _ = self.old.wait();
    }
}

fn has_cpr_transfer() -> bool {
    let version = Command::new(QEMU).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let major = version.ok().and_then(|text| {
        let number = text.strip_prefix("QEMU emulator version ")?;
        number.split('.').next()?.parse::<u32>().ok()
    });
    major >= Some(10)
}

/// The old process has ended by itself and well, and nothing of the upgrade is left behind.
fn assert_left(old: &mut Child, dir: &Path) {
    let status = until("the old process ends", || old.try_wait().unwrap());
    assert!(status.success(), "{status}");
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let strange: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn a_vm_of_qemu_goes_on_in_a_new_process_behind_the_same_monitor() {
    let _turn = turn();
    let Some(mut vm) = Microvm::start(true) else {
        return;
    };
    let qmp = vm.qmp();
    let report = json_of(&qmp, &["upgrade", "--json"]);
    assert_eq!(report["old-pid"], Value::from(vm.old.id()));
    assert_ne!(report["new-pid"], report["old-pid"]);
    assert_eq!(report["migration"]["status"], "completed");
    assert_eq!(report["migration"]["ram"]["normal"], 0, "memory was copied");
    assert_left(&mut vm.old, vm.dir.path());
    vm.assert_works(report["new-pid"].as_u64().unwrap());

    // The new one has two channels in its command line that must not be in that of the third.
    let said = says(&qmp, &["upgrade", "--binary", &which()], 0);
    assert!(said.contains("blackout "), "{said}");
    let pid = said.strip_prefix("process ").unwrap();
    vm.assert_works(pid.split(' ').next().unwrap().parse().unwrap());
}

#[test]
fn a_vm_of_qemu_that_cannot_be_handed_over_stays_where_it_is() {
    let _turn = turn();
    let Some(mut vm) = Microvm::start(false) else {
        return;
    };
    let qmp = vm.qmp();
    let said = says(&qmp, &["upgrade"], 1);
    assert!(said.contains("vmferry: "), "{said}");
    if !can_exec(&qmp) {
        let old = says(&qmp, &["upgrade", "--mode", "exec"], 1);
        assert!(old.contains("from 10.2 on"), "{old}");
    }
    let missing = says(&qmp, &["upgrade", "--binary", "/nowhere/qemu"], 1);
    assert!(missing.contains("cannot start /nowhere/qemu"), "{missing}");
    let dead = says(&qmp, &["upgrade", "--", "false"], 1);
    assert!(dead.contains("ended before it waited for the VM"), "{dead}");
    assert!(vm.old.try_wait().unwrap().is_none());
    vm.assert_works(vm.old.id().into());
    let mut client = Qmp::connect(&qmp).unwrap();
    let parameters = client.execute("query-migrate-parameters", json!({}));
    assert_eq!(parameters.unwrap()["mode"], "normal");
}

#[test]
fn a_vm_of_qemu_goes_on_in_the_qemu_that_its_process_becomes() {
    let _turn = turn();
    let Some(vm) = Microvm::start(true) else {
        return;
    };
    let qmp = vm.qmp();
    if !can_exec(&qmp) {
        println!("NOT RUN: QEMU 10.2 is the first with mode cpr-exec, and here is an older one");
        return;
    }
    let report = json_of(&qmp, &["upgrade", "--mode", "exec", "--json"]);
    let pid = vm.old.id();
    assert_eq!(report["new-pid"], pid);
    vm.assert_works(pid.into());
}

/// Whether the QEMU at `qmp` has mode cpr-exec.
fn can_exec(qmp: &Path) -> bool {
    let mut client = Qmp::connect(qmp).unwrap();
    let schema = client.execute("query-qmp-schema", json!({})).unwrap();
    schema.to_string().contains("cpr-exec")
}

#[test]
fn a_vm_of_qemu_that_was_stopped_is_waited_for_and_stays_stopped() {
    let _turn = turn();
    let Some(mut vm) = Microvm::start(true) else {
        return;
    };
    let qmp = vm.qmp();
    let ask = |command: &str| {
        let mut client = until("the monitor answers", || Qmp::connect(&qmp));
        client.execute(command, json!({})).unwrap()
    };
    ask("stop");
    let report = json_of(&qmp, &["upgrade", "--json"]);
    assert_left(&mut vm.old, vm.dir.path());
    assert_eq!(ask("query-status")["status"], "paused");
    ask("cont");
    vm.assert_works(report["new-pid"].as_u64().unwrap());
}

/// A monitor that becomes another program as those of newer QEMUs do. Dropping it kills it.
struct Execs {
    child: Child,
    dir: TempDir,
}

impl Execs {
    /// With this more on its command line. `None` where there is no Python; says so.
    fn start(more: &[&str]) -> Option<Self> {
        let dir = TempDir::with_prefix("vmferry-e2e-").unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("py/exec_monitor.py");
        let child = Command::new("python3")
            .arg(script)
            .arg(dir.path().join("qmp"))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: no Python here ({error}); .ci/packages installs it");
                return None;
            }
        };
        let execs = Self { child, dir };
        execs.ask("query-status");
        Some(execs)
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn ask(&self, command: &str) -> Value {
        let mut client = until("the monitor answers", || Qmp::connect(&self.qmp()));
        client.execute(command, json!({})).unwrap()
    }

    /// Where the program that it is now was told to find its state.
    fn state(&self) -> PathBuf {
        let words = fs::read(format!("/proc/{}/cmdline", self.child.id())).unwrap();
        let words = String::from_utf8(words).unwrap();
        let (_, file) = words.rsplit_once("-incoming\0file:").unwrap();
        file.trim_end_matches('\0').into()
    }
}

impl Drop for Execs {
    fn drop(&mut self) {
        // Both fail only if it has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_qemu_that_executes_another_goes_on_as_its_guest_was() {
    let Some(vm) = Execs::start(&["-S"]) else {
        return;
    };
    let pid = Value::from(vm.child.id());
    for (command, status) in [("cont", "running"), ("stop", "paused"), ("cont", "running")] {
        vm.ask(command);
        let report = json_of(&vm.qmp(), &["upgrade", "--mode", "exec", "--json"]);
        assert_eq!((&report["old-pid"], &report["new-pid"]), (&pid, &pid));
        assert_eq!(vm.ask("query-status")["status"], status);
        assert_eq!(vm.ask("query-migrate")["status"], "completed");
        assert!(!vm.state().parent().unwrap().exists(), "the state is left");
    }
}

#[test]
fn a_qemu_whose_exec_fails_keeps_its_guest_and_one_whose_successor_dies_is_lost() {
    let Some(vm) = Execs::start(&[]) else {
        return;
    };
    let exec = ["upgrade", "--mode", "exec"];
    let missing = [&exec[..], &["--binary", "/nowhere/qemu"]].concat();
    let said = says(&vm.qmp(), &missing, 1);
    assert!(
        said.contains("execvp /nowhere/qemu: No such file"),
        "{said}"
    );
    assert_eq!(vm.ask("query-status")["status"], "running");
    let parameters = vm.ask("query-migrate-parameters");
    assert_eq!(
        parameters,
        json!({"mode": "normal", "cpr-exec-command": []})
    );
    says(&vm.qmp(), &exec, 0);
    let said = says(&vm.qmp(), &[&exec[..], &["--", "false"]].concat(), 4);
    assert!(said.contains("has ended, and the guest with it"), "{said}");
    assert!(said.contains("hung up"), "{said}");
    let (_, state) = said.trim().rsplit_once("still load is in ").unwrap();
    fs::remove_file(state).unwrap();
    fs::remove_dir(Path::new(state).parent().unwrap()).unwrap();
}

/// The path of QEMU, which is also what `--binary` takes.
fn which() -> String {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    let found = found.into_iter().find(|path| path.exists()).unwrap();
    found.to_str().unwrap().to_owned()
}
