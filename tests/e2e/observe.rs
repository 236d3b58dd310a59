//! What others see of a migration: metrics while it runs and afterwards, records of every outcome, log lines, and the page made from
//! records, opened in a browser. And what they cannot do: hold it up.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Accel, Launch, Machine, Vm, program, turn, until};

on_both_accelerators!(
    metrics_show_a_migration_at_both_sides_while_it_runs_and_afterwards,
    scrapers_that_are_slow_silent_or_lost_hold_nothing_up,
    records_tell_of_success_failure_and_cancel,
    a_process_that_is_told_to_quit_leaves_a_record,
    a_full_disk_costs_the_record_and_nothing_else,
    every_log_line_of_a_migration_names_it,
    the_page_of_a_real_migration_shows_its_plots_in_a_browser,
);

/// The text of a metrics endpoint, named as `unix:PATH` or `tcp:ADDRESS:PORT`.
fn scrape(address: &str) -> String {
    let response = ask(address, "GET /metrics HTTP/1.1\r\nHost: vm\r\n\r\n");
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    body.to_owned()
}

fn ask(address: &str, request: &str) -> String {
    let mut response = String::new();
    match address.strip_prefix("unix:") {
        Some(path) => {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream.read_to_string(&mut response).unwrap();
        }
        None => {
            let mut stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream.read_to_string(&mut response).unwrap();
        }
    }
    response
}

/// The value of a metric with its labels, as `name{label="value"}`.
fn metric(page: &str, name: &str) -> Option<f64> {
    let mut lines = page.lines();
    let line = lines.find(|line| line.strip_prefix(name).is_some_and(|r| r.starts_with(' ')))?;
    Some(line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn outgoing(status: &str) -> String {
    format!("vmferry_migration_status{{direction=\"outgoing\",status=\"{status}\"}}")
}

/// Where a process says that its metrics are.
fn metrics_of(vm: &Vm) -> String {
    let said = vm.said();
    let (_, rest) = said.split_once("metrics at ").unwrap();
    rest.lines().next().unwrap().to_owned()
}

/// The records in a folder, in the order of time, as soon as there are so many; none is half-written.
pub(crate) fn records(folder: &Path, count: usize) -> Vec<(PathBuf, Value)> {
    until(
        format_args!("{count} records in {}", folder.display()),
        || {
            let files = fs::read_dir(folder).ok()?;
            let files = files.map(|file| file.unwrap().path());
            let mut files: Vec<_> = files
                .filter(|path| path.extension().is_some_and(|end| end == "json"))
                .collect();
            files.sort();
            (files.len() == count).then_some(files)
        },
    )
    .into_iter()
    .map(|path| {
        let text = fs::read(&path).unwrap();
        let record = serde_json::from_slice(&text).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        (path, record)
    })
    .collect()
}

pub(crate) fn recording(folder: &Path) -> Launch {
    Launch::default().with(&["--record", folder.to_str().unwrap()])
}

fn statuses(record: &Value) -> Vec<&str> {
    let changes = record["timeline"].as_array().unwrap().iter();
    changes
        .map(|change| change["status"].as_str().unwrap())
        .collect()
}

fn metrics_show_a_migration_at_both_sides_while_it_runs_and_afterwards(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let at_target = format!("unix:{}/metrics", dir.path().display());
    let mut source =
        machine.start_source(Launch::default().with(&["--metrics", "tcp:127.0.0.1:0"]));
    source.warm_up();
    let launch = Launch::default().with(&["--metrics", &at_target]);
    let mut target = machine.start_target("tcp:127.0.0.1:0", launch);
    let at_source = metrics_of(&source);
    let socket = fs::metadata(dir.path().join("metrics")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let before = scrape(&at_source);
    assert_eq!(metric(&before, &outgoing("none")), Some(1.0));
    assert_eq!(
        metric(&before, "vmferry_vm_state{state=\"running\"}"),
        Some(1.0)
    );
    assert!(metric(&before, "vmferry_guest_longest_gap_seconds").is_some());

    source.set(json!({ "max-bandwidth": 4 << 20, "multifd-channels": 3 }));
    let address = target.address();
    source.migrate(&address);
    source.wait_status("active");
    until("both sides show that bytes move", || {
        let (here, there) = (scrape(&at_source), scrape(&at_target));
        let moving = metric(&here, &outgoing("active")) == Some(1.0)
            && metric(
                &here,
                "vmferry_migration_bytes_per_second{direction=\"outgoing\"}",
            )? > 0.0
            && metric(&here, "vmferry_migration_remaining_bytes")? > 0.0
            && metric(&here, "vmferry_sent_bytes_total{phase=\"precopy\"}")? > 0.0
            && metric(
                &here,
                "vmferry_migration_connection_bytes{direction=\"outgoing\",connection=\"2\"}",
            )? > 0.0
            && metric(&here, "vmferry_migration_round{direction=\"outgoing\"}")? >= 1.0
            && metric(
                &there,
                "vmferry_migration_status{direction=\"incoming\",status=\"active\"}",
            ) == Some(1.0)
            && metric(&there, "vmferry_received_bytes_total")? > 0.0;
        moving.then_some(())
    });
    source.set(json!({ "max-bandwidth": 0 }));
    let info = source.wait_migration();
    assert_eq!(info["status"], "completed", "{info}");
    target.assert_guest_works();

    let here = scrape(&at_source);
    let value = |name: &str| metric(&here, name).unwrap_or_else(|| panic!("{name}\n{here}"));
    assert_eq!(value(&outgoing("completed")), 1.0);
    assert_eq!(
        value("vmferry_migrations_total{direction=\"outgoing\",outcome=\"completed\"}"),
        1.0
    );
    let total_us = info["x-blackout"]["total-us"].as_f64().unwrap();
    let downtime = value("vmferry_downtime_seconds");
    assert!(
        (downtime * 1e6 - total_us).abs() < 1.0,
        "{downtime} {total_us}"
    );
    let parts = here
        .lines()
        .filter(|line| line.starts_with("vmferry_blackout_seconds{"));
    let parts = parts.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
    assert!((parts.sum::<f64>() - downtime).abs() < 1e-6);
    let sent = value("vmferry_sent_bytes_total{phase=\"precopy\"}")
        + value("vmferry_sent_bytes_total{phase=\"blackout\"}");
    assert_eq!(Some(sent), info["ram"]["transferred"].as_f64());
    let pages = value("vmferry_sent_pages_total{kind=\"data\"}");
    assert_eq!(Some(pages), info["ram"]["normal"].as_f64());
    let there = scrape(&at_target);
    assert_eq!(metric(&there, "vmferry_received_bytes_total"), Some(sent));
    let received = metric(&there, "vmferry_received_pages_total{kind=\"data\"}");
    assert_eq!(received, Some(pages));
    assert_eq!(
        metric(&there, "vmferry_vm_state{state=\"running\"}"),
        Some(1.0)
    );

    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let response = ask(&at_target, request);
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{response}"
        );
    }
    target.query("quit");
    target.wait_exit();
    let left = dir.path().join("metrics");
    assert!(!left.exists(), "a socket without its process");
}

fn scrapers_that_are_slow_silent_or_lost_hold_nothing_up(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let address = format!("unix:{}", path.display());
    let mut source = machine.start_source(Launch::default().with(&["--metrics", &address]));
    source.warm_up();
    let mut target = machine.target();
    // More than may be served, none of which takes an answer, some of which never ask.
    let lazy: Vec<_> = (0..40)
        .map(|number| {
            let mut stream = UnixStream::connect(&path).unwrap();
            let part = match number % 3 {
                0 => "",
                1 => "GET /metrics HTT",
                _ => "GET /metrics HTTP/1.1\r\n\r\n",
            };
            // A server that is full has hung up already.
            let _ = stream.write_all(part.as_bytes());
            stream
        })
        .collect();
    let qmp_works = source.runstate();
    assert_eq!(qmp_works, "running");
    source.move_to(&mut target);
    drop(lazy);
    until("the endpoint answers again", || {
        let mut stream = UnixStream::connect(&path).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").ok()?;
        stream.shutdown(Shutdown::Write).ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        (metric(&page, &outgoing("completed")) == Some(1.0)).then_some(())
    });
}

fn records_tell_of_success_failure_and_cancel(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| dir.path().join(name);
    let mut source =
        machine.start_source(recording(&folder("source")).with(&["--name", "<b>db</b>"]));
    source.warm_up();

    let error = source.assert_migration_fails("tcp:127.0.0.1:1", "cannot connect");
    let (_, failed) = records(&folder("source"), 1).remove(0);
    assert_eq!(failed["outcome"], "failed");
    assert_eq!(failed["error"], error);
    assert_eq!(failed["vm-name"], "<b>db</b>");
    assert_eq!(statuses(&failed), ["setup", "failing", "failed"]);
    assert_eq!(failed["rounds"], json!([]));

    let mut lost = machine.start_target("tcp:127.0.0.1:0", recording(&folder("lost")));
    source.set(json!({ "max-bandwidth": 4 << 20 }));
    let address = lost.address();
    source.migrate(&address);
    source.wait_status("active");
    until("bytes move", || {
        let ram = source.query("query-migrate")["ram"]["transferred"].as_u64();
        (ram > Some(0)).then_some(())
    });
    source.query("migrate_cancel");
    assert_eq!(source.wait_migration()["status"], "cancelled");
    lost.assert_gave_up("cancelled");
    let (_, cancelled) = records(&folder("source"), 2).remove(1);
    assert_eq!(cancelled["outcome"], "cancelled");
    assert_eq!(
        statuses(&cancelled),
        ["setup", "active", "cancelling", "cancelled"]
    );
    assert_eq!(cancelled["rounds"][0]["unfinished"], true);
    assert!(
        cancelled["totals"]["bytes"].as_u64() > Some(0),
        "{cancelled}"
    );
    let (_, there) = records(&folder("lost"), 1).remove(0);
    assert_eq!(there["outcome"], "failed");
    assert_eq!(there["migration-id"], cancelled["migration-id"]);
    assert!(
        there["error"].as_str().unwrap().contains("cancelled"),
        "{there}"
    );

    source.set(json!({ "max-bandwidth": 0 }));
    let mut target = machine.start_target("tcp:127.0.0.1:0", recording(&folder("target")));
    let info = source.move_to(&mut target);
    let (path, completed) = records(&folder("source"), 3).remove(2);
    assert_completed(&completed, &info);
    let (_, there) = records(&folder("target"), 1).remove(0);
    assert_eq!(there["side"], "target");
    assert_eq!(there["migration-id"], completed["migration-id"]);
    assert_eq!(there["totals"]["bytes"], completed["totals"]["bytes"]);
    assert_eq!(
        there["totals"]["data-pages"],
        completed["totals"]["data-pages"]
    );
    let count = |record: &Value| record["rounds"].as_array().unwrap().len();
    assert_eq!(count(&there), count(&completed));
    let name = path.file_name().unwrap().to_str().unwrap();
    let id = completed["migration-id"].as_str().unwrap();
    assert!(name.ends_with(&format!("Z-{id}-source.json")), "{name}");
}

/// The record of a completed migration agrees with what QMP says of it.
fn assert_completed(record: &Value, info: &Value) {
    assert_eq!(record["outcome"], "completed", "{record}");
    assert_eq!(statuses(record), ["setup", "active", "device", "completed"]);
    let sum = |list: &str, member: &str| -> u64 {
        let items = record[list].as_array().unwrap().iter();
        items.map(|item| item[member].as_u64().unwrap()).sum()
    };
    assert_eq!(
        info["x-blackout"]["total-us"],
        sum("blackout", "duration-us")
    );
    assert_eq!(info["ram"]["transferred"], record["totals"]["bytes"]);
    assert_eq!(info["ram"]["normal"], sum("rounds", "data-pages"));
    assert_eq!(info["ram"]["transferred"], sum("rounds", "bytes"));
    assert_eq!(info["x-round"], record["rounds"].as_array().unwrap().len());
    let samples = record["samples"].as_array().unwrap();
    assert_eq!(samples.last().unwrap()["bytes"], record["totals"]["bytes"]);
    assert_eq!(record["parameters"]["x-verify"], true);
    assert!(
        record["capabilities"]
            .as_array()
            .unwrap()
            .contains(&json!("events"))
    );
}

fn a_process_that_is_told_to_quit_leaves_a_record(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let mut source = machine.start_source(recording(dir.path()));
    source.warm_up();
    let mut target = machine.target();
    source.set(json!({ "max-bandwidth": 1 << 20 }));
    let address = target.address();
    source.migrate(&address);
    source.wait_status("active");
    source.query("quit");
    assert_eq!(source.wait_exit().code(), Some(0), "{}", source.said());
    let (_, record) = records(dir.path(), 1).remove(0);
    assert_eq!(record["outcome"], "cancelled");
}

fn a_full_disk_costs_the_record_and_nothing_else(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    // A disk of one page, full already, seen by this process only.
    let script = "mount -t tmpfs -o size=4k none \"$0\" && head -c 4096 /dev/zero >\"$0/full\" && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", script, folder];
    let probe = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg("true")
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("SKIPPED: no mount namespaces here");
        return;
    }
    let mut source = machine.start_source(recording(dir.path()).through(&wrapper));
    source.warm_up();
    let mut target = machine.target();
    source.move_to(&mut target);
    until("the source says that the record is lost", || {
        source
            .said()
            .contains("could not be written and is lost")
            .then_some(())
    });
    assert!(source.said().contains("No space left"), "{}", source.said());
    assert_eq!(source.runstate(), "postmigrate");
}

fn every_log_line_of_a_migration_names_it(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let logged = || Launch::default().with(&["--log", "debug", "--log-format", "json"]);
    let mut source = machine.start_source(logged());
    source.warm_up();
    let mut target = machine.start_target("tcp:127.0.0.1:0", logged());
    source.move_to(&mut target);
    let lines = |vm: &Vm| -> Vec<Value> {
        let said = vm.said();
        let lines = said.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
            .collect()
    };
    let mut ids = Vec::new();
    for (vm, direction, message) in [
        (&source, "outgoing", "outgoing migration"),
        (&target, "incoming", "incoming migration"),
    ] {
        let lines = lines(vm);
        let of_migration = |line: &&Value| line["fields"]["message"] == message;
        let statuses: Vec<_> = lines.iter().filter(of_migration).collect();
        assert!(statuses.len() >= 3, "{lines:?}");
        for line in statuses {
            let spans = line["spans"].as_array().unwrap();
            assert_eq!(spans[0]["name"], "migration", "{line}");
            assert_eq!(spans[0]["direction"], direction, "{line}");
            assert_eq!(spans[1]["name"], "phase", "{line}");
            assert_eq!(spans[1]["status"], line["fields"]["status"], "{line}");
            ids.push(spans[0]["id"].clone());
        }
        let in_round = |line: &Value| {
            let spans = line["spans"].as_array();
            spans.is_some_and(|spans| spans.iter().any(|span| span["name"] == "round"))
        };
        assert!(lines.iter().any(in_round), "{lines:?}");
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

/// A page in headless Chromium after its script has run, and what the console said. `None`, and a reason on the output, where there is
/// no Chromium.
fn open_in_browser(page: &Path) -> Option<(String, Vec<String>)> {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .args([
            "--kill-after=5",
            "90",
            "chromium",
            "--headless=new",
            "--no-sandbox",
        ])
        .args([
            "--disable-gpu",
            "--no-first-run",
            "--enable-logging=stderr",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(127) {
        println!("SKIPPED: no chromium here: {said}");
        return None;
    }
    assert!(output.status.success(), "{said}");
    let console = said.lines().filter(|line| line.contains(":CONSOLE"));
    let console = console.map(str::to_owned).collect();
    Some((String::from_utf8(output.stdout).unwrap(), console))
}

/// Makes a page with the command line.
fn report(dir: &TempDir, records: &[&Path]) -> PathBuf {
    let page = dir.path().join("report.html");
    let made = program()
        .arg("report")
        .args(records)
        .arg("-o")
        .arg(&page)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    page
}

fn the_page_of_a_real_migration_shows_its_plots_in_a_browser(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("records");
    let mut source =
        machine.start_source(recording(&folder).with(&["--name", "</script><b>&amp;"]));
    source.warm_up();
    let mut target = machine.start_target("tcp:127.0.0.1:0", recording(&folder));
    source.set(json!({ "multifd-channels": 3, "max-bandwidth": 50 << 20 }));
    source.move_to(&mut target);
    let records = records(&folder, 2);
    let page = report(&dir, &[&records[0].0, &records[1].0]);
    let Some((dom, console)) = open_in_browser(&page) else {
        return;
    };
    assert!(console.is_empty(), "{console:?}");
    // Set by the script at its end: how many plots it has found.
    assert!(dom.contains("<html lang=\"en\" data-plots=\"4\">"), "{dom}");
    assert_eq!(dom.matches("class=\"cursor\"").count(), 4);
    for (id, lines) in [
        ("throughput", 2),
        ("dirty-rate", 1),
        ("remaining", 1),
        ("connections", 3),
    ] {
        let (_, figure) = dom.split_once(&format!("id=\"plot-{id}\"")).unwrap();
        let (figure, _) = figure.split_once("</figure>").unwrap();
        let drawn = figure.matches("<path class=\"line").count();
        assert_eq!(drawn, lines, "{id}: {figure}");
        assert!(!figure.contains("NaN"), "{figure}");
    }
    let parts = dom.matches("class=\"part c").count();
    assert!(parts >= 3, "{parts} parts of the blackout");
    assert!(dom.contains("&lt;/script&gt;&lt;b&gt;&amp;amp;"));

    // What the checks above would see if something were wrong.
    let broken = dir.path().join("broken.html");
    let text = fs::read_to_string(&page).unwrap();
    let text = text.replacen(
        "\"use strict\";",
        "\"use strict\"; throw new Error('broken');",
        1,
    );
    fs::write(&broken, text).unwrap();
    let (dom, console) = open_in_browser(&broken).unwrap();
    assert!(
        !dom.contains("data-plots=") && !console.is_empty(),
        "{console:?}"
    );
}

#[test]
fn a_page_of_a_migration_that_failed_at_once_is_whole_too() {
    let dir = tempfile::tempdir().unwrap();
    let record = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/record/v1/good/failed.json");
    let page = report(&dir, &[&record]);
    let Some((dom, console)) = open_in_browser(&page) else {
        return;
    };
    assert!(console.is_empty(), "{console:?}");
    assert!(dom.contains("data-plots=\"0\"") && dom.contains("No pages were moved."));
}

#[test]
fn records_that_make_no_page_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/record/v1/good");
    let (source, failed) = (good.join("source.json"), good.join("failed.json"));
    let text = fs::read_to_string(&source).unwrap();
    let made = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let cut = made("cut.json", &text.as_bytes()[..text.len() / 2]);
    let newer = made(
        "newer.json",
        text.replace("\"version\":1", "\"version\":9").as_bytes(),
    );
    let other = made("other.json", b"{\"a\": 1}");
    let huge = made("huge.json", b"");
    fs::File::options()
        .write(true)
        .open(&huge)
        .and_then(|file| file.set_len(1 << 40))
        .unwrap();
    let page = dir.path().join("page.html");
    fs::write(&page, "old").unwrap();
    for (records, part) in [
        (vec![&cut], "is cut off"),
        (vec![&newer], "version 9"),
        (vec![&other], "no migration record"),
        (vec![&huge], "larger than"),
        (vec![&source, &failed], "different migrations"),
        (vec![&source, &source], "one of each side"),
    ] {
        let output = program()
            .arg("report")
            .args(&records)
            .arg("-o")
            .arg(&page)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part), "{said:?} does not name {part:?}");
        assert_eq!(fs::read_to_string(&page).unwrap(), "old");
    }
}
