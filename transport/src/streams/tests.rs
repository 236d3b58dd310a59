//! Shared sockets, outlets and inlets on their own; whole archives are saved and loaded in `tests/e2e/streams.rs`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::limits::Deadlines;
use crate::units::MigrationId;
use crate::wire::archive::ArchiveEncoder;
use crate::wire::frame::SourceFrame;
use crate::wire::hello::{Hello, VersionRange};
use crate::wire::mux::{Channel, PIECE_BYTES_MAX, PieceHeader};

/// Far longer than anything here takes; a test that needs it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn tcp_pair() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    (ours.into(), theirs.into())
}

/// A side of a shared socket under test.
struct Side {
    mux: Mux,
    opened: mpsc::Receiver<OwnedFd>,
    ended: mpsc::Receiver<String>,
}

impl Side {
    fn new(socket: OwnedFd, opens: bool) -> Self {
        let (open, opened) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let connect: loader::Connect = Box::new(move |socket| open.send(socket).unwrap());
        let ended_box = Box::new(move |why| {
            // A test that is over does not look.
            let _ = end.send(why);
        });
        let connect = (!opens).then_some(connect);
        let mux = Mux::start(
            socket,
            Vec::new(),
            &Deadlines::default(),
            connect,
            ended_box,
        )
        .unwrap();
        Self { mux, opened, ended }
    }

    fn open(&self, channel: Channel) -> UnixStream {
        stream(self.mux.open(channel).unwrap())
    }

    fn opened(&self) -> UnixStream {
        stream(self.opened.recv_timeout(PATIENCE).unwrap())
    }

    fn ended(&self) -> String {
        self.ended.recv_timeout(PATIENCE).unwrap()
    }
}

fn stream(socket: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn assert_ends(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn two_connections_share_a_socket_without_mixing() {
    let (a, b) = tcp_pair();
    let (source, target) = (Side::new(a, true), Side::new(b, false));
    let mut control = source.open(Channel::Control);
    assert!(source.mux.open(Channel::Control).is_err());
    control.write_all(b"hello").unwrap();
    let mut target_control = target.opened();
    let mut said = [0; 5];
    target_control.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    target_control.write_all(b"reply").unwrap();
    control.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"reply");

    let mut data = source.open(Channel::Data);
    data.write_all(&[0]).unwrap();
    let mut target_data = target.opened();
    let pages: Vec<u8> = (0..3_000_000_u32).map(|at| at.to_le_bytes()[1]).collect();
    let sender = {
        let pages = pages.clone();
        thread::spawn(move || {
            data.write_all(&pages).unwrap();
            data
        })
    };
    // The control connection is not held up by data that nobody takes.
    control.write_all(b"words").unwrap();
    target_control.write_all(b"reply").unwrap();
    control.read_exact(&mut said).unwrap();
    let mut received = vec![0; 1 + pages.len()];
    target_data.read_exact(&mut received).unwrap();
    assert!(received[1..] == pages[..]);
    target_control.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"words");

    // The end of one is no end of the other; what was said before it arrives.
    drop(sender.join().unwrap());
    assert_ends(&mut target_data);
    control.write_all(b"finis").unwrap();
    drop(control);
    source.mux.close();
    target_control.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"finis");
    assert_ends(&mut target_control);
    drop((target_control, target_data));
    target.mux.close();
    assert!(target.ended().contains("closed"));
    source.ended();
}

#[test]
fn whoever_loses_a_shared_socket_sees_both_connections_end() {
    let (a, b) = tcp_pair();
    let source = Side::new(a, true);
    let (mut control, mut data) = (source.open(Channel::Control), source.open(Channel::Data));
    drop(b);
    assert_ends(&mut control);
    assert_ends(&mut data);
    source.ended();
}

#[test]
fn a_peer_that_shares_nothing_or_breaks_the_format_is_named() {
    let piece = |channel, bytes| PieceHeader { channel, bytes }.encode();
    let too_long = piece(Channel::Data, PIECE_BYTES_MAX + 1);
    let end = piece(Channel::Control, 0);
    let one = [&piece(Channel::Control, 1)[..], b"x"].concat();
    let after_end = [&one[..], &end, &end].concat();
    let cases: [(&[u8], &str); 5] = [
        (b"VMFY and so on", "must use fd: too"),
        (&too_long, "too long"),
        (&end, "a channel that nobody opened"),
        (&after_end, "after the end of a channel"),
        (&one[..12], "closed"),
    ];
    for (bytes, part) in cases {
        let (a, b) = tcp_pair();
        let target = Side::new(a, false);
        let mut peer = TcpStream::from(b);
        peer.write_all(bytes).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let why = target.ended();
        assert!(why.contains(part), "{why:?} does not say {part:?}");
        if let Ok(opened) = target.opened.try_recv() {
            let mut all = Vec::new();
            stream(opened).read_to_end(&mut all).unwrap();
            assert_eq!(all, b"x");
        }
    }
}

#[test]
fn a_peer_that_takes_nothing_cannot_hold_up_the_close() {
    let (a, _b) = tcp_pair();
    let source = Side::new(a, true);
    let mut data = source.open(Channel::Data);
    data.set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    while data.write_all(&[0; 65536]).is_ok() {}
    source.mux.close();
    source.ended();
}

#[test]
fn descriptors_are_told_apart() {
    let kind = |fd: OwnedFd| fd_kind(&fd).unwrap();
    let (reader, writer) = io::pipe().unwrap();
    assert_eq!(kind(reader.into()), FdKind::Pipe);
    assert_eq!(kind(writer.into()), FdKind::Pipe);
    let (a, _b) = UnixStream::pair().unwrap();
    assert_eq!(kind(a.into()), FdKind::Connected);
    assert_eq!(kind(tcp_pair().0), FdKind::Connected);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(kind(listener.into()), FdKind::Listening);
    let unbound = UnixDatagram::unbound().unwrap();
    assert_eq!(kind(unbound.into()), FdKind::Other);
    let null = File::open("/dev/null").unwrap();
    assert_eq!(kind(null.into()), FdKind::File);
    let folder = File::open("/").unwrap();
    assert_eq!(kind(folder.into()), FdKind::Other);
}

#[test]
fn the_wrong_end_of_a_pipe_is_refused() {
    let (reader, writer) = io::pipe().unwrap();
    let error = Outlet::pipe("fd:a", reader.into()).unwrap_err().to_string();
    assert_eq!(error, "fd:a: this is the reading end of a pipe");
    let error = Inlet::pipe("fd:b", writer.into()).unwrap_err().to_string();
    assert_eq!(error, "fd:b: this is the writing end of a pipe");
}

#[test]
fn a_wait_that_would_last_for_ever_is_interrupted() {
    let (reader, writer) = io::pipe().unwrap();
    let mut outlet = Outlet::pipe("fd:a", writer.into()).unwrap();
    let interrupt = outlet.interrupt();
    let blocked = thread::spawn(move || outlet.put(&vec![0; 4 << 20]).unwrap_err());
    // It is full when this is there, and blocked then or soon.
    let mut first = [0; 1];
    (&reader).read_exact(&mut first).unwrap();
    interrupt.raise();
    assert!(matches!(blocked.join().unwrap(), StreamFault::GivenUp));

    let mut inlet = Inlet::command("exec:x", "sleep 1000").unwrap();
    let interrupt = inlet.interrupt();
    let blocked = thread::spawn(move || inlet.read(&mut [0]).unwrap_err());
    interrupt.raise();
    blocked.join().unwrap();
}

/// A named pipe in a folder of its own.
struct Fifo(std::path::PathBuf);

impl Fifo {
    fn new(name: &str) -> Self {
        let folder = format!("vmferry-streams-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        std::fs::create_dir(&folder).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, folder.join("fifo"), mode).unwrap();
        Self(folder)
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.join("fifo")
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_command_and_its_children_end_with_their_outlet() {
    let fifo = Fifo::new("children");
    // It does not want to end, and its child holds the pipe.
    let path = fifo.path();
    let open = format!("exec 3>'{}'", path.display());
    let command = format!("{open}; trap '' TERM; echo begun >&3; sleep 1000 & wait");
    let outlet = Outlet::command("exec:x", &command).unwrap();
    // A signal may interrupt the shell while it opens the pipe; it then opens it again, and a reader that was faster sees an end.
    let mut reader = loop {
        let mut reader = File::open(&path).unwrap();
        let mut begun = [0; 6];
        if reader.read_exact(&mut begun).is_ok() {
            break reader;
        }
    };
    drop(outlet);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn what_cannot_hold_an_archive_is_refused_by_its_kind() {
    let error = Inlet::file("file:/", std::path::Path::new("/"), 0).unwrap_err();
    assert_eq!(error.to_string(), "file:/: this is a directory");
    let error = Outlet::file("file:/", std::path::Path::new("/"), 0).unwrap_err();
    assert!(error.to_string().contains("cannot be opened"), "{error}");
}

#[test]
fn a_pipe_with_a_name_is_waited_for() {
    let fifo = Fifo::new("named");
    let path = fifo.path();
    // Nobody reads it: an error at once, and no wait for ever.
    let error = Outlet::file("file:fifo", &path, 0).unwrap_err();
    assert!(error.to_string().contains("cannot be opened"), "{error}");
    let mut inlet = Inlet::file("file:fifo", &path, 0).unwrap();
    let reading = thread::spawn(move || {
        let mut all = Vec::new();
        inlet.read_to_end(&mut all).unwrap();
        all
    });
    let mut outlet = Outlet::file("file:fifo", &path, 0).unwrap();
    outlet.put(b"archive").unwrap();
    outlet.finish().unwrap();
    drop(outlet);
    assert_eq!(reading.join().unwrap(), b"archive");
}

#[test]
fn whoever_gives_a_load_up_does_not_wait_for_a_word_of_the_target() {
    let hello = Hello {
        versions: VersionRange::OURS,
        migration_id: MigrationId([1; 16]),
        data_connections: 0,
        checksum: false,
        verify: false,
        software: String::new(),
        blocks: Vec::new(),
        devices: Vec::new(),
        uuid: None,
        switchover_ack: false,
    };
    let mut archive = ArchiveEncoder::default().start_in_place();
    archive.extend(SourceFrame::Hello(hello).encode());
    let (reader, writer) = io::pipe().unwrap();
    (&writer).write_all(&archive).unwrap();
    let inlet = Inlet::pipe("fd:a", reader.into()).unwrap();
    let (connect, connected) = mpsc::channel();
    let connect = Box::new(move |socket| connect.send(socket).unwrap());
    let (end, ended) = mpsc::channel();
    let failed = Box::new(move |error: StreamError| end.send(error.to_string()).unwrap());
    let loader = ArchiveLoader::start(inlet, &Deadlines::default(), connect, failed).unwrap();
    // It has been greeted, never answers, and waits for the loader's end itself.
    let mut target = stream(connected.recv_timeout(PATIENCE).unwrap());
    target.read_exact(&mut [0]).unwrap();
    let (done, over) = mpsc::channel();
    thread::spawn(move || {
        loader.give_up();
        done.send(()).unwrap();
    });
    over.recv_timeout(PATIENCE).unwrap();
    assert!(ended.recv_timeout(PATIENCE).unwrap().contains("given up"));
    drop(target);
}
