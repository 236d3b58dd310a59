//! `vmferry upgrade` with a VM of QEMU that runs our workload: a new QEMU takes it over, memory and monitor included.

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
    let mut client = Qmp::connect(&qmp).unwrap();
    let schema = client.execute("query-qmp-schema", json!({})).unwrap();
    drop(client);
    if !schema.to_string().contains("cpr-exec") {
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

/// The path of QEMU, which is also what `--binary` takes.
fn which() -> String {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    let found = found.into_iter().find(|path| path.exists()).unwrap();
    found.to_str().unwrap().to_owned()
}
