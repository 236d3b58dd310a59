//! I2, I3: VMs move between this build and older ones, which are built from the history of the repository: in place and over a socket, there
//! and back. What cannot be is refused before the guest is stopped.
//!
//! `tests/versions` names the commits. A binary is built once and kept in `.cache/versions`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::cli::vmferry;
use crate::harness::{Accel, Launch, Machine, Vm, turn, until};
use crate::qmp::Qmp;

on_both_accelerators!(
    a_vm_of_an_older_build_is_upgraded_and_goes_back_or_stays,
    guests_move_to_an_older_build_and_from_it_or_stay,
    a_guest_that_an_older_build_has_saved_is_loaded,
);

/// Longest time for the build of an older binary, in seconds: three minutes of two processors, and more on a machine that is busy.
const BUILD_SECONDS: &str = "900";

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap().to_path_buf()
}

/// Names and commits.
fn versions() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("tests/versions")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let versions: Vec<_> = lines
        .map(|line| {
            let (name, commit) = line.split_once(' ').unwrap();
            assert_eq!(commit.len(), 40, "{line}");
            (name.to_owned(), commit.to_owned())
        })
        .collect();
    assert!(!versions.is_empty());
    versions
}

fn git(words: &[&str]) -> Output {
    // A server that does not answer must not hold us up.
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "120", "git"]);
    // The checkout may be somebody else's.
    command.args(["-c", "safe.directory=*", "-C"]);
    command.arg(root()).args(words);
    // Nothing asks for a password.
    command.env("GIT_TERMINAL_PROMPT", "0");
    command.stdin(Stdio::null()).output().unwrap()
}

/// Those of [`versions`] that the history holds; says so of the others. A shallow clone may lack one: then it is asked for. A history that
/// was squashed or exported has no older build to offer, which is no fault of the machine that could be repaired there.
fn versions_here() -> Vec<(String, String)> {
    // Asking may take minutes, and every test wants to know.
    static MISSING: OnceLock<Vec<(String, String)>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        let versions = versions().into_iter();
        let missing = versions.filter_map(|(_, commit)| Some((why_missing(&commit)?, commit)));
        missing.map(|(why, commit)| (commit, why)).collect()
    });
    let mut here = versions();
    for (commit, why) in missing {
        println!(
            "NOT RUN: the history here does not hold {commit} of tests/versions; a full clone does: {why}"
        );
        here.retain(|(_, version)| version != commit);
    }
    here
}

/// What git says if it does not have a commit and cannot get it.
fn why_missing(commit: &str) -> Option<String> {
    let object = format!("{commit}^{{commit}}");
    let look = || git(&["cat-file", "-e", &object]);
    if look().status.success() {
        return None;
    }
    git(&["fetch", "--quiet", "--depth", "1", "origin", commit]);
    let last = look();
    (!last.status.success()).then(|| String::from_utf8_lossy(&last.stderr).trim().to_owned())
}

/// The binaries of all older builds that can be had.
fn older() -> Vec<(String, PathBuf)> {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    fs::create_dir_all(place()).unwrap();
    // Another run of these tests may be at it.
    let lock = File::create(place().join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let here = versions_here().into_iter();
    let built = here.map(|(name, commit)| (name, build(&commit))).collect();
    // Nothing more is to be built with it. Fails if nothing was.
    let _ = fs::remove_dir_all(place().join("target"));
    built
}

/// Where older binaries are kept.
fn place() -> PathBuf {
    root().join(".cache/versions")
}

fn build(commit: &str) -> PathBuf {
    let place = place();
    let folder = place.join(commit);
    let binary = folder.join("vmferry");
    fs::create_dir_all(&folder).unwrap();
    if binary.exists() {
        return binary;
    }
    let source = folder.join("source");
    // What an interrupted build has left.
    let _ = fs::remove_dir_all(&source);
    fs::create_dir_all(&source).unwrap();
    let tar = folder.join("source.tar");
    let archived = git(&["archive", "-o", tar.to_str().unwrap(), commit]);
    assert!(archived.status.success(), "{archived:?}");
    run(Command::new("tar")
        .arg("xf")
        .arg(&tar)
        .arg("-C")
        .arg(&source));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = place.join("target");
    run(Command::new("timeout")
        .args(["-k", "10", BUILD_SECONDS])
        .arg(cargo)
        .args([
            "build", "--quiet", "--locked", "-p", "vmferry", "--bin", "vmferry",
        ])
        .current_dir(&source)
        .env("CARGO_TARGET_DIR", &target)
        // For a binary that makes a few passes, time is better spent here: 50 s of processor instead of 150 s.
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_INCREMENTAL", "0"));
    let new = folder.join("new");
    fs::copy(target.join("debug/vmferry"), &new).unwrap();
    fs::rename(new, &binary).unwrap();
    // Fails only if somebody else has been faster.
    let _ = fs::remove_dir_all(&source);
    let _ = fs::remove_file(&tar);
    binary
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Starts this binary in the place of the one under test.
fn with(binary: &Path) -> Launch {
    let script = format!("shift; exec '{}' \"$@\"", binary.display());
    // The shell calls the program under test $1, after a name for itself.
    Launch::default().through(&["sh", "-c", &script, "sh"])
}

/// What is asked of whoever has the VM at a path.
fn ask(path: &Path, command: &str) -> Value {
    let mut qmp = until("somebody answers", || Qmp::connect(path));
    qmp.execute(command, json!({})).unwrap()
}

fn assert_works(path: &Path) {
    let passes = || {
        let workload = ask(path, "x-query-workload");
        assert_eq!(workload["errors"], 0, "{workload}");
        workload["passes"].as_u64().unwrap()
    };
    let before = passes();
    until("the guest makes passes", || {
        (passes() >= before + 2).then_some(())
    });
}

/// The statuses that a migration of the VM at a path goes through while `act` is done.
fn statuses(path: &Path, act: impl FnOnce()) -> Vec<String> {
    let mut qmp = Qmp::connect(path).unwrap();
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    qmp.execute("migrate-set-capabilities", events).unwrap();
    act();
    // It has ended if the guest has moved; its last words are here then.
    let _ = qmp.execute("query-status", json!({}));
    let of_migrations = qmp
        .events
        .iter()
        .filter(|event| event["event"] == "MIGRATION");
    of_migrations
        .map(|event| event["data"]["status"].as_str().unwrap().to_owned())
        .collect()
}

/// A VM that is refused is told so with versions in the reason, and its guest has never been stopped.
fn assert_refused_in_time(statuses: &[String], said: &str) {
    assert!(said.contains("version"), "{said}");
    assert_eq!(statuses, ["setup", "failing", "failed"], "{said}");
}

fn upgrade(path: &Path, binary: &Path) -> Output {
    vmferry(
        path,
        &["upgrade", "--json", "--binary", binary.to_str().unwrap()],
    )
}

fn a_vm_of_an_older_build_is_upgraded_and_goes_back_or_stays(accel: Accel) {
    for (name, binary) in older() {
        let _turn = turn();
        let this = PathBuf::from(crate::harness::program().get_program());
        let mut vm = Machine::small(accel).start_source(with(&binary));
        vm.warm_up();
        let path = vm.qmp_path();
        let output = upgrade(&path, &this);
        assert!(output.status.success(), "{name}: {output:?}\n{}", vm.said());
        assert_eq!(vm.wait_exit().code(), Some(0));
        assert_works(&path);
        let mut back = None;
        let seen = statuses(&path, || back = Some(upgrade(&path, &binary)));
        let back = back.unwrap();
        if !back.status.success() {
            assert_refused_in_time(&seen, &String::from_utf8_lossy(&back.stderr));
        }
        assert_works(&path);
        // A program is asked whether it goes on with a VM before the guest is stopped.
        let words = ["upgrade", "--mode", "exec", "--binary"];
        let mut exec = None;
        let seen = statuses(&path, || {
            exec = Some(vmferry(
                &path,
                &[&words[..], &[binary.to_str().unwrap()]].concat(),
            ));
        });
        if !exec.unwrap().status.success() {
            assert!(!seen.contains(&"device".to_owned()), "{seen:?}");
        }
        assert_works(&path);
        let again = upgrade(&path, &this);
        assert!(again.status.success(), "{name}: {again:?}\n{}", vm.said());
        assert_works(&path);
        println!(
            "{name}, {accel:?}: back in place: {}",
            back.status.success()
        );
        ask(&path, "quit");
        until("the last process ends", || (!path.exists()).then_some(()));
    }
}

fn guests_move_to_an_older_build_and_from_it_or_stay(accel: Accel) {
    for (name, binary) in older() {
        let _turn = turn();
        let machine = Machine::small(accel);
        let address = "tcp:127.0.0.1:0";
        let mut source = machine.start_source(with(&binary));
        source.warm_up();
        let mut here = machine.target();
        source.set(json!({"x-verify": true}));
        source.move_to(&mut here);
        here.assert_guest_works();
        let mut there = machine.start_target(address, with(&binary));
        let target = there.address();
        let path = here.qmp_path();
        let mut said = None;
        let words = ["migrate", &target, "--quiet"];
        let seen = statuses(&path, || said = Some(vmferry(&path, &words)));
        let said = said.unwrap();
        if said.status.success() {
            there.assert_guest_works();
        } else {
            assert_refused_in_time(&seen, &String::from_utf8_lossy(&said.stderr));
            here.assert_guest_works();
        }
        println!(
            "{name}, {accel:?}: back over a socket: {}",
            said.status.success()
        );
    }
}

fn a_guest_that_an_older_build_has_saved_is_loaded(accel: Accel) {
    for (_, binary) in older() {
        let _turn = turn();
        let machine = Machine::small(accel);
        let mut source: Vm = machine.start_source(with(&binary));
        source.warm_up();
        let archive = format!("file:{}", source.dir().join("vm").display());
        source.migrate(&archive);
        assert_eq!(source.wait_migration()["status"], "completed");
        let mut target = machine.target_at("defer");
        target.execute("migrate-incoming", json!({ "uri": archive }));
        assert_eq!(
            target.wait_migration()["status"],
            "completed",
            "{}",
            target.said()
        );
        target.assert_guest_works();
    }
}

/// This needs no history: what the older builds have saved, on host threads, is committed.
#[test]
fn guests_in_archives_of_older_builds_go_on() {
    let _turn = turn();
    let machine = Machine {
        mem: "8M",
        ..Machine::small(Accel::Soft)
    };
    for (name, _) in versions() {
        let archive = root().join(format!("tests/fixtures/saved/{name}.vmferry.gz"));
        assert!(archive.exists(), "{} is missing", archive.display());
        let mut target = machine.target_at("defer");
        let uri = format!("exec:gzip -dc '{}'", archive.display());
        target.execute("migrate-incoming", json!({ "uri": uri }));
        let info = target.wait_migration();
        assert_eq!(info["status"], "completed", "{info}\n{}", target.said());
        assert!(target.passes() > 0, "it has a past");
        target.assert_guest_works();
    }
}

#[test]
fn bytes_that_older_builds_have_written_are_kept() {
    for (name, commit) in versions_here() {
        let listed = git(&["ls-tree", "-r", &commit, "tests/fixtures"]);
        let listed = String::from_utf8(listed.stdout).unwrap();
        // What no build has written may change: damaged bytes, and explanations.
        let of_no_build = |line: &str| line.contains("/corrupt/") || line.ends_with(".md");
        let mut kept = 0;
        for line in listed.lines().filter(|line| !of_no_build(line)) {
            let (about, path) = line.split_once('\t').unwrap();
            let was = about.rsplit(' ').next().unwrap();
            let now = git(&["hash-object", path]);
            let now = String::from_utf8(now.stdout).unwrap();
            assert_eq!(now.trim(), was, "{path} is not what it was at {name}");
            kept += 1;
        }
        assert!(kept > 20, "{kept} files at {name}");
    }
}
