//! A control connection as the engine uses it: frames go into a queue, frames come out as events.
//!
//! One task reads until the stream ends, one task writes what is queued, several frames at a time. Neither is ever cancelled; shutting
//! the stream down ends both.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use vmferry_transport::control::{Stream, runtime};
use vmferry_transport::streams::is_shared;
use vmferry_transport::wire::WireError;
use vmferry_transport::wire::frame::{ControlFrame, FrameBuffer};

/// How long closing waits for queued frames to leave. A peer that takes nothing for so long does not get the last word.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
/// How long the control connection has for telling why a data connection was lost. A side that gives up closes all of them, and what
/// it says of its reason may be the last to arrive.
pub(super) const LAST_WORD: Duration = Duration::from_secs(2);
/// Bytes asked for in one read: device sections are a few KiB.
const READ_BYTES: usize = 64 << 10;

/// What a link reports.
#[derive(Debug)]
pub(super) enum LinkEvent<F> {
    /// A frame came.
    Frame(F),
    /// Nothing more will come.
    Lost {
        /// Why, for people.
        error: String,
        /// The peer's bytes were at fault, not the link, which can still be written to.
        protocol: bool,
    },
}

/// A connected control connection.
#[derive(Debug)]
pub(super) struct ControlLink {
    queue: mpsc::UnboundedSender<Vec<u8>>,
    stream: Rc<Stream>,
    written: oneshot::Receiver<()>,
}

impl ControlLink {
    /// Starts the tasks of a connection. `buffer` holds what was read before; `report` gets every frame and, last of all, the loss.
    pub(super) fn start<F: ControlFrame + 'static>(
        stream: Stream,
        buffer: FrameBuffer,
        report: impl Fn(LinkEvent<F>) + 'static,
    ) -> Self {
        let stream = Rc::new(stream);
        let (queue, queued) = mpsc::unbounded_channel();
        let (done, written) = oneshot::channel();
        runtime::spawn(write_queue(Rc::clone(&stream), queued, done));
        runtime::spawn(read_frames(Rc::clone(&stream), buffer, report));
        Self {
            queue,
            stream,
            written,
        }
    }

    /// Queues an encoded frame. Lost if the link is: the reader reports that.
    pub(super) fn send(&self, frame: Vec<u8>) {
        // The writer has ended if the link is lost, which the reader reports.
        let _ = self.queue.send(frame);
    }

    /// Ends both directions at once, whatever is queued or under way.
    pub(super) fn shut(&self) {
        self.stream.shutdown();
    }

    /// Ends the link when everything queued has left, or after a second.
    pub(super) async fn close(self) {
        let Self {
            queue,
            stream,
            written,
        } = self;
        drop(queue);
        // Either way the stream is shut down next.
        let _ = tokio::time::timeout(FLUSH_DEADLINE, written).await;
        stream.shutdown();
    }
}

async fn write_queue(
    stream: Rc<Stream>,
    mut queued: mpsc::UnboundedReceiver<Vec<u8>>,
    done: oneshot::Sender<()>,
) {
    while let Some(mut bytes) = queued.recv().await {
        while let Ok(more) = queued.try_recv() {
            bytes.extend_from_slice(&more);
        }
        if let (Err(error), _) = stream.write_all(bytes).await {
            tracing::debug!(
                peer = stream.peer(),
                error = &error as &dyn std::error::Error,
                "control write failed"
            );
            // The reader may have nothing to read for long: wake it, so that the loss is noticed now.
            stream.shutdown();
            break;
        }
    }
    // Nobody may be waiting any more.
    let _ = done.send(());
}

async fn read_frames<F: ControlFrame>(
    stream: Rc<Stream>,
    mut buffer: FrameBuffer,
    report: impl Fn(LinkEvent<F>),
) {
    let mut bytes = Vec::with_capacity(READ_BYTES);
    loop {
        loop {
            match buffer.poll_frame() {
                Ok(Some(frame)) => report(LinkEvent::Frame(frame)),
                Ok(None) => break,
                // The other direction may still carry the reason for giving up.
                Err(error) => {
                    report(LinkEvent::Lost {
                        error: error.to_string(),
                        protocol: true,
                    });
                    return;
                }
            }
        }
        match read_more(&stream, bytes, &mut buffer).await {
            Ok(buf) => bytes = buf,
            Err(error) => {
                report(LinkEvent::Lost {
                    error,
                    protocol: false,
                });
                return;
            }
        }
    }
}

async fn read_more(
    stream: &Stream,
    mut bytes: Vec<u8>,
    buffer: &mut FrameBuffer,
) -> Result<Vec<u8>, String> {
    bytes.clear();
    let (read, bytes) = stream.read(bytes).await;
    match read {
        Ok(0) if buffer.pending() > 0 => {
            Err("the peer closed the connection in the middle of a frame".to_owned())
        }
        Ok(0) => Err("the peer closed the connection".to_owned()),
        Ok(count) => {
            buffer.push(&bytes[..count]);
            Ok(bytes)
        }
        Err(error) => Err(format!("reading failed: {error}")),
    }
}

/// Why a new connection was not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum FirstFrameError {
    /// The peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Several connections come over this one; what was read of it.
    #[error("a shared connection")]
    Shared(Vec<u8>),
    /// The connection ended, or was shut down because the deadline had passed.
    #[error("{0}")]
    Link(String),
}

/// Reads the first frame of a new connection. What came behind it stays in the buffer that is returned.
pub(super) async fn first_frame<F: ControlFrame>(
    stream: &Stream,
) -> Result<(F, FrameBuffer), FirstFrameError> {
    let mut buffer = FrameBuffer::default();
    let mut bytes = Vec::with_capacity(READ_BYTES);
    loop {
        match buffer.poll_frame() {
            Ok(Some(frame)) => return Ok((frame, buffer)),
            Ok(None) => {}
            Err(WireError::Magic { first_bytes }) if is_shared(&first_bytes) => {
                return Err(FirstFrameError::Shared(buffer.into_rest()));
            }
            Err(error) => return Err(error.into()),
        }
        bytes = read_more(stream, bytes, &mut buffer)
            .await
            .map_err(FirstFrameError::Link)?;
    }
}
