//! The beginning and the end of the data connections of an outgoing attempt.

use std::error::Error;
use std::os::fd::OwnedFd;

use vmferry_transport::data::DataSender;
use vmferry_transport::wire::frame::SourceFrame;
use vmferry_transport::wire::hello::DataHello;

use super::route::Route;

/// Opens a data connection, and says on it which one it is.
pub(super) async fn dial(route: Route, hello: DataHello) -> Result<OwnedFd, String> {
    let stream = route.data().await?;
    let (written, _) = stream
        .write_all(SourceFrame::DataHello(hello).encode())
        .await;
    written.map_err(|error| format!("data connection {}: {error}", hello.index))?;
    stream
        .into_socket()
        .map_err(|error| format!("data connection {}: {error}", hello.index))
}

/// Ends the data threads, and waits for them on a thread of its own; `joined` is dropped when they have ended.
pub(super) fn end_sender(sender: DataSender, joined: Option<tokio::sync::oneshot::Sender<()>>) {
    sender.abort();
    let join = move || {
        let totals = sender.join();
        tracing::debug!(?totals, "data threads have ended");
        drop(joined);
    };
    if let Err(error) = std::thread::Builder::new()
        .name("vm-join".into())
        .spawn(join)
    {
        // The closure is dropped, and with it the sender, which ends its threads by itself.
        tracing::warn!(
            error = &error as &dyn Error,
            "no thread to join the data threads with"
        );
    }
}
