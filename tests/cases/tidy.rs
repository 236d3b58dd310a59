//! Rules of the house that neither the compiler nor clippy checks, read off the sources and manifests.
//!
//! Every rule is a function from a file to the places that break it, so that a test can show it such a place. A rule that must be
//! broken has its list of exceptions here, each with its reason: a longer list shows up in review.

mod source;

use source::{SourceFile, code_only, files, imports, line_of, without_tests, words};

use crate::root;

/// The only files that may contain `unsafe`, and what for. ARCHITECTURE.md repeats the list for readers.
const UNSAFE_FILES: &[(&str, &str)] = &[
    (
        "transport/src/uring/ring.rs",
        "submits operations on raw addresses; a slab owns the memory until the last completion",
    ),
    (
        "transport/src/data/lent.rs",
        "message buffers that are guest pages, lent to the kernel by address",
    ),
    (
        "transport/src/memory/ram.rs",
        "vouches for the addresses of vm-memory's mappings",
    ),
    (
        "transport/src/memory/zero.rs",
        "volatile access to guest pages",
    ),
    (
        "devices/src/kvm/ioctl.rs",
        "KVM calls that kvm-ioctls lacks or cannot check",
    ),
    (
        "devices/src/soft/ioctl.rs",
        "userfaultfd and PAGEMAP_SCAN, which no crate covers",
    ),
    (
        "devices/src/vfio/attach.rs",
        "VFIO's ioctls for containers, groups and devices whose descriptors came from elsewhere, which no crate covers",
    ),
    (
        "devices/src/vfio/ioctl.rs",
        "VFIO's migration ioctls for descriptors that a VMM owns, which no crate covers",
    ),
    (
        "devices/src/vhost/ioctl.rs",
        "what crate vhost asks only of descriptors that it has opened itself, and taps",
    ),
    (
        "service/src/machine/disk/lock.rs",
        "fcntl with a struct flock, which no crate here offers for locks of open file descriptions",
    ),
    (
        "service/src/succession/call.rs",
        "execve, taking descriptors by their numbers after it, removing the variable that names them, and the child that clears up",
    ),
    (
        "service/src/machine/workload/image.rs",
        "the guest program in assembly, and its bytes",
    ),
    (
        "tests/lab/vfio.rs",
        "asks VFIO devices what they are, without the code under test",
    ),
    (
        "benches/src/raw_copy.rs",
        "the raw copy of mapped RAM that the data path is measured beside",
    ),
];

/// Files longer than [`LINES_MAX`], and why they are not two.
const LONG_FILES: &[(&str, &str)] = &[];

/// A longer file is a question: does it hold two things?
const LINES_MAX: usize = 700;

/// Sans-I/O modules: decisions and formats without clock, socket, thread, randomness or guest bytes.
const CORES: &[&str] = &[
    "cpr/src/give.rs",
    "cpr/src/letter.rs",
    "cpr/src/manifest.rs",
    "cpr/src/message.rs",
    "cpr/src/table.rs",
    "cpr/src/take.rs",
    "transport/src/wire/",
    "transport/src/proto/",
    "transport/src/units.rs",
    "transport/src/memory/bitmap.rs",
    "devices/src/vfio/states.rs",
    "service/src/migration/",
    "service/src/observe/record/series.rs",
    "service/src/observe/watch.rs",
    "service/src/qmp/catalog.rs",
    "service/src/qmp/channels.rs",
    "service/src/qmp/codec.rs",
    "service/src/qmp/command.rs",
    "service/src/qmp/dispatch.rs",
    "service/src/qmp/introspect.rs",
    "service/src/qmp/session.rs",
    "service/src/qmp/types.rs",
];

/// What a core may not name.
const FORBIDDEN_IN_CORES: &[&str] = &[
    "std::env",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "io_uring",
    "kvm_bindings",
    "kvm_ioctls",
    "libc",
    "rand",
    "rustix",
    "socket2",
    "tokio",
    "tokio_uring",
    "vm_memory",
];

/// Which of our crates a crate may depend on. `devices` and `cpr` do not know each other; nobody depends on tests or benches.
const EDGES: &[(&str, &[&str])] = &[
    ("vmferry-transport", &[]),
    ("vmferry-devices", &["vmferry-transport"]),
    ("vmferry-cpr", &["vmferry-transport"]),
    (
        "vmferry",
        &["vmferry-transport", "vmferry-devices", "vmferry-cpr"],
    ),
    (
        "vmferry-tests",
        &[
            "vmferry-transport",
            "vmferry-devices",
            "vmferry-cpr",
            "vmferry",
        ],
    ),
    (
        "vmferry-benches",
        &[
            "vmferry-transport",
            "vmferry-devices",
            "vmferry-cpr",
            "vmferry",
        ],
    ),
];

/// Crates that belong to certain layers, and which of our crates those are.
const KEPT_TO: &[(&str, &[&str])] = &[
    (
        "kvm-ioctls",
        &["vmferry-devices", "vmferry", "vmferry-tests"],
    ),
    ("kvm-bindings", &["vmferry-devices", "vmferry"]),
    ("vfio-ioctls", &["vmferry-devices", "vmferry"]),
    ("vfio-bindings", &["vmferry-devices", "vmferry"]),
    ("vhost", &["vmferry-devices", "vmferry"]),
    ("memfd", &["vmferry-cpr"]),
    ("io-uring", &["vmferry-transport"]),
    ("tokio-uring", &["vmferry-transport", "vmferry"]),
    ("clap", &["vmferry", "vmferry-benches"]),
    ("anyhow", &["vmferry", "vmferry-tests", "vmferry-benches"]),
];

/// Where an address in a text file may point. Everything else is a name that only some machines can resolve.
const URL_HOSTS: &[&str] = &[
    "www.apache.org/licenses",
    "keepachangelog.com/",
    "semver.org/",
    "github.com/rust-lang/", // the name of the standard registry in Cargo.lock
    "github.com/rust-vmm/",
    "127.0.0.1",
    "localhost",
    "[::1]",
];

/// Places of one machine, and hosts of package registries: neither belongs into the repository. Put together from halves so that
/// this file does not break its own rule.
const PLACES: &[&str] = &[
    concat!("/work/", "main"),
    concat!("/work/", "shared"),
    concat!("/work/", "."),
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("crates", ".io/"),
    concat!("static.crates", ".io"),
    concat!("index.crates", ".io"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("debian", ".org"),
    concat!("npmjs", ".org"),
];

/// Words that mark unfinished work.
const LEFTOVERS: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("dbg", "!("),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
];

/// File names that say nothing of what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "base", "helpers", "misc"];

/// One place that breaks a rule.
fn place(file: &SourceFile, line: usize, what: &str) -> String {
    format!("{}:{line}: {what}", file.path)
}

/// Runs a rule over all files and fails with every place that breaks it and what to do.
fn check(what_to_do: &str, rule: impl Fn(&SourceFile) -> Vec<String>) {
    let broken: Vec<_> = files().iter().flat_map(rule).collect();
    assert!(
        broken.is_empty(),
        "{what_to_do}\n\n  {}\n",
        broken.join("\n  ")
    );
}

fn unsafe_places(file: &SourceFile) -> Vec<String> {
    if !file.is_rust() {
        return Vec::new();
    }
    let code = code_only(&file.text);
    words(&code, "unsafe")
        .chain(words(&code, "expect(unsafe_code"))
        .map(|at| place(file, line_of(&code, at), "unsafe code"))
        .collect()
}

#[test]
fn unsafe_code_stays_in_the_listed_files() {
    check(
        "Unsafe code is kept to few files. Use a safe face of one of them, or add the file to UNSAFE_FILES in \
         tests/cases/tidy.rs and to the table in ARCHITECTURE.md, with the reason.",
        |file| {
            if UNSAFE_FILES.iter().any(|(path, _)| *path == file.path) {
                return Vec::new();
            }
            unsafe_places(file)
        },
    );
}

#[test]
fn the_list_of_unsafe_files_is_current() {
    let files = files();
    let architecture = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap_or_default();
    for (path, _reason) in UNSAFE_FILES {
        let file = files.iter().find(|file| file.path == *path);
        assert!(
            file.is_some_and(|file| !unsafe_places(file).is_empty()),
            "{path} has no unsafe code or is gone: take it off UNSAFE_FILES in tests/cases/tidy.rs and out of ARCHITECTURE.md"
        );
        assert!(
            architecture.contains(&format!("`{path}`")),
            "ARCHITECTURE.md does not name {path} among the files with unsafe code"
        );
    }
}

fn core_violations(file: &SourceFile) -> Vec<String> {
    let is_core = CORES.iter().any(|core| file.path.starts_with(core));
    if !is_core || file.path.ends_with("/tests.rs") {
        return Vec::new();
    }
    let code = code_only(&file.text);
    let code = without_tests(&code);
    let imported = imports(code).into_iter().filter_map(|(line, path)| {
        let forbidden = FORBIDDEN_IN_CORES.iter().find(|forbidden| {
            path.strip_prefix(**forbidden)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        })?;
        Some(place(file, line, &format!("imports {forbidden}")))
    });
    let spelled_out = FORBIDDEN_IN_CORES.iter().flat_map(|forbidden| {
        let path = format!("{forbidden}::");
        let offsets: Vec<_> = words_before_path(code, &path);
        offsets
            .into_iter()
            .map(|at| place(file, line_of(code, at), &format!("uses {forbidden}")))
            .collect::<Vec<_>>()
    });
    imported.chain(spelled_out).collect()
}

/// Where `path` (ending in `::`) starts, not as the end of a longer name or path.
fn words_before_path(code: &str, path: &str) -> Vec<usize> {
    code.match_indices(path)
        .map(|(at, _)| at)
        .filter(|&at| {
            !code[..at]
                .chars()
                .next_back()
                .is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
        })
        .collect()
}

#[test]
fn cores_do_no_io_and_read_no_clock() {
    check(
        "A core takes facts and the time as arguments and returns what is to be done; the driver around it does the I/O \
         (ARCHITECTURE.md, \"Cores and drivers\"). Move this out of the core.",
        core_violations,
    );
}

/// What `cargo metadata` says of our packages: name, and the names of what each depends on, in any way.
fn manifests() -> Vec<(String, Vec<String>)> {
    let output = std::process::Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap();
            (
                text(&package["name"]),
                dependencies.iter().map(|on| text(&on["name"])).collect(),
            )
        })
        .collect()
}

fn edge_violations(manifests: &[(String, Vec<String>)]) -> Vec<String> {
    let mut broken = Vec::new();
    for (package, dependencies) in manifests {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| name == package) else {
            broken.push(format!("{package} is not in EDGES of tests/cases/tidy.rs"));
            continue;
        };
        for on in dependencies {
            let is_ours = EDGES.iter().any(|(name, _)| name == on);
            // A package may name itself to switch on a feature for its tests.
            if is_ours && on != package && !allowed.contains(&on.as_str()) {
                broken.push(format!("{package} depends on {on}"));
            }
            if let Some((_, keepers)) = KEPT_TO.iter().find(|(name, _)| name == on)
                && !keepers.contains(&package.as_str())
            {
                broken.push(format!(
                    "{package} depends on {on}, which is kept to {keepers:?}"
                ));
            }
        }
    }
    broken
}

#[test]
fn crates_depend_on_each_other_only_downwards() {
    let manifests = manifests();
    assert_eq!(
        manifests.len(),
        EDGES.len(),
        "a package is missing: {manifests:?}"
    );
    let broken = edge_violations(&manifests);
    assert!(
        broken.is_empty(),
        "A trait lives with the crate that needs it, so that no arrow turns round (ARCHITECTURE.md, \"Crates\"):\n\n  {}\n",
        broken.join("\n  ")
    );
}

fn leftovers(file: &SourceFile) -> Vec<String> {
    if file.path == "Cargo.lock" {
        return Vec::new();
    }
    let lines = file.text.lines().zip(1..);
    lines
        .flat_map(|(text, line)| {
            LEFTOVERS
                .iter()
                .filter(move |word| text.contains(**word))
                .map(move |word| place(file, line, word))
        })
        .collect()
}

#[test]
fn nothing_is_left_for_later_in_the_sources() {
    check(
        "Do it now, or open an issue and say in the documentation what is missing.",
        leftovers,
    );
}

fn missing_header(file: &SourceFile) -> Vec<String> {
    if !file.is_rust() {
        return Vec::new();
    }
    // Attributes of the whole file may stand before the header.
    let mut in_attribute = false;
    for (line, number) in file.text.lines().map(str::trim).zip(1..) {
        if in_attribute || line.starts_with("#![") {
            in_attribute = !line.ends_with(']');
        } else if line.starts_with("//!") {
            return Vec::new();
        } else if !line.is_empty() {
            return vec![place(file, number, "the file does not begin with `//!`")];
        }
    }
    vec![place(file, 1, "the file has no `//!`")]
}

#[test]
fn every_source_file_says_what_it_is_for() {
    check(
        "Begin the file with a `//!` comment: what it holds, who calls it, what may be relied on.",
        missing_header,
    );
}

fn too_long(file: &SourceFile) -> Vec<String> {
    let lines = file.text.lines().count();
    let excepted = LONG_FILES.iter().any(|(path, _)| *path == file.path);
    if !file.is_rust() || lines <= LINES_MAX || excepted {
        return Vec::new();
    }
    vec![place(file, lines, &format!("{lines} lines"))]
}

#[test]
fn files_can_be_read_in_one_sitting() {
    check(
        "Does the file hold two things? Then make it two. If it does not, add it to LONG_FILES in tests/cases/tidy.rs with the \
         reason.",
        too_long,
    );
    for (path, _reason) in LONG_FILES {
        assert!(
            root().join(path).exists(),
            "{path} is gone: take it off LONG_FILES in tests/cases/tidy.rs"
        );
    }
}

fn empty_name(file: &SourceFile) -> Vec<String> {
    let named_so = file
        .path
        .split('/')
        .any(|part| EMPTY_NAMES.contains(&part.strip_suffix(".rs").unwrap_or(part)));
    if named_so {
        vec![place(file, 1, "a name that fits anything")]
    } else {
        Vec::new()
    }
}

#[test]
fn files_are_named_after_what_they_hold() {
    check("Name the file after the thing inside.", empty_name);
}

fn foreign_places(file: &SourceFile) -> Vec<String> {
    let mut broken = Vec::new();
    for (text, line) in file.text.lines().zip(1..) {
        // The lock file names the standard registry by a fixed string that cargo chooses.
        if file.path == "Cargo.lock" && text.starts_with("source = \"registry+") {
            continue;
        }
        broken.extend(
            PLACES
                .iter()
                .filter(|found| text.contains(**found))
                .map(|found| place(file, line, found)),
        );
        broken.extend(
            text.match_indices("://")
                .map(|(at, separator)| (&text[..at], &text[at + separator.len()..]))
                .filter(|(scheme, rest)| {
                    (scheme.ends_with("http") || scheme.ends_with("https"))
                        && !URL_HOSTS.iter().any(|host| rest.starts_with(host))
                })
                .map(|(_, rest)| place(file, line, rest)),
        );
    }
    broken
}

#[test]
fn no_file_names_a_registry_host_or_a_path_of_one_machine() {
    check(
        "Name packages, not the hosts they come from, and paths from the root of the repository. An address that readers need \
         goes into URL_HOSTS in tests/cases/tidy.rs.",
        foreign_places,
    );
}

fn ignored_without_reason(file: &SourceFile) -> Vec<String> {
    if !file.is_rust() {
        return Vec::new();
    }
    let code = code_only(&file.text);
    code.match_indices("#[ignore]")
        .map(|(at, _)| place(file, line_of(&code, at), "#[ignore] without a reason"))
        .collect()
}

#[test]
fn ignored_tests_say_why() {
    check(
        "#[ignore = \"why\"] is for tests too slow for a debug build; the release run includes them. A test that lacks something \
         prints a line `SKIPPED: why` and returns: `.ci/check` counts these.",
        ignored_without_reason,
    );
}

/// What stands between backticks in a text, outside of code blocks.
fn quoted(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut in_block = false;
    for (line, number) in text.lines().zip(1..) {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            found.extend(
                line.split('`')
                    .skip(1)
                    .step_by(2)
                    .map(|quoted| (number, quoted)),
            );
        }
    }
    found
}

/// Whether a quoted word of a document means a file or folder of ours.
fn is_path(word: &str) -> bool {
    let plain = word
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let ours = [
        "service/",
        "transport/",
        "devices/",
        "cpr/",
        "tests/",
        "benches/",
        ".ci/",
    ];
    plain && ours.iter().any(|folder| word.starts_with(folder))
}

/// Whether a quoted word of a document means a test: names of tests are sentences. Those of metrics are compared elsewhere.
fn is_test_name(word: &str) -> bool {
    word.matches('_').count() >= 3
        && !word.starts_with("vmferry_")
        && word
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

#[test]
fn what_the_documents_point_to_exists() {
    let files = files();
    let tests: Vec<_> = files.iter().filter(|file| file.is_rust()).collect();
    let mut broken = Vec::new();
    for document in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (line, word) in quoted(&document.text) {
            if is_path(word) && !root().join(word).exists() {
                broken.push(place(document, line, &format!("there is no {word}")));
            }
            let declared = format!("fn {word}(");
            if is_test_name(word) && !tests.iter().any(|file| file.text.contains(&declared)) {
                broken.push(place(document, line, &format!("there is no test {word}")));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "A document speaks of what is gone or was renamed:\n\n  {}\n",
        broken.join("\n  ")
    );
}

#[test]
fn every_invariant_is_named_where_it_is_tested() {
    let files = files();
    for invariant in ["I1", "I2", "I3", "I4", "I5", "I6", "I7"] {
        let named = |file: &SourceFile| {
            file.is_rust()
                && file.path.starts_with("tests/")
                && !file.path.starts_with("tests/cases/tidy")
                && words(&file.text, invariant).next().is_some()
        };
        assert!(
            files.iter().any(named),
            "no file in tests/ says that it checks {invariant}"
        );
    }
}

#[test]
fn the_rules_notice_what_breaks_them() {
    let file = |path: &str, text: &str| SourceFile {
        path: path.to_owned(),
        text: text.to_owned(),
    };
    let breaks = |rule: fn(&SourceFile) -> Vec<String>, path: &str, text: &str| {
        assert!(!rule(&file(path, text)).is_empty(), "{path}: {text}");
    };
    breaks(unsafe_places, "a.rs", "fn f() { unsafe { g() } }");
    breaks(
        unsafe_places,
        "a.rs",
        "#![expect(unsafe_code, reason = \"assembly\")]",
    );
    let core = "transport/src/proto/source.rs";
    breaks(
        core_violations,
        core,
        "use std::{cmp, time::{Duration, Instant}};",
    );
    breaks(core_violations, core, "fn f() { std::thread::yield_now() }");
    breaks(core_violations, core, "use tokio::net;");
    assert!(
        core_violations(&file(
            core,
            "use std::time::Duration; use crate::libc_free::tokio_less;"
        ))
        .is_empty()
    );
    assert!(
        core_violations(&file(core, "#[cfg(test)]\nmod tests { use std::thread; }")).is_empty()
    );
    breaks(leftovers, "a.md", concat!("TO", "DO: finish"));
    breaks(missing_header, "a.rs", "#![expect(\n    lint\n)]\n\nuse a;");
    assert!(missing_header(&file("a.rs", "#![expect(\n    lint\n)]\n\n//! Says it.")).is_empty());
    breaks(too_long, "a.rs", &"\n".repeat(LINES_MAX + 1));
    breaks(empty_name, "transport/src/util/mod.rs", "");
    breaks(
        foreign_places,
        "a.md",
        concat!("see https", "://mirror.invalid/x"),
    );
    breaks(foreign_places, "a.sh", concat!("cd /work/", "main"));
    breaks(ignored_without_reason, "a.rs", "#[ignore]\nfn f() {}");
    let edges = |package: &str, on: &str| {
        edge_violations(&[(package.to_owned(), vec![on.to_owned()])]).len()
    };
    assert_eq!(edges("vmferry-devices", "vmferry-cpr"), 1);
    assert_eq!(edges("vmferry-transport", "kvm-ioctls"), 1);
    assert_eq!(edges("vmferry", "vmferry-cpr"), 0);
}
