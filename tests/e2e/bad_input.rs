//! Targets and peers that do not fit: the error says what is wrong, the guest goes on at the source, and moves to a good target
//! afterwards. Strangers who talk to a listening target do not disturb it.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::thread;

use serde_json::json;
use vmferry_transport::wire::frame::{Abort, AbortCode, Ready, SourceFrame, TargetFrame};
use vmferry_transport::wire::hello::{DataHello, Hello, HelloReply, VersionRange};

use crate::harness::{Accel, Launch, Machine, Vm, kvm_is_here, program, turn};
use crate::peer::{FakeSource, FakeTarget, Peer, hello_of, reply, some_id};

on_both_accelerators!(
    a_target_of_another_shape_is_refused_and_stays_welcome_to_others,
    a_target_that_speaks_another_version_is_refused,
    strangers_do_not_keep_a_target_from_its_guest,
    a_server_that_is_no_vmferry_is_recognized,
    words_that_come_too_early_end_the_attempt,
    data_connections_that_do_not_belong_are_turned_away,
    an_address_that_leads_nowhere_is_named,
);

/// The guest is unharmed: it moves to a good target.
fn assert_moves(machine: &Machine, source: &mut Vm) {
    source.move_to(&mut machine.target());
}

fn a_target_of_another_shape_is_refused_and_stays_welcome_to_others(accel: Accel) {
    let _turn = turn();
    let machine = Machine {
        vcpus: 2,
        ..Machine::small(accel)
    };
    let mut source = machine.source();
    let with = |mem, vcpus| Machine {
        mem,
        vcpus,
        ..machine.clone()
    };
    for (other, part) in [
        (
            with("32M", 2),
            "67108864 bytes at the source and 33554432 bytes at the target",
        ),
        (
            with("128M", 2),
            "67108864 bytes at the source and 134217728 bytes at the target",
        ),
        (
            with("4G", 2),
            "67108864 bytes at the source and 3221225472 bytes at the target",
        ),
        (
            with("64M", 1),
            "device \"vcpu/1\" of the source does not exist at the target",
        ),
        (
            with("64M", 3),
            "device \"vcpu/2\" of the target does not exist at the source",
        ),
    ] {
        let mut target = other.target();
        let address = target.address();
        let error = source.assert_migration_fails(&address, part);
        assert!(error.starts_with("the target refused: "), "{error}");
        // It has lost nothing by it: whoever fits is welcome.
        assert_eq!(target.runstate(), "inmigrate");
        assert_eq!(target.query("query-migrate")["status"], json!(null));
        other.source().move_to(&mut target);
    }
    if accel == Accel::Soft && kvm_is_here() {
        let mut target = Machine {
            accel: Accel::Kvm,
            ..machine.clone()
        }
        .target();
        source.assert_migration_fails(&target.address(), "device \"");
    }
    assert_moves(&machine, &mut source);
}

fn a_target_that_speaks_another_version_is_refused(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());

    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (mut control, hello) = fake.accept_hello();
    let answer = HelloReply {
        version: 7,
        software: "vmferry 9".to_owned(),
    };
    control.say(&TargetFrame::HelloReply(answer).encode());
    control.assert_hears_abort("version 7");
    let info = source.wait_migration();
    source.assert_failed(&info, "it chose protocol version 7, offered was 1");

    let newer = Hello {
        versions: VersionRange { min: 2, max: 3 },
        migration_id: some_id(1),
        ..hello
    };
    let mut stranger = Peer::connect(&target.address());
    stranger.say(&SourceFrame::Hello(newer).encode());
    stranger.assert_abort("this side speaks 1, the peer 2 to 3");
    source.move_to(&mut target);
}

fn strangers_do_not_keep_a_target_from_its_guest(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let (mut source, mut target) = (machine.source(), machine.target());
    let hello = hello_of(&mut source);
    let address = target.address();
    // Silent, and there until the end.
    let silent: Vec<_> = (0..5).map(|_| Peer::connect(&address)).collect();
    let mut half = Peer::connect(&address);
    let bytes = SourceFrame::Hello(hello.clone()).encode();
    half.say(&bytes[..bytes.len() - 1]);

    for (bytes, part) in [
        (
            &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
            "does not speak the vmferry protocol (a frame starts with \"GET \")",
        ),
        (&[0; 64], "\\x00\\x00"),
        (&[0xff; 4000], "\\xff\\xff"),
    ] {
        let mut stranger = Peer::connect(&address);
        stranger.say(bytes);
        stranger.assert_abort(part);
    }
    // Frames of ours, at the wrong time.
    for frame in [
        SourceFrame::Commit,
        SourceFrame::Keepalive,
        SourceFrame::Abort(Abort::new(AbortCode::Internal, "no")),
    ] {
        let mut stranger = Peer::connect(&address);
        stranger.say(&frame.encode());
        stranger.assert_abort("must begin with a hello");
    }
    let mut stranger = Peer::connect(&address);
    stranger.say(&SourceFrame::Resolve(hello.migration_id).encode());
    stranger.assert_abort("is not known here");
    // Some hang up, in the middle of something or before.
    drop(Peer::connect(&address));
    let mut stranger = Peer::connect(&address);
    stranger.say(&SourceFrame::Hello(hello).encode()[..20]);
    drop(stranger);

    source.move_to(&mut target);
    drop((silent, half));
}

fn a_server_that_is_no_vmferry_is_recognized(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    for (answer, part) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
            "the target broke the protocol: the peer does not speak the vmferry protocol (a frame starts with \"HTTP\")",
        ),
        (
            b"{\"QMP\": {}}\r\n......",
            "(a frame starts with \"{\\\"QM\")",
        ),
        (b"", "migration link: the peer closed the connection"),
        (b"VMF", "closed the connection in the middle of a frame"),
    ] {
        let fake = FakeTarget::new();
        source.migrate(&fake.address());
        let (mut control, _) = fake.accept_hello();
        control.say(answer);
        control.hang_up();
        let info = source.wait_migration();
        source.assert_failed(&info, part);
    }
    assert_moves(&machine, &mut source);
}

fn words_that_come_too_early_end_the_attempt(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let ready = TargetFrame::Ready(Ready {
        load_us: 1,
        populated_bytes: 1,
        verification: None,
    });
    let running = TargetFrame::Running { resume_us: 1 };
    let fake = FakeTarget::new();
    for (frame, name) in [(&ready, "READY"), (&running, "RUNNING")] {
        source.migrate(&fake.address());
        let (mut control, _) = fake.accept_hello();
        control.say(&frame.encode());
        let part = format!("unexpected {name} while waiting for the answer to the hello");
        control.assert_hears_abort(&part);
        let info = source.wait_migration();
        source.assert_failed(&info, &part);

        // Again, when data connections and dirty log are up.
        source.migrate(&fake.address());
        let (mut control, data) = fake.accept_migration();
        control.say(&frame.encode());
        let part = format!("unexpected {name} while preparing");
        control.assert_hears_abort(&part);
        let info = source.wait_migration();
        source.assert_failed(&info, &part);
        drop(data);

        // Again, in the first round.
        source.set(json!({ "max-bandwidth": 1 << 20 }));
        source.migrate(&fake.address());
        let (mut control, data) = fake.accept_migration();
        control.say(&TargetFrame::DataReady.encode());
        source.wait_status("active");
        control.say(&frame.encode());
        let part = format!("unexpected {name} while sending a round");
        control.assert_hears_abort(&part);
        let info = source.wait_migration();
        source.assert_failed(&info, &part);
        source.set(json!({ "max-bandwidth": 0 }));
        drop(data);
    }
    // Words of the other side, and no words at all.
    for bytes in [SourceFrame::Commit.encode(), vec![0; 100]] {
        let fake = FakeTarget::new();
        source.migrate(&fake.address());
        let (mut control, _) = fake.accept_hello();
        control.say(&reply().encode());
        control.say(&bytes);
        let info = source.wait_migration();
        source.assert_failed(&info, "the target broke the protocol");
    }
    // A target that has a reason to refuse is believed.
    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (mut control, _) = fake.accept_hello();
    let abort = Abort::new(AbortCode::Busy, "too tired today");
    control.say(&TargetFrame::Abort(abort).encode());
    let info = source.wait_migration();
    source.assert_failed(&info, "the target refused: too tired today");
    assert_moves(&machine, &mut source);
}

fn data_connections_that_do_not_belong_are_turned_away(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    // With time for everybody to be turned away.
    let patient = Launch::default().with(&["--x-deadline-scale", "300"]);
    let mut target = machine.start_target("tcp:127.0.0.1:0", patient);
    let mut source = machine.source();
    let hello = Hello {
        data_connections: 3,
        migration_id: some_id(2),
        ..hello_of(&mut source)
    };
    let mut early = Peer::connect(&target.address());
    let stray = DataHello {
        version: 1,
        migration_id: hello.migration_id,
        index: 0,
        count: 3,
    };
    early.say(&SourceFrame::DataHello(stray).encode());
    early.assert_abort("no data connection of migration");

    let mut fake = FakeSource::new(&hello, &mut target);
    let good = fake.data_hello(0);
    let first = fake.open(good);
    for (bad, part) in [
        (
            DataHello {
                migration_id: some_id(3),
                ..good
            },
            "no data connection of migration",
        ),
        (DataHello { count: 4, ..good }, "contradicts the hello"),
        (DataHello { version: 2, ..good }, "contradicts the hello"),
        (good, "data connection 0 of migration"),
    ] {
        fake.open(bad).assert_abort(part);
    }
    // Somebody else wants to migrate meanwhile.
    source.assert_migration_fails(&target.address(), "busy with another migration");
    // The attempt itself has not suffered.
    assert_eq!(target.status(), "setup");
    let second = fake.open(fake.data_hello(1));
    let third = fake.open(fake.data_hello(2));
    assert_eq!(fake.control.hear_more(), Some(TargetFrame::DataReady));
    fake.open(fake.data_hello(2))
        .assert_abort("no data connection of migration");
    assert_eq!(target.status(), "active");
    drop((first, second, third));
    target.assert_gave_up("data connection");
    assert_moves(&machine, &mut source);
}

fn an_address_that_leads_nowhere_is_named(accel: Accel) {
    let _turn = turn();
    let machine = Machine::small(accel);
    let mut source = machine.source();
    let dir = source.dir().to_owned();
    let file = dir.join("file");
    std::fs::write(&file, "no socket").unwrap();
    // Nobody listens where a port was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = format!("tcp:{}", free.local_addr().unwrap());
    drop(free);
    for (address, part) in [
        (refused.as_str(), "Connection refused"),
        (
            "tcp:no-such-host.invalid:4444",
            "cannot resolve the host name of tcp:no-such-host.invalid:4444",
        ),
        ("tcp:127.0.0.1:0", "this port is for listening only"),
        (
            &format!("unix:{}/nobody", dir.display()),
            "No such file or directory",
        ),
        (&format!("unix:{}", file.display()), "Connection refused"),
    ] {
        let error = source.assert_migration_fails(address, part);
        assert!(error.contains(address), "{error}");
    }
    for (address, part) in [
        ("tcp:localhost", "port"),
        ("carrier-pigeon:4", "tcp:HOST:PORT"),
        ("unix:", "path"),
    ] {
        let refusal = source.refusal("migrate", json!({ "uri": address }));
        assert!(refusal.contains(part), "{refusal}");
    }
    assert_moves(&machine, &mut source);
}

#[test]
fn an_address_in_use_is_an_error_of_the_one_who_wants_it() {
    let _turn = turn();
    let machine = Machine::small(Accel::Soft);
    let mut holder = machine.target();
    let dir = holder.dir().to_owned();
    let path = dir.join("taken");
    let socket = UnixListener::bind(&path).unwrap();
    let file = dir.join("file");
    std::fs::write(&file, "precious").unwrap();
    let mut deferred = machine.target_at("defer");
    for (address, part) in [
        (holder.address(), "Address already in use"),
        (
            format!("unix:{}", path.display()),
            "another process is listening there",
        ),
        (
            format!("unix:{}", file.display()),
            "exists and is not a socket",
        ),
        (
            "tcp:no-such-host.invalid:1".to_owned(),
            "cannot resolve the host name",
        ),
        ("tcp:192.0.2.1:1".to_owned(), "cannot listen on"),
    ] {
        let launch = Launch::default().with(&["--mem", "64M", "--incoming", &address]);
        let said = Vm::try_start("target", &launch).err().unwrap();
        assert!(said.contains(part) && said.contains(&address), "{said}");
        let refusal = deferred.refusal("migrate-incoming", json!({ "uri": address }));
        assert!(
            refusal.contains(part) && refusal.contains(&address),
            "{refusal}"
        );
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    drop(socket);
    // A socket that nobody listens at any more is in nobody's way.
    let stale = format!("unix:{}", path.display());
    deferred.execute("migrate-incoming", json!({ "uri": stale }));
    machine.source().move_to(&mut deferred);
    machine.source().move_to(&mut holder);
}

#[test]
fn the_command_line_names_what_is_wrong() {
    let _turn = turn();
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    let mut target = Machine {
        mem: "32M",
        ..machine.clone()
    }
    .target();
    let output = program()
        .args(["migrate", "--qmp"])
        .arg(source.qmp_path())
        .arg(target.address())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for part in [
        "67108864 bytes at the source and 33554432 bytes at the target",
        "--mem",
        "the guest goes on running at the source",
    ] {
        assert!(said.contains(part), "{said}");
    }
    source.assert_guest_works();
}

// Cases that wait for a deadline of the protocol; they do little else and take no turn.

#[test]
fn silence_ends_at_the_deadline() {
    let machine = Machine::small(Accel::Soft);
    let mut source = machine.source();
    let fake = FakeTarget::new();
    let mut target = machine.target();
    let address = target.address();
    let mut silent = Peer::connect(&address);
    source.migrate(&fake.address());
    let (mut control, _) = fake.accept_hello();
    // The target has waited as long as the source.
    let info = source.wait_migration();
    source.assert_failed(&info, "did not answer the hello within 10 s");
    control.assert_hears_abort("did not answer the hello");
    assert_eq!(silent.hear_more(), None);
    source.move_to(&mut target);
}

#[test]
fn data_connections_that_never_come_end_at_the_deadline() {
    let machine = Machine::small(Accel::Soft);
    let (mut source, mut target) = (machine.source(), machine.target());
    let hello = Hello {
        migration_id: some_id(4),
        data_connections: 2,
        ..hello_of(&mut source)
    };
    let mut half = FakeSource::new(&hello, &mut target);
    let _data = half.open(half.data_hello(0));
    // The other way round: a target that takes all connections and says nothing.
    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (mut control, _data) = fake.accept_migration();
    let keepalives = thread::spawn(move || {
        while let Some(frame) = control.hear::<SourceFrame>() {
            match frame {
                SourceFrame::Keepalive => control.say(&TargetFrame::Keepalive.encode()),
                SourceFrame::Abort(abort) => return abort,
                other => panic!("{other:?}"),
            }
        }
        panic!("no reason was given")
    });
    half.control
        .assert_abort("only 1 of 2 data connections arrived within 20 s");
    target.assert_gave_up("only 1 of 2 data connections arrived within 20 s");
    let info = source.wait_migration();
    let part = "did not accept all data connections within 20 s";
    source.assert_failed(&info, part);
    assert!(keepalives.join().unwrap().reason.contains(part));
    assert_moves(&machine, &mut source);
}

#[test]
fn a_target_that_takes_no_pages_is_given_up() {
    let machine = Machine {
        fill: "32M",
        ..Machine::small(Accel::Soft)
    };
    let mut source = machine.source();
    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (mut control, data) = fake.accept_migration();
    control.say(&TargetFrame::DataReady.encode());
    let alive = thread::spawn(move || {
        while let Some(frame) = control.hear::<SourceFrame>() {
            match frame {
                SourceFrame::Keepalive => control.say(&TargetFrame::Keepalive.encode()),
                SourceFrame::Abort(abort) => return abort,
                other => panic!("{other:?}"),
            }
        }
        panic!("no reason was given")
    });
    let info = source.wait_migration();
    source.assert_failed(&info, "did not take any page within 30 s");
    assert!(alive.join().unwrap().reason.contains("take any page"));
    drop(data);
    assert_moves(&machine, &mut source);
}

impl Peer {
    /// The source gives up and says why.
    fn assert_hears_abort(&mut self, part: &str) {
        loop {
            match self.hear::<SourceFrame>() {
                Some(SourceFrame::Abort(abort)) => {
                    assert!(abort.reason.contains(part), "{abort:?}");
                    return;
                }
                Some(SourceFrame::Keepalive) => {}
                other => panic!("{other:?} instead of a reason with {part:?}"),
            }
        }
    }
}
