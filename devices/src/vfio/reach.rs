//! Guest memory as VFIO devices reach it: what their container maps, and whose addresses are behind the mappings while the VM changes
//! its process.
//!
//! A container belongs to one process at a time. There are two ways to change that:
//!
//! | [`Way`] | The old process | Meanwhile | The new process |
//! | --- | --- | --- | --- |
//! | [`Addresses`](Way::Addresses) | has the kernel forget its addresses (VFIO_DMA_UNMAP_FLAG_VADDR) | devices go on with their DMA: the IOMMU still has the pages, which are pinned | tells the kernel its own (VFIO_DMA_MAP_FLAG_VADDR) |
//! | [`Stopped`](Way::Stopped) | stops the devices, then unmaps everything | no device has memory, or a wish for it | maps everything, and lets them work when the guest is its own |
//!
//! If the new process fails, the old one takes the mappings from it, whatever it has done: it may be dead. So a new process that fails
//! undoes nothing by itself: one that was frozen, and comes late, could only take away what the old one has again.
//!
//! The kernel offers the first (VFIO_UPDATE_VADDR) unless one of the devices is a mediated one, whose driver looks addresses up when it
//! needs them and could not while there are none.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vmferry_transport::memory::ram::HostMapping;

use super::attach::KernelDma;
use super::face::Iova;

/// How devices get through a change of the process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// They go on; only the addresses behind the mappings change.
    Addresses,
    /// They are stopped, and without memory, for as long as it takes.
    Stopped,
}

/// Memory that is mapped for devices.
#[derive(Clone)]
pub struct Reached {
    /// Where devices see it, in bytes.
    pub iova: u64,
    /// The memory.
    pub memory: Arc<dyn HostMapping>,
}

/// Requests to a container about the memory that it maps. Whoever maps memory keeps it until it was unmapped or its address forgotten.
pub(super) trait DmaFace: Send + Sync {
    /// VFIO_UPDATE_VADDR.
    fn can_change_addresses(&self) -> io::Result<bool>;
    /// Maps memory. EEXIST if something is mapped there.
    fn map(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()>;
    /// Unmaps what was mapped in one piece.
    fn unmap(&self, range: Iova) -> io::Result<()>;
    /// The mapping stays, without an address. EINVAL if it has none.
    fn forget_address(&self, range: Iova) -> io::Result<()>;
    /// A mapping without an address has this one. EINVAL if it has another, ENOENT if there is no such mapping.
    fn tell_address(&self, range: Iova, memory: &dyn HostMapping) -> io::Result<()>;
}

/// The memory that the devices of a container reach.
///
/// A device with an IOMMU of its own needs all of it present and pinned, which the kernel does when it is mapped: memory that was never
/// touched is allocated, and counts against RLIMIT_MEMLOCK. Drivers of mediated devices pin what they use.
///
/// Unmaps everything when it is dropped, if this process has mapped it. To be dropped before the last device of the container: with that
/// the kernel forgets all mappings by itself. What was taken from another process stays mapped, and the memory with it, until this process
/// ends: nobody here can know whether the other has taken it back.
pub struct Reach {
    face: Arc<dyn DmaFace>,
    memory: Vec<Reached>,
    way: Way,
    /// Our addresses are behind the mappings, as far as we know.
    ours: bool,
    /// It was another process that has mapped them, and we have never let go.
    taken: bool,
}

impl Reached {
    fn range(&self) -> Iova {
        Iova {
            start: self.iova,
            bytes: self.memory.len(),
        }
    }
}

impl Reach {
    /// Maps `memory`, none of which overlaps, in a container that has its first device.
    ///
    /// # Errors
    /// The kernel's answer: EEXIST if something is mapped there, EINVAL if there is no device, ENOMEM over a limit. Nothing is mapped
    /// then.
    pub fn map<T>(container: T, memory: Vec<Reached>) -> io::Result<Self>
    where
        T: AsFd + Send + Sync + 'static,
    {
        Self::map_with(Arc::new(KernelDma(container)), memory)
    }

    /// For a container that another process still uses. [`take`](Self::take) makes it this one's.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn of_another<T>(container: T, memory: Vec<Reached>) -> io::Result<Self>
    where
        T: AsFd + Send + Sync + 'static,
    {
        Self::apart(Arc::new(KernelDma(container)), memory)
    }

    pub(super) fn map_with(face: Arc<dyn DmaFace>, memory: Vec<Reached>) -> io::Result<Self> {
        let mut this = Self::apart(face, Vec::new())?;
        (this.ours, this.taken) = (true, false);
        for reached in memory {
            this.face.map(reached.range(), reached.memory.as_ref())?;
            this.memory.push(reached);
        }
        Ok(this)
    }

    pub(super) fn apart(face: Arc<dyn DmaFace>, memory: Vec<Reached>) -> io::Result<Self> {
        let way = match face.can_change_addresses()? {
            true => Way::Addresses,
            false => Way::Stopped,
        };
        Ok(Self {
            face,
            memory,
            way,
            ours: false,
            taken: true,
        })
    }

    /// How the devices get through a change of the process.
    pub fn way(&self) -> Way {
        self.way
    }

    /// The old process lets go, with the vCPUs stopped, and the devices too where that is the way.
    ///
    /// # Errors
    /// The kernel's answer. Nothing is ours then, and [`take_back`](Self::take_back) finds its way from wherever this has ended.
    pub fn release(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.ours) {
            return Ok(());
        }
        self.memory.iter().try_for_each(|reached| match self.way {
            Way::Addresses => self.face.forget_address(reached.range()),
            Way::Stopped => self.face.unmap(reached.range()),
        })?;
        self.taken = false;
        Ok(())
    }

    /// The new process: the guest will not come. Changes nothing: the old one takes everything back.
    pub fn abandon(&mut self) {
        self.ours = false;
    }

    /// The new process: the old one has let go. Takes nothing from a process that has not.
    ///
    /// # Errors
    /// The kernel's answer: EEXIST or EINVAL if the old process has not let go, or has taken back, ENOMEM over a limit. What was taken
    /// until then is taken back by the old process.
    pub fn take(&mut self) -> io::Result<()> {
        if self.ours {
            return Ok(());
        }
        self.memory.iter().try_for_each(|reached| {
            let (range, memory) = (reached.range(), reached.memory.as_ref());
            match self.way {
                Way::Addresses => self.face.tell_address(range, memory),
                Way::Stopped => self.face.map(range, memory),
            }
        })?;
        self.ours = true;
        Ok(())
    }

    /// The old process: the guest stays. Also a new program in the same process (cpr-exec), where nobody else is left. Takes the mappings
    /// from whoever has them, which is nobody that will use them: the new process has failed, or has died.
    ///
    /// # Errors
    /// The kernel's answer: devices do not reach all memory.
    pub fn take_back(&mut self) -> io::Result<()> {
        if self.ours {
            return Ok(());
        }
        for reached in &self.memory {
            match self.way {
                Way::Addresses => self.take_back_address(reached)?,
                Way::Stopped => self.map_again(reached)?,
            }
        }
        self.ours = true;
        Ok(())
    }

    fn take_back_address(&self, reached: &Reached) -> io::Result<()> {
        let (range, memory) = (reached.range(), reached.memory.as_ref());
        let told = self.face.tell_address(range, memory);
        match told.as_ref().map_err(io::Error::raw_os_error) {
            // It has an address: that of the new process, or ours, of which it was never told to forget it.
            Err(Some(libc::EINVAL)) => {
                self.face.forget_address(range)?;
                self.face.tell_address(range, memory)
            }
            // Unmapped by somebody who should not have. DMA has failed meanwhile; from now on it does not.
            Err(Some(libc::ENOENT)) => self.face.map(range, memory),
            _ => told,
        }
    }

    fn map_again(&self, reached: &Reached) -> io::Result<()> {
        let (range, memory) = (reached.range(), reached.memory.as_ref());
        let mapped = self.face.map(range, memory);
        match mapped.as_ref().map_err(io::Error::raw_os_error) {
            Err(Some(libc::EEXIST)) => {
                self.face.unmap(range)?;
                self.face.map(range, memory)
            }
            _ => mapped,
        }
    }
}

impl Drop for Reach {
    fn drop(&mut self) {
        for reached in &self.memory {
            if self.taken {
                // The kernel may use it through our address, even after a failure half-way.
                std::mem::forget(Arc::clone(&reached.memory));
            } else if !self.ours {
                continue;
            } else if let Err(error) = self.face.unmap(reached.range()) {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    iova = reached.iova,
                    "guest memory stays mapped for devices"
                );
                // They may still write to it: it must never become something else's.
                std::mem::forget(Arc::clone(&reached.memory));
            }
        }
    }
}

impl fmt::Debug for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.range().fmt(f)
    }
}

impl fmt::Debug for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reach")
            .field("memory", &self.memory)
            .field("way", &self.way)
            .field("ours", &self.ours)
            .finish_non_exhaustive()
    }
}
