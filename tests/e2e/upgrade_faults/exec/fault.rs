//! Makes a fault happen at its step.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use vmferry::succession::ask::OPTION;
use vmferry_tests::stand_in::{Deed, Tamper};
use vmferry_transport::wire::archive::END_BYTES;
use vmferry_transport::wire::header::HEADER_BYTES;

use crate::cli::says;
use crate::harness::until;
use crate::proc::Holdings;
use crate::qmp::Qmp;
use crate::stand_in::{Arrived, liar_of, program_path, script, words_of};

use super::cell::Scene;
use super::step::{Fault, Step};

/// More than fits into a pipe.
const ANSWER_TOO_LONG: usize = 1 << 20;

/// Begins an upgrade, and has this happen to it.
pub(super) fn happens(scene: &mut Scene, step: Step, fault: Fault) {
    match step {
        Step::Look => look(scene, fault),
        Step::Ask => ask(scene, fault),
        Step::Answer => answer(scene, fault),
        Step::Exec if fault == Fault::Term => {
            about_to(scene);
            // Both are there when it looks, and it may take either first.
            scene.signal(Signal::STOP);
            scene.leave_to_go_on();
            scene.signal(Signal::TERM);
            scene.signal(Signal::CONT);
        }
        Step::Stop | Step::Exec => stop(scene, step, fault),
        Step::Setup => setup(scene, fault),
        Step::Running => {
            scene.begin(&program_path());
            until("the new program has the guest", || {
                let mut qmp = Qmp::connect(&scene.vm.qmp_path())?;
                let info = qmp.execute("query-migrate", json!({})).ok()?;
                (info["status"] == "completed").then_some(())
            });
            end(scene, fault);
        }
        Step::Back => back(scene, fault),
        Step::Letter | Step::Fds | Step::Build | Step::Load | Step::Start => {
            scene.begin(&scene.stand_in.path());
            scene.stand_in.arrives().go(&itself());
            let arrived = scene.stand_in.arrives();
            assert_eq!(arrived.arrival.pid, scene.vm.pid());
            become_it(scene, step, fault, arrived);
        }
    }
}

/// Closes what the stand-in has replaced, which no program knows of, and becomes what it should be.
const TIDY: &str = r#"#!/bin/bash
for path in /proc/$$/fd/*; do
    number=${path##*/}
    case $(readlink "$path") in
        *vmferry-letter*) [ "$number" = "$VMFERRY_CPR_EXEC" ] || exec {number}>&- ;;
        *vmferry-state*) exec {number}>&- ;;
    esac
done
exec PROGRAM "$@"
"#;

/// What it should be.
fn itself() -> Deed {
    Deed {
        program: Some(program_path()),
        ..Deed::default()
    }
}

fn tampering(tamper: Tamper) -> Deed {
    Deed { tamper, ..itself() }
}

/// The words of the VM with this one in the place of what follows `option`.
fn words_with(scene: &Scene, option: &str, value: &str) -> Deed {
    let mut words = words_of(&scene.vm);
    let at = words.iter().position(|word| word == option).unwrap();
    value.clone_into(&mut words[at + 1]);
    Deed {
        words: Some(words),
        ..itself()
    }
}

fn words_and(scene: &Scene, more: &[&str]) -> Deed {
    let mut words = words_of(&scene.vm);
    words.extend(more.iter().map(ToString::to_string));
    Deed {
        words: Some(words),
        ..itself()
    }
}

/// Ends the process.
fn end(scene: &mut Scene, fault: Fault) {
    match fault {
        Fault::Kill => scene.vm.kill(),
        Fault::Term => scene.signal(Signal::TERM),
        other => panic!("{other:?} ends nothing"),
    }
}

fn cancel(scene: &mut Scene) {
    scene.vm.execute("migrate_cancel", json!({}));
}

fn look(scene: &mut Scene, fault: Fault) {
    match fault {
        Fault::Missing => scene.begin(&scene.stand_in.beside("none")),
        Fault::Other => {
            let text = scene.stand_in.beside("text");
            fs::write(&text, "no program").unwrap();
            scene.begin(&text);
        }
        other => panic!("{other:?} is not looked for"),
    }
}

fn ask(scene: &mut Scene, fault: Fault) {
    if fault == Fault::NoRoom {
        scene.leave_no_room();
        return scene.begin(&scene.stand_in.path());
    }
    scene.begin(&scene.stand_in.path());
    let arrived = scene.stand_in.arrives();
    assert!(arrived.arrival.asked);
    match fault {
        Fault::Cancel => cancel(scene),
        Fault::KillCopy => {
            let copy = Pid::from_raw(arrived.arrival.pid.cast_signed()).unwrap();
            kill_process(copy, Signal::KILL).unwrap();
        }
        Fault::Silent => {
            scene.vm.wait_migration();
        }
        Fault::Other => {
            let other = Some("/bin/true".into());
            arrived.go(&Deed {
                program: other,
                ..Deed::default()
            });
        }
        other => end(scene, other),
    }
}

fn answer(scene: &mut Scene, fault: Fault) {
    scene.begin(&scene.stand_in.path());
    let arrived = scene.stand_in.arrives();
    let says = |said: &str| Deed {
        said: said.to_owned(),
        ..Deed::default()
    };
    arrived.go(&match fault {
        Fault::Refuses => {
            let mut deed = words_with(scene, "--mem", "32M");
            deed.words.get_or_insert_default().push(OPTION.to_owned());
            deed
        }
        Fault::Missing => Deed::default(),
        Fault::Changed => says(&format!("vmferry-cpr-exec yes {}\n", "0".repeat(32))),
        Fault::Cut => says("vmferry-cpr-exec yes"),
        Fault::TooLong => says(&"y".repeat(ANSWER_TOO_LONG)),
        other => panic!("{other:?} is no answer"),
    });
}

/// The guest is stopped, and the last look at the program is still to come.
fn stop(scene: &mut Scene, step: Step, fault: Fault) {
    scene.listener.knows(&scene.vm);
    let shell = scene.stand_in.beside("sh");
    symlink("/bin/sh", &shell).unwrap();
    let new = liar_of(scene.stand_in.folder(), shell.to_str().unwrap(), "exit 9");
    scene.pause(true);
    scene.begin(&new);
    scene.vm.wait_status("pre-switchover");
    match (step, fault) {
        (_, Fault::Kill | Fault::Term) => return end(scene, fault),
        (_, Fault::Cancel) => return cancel(scene),
        (_, Fault::NoRoom) => scene.leave_no_room(),
        (Step::Stop, Fault::Missing) => fs::remove_file(&new).unwrap(),
        (Step::Stop, Fault::Other) => {
            let other = scene.stand_in.beside("other");
            symlink("/bin/true", &other).unwrap();
            fs::rename(other, &new).unwrap();
        }
        (Step::Stop, _) => script(&new, "#!/bin/sh\nexit 7\n"),
        (_, Fault::Missing) => fs::remove_file(&shell).unwrap(),
        (_, Fault::Refuses) => {
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
        }
        (_, Fault::Changed) => {
            // To all appearances it is the same.
            let file = File::options().write(true).open(&new).unwrap();
            let before = file.metadata().unwrap();
            (&file).write_all(b"??").unwrap();
            file.set_modified(before.modified().unwrap()).unwrap();
        }
        (_, other) => panic!("{other:?} does not keep it from being executed"),
    }
    scene.go_on();
}

/// The guest is stopped, and the process becomes the new program at a word.
fn about_to(scene: &mut Scene) {
    scene.pause(true);
    scene.begin(&program_path());
    scene.vm.wait_status("pre-switchover");
}

/// Tells the process to end when it has been on its way to the new program for so long.
pub(super) fn told_after(scene: &mut Scene, delay: Duration) {
    about_to(scene);
    scene.leave_to_go_on();
    thread::sleep(delay);
    scene.signal(Signal::TERM);
}

fn setup(scene: &mut Scene, fault: Fault) {
    scene.listener.knows(&scene.vm);
    if fault == Fault::Veto {
        scene.listener.veto(true);
    } else {
        scene.listener.hold("setup");
    }
    scene.begin(&scene.stand_in.path());
    scene.stand_in.arrives().go(&itself());
    until("SETUP is told", || {
        (!scene.listener.heard().is_empty()).then_some(())
    });
    match fault {
        Fault::Veto => {
            scene.vm.wait_migration();
            scene.listener.veto(false);
        }
        Fault::Cancel => cancel(scene),
        other => end(scene, other),
    }
    scene.listener.let_go();
}

/// The process is the new program.
fn become_it(scene: &mut Scene, step: Step, fault: Fault, arrived: Arrived) {
    let deed = match (step, fault) {
        (Step::Letter, Fault::Kill | Fault::Term) => return end(scene, fault),
        (_, Fault::Kill | Fault::Term) => return half_way(scene, step, fault, arrived),
        (Step::Load, Fault::Silent) => return late(scene, arrived),

        (Step::Letter, Fault::Missing) => tampering(Tamper::WithoutVariable),
        (Step::Letter, Fault::Other) => tampering(Tamper::LetterOfAnother),
        (Step::Letter, Fault::Changed) => tampering(Tamper::LetterChanged),
        (Step::Letter, Fault::Cut) => tampering(Tamper::LetterCut),
        (Step::Letter, Fault::Swapped) => tampering(Tamper::LetterAsked),
        (Step::Letter, Fault::Refuses) => words_and(scene, &["--no-such-option"]),
        (Step::Letter, Fault::Ends) => Deed {
            code: 9,
            ..Deed::default()
        },

        (Step::Fds, Fault::Missing) => tampering(Tamper::RamMissing),
        (Step::Fds, Fault::Other) => tampering(Tamper::RamForeign),
        (Step::Fds, Fault::Swapped) => tampering(Tamper::Swapped),

        (Step::Build, Fault::Missing) => words_with(scene, "--disk", "/nowhere/disk,id=disk0"),
        (Step::Build, Fault::Other) => {
            let disk = format!("{},id=disk1", scene.another.display());
            words_and(scene, &["--disk", &disk])
        }
        (Step::Build, Fault::Refuses) => words_with(scene, "--mem", "32M"),

        (Step::Load, Fault::Changed) => tampering(Tamper::ArchiveChanged),
        (Step::Load, Fault::Cut) => tampering(Tamper::ArchiveCut),
        (Step::Load, Fault::Refuses) => words_with(scene, "--vcpus", "2"),

        (Step::Start, Fault::Other) => {
            scene.take_disk(&scene.another.clone());
            let disk = format!("{},id=disk0", scene.another.display());
            words_with(scene, "--disk", &disk)
        }
        (Step::Start, Fault::Taken) => {
            scene.take_disk(&scene.image.clone());
            itself()
        }
        (step, fault) => panic!("{fault:?} does not happen at {step:?}"),
    };
    arrived.go(&deed);
}

/// A pipe with a name.
fn pipe(scene: &Scene) -> (PathBuf, File) {
    let path = scene.stand_in.beside("pipe");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // To read too, so that it has a reader.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let pipe = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
    (path, pipe.into())
}

/// The new program gets no state until it has given up.
fn late(scene: &mut Scene, arrived: Arrived) {
    // In percent; the old program has more time for the same.
    const HURRY: [&str; 2] = ["--x-deadline-scale", "5"];
    let (path, pipe) = pipe(scene);
    let tidy = scene.stand_in.beside("tidy");
    script(
        &tidy,
        &TIDY.replace("PROGRAM", program_path().to_str().unwrap()),
    );
    arrived.go(&Deed {
        tamper: Tamper::ArchivePiped(path),
        program: Some(tidy),
        ..words_and(scene, &HURRY)
    });
    // From here on the process is another one, until it is the old program again.
    let archive = scene.stand_in.archive();
    let old = program_path();
    until("the new program has gone", || {
        // Nothing in the middle of an exec.
        let words = fs::read_to_string(format!("/proc/{}/cmdline", scene.vm.pid())).unwrap();
        let mut words = words.split('\0');
        let is_ours = words.next() == old.to_str();
        (is_ours && words.all(|word| word != HURRY[0])).then_some(())
    });
    (&pipe).write_all(&archive).unwrap();
}

/// Ends the new program when it has built its machine, loaded half of the state, or all of it.
fn half_way(scene: &mut Scene, step: Step, fault: Fault, arrived: Arrived) {
    let (path, pipe) = pipe(scene);
    arrived.go(&tampering(Tamper::ArchivePiped(path)));
    let archive = scene.stand_in.archive();
    let until_end = archive.len() - HEADER_BYTES - END_BYTES;
    let part = match step {
        Step::Build => 0,
        Step::Load => until_end / 2,
        _ => until_end,
    };
    until("the machine is built", || {
        let threads = Holdings::of(scene.vm.pid()).threads;
        threads.contains_key("load").then_some(())
    });
    (&pipe).write_all(&archive[..part]).unwrap();
    until("what is there has been read", || {
        (rustix::io::ioctl_fionread(&pipe).unwrap() == 0).then_some(())
    });
    end(scene, fault);
}

/// The new program cannot go on, and the old one is executed again.
fn back(scene: &mut Scene, fault: Fault) {
    // With the name that its thread is known by.
    let old = scene.stand_in.beside("vmferry-under-test");
    if fault == Fault::Missing {
        // Not the file that the tests are run with.
        fs::hard_link(program_path(), &old)
            .or_else(|_| fs::copy(program_path(), &old).map(drop))
            .unwrap();
        let path = scene.vm.qmp_path();
        let binary = old.to_str().unwrap();
        says(&path, &["upgrade", "--mode", "exec", "--binary", binary], 0);
        scene.vm.qmp = until("somebody answers", || Qmp::connect(&path));
        fs::remove_file(&old).unwrap();
    } else {
        scene.listener.hold("failed");
    }
    scene.begin(&scene.stand_in.path());
    scene.stand_in.arrives().go(&itself());
    let deed = words_with(scene, "--mem", "32M");
    scene.stand_in.arrives().go(&deed);
    if fault == Fault::Missing {
        return;
    }
    until("the old program tells that it has failed", || {
        let heard = scene.listener.heard();
        heard.iter().any(|one| one.event == "failed").then_some(())
    });
    end(scene, fault);
    scene.listener.let_go();
}
