//! Bytes of the serial port that go on in another process.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;

const PORT: &str = "serial/0";
const SETUP: Setup = Setup {
    mode: Mode::CprTransfer,
    migration: MigrationId([1; 16]),
};

/// An output that goes to the other end, which takes few bytes before somebody reads.
fn to_a_slow_reader() -> (SerialOutput, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
    let output = SerialOutput::open(&SerialSink::Inherited).unwrap();
    let file = DeviceFd {
        device: PORT.to_owned(),
        role: OUTPUT.to_owned(),
        kind: FdKind::Log,
        value: 0,
        fd: ours.into(),
    };
    output.take_over(PORT, &mut vec![file]).unwrap();
    output.go_on();
    (output, theirs)
}

fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
    range
        .map(|number| u8::try_from(number % 251).unwrap())
        .collect()
}

#[test]
fn bytes_that_nobody_has_read_go_along_and_each_is_written_once_in_order() {
    const MANY: usize = 40_000;
    let (old, mut reader) = to_a_slow_reader();
    old.writer().write_all(&bytes(0..MANY)).unwrap();
    let mut read = vec![0; 1000];
    reader.read_exact(&mut read).unwrap();
    let mut last = old;
    for turn in 1..4 {
        let mut fds = last.heirlooms(PORT).unwrap();
        let mut notifier = last.notifier(PORT).unwrap();
        // Once in vain.
        notifier.setup(&SETUP).unwrap();
        notifier.failed();
        let mut more = vec![0; 100];
        reader.read_exact(&mut more).unwrap();
        read.extend(more);
        fds.clear();
        fds.extend(last.heirlooms(PORT).unwrap());
        notifier.setup(&SETUP).unwrap();
        let next = SerialOutput::open(&SerialSink::Inherited).unwrap();
        next.take_over(PORT, &mut fds).unwrap();
        assert!(fds.is_empty());
        notifier.done();
        next.go_on();
        let from = MANY + (turn - 1) * 10;
        next.writer().write_all(&bytes(from..from + 10)).unwrap();
        last = next;
    }
    let mut rest = vec![0; MANY + 30 - read.len()];
    reader.read_exact(&mut rest).unwrap();
    read.extend(rest);
    assert_eq!(read, bytes(0..MANY + 30));
}

#[test]
fn nothing_is_written_before_the_guest_runs_and_what_it_writes_beyond_all_room_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let output = SerialOutput::open(&SerialSink::File(path.clone())).unwrap();
    let all = bytes(0..QUEUED_BYTES_MAX + 100);
    output.writer().write_all(&all).unwrap();
    assert!(std::fs::read(&path).unwrap().is_empty());
    output.go_on();
    drop(output);
    let written = || std::fs::read(&path).unwrap();
    while written().len() < QUEUED_BYTES_MAX {
        thread::yield_now();
    }
    assert_eq!(written(), all[..QUEUED_BYTES_MAX]);
}

#[test]
fn what_was_left_is_believed_only_if_it_can_be() {
    let heir = memfd::create_ram("serial", WAITING_BYTES).unwrap();
    leave(&heir, &VecDeque::from(bytes(0..QUEUED_BYTES_MAX))).unwrap();
    assert_eq!(read_left(&heir).unwrap().len(), QUEUED_BYTES_MAX);
    heir.write_all_at(&u64::MAX.to_le_bytes(), 0).unwrap();
    assert!(read_left(&heir).is_err());
    assert!(read_left(&File::open("/dev/null").unwrap()).is_err());
}

#[test]
fn another_process_is_asked_for_what_the_port_needs_and_no_more() {
    let entry = |role: &str, kind| FdEntry {
        name: PORT.to_owned(),
        role: role.to_owned(),
        kind,
        stage: vmferry_cpr::manifest::Stage::HandOver,
        value: 0,
        file: Default::default(),
    };
    let both = [entry(OUTPUT, FdKind::Log), entry(WAITING, FdKind::Other)];
    let file = SerialSink::File("log".into());
    for (sink, wanted) in [
        (&file, [true, true]),
        (&SerialSink::Stdio, [false, true]),
        (&SerialSink::Null, [false, false]),
    ] {
        assert_eq!(both.each_ref().map(|one| expects(PORT, sink, one)), wanted);
    }
    assert_eq!(inherited(PORT, &file, &both), SerialSink::Inherited);
    assert_eq!(inherited(PORT, &file, &[]), file);
}
