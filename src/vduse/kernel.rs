//! The kernel as the front-end of a VDUSE device: interrupts, and the mappings of I/O virtual addresses (rule V1).
//!
//! The kernel reports removed mappings and not added ones. A ring asks for a mapping when it first needs it.

#![forbid(unsafe_code)]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, Weak};

use crossbeam::channel::Sender;
use tracing::debug;

use crate::backend::session::DirectFrontend;
use crate::memory::{Access, GuestAddress, Iotlb, Iova, Memory, MemoryError, Region, UserAddress, overlap};
use crate::sys::lock;
use crate::vduse::files::DeviceFile;
use crate::vduse::messages::Task;

/// The kernel's side of one device. It does nothing once the file is closed.
#[derive(Debug)]
pub(super) struct Kernel {
    file: Weak<DeviceFile>,
    tasks: Sender<Task>,
    mapped: Mutex<Vec<MappedRegion>>,
}

#[derive(Debug, Clone)]
struct MappedRegion {
    region: Arc<Region>,
    permitted: Option<Access>,
}

impl MappedRegion {
    fn first(&self) -> Iova {
        Iova(self.region.gpa().0)
    }

    fn iovas(&self) -> RangeInclusive<Iova> {
        self.first()..=Iova(self.first().0.saturating_add(self.region.size() - 1))
    }

    fn uses(&self, iovas: &RangeInclusive<Iova>) -> bool {
        overlap(self.first(), self.region.size(), iovas)
    }
}

impl Kernel {
    pub(super) fn new(file: &Arc<DeviceFile>, tasks: Sender<Task>) -> Kernel {
        Kernel { file: Arc::downgrade(file), tasks, mapped: Mutex::default() }
    }

    /// Forgets the mappings that have any of these addresses. Returns the range that covers all addresses of the mappings:
    /// the rings that use them keep them until they are told (rule V1.5).
    pub(super) fn forget(&self, iovas: &RangeInclusive<Iova>) -> RangeInclusive<Iova> {
        let mut mapped = lock(&self.mapped);
        let (forgotten, kept) = mapped.drain(..).partition::<Vec<_>, _>(|mapped| mapped.uses(iovas));
        *mapped = kept;
        let wider =
            |a: RangeInclusive<Iova>, b: RangeInclusive<Iova>| *a.start().min(b.start())..=*a.end().max(b.end());
        forgotten.iter().map(MappedRegion::iovas).fold(iovas.clone(), wider)
    }
}

impl DirectFrontend for Kernel {
    fn config_changed(&self) {
        let _ = self.tasks.send(Task::ConfigChanged);
    }

    /// One system call for a batch of used buffers (rule V1.4).
    fn call(&self, ring: u16) {
        if let Some(Err(error)) = self.file.upgrade().map(|file| file.inject_irq(ring)) {
            debug!("ring {ring}: no interrupt: {error}");
        }
    }

    fn translate(&self, iova: Iova, iotlb: &Iotlb) -> Result<Memory, MemoryError> {
        // Held until `iotlb` is changed: the mapping is not forgotten in between.
        let mut all = lock(&self.mapped);
        let byte = iova..=iova;
        let mapped = match all.iter().find(|mapped| mapped.uses(&byte)) {
            Some(mapped) => mapped.clone(),
            None => {
                let mapped = self.map(iova)?;
                // Mappings that the kernel has replaced.
                let iovas = mapped.iovas();
                all.retain(|other| !other.uses(&iovas));
                all.push(mapped.clone());
                mapped
            }
        };
        let memory = Memory::new(all.iter().map(|mapped| mapped.region.clone()))?;
        iotlb.update(mapped.first(), mapped.region.size(), mapped.region.user_addr(), mapped.permitted)?;
        Ok(memory)
    }
}

impl Kernel {
    /// Maps the memory at an I/O virtual address into this process. Its guest-physical and its front-end address are the I/O
    /// virtual one.
    fn map(&self, iova: Iova) -> Result<MappedRegion, MemoryError> {
        let refused = |source: io::Error| MemoryError::Map { gpa: GuestAddress(iova.0), size: 1, source };
        let file = self.file.upgrade().ok_or_else(|| refused(io::ErrorKind::NotConnected.into()))?;
        let (entry, fd) = file.mapping(iova.0).map_err(refused)?;
        let size = entry.last.saturating_sub(entry.start).saturating_add(1);
        let region = Region::map(fd.as_fd(), GuestAddress(entry.start), size, UserAddress(entry.start), entry.offset)?;
        debug!("maps {size:#x} bytes at {:#x}", entry.start);
        Ok(MappedRegion { region: Arc::new(region), permitted: Access::from_permission(entry.perm) })
    }
}
