//! In an upgrade in place, who had the VM's devices before this program: VFIO devices and vhost back ends ask.

/// Who had the devices before.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Before {
    /// Another process, which may want them back.
    #[default]
    Process,
    /// Another program in this process, which is gone (cpr-exec). A program that has failed after it took them was there too.
    Program,
}
