//! Following at a terminal: what stands there, what Ctrl-C does, and what is left behind.

use serde_json::json;

use crate::harness::{Accel, Machine, Vm, program};
use crate::terminal::{Screen, Terminal};

const COLUMNS: u16 = 80;

/// A migration that goes on until something is done about it, followed at a terminal.
struct Scene {
    source: Vm,
    target: Vm,
    terminal: Terminal,
}

impl Scene {
    fn new(columns: u16, more: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::with(
            json!({ "max-bandwidth": 2 << 20 }),
            columns,
            more,
            environment,
        )
    }

    fn with(
        parameters: serde_json::Value,
        columns: u16,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let machine = Machine::small(Accel::Soft);
        let (mut source, mut target) = (machine.source(), machine.target());
        source.set(parameters);
        let (path, address) = (qmp(&source), target.address());
        let mut arguments = vec!["migrate", "--qmp", &path, &address];
        arguments.extend(more);
        let terminal = Terminal::start(columns, &arguments, environment);
        Self {
            source,
            target,
            terminal,
        }
    }

    /// The question that a Ctrl-C brings.
    fn interrupt(&mut self) -> Screen {
        self.terminal.wait_for("MiB left");
        self.terminal.type_in("\x03");
        self.terminal.wait_for("[c]ancel")
    }

    /// Ends as expected, and the terminal is as it should be.
    fn assert_end(&mut self, code: i32) -> Screen {
        let (ended, screen) = self.terminal.wait_end();
        let lines = screen.lines();
        assert_eq!(ended, code, "{lines:#?}");
        assert!(screen.faults.is_empty(), "{:?}", screen.faults);
        // Neither the bar nor the question is left, and the next program writes on a line of its own.
        assert!(
            !screen.shows("╌") && !screen.shows("[c]ancel"),
            "{lines:#?}"
        );
        assert_eq!(screen.cursor(), (lines.len(), 0), "{lines:#?}");
        screen
    }
}

fn qmp(vm: &Vm) -> String {
    vm.qmp_path().to_str().unwrap().to_owned()
}

#[test]
fn a_migration_is_a_bar_and_ends_in_a_summary() {
    let mut scene = Scene::new(COLUMNS, &["--watch"], &[]);
    let screen = scene.terminal.wait_for("MiB left");
    let lines = screen.lines();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(
        lines[0].starts_with("round ") && lines[0].contains('%'),
        "{lines:#?}"
    );
    scene.source.set(json!({ "max-bandwidth": 0 }));
    let screen = scene.assert_end(0);
    let lines = screen.lines();
    assert!(lines[0].starts_with("completed in "), "{lines:#?}");
    assert!(
        screen.shows("blackout ") && screen.shows("pause "),
        "{lines:#?}"
    );
    // Written, drawn over and gone: what it looked like on the way.
    let raw = String::from_utf8_lossy(&screen.raw);
    assert!(
        raw.contains("dirtied") && raw.contains("predicted blackout"),
        "{raw}"
    );
    assert!(raw.contains("\x1b[32m"), "no colour: {raw}");
    assert!(!raw.contains("\x1b[?25l"), "the cursor was hidden: {raw}");
    scene.target.assert_guest_works();
}

#[test]
fn no_colour_is_written_where_none_is_wanted() {
    let fast = json!({ "max-bandwidth": 0 });
    let mut scene = Scene::with(fast, COLUMNS, &[], &[("NO_COLOR", "1")]);
    let raw = scene.assert_end(0).raw;
    let raw = String::from_utf8_lossy(&raw);
    assert!(!raw.contains("\x1b[3") && !raw.contains("\x1b[0m"), "{raw}");
}

#[test]
fn a_narrow_terminal_gets_short_lines() {
    let mut scene = Scene::new(30, &[], &[("NO_COLOR", "1")]);
    let lines = scene.terminal.wait_for("MiB left").lines();
    assert!(
        lines[0].starts_with("round ") && lines[0].contains("╌") && lines[0].ends_with('%'),
        "{lines:#?}"
    );
    scene.source.set(json!({ "max-bandwidth": 0 }));
    let (code, screen) = scene.terminal.wait_end();
    assert_eq!(code, 0);
    let raw = String::from_utf8_lossy(&screen.raw).into_owned();
    // Up to where the summary begins, which is text and may wrap.
    let drawn = raw.split("completed in").next().unwrap();
    let widest = drawn.split(['\r', '\n']).map(|line| {
        let plain = line.replace("\x1b[K", "").replace("\x1b[J", "");
        plain.replace("\x1b[2A", "").chars().count()
    });
    assert!(widest.max().unwrap() <= 30, "{drawn:?}");
}

#[test]
fn a_terminal_may_change_its_size_on_the_way() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.terminal.wait_for("MiB left");
    scene.terminal.resize(100);
    // Drawn for the new size.
    crate::harness::until("a longer bar", || {
        let longest = scene
            .terminal
            .screen()
            .lines()
            .iter()
            .map(|line| line.chars().count())
            .max();
        (longest > Some(80)).then_some(())
    });
    scene.source.set(json!({ "max-bandwidth": 0 }));
    scene.assert_end(0);
}

#[test]
fn ctrl_c_asks_and_c_cancels() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    let screen = scene.interrupt();
    // The question stands below the bar, and the cursor behind the question.
    assert!(
        screen.lines()[0].starts_with("round "),
        "{:#?}",
        screen.lines()
    );
    scene.terminal.type_in("c\n");
    let screen = scene.assert_end(3);
    assert!(
        screen.lines()[0].starts_with("cancelled after "),
        "{:#?}",
        screen.lines()
    );
    assert!(screen.shows("goes on running at the source"));
    assert_eq!(scene.source.status(), "cancelled");
    scene.source.assert_guest_works();
}

#[test]
fn ctrl_c_asks_and_d_detaches() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.interrupt();
    scene.terminal.type_in("d\n");
    let screen = scene.assert_end(130);
    assert!(
        screen.shows("detached; the migration goes on"),
        "{:#?}",
        screen.lines()
    );
    assert_eq!(scene.source.status(), "active");
    // It ends well without anybody who looks.
    scene.source.set(json!({ "max-bandwidth": 0 }));
    assert_eq!(scene.source.wait_migration()["status"], "completed");
    scene.target.assert_guest_works();
}

#[test]
fn a_second_ctrl_c_detaches_at_once() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.interrupt();
    scene.terminal.type_in("\x03");
    scene.assert_end(130);
    assert_eq!(scene.source.status(), "active");
}

#[test]
fn other_answers_are_asked_for_again_and_enter_keeps_watching() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.interrupt();
    scene.terminal.type_in("perhaps\n");
    crate::harness::until("the question comes again", || {
        let screen = scene.terminal.screen();
        let raw = String::from_utf8_lossy(&screen.raw)
            .matches("[c]ancel")
            .count();
        (raw == 2 && !screen.shows("perhaps")).then_some(())
    });
    scene.terminal.type_in("\n");
    crate::harness::until("the question goes", || {
        (!scene.terminal.screen().shows("[c]ancel")).then_some(())
    });
    assert_eq!(scene.source.status(), "active");
    scene.source.set(json!({ "max-bandwidth": 0 }));
    scene.assert_end(0);
}

#[test]
fn a_migration_that_ends_while_its_operator_thinks_withdraws_the_question() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.interrupt();
    scene.source.set(json!({ "max-bandwidth": 0 }));
    let screen = scene.assert_end(0);
    assert!(
        screen.lines()[0].starts_with("completed in "),
        "{:#?}",
        screen.lines()
    );
}

#[test]
fn a_terminal_that_goes_away_leaves_the_migration_alone() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.terminal.wait_for("MiB left");
    crate::cli::send(scene.terminal.pid(), rustix::process::Signal::HUP);
    scene.assert_end(129);
    assert_eq!(scene.source.status(), "active");
}

#[test]
fn a_guest_that_waits_for_its_switchover_says_how_to_go_on() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target());
    let on =
        json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] });
    source.execute("migrate-set-capabilities", on);
    let (path, address) = (qmp(&source), target.address());
    let start = || Terminal::start(COLUMNS, &["migrate", "--qmp", &path, &address], &[]);
    let mut scene = Scene {
        terminal: start(),
        source,
        target,
    };
    let screen = scene.terminal.wait_for("vmferry continue --qmp");
    let lines = screen.lines();
    assert!(lines[0].starts_with("pre-switchover "), "{lines:#?}");
    assert!(lines[0].contains("the guest stopped"), "{lines:#?}");
    assert!(screen.shows("vmferry cancel --qmp"), "{lines:#?}");
    scene.terminal.type_in("\x03");
    scene.terminal.wait_for("[s]witch over");
    scene.terminal.type_in("s\n");
    scene.assert_end(0);
    scene.target.assert_guest_works();
}

#[test]
fn a_failure_is_told_in_lines_that_do_not_wrap() {
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    let path = qmp(&source);
    let nowhere = format!("unix:/{}", ["nowhere-at-all"; 6].join("/"));
    let mut terminal = Terminal::start(COLUMNS, &["migrate", "--qmp", &path, &nowhere], &[]);
    let (code, screen) = terminal.wait_end();
    let lines = screen.lines();
    assert_eq!(code, 1, "{lines:#?}");
    assert!(screen.faults.is_empty(), "{:?}", screen.faults);
    assert!(lines[0].starts_with("failed "), "{lines:#?}");
    assert!(screen.shows("goes on running at the source"), "{lines:#?}");
    let text = lines.join("").replace(' ', "");
    assert!(text.contains(&nowhere), "{lines:#?}");
    source.assert_guest_works();
}

#[test]
fn a_process_that_dies_is_told_and_the_terminal_is_clean() {
    let mut scene = Scene::new(COLUMNS, &[], &[]);
    scene.terminal.wait_for("MiB left");
    scene.source.kill();
    let screen = scene.assert_end(4);
    assert!(
        screen.shows("lost sight of the migration"),
        "{:#?}",
        screen.lines()
    );
    assert!(screen.shows("hung up"), "{:#?}", screen.lines());
}

#[test]
fn whoever_watches_from_the_target_sees_the_guest_arrive() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target());
    let path = qmp(&target);
    let mut terminal = Terminal::start(COLUMNS, &["status", "--watch", "--qmp", &path], &[]);
    let screen = terminal.wait_for("for a migration at tcp:127.0.0.1:");
    assert!(
        screen.lines()[1].contains("inmigrate (stopped)"),
        "{:#?}",
        screen.lines()
    );
    source.set(json!({ "max-bandwidth": 8 << 20 }));
    let address = target.address();
    source.migrate(&address);
    terminal.wait_for(" received");
    source.set(json!({ "max-bandwidth": 0 }));
    let (code, screen) = terminal.wait_end();
    assert_eq!(code, 0);
    assert!(screen.faults.is_empty(), "{:?}", screen.faults);
    assert!(
        screen.lines()[0].starts_with("completed: "),
        "{:#?}",
        screen.lines()
    );
    // Who comes too late is told the end at once.
    let late = program()
        .args(["status", "--watch", "--qmp", &path])
        .output()
        .unwrap();
    assert_eq!(late.status.code(), Some(0));
    target.assert_guest_works();
}

#[test]
fn ctrl_c_of_somebody_who_only_looks_on_is_no_question() {
    let mut scene = Scene::new(COLUMNS, &["--detach"], &[]);
    scene.terminal.wait_end();
    let path = qmp(&scene.source);
    scene.terminal = Terminal::start(COLUMNS, &["status", "--watch", "--qmp", &path], &[]);
    let screen = scene.terminal.wait_for("MiB left");
    assert!(screen.shows("0 errors"), "{:#?}", screen.lines());
    scene.terminal.type_in("\x03");
    scene.assert_end(130);
    assert_eq!(scene.source.status(), "active");
}

#[test]
fn a_commit_in_doubt_says_what_the_operator_has_to_do() {
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    crate::doubt::in_doubt(&machine, &mut source);
    let path = qmp(&source);
    let mut terminal = Terminal::start(COLUMNS, &["status", "--watch", "--qmp", &path], &[]);
    let screen = terminal.wait_for("target-runs");
    let lines = screen.lines();
    assert!(
        lines.iter().any(|line| line.starts_with("in doubt ")),
        "{lines:#?}"
    );
    let one = lines.join(" ").replace("  ", "");
    assert!(one.contains("it may run the guest or not"), "{lines:#?}");
    assert!(one.contains("source-runs"), "{lines:#?}");
    let said = crate::cli::says(&source.qmp_path(), &["resolve", "target-runs"], 0);
    assert!(said.contains("the guest is the target's"), "{said}");
    let (code, screen) = terminal.wait_end();
    assert_eq!(code, 0, "{:#?}", screen.lines());
    assert!(screen.faults.is_empty(), "{:?}", screen.faults);
    assert_eq!(source.runstate(), "postmigrate");
}
