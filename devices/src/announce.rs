//! Telling the network that a guest is now here, so that switches send its packets to the new place.

/// A network interface of the guest. The machine calls it when the guest has moved here, and when an operator asks for it.
pub trait Announce: Send + Sync {
    /// Name of the interface, as operators choose it by.
    fn name(&self) -> &str;

    /// Sends one announcement, or has the guest send one. Must not block; an announcement that cannot be sent is lost, and another
    /// one follows.
    fn announce(&self);
}
