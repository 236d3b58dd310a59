//! Either side of the protocol, spoken by hand: a source or target that says exactly what a test wants it to say.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use vmferry_transport::limits::{VERSION_MAX, VERSION_MIN};
use vmferry_transport::units::MigrationId;
use vmferry_transport::wire::frame::{Abort, ControlFrame, FrameBuffer, SourceFrame, TargetFrame};
use vmferry_transport::wire::hello::{DataHello, Hello, HelloReply};

use crate::harness::{PATIENCE, Vm, until};

/// A TCP connection that carries control frames.
pub(crate) struct Peer {
    pub(crate) socket: TcpStream,
    buffer: FrameBuffer,
}

impl Peer {
    pub(crate) fn new(socket: TcpStream) -> Self {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            socket,
            buffer: FrameBuffer::default(),
        }
    }

    /// Connects to where a VM listens.
    pub(crate) fn connect(address: &str) -> Self {
        Self::new(TcpStream::connect(socket_address(address)).unwrap())
    }

    /// Says something. The other side may have hung up: what it thought of it is then in what it said last.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// The next frame; `None` when the other side has closed the connection.
    pub(crate) fn hear<F: ControlFrame>(&mut self) -> Option<F> {
        loop {
            if let Some(frame) = self.buffer.poll_frame().unwrap() {
                return Some(frame);
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.buffer.push(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("the other side is silent")
                }
                Err(_) => return None,
            }
        }
    }

    /// The next frame that says more than "I am alive".
    pub(crate) fn hear_more(&mut self) -> Option<TargetFrame> {
        loop {
            let frame = self.hear()?;
            if frame != TargetFrame::Keepalive {
                return Some(frame);
            }
        }
    }

    /// The other side says why it gives up, and hangs up.
    pub(crate) fn assert_abort(&mut self, part: &str) -> Abort {
        let abort = match self.hear_more() {
            Some(TargetFrame::Abort(abort)) => abort,
            other => panic!("{other:?} instead of a reason with {part:?}"),
        };
        assert!(
            abort.reason.contains(part),
            "{abort:?} does not name {part:?}"
        );
        assert_eq!(self.hear_more(), None, "it goes on after {abort:?}");
        abort
    }

    pub(crate) fn hang_up(&self) {
        // It may have hung up already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The socket address behind `tcp:HOST:PORT`.
pub(crate) fn socket_address(address: &str) -> SocketAddr {
    address.strip_prefix("tcp:").unwrap().parse().unwrap()
}

/// A target that is none: accepts connections and leaves the rest to the test.
pub(crate) struct FakeTarget {
    listener: TcpListener,
}

impl FakeTarget {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { listener }
    }

    pub(crate) fn address(&self) -> String {
        format!("tcp:{}", self.listener.local_addr().unwrap())
    }

    /// The next connection.
    pub(crate) fn accept(&self) -> Peer {
        let socket = until("somebody connects", || {
            self.listener.accept().ok().map(|(socket, _)| socket)
        });
        socket.set_nonblocking(false).unwrap();
        Peer::new(socket)
    }

    /// Accepts a control connection and reads its hello.
    pub(crate) fn accept_hello(&self) -> (Peer, Hello) {
        let mut control = self.accept();
        match control.hear() {
            Some(SourceFrame::Hello(hello)) => (control, hello),
            other => panic!("{other:?} instead of a hello"),
        }
    }

    /// Accepts a migration as far as the data connections: answers the hello and takes all of them.
    pub(crate) fn accept_migration(&self) -> (Peer, Vec<Peer>) {
        let (mut control, hello) = self.accept_hello();
        control.say(&reply().encode());
        let data = (0..hello.data_connections)
            .map(|_| {
                let mut data = self.accept();
                match data.hear() {
                    Some(SourceFrame::DataHello(_)) => data,
                    other => panic!("{other:?} instead of a data hello"),
                }
            })
            .collect();
        (control, data)
    }
}

/// What a good target answers to a hello.
pub(crate) fn reply() -> TargetFrame {
    TargetFrame::HelloReply(HelloReply {
        version: VERSION_MAX,
        software: "test".to_owned(),
    })
}

/// The hello of a VM like `source`, for a source that is none.
pub(crate) fn hello_of(source: &mut Vm) -> Hello {
    let fake = FakeTarget::new();
    source.migrate(&fake.address());
    let (control, hello) = fake.accept_hello();
    control.hang_up();
    assert_eq!(source.wait_migration()["status"], "failed");
    assert_eq!(
        (hello.versions.min, hello.versions.max),
        (VERSION_MIN, VERSION_MAX)
    );
    hello
}

/// A source that is none: connects to a real target and has its hello accepted.
pub(crate) struct FakeSource {
    pub(crate) control: Peer,
    pub(crate) hello: Hello,
    address: String,
}

impl FakeSource {
    pub(crate) fn new(hello: &Hello, target: &mut Vm) -> Self {
        let address = target.address();
        let mut control = Peer::connect(&address);
        control.say(&SourceFrame::Hello(hello.clone()).encode());
        match control.hear_more() {
            Some(TargetFrame::HelloReply(_)) => {}
            other => panic!("{other:?} instead of an answer to the hello"),
        }
        Self {
            control,
            hello: hello.clone(),
            address,
        }
    }

    /// A good hello of data connection `index`.
    pub(crate) fn data_hello(&self, index: u16) -> DataHello {
        DataHello {
            version: VERSION_MAX,
            migration_id: self.hello.migration_id,
            index,
            count: self.hello.data_connections,
        }
    }

    /// Opens a connection with this hello.
    pub(crate) fn open(&self, hello: DataHello) -> Peer {
        let mut data = Peer::connect(&self.address);
        data.say(&SourceFrame::DataHello(hello).encode());
        data
    }
}

/// An id that nobody else uses.
pub(crate) fn some_id(number: u8) -> MigrationId {
    MigrationId([number; 16])
}
